"""The fused mixture loss against the plain formula, by hand and by finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from maquette.training.fused_distillation import linear_mixture_loss, soft_targets

LN2 = math.log(2)


def problem(n=37, d=8, v=19, e=5, u=19, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, dtype=dtype, generator=rng).requires_grad_()
    weight = torch.randn(v, d, dtype=dtype, generator=rng).requires_grad_()
    bias = torch.randn(v, dtype=dtype, generator=rng).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=rng)
    labels[::5] = -100
    teacher = torch.nn.Linear(e, u, dtype=dtype)
    with torch.no_grad():
        teacher.weight.copy_(torch.randn(u, e, dtype=dtype, generator=rng))
    states = torch.randn(n, e, dtype=dtype, generator=rng)
    return hidden, weight, bias, labels, states, teacher


def plain(logits, labels, teacher_logits, w, rho):
    """The formula as it is written, on all logits at once."""
    live = labels != -100
    log_p = torch.log_softmax(logits[live], -1)
    q = torch.softmax(teacher_logits[live] / rho, -1)
    kd = -(q * log_p[:, : q.shape[1]]).sum(-1).mean()
    return (1 - w) * F.cross_entropy(logits[live], labels[live]) + w * kd


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
@pytest.mark.parametrize(("w", "rho"), [(0.0, 1.0), (0.667, 0.25), (0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_loss_and_gradients_are_those_of_the_plain_formula(chunk, w, rho, dtype, tolerance):
    hidden, weight, bias, labels, states, teacher = problem(dtype=dtype)
    found = linear_mixture_loss(
        hidden, weight, labels, states, head=teacher, share=w, temperature=rho, bias=bias,
        chunk=chunk,
    )  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    expected = plain(logits, labels, teacher(states).detach(), w, rho)
    assert int(found.count) == int((labels != -100).sum())
    torch.testing.assert_close(found.total, expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(
        torch.autograd.grad(found.total * 3, (hidden, weight, bias)),
        torch.autograd.grad(expected * 3, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, labels, states, teacher = problem(n=6, d=3, v=4, u=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            linear_mixture_loss(
                h, w, labels, states, head=teacher, share=0.6, temperature=0.5, bias=b, chunk=2
            ).total
        ),
        (hidden, weight, bias),
    )


def two_ids(teacher=(0.8, 0.2), **options):
    """Student (.5, .5), right token 0: (loss, gradient on the logits), V = 2."""
    hidden = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(2, dtype=torch.float64)
    logits = torch.tensor([teacher], dtype=torch.float64).log()
    found = linear_mixture_loss(hidden, eye, torch.tensor([0]), logits, **options)
    return found, torch.autograd.grad(found.total, hidden)[0][0].tolist()


def test_the_case_worked_out_by_hand():
    found, gradient = two_ids(share=0.5, temperature=1.0)
    assert found.total.item() == pytest.approx(LN2)
    assert gradient == pytest.approx([-0.4, 0.4])
    assert float(found.ce) == pytest.approx(LN2)
    assert float(found.kd) == pytest.approx(LN2)
    assert float(found.teacher_ce) == pytest.approx(-math.log(0.8))


@pytest.mark.parametrize(("rho", "q"), [(1.0, 0.8), (0.5, 0.9412), (0.25, 0.9961)])
def test_a_temperature_below_one_sharpens_the_teacher_alone(rho, q):
    assert soft_targets(torch.tensor([0.8, 0.2]).log(), rho)[0] == pytest.approx(q, abs=5e-5)
    # No factor rho^2 and no temperature on the student: gradient p - q.
    _, gradient = two_ids(share=1.0, temperature=rho)
    assert gradient == pytest.approx([0.5 - q, q - 0.5], abs=5e-5)


def test_a_teacher_that_is_the_student_gives_no_gradient_at_temperature_one():
    hidden, weight, bias, labels, _, _ = problem()
    logits = F.linear(hidden, weight, bias).detach()
    found = linear_mixture_loss(hidden, weight, labels, logits, share=1.0, bias=bias, chunk=8)
    assert torch.autograd.grad(found.total, hidden)[0].abs().max() < 1e-15


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_a_teacher_sure_of_the_right_token_gives_the_cross_entropy_whatever_w(w):
    hidden, weight, _, labels, _, _ = problem()
    sure = F.one_hot(labels.clamp(min=0), 19).double() * 1e4
    found = linear_mixture_loss(hidden, weight, labels, sure, share=w)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)


def test_a_constant_on_the_teachers_logits_changes_nothing():
    hidden, weight, _, labels, states, teacher = problem()
    logits = teacher(states).detach()
    a, b = (
        linear_mixture_loss(hidden, weight, labels, z, share=0.7, temperature=0.5)
        for z in (logits, logits + 13.0)
    )
    torch.testing.assert_close(a.total, b.total, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(a.teacher_ce, b.teacher_ce, rtol=1e-13, atol=1e-13)


def test_masked_positions_count_in_neither_part():
    hidden, weight, _, labels, states, teacher = problem()
    live = labels != -100
    args = {"head": teacher, "share": 0.6}
    whole = linear_mixture_loss(hidden, weight, labels, states, **args)
    only = linear_mixture_loss(hidden[live], weight, labels[live], states[live], **args)
    for name in ("total", "ce", "kd", "teacher_ce", "count"):
        torch.testing.assert_close(getattr(whole, name), getattr(only, name))
    gradient = torch.autograd.grad(whole.total, hidden)[0]
    assert gradient[~live].abs().max() == 0


def test_a_padded_teacher_leaks_no_mass_to_ids_that_do_not_exist():
    hidden, weight, _, labels, states, teacher = problem(u=24)
    logits = teacher(states).detach()
    logits[:, 19:] = 50.0  # the padding would take all the mass
    found = linear_mixture_loss(hidden, weight, labels, logits, share=1.0, vocabulary=19)
    expected = plain(hidden @ weight.T, labels, logits[:, :19], 1.0, 1.0)
    torch.testing.assert_close(found.total, expected)


def test_a_padded_student_keeps_its_whole_softmax_and_gets_no_targets_in_the_padding():
    hidden, weight, _, labels, states, teacher = problem(v=24, u=19)
    labels = labels.clamp(max=18)
    found = linear_mixture_loss(
        hidden, weight, labels, states, head=teacher, share=0.5, vocabulary=19
    )
    expected = plain(hidden @ weight.T, labels, teacher(states).detach(), 0.5, 1.0)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, weight), torch.autograd.grad(expected, weight)
    )


def test_top_k_keeps_the_most_probable_ids_and_renormalises_them():
    q = soft_targets(torch.tensor([0.5, 0.1, 0.3, 0.1]).log(), top_k=2)
    assert q.tolist() == pytest.approx([0.625, 0.0, 0.375, 0.0])
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_targets(logits, 0.5, top_k=9), soft_targets(logits, 0.5))


def test_without_a_teacher_it_is_torchs_label_smoothing():
    hidden, weight, bias, labels, _, _ = problem()
    found = linear_mixture_loss(hidden, weight, labels, None, share=0.1, bias=bias, chunk=8)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, bias), torch.autograd.grad(expected, bias)
    )
    assert float(found.teacher_ce) == pytest.approx(math.log(19))


def test_softmaxes_are_taken_in_full_precision_under_autocast():
    hidden, weight, bias, labels, states, teacher = problem(300, 32, 50, 16, 50, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_mixture_loss(
            hidden, weight, labels, states, head=teacher, share=0.6, temperature=0.25, bias=bias,
            chunk=64,
        )  # fmt: skip
        logits, low = F.linear(hidden, weight, bias), teacher(states).detach()
    assert low.dtype == torch.bfloat16
    assert found.total.dtype == torch.float32
    expected = plain(logits.float(), labels, low.float(), 0.6, 0.25)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(found.total, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        # bf16 keeps 8 bits: each summand is rounded by up to 2^-9 of itself.
        assert (got - want).norm() <= 2**-7 * want.norm()


def test_no_tensor_of_all_logits_is_made():
    """The largest tensor that any operation gives holds a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
            return out

    hidden, weight, _, labels, states, teacher = problem(n=512, v=64, u=64)
    with Largest() as largest:
        linear_mixture_loss(
            hidden, weight, labels, states, head=teacher, share=0.5, chunk=8
        ).total.backward()
    assert largest.numel == 512 * 8  # the hidden states; all logits would be 512 * 64


