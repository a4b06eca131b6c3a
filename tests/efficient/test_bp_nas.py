"""Barrier-penalty search: the quantiser, cost, barrier, Prob-1, certificate and repair, the layer."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from affnb.efficient import (
    MixedPrecisionConv2d,
    argmax_feasible_bound,
    average_bits,
    barrier_penalty,
    expected_average_bits,
    feasible_choice,
    feasible_init,
    prob1,
    reshape_clip,
    uniform_quantize,
)
from tests.chapter_cells import fake_modules, run_cells

DOUBLE = torch.float64
CIFAR = [(2, 3), (2, 4), (3, 3), (3, 4), (4, 4), (4, 6), (6, 4), (8, 4)]
IMAGENET = [(2, 4), (3, 3), (3, 4), (4, 3), (4, 4), (4, 6), (6, 4)]
COCO = [(2, 4), (3, 3), (3, 4), (3, 5), (4, 4), (4, 6), (6, 4), (4, 8)]
SIDES = st.sampled_from([1, 2, 3, 5, 7])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def strided(x):
    """The same values, not contiguous."""
    return x.repeat_interleave(2, -1)[..., ::2]


def products_of(candidates, layers):
    return torch.tensor(candidates).prod(-1).expand(layers, -1)


@st.composite
def rows(draw):
    """Architecture parameters, shares of operations and products of N layers with m candidates."""
    layers, m = draw(SIDES), draw(st.sampled_from([1, 2, 3, 8]))
    generator = seeded(draw(st.integers(0, 2**31)))
    theta = 3 * torch.randn(layers, m, generator=generator, dtype=DOUBLE)
    flops = torch.randint(1, 10_000, (layers,), generator=generator)
    products = torch.randint(4, 65, (layers, m), generator=generator)
    return theta, flops, products, generator


# --------------------------------------------------------------------------------------------------
# The quantiser
# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 3, 5)]),
    st.sampled_from([1, 2, 3, 5, 8]),
    st.booleans(),
    st.sampled_from(["lsq", "pact"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_quantizer_equals_the_table_of_levels(shape, bits, signed, grad, channels, seed):
    bits = max(bits, 2) if signed else bits
    generator = seeded(seed)
    x = strided(2 * torch.randn((*shape, 2), generator=generator, dtype=DOUBLE))[..., 0]
    alpha = 0.5 + torch.rand((), generator=generator, dtype=DOUBLE)
    if channels and shape:
        alpha = alpha + torch.rand(shape[-1:], generator=generator, dtype=DOUBLE)
    weights = torch.randn(shape, generator=generator, dtype=DOUBLE)
    found = []
    for backend in ("auto", "reference"):
        leaves = [x.detach().clone().requires_grad_(), alpha.clone().requires_grad_()]
        q = uniform_quantize(leaves[0], leaves[1], bits, signed, grad, backend=backend)
        assert q.dtype == DOUBLE
        assert q.shape == x.shape
        found.append((q.detach(), *torch.autograd.grad((q * weights).sum(), leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_are_those_of_the_text(signed):
    alpha = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    values = [-9.0, -1.5, -1.0, -0.2, 0.0, 0.3, 1.1, 1.4999, 1.5, 1.6, math.inf]
    for value, grad in itertools.product(values, ("lsq", "pact")):
        x = torch.tensor([value], dtype=DOUBLE, requires_grad=True)
        q = uniform_quantize(x, alpha, 3, signed, grad)
        dx, da = torch.autograd.grad(q.sum(), (x, alpha))
        inside = abs(value) < 1.5 if signed else 0 < value < 1.5
        clipped = math.copysign(1, value) if signed else float(value >= 1.5)
        expected = clipped if not inside else (q.item() - value) / 1.5 if grad == "lsq" else 0.0
        assert dx.item() == float(inside)
        assert da.item() == pytest.approx(expected, abs=1e-12)


def test_levels_and_ties():
    x = torch.linspace(-3, 3, 10_001, dtype=DOUBLE)
    for bits in (2, 3, 4, 8):
        levels = uniform_quantize(x, 1.7, bits, True).unique()
        assert len(levels) == 2**bits - 1
        torch.testing.assert_close(levels, -levels.flip(0))
        torch.testing.assert_close(
            levels.diff(), torch.full_like(levels[1:], 1.7 / (2 ** (bits - 1) - 1))
        )
        assert len(uniform_quantize(x, 1.7, bits, False).unique()) == 2**bits
    assert uniform_quantize(x, 1.7, 1, False).unique().tolist() == [0.0, 1.7]
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=DOUBLE)
    for backend in ("auto", "reference"):  # a tie goes to the even code
        got = uniform_quantize(ties, 3.0, 3, True, backend=backend)
        assert got.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("signed", [True, False])
def test_fake_quantize_of_pytorch_agrees(signed):
    x = 2 * torch.randn(5000, generator=seeded())
    for bits in (2, 3, 4, 8):
        n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        peer = torch.fake_quantize_per_tensor_affine(x, 1.3 / n, 0, -n if signed else 0, n)
        torch.testing.assert_close(uniform_quantize(x, 1.3, bits, signed), peer)
        leaf = x.clone().requires_grad_()
        torch.fake_quantize_per_tensor_affine(
            leaf, 1.3 / n, 0, -n if signed else 0, n
        ).sum().backward()
        ours = x.clone().requires_grad_()
        uniform_quantize(ours, 1.3, bits, signed).sum().backward()
        # PyTorch's range ends half a step further out, where the code is still the last one.
        away = (x.abs() - 1.3).abs() > 1.3 / n
        away &= (x.abs() > 1.3 / n) | torch.tensor(signed)
        torch.testing.assert_close(ours.grad[away], leaf.grad[away])


def test_learned_step_size_of_pytorch_agrees():
    """PyTorch's learnable fake quantisation learns the step; ours learns n times it."""
    x = torch.randn(4000, generator=seeded())
    x = x[(x.abs() - 1.0).abs() > 0.2]  # away from the two conventions at the ends
    n, alpha = 7, torch.tensor([1.0], requires_grad=True)
    uniform_quantize(x, alpha, 4, True).sum().backward()
    step = torch.tensor([1.0 / n], requires_grad=True)
    zero = torch.zeros(1)
    torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, -n, n, 1.0).sum().backward()
    torch.testing.assert_close(alpha.grad * n, step.grad, rtol=1e-4, atol=1e-3)


