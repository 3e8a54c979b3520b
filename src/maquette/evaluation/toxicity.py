"""A toxicity filter's two sides: toxic text in what a model writes, and told apart by it.

Longpre et al. (2023, arXiv:2305.13169, Section 5) judge what is written with an online classifier
and fine-tune on labelled sets. Here a list of terms judges, and the labelled texts are yours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.terms import TermRate, listed_terms
from maquette.errors import BadInput
from maquette.evaluation.probe_items import passages
from maquette.evaluation.risk_audits import GenerationAudit, IdentificationAudit, Labelled
from maquette.parts import Card, Ctx, Needs, register

if TYPE_CHECKING:
    from maquette.data.corpus import Corpus

MORE_TEXT = "a larger corpus, or a list of more frequent terms"


def held_out_passages(data: Corpus, rate: TermRate) -> Iterator[Labelled]:
    """The passages of about 400 characters of held-out documents; risky: holds a listed term."""
    for batch in data.documents("held_out"):
        for document, text in zip(
            batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True
        ):
            risky = rate(text) > 0
            for place, passage in passages(text):
                if passage:
                    yield Labelled(f"{document}#{place}", passage, risky and rate(passage) > 0)


def content_of_list(terms: Sequence[str], words_file: str | None) -> str:
    """What a file of terms holds; "" for terms that stand in the recipe. BadInput as
    `listed_terms`."""
    listed = listed_terms(terms, words_file)
    return json.dumps(listed) if words_file else ""


def text_before_term(passage: str, pattern: re.Pattern[str]) -> str:
    """The passage up to its first listed term; "" if it has none or begins with it."""
    match = pattern.search(passage)
    return passage[: match.start()].rstrip() if match else ""


def without_terms(passage: str, pattern: re.Pattern[str]) -> str:
    """The passage with its listed terms taken out, and the white space before each."""
    return re.sub(rf"\s*(?:{pattern.pattern})", "", passage, flags=pattern.flags).strip()


@register("toxic-generation")
class ToxicGeneration(GenerationAudit):
    """Share of sampled continuations that hold a listed term (Longpre et al., 2023)."""

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"toxic-generation": "lower"}
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    more_text: ClassVar[str] = MORE_TEXT
    card: ClassVar[Card] = Card(
        title="Toxic text in what a model writes",
        paper="after Longpre et al., 2023, A Pretrainer's Guide to Training Data",
        arxiv="2305.13169",
        idea="Show the model held-out passages up to a listed term, sample continuations, and "
        "count those in which a listed term stands.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="the paper: 25 continuations per prompt, top-k 40, temperature 1",
        cost="Sampling, billed to `evaluation`.",
        when="Beside a toxicity filter, to see what it keeps a model from writing.",
        differs=(
            "prompts are passages of the corpus, not RealToxicityPrompts",
            "a list of terms judges, not an online classifier, whose answers change over time",
        ),
        example="""\
from maquette.data.terms import term_pattern
from maquette.evaluation.toxicity import text_before_term

