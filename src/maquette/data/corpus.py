"""From a corpus on disk to tokens ready to train on, computed once and cached by content.

Four layers, each a folder under the cache, each named by the digest of what went into it:
`documents-*` (read, without duplicates, split), `curated-*` (its training part after data parts),
`tokenizer-*` and `tokens-*` (one per part). The tokenizer is trained before data parts apply and
the evaluation parts never pass through them, so arms that differ in data stay comparable.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from maquette.data import table, tokenizers
from maquette.data.cache import built_once, digest, read_card
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.documents_layer import DedupSpec, split_documents
from maquette.data.engines import Engine, InProcess
from maquette.data.packing import PackedTokens, pack
from maquette.data.readers import fingerprint
from maquette.data.steps import DataOp, Progress, Step, run_steps
from maquette.data.table import stored
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.quantities import parse_bytes

_FORMAT = 2


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. Parts: `train`, `held_out`, and `dev` if a fraction was asked for it."""

    parts: dict[str, tuple[Path, Path]]
    """{part: (Parquet file of documents, folder of tokens)}."""
    tokenizer_folder: Path
    dropped_files: tuple[Path, ...]
    card: dict[str, Any]
    """Documents, bytes and tokens read, dropped by reason, and kept, as plain values."""
    bills: dict[str, Any] = field(default_factory=dict)
    """{layer: ledger} of what each data part billed. The layer names the part and all before it, so
    corpora that share a beginning of their data parts share its names."""

    def part(self, name: str) -> PackedTokens:
        """The tokens of a part. Raises BadInput if the corpus was prepared without it."""
        if name not in self.parts:
            raise BadInput(
                f"the corpus has no part `{name}`",
                where=self.card["path"],
                key="dev_fraction" if name == "dev" else "held_out_fraction",
                mend=f"have {', '.join(self.parts)}; give the part a fraction above 0",
            )
        return PackedTokens.open(self.parts[name][1])

    @cached_property
    def train(self) -> PackedTokens:
        return self.part("train")

    @cached_property
    def held_out(self) -> PackedTokens:
        return self.part("held_out")

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizers.load(self.tokenizer_folder)

    @property
    def domains(self) -> tuple[str, ...]:
        return self.train.domains

    @property
    def digest(self) -> str:
        """Digest of the tokens of all parts and of the tokenizer."""
        return self.card["digest"]

    def name_of(self, part: str) -> str:
        """A name of a part's documents, for what is made of them and cached."""
        source = self.parts[part][0]
        return f"{source.parent.name}/{source.stem}"

    def labels_digest(self, part: str) -> str:
        """Digest of the id, domain and year of a part's documents, which its tokens do not tell."""
        found = hashlib.blake2b(digest_size=16)
        for batch in stored(self.parts[part][0], ["id", "domain", "year"]):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                found.update(repr(row).encode())
        return found.hexdigest()

    def documents(self, split: str = "train") -> Iterator[pa.RecordBatch]:
        """Batches of the kept documents of a part; row numbers are `PackedTokens.doc_row`."""
        self.part(split)
        return stored(self.parts[split][0])

    def dropped(self) -> Iterator[pa.RecordBatch]:
        """Batches of (id, domain, year, source, bytes, why) of documents left out."""
        for path in self.dropped_files:
            yield from stored(path)


def prepare(
    spec: CorpusSpec | str,
    tokenizer: TokenizerSpec | None = None,
    *,
    cache: Path,
    held_out_fraction: float = 0.05,
    dev_fraction: float = 0.0,
    dedup: DedupSpec | None = None,
    ops: Sequence[Step] = (),
    ctx: Any = None,
    progress: Progress | None = None,
) -> Corpus:
    """Read, deduplicate, split, curate, tokenise and pack a corpus; later calls only open it.

    cache: folder for the layers. held_out_fraction, dev_fraction: expected fractions of clusters.
    ops: data parts and selections, in order, for the training part alone; `ctx` is handed to
    their `fit` and `choose`.
    Raises BadInput if the corpus, the split or the tokenizer cannot be had from this input.
    """
    spec = CorpusSpec.model_validate(spec)
    tokenizer = tokenizer or TokenizerSpec()
    rules, cache, tell = dedup or DedupSpec(), Path(cache), progress or (lambda *_: None)
    fractions = {"held_out": held_out_fraction, "dev": dev_fraction}
    if tokenizer.type == tokenizers.FROM_DEV and not dev_fraction:
        raise BadInput(
            f"`{tokenizers.FROM_DEV}` trains a tokenizer on a part that is empty",
            where=spec.path,
            key="dev_fraction",
            mend="0.1, or `tokenizer: null` to train it on the training part",
        )
    base, top, bills = _layers(spec, rules, fractions, ops, cache, ctx, InProcess(), tell)
    dropped_files = [folder / "dropped.parquet" for folder in dict.fromkeys((base, top))]
    trained = _tokenizer_folder(tokenizer, base, cache, tell)
    files = {"train": top / "train.parquet"}
    files |= {p: base / f"{p}.parquet" for p, fraction in fractions.items() if fraction > 0}
    parts = {}
    for part, path in files.items():
        key = digest(_FORMAT, path.parent.name, part, trained.name)
        build = partial(_tokens, path, trained, tell=tell)
        folder = built_once(cache, f"tokens-{key}", build)
        parts[part] = (path, folder)
    card = _card(spec, base, top, trained, parts)
    return Corpus(parts, trained, tuple(dropped_files), card, bills)