def test_error_of_a_uniform_law_is_a_twelfth_of_the_squared_step():
    x = torch.linspace(-1, 1, 2_000_001, dtype=DOUBLE)
    for bits in (2, 3, 4, 8):
        n = 2 ** (bits - 1) - 1
        error = (uniform_quantize(x, 1.0, bits, True) - x).square().mean()
        assert error.item() == pytest.approx(1 / n**2 / 12, rel=1e-4)


def test_quantizer_scales_and_is_idempotent():
    x = torch.randn(500, generator=seeded(), dtype=DOUBLE)
    q = uniform_quantize(x, 1.1, 4, True)
    torch.testing.assert_close(uniform_quantize(q, 1.1, 4, True), q)
    torch.testing.assert_close(uniform_quantize(-x, 1.1, 4, True), -q)
    torch.testing.assert_close(uniform_quantize(3 * x, 3.3, 4, True), 3 * q)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "x", {"x": [1.0]}),
        (TypeError, "x", {"x": torch.ones(2, dtype=torch.long)}),
        (TypeError, "bits", {"bits": 2.0}),
        (TypeError, "bits", {"bits": True}),
        (ValueError, "bits", {"bits": 1}),
        (ValueError, "bits", {"bits": 0, "signed": False}),
        (TypeError, "signed", {"signed": 1}),
        (ValueError, "alpha", {"alpha": 0.0}),
        (ValueError, "alpha", {"alpha": -1}),
        (ValueError, "alpha", {"alpha": math.nan}),
        (TypeError, "alpha", {"alpha": "1"}),
        (TypeError, "alpha", {"alpha": torch.tensor(1)}),
        (ValueError, "alpha", {"alpha": torch.tensor(0.0)}),
        (ValueError, "alpha", {"alpha": torch.tensor(math.nan)}),
        (ValueError, "alpha", {"alpha": torch.tensor(math.inf)}),
        (ValueError, "alpha", {"alpha": torch.ones(3)}),
        (ValueError, "alpha", {"alpha": torch.ones(2, 1)}),
        (ValueError, "alpha", {"alpha": torch.ones((), device="meta")}),
        (ValueError, "grad", {"grad": "ste"}),
        (ValueError, "backend", {"backend": "fast"}),
    ],
)
def test_quantizer_rejects(error, name, arguments):
    given_ = {"x": torch.ones(2), "alpha": 1.0, "bits": 2, "signed": True} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        uniform_quantize(**given_)


def test_reshape_clip():
    w = torch.randn(64, 3, 3, 3, generator=seeded(), dtype=DOUBLE)
    limit = 2 * w.abs().mean()
    torch.testing.assert_close(reshape_clip(w), w.clamp(-limit, limit))
    uniform = torch.linspace(-0.7, 0.7, 100_000, dtype=DOUBLE)
    torch.testing.assert_close(reshape_clip(uniform), uniform, rtol=0, atol=2e-5)
    gauss = torch.randn(200_000, generator=seeded(1), dtype=DOUBLE)
    assert (reshape_clip(gauss) != gauss).double().mean().item() == pytest.approx(0.1105, abs=4e-3)
    for _ in range(200):
        gauss = reshape_clip(gauss)
    assert gauss.abs().max().item() == pytest.approx(1.4704, abs=1e-2)  # not 0
    leaf = torch.tensor([5.0, 0.1, 0.1], requires_grad=True)
    reshape_clip(leaf).sum().backward()
    assert leaf.grad.tolist() == [0, 1, 1]
    assert reshape_clip(torch.zeros(3)).tolist() == [0, 0, 0]
    assert reshape_clip(torch.zeros(0)).shape == (0,)
    for error, name, arguments in (
        (TypeError, "w", (torch.ones(2, dtype=torch.int64),)),
        (ValueError, "w", (torch.tensor([math.nan]),)),
        (ValueError, "k", (w, 0.0)),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            reshape_clip(*arguments)


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows())
def test_costs_by_hand(row):
    theta, flops, products, generator = row
    p = theta.softmax(-1)
    total = 0.0
    for i, j in itertools.product(*map(range, theta.shape)):
        total += flops[i].item() * p[i, j].item() * products[i, j].item()
    expected = math.sqrt(total / flops.sum().item())
    assert expected_average_bits(theta, flops, products).item() == pytest.approx(
        expected, rel=1e-12
    )
    bits = torch.randint(1, 9, (len(flops), 2), generator=generator)
    spent = sum(f * b * a for f, (b, a) in zip(flops.tolist(), bits.tolist(), strict=True))
    assert average_bits(flops, bits).item() == pytest.approx(
        math.sqrt(spent / flops.sum().item()), rel=1e-12
    )
    # One-hot factors: the mixture is the model. Elsewhere the other reading is smaller.
    choice = p.argmax(-1)
    one_hot = torch.full_like(theta, -1e4).scatter(1, choice[:, None], 1e4)
    model = (flops * products.gather(1, choice[:, None])[:, 0]).sum().double() / flops.sum()
    assert expected_average_bits(one_hot, flops, products).item() == pytest.approx(math.sqrt(model))
    other = (flops.double() / flops.sum() * (p * products.double().sqrt()).sum(-1)).sum()
    assert other.item() <= expected * (1 + 1e-12)


@settings(max_examples=20, deadline=None)
@given(rows())
def test_gradient_of_the_expected_cost(row):
    theta, flops, products, _ = row
    leaf = theta.clone().requires_grad_()
    E = expected_average_bits(leaf, flops, products)
    (grad,) = torch.autograd.grad(E, leaf)
    p, share = theta.softmax(-1), flops.double() / flops.sum()
    mean = (p * products).sum(-1, keepdim=True)
    formula = share[:, None] * p * (products - mean) / (2 * E.detach())
    torch.testing.assert_close(grad, formula, rtol=1e-9, atol=1e-12)
    shifted = expected_average_bits(theta + 5, flops, products)
    torch.testing.assert_close(shifted, E.detach())


