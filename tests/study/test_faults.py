"""The short form of `benchmarks/faults.py`: a few broken runs end with the bits of a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_broken_runs_go_on_to_the_same_bits_and_lose_nothing(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "benchmarks/faults.py", "--rounds", "4", "--steps", "12"]
    command += ["--only", "kill", "io", "damage", "index", "--json", str(answer)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(answer.read_text())
    assert (found["rounds"], found["right"]) == (4, 4)
