"""The command line: what it says, where it says it, and with which status it ends."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maquette import cli
from maquette.study.store import Store
from maquette.study.study import built_in, load_study


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


def test_without_a_store_there_are_no_runs_yet_and_none_is_made(run, tmp_path):
    none = tmp_path / "none"
    assert json.loads(run("ls", "runs", "--json", "--home", none)[1]) == []
    status, out, _ = run("ls", "runs", "--home", none)
    assert (status, out) == (0, f"no runs yet in {none}\n")
    assert not none.exists()


def test_a_home_no_folder_can_be_made_in_is_a_bad_input(run):
    status, _, errors = run("check", "quickstart", "--home", "/proc/nope")
    assert status == 2, errors
    assert "/proc/nope: --home: no folder can be made here" in errors


def test_studies_of_the_store_are_listed_with_digest_status_and_verdicts(run, tmp_path):
    store = Store(tmp_path / "home")
    store.save_study("ab12cd34ef56ab12", "question: x\narms: {a: {}, b: {}}\n", "done", name="mine")
    store.save_verdict("ab12cd34ef56ab12", "b", {"word": "helps"})
    rows = json.loads(run("ls", "studies", "--json", "--home", store.home)[1])
    assert [row for row in rows if row["kind"] == "stored"] == [
        {
            "kind": "stored",
            "digest": "ab12cd34ef56ab12",
            "name": "mine",
            "status": "done",
            "verdicts": {"b": "helps"},
            "question": "x",
            "arms": ["a", "b"],
        }
    ]
    assert "quickstart" in {row["name"] for row in rows if row["kind"] == "built-in"}
    shown = run("ls", "studies", "--home", store.home)[1]
    assert "ab12cd34ef56 " in shown and "b helps" in shown
    document = json.loads(run("show", "ab12", "--json", "--home", store.home)[1])
    assert (document["kind"], document["verdicts"]) == ("study", {"b": "helps"})


def test_a_failed_run_of_seed_0_is_listed_and_shown_with_its_reason(run, tmp_path):
    store = Store(tmp_path / "home")
    digest = "cd34ab12ef56ab12"
    store.plan(digest, arm="plain", seed=0, recipe_yaml="budget: 8step\n")
    store.claim(digest, "me")
    store.fail(digest, "loss is nan at step 3")
    listed = run("ls", "runs", "--home", store.home)[1].splitlines()[-1].split("│")
    assert [cell.strip() for cell in listed[:4]] == ["cd34ab12ef56", "plain", "0", "failed"]
    shown = run("show", "cd34", "--home", store.home)[1]
    assert "plain, seed 0, failed" in shown and "loss is nan at step 3" in shown
    document = json.loads(run("show", "cd34", "--json", "--home", store.home)[1])
    assert (document["reason"], document["seed"]) == ("loss is nan at step 3", 0)
    assert document["recipe"] == {"budget": "8step"}


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
        ("check", "quickstart", "--device", "bogus"),
        ("compare", "quickstart", "--device", "bogus"),
        ("run", "quickstart", "--arm", "usual-decay", "--device", "cuda:99"),
        ("noise", "text/casual"),
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


@pytest.mark.parametrize("verb", ["compare", "replicate", "check", "forecast"])
def test_a_seed_for_a_study_is_refused_with_the_seeds_to_write(run, tmp_path, verb):
    status, _, errors = run(verb, "quickstart", "--seed", 7, "--home", tmp_path / "home")
    assert status == 2
    assert "--seed: a study runs under its own seeds" in errors
    assert "--set 'seeds=[7, 8, 9]'" in errors


# --- what is wrong beyond the file ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["check", "compare"])
@pytest.mark.parametrize(
    ("workload", "key", "mend"),
    [
        ({"vocabulary": 300_000}, "workload.vocabulary", "workload: {tokenizer: bytes}"),
        ({"corpus": {"path": "nowhere"}}, "workload.corpus.path: nowhere", "a file, a folder"),
        ({"held_out_fraction": 1e-9}, "workload.held_out_fraction", "change the fraction"),
        ({"tokenizer": "nowhere"}, "workload.tokenizer: nowhere", "hub name"),
    ],
)
def test_the_file_and_the_whole_key_are_named(
    run, world, tmp_path, home, verb, workload, key, mend
):
    path = study_file(world, tmp_path, workload=world.workload("text/causal") | workload)
    place = ("--on", "local:1") if verb == "compare" else ()
    status, _, errors = run(verb, path, "--home", home, "--device", "cpu", *place)
    assert status == 2, errors
    assert f"{path}: {key}" in errors
    assert mend in errors


@pytest.mark.parametrize("on", ["local:1", pytest.param("local:2", marks=pytest.mark.exhaustive)])
def test_an_arm_whose_budget_is_below_one_step_is_named(run, world, tmp_path, home, on):
    arms = {"plain": {}, "short": {"budget": "1tok"}}
    path = study_file(world, tmp_path, arms=arms)
    status, _, errors = run("compare", path, "--home", home, "--device", "cpu", "--on", on)
    assert status == 2, errors
    assert f"{path}: arms.short.budget: 1tok is below one step" in errors
    path = study_file(world, tmp_path, budget="1tok")
    status, _, errors = run("compare", path, "--home", home, "--device", "cpu", "--on", on)
    assert f"{path}: budget: 1tok is below one step" in errors
    assert "(arm `" in errors  # whichever comes to it first


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


def test_check_plans_what_starts_from_another_stage_and_says_what_it_leaves_out(
    run, world, tmp_path, home
):
    first = {"name": "first", "budget": "4step"}
    sampled = [{"type": "ensemble-distillation", "teacher": "first", "times": 1}]
    arms = {
        "on": {"stages": [first, {"name": "last", "init": {"from": "first"}}]},
        "fed": {"stages": [first, {"name": "last", "data": sampled}]},
    }
    tune = {"trials": 3, "over": {"optim.learning_rate": 2}}
    workload = world.workload("text/causal", dev_fraction=0.1)
    path = study_file(world, tmp_path, arms=arms, tune=tune, workload=workload)
    place = ("--home", home, "--device", "cpu")
    status, out, errors = run("check", path, "--json", *place)
    assert status == 0, errors
    found = json.loads(out)
    first, last = found["arms"]["on"]
    assert (first["stage"], first["steps"]) == ("first", 4)
    assert (last["stage"], last["steps"]) == ("last", 8)
    assert found["seconds"] == pytest.approx(3 * (first["seconds"] + last["seconds"]))
    [again] = found["arms"]["fed"]
    assert again == first
    why = "its data part `ensemble-distillation` reads `first`, which has to be trained first"
    assert found["not_planned"] == {"fed": {"last": why}}
    assert found["trials"] == 3
    said = run("check", path, *place)[1]
    assert f"not planned: fed, stage last: {why}" in said
    assert "stages that arms share counted once; the 1 stage(s) not planned come on top" in said
    assert "trials of `tune`, 3 an arm" in said
    assert json.loads(run("ls", "runs", "--json", "--home", home)[1]) == []


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


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture
def stopped(world, tmp_path, home, monkeypatch):
    """Two studies of one name, asked in the folder `asked` by relative paths and then stopped."""
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "docs").symlink_to(world.workload("text/causal")["corpus"]["path"])
    monkeypatch.chdir(folder)
    store = Store(home)
    workload = world.workload("text/causal") | {"corpus": {"path": "docs"}}
    for arms in ({"plain": {}, "prefix": {"objective": "prefix-lm"}}, {"a": {}, "b": {}}):
        study = load_study(study_file(world, folder, workload=workload, arms=arms, budget="2step"))
        store.save_study(study.digest, yaml.safe_dump(study.spec()), "running", name=study.name)
    monkeypatch.chdir(tmp_path)
    return store


def test_studies_go_on_in_their_folder_and_one_that_cannot_leaves_the_others(
    run, stopped, tmp_path
):
    broken = "question: x\nobjectiv: causal-lm\narms: {a: {}, b: {}}\n"
    stopped.save_study("ab12cd34ef56ab12", broken, "running", name="broken")
    place = ("--home", stopped.home, "--device", "cpu", "--on", "local:1")
    status, out, errors = run("resume", "--json", *place)
    answers = json.loads(out)
    assert status == 2, errors
    assert len(answers) == 3
    assert "unknown key `objectiv`" in answers.pop("ab12cd34ef56ab12")["error"]
    assert {a["name"] for a in answers.values()} == {"mine"}
    assert all(a["sentences"] and a["error"] is None for a in answers.values()), answers
    assert Path.cwd() == tmp_path
    statuses = {s.digest: s.status for s in stopped.list_studies()}
    assert statuses == dict.fromkeys(answers, "done") | {"ab12cd34ef56ab12": "running"}
    status, out, _ = run("resume", *place)
    assert status == 2
    assert "broken (ab12cd34ef56)" in out and "mend: did you mean `objective`?" in out