def domains_of(
    spec: CorpusSpec,
    *,
    cache: Path,
    held_out_fraction: float,
    dev_fraction: float,
    progress: Progress | None = None,
) -> set[str]:
    """Domains of the training part, by the layer of documents alone, which `prepare` then finds."""
    fractions = {"held_out": held_out_fraction, "dev": dev_fraction}
    tell = progress or (lambda *_: None)
    base, _, _ = _layers(spec, DedupSpec(), fractions, (), Path(cache), None, InProcess(), tell)
    found: set[str] = set()
    for batch in stored(base / "train.parquet", ["domain"]):
        found.update(batch["domain"].unique().to_pylist())
    return found


@dataclass(frozen=True)
class Curated:
    """Documents after duplicates and data parts; nothing is split off or tokenised."""

    kept: Path
    dropped_files: tuple[Path, ...]
    card: dict[str, Any]

    def documents(self) -> Iterator[pa.RecordBatch]:
        return stored(self.kept)

    def dropped(self) -> Iterator[pa.RecordBatch]:
        """Batches of (id, domain, year, source, bytes, why)."""
        for path in self.dropped_files:
            yield from stored(path)


def curate(
    spec: CorpusSpec | str,
    ops: Sequence[Step],
    *,
    cache: Path,
    dedup: DedupSpec | None = None,
    ctx: Any = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    allow_empty: bool = False,
) -> Curated:
    """Read a corpus, remove duplicates and apply data parts; cached like `prepare`.

    engine: who does the row-wise work, this process by default. The result is the same to the
    byte, which is why the cache does not tell engines apart.
    allow_empty: data parts may drop every document, which is refused otherwise.
    """
    spec = CorpusSpec.model_validate(spec)
    none = {"held_out": 0.0, "dev": 0.0}
    # Nothing is split, so nothing need stay on one side of a split.
    rules = (dedup or DedupSpec()).model_copy(update={"group": None})
    tell = progress or (lambda *_: None)
    running, cache = engine or InProcess(), Path(cache)
    base, top, _ = _layers(spec, rules, none, ops, cache, ctx, running, tell, allow_empty)
    folders = tuple(dict.fromkeys((base, top)))
    first = read_card(base)
    card = {
        "read": first["read"],
        "duplicates": first["duplicates"],
        "ops": read_card(top)["ops"] if ops else [],
        "kept": read_card(top)["train"] if ops else first["parts"]["train"],
    }
    return Curated(top / "train.parquet", tuple(f / "dropped.parquet" for f in folders), card)


