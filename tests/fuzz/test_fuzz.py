"""A few cases of every fuzz target on each run of the suite; `python -m tests.fuzz` runs more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS

FILES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_input_is_taken_or_refused_with_words(name: str, tmp_path: Path) -> None:
    found = fuzz(name, 25, seed=1, folder=tmp_path)
    assert found["faults"] == {}


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"newest", "override", "items"}))
def test_a_seed_as_it_stands_is_sound(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    assert any(target(seed, tmp_path) for seed in target.seeds)


@FILES
@given(st.binary(max_size=300), st.sampled_from(sorted(TARGETS)))
def test_any_bytes_at_all_are_taken_or_refused_with_words(tmp_path_factory, data, name) -> None:
    TARGETS[name](data, tmp_path_factory.mktemp("case"))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        *("question", "baseline", "metric", "seeds", "arms", "workload", "size", "budget"),
        *("optim", "objective", "surgery", "data", "evaluate", "stages", "init", "type", "name"),
    ]
)


@FILES
@given(st.dictionaries(KEYS, plain | st.dictionaries(KEYS, plain, max_size=4), max_size=9))
def test_a_study_of_any_shape_is_taken_or_refused_with_words(tmp_path_factory, tree) -> None:
    TARGETS["study"](json.dumps(tree).encode(), tmp_path_factory.mktemp("case"))


@pytest.mark.exhaustive
def test_the_runner_bounds_memory_and_reports_what_it_ran(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "30", "--json", str(answer)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--only", "units", "yaml"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(answer.read_text())
    assert found["cases"] >= 30
    assert all(f["peak_bytes"] < 2 << 30 for f in found["targets"].values())
