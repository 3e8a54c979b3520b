"""MATES: model-aware data selection with influence models (Yu et al., 2024, arXiv:2406.06046).

Now and then, measure on a few rows how one update on each moves the loss on reference text, fit a
small regressor to predict that from the row, and let it choose what the next stage is trained on.

The official code takes the smallest prediction / tau + Gumbel noise, which is no Gumbel-top-k: of
predictions (0, 1, 2) at tau 1 it draws the last with probability 0.05 where exp(-x / tau) asks for
0.09. Here keys are -x / tau + Gumbel, and the largest are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.data.corpus import Corpus
from maquette.data.pool import Pool, Stages, chosen_domains, make_pool
from maquette.data.reference import Reference, ReferenceSpec, reference_rows, refuse_overlap
from maquette.data.sampling import gumbel_top_k, standardised
from maquette.errors import BadInput, RunFailed
from maquette.parts import Card, Clock, Feed, Needs, Run, Selection, State, register
from maquette.schedules import Horizon
from maquette.training.influence import EncoderOptions, Fold, InfluenceModel, TfidfInfluence
from maquette.training.influence_models import spearman
from maquette.training.influence_probe import measure, row_ids

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
FOLDS = "common probes are fitted on"
"""Told to the digest: a run whose influence models were judged otherwise is another run."""
LITTLE_SIGNAL = 0.1
"""Validation Spearman below which the report warns."""


def labels(losses_N: Array, n_train: int) -> Array:
    """Losses standardised by mean and deviation of the first `n_train`, the rest are validation.

    Raises ValueError if these do not vary.
    """
    train = np.asarray(losses_N, np.float64)[:n_train]
    if not np.isfinite(losses_N).all() or not standardised(train).any():
        raise ValueError(
            f"the losses of {len(train)} probes must vary to be learnt from, all are about "
            f"{float(train.mean()):.6g} (a learning rate of 0, a frozen model, equal probes?)"
        )
    return np.asarray((losses_N - train.mean()) / train.std())


def choose(predicted_N: Array, k: int, tau: float, rng: np.random.Generator) -> Rows:
    """k indices by Gumbel-top-k on -x / tau, best first; x are predicted losses, standardised.

    Regressors shrink their predictions towards the mean, so without standardising them again a
    tau meant for labels of deviation 1 would choose almost at random.
    Raises ValueError for tau <= 0 or k outside [0, N].
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau} (the paper 1, the official code 0.5)")
    return gumbel_top_k(-standardised(predicted_N) / tau, k, rng)


@register("mates")
class Mates(Feed):
    """Train each stage on what an influence model fitted to the model as it is now chooses."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"reference": {"domains": ["library"], "rows": 4}, "stages": 2, "n_probes": 12,
         "common_probes": 4, "validation_fraction": 0.34, "min_spearman": -1.0},
        {"reference": {"domains": ["library"], "rows": 4}, "stages": 3, "n_probes": 12,
         "common_probes": 4, "validation_fraction": 0.34, "min_spearman": -1.0, "rho": 0.5,
         "unselected": "return", "scorer": "encoder", "refit": "warm",
         "encoder": {"width": 8, "heads": 1, "depth": 1, "epochs": 2, "batch": 4,
                     "eval_every": 2}},
    )  # fmt: skip
    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal", "text/encoder", "text/seq2seq"}), scale="one"
    )
    card: ClassVar[Card] = Card(
        title="MATES: model-aware data selection",
        paper="Yu, Das and Xiong, 2024, NeurIPS",
        arxiv="2406.06046",
        idea="What data helps a model changes while it learns. So every stage measures, on a few "
        "hundred rows, how one update on each moves the loss on reference text; a small regressor "
        "learns to predict that, and the stage is trained on the rows it likes best.",
        claim="At equal total FLOPs, probes and scoring included, choosing each stage's rows by "
        "an influence model that is fitted again lowers bits per byte on the target domain, "
        "compared with random rows and with a model fitted once.",
        paper_figures=(
            "Table 1: 410M, 25B tokens of C4, mean of 9 tasks: random 44.5, QuRating 45.2, "
            "MATES 45.8",
            "Table 1: 1B: random 46.4, SemDeDup 47.1, MATES 47.5",
            "Influences at step 10k and 40k correlate by about 0.3; selection costs 11 to 16% of "
            "the FLOPs",
        ),
        defaults_from="the paper where it gives one (rho 1/5, clip 1, 5 stages); tau 0.5 is the "
        "official code's; probes, reference and influence model are of laptop size",
        cost="n_probes single-row steps and as many passes over the reference per stage, billed "
        "to `probe`; fitting and scoring to `scorer`. A FLOP budget is planned with them. At "
        "laptop size the probes are a large share: shrink `reference.rows` first.",
        when="For a pool larger than the budget and a small text that stands for what is wanted. "
        "When reference and pool differ by domain only, similarity to the reference may do as "
        "well for less: compare with `dsir`.",
        clashes=("every other feed: one run has one order of rows",),
        differs=(
            "keys are -x / tau + Gumbel with the largest taken; the official code's rule has "
            "other probabilities",
            "predictions are standardised again before tau divides them",
            "the reference loss is weighted by token, not a mean of batch means",
            "a validation correlation below `min_spearman` means no usable signal: the stage is "
            "then random, and record and report say so",
            "the influence model is fitted on hundreds of probes, not 80,000, so it is TF-IDF "
            "with ridge regression or a small encoder on the run's own tokens, not BERT",
            "nothing is forked to evaluate a stage: use a `wsd` schedule, whose decay ends the run",
        ),
        example="""\
