"""Which tokenizer a stage reads with, as far as a recipe tells, and what is refused for it.

Weights or logits of two vocabularies cannot be averaged, and a teacher of another one scores other
tokens. Where two tokenizers are certain to differ this is said when the recipe is read, and not
after the first of the stages was trained. A tokenizer that is only named (a folder, a hub name) is
known once it is loaded: the run compares those by their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.tokenizers import FROM_DEV, TokenizerSpec
from maquette.errors import BadInput
from maquette.quantities import parse_bytes

if TYPE_CHECKING:
    from maquette.parts import Part
    from maquette.recipe import Recipe, Stage

N_BYTES = 256
_LIMIT = "workload.corpus.limit"
_NO_MATTER = {"path", "domain_column", "year_column", "max_expansion"}
"""Keys of a corpus that change no text, besides the path, which is compared apart."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """What decides a tokenizer: recipe keys and their values, those that matter and no others.

    made: it is made from these; a tokenizer that is only named may be a copy of any other.
    share, sample: the part of the corpus that a `bpe` is trained on, and at most how many bytes.
    """

    made: bool
    facts: tuple[tuple[str, Any], ...]
    share: float = 1.0
    sample: str = ""

    def difference(self, other: TokenizerIdentity) -> tuple[str, Any, Any] | None:
        """A key whose two values are certain to give two tokenizers, with both; None if none is.

        A corpus counts as another one where any key of it differs, even one that its documents
        would not show (`min_chars`, a `limit` above its size): giving it twice costs nothing. Only
        limits above the sample are let pass, because the documents sampled are then the same.
        """
        if not (self.made and other.made):
            return None
        theirs = dict(other.facts)
        for key, mine in self.facts:
            if key not in theirs or mine == theirs[key]:
                continue
            if key == _LIMIT and min(self._read(mine), other._read(theirs[key])) > 0:
                continue
            return key, mine, theirs[key]
        return None

    def _read(self, limit: str | None) -> float:
        """Bytes of the training text beyond the sample."""
        whole = float("inf") if limit is None else parse_bytes(limit)
        return self.share * whole - parse_bytes(self.sample)


def inherits_tokenizer(stage: Stage) -> bool:
    """Whether a stage reads with the tokenizer of the one it starts from (the first of several)."""
    return (
        stage.init is not None
        and not any(cut.replaces_tokenizer for cut in stage.surgery)
        and getattr(stage.workload, "tokenizer", None) is None
    )


def tokenizer_of(stage: Stage, stages: Mapping[str, Stage]) -> TokenizerIdentity:
    """What decides the tokenizer that a stage reads with. stages: those of its recipe, by name."""
    return _identity(_decider(stage, stages))


def _decider(stage: Stage, stages: Mapping[str, Stage]) -> Stage:
    """The stage whose workload decides the tokenizer."""
    while stage.init is not None and inherits_tokenizer(stage):
        stage = stages[stage.init.stages[0]]
    return stage


def _identity(stage: Stage) -> TokenizerIdentity:
    workload = stage.workload
    named = TokenizerIdentity(False, (("workload", str(workload.spec())),))
    spec_of, corpus = getattr(workload, "tokenizer_spec", None), getattr(workload, "corpus", None)
    if spec_of is None or not isinstance(corpus, CorpusSpec):
        return named  # a workload of a third party
    spec: TokenizerSpec = spec_of(stage.special_tokens)
    if not spec.is_trained:
        return TokenizerIdentity(False, (("workload.tokenizer", spec.type),))
    facts: tuple[tuple[str, Any], ...] = (
        ("workload.tokenizer", spec.type),
        ("template", spec.template),
        ("special_tokens", tuple(spec.special_tokens())),
    )
    if spec.type == "bytes":
        return TokenizerIdentity(True, facts)
    held_out, dev = (getattr(workload, f"{part}_fraction", 0.0) for part in ("held_out", "dev"))
    facts += (("workload.vocabulary", spec.vocabulary), *_text_of(corpus))
    if spec.type == FROM_DEV:
        facts += (("workload.held_out_fraction", held_out), ("workload.dev_fraction", dev))
    else:  # only what is left for training decides
        facts += (("workload.held_out_fraction + dev_fraction", round(held_out + dev, 9)),)
    # Without a single merge it may be `bytes`, whatever it was trained on.
    merges = spec.vocabulary > len(spec.special_tokens()) + N_BYTES
    share = dev if spec.type == FROM_DEV else 1 - held_out - dev
    return TokenizerIdentity(merges, facts, share, spec.sample)


def _text_of(corpus: CorpusSpec) -> Iterator[tuple[str, Any]]:
    """The keys of a corpus that decide its text."""
    local = not corpus.path.startswith(("python:", "hub:"))
    path = str(Path(corpus.path).expanduser().resolve()) if local else corpus.path
    yield "workload.corpus.path", path
    for key, value in corpus.model_dump(exclude=_NO_MATTER).items():
        yield f"workload.corpus.{key}", value


# --- what a recipe is refused for ----------------------------------------------------------------


def check_tokenizers(recipe: Recipe, where: object = None) -> None:
    """Refuse stages that must share a tokenizer and certainly do not.

    They are the stages of a soup or an ensemble, and those that a part reads as models of its own
    stage's tokenizer (`Part.same_tokenizer`), whose rows must also be long enough.
    Raises BadInput that names the key.
    """
    stages = {stage.name: stage for stage in recipe.stages}
    for stage in recipe.stages:
        for one, other in combinations(stage.init.stages if stage.init else (), 2):
            _check_pair(
                stages[one],
                stages[other],
                f"`{one}` and `{other}` do not share a tokenizer",
                stages,
                where,
                f"stages.{stage.name}.init",
            )
        for slot, part in stage.slots():
            _check_part(part, stage, stages, where, f"stages.{stage.name}.{slot}")
    for i, audit in enumerate(recipe.evaluate):
        _check_part(audit, recipe.last, stages, where, f"evaluate.{i}")


def _check_part(
    part: Part, stage: Stage, stages: Mapping[str, Stage], where: object, key: str
) -> None:
    for name in set(part.same_tokenizer()).intersection(part.reads()):
        read, at = stages[name], f"{key}{option_of(part, [name])}"
        what = f"`{name}` has another vocabulary than `{stage.name}`"
        _check_pair(read, stage, what, stages, where, at)
        longest = _longest_row(read, stages)
        if longest is not None and longest < stage.length:
            raise BadInput(
                f"`{name}` reads rows of at most {longest} tokens, those of `{stage.name}` hold "
                f"{stage.length}",
                where=where,
                key=at,
                mend="give both stages the same `workload.length`",
            )


def _check_pair(
    one: Stage, other: Stage, what: str, stages: Mapping[str, Stage], where: object, key: str
) -> None:
    found = tokenizer_of(one, stages).difference(tokenizer_of(other, stages))
    if found is None:
        return
    fact, mine, theirs = found
    first, second = (_decider(stage, stages).name for stage in (one, other))
    raise BadInput(
        f"{what}: `{fact}` is {mine} in `{first}` and {theirs} in `{second}`",
        where=where,
        key=key,
        mend="train both with one tokenizer: the same `workload` (its type, corpus, fractions and "
        "vocabulary), or one `workload.tokenizer`",
    )


def option_of(part: Part, names: Sequence[str]) -> str:
    """The option of a part that names these stages, with a dot before it; "" if none does."""
    for option, value in part.model_dump(mode="json").items():
        given = value if isinstance(value, list) else [value]
        if all(name in given for name in names):
            return f".{option}"
    return ""


def _longest_row(stage: Stage, stages: Mapping[str, Stage]) -> int | None:
    """Tokens the model of a stage can read at once, where the recipe tells."""
    while stage.init is not None:
        stage = stages[stage.init.stages[0]]
    return stage.workload.longest_row(stage.size)
