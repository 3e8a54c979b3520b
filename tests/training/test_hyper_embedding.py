"""The hyper-embedding: pass-through, permutation, padding, rescaling, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maquette.training.hyper_embedding import HyperConfig, HyperEmbedding, ResidualMLP
from maquette.training.hypernet_cost import count_hypernet
from maquette.training.ledger import FlopCounter

PAD = 0


def table(n: int = 40, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def forms(n: int = 60, m: int = 5, vocabulary: int = 40) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (n, m), generator=rng)
    length = torch.randint(1, m + 1, (n,), generator=rng)
    ids[torch.arange(m) >= length[:, None]] = PAD
    return ids


def network(**given) -> HyperEmbedding:
    options = {"width": 16, "pad_id": PAD, "max_pieces": 5, "layers": 2, "heads": 4, **given}
    return HyperEmbedding(HyperConfig(**options), seed=3)


@pytest.mark.parametrize("separate", [False, True])
def test_with_silent_branches_the_source_rows_pass_through(separate):
    width, read = 16, 32 if separate else 16
    source = nn.functional.layer_norm(table(40, read), (read,))
    net = network(separate_output=separate, hidden=read)
    with torch.no_grad():
        nn.init.eye_(net.project.weight)
        net.positions.zero_()
        for module in net.modules():
            if isinstance(module, ResidualMLP):
                module.second.weight.zero_()
        for layer in net.layers:
            layer.out.weight.zero_()
            layer.second.weight.zero_()
        for offset, head in enumerate(net.heads.values()):
            head[1].weight.copy_(torch.eye(read)[offset * width : (offset + 1) * width])
        found = net(source, torch.arange(40)[:, None])
    torch.testing.assert_close(found.input_ND, source[:, :width], atol=2e-4, rtol=0)
    if separate:
        torch.testing.assert_close(found.output_ND, source[:, width:], atol=2e-4, rtol=0)


def test_permuting_the_tokens_permutes_the_predictions():
    net, source, ids = network(), table(), forms()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net(source, ids).input_ND[order], net(source, ids[order]).input_ND)


def test_more_padding_changes_no_prediction():
    net, source, ids = network(max_pieces=5), table(), forms(m=3)
    wide = torch.nn.functional.pad(ids, (0, 2), value=PAD)
    torch.testing.assert_close(net(source, ids).input_ND, net(source, wide).input_ND)


def test_working_by_length_is_attending_under_a_mask():
    # The same layers, once more, with all tokens padded to one length and the padding masked.
    net, source, ids = network(), table(), forms()
    seen = ids != PAD
    x = net.block(net.project(net.rescale_in(source[ids]))) + net.positions
    for layer in net.layers:
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (layer.query(x), layer.key(x), layer.value(x))
        )
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~seen[:, None, None], -torch.inf)
        x = layer.norm_attention(x + layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = layer.norm(x + layer.second(nn.functional.gelu(layer.first(x))))
    wanted = net.rescale_out["input"](net.heads["input"](x[:, 0]))
    torch.testing.assert_close(net(source, ids).input_ND, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_calibration_gives_both_sides_the_source_mean_and_spread_and_is_not_trained(separate):
    source = table(40, 32 if separate else 16) * 3 + 1
    source[:, 5] = 0.25  # a dimension without spread
    net = network(separate_output=separate)
    net.calibrate(source)
    read = net.rescale_in(source)
    torch.testing.assert_close(read.mean(0), torch.zeros(read.shape[1]), atol=1e-5, rtol=0)
    spread = read.std(0, correction=0)
    assert spread[5] == 0
    torch.testing.assert_close(spread[6:], torch.ones(len(spread) - 6), atol=1e-5, rtol=0)
    found = net(source, torch.arange(40)[:, None])
    for rows, own in zip((found.input_ND, found.output_ND), source.split(16, dim=1), strict=False):
        torch.testing.assert_close(rows.mean(0), own.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            rows.std(0, correction=0), own.std(0, correction=0), atol=1e-4, rtol=1e-4
        )
    assert torch.isfinite(found.input_ND).all()
    assert not any("rescale" in name for name, _ in net.named_parameters())
    assert any("rescale" in name for name in net.state_dict())


def test_order_of_pieces_and_language_matter_and_each_token_sees_itself_alone():
    net, source = network(languages=2), table()
    ids = torch.tensor([[3, 4], [4, 3], [3, 4]])
    rows = net(source, ids, 0).input_ND
    assert not torch.allclose(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2])
    assert not torch.allclose(rows, net(source, ids, 1).input_ND)
    with pytest.raises(ValueError, match="language is None, but the network has 2"):
        net(source, ids)


def test_a_bias_is_predicted_on_demand():
    assert network()(table(), forms()).bias_N is None
    bias = network(bias=True)(table(), forms()).bias_N
    assert bias is not None and bias.shape == (60,)


@pytest.mark.parametrize("options", [{}, {"separate_output": True, "bias": True}])
def test_the_cost_by_pieces_is_that_of_a_counted_pass(options):
    net, ids = network(**options), forms()
    source = table(40, net.config.read_width)
    with FlopCounter() as counter:
        found = net(source, ids)
        sides = (found.input_ND, found.output_ND, found.bias_N)
        torch.stack([x.sum() for x in sides if x is not None]).sum().backward()
    assert count_hypernet(net, source).of(ids.numpy()) == counter.total
    assert count_hypernet(net, source).of(ids.numpy()[:1]) < counter.total / 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_pieces": 0}, "max_pieces must be at least 1"),
        ({"heads": 3}, "hidden must be divisible by heads, got 16 and 3"),
        ({"hidden": 10, "heads": 4}, "got 10 and 4"),
        ({"pad_id": -1}, "pad_id and languages must be >= 0"),
    ],
)
def test_bad_shapes_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        network(**given)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"source rows must be 32 wide \(input and output\)"):
        network(separate_output=True)(table(), forms())
    with pytest.raises(ValueError, match=r"surface forms must be \(N, 1 to 5\)"):
        network()(table(), forms(m=6))
    with pytest.raises(ValueError, match="language is 1, but the network has 0"):
        network()(table(), forms(), 1)