import torch
from maquette.training.branch import branch
from maquette.training.influence_probe import oracle_losses

model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
loss = lambda x, y: 0.5 * (model(torch.tensor([[x]])) - y).square().mean()

def take_step(probe):
    loss(*probe).backward()
    sgd.step()
    sgd.zero_grad()

with branch([model], sgd) as now:
    print(oracle_losses([(1.0, 1.0), (1.0, -1.0)], take_step,
                        lambda: loss(1.0, 1.0).item(), now.restore))  # 0.405, 0.605; before: 0.5
""",
    )

    reference: ReferenceSpec
    """What the run should become good at: a corpus of its own, or domains of the training part."""
    stages: int = Field(5, ge=2)
    """Stages of equal length; the first is random. The paper: 5 of 10,000 steps."""
    n_probes: int = Field(250, ge=8)
    """Rows whose influence is measured per stage. The paper: 80,000 to 160,000."""
    common_probes: int = Field(50, ge=0)
    """Of these, rows measured in every stage, to see how influences change. Models are fitted on
    them and never judged by them."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the probes the influence model is judged by, new ones each stage. The paper: 0.1."""
    scorer: Literal["tfidf", "encoder"] = "tfidf"
    """Influence model: TF-IDF and ridge regression, or a small transformer encoder."""
    refit: Literal["restart", "warm", "static"] = "restart"
    """`restart`: a new fit each stage (the official code). `warm`: it goes on from the last stage's
    (the paper; needs `encoder`). `static`: fitted once, at the second stage, the control."""
    rho: float = Field(0.2, gt=0, le=1)
    """Share of a stage's candidates that is trained on. The paper: 0.2."""
    window: int | None = Field(None, ge=1)
    """Candidates of a stage; None: as many as `rho` says."""
    unselected: Literal["discard", "return"] = "discard"
    """What becomes of candidates not chosen: new ones each stage (the paper), or back to the pool.
    What was trained on never comes again."""
    tau: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Temperature on predictions of deviation 1: 0 is plain top-k, large is random. The paper 1."""
    min_spearman: float = Field(0.1, ge=-1, lt=1)
    """Validation correlation below which a stage is random instead; -1 never."""
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Strength of the ridge."""
    encoder: EncoderOptions = EncoderOptions()

    @model_validator(mode="after")
    def _consistent(self) -> Mates:
        if self.common_probes > self.n_probes:
            raise ValueError(f"common_probes must be <= n_probes, got {self.common_probes}")
        if self.refit == "warm" and self.scorer != "encoder":
            raise ValueError("refit: warm needs scorer: encoder; a ridge fit has one solution")
        n, fresh = self._n_validation(), self.n_probes - self.common_probes
        if not 3 <= n <= self.n_probes - 2:
            raise ValueError(
                f"validation_fraction must leave 3 probes or more to validate on and 2 to fit, "
                f"got {n} of {self.n_probes}"
            )
        if n > fresh:
            raise ValueError(
                f"{n} of {self.n_probes} probes validate, but only {fresh} are not common, and a "
                "common one was fitted on: lower common_probes or validation_fraction"
            )
        return self

    def _n_validation(self) -> int:
        return round(self.validation_fraction * self.n_probes)

    def digest_key(self) -> str:
        return f"{FOLDS}; {self.reference.digest_key()}"

    # --- what the engine calls ---

    def check_run(self, run: Run) -> None:
        self.refresh_steps(run.horizon)
        self._stages(run.horizon.steps, run.rows).check_room(self._setting(run)[1])

    def refresh_steps(self, horizon: Horizon) -> tuple[int, ...]:
        if horizon.steps < self.stages:
            raise BadInput(
                f"{horizon.steps} steps cannot be cut into {self.stages} stages",
                key="feed.stages",
                mend="fewer stages, or a larger budget",
            )
        return self._stages(horizon.steps, rows=1).edges[:-1]

    def refresh(self, run: Run, clock: Clock) -> Selection:
        """A random first stage; then measure, fit, and choose."""
        stages = self._stages(run.horizon.steps, run.rows)
        stage = stages.edges.index(clock.step)
        reference, pool = self._setting(run)
        n_reference = len(reference.ids_RT)
        if stage == 0:
            rows = pool.candidates[: stages.taken(0)]
            random = {"stage": 0, "chosen_by": "chance", "reference_rows": n_reference}
            fewer = _fewer_rows(n_reference, self.reference.rows)
            return Selection(rows, ordered=True, facts=random, warnings=fewer)
        try:
            model, state, facts = self._fitted(run, reference, pool, stage, stages.edges)
        except ValueError as error:
            raise RunFailed(
                f"no influence can be learnt at step {clock.step}: {error}",
                where="mates",
                mend="another `optim.learning_rate`, or other reference text",
            ) from error
        used = np.concatenate([run.selections[step].rows for step in stages.edges[:stage]])
        rng = run.ctx.rng("mates", clock.step)
        window, k = stages.candidates(pool, stage, used, rng), stages.taken(stage)
        found, warnings = facts["validation_spearman"], {}
        facts["reference_rows"] = n_reference
        if found is None or found < max(self.min_spearman, LITTLE_SIGNAL):
            warnings["mates"] = _little_signal(found, self.min_spearman)
        if found is None or found < self.min_spearman:
            chosen = np.arange(k)  # candidates are in a random order
            facts["chosen_by"] = "chance (no usable signal)"
        else:
            predicted = standardised(model.predict(row_ids(run, window)))
            chosen = choose(predicted, k, self.tau, rng)
            facts["chosen_by"] = "influence"
            facts["predicted_mean_of_chosen"] = float(predicted[chosen].mean())
        facts |= {"stage": stage, "candidates": len(window), "rows": k}
        length = run.objective.window(run.ctx.length)
        facts["domains"] = chosen_domains(_corpus(run).train, length, window, window[chosen])
        return Selection(window[chosen], facts=facts, warnings=warnings, state=state)

    def side_flops(self, run: Run) -> Callable[[int], float]:
        reference, pool = self._setting(run)
        # Every run is planned by this, so that nothing is trained beside a bad reference.
        refuse_overlap(reference, _corpus(run))
        flops = measure(run, reference, pool.probes[:1]).flops
        probe, look = sum(flops.values()), flops["reference"]
        n, n_validation = self.n_probes, self._n_validation()
        sample = row_ids(run, pool.probes[:n])
        scorer = self._new_model(run).costs(sample, n - n_validation, n_validation)
        fits = self._fits()
        first_model = (fits - 1) * n_validation * scorer.row  # judged again in later stages
        fixed = fits * (n * probe + look + scorer.fit) + first_model
        return lambda steps: fixed + self._stages(steps, run.rows).scored * scorer.row

    # --- its steps ---

    def _fits(self) -> int:
        return 1 if self.refit == "static" else self.stages - 1

    def _stages(self, steps: int, rows: int) -> Stages:
        return Stages(self.stages, steps, rows, self.rho, self.window, self.unselected)

    def _setting(self, run: Run) -> tuple[Reference, Pool]:
        corpus, window = _corpus(run), run.objective.window(run.ctx.length)
        reference = reference_rows(self.reference, corpus, window, run.ctx.cache)
        # As many whatever `refit`, so that its arms have one pool and one first fit.
        fresh = self.n_probes - self.common_probes
        n_probes = self.common_probes + (self.stages - 1) * fresh
        n_rows = corpus.train.n_tokens // window
        return reference, make_pool(run.ctx.seed, n_rows, reference.excluded, n_probes)

    def _new_model(self, run: Run) -> InfluenceModel:
        if self.scorer == "encoder":
            return self.encoder.make(run.ctx)
        return TfidfInfluence(run.ctx, self.alpha)

    def _fitted(
        self, run: Run, reference: Reference, pool: Pool, stage: int, edges: tuple[int, ...]
    ) -> tuple[InfluenceModel, State, dict[str, Any]]:
        """The stage's influence model, what later stages need of it, and facts about it."""
        model = self._new_model(run)
        earlier = [run.selections[edges[t]] for t in range(1, stage)]
        if self.refit == "static" and earlier:
            model.load(_theta(earlier[0].state))
            known = earlier[0].facts["validation_spearman"]
            return model, State(), {"fitted_at_stage": 1, "validation_spearman": known}
        if self.refit == "warm" and earlier:
            model.load(_theta(earlier[-1].state))
        fresh = self.n_probes - self.common_probes
        start = self.common_probes + (stage - 1) * fresh
        rows = np.concatenate(
            [pool.probes[: self.common_probes], pool.probes[start : start + fresh]]
        )
        measured = measure(run, reference, rows)
        before, losses = measured.before, measured.losses_N
        # The rows are in a random order, the common ones first: they are measured again in later
        # stages, so a model fitted on them (the first one, a warm one) must not be judged by them.
        n_train = len(rows) - self._n_validation()
        ids, y = row_ids(run, rows), labels(losses, n_train)
        held = Fold(ids[n_train:], y[n_train:])
        found = model.fit(Fold(ids[:n_train], y[:n_train]), held, edges[stage])
        facts: dict[str, Any] = {
            "fitted_at_stage": stage,
            "reference_loss": before,
            "influence_mean": float(losses.mean()) - before,
            "influence_deviation": float(losses.std()),
            "share_of_probes_that_help": float((losses < before).mean()),
            "validation_spearman": found,
            "validation_probes": len(held.y_N),
        }
        common = losses[: self.common_probes]
        if earlier:
            same = {
                str(step): spearman(one.state.tensors["common"].numpy(), common)
                for step, one in zip(edges[1:stage], earlier, strict=True)
            }
            facts["oracle_spearman_with_step"] = same
            first = self._new_model(run)
            first.load(_theta(earlier[0].state))
            facts["first_model_spearman"] = spearman(first.predict(held.ids_NT), held.y_N)
        theta = {f"theta.{name}": tensor for name, tensor in model.tensors().items()}
        return model, State({**theta, "common": torch.from_numpy(common)}), facts


def _corpus(run: Run) -> Corpus:
    assert run.ctx.corpus is not None
    return run.ctx.corpus


def _theta(state: State) -> dict[str, torch.Tensor]:
    found = state.tensors.items()
    return {k.removeprefix("theta."): v for k, v in found if k.startswith("theta.")}


def _fewer_rows(found: int, wanted: int) -> dict[str, str]:
    """A note where the reference is shorter than asked for."""
    if found >= wanted:
        return {}
    what = f"the reference has {found} rows, {wanted} were asked for: its text gives no more"
    return {"mates reference": what}


def _little_signal(found: float | None, least: float) -> str:
    value = "cannot be computed" if found is None else f"is {found:.2f}"
    if found is None or found < least:
        return (
            f"no usable signal: the influence model's validation Spearman {value}, the stage is "
            f"random (min_spearman {least:g})"
        )
    if found < 0:
        return (
            f"the influence model's validation Spearman {value}: it ranks rows against what was "
            "measured, and what it chooses may be worse than chance"
        )
    return f"the influence model's validation Spearman {value}: it chooses by little signal"
