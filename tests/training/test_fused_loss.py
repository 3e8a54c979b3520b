import pytest
import torch
import torch.nn.functional as F

from maquette.training.fused_loss import default_chunk, linear_cross_entropy
from maquette.training.ledger import FlopCounter


def problem(n=37, d=8, v=19, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, dtype=dtype, generator=rng).requires_grad_()
    weight = torch.randn(v, d, dtype=dtype, generator=rng).requires_grad_()
    bias = torch.randn(v, dtype=dtype, generator=rng).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=rng)
    labels[::5] = -100
    return hidden, weight, bias, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_cross_entropy(chunk, reduction, dtype, tolerance):
    hidden, weight, bias, labels = problem(dtype=dtype)
    loss, count = linear_cross_entropy(
        hidden, weight, labels, bias, chunk=chunk, reduction=reduction
    )
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
    assert int(count) == int((labels != -100).sum())
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(
        gradients(loss * 3, hidden, weight, bias),
        gradients(expected * 3, hidden, weight, bias),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, labels = problem(n=5, d=3, v=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b, chunk=2)[0], (hidden, weight, bias)
    )


def test_a_label_of_probability_below_the_smallest_float_has_a_finite_loss():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [0.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == 500.0
    assert gradients(loss, hidden)[0].item() == 500.0


def test_another_ignored_label_is_left_out_of_loss_and_gradient():
    hidden, weight, _, labels = problem()
    labels = labels.clamp(min=0)
    loss, count = linear_cross_entropy(hidden, weight, labels, ignore_index=0)
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=0)
    torch.testing.assert_close(loss, expected)
    assert int(count) == int((labels != 0).sum())
    assert torch.equal(
        gradients(loss, hidden)[0][labels == 0], torch.zeros(int((labels == 0).sum()), 8).double()
    )


def test_a_mean_over_no_rows_is_zero_with_zero_gradient():
    hidden, weight, bias, labels = problem()
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    assert loss.item() == 0.0
    assert int(count) == 0
    assert all(g.abs().max() == 0 for g in gradients(loss, hidden, weight, bias))


def test_weights_shared_with_the_embedding_get_both_gradients():
    _, weight, _, labels = problem()
    ids = labels.clamp(min=0)
    loss, _ = linear_cross_entropy(F.embedding(ids, weight), weight, labels, chunk=8)
    expected = F.cross_entropy(F.embedding(ids, weight) @ weight.T, labels)
    torch.testing.assert_close(gradients(loss, weight), gradients(expected, weight))


def test_only_the_gradients_asked_for_are_made():
    hidden, weight, bias, labels = problem()
    loss, _ = linear_cross_entropy(hidden, weight.detach(), labels, bias.detach(), chunk=8)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    torch.testing.assert_close(gradients(loss, hidden), gradients(expected, hidden))
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels)[0].requires_grad


def test_under_autocast_it_rounds_as_autocast_with_full_precision_softmax_does():
    hidden, weight, bias, labels = problem(n=300, d=32, v=50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels, bias, chunk=64)
        logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits.float(), labels)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(
        gradients(loss, hidden, weight, bias),
        gradients(expected, hidden, weight, bias),
        strict=True,
    ):
        assert got.dtype == torch.float32
        # bf16 keeps 8 bits: each summand is rounded by up to 2^-9 of itself.
        assert (got - want).norm() <= 2**-7 * want.norm()


def test_it_counts_as_many_flops_as_the_plain_head():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, _, labels = problem(n=40)
    with FlopCounterMode(display=False) as chunked:
        linear_cross_entropy(hidden, weight, labels, chunk=16)[0].backward()
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(hidden @ weight.T, labels).backward()
    assert chunked.get_total_flops() == plain.get_total_flops() == 3 * 2 * 40 * 8 * 19


def test_a_chunk_never_has_fewer_rows_than_a_matrix_product_needs():
    assert default_chunk(4096) == 256
    assert default_chunk(512) == 2048
    assert default_chunk(250_000) == 256
    assert default_chunk(4096, "cuda") == 32768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(2, 3, 4)}, r"\(N, D\) and \(V, D\)"),
        ({"weight_VD": torch.zeros(5, 7)}, r"\(N, D\) and \(V, D\)"),
        ({"labels_N": torch.zeros(9, dtype=torch.long)}, r"labels must be \(N,\) = \(2,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(V,\) = \(5,\)"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "hidden_ND": torch.zeros(2, 4),
        "weight_VD": torch.zeros(5, 4),
        "labels_N": torch.zeros(2, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **change})


def test_without_gradients_only_the_logits_are_computed():
    hidden, labels = torch.randn(40, 8), torch.randint(0, 30, (40,))
    weight, bias = torch.randn(30, 8, requires_grad=True), torch.zeros(30, requires_grad=True)
    with FlopCounter() as counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, bias)
    assert counter.total == 2 * 40 * 30 * 8