def test_costs_of_the_paper():
    ones = torch.ones(3)
    for candidates, bits in ((CIFAR, 4.047), (IMAGENET, 3.873), (COCO, 4.183)):
        E = expected_average_bits(torch.zeros(3, len(candidates)), ones, products_of(candidates, 3))
        assert E.item() == pytest.approx(bits, abs=1e-3)
    for b, compression in ((3, 113.78), (4, 64.0)):
        B = average_bits(ones, torch.tensor([[b, b]] * 3))
        assert (32 / B).square().item() == pytest.approx(compression, abs=0.01)
    batch = torch.randint(2, 9, (4, 3, 2), generator=seeded())
    each = torch.stack([average_bits(ones, bits) for bits in batch])
    torch.testing.assert_close(average_bits(ones, batch), each)


def test_multiply_adds_agree_with_pytorchs_counter():
    layer = MixedPrecisionConv2d(4, 6, 3, CIFAR, padding=1, stride=2, groups=2)
    layer.fix(0)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.rand(1, 4, 9, 7))
    assert counter.get_total_flops() == 2 * y.numel() * 2 * 9  # 2 channels a group, 9 taps


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "bits", lambda: average_bits(torch.ones(2), torch.ones(2, 2))),
        (ValueError, "bits", lambda: average_bits(torch.ones(2), torch.ones(2, 3).long())),
        (ValueError, "bits", lambda: average_bits(torch.ones(2), torch.zeros(2, 2).long())),
        (ValueError, "flops", lambda: average_bits(torch.ones(3), torch.ones(2, 2).long())),
        (ValueError, "flops", lambda: average_bits(torch.zeros(2), torch.ones(2, 2).long())),
        (ValueError, "flops", lambda: average_bits(torch.ones(0), torch.ones(0, 2).long())),
        (TypeError, "flops", lambda: average_bits([1.0], torch.ones(1, 2).long())),
        (TypeError, "flops", lambda: average_bits(torch.ones(1) > 0, torch.ones(1, 2).long())),
        (TypeError, "theta", lambda: expected_average_bits(torch.ones(2, 2).long(), torch.ones(2), torch.ones(2, 2))),
        (ValueError, "theta", lambda: expected_average_bits(torch.ones(2), torch.ones(2), torch.ones(2, 2))),
        (ValueError, "theta", lambda: expected_average_bits(torch.ones(2, 2) / 0, torch.ones(2), torch.ones(2, 2))),
        (ValueError, "flops", lambda: expected_average_bits(torch.ones(2, 2), -torch.ones(2), torch.ones(2, 2))),
        (ValueError, "products", lambda: expected_average_bits(torch.ones(2, 2), torch.ones(2), torch.ones(2, 3))),
        (ValueError, "products", lambda: expected_average_bits(torch.ones(2, 2), torch.ones(2), torch.zeros(2, 2))),
        (TypeError, "products", lambda: expected_average_bits(torch.ones(2, 2), torch.ones(2), None)),
    ],
)  # fmt: skip
def test_costs_reject(error, name, call):
    with pytest.raises(error, match=f"^{name}: expected"):
        call()


# --------------------------------------------------------------------------------------------------
# The barrier
# --------------------------------------------------------------------------------------------------


def test_barrier_values_slopes_and_the_wall():
    slack = torch.tensor([1e-6, 0.01, 0.02, 0.5, math.e - 1, 3.0], dtype=DOUBLE)
    E = (4 - slack).requires_grad_()
    value = barrier_penalty(E, 4.0, 0.3, extend=False)
    (slope,) = torch.autograd.grad(value.sum(), E)
    torch.testing.assert_close(value, -0.3 * torch.log(torch.log(1 + slack)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slope, 0.3 / ((1 + slack) * torch.log(1 + slack)), rtol=1e-6, atol=0)
    assert value[4].abs() < 1e-12
    assert value[5] < 0 < value[3]
    assert (value.diff() < 0).all()
    inside = slack >= 0.02
    torch.testing.assert_close(barrier_penalty(E, 4.0, 0.3)[inside], value[inside])


def test_barrier_takes_a_budget_each():
    E, budgets = torch.tensor([2.0, 3.5, 2.9]), torch.tensor([3.0, 4.0, 3.0])
    each = [barrier_penalty(e, b.item(), 0.1) for e, b in zip(E, budgets, strict=True)]
    torch.testing.assert_close(barrier_penalty(E, budgets, 0.1), torch.stack(each))


def test_continuation_is_smooth_finite_and_pushes_back():
    mu, delta0 = 0.2, 0.05
    wall = mu / ((1 + delta0) * math.log1p(delta0))
    slack = torch.tensor([delta0 + 1e-9, delta0, delta0 - 1e-9, 0.0, -1.0], dtype=DOUBLE)
    E = (3 - slack).requires_grad_()
    value = barrier_penalty(E, 3.0, mu, delta0)
    (slope,) = torch.autograd.grad(value.sum(), E)
    torch.testing.assert_close(slope, torch.full_like(slope, wall), rtol=1e-6, atol=0)
    torch.testing.assert_close(value[:3], value[1].expand(3), rtol=0, atol=1e-7)
    assert value[4].item() == pytest.approx(value[1].item() + wall * 1.05, rel=1e-6)
    inside = (3 - torch.tensor([0.3, 0.1], dtype=DOUBLE)).requires_grad_()
    assert gradcheck(lambda e: barrier_penalty(e, 3.0, mu, delta0), (inside,))
    assert gradgradcheck(lambda e: barrier_penalty(e, 3.0, mu, delta0), (inside,))
    outside = torch.tensor([3.2], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda e: barrier_penalty(e, 3.0, mu, delta0), (outside,))


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "E", {"E": 2.0}),
        (TypeError, "E", {"E": torch.tensor(2)}),
        (ValueError, "E", {"E": torch.tensor(math.nan)}),
        (ValueError, "E", {"E": torch.tensor([2.0, 3.0]), "extend": False}),
        (ValueError, "E", {"E": torch.tensor(3.5), "extend": False}),
        (ValueError, "budget", {"budget": 0.0}),
        (ValueError, "budget", {"budget": math.nan}),
        (ValueError, "budget", {"budget": torch.tensor([3.0, -1.0])}),
        (ValueError, "budget", {"budget": torch.tensor(math.inf)}),
        (ValueError, "mu", {"mu": 0}),
        (ValueError, "delta0", {"delta0": 0.0}),
        (TypeError, "extend", {"extend": None}),
    ],
)
def test_barrier_rejects(error, name, arguments):
    with pytest.raises(error, match=f"^{name}: expected"):
        barrier_penalty(**({"E": torch.tensor(2.0), "budget": 3.0, "mu": 0.1} | arguments))


