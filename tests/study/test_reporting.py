"""What a report is filled with: curves, diagnostics, an untrained reference, how to run again."""

import json
import shlex

import pytest
import yaml

from maquette.conformance.world import OPTIONS
from maquette.study.compare import compare
from maquette.study.reporting import losses_of
from maquette.study.study import load_study, parse_study

PROBE = {
    "type": "token-kind-probe",
    "labelled": 40, "dev": 20, "test": 40, "epochs": 1, "min_chars": 20, "learning_rates": [1e-3],
}  # fmt: skip


def data(world, **over):
    return {
        "question": "Does detecting replaced tokens help in six steps?",
        "workload": world.workload("text/encoder"),
        "size": "nano",
        "budget": "6step",
        "seeds": 3,
        "metric": {"name": "token-kind-accuracy", "smallest_effect": 0.01},
        "evaluate": [PROBE],
        "arms": {"masked": {"objective": "masked-lm"}, "electra": {"objective": "electra"}},
    } | over


@pytest.fixture(scope="module")
def early(world):
    """A study no arm of which can be 0.9 above an untrained model, and its answer."""
    study = parse_study(data(world, above_untrained=0.9), name="early")
    store = world.store("early")
    return study, store, compare(study, store, OPTIONS)


def test_a_study_whose_arms_are_hardly_above_an_untrained_model_says_so_everywhere(early):
    study, store, result = early
    plain = json.loads(result.paths["json"].read_text())
    assert plain["too_early"].startswith("Too early to compare")
    assert plain["too_early"] in result.paths["html"].read_text()
    assert "Too early to compare" in result.verdicts["electra"].sentence
    [stored] = [s for s in store.list_studies() if s.digest == study.digest]
    assert "Too early to compare" in stored.verdicts["electra"]["sentence"]


def test_the_untrained_model_is_measured_under_every_seed_and_is_no_arm(early):
    study, store, result = early
    assert set(result.report.untrained.values) == {"0", "1", "2"}
    assert 0 < result.report.untrained.mean < 1
    assert {arm.name for arm in result.report.arms} == {"masked", "electra"}
    assert set(result.verdicts) == {"electra"}
    assert result.verdicts["electra"].level == 0.95  # nothing more to adjust for
    references = [run for run in store.list_runs() if run.arm == "untrained"]
    assert {run.seed for run in references} == {0, 1, 2}
    assert all("train" not in run.ledger for run in references)
    own = {run.digest for run in store.list_runs(study.digest)}
    assert not own & {run.digest for run in references}


def test_arms_far_enough_below_in_bits_are_compared_without_a_word_of_it(world):
    over = {
        "workload": world.workload("text/causal"),
        "objective": "causal-lm",
        "metric": "bits-per-byte",
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 4000}],
        "arms": {"still": {"optim": {"type": "adamw", "learning_rate": 1e-5}}, "fast": {}},
        "above_untrained": 0.1,
    }
    study = parse_study(data(world, **over), name="late")
    result = compare(study, world.store("late"), OPTIONS)
    still, fast = (arm.mean for arm in result.report.arms)
    assert result.report.untrained.mean - still < 0.1 < result.report.untrained.mean - fast
    assert result.report.too_early == ""
    assert "Too early" not in result.verdicts["fast"].sentence


def test_what_an_objective_reports_of_itself_is_the_mean_over_seeds(early):
    _, store, result = early
    [arm] = [arm for arm in result.report.arms if arm.name == "electra"]
    found = {d.name: d for d in arm.diagnostics}
    runs = [r for r in store.list_runs() if r.arm == "electra/train"]
    values = [run.metrics["diagnostics"]["detector AUC"] for run in runs]
    assert len(values) == 3
    assert found["detector AUC"].value == pytest.approx(sum(values) / 3)
    assert found["detector AUC"].note.endswith("over 3 seeds")
    assert "detector AUC" in result.paths["html"].read_text()


def test_curves_hold_the_looks_at_held_out_rows_with_what_had_been_spent(early):
    _, _, result = early
    for arm in result.report.arms:
        for curve in arm.curves.values():
            looks = [x for x in curve.held_out_loss if x is not None]
            assert len(looks) == OPTIONS.settings.live_points + 1  # and one at the end
            assert len([x for x in curve.train_loss if x is not None]) == 6
            assert curve.flops == sorted(curve.flops)
            assert curve.flops[0] == 0
            assert len(curve.flops) == len(curve.held_out_loss) == len(curve.train_loss)


def test_losses_are_the_same_for_one_objective_with_one_set_of_options_and_tokens(world):
    arms = {
        "masked": {"objective": "masked-lm"},
        "slower": {"objective": "masked-lm", "optim": {"type": "adamw", "learning_rate": 1e-5}},
        "electra": {"objective": "electra"},
        "stone": {"objective": {"type": "electra", "variant": "all_tokens_mlm"}},
        "words": {"objective": "masked-lm", "workload": {"vocabulary": 400}},
    }
    found = losses_of(parse_study(data(world, arms=arms), name="losses"))
    assert found == {
        "masked": "masked-lm",
        "slower": "masked-lm",
        "electra": "electra",
        "stone": "electra (variant all_tokens_mlm)",
        "words": "masked-lm in tokens of words",
    }


def test_the_command_to_run_it_again_reads_back_to_the_same_study(world, tmp_path):
    file = tmp_path / "my studies" / "a.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(data(world, budget="1step")))
    asked = load_study(str(file), ["budget=2step", "arms.masked={objective: masked-lm}"])
    store = world.store("again")
    [command, _] = compare(asked, store, OPTIONS).report.rerun
    verb, given = shlex.split(command)[:3], shlex.split(command)[3:]
    assert verb == ["maquette", "compare", str(file)]
    assert given[::2] == ["--set", "--set"]
    assert load_study(verb[2], given[1::2]).digest == asked.digest


def test_a_study_without_a_file_is_run_again_from_the_store(early):
    study, _, result = early
    path = shlex.split(result.report.rerun[0])[2]
    assert load_study(path).digest == study.digest
