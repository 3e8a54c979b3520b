"""Causal attention in blocks against torch's own, against its mask and against finite
differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from maquette.training.causal_attention import BLOCK, causal_attention

LENGTHS = [1, 9, BLOCK, BLOCK + 1, 2 * BLOCK + 37]


def qkv(length, dtype=torch.float64, heads=3, width=8):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, heads, length, width, dtype=torch.float64, generator=generator)
        .to(dtype)
        .requires_grad_()
        for _ in "qkv"
    ]


def results(attend, inputs):
    """The output and the gradients of its sum of cubes, which differ from place to place."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out**3).sum(), inputs)]


def ours(q, k, v):
    return causal_attention(q, k, v, 0.3)


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_gradients_are_those_of_torchs_attention(length):
    inputs = qkv(length)
    for got, want in zip(results(ours, inputs), results(torchs, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_agree_with_finite_differences_across_blocks():
    inputs = [x.detach()[:1, :1, :, :1].requires_grad_() for x in qkv(BLOCK + 2)]
    assert torch.autograd.gradcheck(ours, inputs)


def test_no_query_sees_a_later_key():
    q, k, v = (x.detach() for x in qkv(BLOCK + 9))
    before = ours(q, k, v)
    k[:, :, BLOCK + 4 :] = 1e3
    v[:, :, BLOCK + 4 :] = 1e6
    after = ours(q, k, v)
    assert torch.equal(after[:, :, : BLOCK + 4], before[:, :, : BLOCK + 4])
    assert not torch.equal(after[:, :, BLOCK + 4 :], before[:, :, BLOCK + 4 :])


def test_bf16_is_as_close_to_the_truth_as_dense_attention_in_bf16_is():
    def dense(q, k, v):
        future = torch.full((q.shape[2],) * 2, float("-inf"), dtype=q.dtype).triu(1)
        return torch.softmax(torch.add(future, q @ k.mT, alpha=0.3), -1) @ v

    def errors(attend):
        truth = results(torchs, [x.detach().double().requires_grad_() for x in rounded])
        return [
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(results(attend, rounded), truth, strict=True)
        ]

    rounded = qkv(4 * BLOCK, torch.bfloat16, width=32)
    for blocks, whole in zip(errors(ours), errors(dense), strict=True):
        # Gradients of keys and values are rounded once per block, four times here.
        assert blocks < 1.2 * whole < 0.02


def test_inputs_need_not_be_laid_out_by_head():
    inputs = [x.detach().mT.contiguous().mT.requires_grad_() for x in qkv(BLOCK + 1)]
    assert not inputs[0].is_contiguous()
    for got, want in zip(results(ours, inputs), results(torchs, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_it_is_billed_as_full_products_like_every_other_attention():
    q, k, v = qkv(2 * BLOCK)
    with FlopCounterMode(display=False) as blocks:
        ours(q, k, v).sum().backward()
    with FlopCounterMode(display=False) as dense:
        (torch.softmax(q @ k.mT, -1) @ v).sum().backward()
    assert blocks.get_total_flops() == dense.get_total_flops() > 0


def test_without_gradients_nothing_is_kept():
    q, k, v = (x.detach() for x in qkv(9))
    assert not ours(q, k, v).requires_grad


def test_torchs_own_checks_of_an_operator_pass():
    _, k, v = (x.detach().float().requires_grad_() for x in qkv(11))
    q_CBHQD = torch.randn(3, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    inputs = (q_CBHQD.requires_grad_(), k, v, 0.3)
    torch.library.opcheck(torch.ops.maquette.causal_attention.default, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[:, :, 1:], "must have one shape"),
        (lambda q: q.float(), "must have one type"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match=message):
        causal_attention(change(q), k, v, 1.0)
