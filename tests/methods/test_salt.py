"""SALT: when it distils, from what, and that the engine trains, resumes and bills it exactly."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from maquette.conformance.world import OPTIONS, Stopped
from maquette.errors import BadInput
from maquette.methods.objectives.salt import (
    Overtaking,
    SmallModelAided,
    distilled_steps,
    overtaken_at,
    teacher_weight,
)
from maquette.parts import Batch, Clock, Objective
from maquette.recipe import parse_part, parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training import checkpoint
from maquette.training.teachers import FrozenTeacher, next_token_mixture

V, T = 97, 16
STEPS = 8


# --- when it distils -----------------------------------------------------------------------------


def test_an_abrupt_switch_keeps_the_weight_until_the_end():
    assert [teacher_weight(s / 4, 0.6) for s in range(6)] == [0.6, 0.6, 0.6, 0.6, 0, 0]


def test_a_linear_switch_is_half_the_weight_half_way():
    assert teacher_weight(0.5, 0.6, "linear") == pytest.approx(0.3)


def test_a_ratio_switch_halves_the_odds_half_way():
    # w = 2/3 has odds 2; odds 1 are w = 1/2.
    assert teacher_weight(0.5, 2 / 3, "ratio") == pytest.approx(0.5)


@pytest.mark.parametrize("n", [1, 7, 50, 208, 1000])
@pytest.mark.parametrize("until", [0.0, 0.1, 0.17, 0.2, 0.3, 0.35, 1.0])
def test_a_share_of_the_run_distils_as_many_steps_as_it_counts(until, n):
    part = SmallModelAided(teacher="small", until=until)
    distilled = [part.phase(Clock(step=s, fraction=s / n)) for s in range(n)].count("distil")
    assert distilled == distilled_steps(until, n)
    assert distilled == math.ceil(round(until * n, 6))


def test_a_count_of_steps_is_that_count():
    assert distilled_steps("36_000step", 208_000) == 36_000
    part = SmallModelAided(teacher="small", until="3step")
    clocks = [Clock(step=s, fraction=s / STEPS) for s in range(STEPS)]
    assert [part.phase_now(c, nn.ModuleDict()) for c in clocks].count("distil") == 3


def test_the_student_overtakes_where_its_mean_falls_below_the_teachers():
    student = [5.0 - 0.1 * s for s in range(40)]
    teacher = [3.0] * 30  # the lines cross after step 20
    assert overtaken_at(student, teacher, window=1) == 22
    assert overtaken_at(student[:15], teacher) is None
    assert overtaken_at([], []) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: teacher_weight(0.5, 1.2), r"weight must be in \[0, 1\], got 1.2"),
        (lambda: teacher_weight(-0.1), "done must be at least 0"),
        (lambda: teacher_weight(0.5, 1.0, "ratio"), "weight below 1"),
        (lambda: distilled_steps(1.5, 10), r"until must be in \[0, 1\].*got 1.5"),
        (lambda: distilled_steps(-0.1, 10), r"until must be in \[0, 1\].*got -0.1"),
        (lambda: distilled_steps("11step", 10), "at most the 10 steps of the run"),
        (lambda: distilled_steps("soon", 10), "like `36step`, got 'soon'"),
    ],
)
def test_schedules_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 36}, r"a share of the budget in \[0, 1\], a count like `36step`"),
        ({"until": "soon"}, "overtake"),
        ({"until": True}, "got True"),
        ({"weight": 1.5}, "less than or equal to 1"),
        ({"temperature": 0}, "greater than 0"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"teacher": None}, "teacher is required"),
        ({"until": "overtake", "switch": "linear"}, "switch must be abrupt"),
        ({"control": "smoothing"}, "has no teacher"),
        ({"weight": 1.0, "switch": "ratio"}, "weight below 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        parse_part(Objective, {"type": "salt", "teacher": "small", **options}, key="objective")


def test_a_teacher_of_the_recipe_is_read_only_when_something_is_distilled():
    assert SmallModelAided(teacher="small").reads() == {"small": "helper"}
    assert SmallModelAided(teacher="small", until=0.0).reads() == {}
    assert SmallModelAided(teacher="small", until="0step").reads() == {}
    assert SmallModelAided(teacher="small", weight=0.0).reads() == {}
    assert SmallModelAided(teacher="./small").reads() == {}


# --- the loss on models --------------------------------------------------------------------------


def llama(seed, width=32, vocabulary=V, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=T,
        **more,
    )
    return LlamaForCausalLM(config)


IDS = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(5))


def expected_loss(student, teacher, w, rho, vocabulary=V):
    targets = IDS[:, 1:].flatten()
    log_p = student(input_ids=IDS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    with torch.no_grad():
        z = teacher(input_ids=IDS).logits[:, :-1, :vocabulary].flatten(0, 1)
        q = (z / rho).softmax(-1)
    kd = -(q * log_p[:, :vocabulary]).sum(-1).mean()
    return (1 - w) * F.nll_loss(log_p, targets) + w * kd


@pytest.mark.parametrize("padding", [0, 7])
def test_loss_and_gradients_are_those_of_two_hugging_face_models(padding):
    student, teacher = llama(0), llama(1, width=16, vocabulary=V + padding)
    found = next_token_mixture(
        student, FrozenTeacher(teacher, V), IDS, share=0.667, temperature=0.25
    )
    expected = expected_loss(student, teacher, 0.667, 0.25)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    weights = list(student.parameters())
    for got, want in zip(
        torch.autograd.grad(found.total, weights),
        torch.autograd.grad(expected, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_student_whose_head_is_no_linear_layer_has_the_same_loss():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    student, teacher = llama(0), llama(1)
    head = Scaled(32, V, bias=False)
    student.lm_head = head
    found = next_token_mixture(student, FrozenTeacher(teacher, V), IDS, share=0.5, temperature=0.5)
    expected = expected_loss(student, teacher, 0.5, 0.5)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_whose_logits_are_more_than_its_head_is_read_whole():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.1 * torch.tanh(out.logits / 0.1)
            return out

    student, teacher = llama(0), Capped(llama(1).config)
    frozen = FrozenTeacher(teacher, V)
    assert not frozen.splits
    found = next_token_mixture(student, frozen, IDS, share=1.0)
    expected = expected_loss(student, teacher, 1.0, 1.0)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_stays_in_eval_mode_and_takes_no_gradient():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=16, n_layer=1, n_head=2)
    config.resid_pdrop = config.embd_pdrop = 0.5
    extra = nn.ModuleDict({"teacher": FrozenTeacher(GPT2LMHeadModel(config), V)}).train()
    teacher = extra["teacher"]
    assert not teacher.training
    assert not any(p.requires_grad for p in extra.parameters())
    one, two = (teacher.read(IDS)[0] for _ in range(2))
    assert torch.equal(one, two)  # no dropout


def test_a_teacher_that_could_be_trained_is_refused():
    teacher = FrozenTeacher(llama(1), V)
    teacher.requires_grad_(True)
    with pytest.raises(ValueError, match="teacher must be frozen"):
        next_token_mixture(llama(0), teacher, IDS, share=0.5)


def loss_at(part, extra, student, clock):
    return part.loss(student, extra, Batch({"ids_BT": IDS}, IDS.size(0), 1, 1.0), clock)


def test_after_the_switch_the_teacher_is_not_called():
    part = SmallModelAided(teacher="small", until=0.375)
    teacher, student = FrozenTeacher(llama(1), V), llama(0)
    calls = []
    teacher.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    for step in range(STEPS):
        loss_at(part, nn.ModuleDict({"teacher": teacher}), student, Clock(step, fraction=step / 8))
    assert len(calls) == 3 == distilled_steps(0.375, STEPS)


def test_a_look_switches_from_the_next_step_on_and_decides_once_per_step():
    part = SmallModelAided(teacher="small", until="overtake", every=2)
    student = llama(0)
    worse = llama(1)
    with torch.no_grad():
        worse.lm_head.weight.mul_(200)  # sure of the wrong tokens
    looking = Overtaking(IDS)
    extra = nn.ModuleDict({"teacher": FrozenTeacher(worse, V), "overtaking": looking})
    phases, kinds = [], []
    for step in range(5):
        clock = Clock(step, fraction=step / 5)
        kinds.append("kd" in loss_at(part, extra, student, clock).logs)
        phases.append(part.phase_now(clock, extra))
    assert phases == ["distil", "distil", "look", "", ""]
    assert kinds == [True, True, True, False, False]
    assert (int(looking.at), int(looking.looked)) == (2, 2)


def test_a_teacher_that_is_ahead_goes_on():
    part = SmallModelAided(teacher="small", until="overtake", every=1)
    student = llama(0)
    extra = nn.ModuleDict({"teacher": FrozenTeacher(llama(0), V), "overtaking": Overtaking(IDS)})
    for step in range(3):  # the same model: never strictly below
        loss_at(part, extra, student, Clock(step, fraction=step / 3))
    assert int(extra["overtaking"].at) == -1
    assert int(extra["overtaking"].looked) == 2


def test_distilling_past_the_teacher_and_a_useless_teacher_are_reported():
    falling = [6.0 - 0.1 * s for s in range(40)]
    part = SmallModelAided(teacher="small", until=1.0)
    said = part.diagnose({"ce": falling, "teacher_ce": [4.0] * 40})
    assert list(said) == ["distilled past the teacher"]
    assert "overtook the teacher by step 24 of 40" in said["distilled past the teacher"]
    assert not part.diagnose({"ce": falling, "teacher_ce": [4.0] * 15})
    said = part.diagnose({"ce": falling, "teacher_ce": [7.0] * 4})
    assert "teacher worse than the start" in said


# --- whole runs ----------------------------------------------------------------------------------


def recipe(world, **objective):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": {"type": "salt", **objective} if objective else "causal-lm",
        "budget": f"{STEPS}step",
        "evaluate": [],
    }


@pytest.fixture(scope="module")
def small(world):
    """A folder with a trained model of the run's tokenizer."""
    return str(world.train(recipe(world) | {"budget": "40step"}, seed=7).folder / "model")


