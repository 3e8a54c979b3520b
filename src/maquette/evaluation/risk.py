"""Two sides of a risk filter: what a model writes, and what it can tell apart.

Longpre et al. (2023, arXiv:2305.13169) find that a filter lowers both. Risk here is an insecure
call in code (`data.insecure`): checkable exactly, offline, and harmless to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import Field

from maquette.data.documents import hash_ids
from maquette.data.insecure import (
    PATTERNS_VERSION,
    contains_insecure_call,
    functions,
    prompt_before_call,
)
from maquette.errors import BadInput
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maquette.data.corpus import Corpus

Array = NDArray[np.float64]
Labelled = tuple[str, str, bool]
MIN_PER_CLASS = 5


# --- generation -----------------------------------------------------------------------------------


def top_k_sample(
    logits_BV: Tensor, k: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """One token id per row from the k most likely, int64 of shape (B,).

    temperature: > 0; logits are divided by it. k: at most V are used.
    """
    values_BK, ids_BK = torch.topk(logits_BV.float(), min(k, logits_BV.shape[-1]), dim=-1)
    p_BK = torch.softmax(values_BK / temperature, dim=-1)
    chosen_B1 = torch.multinomial(p_BK, 1, generator=generator)
    return ids_BK.gather(1, chosen_B1)[:, 0]


@torch.no_grad()
def sample_continuations(
    model: PreTrainedModel,
    prompts_BT: Tensor,
    n_new: int,
    context: int,
    generator: torch.Generator,
    k: int = 40,
    temperature: float = 1.0,
) -> Tensor:
    """Sampled continuations of a causal model, int64 of shape (B, n_new).

    prompts_BT: token ids without padding, T >= 1. context: tokens the model reads at most; the
    oldest are left out beyond it. generator: on the model's device; no other randomness is used.
    """
    seen = prompts_BT[:, -context:]
    start, past = prompts_BT.shape[1], None
    every = prompts_BT
    cached = seen.shape[1] + n_new <= context
    for _ in range(n_new):
        given = every[:, -1:] if past is not None else every[:, -context:]
        out = model(input_ids=given, past_key_values=past, use_cache=cached, return_dict=True)
        # A model without a cache gives none, and is then shown the whole window each time.
        past = getattr(out, "past_key_values", None) if cached else None
        new_B = top_k_sample(out.logits[:, -1], k, temperature, generator)
        every = torch.cat([every, new_B[:, None]], dim=1)
    return every[:, start:]


# --- identification -------------------------------------------------------------------------------


@torch.no_grad()
def mean_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int,
    max_tokens: int = 512,
    batch_size: int = 32,
) -> Array:
    """Mean of the last layer's states over the tokens of each text, float64 of shape (N, D).

    A text longer than `context` is read in windows, up to `max_tokens` in all. An encoder-decoder
    gives its encoder's states. Raises ValueError for a text without tokens.
    """
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    device = next(model.parameters()).device
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    windows = [
        (n, ids[s : s + context])
        for n, ids in enumerate(r[:max_tokens] for r in rows)
        for s in range(0, len(ids), context)
    ]
    counts = np.array([min(len(r), max_tokens) for r in rows], dtype=np.float64)
    if len(counts) and counts.min() == 0:
        raise ValueError(f"text {int(counts.argmin())} has no token")
    windows.sort(key=lambda w: (len(w[1]), w[0]))
    sums: Array | None = None
    for at in range(0, len(windows), batch_size):
        part = windows[at : at + batch_size]
        longest = len(part[-1][1])
        ids_BT = torch.zeros((len(part), longest), dtype=torch.long)
        mask_BT = torch.zeros((len(part), longest), dtype=torch.long)
        for b, (_, ids) in enumerate(part):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            mask_BT[b, : len(ids)] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        states_BTD = body(input_ids=ids_BT, attention_mask=mask_BT, return_dict=True)[0]
        summed_BD = (states_BTD.float() * mask_BT[..., None]).sum(1).cpu().numpy()
        if sums is None:
            sums = np.zeros((len(rows), summed_BD.shape[1]))
        np.add.at(sums, [n for n, _ in part], summed_BD)
    if sums is None:
        return np.zeros((0, 0))
    pooled: Array = sums / counts[:, None]
    return pooled


def fit_logistic(X_ND: Array, y_N: NDArray[np.bool_], l2: float = 1.0) -> tuple[Array, float]:
    """Weights (D,) and bias of the logistic regression that minimises the summed log-loss plus
    l2/2 |w|^2; the bias is not penalised."""
    from scipy.optimize import minimize
    from scipy.special import expit

    sign_N = np.where(y_N, 1.0, -1.0)

    def objective(theta: Array) -> tuple[float, Array]:
        margin_N = sign_N * (X_ND @ theta[:-1] + theta[-1])
        pull_N = -sign_N * expit(-margin_N)
        value = np.logaddexp(0.0, -margin_N).sum() + 0.5 * l2 * theta[:-1] @ theta[:-1]
        return float(value), np.append(X_ND.T @ pull_N + l2 * theta[:-1], pull_N.sum())

    options = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-8}
    start = np.zeros(X_ND.shape[1] + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x[:-1], float(found.x[-1])


def mann_whitney_shares(positive_P: Array, negative_N: Array) -> Array:
    """For each positive, the share of negatives scored lower (a tie counts half), shape (P,).

    Their mean is the area under the ROC curve. Raises ValueError if there is no negative.
    """
    if not len(negative_N):
        raise ValueError("the share of negatives scored lower needs a negative")
    ranked = np.sort(negative_N)
    below = np.searchsorted(ranked, positive_P, side="left")
    up_to = np.searchsorted(ranked, positive_P, side="right")
    shares: Array = (below + up_to) / (2 * len(ranked))
    return shares


def probe_shares(
    X_ND: Array, y_N: NDArray[np.bool_], fold_N: NDArray[np.int64], l2: float = 1.0
) -> Array:
    """`mann_whitney_shares` of every positive under a probe fitted on the other folds.

    X_ND: features; each probe standardises them by its own training rows. Returns one value per
    positive, in the order of the rows. Raises ValueError if a fold or its rest lacks a class.
    """
    shares = np.full(len(y_N), np.nan)
    for fold in np.unique(fold_N):
        test, train = fold_N == fold, fold_N != fold
        for name, rows in (("fold", test), ("its rest", train)):
            if not y_N[rows].any() or y_N[rows].all():
                raise ValueError(f"{name} {int(fold)} holds one class only")
        centre, scale = X_ND[train].mean(0), X_ND[train].std(0)
        Z_ND = (X_ND - centre) / np.where(scale > 0, scale, 1.0)
        w_D, b = fit_logistic(Z_ND[train], y_N[train], l2)
        score_N = Z_ND @ w_D + b
        shares[test & y_N] = mann_whitney_shares(score_N[test & y_N], score_N[test & ~y_N])
    return shares[y_N]


# --- the audits -----------------------------------------------------------------------------------


def held_out_functions(data: Corpus, cache: Path) -> list[Labelled]:
    """(item, source, risky) of every function of the held-out Python documents.

    cache: folder in which they are kept, because every run of a study asks for the same ones.
    """
    from maquette.data.cache import built_once, digest

    def build(folder: Path) -> dict[str, int]:
        rows = list(_functions(data))
        columns = {
            "item": pa.array([r[0] for r in rows], pa.string()),
            "source": pa.array([r[1] for r in rows], pa.large_string()),
            "risky": pa.array([r[2] for r in rows], pa.bool_()),
        }
        table = pa.table(columns)
        pq.write_table(table, folder / "functions.parquet", compression="zstd")
        return {"functions": table.num_rows}

    key = digest(str(data.parts["held_out"][0].parent.name), PATTERNS_VERSION)
    folder = built_once(cache, f"functions-{key}", build)
    rows = pq.read_table(folder / "functions.parquet").to_pylist()
    return [(row["item"], row["source"], row["risky"]) for row in rows]


def _functions(data: Corpus) -> Iterator[Labelled]:
    for batch in data.documents("held_out"):
        for name, text in zip(
            batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True
        ):
            for function in functions(text):
                yield f"{name}#{function.name}", function.source, function.risky


def first_by_hash(rows: Sequence[Labelled], n: int) -> list[Labelled]:
    """At most n rows, chosen and ordered by a hash of their item."""
    order = np.argsort(hash_ids([r[0] for r in rows], b"maquette.risk"), kind="stable")[:n]
    return [rows[i] for i in order]


def item_table(metric: str, items: Sequence[str], values: Sequence[float]) -> pa.Table:
    """One row per item with weight 1."""
    return pa.table(
        {
            "metric": pa.array([metric] * len(items), pa.string()),
            "item": pa.array(items, pa.string()),
            "value": pa.array(values, pa.float64()),
            "weight": pa.array(np.ones(len(items)), pa.float64()),
        }
    )


def _context(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


@register("risk-generation")
class RiskGeneration(Audit):
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

    n_prompts: int = Field(200, ge=1)
    """Held-out functions used, at most."""
    n_samples: int = Field(25, ge=1)
    """Continuations per prompt. The paper: 25."""
    n_tokens: int = Field(64, ge=1)
    """Tokens per continuation."""
    prompt_tokens: int = Field(32, ge=1)
    """Tokens of the prompt, the last ones before the call."""
    top_k: int = Field(40, ge=1)
    """Candidates per token. The paper: 40."""
    temperature: float = Field(1.0, gt=0)
    """The paper: 1.0."""

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        risky = [
            row
            for row in held_out_functions(data, ctx.cache)
            if row[2] and prompt_before_call(row[1])
        ]
        if not risky:
            raise BadInput(
                "no held-out function has an insecure call to prompt for",
                key="evaluate.risk-generation",
                mend="a larger corpus of Python code, or a larger `held_out_fraction`",
            )
        chosen = first_by_hash(risky, self.n_prompts)
        texts = [prompt_before_call(source) or "" for _, source, _ in chosen]
        ids = subject.tokenizer(texts, add_special_tokens=False)["input_ids"]
        model = subject.model
        was_training = model.training
        model.eval()
        with ctx.ledger.meter("evaluation"):
            values = self._shares(model, subject.tokenizer, ids, ctx)
        model.train(was_training)
        return item_table("risk-generation", [row[0] for row in chosen], values)

    def _shares(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[Sequence[int]],
        ctx: Ctx,
    ) -> list[float]:
        """Prompts of one length go together: padding would change what the model reads."""
        generator = ctx.torch_rng("eval")
        by_length: dict[int, list[int]] = {}
        for n, row in enumerate(ids):
            by_length.setdefault(min(len(row), self.prompt_tokens), []).append(n)
        values = [0.0] * len(ids)
        for length, members in sorted(by_length.items()):
            rows = [n for n in members for _ in range(self.n_samples)]
            for at in range(0, len(rows), 256):
                part = rows[at : at + 256]
                prompts = torch.tensor([list(ids[n][-length:]) for n in part], device=ctx.device)
                new = sample_continuations(
                    model, prompts, self.n_tokens, _context(model), generator,
                    self.top_k, self.temperature,
                )  # fmt: skip
                texts = tokenizer.batch_decode(new.cpu().tolist(), skip_special_tokens=True)
                for n, text in zip(part, texts, strict=True):
                    values[n] += contains_insecure_call(text) / self.n_samples
        return values


@register("risk-identification")
class RiskIdentification(Audit):
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
from maquette.evaluation.risk import mann_whitney_shares

shares = mann_whitney_shares(np.array([0.9, 0.4]), np.array([0.1, 0.4, 0.5]))
print(shares, shares.mean())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_items": 24, "max_tokens": 32},)

    max_items: int = Field(300, ge=10)
    """Risky functions used, at most; as many safe ones are drawn."""
    max_tokens: int = Field(512, ge=8)
    """Tokens of a function that are read."""
    l2: float = Field(1.0, gt=0)
    """L2 strength of the probe on standardised states."""

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        rows = [r for r in held_out_functions(data, ctx.cache) if r[1].strip()]
        risky = first_by_hash([r for r in rows if r[2]], self.max_items)
        safe = first_by_hash([r for r in rows if not r[2]], max(len(risky), 1))
        chosen = [*risky, *safe]
        y = np.array([r[2] for r in chosen], dtype=np.bool_)
        # By file, so that no file is on both sides of the fit.
        files = [r[0].rpartition("#")[0] for r in chosen]
        fold = (hash_ids(files, b"maquette.probe") % np.uint64(2)).astype(np.int64)
        counts = [int((y[fold == f] == c).sum()) for f in (0, 1) for c in (True, False)]
        if min(counts) < MIN_PER_CLASS:
            raise BadInput(
                f"{len(risky)} risky and {len(safe)} safe held-out functions are too few for a "
                f"probe: a half of the files has {min(counts)} of a kind, it needs {MIN_PER_CLASS}",
                key="evaluate.risk-identification",
                mend="a larger corpus of Python code, or a larger `held_out_fraction`",
            )
        model = subject.model
        was_training = model.training
        model.eval()
        with ctx.ledger.meter("evaluation"):
            X = mean_states(
                model, subject.tokenizer, [r[1] for r in chosen], _context(model), self.max_tokens
            )
        model.train(was_training)
        return item_table(
            "risk-identification", [r[0] for r in risky], probe_shares(X, y, fold, self.l2).tolist()
        )