# --------------------------------------------------------------------------------------------------
# Prob-1
# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 5, 8, 17]), st.floats(0.1, 10), st.integers(0, 2**31))
def test_prob1_bounds_and_gradient(m, spread, seed):
    theta = spread * torch.randn(6, m, generator=seeded(seed), dtype=DOUBLE)
    leaf = theta.clone().requires_grad_()
    p = leaf.softmax(-1)
    f = prob1(p)
    most = p.amax(-1)
    assert (most * (1 - most) - f < 1e-12).all()
    assert (f <= 1 - most + 1e-12).all()
    assert (f <= (1 - 1 / m) ** m + 1e-12).all()
    (grad,) = torch.autograd.grad(f.sum(), leaf)
    p, f = p.detach(), f.detach()[:, None]
    if bool((p < 0.999).all()):
        ratio = p / (1 - p)
        formula = -f * p * (1 / (1 - p) - ratio.sum(-1, keepdim=True))
        torch.testing.assert_close(grad, formula, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(prob1(p.T, dim=0), f[:, 0])


def test_prob1_is_zero_exactly_at_the_vertices_and_has_no_other_minimum():
    eye = torch.eye(5, dtype=DOUBLE)
    assert (prob1(eye) == 0).all()
    generator = seeded(4)
    x = torch.rand(500, 5, generator=generator, dtype=DOUBLE)
    x[:250, 3:] = 0  # on faces too
    x = x / x.sum(-1, keepdim=True)
    assert (prob1(x) > 0).all()
    large, small = x.argmax(-1), x.masked_fill(x == 0, 2).argmin(-1)
    t = torch.rand(500, generator=generator, dtype=DOUBLE) * x.gather(1, small[:, None])[:, 0]
    moved = x.clone()
    moved.scatter_add_(1, large[:, None], t[:, None])
    moved.scatter_add_(1, small[:, None], -t[:, None])
    assert (prob1(moved) < prob1(x)).all()
    uniform = torch.full((5,), 0.2, dtype=DOUBLE)
    assert (prob1(x) < prob1(uniform)).all()
    assert prob1(uniform).item() == pytest.approx(0.8**5)


def test_prob1_gradient_at_the_vertices_is_finite():
    leaf = torch.eye(3, dtype=DOUBLE, requires_grad=True)
    prob1(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, -torch.eye(3, dtype=DOUBLE))
    theta = torch.zeros(2, 4, dtype=DOUBLE, requires_grad=True)
    prob1(theta.softmax(-1)).sum().backward()
    torch.testing.assert_close(theta.grad, torch.zeros_like(theta), rtol=0, atol=1e-15)
    certain = torch.tensor([[800.0, 0.0, 0.0]], requires_grad=True)
    prob1(certain.softmax(-1)).sum().backward()
    assert certain.grad.tolist() == [[0, 0, 0]]
    random = torch.randn(2, 4, generator=seeded(), dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda t: prob1(t.softmax(-1)), (random,))
    assert gradgradcheck(lambda t: prob1(t.softmax(-1)), (random,))
    assert prob1(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("error", "p", "dim"),
    [
        (TypeError, [0.5, 0.5], -1),
        (TypeError, torch.tensor([1, 0]), -1),
        (ValueError, torch.tensor([0.5, 0.4]), -1),
        (ValueError, torch.tensor([1.2, -0.2]), -1),
        (ValueError, torch.tensor([math.nan, 1.0]), -1),
        (ValueError, torch.tensor(1.0), -1),
        (ValueError, torch.zeros(2, 0), -1),
        (ValueError, torch.ones(2, 1), 2),
    ],
)
def test_prob1_rejects(error, p, dim):
    with pytest.raises(error, match=r"^p: expected"):
        prob1(p, dim)


# --------------------------------------------------------------------------------------------------
# Certificate, start and repair
# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows())
def test_certificate_never_passes_a_bad_model(row):
    theta, flops, products, _ = row
    p = theta.softmax(-1)
    E = expected_average_bits(theta, flops, products)
    bound = argmax_feasible_bound(p, E)
    cost = products.gather(1, p.argmax(-1, keepdim=True))[:, 0]
    model = ((flops * cost).sum().double() / flops.sum()).sqrt()
    assert model <= bound * (1 + 1e-12)
    assert bound.item() == pytest.approx(E.item() / math.sqrt(p.amax(-1).min().item()))
    torch.testing.assert_close(argmax_feasible_bound(p[None], E[None])[0], bound)
    assert argmax_feasible_bound(p, E.item()).item() == pytest.approx(bound.item())


@settings(max_examples=60, deadline=None)
@given(rows(), st.floats(0.0, 1.0))
def test_repair_always_ends_inside(row, where):
    theta, flops, products, _ = row
    p = theta.softmax(-1)

    def bits(cost):
        return math.sqrt(((flops.double() * cost).sum() / flops.sum()).item())

    low, high = bits(products.amin(-1)), bits(products.amax(-1))
    budget = low + where * (high - low) + 1e-9
    choice, moves = feasible_choice(p, products, flops, budget)
    found = bits(products.gather(1, choice[:, None])[:, 0])
    assert found <= budget
    inside = bits(products.gather(1, p.argmax(-1, keepdim=True))[:, 0]) <= budget
    assert (moves == 0) == inside
    assert inside == torch.equal(choice, p.argmax(-1))
    again, more = feasible_choice(theta.mul(50).softmax(-1), products, flops, budget)
    assert bits(products.gather(1, again[:, None])[:, 0]) <= budget
    assert more <= theta.numel()


def test_repair_takes_the_least_unlikely_single_move():
    p = torch.tensor([[0.1, 0.4, 0.5], [0.0, 0.2, 0.8]])
    products = torch.tensor([[9, 12, 32], [9, 12, 32]])
    flops = torch.ones(2)
    # 5.66 bits; 4.7 is met by lowering either layer once: the first has the better second choice.
    choice, moves = feasible_choice(p, products, flops, 4.7)
    assert (choice.tolist(), moves) == ([1, 2], 1)
    choice, moves = feasible_choice(p, products, flops, 3.0)  # the cheapest model alone
    assert choice.tolist() == [0, 0]
    choice, moves = feasible_choice(p, products, flops, 6.0)
    assert (choice.tolist(), moves) == ([2, 2], 0)


@settings(max_examples=40, deadline=None)
@given(rows(), st.floats(0.01, 1.2), st.floats(0.01, 0.5))
def test_start_is_feasible(row, where, margin):
    _, flops, products, _ = row
    low = math.sqrt(((flops.double() * products.amin(-1)).sum() / flops.sum()).item())
    uniform = expected_average_bits(
        torch.zeros(products.shape, dtype=DOUBLE), flops, products
    ).item()
    budget = low + where * (uniform - low) + 1e-3
    theta = feasible_init(products, flops, budget, margin)
    start = expected_average_bits(theta, flops, products).item()
    assert theta.shape == products.shape
    assert theta.dtype == torch.float32
    assert start < budget
    target = max(budget - margin, (budget + low) / 2)
    if uniform <= target:
        assert (theta == 0).all()
    else:
        assert start == pytest.approx(target, abs=1e-4)  # no more tilted than needed
    value = barrier_penalty(torch.tensor(start), budget, 0.1, extend=False)
    assert value.isfinite()


def test_starts_for_the_papers_budgets():
    for candidates, budgets in ((CIFAR, (3, 3.5, 4)), (IMAGENET, (3, 4)), (COCO, (4,))):
        products, flops = products_of(candidates, 20), torch.rand(20, generator=seeded()) + 0.01
        for budget in budgets:
            theta = feasible_init(products, flops, budget)
            E = expected_average_bits(theta, flops, products).item()
            equal = expected_average_bits(torch.zeros_like(theta), flops, products).item()
            target = max(budget - 0.1, (budget + math.sqrt(products.min().item())) / 2)
            assert pytest.approx(min(equal, target), abs=1e-4) == E


TWO = (torch.tensor([[6, 8], [6, 8]]), torch.ones(2))


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "budget", lambda: feasible_init(*TWO, 2.4)),
        (ValueError, "budget", lambda: feasible_init(*TWO, math.sqrt(6))),
        (ValueError, "budget", lambda: feasible_init(*TWO, -1)),
        (ValueError, "margin", lambda: feasible_init(*TWO, 3, 0.0)),
        (ValueError, "products", lambda: feasible_init(TWO[0][0], TWO[1], 3)),
        (ValueError, "products", lambda: feasible_init(TWO[0][None], TWO[1], 3)),
        (ValueError, "products", lambda: feasible_init(0 * TWO[0], TWO[1], 3)),
        (ValueError, "flops", lambda: feasible_init(TWO[0], torch.ones(3), 3)),
        (ValueError, "flops", lambda: feasible_init(TWO[0], torch.zeros(2), 3)),
        (ValueError, "budget", lambda: feasible_choice(torch.full((2, 2), 0.5), *TWO, 2.4)),
        (ValueError, "p", lambda: feasible_choice(torch.full((2, 2), 0.6), *TWO, 3)),
        (ValueError, "p", lambda: feasible_choice(torch.full((2,), 0.5), *TWO, 3)),
        (ValueError, "products", lambda: feasible_choice(torch.full((1, 2), 0.5), *TWO, 3)),
        (ValueError, "p", lambda: argmax_feasible_bound(torch.full((2,), 0.5), 3.0)),
        (ValueError, "p", lambda: argmax_feasible_bound(torch.zeros(0, 2), 3.0)),
        (ValueError, "p", lambda: argmax_feasible_bound(torch.full((2, 2), 0.4), 3.0)),
        (ValueError, "E", lambda: argmax_feasible_bound(torch.full((2, 2), 0.5), 0.0)),
        (ValueError, "E", lambda: argmax_feasible_bound(torch.full((2, 2), 0.5), torch.tensor(-1.0))),
        (ValueError, "E", lambda: argmax_feasible_bound(torch.full((2, 2), 0.5), torch.tensor(math.nan))),
    ],
)  # fmt: skip
def test_start_repair_and_certificate_reject(error, name, call):
    with pytest.raises(error, match=f"^{name}: expected"):
        call()


