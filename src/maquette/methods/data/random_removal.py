"""Size-matched random removal: the control a data intervention needs.

An arm with fewer documents and the same steps sees each of them more often, so part of every
"filter" effect is repetition. This control removes as many bytes as another operation would, but
whole documents at random. Longpre et al. (2023, arXiv:2305.13169) compare with the full corpus
and the inverse filter only; the control is this library's addition.

Whether a document goes depends on a hash of its id and the seed, never on its place in the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.data.documents import byte_lengths
from maquette.data.scores import Mask, drop_rows, hash_bound, hash_uniform, ids_of, kept_rows
from maquette.errors import BadInput, KeepsNothing
from maquette.parts import Card, Ctx, DataOp, Part, State, register
from maquette.quantities import parse_bytes


def seed_salt(seed: int) -> bytes:
    """Salt of the hash that decides, 16 bytes at most."""
    return f"random {seed}".encode()[:16]


def random_removal(
    ids: Sequence[str], sizes: NDArray[Any], remove_bytes: float, seed: int = 0
) -> Mask:
    """True for the documents to remove so that about `remove_bytes` go, shape (N,).

    sizes: bytes (or tokens) of each document, shape (N,). The sum removed is within half a
    document of the target. Raises ValueError if the target is outside [0, sum of sizes].
    """
    bound, _ = hash_bound(ids, sizes, remove_bytes, seed_salt(seed))
    removed: Mask = hash_uniform(ids, seed_salt(seed)) < bound
    return removed


@register("random-removal")
class RandomRemoval(DataOp):
    """Remove whole documents at random, as many bytes as asked or as another operation removes."""

    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    card: ClassVar[Card] = Card(
        title="Size-matched random removal",
        paper="control for Longpre et al., 2023, A Pretrainer's Guide to Training Data",
        arxiv="2305.13169",
        idea="Remove documents at random until as many bytes are gone as a filter under test "
        "removes. What the filter does beyond this is what its choice of documents does.",
        claim="A filter differs from removing as many bytes at random.",
        defaults_from="this library; the paper has no such control",
        cost="`like` applies the other operation once to the sample; its scores are cached and "
        "shared with the arm that uses it.",
        when="Beside every arm that removes data.",
        example="""\
import numpy as np
from maquette.methods.data.random_removal import random_removal

ids = [f"doc-{n}" for n in range(1000)]
sizes = np.full(1000, 50)
removed = random_removal(ids, sizes, remove_bytes=10_000, seed=1)
print(sizes[removed].sum())  # 10000
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"fraction": 0.2},)

    fraction: float | None = Field(None, gt=0, lt=1)
    """Fraction of the bytes to remove."""
    keep: str | None = None
    """Bytes of text to leave (`64KB`), for a run whose data are few: the held-out part stays."""
    like: dict[str, Any] | str | None = None
    """Another data operation (`{type: quality-filter, ...}`): remove as many bytes as it drops."""
    seed: int = 0
    """Which documents go. Not the seed of the run: all runs of an arm share one corpus."""
    complement: bool = False
    """Remove the others instead: with and without it, the two sides of one partition, so that a
    scorer or a teacher can learn from text that is not trained on."""

    @model_validator(mode="after")
    def _one_amount(self) -> RandomRemoval:
        if sum(given is not None for given in (self.fraction, self.keep, self.like)) != 1:
            raise ValueError(
                "give one of `fraction` (of the bytes), `keep` (bytes) and `like` (an operation)"
            )
        if self.keep is not None:
            parse_bytes(self.keep)
        if self.like is not None:
            self.model()
        return self

    def model(self) -> DataOp:
        """The operation named by `like`; BadInput if there is none of that name."""
        from maquette.recipe import parse_part

        return parse_part(DataOp, self.like, key="like")  # type: ignore[type-abstract]

    def reads(self) -> Mapping[str, str]:
        """What the operation named by `like` reads."""
        return self.model().reads() if self.like is not None else {}

    def same_tokenizer(self) -> Collection[str]:
        return self.model().same_tokenizer() if self.like is not None else ()

    def check_reads(self, stages: Mapping[str, Part]) -> None:
        if self.like is not None:
            self.model().check_reads(stages)

    def apart(self) -> Collection[str]:
        return self.model().apart() if self.like is not None else ()

    def check_domains(self, domains: Collection[str]) -> None:
        if self.like is not None:
            self.model().check_domains(domains)

    def digest_key(self) -> str:
        inner = self.model().digest_key() if self.like is not None else ""
        return json.dumps([self.spec(), inner], sort_keys=True)

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Find the hash below which documents go.

        The bytes removed match within half a document when the sample is the whole corpus; from a
        smaller sample it is the fraction of the bytes that matches, up to its sampling error.
        """
        live = kept_rows(sample)
        sizes = byte_lengths(sample)[live]
        total = int(sizes.sum())
        if self.like is not None:
            target = self._removed_by_model(sample, ctx)
        elif self.keep is not None:
            target = float(total - parse_bytes(self.keep))
            if target < 0:
                raise BadInput(
                    f"{self.keep} is more than the {total} bytes there are",
                    key="keep",
                    mend="keep less, or give a larger corpus",
                )
        else:
            target = (self.fraction or 0.0) * total
        if target >= total:
            raise KeepsNothing(
                f"removing {target:.0f} of {total} bytes leaves nothing",
                key="like" if self.like is not None else "fraction",
                mend="remove less",
            )
        bound, removed = hash_bound(ids_of(sample, live), sizes, target, seed_salt(self.seed))
        return State(meta={"bound": bound, "target_bytes": target, "removed_bytes": removed})

    def _removed_by_model(self, sample: pa.Table, ctx: Ctx) -> float:
        op = self.model()
        state = op.fit(sample, ctx)
        lost = 0
        for batch in sample.to_batches():
            gone = kept_rows(batch) & ~kept_rows(op.apply(batch, state))
            lost += int(byte_lengths(batch)[gone].sum())
        if lost == 0:
            raise BadInput(
                f"`{type(op).type}` removes nothing of this corpus, so there is nothing to match",
                key="like",
                mend="lower its threshold, or leave the control out",
            )
        return float(lost)

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        gone = hash_uniform(ids_of(batch), seed_salt(self.seed)) < float(state.meta["bound"])
        gone ^= self.complement
        return drop_rows(batch, {int(n): "random removal" for n in np.flatnonzero(gone)})
