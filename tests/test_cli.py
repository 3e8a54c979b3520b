"""The command line: what it says, where it says it, and with which status it ends."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maquette import cli
from maquette.study.study import built_in


@pytest.fixture
def run(capsys):
    """Call the command line in this process: (status, stdout, stderr)."""
    root = logging.getLogger()
    before = root.handlers[:]

    def call(*arguments):
        try:
            cli.main([str(a) for a in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, errors = capsys.readouterr()
        return status, out, errors

    yield call
    root.handlers[:] = before


def shell(*arguments):
    command = [sys.executable, "-m", "maquette", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def study_file(world, tmp_path, **over):
    data = {
        "question": "Does it help?",
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "seeds": 3,
        "metric": "bits-per-byte",
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 3000}],
        "arms": {"plain": {}, "prefix": {"objective": "prefix-lm"}},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data | over))
    return path


@pytest.fixture
def home(world, tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return folder


# --- as a process --------------------------------------------------------------------------------


def test_help_names_the_verbs_and_ends_well():
    done = shell("--help")
    assert done.returncode == 0
    for verb in ("ls", "show", "cp", "check", "run", "compare", "noise", "export", "resume"):
        assert verb in done.stdout


def test_bad_input_ends_with_status_2_and_no_traceback(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("question: x\nobjectiv: causal-lm\narms: {a: {}, b: {}}\n")
    done = shell("check", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"{path}: objectiv: unknown key" in done.stderr
    assert "mend: did you mean `objective`?" in done.stderr


# --- looking -------------------------------------------------------------------------------------


def test_a_list_as_json_is_one_document_on_stdout(run):
    status, out, _ = run("ls", "methods", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {"kind", "name", "title", "arxiv"} <= set(rows[0])
    assert "electra" in {row["name"] for row in rows}


@pytest.mark.parametrize("what", ["methods", "workloads", "studies", "parts"])
def test_every_list_is_shown_to_people_too(run, what):
    status, out, _ = run("ls", what)
    assert status == 0
    assert len(out.splitlines()) > 3


def test_a_card_and_a_study_are_shown_by_name(run):
    assert "arXiv:1711.05101" in run("show", "adamw")[1]
    assert json.loads(run("show", "relora", "--json")[1])["name"] == "relora"
    status, _, errors = run("show", "adamv")
    assert status == 2
    assert "did you mean `adamw`?" in errors


def test_runs_of_a_store_that_is_not_there_are_a_bad_input(run, tmp_path):
    status, _, errors = run("ls", "runs", "--home", tmp_path / "none")
    assert status == 2
    assert "no store" in errors
    assert not (tmp_path / "none").exists()


def test_a_copied_study_is_the_file_that_comes_along_and_nothing_is_written_over(run, tmp_path):
    target = tmp_path / "own.yaml"
    assert run("cp", "electra", target)[0] == 0
    assert target.read_text() == built_in()["electra"].read_text()
    status, _, errors = run("cp", "electra", target)
    assert status == 2
    assert "file of that name" in errors


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "no-such-study"),
        ("compare", "no-such-file.yaml"),
        ("run", "electra"),
        ("run", "electra", "--arm", "nobody"),
        ("check", "electra", "--set", "size"),
        ("check", "electra", "--set", "size=huge"),
        ("compare", "electra", "--on", "the-moon"),
        ("dance",),
        ("compare",),
        ("ls", "nothing"),
        ("noise", "electra", "--seeds", "two"),
        ("replicate", "nobody"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_a_bad_input_without_a_traceback(run, tmp_path, arguments):
    status, out, errors = run(*arguments, "--home", tmp_path / "home")
    assert status == 2, errors
    assert out == ""
    assert "Traceback" not in errors
    assert errors.startswith("maquette: ")


def test_an_error_as_json_is_one_document_with_its_status(run, tmp_path):
    status, out, _ = run("check", tmp_path / "none.yaml", "--json")
    assert status == 2
    assert json.loads(out)["status"] == 2


# --- running -------------------------------------------------------------------------------------


def test_check_says_what_would_run_and_an_override_changes_it(run, world, tmp_path, home):
    path = study_file(world, tmp_path)
    status, out, errors = run("check", path, "--json", "--home", home, "--device", "cpu")
    assert status == 0, errors
    plan = json.loads(out)
    assert plan["seeds"] == 3
    assert set(plan["arms"]) == {"plain", "prefix"}
    [stage] = plan["arms"]["plain"]
    assert (stage["steps"], stage["tokens"], stage["size"]) == (8, 8192, "nano")
    more = ("--set", "budget=16step", "--home", home, "--device", "cpu")
    [longer] = json.loads(run("check", path, "--json", *more)[1])["arms"]["plain"]
    assert longer["steps"] == 16
    assert longer["flops"] == pytest.approx(2 * stage["flops"])
    assert "each run; 3 seed(s)" in run("check", path, "--home", home, "--device", "cpu")[1]


def test_one_arm_runs_is_listed_and_is_exported(run, world, tmp_path, home):
    path = study_file(world, tmp_path)
    place = ("--home", home, "--device", "cpu")
    status, out, errors = run("run", path, "--arm", "plain", "--json", *place)
    assert status == 0, errors
    done = json.loads(out)
    assert done["metrics"]["bits-per-byte"] > 0
    listed = json.loads(run("ls", "runs", "--json", "--home", home)[1])
    assert done["digest"] in {row["digest"] for row in listed}
    target = tmp_path / "plain"
    assert run("export", done["digest"][:10], target, "--home", home)[0] == 0
    assert (target / "config.json").is_file()
    assert (Path(done["folder"]) / "model" / "config.json").is_file()
    assert run("show", done["digest"][:10], "--home", home)[0] == 0
    assert run("resume", *place)[1].startswith("nothing to resume")