def test_halved_steps_and_the_printed_barrier_keep_the_mixture_inside():
    products, flops = products_of(CIFAR, 5), torch.tensor([1.0, 2.0, 4.0, 2.0, 0.1])
    for seed in range(3):
        theta = feasible_init(products, flops, 3.0).double().requires_grad_()
        want = torch.randn(5, 8, generator=seeded(seed), dtype=DOUBLE) - products / 10  # many bits
        optimizer = torch.optim.Adam([theta], 0.3)
        for _ in range(60):
            E = expected_average_bits(theta, flops, products)
            p = theta.softmax(-1)
            loss = (p * want).sum() + barrier_penalty(E, 3.0, 0.01, extend=False) + prob1(p).sum()
            optimizer.zero_grad()
            loss.backward()
            before = theta.detach().clone()
            optimizer.step()
            with torch.no_grad():
                while expected_average_bits(theta, flops, products) >= 3.0:
                    theta.copy_((theta + before) / 2)
        p = theta.detach().softmax(-1)
        choice, _ = feasible_choice(p, products, flops, 3.0)
        assert average_bits(flops, torch.tensor(CIFAR)[choice]) <= 3.0


# --------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([CIFAR, IMAGENET, COCO, [(2, 1)], [(5, 2), (2, 7), (3, 2)]]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 6, 2), (3, 3, 3)]),
    st.sampled_from([1, 2, 5, 7]),
    st.sampled_from(["lsq", "pact"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_layer_equals_the_printed_sum(candidates, batch, channels, side, grad, signed, seed):
    generator = seeded(seed)
    if signed:
        candidates = [(b, max(a, 2)) for b, a in candidates]
    inputs, outputs, groups = channels
    layer = MixedPrecisionConv2d(
        inputs, outputs, (3, 1), candidates, stride=(1, 2), padding=(1, 2), dilation=(1, 2),
        groups=groups, bias=bool(seed % 2), signed_input=signed, alpha_input=1.2, grad=grad,
    ).double()  # fmt: skip
    with torch.no_grad():
        layer.theta.normal_(generator=generator)
        layer.raw_alpha_input.normal_(generator=generator)
        layer.raw_alpha_weight.normal_(-2, 0.5, generator=generator)
    x = strided(torch.randn(batch, inputs, side, side, generator=generator, dtype=DOUBLE))
    found = []
    for backend in ("auto", "reference"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        weights = torch.linspace(-1, 2, y.numel(), dtype=DOUBLE).view_as(y)
        leaves = [leaf, *layer.parameters()]
        found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def test_layer_by_the_quantizer_and_fixed_choices():
    layer = MixedPrecisionConv2d(2, 3, 3, CIFAR, padding=1).double()
    layer.set_alpha(0.2, 1.5)
    x = 2 * torch.rand(2, 2, 5, 5, generator=seeded(), dtype=DOUBLE)
    single = []
    for j, (b, a) in enumerate(CIFAR):
        q_x, q_w = uniform_quantize(x, 1.5, a, False), uniform_quantize(layer.weight, 0.2, b, True)
        layer.fix(j)
        single.append(layer(x))
        torch.testing.assert_close(single[-1], F.conv2d(q_x, q_w, layer.bias, padding=1))
        y = layer(x)
        assert torch.autograd.grad(y.sum(), layer.theta, allow_unused=True) == (None,)
    layer.fix(None)
    p = torch.rand(8, generator=seeded(1), dtype=DOUBLE)
    p = p / p.sum()
    torch.testing.assert_close(layer(x, p), sum(q * y for q, y in zip(p, single, strict=True)))
    torch.testing.assert_close(layer(x), sum(single) / 8)  # theta starts at 0
    layer.fix("float")
    plain = F.conv2d(x.clamp(max=1.5), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain)


def test_stacked_layers_are_the_single_ones():
    """Under vmap, several networks train at once, each as it would alone."""
    layers = [MixedPrecisionConv2d(2, 3, 3, CIFAR, padding=1, groups=1).double() for _ in range(3)]
    x = torch.rand(3, 2, 2, 5, 5, generator=seeded(), dtype=DOUBLE)
    p = torch.randn(3, 8, generator=seeded(1), dtype=DOUBLE).softmax(-1)
    params, _ = torch.func.stack_module_state(layers)

    def run(params, x, p):
        return torch.func.functional_call(layers[0], params, (x, p))

    y = torch.vmap(run)(params, x, p)
    weights = torch.linspace(-1, 1, y.numel(), dtype=DOUBLE).view_as(y)
    names = [name for name in params if name != "theta"]
    grads = torch.autograd.grad((y * weights).sum(), [params[name] for name in names])
    for i, layer in enumerate(layers):
        alone = layer(x[i], p[i])
        torch.testing.assert_close(y[i], alone)
        own = dict(layer.named_parameters())
        single = torch.autograd.grad((alone * weights[i]).sum(), [own[name] for name in names])
        for stacked, got in zip(grads, single, strict=True):
            torch.testing.assert_close(stacked[i], got)


def test_sampling_and_shared_factors():
    layer = MixedPrecisionConv2d(1, 1, 1, CIFAR)
    with torch.no_grad():
        layer.theta[3] = 1.0
    assert layer.sample() == 3
    torch.testing.assert_close(layer.probabilities(), layer.theta.softmax(0))
    generator = seeded()
    drawn = torch.tensor([layer.sample(greedy=False, generator=generator) for _ in range(3000)])
    share = torch.bincount(drawn, minlength=8) / 3000
    torch.testing.assert_close(share, layer.probabilities().detach(), rtol=0, atol=0.04)
    other = MixedPrecisionConv2d(1, 1, 1, CIFAR)
    other.theta = layer.theta
    assert other.sample() == 3
    assert "choice=None" in repr(layer)


def test_ranges_stay_positive_and_survive_saving():
    layer = MixedPrecisionConv2d(2, 2, 1, CIFAR, alpha_input=0.7)
    assert layer.alpha_input.tolist() == pytest.approx([0.7] * 3, rel=1e-5)
    assert layer.alpha_weight.max().item() == pytest.approx(
        layer.weight.abs().max().item(), rel=1e-4
    )
    optimizer = torch.optim.SGD(layer.parameters(), 10.0)
    layer(torch.rand(2, 2, 3, 3)).square().sum().backward()
    optimizer.step()
    assert (layer.alpha_input > 0).all()
    assert (layer.alpha_weight > 0).all()
    copy = MixedPrecisionConv2d(2, 2, 1, CIFAR)
    copy.load_state_dict(layer.state_dict())
    x = torch.rand(1, 2, 3, 3)
    torch.testing.assert_close(copy(x), layer(x))


def test_quantized_values_have_the_promised_number_of_levels():
    layer = MixedPrecisionConv2d(1, 40, 5, [(3, 2)])
    assert (
        len(uniform_quantize(layer.weight, layer.alpha_weight[0].detach(), 3, True).unique()) == 7
    )
    x = torch.rand(1, 1, 30, 30)
    assert len(uniform_quantize(x, 0.9, 2, False).unique()) == 4


PAIRS = {"in_channels": 1, "out_channels": 1, "kernel_size": 1, "candidates": CIFAR}


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "candidates", {"candidates": 3}),
        (TypeError, "candidates", {"candidates": "ab"}),
        (TypeError, "candidates", {"candidates": [4]}),
        (TypeError, "candidates", {"candidates": [(4, 4.0)]}),
        (ValueError, "candidates", {"candidates": []}),
        (ValueError, "candidates", {"candidates": [(4, 4), (4, 4)]}),
        (ValueError, "candidates", {"candidates": [(1, 4)]}),
        (ValueError, "candidates", {"candidates": [(4, 0)]}),
        (ValueError, "candidates", {"candidates": [(4, 1)], "signed_input": True}),
        (TypeError, "signed_input", {"signed_input": 0}),
        (ValueError, "alpha_input", {"alpha_input": 0.0}),
        (ValueError, "grad", {"grad": "none"}),
        (ValueError, "backend", {"backend": "triton"}),
    ],
)
def test_layer_rejects_arguments(error, name, arguments):
    with pytest.raises(error, match=f"^{name}: expected"):
        MixedPrecisionConv2d(**(PAIRS | arguments))