@pytest.fixture
def home(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return tmp_path


def losses(run, name="loss"):
    return [line[name] for line in run.metrics() if name in line]


def model_after(world, data, home, steps):
    """Weights after this many steps, from a checkpoint of an unfinished run."""
    every_step = replace(OPTIONS, settings=replace(OPTIONS.settings, checkpoint_seconds=0.0))

    def stop(stage, progress):
        if progress.step == steps + 1:
            raise Stopped

    store = Store(home)
    with pytest.raises(Stopped):
        execute(parse_recipe(data), 0, store, every_step, on_step=stop)
    [record] = [r for r in store.list_runs() if r.status != "done"]
    found = checkpoint.newest(store.run_dir(record.digest) / "state")
    assert found.step == steps
    return load_file(found.folder / "model.safetensors")


@pytest.mark.parametrize("nothing", [{"until": 0.0}, {"until": "0step"}, {"weight": 0.0}])
def test_distilling_for_no_step_is_standard_training_bit_for_bit(world, small, nothing):
    run = world.train(recipe(world, teacher=small, **nothing))
    plain = world.train(recipe(world))
    assert run.weights() == plain.weights()
    assert losses(run) == losses(plain)
    assert run.ledger() == plain.ledger()


def test_up_to_the_switch_it_is_distilling_all_the_way_bit_for_bit(world, small, home):
    (home / "a").mkdir()
    (home / "b").mkdir()
    for name in ("a", "b"):
        (home / name / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    salt = model_after(world, recipe(world, teacher=small, until=0.5), home / "a", 4)
    rkd = model_after(world, recipe(world, teacher=small, until=1.0), home / "b", 4)
    assert all(torch.equal(salt[name], rkd[name]) for name in salt)


def test_the_teacher_is_billed_for_each_distilled_step_and_no_other(world, small):
    salt = world.train(recipe(world, teacher=small, until=0.5))
    rkd = world.train(recipe(world, teacher=small, until=1.0))
    plain = world.train(recipe(world))
    one = rkd.ledger()["teacher"]["flops"] / STEPS
    assert one > 0
    assert salt.ledger()["teacher"]["flops"] == pytest.approx(4 * one)
    assert salt.ledger()["train"]["flops"] == plain.ledger()["train"]["flops"]
    assert len(losses(salt, "kd")) == 4
    assert len(losses(salt, "ce")) == STEPS


def test_a_flop_budget_pays_for_the_teacher(world, small):
    plain = world.train(recipe(world)).ledger()["train"]["flops"]
    data = recipe(world, teacher=small, until=0.5) | {"budget": f"{plain * 3:.0f}flop"}
    run = world.train(data)
    spent = sum(e["flops"] for c, e in run.ledger().items() if c != "evaluation")
    assert len(losses(run)) < 3 * STEPS
    assert abs(spent - 3 * plain) <= spent / len(losses(run))


def test_the_measured_curve_is_plain_cross_entropy_while_distilling(world, small):
    run = world.train(recipe(world, teacher=small, until=1.0, weight=1.0))
    plain = world.train(recipe(world))
    assert losses(run, "held_out_loss")[0] == losses(plain, "held_out_loss")[0]


@pytest.mark.parametrize("after", [3, 6])
def test_an_adaptive_run_goes_on_to_the_same_bits(world, small, after):
    data = recipe(world, teacher=small, until="overtake", every=2, validation_rows=4)
    whole, resumed = world.train(data), world.train_with_a_kill(data, after)
    assert resumed.weights() == whole.weights()
    assert resumed.metrics() == whole.metrics()
    assert resumed.ledger() == whole.ledger()


def test_an_adaptive_run_bills_its_looks_and_stops_paying_when_it_switches(world, tmp_path):
    from transformers import AutoTokenizer

    trained = world.train(recipe(world))
    untrained = LlamaForCausalLM.from_pretrained(trained.folder / "model")
    with torch.no_grad():
        untrained.lm_head.weight.normal_(std=0.5)
    untrained.save_pretrained(tmp_path / "bad")
    AutoTokenizer.from_pretrained(trained.folder / "model").save_pretrained(tmp_path / "bad")
    options = {"teacher": str(tmp_path / "bad"), "every": 3, "validation_rows": 16}
    run = world.train(recipe(world, until="overtake", **options))
    fixed = world.train(recipe(world, until="4step", **options))
    assert len(losses(run, "kd")) == len(losses(fixed, "kd")) == 4  # steps 0 to 3; 3 looked
    look = {
        cause: run.ledger()[cause]["flops"] - fixed.ledger()[cause]["flops"]
        for cause in ("train", "teacher")
    }
    per_row = fixed.ledger()["teacher"]["flops"] / (4 * 32)  # 32 rows of 32 tokens a step
    assert look["teacher"] == pytest.approx(16 * per_row)
    assert look["train"] == pytest.approx(16 * per_row)  # a student of the same shape


def test_a_stage_of_the_recipe_teaches_and_its_training_is_a_helpers(world, small):
    data = recipe(world, teacher="small", until=0.5)
    stages = [
        {"name": "small", "objective": "causal-lm", "budget": "40step", "reseed": 1},
        {"name": "large"},
    ]
    run = world.train({**data, "stages": stages})
    folder = world.train(recipe(world, teacher=small, until=0.5))
    assert run.ledger()["teacher"] == folder.ledger()["teacher"]
    assert run.ledger()["helper"]["tokens"] == 40 * 32 * 32
    assert len(losses(run, "kd")) == 4


@pytest.mark.parametrize("nothing", [{"until": 0.0}, {"until": "0step"}, {"weight": 0.0}])
def test_a_teacher_that_distils_for_no_step_is_not_trained(world, nothing):
    data = recipe(world, teacher="small", **nothing)
    warm = {"name": "warm", "objective": "causal-lm"}
    small = {"name": "small", "objective": "causal-lm", "init": {"from": "warm"}}
    read = parse_recipe({**data, "stages": [warm, small, {"name": "large"}]})
    assert [stage.name for stage in read.stages] == ["large"]
    assert parse_recipe(read.spec()) == read
    run = world.train({**data, "stages": [warm, small, {"name": "large"}]})
    plain = world.train(recipe(world))
    assert run.ledger() == plain.ledger()
    with pytest.raises(BadInput, match="nothing uses the stage `idle`"):
        parse_recipe({**data, "stages": [{**warm, "name": "idle"}, {"name": "large"}]})


def test_a_teacher_larger_than_the_student_is_noted_in_the_record(world):
    larger = {"name": "small", "objective": "causal-lm", "size": "300k", "budget": "2step"}
    for size, noted in (("300k", True), ("nano", False)):
        data = recipe(world, teacher="small", until=1.0)
        run = world.train({**data, "stages": [{**larger, "size": size}, {"name": "large"}]})
        warnings = run.store.run(run.digest).metrics["warnings"]
        assert ("teacher larger than the student" in warnings) == noted
        if noted:
            assert "ordinary distillation" in warnings["teacher larger than the student"]


def test_label_smoothing_needs_no_teacher_and_costs_nothing(world):
    run = world.train(recipe(world, control="smoothing", weight=0.1, until=0.5))
    plain = world.train(recipe(world))
    assert run.ledger() == plain.ledger()
    first = next(line for line in run.metrics() if "kd" in line)
    assert first["loss"] == pytest.approx(0.9 * first["ce"] + 0.1 * first["kd"], rel=1e-6)
    assert run.weights() != plain.weights()


def test_more_distilled_steps_than_a_budget_in_steps_are_refused_when_it_is_read(world):
    data = recipe(world, teacher="./small", until="9step")
    with pytest.raises(BadInput, match="9step is more than the 8 steps") as caught:
        parse_recipe(data, where="my.yaml")
    assert (caught.value.where, caught.value.key) == ("my.yaml", "objective.until")
    assert parse_recipe(recipe(world, teacher="./small", until="8step"))


def test_more_distilled_steps_than_the_run_turns_out_to_have_cost_no_step(world, small, home):
    tokens = STEPS * 32 * 32
    data = recipe(world, teacher=small, until="9step") | {"budget": f"{tokens}tok"}
    with pytest.raises(BadInput, match="9step is more than the 8 steps"):
        execute(parse_recipe(data), 0, Store(home), OPTIONS)
    [record] = Store(home).list_runs()
    assert not (Store(home).run_dir(record.digest) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("workload", "options", "message"),
    [
        ({"vocabulary": 400}, {}, "another vocabulary"),
        ({"length": 64}, {}, "rows of at most 32 tokens, the run's hold 64"),
        ({}, {"top_k": 4000}, "at most the vocabulary"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(world, small, home, workload, options, message):
    data = recipe(world, teacher=small, **options)
    data["workload"] = world.workload("text/causal", **workload)
    with pytest.raises(BadInput, match=message):
        execute(parse_recipe(data), 0, Store(home), OPTIONS)


def test_a_teacher_that_is_not_there_is_refused(world, home):
    with pytest.raises(BadInput, match="cannot be loaded as a causal model"):
        execute(parse_recipe(recipe(world, teacher="no/such/place")), 0, Store(home), OPTIONS)
