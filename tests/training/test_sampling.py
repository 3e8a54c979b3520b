"""Sampled documents against the distributions they are drawn from, in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.training.attention import use_fast_attention
from maquette.training.ensemble import LogitMean
from maquette.training.sampling import Writing, draw, sample_documents, until, write_documents

END = 0


def llama(seed, spread=1.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=spread,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Chain(nn.Module):
    """A language model of a Markov chain: p(next | last) is a row of a table."""

    def __init__(self, p_VV):
        super().__init__()
        self.logits_VV = torch.log(torch.tensor(p_VV))
        self.widths = []
        self.eval()

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        self.widths.append(input_ids.shape[1])
        return type("Out", (), {"logits": self.logits_VV[input_ids]})


class Uncached(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        assert past_key_values is None
        return type("Out", (), {"logits": self.model(input_ids).logits})


CHAIN = [[0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]
HOW = Writing(start=END, end=END, vocabulary=3, context=8, longest=200)


def test_tokens_follow_the_chain_they_are_drawn_from():
    found = sample_documents(Chain(CHAIN), 20_000, HOW, generator=rng())
    first = np.bincount([d[0] for d in found.documents], minlength=3)[1:]
    expected = np.array([0.6, 0.3]) / 0.9  # empty documents are left out
    assert stats.chisquare(first, expected * first.sum()).pvalue > 1e-3
    pairs = np.concatenate([np.stack([d[:-1], d[1:]]) for d in found.documents[:-1]], axis=1)
    for token in (1, 2):
        after = np.bincount(pairs[1][pairs[0] == token], minlength=3)[1:]
        p = np.array(CHAIN[token][1:])
        assert stats.chisquare(after, p / p.sum() * after.sum()).pvalue > 1e-3


def test_an_end_that_comes_at_a_constant_rate_makes_lengths_geometric():
    rate = 0.05
    chain = Chain([[rate, 1 - rate], [rate, 1 - rate]])
    how = Writing(END, END, 2, context=16, longest=2000)
    found = sample_documents(chain, 40_000, how, generator=rng(1))
    lengths = np.array([len(d) for d in found.documents[:-1]])
    se = lengths.std() / math.sqrt(len(lengths))
    assert abs(lengths.mean() - 1 / rate) < 4 * se  # of documents that are not empty
    share_empty = found.n_empty / (found.n_empty + len(found.documents))
    assert share_empty == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("n_tokens", [2, 3, 50, 501])
def test_as_many_tokens_are_written_as_were_asked_for(n_tokens):
    found = sample_documents(Chain(CHAIN), n_tokens, HOW, generator=rng(2))
    assert found.n_tokens == sum(len(d) + 1 for d in found.documents)
    assert n_tokens - 1 <= found.n_tokens <= n_tokens
    assert all(len(d) and END not in d for d in found.documents)


def test_a_model_never_reads_more_than_its_context_and_long_documents_go_on():
    endless = Chain([[1e-9, 1.0], [1e-9, 1.0]])
    how = Writing(END, END, 2, context=8, longest=50)
    found = sample_documents(endless, 153, how, generator=rng(), batch_size=2)
    assert max(endless.widths) <= 8
    assert [len(d) for d in found.documents] == [50, 50, 50]
    assert found.n_cut == 3


@pytest.mark.parametrize("context", [6, 64])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("fast", [False, True])
def test_the_cache_changes_nothing_but_the_work(context, members, fast):
    models = [llama(seed) for seed in range(members)]
    for model in models if fast else ():
        use_fast_attention(model, 64, torch.device("cpu"))
    model = LogitMean(models).eval() if members > 1 else models[0]
    how = Writing(END, END, 24, context, longest=20)
    cached = write_documents(model, 9, how, rng(5))
    plain = write_documents(Uncached(model), 9, how, rng(5))
    assert torch.equal(cached, plain)


def test_an_ensemble_reads_on_from_the_caches_of_its_members():
    model = LogitMean([llama(1), llama(2)]).eval()
    ids = torch.randint(1, 24, (3, 10), generator=rng())
    start = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)
    assert model(ids).past_key_values is None


def test_low_temperatures_take_the_likeliest_and_one_takes_the_softmax():
    logits = torch.tensor([[2.0, 0.0, 1.0]]).expand(6000, 3)
    assert set(draw(logits, 0.01, rng()).tolist()) == {0}
    counts = np.bincount(draw(logits, 1.0, rng(3)).numpy(), minlength=3)
    p = torch.softmax(logits[0].double(), 0).numpy()
    assert stats.chisquare(counts, p * 6000).pvalue > 1e-3


def test_ids_beyond_the_tokenizer_are_never_drawn():
    chain = Chain([[0.1, 0.1, 0.8]] * 3)
    how = Writing(END, END, 2, context=8, longest=30)
    found = sample_documents(chain, 300, how, generator=rng())
    assert set(np.concatenate(found.documents).tolist()) == {1}


def test_a_teacher_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        sample_documents(llama(0).train(), 10, HOW, generator=rng())


def test_a_teacher_that_writes_nothing_is_refused():
    mute = Chain([[1.0, 1e-12], [1.0, 1e-12]])
    how = Writing(END, END, 2, context=8, longest=10)
    with pytest.raises(ValueError, match="wrote nothing"):
        sample_documents(mute, 1000, how, generator=rng())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"context": 0}, "context"), ({"longest": 0}, "longest"), ({"temperature": 0.0}, "above 0"),
     ({"start": 3}, "below the vocabulary")],
)  # fmt: skip
def test_ways_of_writing_that_cannot_be_are_refused(wrong, says):
    right = {"start": 0, "end": 0, "vocabulary": 3, "context": 4, "longest": 4}
    with pytest.raises(ValueError, match=says):
        Writing(**(right | wrong))
    with pytest.raises(ValueError, match="at least 2"):
        sample_documents(Chain(CHAIN), 1, HOW, generator=rng())


def test_a_row_is_read_up_to_its_first_end_mark():
    assert until([5, 6, 0, 7, 0], 0).tolist() == [5, 6]
    assert until([5, 6], 0).tolist() == [5, 6]
