"""Sampled continuations: top-k probabilities, and the cache of keys and values."""

from types import SimpleNamespace

import pytest
import torch

from maquette.evaluation.continuations import sample_continuations, top_k_sample
from tests.evaluation.risk_world import character_llama


@pytest.fixture(scope="module")
def model():
    return character_llama()


def test_a_sampled_token_follows_the_top_k_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(20_000, 1)
    drawn = top_k_sample(logits, 2, 1.0, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4) / 20_000
    assert counts[:2].tolist() == pytest.approx([0.625, 0.375], abs=0.015)
    assert counts[2:].tolist() == [0, 0]


def test_sampling_with_a_cache_equals_sampling_without(model):
    prompts = torch.tensor([[5, 6, 7], [9, 9, 9]])

    def draw(context):
        return sample_continuations(
            model, prompts, 12, context, torch.Generator().manual_seed(3), k=10
        )

    class NoCache(torch.nn.Module):
        def forward(self, input_ids, past_key_values, use_cache, return_dict):
            return SimpleNamespace(logits=model(input_ids).logits)

    bare = sample_continuations(NoCache(), prompts, 12, 32, torch.Generator().manual_seed(3), k=10)
    assert torch.equal(draw(32), bare)
    assert draw(32).shape == (2, 12)
    assert draw(8).shape == (2, 12)
