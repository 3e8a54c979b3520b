"""Micro-batches as a function of (seed, step)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maquette.errors import BadInput
from maquette.parts import find
from maquette.recipe import parse_recipe
from maquette.study.execute import make_ctx
from maquette.training.distributed import Team
from maquette.training.feeding import Feeder, check_feed


def setting(world, seed=0, **over):
    data = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "evaluate": [],
    }
    stage = parse_recipe(data | over).last
    ctx = make_ctx(stage, seed, world.store("shared"), torch.device("cpu"))
    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
    return stage, corpus, replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)


def feeder(world, seed=0, **over):
    stage, corpus, ctx = setting(world, seed, **over)
    return Feeder(stage, corpus.train, ctx, steps=10)


def ids(batches):
    return torch.cat([b["ids_BT"] for b in batches])


def test_a_step_depends_on_the_seed_and_the_step_and_not_on_what_ran_before(world):
    one, two = feeder(world), feeder(world)
    for step in range(5):
        one.batches(step)
    assert torch.equal(ids(one.batches(5)), ids(two.batches(5)))
    assert not torch.equal(ids(one.batches(5)), ids(one.batches(6)))
    assert not torch.equal(ids(one.batches(5)), ids(feeder(world, seed=1).batches(5)))


def test_a_stream_gives_the_same_batches_from_wherever_it_starts(world):
    f = feeder(world)
    whole = {step: ids(batches) for step, batches in f.stream(0, 6)}
    rest = {step: ids(batches) for step, batches in f.stream(4, 6)}
    assert list(whole) == list(range(6))
    assert list(rest) == [4, 5]
    assert all(torch.equal(rest[s], whole[s]) for s in rest)


def test_a_change_of_objective_does_not_move_the_order_of_the_rows(world):
    workload = world.workload("text/encoder")
    mlm = feeder(world, workload=workload, objective="masked-lm")
    electra = feeder(world, workload=workload, objective="electra")
    for step in (0, 7):
        assert (mlm.starts(step) == electra.starts(step)).all()


def test_every_row_comes_once_in_an_epoch(world):
    f = feeder(world)
    rows = f.stage.rows
    seen = np.concatenate([f.starts(s) // f.window for s in range(f.n_rows // rows)])
    assert len(set(seen.tolist())) == len(seen)
    assert seen.max() < f.n_rows


def test_micro_batches_are_the_batch_in_pieces(world):
    whole, pieces = feeder(world), feeder(world, microbatches=4)
    assert len(pieces.batches(3)) == 4
    assert torch.equal(ids(whole.batches(3)), ids(pieces.batches(3)))


def test_processes_share_a_step_without_overlap(world):
    stage, corpus, ctx = setting(world, microbatches=4)
    whole = Feeder(stage, corpus.train, ctx).batches(2)
    ranks = [replace(ctx, team=Team(rank, 2)) for rank in range(2)]
    shares = [Feeder(stage, corpus.train, rank).batches(2) for rank in ranks]
    for i, batch in enumerate(whole):
        assert torch.equal(shares[i % 2][i // 2]["ids_BT"], batch["ids_BT"])


MIX = {
    "type": "domain-upsampling",
    "groups": {"late": ["library"], "early": ["*"]},
    "base": {"late": 0.0625, "early": 0.9375},
    "upsampled": {"late": 0.5, "early": 0.5},
    "fraction": 0.5,
    "min_source_tokens": 256,
}


def test_a_mixture_moves_with_the_fraction_of_the_horizon(world):
    f = feeder(world, feed=MIX)
    low, high = f.sources["library"]

    def share(steps):
        starts = np.concatenate([f.starts(s) for s in steps])
        return ((starts >= low) & (starts < high)).mean()

    # Rows are whole, so a step of 32 rows holds 2 or 16 of them.
    assert share(range(5)) == pytest.approx(0.0625, abs=0.01)
    assert share(range(5, 10)) == pytest.approx(0.5, abs=0.01)


def test_a_corpus_shorter_than_a_row_is_refused(world):
    stage, _, ctx = setting(world)

    class Short:
        n_tokens, domain_tokens = 7, {}

    with pytest.raises(BadInput, match="7 tokens, one row takes 32"):
        Feeder(stage, Short(), ctx)


UPSAMPLED = MIX | {"fraction": 0.2}
REPEATED = MIX | {"upsampled": {"late": 1.0}}


def fed(world, feed, budget):
    """What `check_feed` takes."""
    stage, corpus, ctx = setting(world, feed=feed, budget=budget)
    return stage, corpus.train, ctx


@pytest.mark.parametrize(
    ("feed", "budget", "message"),
    [
        (UPSAMPLED, "4step", "fraction 0.2 of 4 steps is shorter than one step"),
        (UPSAMPLED, "1step", "fraction 0.2 of 1 steps is shorter than one step"),
        (REPEATED, "4000step", "more than max_epochs"),
    ],
)
def test_what_a_mixture_would_refuse_on_the_way_is_refused_before_the_first_step(
    world, feed, budget, message
):
    with pytest.raises(BadInput, match=message):
        check_feed(*fed(world, feed, budget))
    check_feed(*fed(world, feed, "40step"))


def test_a_source_without_a_row_is_found_though_only_the_last_phase_draws_from_it(world):
    class Late(find("feed", "as-is")):
        type = "as-is"

        def mixture(self, clock, sources):
            return {"orchard": 1.0} if clock.fraction < 0.9 else {"nowhere": 1.0}

    with pytest.raises(BadInput, match="`nowhere` has 0 tokens"):
        check_feed(*fed(world, Late(), "1000step"))


class Tiny:
    """A training part of five rows of 32 tokens; a batch takes 32 rows."""

    n_tokens, domain_tokens = 160, {}


def test_a_training_part_below_one_batch_is_refused_unless_the_budget_counts_epochs(world):
    stage, _, ctx = setting(world)
    with pytest.raises(BadInput, match="holds 5 rows of 32 tokens, one step takes 32") as caught:
        Feeder(stage, Tiny(), ctx)
    assert "8epoch" in caught.value.mend
    stage, _, ctx = setting(world, budget="8epoch")
    assert sorted(Feeder(stage, Tiny(), ctx).starts(0)[:5] // 32) == [0, 1, 2, 3, 4]