print(text_before_term("Well, you rotten scoundrel!", term_pattern(["rotten scoundrel"])))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"words_file": "words.txt", "n_prompts": 4, "n_samples": 2, "n_tokens": 4,
         "prompt_tokens": 8},
    )  # fmt: skip

    terms: tuple[str, ...] = ()
    """Bad words or phrases."""
    words_file: str | None = None
    """The same in a file, one term per line."""

    @model_validator(mode="after")
    def _one_list(self) -> ToxicGeneration:
        if bool(self.terms) == bool(self.words_file):
            raise ValueError("give one of `terms` and `words_file`")
        return self

    def digest_key(self) -> str:
        return content_of_list(self.terms, self.words_file)

    def prompts(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        """Held-out passages up to their first listed term."""
        rate = self._rate()
        risky = (row for row in held_out_passages(data, rate) if row.risky)
        before = ((row, text_before_term(row.text, rate.pattern)) for row in risky)
        return [row._replace(text=prompt) for row, prompt in before if prompt]

    def judge(self) -> Callable[[str], bool]:
        rate = self._rate()
        return lambda text: rate(text) > 0

    def _rate(self) -> TermRate:
        return TermRate(listed_terms(self.terms, self.words_file))


@register("toxic-identification")
class ToxicIdentification(IdentificationAudit):
    """Area under the ROC curve of a linear probe that tells toxic from other text."""

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"toxic-identification": "higher"}
    noun: ClassVar[str] = "texts"
    more_text: ClassVar[str] = f"more labelled texts, or {MORE_TEXT}"
    card: ClassVar[Card] = Card(
        title="Toxicity identification by a probe",
        paper="after Longpre et al., 2023, A Pretrainer's Guide to Training Data",
        arxiv="2305.13169",
        idea="Fit a logistic probe on the mean of the model's last states over one half of the "
        "texts and rank toxic against other texts of the other half. Each toxic text's value is "
        "the share of others ranked below it; their mean is the area under the ROC curve. The "
        "texts are labelled ones of yours, or held-out passages that held a listed term against "
        "passages that held none, with the term taken out, so that it has to be told from what "
        "stands around it.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="this library; the paper fine-tunes on toxicity data sets instead",
        cost="One forward pass over the texts and two small fits, billed to `evaluation`.",
        when="Beside a toxicity filter: what is filtered may no longer be recognised.",
        differs=("a frozen model and a linear probe, so that the score is the pre-training's",),
        example="""\
from maquette.data.terms import term_pattern
from maquette.evaluation.toxicity import without_terms

print(without_terms("Well, you rotten scoundrel!", term_pattern(["rotten scoundrel"])))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"words_file": "words.txt", "max_items": 24, "max_tokens": 32},
    )

    labelled: CorpusSpec | None = None
    """Labelled texts, as a corpus whose `domain_column` is the label (`{path: hatecheck.parquet,
    text_column: test_case, domain_column: label_gold}`)."""
    toxic: tuple[str, ...] = Field(default=(), examples=[["hateful"]])
    """The labels of `labelled` that mean toxic; all others, and none at all, mean not."""
    terms: tuple[str, ...] = ()
    """Instead of labelled texts: bad words or phrases."""
    words_file: str | None = None
    """The same in a file, one term per line."""

    @model_validator(mode="after")
    def _one_source(self) -> ToxicIdentification:
        given = [n for n in ("labelled", "terms", "words_file") if getattr(self, n)]
        if len(given) != 1:
            shown = ", ".join(given) or "none"
            raise ValueError(f"give one of `labelled`, `terms` and `words_file`, got {shown}")
        if bool(self.toxic) != (self.labelled is not None):
            raise ValueError("`labelled` and `toxic` (its labels that mean toxic) go together")
        if self.labelled is not None and self.labelled.domain_column is None:
            raise ValueError("`labelled` needs a `domain_column`, which holds the label")
        return self

    def digest_key(self) -> str:
        if self.labelled is not None:
            rows = [(row.text, row.risky) for row in labelled_texts(self.labelled, self.toxic)]
            return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
        return content_of_list(self.terms, self.words_file)

    def items(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        if self.labelled is not None:
            return labelled_texts(self.labelled, self.toxic)
        rate = TermRate(listed_terms(self.terms, self.words_file))
        rows = held_out_passages(data, rate)
        bare = ((r, without_terms(r.text, rate.pattern) if r.risky else r.text) for r in rows)
        return [row._replace(text=text) for row, text in bare if text]


def labelled_texts(spec: CorpusSpec, toxic: Sequence[str]) -> list[Labelled]:
    """The texts of a corpus by whether their domain is one of the labels `toxic`.

    Raises BadInput for a label that no text has.
    """
    rows, found = [], set()
    for batch in read(spec):
        columns = (batch.column(name).to_pylist() for name in ("id", "text", "domain"))
        for item, text, label in zip(*columns, strict=True):
            found.add(label)
            if text.strip():
                rows.append(Labelled(item, text, label in toxic))
    if missing := sorted(set(toxic) - found):
        raise BadInput(
            f"no text has the label `{missing[0]}` in `{spec.domain_column}`",
            where=spec.path,
            key="evaluate.toxic-identification.toxic",
            mend=f"its labels are {', '.join(f'`{label}`' for label in sorted(found)[:10])}",
        )
    return rows
