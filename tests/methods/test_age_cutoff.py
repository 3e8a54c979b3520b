"""The age cut-off: cumulative, explicit about missing years, equalised on demand."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from maquette.data.documents import byte_lengths, documents
from maquette.data.scores import kept_rows
from maquette.errors import BadInput
from maquette.methods.data.age_cutoff import AgeCutoff, up_to_year
from maquette.recipe import parse_data

YEARS = [1999, 2012, 2013, 2013, 2019, 2026]


def batch_of(years, texts=None):
    ids = [f"doc-{n}" for n in range(len(years))]
    return documents(ids, texts or ["text"] * len(years), years=years)


def run(op, batch):
    state = op.fit(pa.Table.from_batches([batch]), None)
    return op.apply(batch, state)


def test_a_cutoff_keeps_everything_up_to_and_with_its_year():
    out = run(AgeCutoff(year=2013, equal_to=None), batch_of(YEARS))
    assert kept_rows(out).tolist() == [True, True, True, True, False, False]
    assert out.column("why").to_pylist()[-1] == "year 2026 > 2013"


def test_a_later_cutoff_keeps_all_that_an_earlier_one_keeps():
    kept = [up_to_year(YEARS, year) for year in (2012, 2013, 2019, 2026)]
    for less, more in itertools.pairwise(kept):
        assert not (less & ~more).any()


def test_since_cuts_the_old_end():
    out = run(AgeCutoff(year=2019, since=2012, equal_to=None), batch_of(YEARS))
    assert kept_rows(out).tolist() == [False, True, True, True, True, False]
    assert out.column("why").to_pylist()[0] == "year 1999 < 2012"


def test_a_missing_year_is_refused_unless_the_user_says_what_to_do():
    batch = batch_of([2012, None])
    with pytest.raises(BadInput, match="`doc-1` has no year"):
        run(AgeCutoff(year=2019, equal_to=None), batch)
    assert kept_rows(run(AgeCutoff(year=2019, missing="drop", equal_to=None), batch)).tolist() == [
        True,
        False,
    ]
    assert kept_rows(run(AgeCutoff(year=2019, missing="keep", equal_to=None), batch)).tolist() == [
        True,
        True,
    ]


def test_equalised_arms_hold_as_many_bytes_within_half_a_document():
    rng = np.random.default_rng(0)
    years = rng.integers(2000, 2027, 800).tolist()
    texts = ["x" * n for n in rng.integers(1, 400, 800)]
    batch = batch_of(years, texts)
    sizes = byte_lengths(batch)
    target = sizes[up_to_year(years, 2010)].sum()
    for year in (2010, 2015, 2026):
        kept = kept_rows(run(AgeCutoff(year=year, equal_to=2010), batch))
        assert abs(sizes[kept].sum() - target) <= 200
        assert not (kept & ~up_to_year(years, year)).any()
    # What is left of the newest arm still spans all years.
    assert max(np.array(years)[kept]) >= 2024


def test_rows_an_earlier_part_dropped_need_no_year():
    from maquette.data.scores import drop_rows

    batch = drop_rows(batch_of([2012, None]), {1: "earlier"})
    out = run(AgeCutoff(year=2019, equal_to=None), batch)
    assert out.column("why").to_pylist() == [None, "earlier"]


def test_a_cutoff_that_keeps_nothing_tells_the_years():
    with pytest.raises(BadInput, match="from 1999 to 2026"):
        run(AgeCutoff(year=1990, equal_to=None), batch_of(YEARS))


def test_years_out_of_order_are_refused():
    with pytest.raises(ValueError, match="since must be <= year"):
        AgeCutoff(year=2010, since=2012, equal_to=None)


def test_arms_of_unequal_size_have_to_be_asked_for():
    with pytest.raises(BadInput, match="equal_to is required: the oldest cut-off") as caught:
        parse_data([{"type": "age-cutoff", "year": 2019}], where="a.yaml")
    assert "a.yaml" in str(caught.value)
    [explicit] = parse_data([{"type": "age-cutoff", "year": 2019, "equal_to": None}])
    [equal] = parse_data([{"type": "age-cutoff", "year": 2019, "equal_to": 2013}])
    batch = batch_of(YEARS)
    assert kept_rows(run(explicit, batch)).sum() == 5
    assert kept_rows(run(equal, batch)).sum() == 4
