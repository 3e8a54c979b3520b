"""The verb forecast: what it prints, where its report goes, how it ends."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from maquette import cli, quantities
from maquette.evaluation.scaling import Law
from maquette.quantities import Size
from maquette.study import execute
from maquette.study.store import Store


@pytest.fixture
def run(capsys, tmp_path):
    """Call the command line in this process: (status, stdout, stderr)."""

    def call(*arguments):
        try:
            cli.main([*map(str, arguments), "--home", str(tmp_path / "home")])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, errors = capsys.readouterr()
        return status, out, errors

    return call


@pytest.fixture
def table(tmp_path):
    laws = {
        "base": Law(1.5, (60.0, 40.0), (0.35, 0.3)),
        "new": Law(1.45, (60.0, 40.0), (0.35, 0.3)),
    }
    rng = np.random.default_rng(0)
    lines = ["arm,params,tokens,loss"]
    for arm, law in laws.items():
        for n in (1e5, 8e5, 3e6, 1.1e7):
            for d in (2e6, 2e7, 2e8, 1e9):
                loss = float(law(n, d)) * np.exp(0.002 * rng.standard_normal())
                lines.append(f"{arm},{n},{d},{loss}")
    path = tmp_path / "losses.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_of_arms_is_fitted_compared_and_reported(run, table):
    status, out, _ = run(
        "forecast", "--table", table, "--x", "params,tokens", "--y", "loss", "--group", "arm",
        "--target", "1.3e8,2.6e9", "--json", "--draws", "200",
    )  # fmt: skip
    assert status == 0
    document = json.loads(out)
    assert [arm["name"] for arm in document["arms"]] == ["base", "new"]
    [law] = document["arms"][0]["laws"]
    floor = law["floor"]
    assert floor["low"] < floor["value"] < floor["high"]
    assert floor["value"] == pytest.approx(1.5, abs=0.03)
    assert len(law["exponents"]) == 2
    assert [h["form"] for h in law["held_out"]][-1] == "power law with a floor"
    [difference] = document["differences"]
    assert difference["word"] == "helps"
    assert difference["effect"]["low"] < -0.05 < difference["effect"]["high"]
    assert Path(document["report"]["html"]).is_file()


def test_for_people_the_held_out_error_stands_beside_every_floor(run, table):
    status, out, _ = run(
        "forecast", "--table", table, "--x", "tokens", "--y", "loss", "--group", "arm"
    )
    floors = [line for line in out.splitlines() if "floor" in line and "interval" in line]
    assert len(floors) == 2
    assert all("when left out" in line and " to " in line for line in floors)
    assert status == 0
    assert "report: " in out


def test_arms_that_are_fitted_together_are_told_of(run, table):
    asked = ("forecast", "--table", table, "--x", "params,tokens", "--y", "loss", "--draws", "100")
    note = (
        "the column `arm` tells 2 kinds of them apart (base, new): `--group arm` gives each its own"
    )
    assert note in run(*asked)[1]
    assert "--group" not in run(*asked, "--group", "arm")[1]


def test_a_table_that_bears_no_law_ends_with_status_1_and_the_reason(run, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("epochs,loss\n8,5.481\n16,5.755\n32,7.518\n64,8\n")
    status, out, _ = run("forecast", "--table", path, "--x", "epochs", "--y", "loss")
    assert status == 1
    assert "no forecast, because the loss rises from 5.481 at epochs 8" in out
    assert "power law with a floor" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a study or a table"),
        (("electra", "--table", "{t}", "--x", "params", "--y", "loss"), "not both"),
        (("--table", "{t}", "--y", "loss"), "--x: a table needs this column named"),
        (("--table", "{t}", "--x", "params"), "--y: a table needs this column named"),
        (("electra", "--x", "params"), "--x: names a column of a table"),
        (("--table", "{t}", "--x", "prams", "--y", "loss"), "did you mean `params`?"),
        (("--table", "{t}", "--x", "params", "--y", "arm"), "`base` in line 2 is not a number"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--sizes", "nano"), "--sizes: belongs"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--target", "125m"), "no list of num"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--target", "1,2"), "2 numbers for 1"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--target", "-1"), "must be positive"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--draws", "5"), "at least 100 draws"),
        (("--table", "{t}", "--x", "params", "--y", "loss", "--level", "90"), "must be in (0, 1)"),
        (("--table", "none.csv", "--x", "params", "--y", "loss"), "no such file"),
        (("no-such-study",), "there is no study"),
        (("electra", "--sizes", "nano,1m"), "at least 4 sizes, got 2"),
        (("electra", "--budget", "20flop/param"), "ladder.budget"),
        (("electra", "--target", "nano"), "not above the largest size"),
        (("electra", "--metric", "beauty"), "gives the metric `beauty`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_forecast_is_a_bad_input_with_a_mend(run, table, arguments, message):
    status, out, errors = run("forecast", *(a.replace("{t}", str(table)) for a in arguments))
    assert status == 2, errors
    assert out == ""
    assert message in errors
    assert "Traceback" not in errors


# --- a real ladder -------------------------------------------------------------------------------

TINY = [Size(f"tiny{w}", 12 * w * w, w, 1, 2, 32, 64, 4e-3) for w in (8, 16, 24, 32)]


@pytest.mark.slow
def test_a_ladder_is_run_reported_stored_and_never_run_twice(run, world, tmp_path, monkeypatch):
    for size in TINY:
        monkeypatch.setitem(quantities.SIZES, size.name, size)
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    study = {
        "question": "Does it pay at scale?",
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "seeds": 3,
        "metric": "bits-per-byte",
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 300}],
        "arms": {"slow": {"optim": {"type": "adamw", "learning_rate": 1e-5}}, "fast": {}},
        "ladder": {"sizes": [s.name for s in TINY], "budget": "2step", "target": "nano"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(study))
    command = ("forecast", path, "--draws", "100", "--device", "cpu", "--on", "local:1", "--json")
    status, out, errors = run(*command)
    # Two steps may or may not make a law; either way everything else is there.
    assert status in (0, 1), errors
    document = json.loads(out)
    store = Store(home)
    stored = [r for r in store.list_runs(document["digest"]) if "bits-per-byte" in r.metrics]
    assert len(stored) == 4 * 2 * 3
    assert {r.arm for r in stored} >= {"slow@tiny8", "fast@tiny32"}
    rows = [row for arm in document["arms"] for row in arm["laws"][0]["rows"]]
    assert sorted(row[-1] for row in rows) == sorted(r.metrics["bits-per-byte"] for r in stored)
    assert {row[0] for row in rows} == {size.weights for size in TINY}
    assert set(document["ranks"]["smallest"]) == {"slow", "fast"}
    [again] = document["rerun"]
    sizes = "tiny8,tiny16,tiny24,tiny32"
    assert shlex.split(again)[:5] == ["maquette", "forecast", str(path), "--sizes", sizes]
    [record] = store.list_studies()
    assert (record.digest, record.status) == (document["digest"], "done")

    def never(*args, **kwargs):
        raise AssertionError("trained twice")

    monkeypatch.setattr(execute, "train", never)
    assert json.loads(run(*command)[1])["arms"] == document["arms"]
    assert "# Forecast: Does it pay at scale?" in run("show", document["digest"][:10])[1]
    # A forecast that was stopped is found by `resume` with its ladder.
    store.save_study(record.digest, record.yaml, "running", name=record.name)
    status, out, errors = run("resume", "--device", "cpu", "--on", "local:1", "--json")
    assert status == 0, errors
    assert any("Kendall" in line for line in json.loads(out)[record.digest]["sentences"])
    assert Store(home).list_studies()[0].status == "done"
