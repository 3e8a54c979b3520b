"""Replaced-token detection against hand cases, closed forms and the Hugging Face losses."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from maquette.data.masking import choose_positions
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import BadInput
from maquette.methods.objectives.electra import (
    ReplacedTokenDetection,
    build_generator,
    copy_gate_loss,
    corrupt,
    detection_auc,
    detection_loss,
    entropy_floor,
    sample_replacements,
)
from maquette.methods.optim.adamw import AdamW
from maquette.parts import Clock, Ctx, Examples
from maquette.training.ledger import Ledger

LENGTH = 34


@pytest.fixture(scope="module")
def tokenizer():
    spec = TokenizerSpec(type="bpe", vocabulary=320, template="cls_sep")
    return train(spec, [f"some words to learn from {n}" for n in range(200)])


def config(V, dropout=0.0):
    return ElectraConfig(
        vocab_size=V,
        embedding_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


class Fixture:
    """An objective with its model, extra modules and one batch."""

    def __init__(self, tokenizer, rows=8, **options):
        torch.manual_seed(0)
        self.part = ReplacedTokenDetection(**options)
        head = ElectraForMaskedLM if self.part.head() == "masked-lm" else ElectraForPreTraining
        self.model = head(config(len(tokenizer)))
        self.ctx = Ctx(torch.device("cpu"), 0, None, Ledger(), tokenizer=tokenizer)
        self.extra = self.part.build(self.model, self.ctx)
        special = set(tokenizer.all_special_ids)
        ordinary = [i for i in range(len(tokenizer)) if i not in special]
        rng = np.random.default_rng(0)
        ids = rng.choice(ordinary, (rows, LENGTH - 2)).astype(np.int64)
        self.batch = self.part.collate(Examples(ids, np.zeros_like(ids)), self.ctx, rng)

    def loss(self, fraction=0.0, seed=0):
        clock = Clock(fraction=fraction, generator=torch.Generator().manual_seed(seed))
        return self.part.loss(self.model, self.extra, self.batch, clock)


# --- corruption ----------------------------------------------------------------------------------


def test_a_sample_that_hits_the_true_token_is_labelled_original():
    cls, sep = 1, 2
    ids = torch.tensor([[cls, 7, 8, 9, sep]])
    x, y = corrupt(
        ids, torch.tensor([[1, 3]]), torch.tensor([[True, True]]), torch.tensor([[7, 4]])
    )
    assert x.tolist() == [[cls, 7, 8, 4, sep]]
    assert y.tolist() == [[0, 0, 0, 1, 0]]


def test_unchosen_entries_that_point_at_the_first_position_change_nothing():
    ids = torch.tensor([[1, 7, 8, 9, 2]])
    x, y = corrupt(
        ids, torch.tensor([[2, 0]]), torch.tensor([[True, False]]), torch.tensor([[5, 6]])
    )
    assert x.tolist() == [[1, 7, 5, 9, 2]]
    assert y.tolist() == [[0, 0, 1, 0, 0]]


def test_replacements_go_into_the_original_text_so_no_mask_reaches_the_discriminator(tokenizer):
    f = Fixture(tokenizer)
    sampled = torch.full_like(f.batch["positions_BK"], 9)
    assert (f.batch["masked_BT"] == tokenizer.mask_token_id).any()
    x, _ = corrupt(f.batch["ids_BT"], f.batch["positions_BK"], f.batch["chosen_BK"], sampled)
    assert not (x == tokenizer.mask_token_id).any()


def test_specials_never_change_and_no_more_change_than_were_chosen(tokenizer):
    rng = np.random.default_rng(0)
    V = len(tokenizer)
    ids = rng.integers(0, V, (64, LENGTH)).astype(np.int64)
    special = np.isin(ids, list(tokenizer.all_special_ids))
    positions, chosen = choose_positions(~special, 5, rng)
    sampled = torch.from_numpy(rng.integers(0, V, positions.shape))
    t = torch.from_numpy(ids)
    x, y = corrupt(t, torch.from_numpy(positions), torch.from_numpy(chosen), sampled)
    assert (x == t)[torch.from_numpy(special)].all()
    assert (y.sum(1) <= torch.from_numpy(chosen).sum(1)).all()


def test_the_generator_sees_a_mask_at_85_percent_of_the_chosen_and_else_the_token(tokenizer):
    f = Fixture(tokenizer, rows=600)
    seen = f.batch["masked_BT"].gather(1, f.batch["positions_BK"])
    true = f.batch["ids_BT"].gather(1, f.batch["positions_BK"])
    masked = seen == tokenizer.mask_token_id
    assert binomtest(int(masked.sum()), masked.numel(), 0.85).pvalue > 1e-3
    assert (seen == true)[~masked].all()


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7])
    n = 20_000
    drawn = sample_replacements(
        logits.expand(1, n, 5),
        torch.zeros(1, n, dtype=torch.long),
        torch.Generator().manual_seed(0),
        temperature=temperature,
    )
    counts = np.bincount(drawn.flatten().numpy(), minlength=5)
    wanted = n * torch.softmax(logits.double() / temperature, -1).numpy()
    assert chisquare(counts, wanted).pvalue > 1e-3


def test_the_true_token_is_never_drawn_when_that_is_asked_for():
    n = 2000
    truth = torch.randint(0, 5, (1, n), generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(1, n, 5).scatter(-1, truth.unsqueeze(-1), 9.0)
    drawn = sample_replacements(
        logits, truth, torch.Generator().manual_seed(0), disallow_correct=True
    )
    assert not (drawn == truth).any()


def test_a_uniform_generator_replaces_p_times_one_minus_one_over_v(tokenizer):
    f = Fixture(tokenizer, rows=600, variant="uniform_generator")
    p = round(0.15 * LENGTH) / LENGTH
    rate = p * (1 - 1 / len(tokenizer))
    with torch.no_grad():
        found = float(f.loss().logs["replaced_fraction"])
    n = f.batch["ids_BT"].numel()
    assert binomtest(round(found * n), n, rate).pvalue > 1e-3


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "floor"), [(0.0, 0.4227), (0.25, 0.3517), (0.5, 0.2664), (0.65, 0.2058)]
)
def test_the_floor_is_the_entropy_of_the_replaced_fraction(accuracy, floor):
    f = torch.tensor(0.15 * (1 - accuracy), dtype=torch.float64)
    assert float(entropy_floor(f)) == pytest.approx(floor, abs=5e-5)


def test_an_untrained_detector_starts_at_ln_2_and_the_floor_is_a_constant_guess():
    labels = (torch.arange(100) < 15).long().unsqueeze(0)
    mask = torch.ones(1, 100, dtype=torch.bool)
    assert float(detection_loss(torch.zeros(1, 100), labels, mask)) == pytest.approx(math.log(2))
    guess = torch.full((1, 100), math.log(0.15 / 0.85))
    floor = float(entropy_floor(torch.tensor(0.15)))
    assert float(detection_loss(guess, labels, mask)) == pytest.approx(floor, rel=1e-5)


def test_the_detection_loss_is_that_of_hugging_face_with_padding(tokenizer):
    torch.manual_seed(0)
    model = ElectraForPreTraining(config(len(tokenizer))).eval()
    ids = torch.randint(5, len(tokenizer), (3, 12))
    labels = torch.randint(0, 2, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert float(detection_loss(theirs.logits, labels, mask.bool())) == pytest.approx(
        float(theirs.loss), rel=1e-5
    )


def test_the_generator_loss_is_that_of_hugging_face_with_ignored_labels_elsewhere(tokenizer):
    f = Fixture(tokenizer)
    labels = torch.full_like(f.batch["ids_BT"], -100)
    true = f.batch["ids_BT"].gather(1, f.batch["positions_BK"])
    labels.scatter_(1, f.batch["positions_BK"], true)
    with torch.no_grad():
        theirs = f.extra["generator"](input_ids=f.batch["masked_BT"], labels=labels).loss
        ours = f.loss().logs["generator_loss"]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_the_total_weighs_the_detector_fifty_times(tokenizer):
    f = Fixture(tokenizer)
    with torch.no_grad():
        loss = f.loss()
    wanted = loss.logs["generator_loss"] + 50 * loss.logs["detection_loss"]
    assert float(loss.total) == pytest.approx(float(wanted), rel=1e-6)


def test_labels_that_are_all_zero_give_a_finite_loss_and_gradient():
    logits = torch.zeros(2, 6, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    loss = detection_loss(logits, torch.zeros(2, 6), mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert float(detection_auc(logits.detach(), torch.zeros(2, 6), mask)) == 0.5
    assert float(detection_loss(logits.detach(), torch.zeros(2, 6), ~mask)) == 0.0


def test_the_auc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(2, 50)), rng.random((2, 50)) < 0.2
    ours = detection_auc(
        torch.from_numpy(scores),
        torch.from_numpy(labels).long(),
        torch.ones(2, 50, dtype=torch.bool),
    )
    assert float(ours) == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), rel=1e-5)


def test_the_copy_gate_mixes_a_copy_with_the_softmax():
    """p = c [x_corrupt = x] + (1 - c) softmax(logits)[x], at two positions by hand."""
    gate = torch.tensor([[math.log(3.0), 0.0]])  # c = 3/4, 1/2
    logits = torch.log(torch.tensor([[[0.2, 0.8], [0.4, 0.6]]]))
    ids, x = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    p = [0.75 + 0.25 * 0.2, 0.5 * 0.6]
    loss = copy_gate_loss(gate, logits, x, ids, torch.ones(1, 2, dtype=torch.bool))
    assert float(loss) == pytest.approx(-np.mean(np.log(p)), rel=1e-5)


# --- what learns from what -----------------------------------------------------------------------


def test_detection_reaches_the_shared_embeddings_and_nothing_else_of_the_generator(tokenizer):
    f = Fixture(tokenizer, gen_weight=0.0)
    f.loss().total.backward()
    shared = {id(p) for p in f.model.base_model.embeddings.parameters()}
    own = [p for p in f.extra["generator"].parameters() if id(p) not in shared]
    assert own
    assert all(p.grad is None or not p.grad.any() for p in own)
    assert f.model.base_model.embeddings.word_embeddings.weight.grad.any()


def test_the_generator_shares_the_embedding_modules_and_its_output_table(tokenizer):
    model = ElectraForPreTraining(config(len(tokenizer)))
    generator = build_generator(model, 0.5, None)
    assert generator.electra.embeddings is model.electra.embeddings
    assert generator.generator_lm_head.weight is model.electra.embeddings.word_embeddings.weight
    assert generator.config.hidden_size == 16
    assert generator.config.num_hidden_layers == 2


def test_without_the_generator_a_plain_checkpoint_is_left_that_loads_with_strict_keys(
    tokenizer, tmp_path
):
    f = Fixture(tokenizer)
    f.model.save_pretrained(tmp_path)
    body = ElectraModel.from_pretrained(tmp_path)
    body.load_state_dict(f.model.base_model.state_dict(), strict=True)
    ids = f.batch["ids_BT"]
    with torch.no_grad():
        theirs = body.eval()(input_ids=ids).last_hidden_state
        ours = f.model.eval().base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(theirs, ours)


def test_two_stages_copy_the_generator_once_and_then_leave_it_alone(tokenizer):
    f = Fixture(tokenizer, variant="two_stage")
    before = {n: v.clone() for n, v in f.model.base_model.state_dict().items()}
    f.loss(0.25).total.backward()
    own = f.model.base_model.encoder.parameters()
    assert all(p.grad is None for p in own)
    f.loss(0.5)
    generator = f.extra["generator"].base_model.state_dict()
    copied = f.model.base_model.state_dict()
    assert all(torch.equal(copied[n], generator[n]) for n in copied)
    assert any(not torch.equal(copied[n], before[n]) for n in copied)
    with torch.no_grad():
        f.model.base_model.encoder.layer[0].intermediate.dense.weight.add_(1.0)
    moved = f.model.base_model.encoder.layer[0].intermediate.dense.weight.clone()
    f.extra.zero_grad()
    f.loss(0.9).total.backward()
    after = f.model.base_model.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(after, moved)
    shared = {id(p) for p in f.model.parameters()}
    own = [p for p in f.extra["generator"].parameters() if id(p) not in shared]
    assert all(p.grad is None or not p.grad.any() for p in own)


@pytest.mark.parametrize(
    "variant", ["electra_15", "replace_mlm", "all_tokens_mlm", "mlm", "uniform_generator"]
)
def test_every_stepping_stone_has_a_finite_loss_that_trains_the_body(tokenizer, variant):
    f = Fixture(tokenizer, variant=variant)
    loss = f.loss()
    loss.total.backward()
    assert math.isfinite(float(loss.total.detach()))
    assert f.model.base_model.encoder.layer[0].intermediate.dense.weight.grad.any()


# --- refusals and diagnosis ----------------------------------------------------------------------


def test_a_body_that_is_not_electra_is_refused(tokenizer):
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    with pytest.raises(BadInput, match="llama"):
        ReplacedTokenDetection().build(llama, None)


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="[CLS]", sep_token="[SEP]"
    )
    ids = np.ones((1, 8), np.int64)
    ctx = Ctx(torch.device("cpu"), 0, None, Ledger(), tokenizer=bare)
    with pytest.raises(BadInput, match="mask"):
        ReplacedTokenDetection().collate(Examples(ids, ids), ctx, np.random.default_rng(0))


def test_a_detector_that_ends_at_a_constant_guess_is_reported():
    part = ReplacedTokenDetection()
    stuck = {"detection_loss": [0.7, 0.43], "detection_floor": [0.42, 0.42]}
    learned = {"detection_loss": [0.7, 0.30], "detection_floor": [0.42, 0.42]}
    assert "objective not engaged" in part.diagnose(stuck)
    assert part.diagnose(learned) == {}


def test_the_end_of_a_run_is_told_by_accuracy_auc_share_replaced_and_loss_beside_the_floor():
    tenth = {
        "generator_accuracy": 0.4, "replaced_fraction": 0.09, "detection_auc": 0.8,
        "detection_loss": 0.25, "detection_floor": 0.3,
    }  # fmt: skip
    logs = {name: [9.0] * 18 + [end - 0.1, end + 0.1] for name, end in tenth.items()}
    found = ReplacedTokenDetection().summary(logs | {"loss": [1.0] * 20})
    assert list(found) == [
        "generator accuracy", "replaced fraction f", "detector AUC", "detector loss",
        "detector loss of a constant guess, H(f)",
    ]  # fmt: skip
    assert list(found.values()) == pytest.approx(list(tenth.values()))


def test_a_floor_over_all_positions_is_not_told_beside_a_loss_at_some():
    logs = {"detection_loss": [0.4], "detection_floor": [0.3], "detection_auc": [0.7]}
    found = ReplacedTokenDetection(variant="electra_15").summary(logs)
    assert found == {"detector AUC": 0.7, "detector loss": 0.4}
    assert ReplacedTokenDetection(variant="mlm").summary({"masked_accuracy": [0.5]}) == {
        "masked accuracy": 0.5
    }
    assert ReplacedTokenDetection().summary({}) == {}


def test_an_embedding_is_in_the_optimiser_once(tokenizer):
    f = Fixture(tokenizer)
    groups = AdamW().groups(f.model, f.extra)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert isinstance(f.extra, nn.ModuleDict)
