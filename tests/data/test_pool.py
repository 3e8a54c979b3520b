"""Stages of a consume-once pool."""

import numpy as np
import pytest

from maquette.data.order import batch_rows
from maquette.data.pool import Stages, make_pool
from maquette.errors import BadInput

NONE = np.empty(0, np.int64)


def windows(stages, pool):
    used, found = pool.candidates[: stages.taken(0)], []
    for stage in range(1, stages.n):
        window = stages.candidates(pool, stage, used, np.random.default_rng(stage))
        found.append(window)
        used = np.concatenate([used, window[: stages.taken(stage)]])
    return found


def test_candidates_are_in_the_order_of_a_run_without_selection():
    pool = make_pool(7, 1000, NONE, 100)
    plain = np.concatenate([batch_rows(7, step, 16, 1000) for step in range(50)])
    assert np.array_equal(pool.candidates[:800], plain)


def test_candidates_probes_and_excluded_rows_are_disjoint_and_everything():
    excluded = np.arange(50, 80)
    pool = make_pool(0, 1000, excluded, 100)
    assert len(pool.probes) == 100
    assert sorted([*pool.candidates, *pool.probes, *excluded]) == list(range(1000))


def test_stages_are_equal_to_a_step_and_a_window_is_taken_over_rho():
    stages = Stages(5, 403, 16, 0.2)
    assert stages.edges == (0, 81, 161, 242, 322, 403)
    assert stages.taken(1) == 80 * 16
    assert stages.n_candidates(1) == 5 * 80 * 16
    assert stages.scored == 5 * 16 * (403 - 81)


def test_discarded_candidates_never_come_again():
    stages, pool = Stages(4, 40, 4, 0.25), make_pool(0, 1000, NONE, 50)
    seen = np.concatenate([pool.candidates[: stages.taken(0)], *windows(stages, pool)])
    assert len(np.unique(seen)) == len(seen)


def test_returned_candidates_may_come_again_but_not_what_was_trained_on():
    stages = Stages(4, 40, 4, 0.25, unselected="return")
    pool = make_pool(0, 340, NONE, 50)
    found = windows(stages, pool)
    assert set(found[1]) & set(found[0])
    assert not set(found[1]) & set(found[0][: stages.taken(1)])
    assert not set(found[2]) & set(pool.candidates[: stages.taken(0)])


def test_a_pool_that_is_too_small_is_refused_with_a_mend():
    pool = make_pool(0, 340, NONE, 50)
    Stages(4, 40, 4, 0.25, unselected="return").check_room(pool)
    with pytest.raises(BadInput, match="stage 2 needs 160 candidates when 200 are gone"):
        Stages(4, 40, 4, 0.25).check_room(pool)
    with pytest.raises(BadInput, match="window of 30 candidates is smaller than the 40 rows"):
        Stages(4, 40, 4, 0.25, window=30).check_room(pool)
    with pytest.raises(BadInput, match="holds 100 rows beside the reference"):
        make_pool(0, 300, np.arange(200), 100)