def test_layer_rejects_input():
    layer = MixedPrecisionConv2d(**PAIRS)
    x = torch.rand(1, 1, 2, 2)
    for error, name, call in (
        (ValueError, "x", lambda: layer(x[0])),
        (ValueError, "x", lambda: layer(x.expand(-1, 2, -1, -1))),
        (TypeError, "x", lambda: layer(x.long())),
        (ValueError, "p", lambda: layer(x, torch.ones(3))),
        (TypeError, "p", lambda: layer(x, [1.0])),
        (ValueError, "choice", lambda: layer.fix(8)),
        (ValueError, "choice", lambda: layer.fix(True)),
        (ValueError, "choice", lambda: layer.fix("int")),
        (ValueError, "weight", lambda: layer.set_alpha(0.0, 1.0)),
        (ValueError, "input", lambda: layer.set_alpha(1.0, -1.0)),
        (TypeError, "greedy", lambda: layer.sample(greedy=1)),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            call()


# --------------------------------------------------------------------------------------------------
# Precision, autocast, compile
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("grad", ["lsq", "pact"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
def test_quantizing_in_blocks_changes_nothing(monkeypatch, dtype, grad, signed):
    """Long tensors go block by block; a stride, or several clipping levels, do not."""
    x = torch.randn(3, 67, generator=seeded(), dtype=DOUBLE).to(dtype)
    x[0, :3] = torch.tensor([math.inf, -math.inf, 1.1])
    pull = torch.randn(3, 67, generator=seeded(1), dtype=DOUBLE).to(dtype)
    results = []
    for block, layout in ((10**6, torch.clone), (16, torch.clone), (16, strided)):
        monkeypatch.setattr("affnb.efficient.bp_nas._BLOCK", block)
        leaf = layout(x.clone()).detach().requires_grad_()
        alpha = torch.tensor([1.1], dtype=DOUBLE if dtype == DOUBLE else torch.float32)
        alpha.requires_grad_()
        q = uniform_quantize(leaf, alpha, 4, signed, grad)
        results.append((q.detach(), *torch.autograd.grad(q, (leaf, alpha), pull)))
    for other in results[1:]:
        for ours, whole in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=0)
    one = uniform_quantize(x.requires_grad_(), 1.1, 4, signed, grad)  # no gradient for the level
    (grad_x,) = torch.autograd.grad(one, x, pull)
    torch.testing.assert_close(grad_x, results[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    x = torch.randn(200, generator=seeded()).to(dtype).requires_grad_()
    alpha = torch.tensor(1.1, requires_grad=True)
    q = uniform_quantize(x, alpha, 8, True)
    assert q.dtype == dtype
    wide = uniform_quantize(x.detach().float(), 1.1, 8, True)
    torch.testing.assert_close(q.detach(), wide.to(dtype), rtol=0, atol=0)
    q.float().sum().backward()
    assert x.grad.dtype == dtype
    assert alpha.grad.isfinite()
    theta = torch.randn(3, 8, generator=seeded(1)).to(dtype)
    products = products_of(CIFAR, 3)
    E = expected_average_bits(theta, torch.ones(3), products)
    assert E.dtype == prob1(theta.softmax(-1)).dtype == torch.float32
    assert barrier_penalty(E.to(dtype), 9.0, 0.1).dtype == torch.float32
    layer = MixedPrecisionConv2d(2, 3, 3, CIFAR)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(torch.rand(2, 2, 6, 6, generator=seeded(2)))
        y.float().square().mean().backward()
    torch.testing.assert_close(
        y.float(), layer(torch.rand(2, 2, 6, 6, generator=seeded(2))), rtol=0.1, atol=0.05
    )
    assert y.dtype == dtype
    assert all(
        v.grad.isfinite().all() and v.grad.dtype == torch.float32 for v in layer.parameters()
    )


def test_compile():
    layer = MixedPrecisionConv2d(2, 3, 3, CIFAR, padding=1)
    flops, products = torch.ones(1), products_of(CIFAR, 1)
    x = torch.rand(2, 2, 5, 5, generator=seeded())

    def run(x):
        theta = layer.theta[None]
        E = expected_average_bits(theta, flops, products)
        penalty = barrier_penalty(E, 4.5, 0.1) + prob1(theta.softmax(-1)).sum()
        q = uniform_quantize(x, 0.8, 3, signed=False)
        return layer(x).square().mean() + penalty + q.square().mean()

    found = []
    for function in (torch.compile(run, backend="aot_eager"), run):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        found.append((value.detach(), *torch.autograd.grad(value, [leaf, *layer.parameters()])))
    torch.testing.assert_close(found[0], found[1])


def test_the_layer_keeps_one_output_and_a_copy_an_input_width():
    from affnb.measure import peak_bytes

    held = {}
    for backend in ("auto", "reference"):
        layer = MixedPrecisionConv2d(16, 16, 3, CIFAR, padding=1, backend=backend)
        x = torch.rand(8, 16, 16, 16)
        peak_bytes(lambda layer=layer, x=x: layer(x))
        held[backend] = peak_bytes(lambda layer=layer, x=x: layer(x))
    one = 8 * 16 * 16 * 16 * 4
    assert held["auto"] < 8 * one
    assert held["reference"] > 1.5 * held["auto"]


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, on a stand-in for torchvision
# --------------------------------------------------------------------------------------------------


def fake_torchvision(monkeypatch, used):
    """Install CIFAR-10 with small pictures, and transforms that note their names in ``used``."""

    class CIFAR10(torch.utils.data.Dataset):
        def __init__(self, root, train, transform, download):
            assert Path(root).is_dir()
            self.size, self.transform, self.first = (
                40 if train else 8,
                transform,
                0 if train else 40,
            )

        def __len__(self):
            return self.size

        def __getitem__(self, index):
            random = np.random.default_rng(self.first + index)
            picture = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            return self.transform(Image.fromarray(picture)), int(random.integers(10))

    def compose(steps):
        def run(x):
            for step in steps:
                x = step(x)
            return x

        return run

    def normalise(mean, std):
        middle, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        return lambda x: (x - middle) / scale

    def noted(name):
        def make(*arguments):
            return lambda x: used.append((name, arguments)) or x

        return make

    names = ("RandomCrop", "RandomHorizontalFlip", "RandomErasing")
    parts = {
        "torchvision": {},
        "torchvision.datasets": {"CIFAR10": CIFAR10},
        "torchvision.transforms": {
            "Compose": compose,
            "Normalize": normalise,
            "ToTensor": lambda: lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255,
            **{name: noted(name) for name in names},
        },
    }
    fake_modules(monkeypatch, parts)


def test_full_profile(tmp_path, monkeypatch):
    """The chapter's cells with ``profile="full"``, made small: they run, and as the text says."""
    chapter, used, trainings = "efficient/bp_nas", [], []
    fake_torchvision(monkeypatch, used)

    def fit(real, step, batches, optimizer, **options):
        groups, start = optimizer.param_groups, len(used)
        found = [(g["initial_lr"], g["momentum"], g["weight_decay"]) for g in groups]
        result = real(step, batches, optimizer, **options)
        schedule = (type(options["scheduler"]).__name__, options["scheduler"].T_max)
        trainings.append((type(optimizer).__name__, found, schedule, used[start:]))
        return result

    def fewer_steps(names):  # than 160 epochs in batches of 512
        steps = {"pretrain": 15680, "search": 9440, "retrain": 15680}
        assert names["sizes"] == {**steps, "batch": 512, "together": 1}
        names["sizes"].update(pretrain=1, search=2, retrain=1, batch=4, together=8)

    names, _ = run_cells(chapter, monkeypatch, define=("new_net",))  # at its true size
    network, sizes = names["new_net"](), names["macs"]
    names, verdicts = run_cells(
        chapter,
        monkeypatch,
        define=("penalties", "found", "counted", "looks", "each"),
        call=("settle_net", "explore"),
        small={
            "DataLoader(num_workers=)": "0",
            "ResNet20.shape": "(3, 8, 8)",
            "conv(3, 16, signed=True)": "conv(3, 4, signed=True)",
            "[16] * 4 + [32] * 3 + [64] * 3": "[4] * 2 + [6] + [8]",
            '(16, *(o for _, o in pairs for _ in "ab"))': '(4, *(o for _, o in pairs for _ in "ab"))',
            "MixedPrecisionConv2d(64, 10, 1, CANDIDATES)": "MixedPrecisionConv2d(8, 10, 1, CANDIDATES)",
            "run_seeds": "[seed + 640, seed + 641]",
        },
        after={"sizes": fewer_steps},
        fit=fit,
        data_root=str(tmp_path),
        budgets=(3.0, 3.5, 4.0),  # of cells that do not run
        settle_rule=lambda *args: None,
    )

    # ResNet-20 by hand: a stem, three groups of six convolutions, a linear layer; 11 choices.
    later = [16 * 32 + 5 * 32 * 32, 32 * 64 + 5 * 64 * 64]
    by_hand = 9 * (1024 * (3 * 16 + 6 * 16 * 16) + 256 * later[0] + 64 * later[1]) + 640
    assert len(sizes) == len(network.blocks) == 11
    assert int(sizes.sum()) == by_hand
    assert len(names["layers_of"](network)) == 20

    assert verdicts["efficient/bp_nas:bit-operations"] == "equal"
    assert len(verdicts) == 7
    assert "efficient/bp_nas:against-uniform-between" not in verdicts  # 2.75 bits: not in the paper
    for name, groups, schedule, _ in trainings:  # 0.002 and no decay: the clipping levels
        assert name == "SGD"
        assert schedule in [("CosineAnnealingLR", 1), ("CosineAnnealingLR", 2)]
        assert groups == [(0.2, 0.9, 5e-4), (0.002, 0.9, 0)]
    square = ("RandomErasing", (1.0, (0.25, 0.25), (1.0, 1.0)))
    erased = [square in seen for *_, seen in trainings]
    last = -(-len(names["trained"]) // 8)  # trainings of eight models: cutout in these alone
    assert erased == [False] * (len(erased) - last) + [True] * last
    assert all(("RandomCrop", (32, 4)) in seen for *_, seen in trainings)
    for (arm, setting, _), run in names["found"].items():
        if arm in ("barrier and Prob-1", "without Prob-1"):
            assert max(run["costs"]) < setting
            assert run["B"] <= setting
