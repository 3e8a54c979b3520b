"""A risk filter's two sides on code: insecure calls in what a model writes, and told apart.

Risk here is an insecure call (`data.insecure`): checkable exactly, offline, and harmless to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from maquette.data.insecure import (
    PATTERNS_VERSION,
    contains_insecure_call,
    functions,
    prompt_before_call,
)
from maquette.evaluation.risk_audits import GenerationAudit, IdentificationAudit, Labelled
from maquette.parts import Card, Ctx, Needs, register

if TYPE_CHECKING:
    from maquette.data.corpus import Corpus

MORE_TEXT = "a larger corpus of Python code"


def held_out_functions(data: Corpus, cache: Path) -> list[Labelled]:
    """(item, source, risky) of every function of the held-out Python documents.

    cache: folder in which they are kept, because every run of a study asks for the same ones.
    """
    from maquette.data.cache import built_once, digest

    def build(folder: Path) -> dict[str, int]:
        rows = list(_functions(data))
        columns = {
            "item": pa.array([r.item for r in rows], pa.string()),
            "source": pa.array([r.text for r in rows], pa.large_string()),
            "risky": pa.array([r.risky for r in rows], pa.bool_()),
        }
        table = pa.table(columns)
        pq.write_table(table, folder / "functions.parquet", compression="zstd")
        return {"functions": table.num_rows}

    key = digest(data.name_of("held_out"), PATTERNS_VERSION)
    folder = built_once(cache, f"functions-{key}", build)
    rows = pq.read_table(folder / "functions.parquet").to_pylist()
    return [Labelled(row["item"], row["source"], row["risky"]) for row in rows]


def _functions(data: Corpus) -> Iterator[Labelled]:
    for batch in data.documents("held_out"):
        for name, text in zip(
            batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True
        ):
            for function in functions(text):
                yield Labelled(f"{name}#{function.name}", function.source, function.risky)


@register("risk-generation")
class RiskGeneration(GenerationAudit):
    """Share of sampled continuations that hold an insecure call (Longpre et al., 2023)."""

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"risk-generation": "lower"}
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    card: ClassVar[Card] = Card(
        title="Risk in generated code",
        paper="after Longpre et al., 2023, A Pretrainer's Guide to Training Data",
        arxiv="2305.13169",
        idea="Show the model held-out functions up to the line of an insecure call, sample "
        "continuations, and count those in which such a call stands.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="the paper: 25 continuations per prompt, top-k 40, temperature 1",
        cost="Sampling, billed to `evaluation`.",
        when="For a filter meant to keep something out of what a model writes.",
        differs=("prompts and judge are code and patterns, not text and an online classifier",),
        example="""\
from maquette.data.insecure import contains_insecure_call, prompt_before_call

source = "def load(path):\\n    import pickle\\n    return pickle.load(open(path, 'rb'))\\n"
print(prompt_before_call(source))
print(contains_insecure_call("return pickle.load(f)"), contains_insecure_call("model.eval()"))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"n_prompts": 4, "n_samples": 2, "n_tokens": 4, "prompt_tokens": 8},
    )
    more_text: ClassVar[str] = MORE_TEXT

    def prompts(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        """Functions up to the line of their first insecure call."""
        risky = (row for row in held_out_functions(data, ctx.cache) if row.risky)
        before = ((row, prompt_before_call(row.text)) for row in risky)
        return [row._replace(text=prompt) for row, prompt in before if prompt]

    def judge(self) -> Callable[[str], bool]:
        return contains_insecure_call


@register("risk-identification")
class RiskIdentification(IdentificationAudit):
    """Area under the ROC curve of a linear probe that tells risky from safe functions."""

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"risk-identification": "higher"}
    card: ClassVar[Card] = Card(
        title="Risk identification by a probe",
        paper="after Longpre et al., 2023, A Pretrainer's Guide to Training Data",
        arxiv="2305.13169",
        idea="Fit a logistic probe on the mean of the model's last states over held-out "
        "functions, on one half of the files, and rank risky against safe functions of the other "
        "half. Each risky function's value is the share of safe ones ranked below it; their mean "
        "is the area under the ROC curve.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="this library; the paper fine-tunes on toxicity data sets instead",
        cost="One forward pass over the functions and two small fits, billed to `evaluation`.",
        when="For a filter meant to keep something out of the training data: what is filtered may "
        "no longer be recognised.",
        differs=("a frozen model and a linear probe, so that the score is the pre-training's",),
        example="""\
import numpy as np
from maquette.evaluation.linear_probe import mann_whitney_shares

shares = mann_whitney_shares(np.array([0.9, 0.4]), np.array([0.1, 0.4, 0.5]))
print(shares, shares.mean())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_items": 24, "max_tokens": 32},)
    noun: ClassVar[str] = "held-out functions"
    more_text: ClassVar[str] = f"{MORE_TEXT}, or a larger `held_out_fraction`"

    def items(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        return [row for row in held_out_functions(data, ctx.cache) if row.text.strip()]
