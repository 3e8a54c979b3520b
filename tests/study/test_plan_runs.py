"""Plans of several stages, really run: ensembles, soups, members, and stages without steps."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.parts import find
from maquette.recipe import parse_recipe
from maquette.study.execute import execute, train_stages
from maquette.study.models import export, load_subject

MEMBERS = [{"name": "a"}, {"name": "b", "reseed": 1}]
BOTH = {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"}


def plan(world, *stages, **over):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "6step",
        "stages": list(stages),
        **over,
    }


@pytest.fixture(scope="module")
def ensemble(world):
    return world.train(plan(world, *MEMBERS, BOTH))


def loaded(run):
    done = train_stages(run.recipe, run.seed, run.store, OPTIONS)
    return {name: load_subject(trained).model for name, trained in done.items()}


def test_members_differ_in_weights_and_the_ensemble_gives_the_mean_of_their_logits(ensemble):
    models = loaded(ensemble)
    ids = torch.arange(20, 36).unsqueeze(0)
    a, b, both = (models[name](input_ids=ids).logits.float() for name in ("a", "b", "both"))
    assert not torch.equal(a, b)
    torch.testing.assert_close(both, (a + b) / 2)


def test_an_ensemble_is_scored_and_costs_what_its_members_cost(ensemble):
    record = ensemble.store.run(ensemble.digest)
    alone = [_bits(ensemble, name) for name in ("a", "b")]
    assert record.metrics["bits-per-byte"] <= sum(alone) / 2 + 1e-6
    single = _record(ensemble, "a").ledger["train"]["flops"]
    assert record.ledger["train"]["flops"] == pytest.approx(2 * single)


def _record(run, stage):
    done = train_stages(run.recipe, run.seed, run.store, OPTIONS)
    return run.store.run(done[stage].digest)


def _bits(run, member):
    """Bits per byte of one member, by a recipe that holds only that stage."""
    stage = next(s for s in run.recipe.stages if s.name == member)
    alone = replace(run.recipe, stages=(stage,))
    return run.store.run(execute(alone, run.seed, run.store, OPTIONS)).metrics["bits-per-byte"]


def test_an_ensemble_has_no_plain_model_to_export(ensemble, tmp_path):
    with pytest.raises(BadInput, match="no plain model"):
        export(ensemble.folder, tmp_path / "out")


def test_a_soup_starts_from_the_mean_of_weights_and_exports(world, tmp_path):
    run = world.train(
        plan(world, *MEMBERS, {"name": "mean", "init": {"soup": ["a", "b"]}, "budget": "0step"})
    )
    models = loaded(run)
    weights = {name: dict(model.state_dict()) for name, model in models.items()}
    for name, weight in weights["mean"].items():
        torch.testing.assert_close(weight, (weights["a"][name] + weights["b"][name]) / 2)
    export(run.folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_members_whose_tokenizers_turn_out_to_differ_are_refused(world):
    """A named tokenizer is known once it is loaded; see `test_tokenizer_identity` for others."""
    folder = world.train(plan(world, {"name": "train"})).trained().corpus.tokenizer_folder
    last = {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"}
    store = world.store("refusals")

    def execute_with(tokenizer):
        a, b = (world.workload("text/causal", tokenizer=t) for t in (str(folder), tokenizer))
        members = {"name": "a", "workload": a}, {"name": "b", "workload": b, "reseed": 1}
        return execute(parse_recipe(plan(world, *members, last)), 0, store, OPTIONS)

    with pytest.raises(BadInput, match="do not share a tokenizer"):
        execute_with("bytes")
    assert execute_with(None)  # trained as the one in the folder was


def test_a_stage_that_goes_on_from_an_ensemble_is_told_that_it_cannot(world):
    both = {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"}
    data = plan(world, *MEMBERS, both, {"name": "on", "init": {"from": "both"}})
    with pytest.raises(BadInput, match="starts from `both`, an ensemble") as caught:
        parse_recipe(data)
    assert caught.value.key == "stages.on.init"


@pytest.mark.parametrize("init", [{"ensemble": ["a", "b"]}])
def test_an_ensemble_is_not_trained(world, init):
    with pytest.raises(BadInput, match="not trained") as caught:
        parse_recipe(plan(world, *MEMBERS, {"name": "both", "init": init}))
    assert caught.value.mend.startswith("budget: 0step")


@pytest.mark.parametrize("kind", ["ensemble", "soup"])
def test_members_of_one_seed_are_refused_when_the_recipe_is_read(world, kind):
    last = {"name": "both", "init": {kind: ["x", "y"]}, "budget": "0step"}
    data = plan(world, {"name": "x", "reseed": 1}, {"name": "y", "reseed": 1}, last)
    with pytest.raises(BadInput, match="one run under two names") as caught:
        parse_recipe(data)
    assert "`reseed`" in caught.value.mend


@pytest.mark.exhaustive
def test_epochs_are_passes_over_the_training_part(world):
    run = world.train(plan(world, {"name": "train"}, budget="2epoch"))
    trained = run.trained()
    rows = trained.corpus.train.n_tokens // trained.stage.length
    steps = _record(run, "train").metrics["steps"]
    assert steps == round(2 * rows / trained.stage.rows)


def test_a_stage_that_is_only_read_bills_the_cause_its_reader_names(world):
    base = find("objective", "causal-lm")

    class Reader(base):
        """Causal LM that looks at a finished stage before it trains."""

        type: ClassVar[str] = base.type
        seen: ClassVar[list] = []

        def reads(self):
            return {"judge": "helper"}

        def build(self, model, ctx):
            subject = ctx.stage("judge").load()
            self.seen.append((ctx.stage("judge").digest, subject.model.training))
            return super().build(model, ctx)

    stages = [{"name": "judge", "reseed": 3}, {"name": "pupil", "objective": Reader()}]
    recipe = parse_recipe(plan(world, *stages))
    store = world.store("shared")
    record = store.run(execute(recipe, 0, store, OPTIONS))
    judge = train_stages(recipe, 0, store, OPTIONS)["judge"]
    assert Reader.seen[0] == (judge.digest, False)
    paid = judge.ledger.total("flops", ("train",))
    assert paid > 0
    assert record.ledger["helper"]["flops"] == pytest.approx(paid)


def billing(seed):
    """A data part that removes a tenth and bills 2 to the power of its seed."""
    base = find("data_op", "random-removal")

    class Billing(base):
        type: ClassVar[str] = base.type

        def digest_key(self):
            return f"billing {super().digest_key()}"

        def fit(self, sample, ctx):
            ctx.ledger.bill("scorer", flops=2.0**self.seed)
            return super().fit(sample, ctx)

    return Billing(fraction=0.1, seed=seed)


@pytest.mark.parametrize(
    ("stages", "flops"),
    [
        ([{"name": "a", "data": [5]}, {"name": "b", "data": [5], "init": {"from": "a"}}], 32),
        ([{"name": "a", "data": [5]}, {"name": "b", "data": [6], "init": {"from": "a"}}], 96),
        ([{"name": "a", "data": [5]}, {"name": "b", "data": [5, 6], "init": {"from": "a"}}], 96),
        ([{"name": "a", "data": [5]}, {"name": "b", "data": [6, 5], "init": {"from": "a"}}], 128),
        ([{**m, "data": [5]} for m in MEMBERS] + [BOTH | {"data": [5]}], 32),
    ],
)
def test_a_data_part_that_several_stages_share_is_billed_once(world, stages, flops):
    parts = [s | {"data": [billing(seed) for seed in s["data"]]} for s in stages]
    recipe = parse_recipe(plan(world, *parts, budget="1step", evaluate=[]))
    store = world.store("shared")
    assert store.run(execute(recipe, 0, store, OPTIONS)).ledger["scorer"]["flops"] == flops


def test_what_a_helper_shares_with_the_result_is_billed_to_the_causes_of_the_result(world):
    base = find("objective", "causal-lm")

    class Judged(base):
        type: ClassVar[str] = base.type

        def reads(self):
            return {"judge": "helper"}

    data = [billing(7)]
    stages = [{"name": "judge", "data": data}, {"name": "pupil", "data": data}]
    stages[1]["objective"] = Judged()
    recipe, store = parse_recipe(plan(world, *stages, budget="1step")), world.store("shared")
    bill = store.run(execute(recipe, 0, store, OPTIONS)).ledger
    judge = train_stages(recipe, 0, store, OPTIONS)["judge"].ledger
    assert bill["scorer"]["flops"] == judge.total("flops", ("scorer",)) == 128
    assert bill["helper"]["flops"] == judge.total("flops", ("train",))


def test_a_part_that_reads_an_unfinished_stage_is_told_so(world):
    run = world.train(plan(world, {"name": "train"}))
    with pytest.raises(BadInput, match="no finished stage `teacher`"):
        run.trained().ctx.stage("teacher")