def test_it_counts_the_flops_of_the_students_head_and_of_the_teachers_forward_head():
    from maquette.training.ledger import FlopCounter

    hidden, weight, _, labels, states, teacher = problem(n=40)
    with FlopCounter({"teacher": teacher}) as counter:
        linear_mixture_loss(
            hidden, weight, labels, states, head=teacher, share=0.5, chunk=16
        ).total.backward()
    assert counter.of("teacher") == 2 * 40 * 5 * 19
    assert counter.total - counter.of("teacher") == 3 * 2 * 40 * 8 * 19


def test_without_gradients_only_the_forward_pass_is_made():
    from maquette.training.ledger import FlopCounter

    hidden, weight, _, labels, states, teacher = problem(n=40)
    with torch.no_grad(), FlopCounter({"teacher": teacher}) as counter:
        linear_mixture_loss(hidden.detach(), weight, labels, states, head=teacher, share=0.5)
    assert counter.total - counter.of("teacher") == 2 * 40 * 8 * 19


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"top_k": 6}, r"top_k must be in \[1, 5\] \(the vocabulary\), got 6"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"vocabulary": 9}, r"vocabulary must be in \[1, V = 5\], got 9"),
        ({"teacher_NE": torch.zeros(2, 7)}, "7 logits for 5 ids; both models must share one"),
        ({"teacher_NE": torch.zeros(3, 5)}, r"teacher must be \(N, E\), N = 2"),
        ({"labels_N": torch.full((2,), -100)}, "every position of the batch is masked"),
        ({"teacher_NE": torch.full((2, 5), math.nan)}, "teacher's logits must be finite"),
        ({"teacher_NE": torch.full((2, 5), -math.inf)}, "teacher's logits must be finite"),
        ({"weight_VD": torch.zeros(5, 7)}, r"\(N, D\) and \(V, D\)"),
        ({"labels_N": torch.zeros(9, dtype=torch.long)}, r"labels must be \(N,\) = \(2,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(V,\) = \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "hidden_ND": torch.zeros(2, 4),
        "weight_VD": torch.zeros(5, 4),
        "labels_N": torch.zeros(2, dtype=torch.long),
        "teacher_NE": torch.zeros(2, 5),
        "share": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        linear_mixture_loss(**{**given, **change})