def _layers(
    spec: CorpusSpec,
    rules: DedupSpec,
    fractions: dict[str, float],
    ops: Sequence[Step],
    cache: Path,
    ctx: Any,
    engine: Engine,
    tell: Progress,
    allow_empty: bool = False,
) -> tuple[Path, Path, dict[str, Any]]:
    """Folders of the documents, and of what data parts left of the training part; their bills."""
    held_out, dev = fractions["held_out"], fractions["dev"]
    if not (0 <= held_out < 1 and 0 <= dev < 1 - held_out):
        raise BadInput(
            f"fractions must be >= 0 and sum to less than 1, got {held_out} held out and {dev} dev",
            where=spec.path,
            key="held_out_fraction",
            mend="0.05 is usual",
        )
    key = digest(_FORMAT, spec.model_dump(), rules.model_dump(), fractions, fingerprint(spec))
    base = built_once(
        cache,
        f"documents-{key}",
        lambda to: split_documents(spec, rules, fractions, engine, to, tell),
    )
    if not ops:
        return base, base, {}
    keys = [op.digest_key() for op in ops]

    def curated(n: int) -> str:
        """Name of what the first n data parts leave."""
        read = {name: ctx.stage(name).digest for op in ops[:n] for name in op.reads()}
        facts = [*([read] if read else []), *(["may be empty"] if allow_empty else [])]
        return f"curated-{digest(_FORMAT, base.name, keys[:n], *facts)}"

    steps = partial(run_steps, base / "train.parquet", ops, ctx, engine, allow_empty=allow_empty)
    top = built_once(cache, curated(len(ops)), lambda to: steps(to, tell))
    if ctx is None:
        return base, top, {}
    card = read_card(top)
    # What the parts cost is paid by every run that uses them, whoever computed them first.
    ctx.ledger.add(type(ctx.ledger).from_dict(card["ledger"]))
    if "bills" not in card:  # of a cache from before bills were kept by part
        return base, top, {top.name: card["ledger"]}
    return base, top, {curated(n): bill for n, bill in enumerate(card["bills"], 1)}


def _tokenizer_folder(spec: TokenizerSpec, base: Path, cache: Path, tell: Progress) -> Path:
    """Layer 3: trained on the documents before data parts, or a copy of the one that was named."""
    if not spec.is_trained:
        loaded = tokenizers.load(spec.type)
        key = digest(_FORMAT, tokenizers.content_digest(loaded))

        def build(to: Path) -> dict[str, Any]:
            loaded.save_pretrained(to)
            return {"digest": tokenizers.content_digest(loaded), "vocabulary": len(loaded)}

    else:
        source = base / ("dev.parquet" if spec.type == tokenizers.FROM_DEV else "train.parquet")
        key = digest(_FORMAT, spec.model_dump(), [] if spec.type == "bytes" else [base.name])

        def build(to: Path) -> dict[str, Any]:
            limit = parse_bytes(spec.sample)
            tell("train tokenizer", 0, limit)
            batches = table.sample(source, limit)
            texts = (t for batch in batches for t in batch["text"].to_pylist())
            made = tokenizers.train(spec, texts)
            made.save_pretrained(to)
            tell("train tokenizer", limit, limit)
            return {"digest": tokenizers.content_digest(made), "vocabulary": len(made)}

    return built_once(cache, f"tokenizer-{key}", build)


def _stored_bytes(source: Path) -> int:
    card = read_card(source.parent)
    return int((card.get("parts", card)[source.stem])["bytes"])


def _tokens(source: Path, tokenizer: Path, to: Path, tell: Progress) -> dict[str, Any]:
    """Layer 4: the tokens of one part."""
    stage, total = f"tokenise {source.stem}", _stored_bytes(source)
    packed = pack(
        stored(source, ["id", "text", "domain"]),
        tokenizers.load(tokenizer),
        to,
        lambda done: tell(stage, done, total),
    )
    return {
        "documents": packed.n_documents,
        "bytes": packed.n_bytes,
        "tokens": packed.n_tokens,
        "digest": packed.digest,
    }


def _card(
    spec: CorpusSpec, base: Path, top: Path, trained: Path, parts: dict[str, tuple[Path, Path]]
) -> dict[str, Any]:
    first = read_card(base)
    token_cards = {part: read_card(folder) for part, (_, folder) in parts.items()}
    vocabulary = read_card(trained)
    dropped = Counter(first["read"]["dropped"])
    dropped.update({why: n for why, n in first["duplicates"].items() if n})
    warnings: dict[str, str] = {}
    if top != base:
        for stage in read_card(top)["ops"]:
            dropped.update(stage["dropped"])
            warnings |= stage["warnings"]
    return {
        "path": spec.path,
        "digest": digest(vocabulary["digest"], {p: c["digest"] for p, c in token_cards.items()}),
        "read": {"documents": first["read"]["documents"], "bytes": first["read"]["bytes"]},
        "dropped": dict(dropped),
        "warnings": warnings,
        "notes": first["read"]["notes"],
        "largest_group": first["largest_group"],
        "parts": {
            p: {k: c[k] for k in ("documents", "bytes", "tokens")} for p, c in token_cards.items()
        },
        "vocabulary": vocabulary["vocabulary"],
    }


__all__ = [
    "Corpus",
    "CorpusSpec",
    "DataOp",
    "DedupSpec",
    "Progress",
    "TokenizerSpec",
    "curate",
    "prepare",
]
