"""Logit means and soups against hand-computed numbers and convexity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.training.ensemble import LogitMean, soup


def llama(seed, vocabulary=40, **over):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, **over,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Fixed(nn.Module):
    """Gives the same two logits at every position."""

    def __init__(self, model, logits):
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, **unused):
        shape = (*input_ids.shape, 2)
        return type("Out", (), {"logits": self.logits.expand(shape)})


def test_the_mean_of_binary_logits_is_the_hand_computed_one_and_not_the_mean_of_probabilities():
    model = llama(0)
    both = LogitMean([Fixed(model, [2.0, 0.0]).eval(), Fixed(model, [0.0, 0.0]).eval()])
    p = both(torch.zeros(1, 1, dtype=torch.long)).logits.softmax(-1)[0, 0, 0]
    assert float(p) == pytest.approx(0.7311, abs=1e-4)  # the other mean would be .6904


def test_identical_members_are_one_member():
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    one = llama(3)
    both = LogitMean([llama(3), llama(3)])
    assert torch.equal(both(ids).logits, one(ids).logits.float())


@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(0.1, 30))
def test_the_loss_of_the_mean_is_at_most_the_mean_of_the_losses(seed, k, spread):
    rng = torch.Generator().manual_seed(seed)
    logits_KNV = torch.randn(k, 7, 5, generator=rng, dtype=torch.float64) * spread
    labels_N = torch.randint(0, 5, (7,), generator=rng)
    cross = nn.functional.cross_entropy
    mean = sum(cross(member, labels_N) for member in logits_KNV) / k
    assert float(cross(logits_KNV.mean(0), labels_N)) <= float(mean) + 1e-9


def test_an_ensemble_generates_what_its_logits_say():
    both = LogitMean([llama(1), llama(2)])
    ids = torch.tensor([[1, 5, 7]])
    out = both.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for at in range(3, out.shape[1]):
        assert int(out[0, at]) == int(both(out[:, :at]).logits[0, -1].argmax())


def test_no_member_is_trained():
    assert not any(p.requires_grad for p in LogitMean([llama(0), llama(1)]).parameters())


def test_members_of_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="different vocabularies: 40, 41"):
        LogitMean([llama(0), llama(1, vocabulary=41)])
    with pytest.raises(ValueError, match="at least one"):
        LogitMean([])


def test_a_member_in_training_mode_is_refused_by_its_number():
    with pytest.raises(ValueError, match=r"member 1 is in training mode; call `\.eval\(\)`"):
        LogitMean([llama(0), llama(1).train()])


def test_a_soup_is_the_mean_of_every_weight():
    weights = [llama(seed).state_dict() for seed in (1, 2, 3)]
    mixed = soup([llama(seed) for seed in (1, 2, 3)]).state_dict()
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, sum(w[name] for w in weights) / 3)


def test_a_soup_of_different_shapes_names_the_weight():
    with pytest.raises(ValueError, match=r"model 1 differs from model 0 in `model\."):
        soup([llama(0), llama(0, head_dim=4)])
    with pytest.raises(ValueError, match=r"`b` differs from `a` in `model\."):
        soup([llama(0), llama(0, head_dim=4)], ["`a`", "`b`"])
