"""Learnable cost volume: Cayley, the eigenvalue map, positive definite matrices, volumes, read-out."""

import subprocess
import sys
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

import affnb.matching.learnable_cost_volume as module
from affnb.data.stereo import motorcycle_stereo, warped_photographs
from affnb.matching import (
    CayleySPD,
    CayleySPDParametrization,
    atan_positive,
    cayley,
    cost_volume,
    inverse_atan_positive,
    inverse_cayley,
    matching_score,
    signature_fix,
    soft_argmax_flow,
)
from tests.chapter_cells import fake_modules, run_cells

DOUBLE = torch.float64
SIDES = st.sampled_from([1, 2, 3, 5, 7])
KINDS = ("inner", "cosine", "wssd")
PADDINGS = ("zeros", "replicate", "exclude")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def skew(*shape, seed=0, scale=1.0):
    x = scale * torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)
    return x - x.mT


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=DOUBLE))[0]


def spd(n, seed=0):
    x = torch.randn(n, n, generator=seeded(seed), dtype=DOUBLE)
    return x @ x.T + 0.1 * torch.eye(n, dtype=DOUBLE)


def strided(x):
    """The same values with other strides: every second column of a wider tensor, transposed twice."""
    return x.mT.contiguous().mT.repeat_interleave(2, -1)[..., ::2]


# --------------------------------------------------------------------------------------------------
# Cayley
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (2, 2), (5, 5), (3, 4, 4), (2, 0, 3, 3)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_cayley_is_a_rotation_and_comes_back(shape, scale):
    s = skew(*shape, scale=scale)
    p = cayley(s)
    eye = torch.eye(shape[-1], dtype=DOUBLE).expand(shape)
    torch.testing.assert_close(p.mT @ p, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(p), torch.ones(shape[:-2], dtype=DOUBLE))
    torch.testing.assert_close(p, cayley(s, backend="reference"), rtol=0, atol=1e-9)
    torch.testing.assert_close(cayley(-s), p.mT)
    torch.testing.assert_close(inverse_cayley(p), s, rtol=1e-6, atol=1e-6 * scale**2)


def test_cayley_in_the_plane():
    for s in (-3.0, 0.0, 0.5, 1e6):
        angle = -2 * torch.atan(torch.tensor(s, dtype=DOUBLE))
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=DOUBLE)
        found = cayley(torch.tensor([[0.0, -s], [s, 0.0]], dtype=DOUBLE))
        torch.testing.assert_close(found, turn, rtol=0, atol=1e-12)


def test_cayley_against_torch():
    """PyTorch's parametrisation has S = -A / 2, and the weight at registration on the left."""
    layer = nn.Linear(5, 5, bias=False, dtype=DOUBLE)
    nn.init.eye_(layer.weight)
    parametrizations.orthogonal(layer, orthogonal_map="cayley")
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(skew(5, 5).tril())
    peer = layer.weight
    a = layer.parametrizations.weight.original.tril(-1)
    s = -(a - a.mT) / 2
    base = layer.parametrizations.weight[0].base
    torch.testing.assert_close(base @ cayley(s), peer)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cayley_gradcheck(backend):
    flat = torch.randn(6, generator=seeded(), dtype=DOUBLE, requires_grad=True)
    run = lambda x: cayley(module._skew(x, 4), backend=backend)  # noqa: E731
    assert gradcheck(run, (flat,))
    assert gradgradcheck(run, (flat,))
    there_and_back = lambda x: inverse_cayley(run(x))  # noqa: E731
    assert gradcheck(there_and_back, (flat,))


def test_cayley_in_float32_near_half_turns():
    for scale, tolerance in ((1.0, 2e-5), (1e4, 2e-3)):
        p = cayley(skew(128, 128, scale=scale).float())
        assert p.dtype == torch.float32
        assert (p.mT @ p - torch.eye(128)).abs().max() < tolerance


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 2, 3, 5, 8, 13]), st.integers(0, 10**6), st.booleans())
def test_signs_bring_every_orthogonal_matrix_into_reach(n, seed, permuted):
    p = orthogonal(n, seed)
    if permuted:  # signed permutations: half turns and reflections in plenty
        signs = torch.randint(0, 2, (n,), generator=seeded(seed)) * 2.0 - 1
        p = torch.eye(n, dtype=DOUBLE)[torch.randperm(n, generator=seeded(seed))] * signs
    d = signature_fix(p)
    assert d.dtype == p.dtype
    assert torch.equal(d.abs(), torch.ones(n, dtype=DOUBLE))
    if n:
        s = inverse_cayley(d[:, None] * p)
        assert s.abs().max() <= 1 + 1e-6
        torch.testing.assert_close(cayley(s), d[:, None] * p, rtol=0, atol=1e-10)


def test_signs_by_enumeration():
    """The best of all signs has the largest determinant; ours is at least a local maximum."""
    p = orthogonal(4, 3)
    eye = torch.eye(4, dtype=DOUBLE)
    dets = {
        d: torch.det(eye + torch.tensor(d)[:, None] * p) for d in product((1.0, -1.0), repeat=4)
    }
    ours = tuple(signature_fix(p).tolist())
    for i in range(4):
        for j in range(i):
            other = list(ours)
            other[i], other[j] = -other[i], -other[j]
            assert dets[tuple(other)] <= dets[ours] + 1e-9


# --------------------------------------------------------------------------------------------------
# Eigenvalues and positive definite matrices
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_atan_positive_keeps_its_digits(dtype):
    t = torch.tensor([0.0, *(s * 10.0**k for k in range(-8, 15) for s in (1, -1))], dtype=dtype)
    t.requires_grad_()
    value = atan_positive(t)
    assert value.dtype == dtype
    assert (value > 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(
        value * atan_positive(-t), torch.ones_like(t), rtol=tolerance, atol=0
    )
    torch.testing.assert_close(inverse_atan_positive(value), t, rtol=tolerance, atol=1e-6)
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert slope.isfinite().all()
    assert (slope > 0).all()
    printed = (torch.pi + 2 * torch.atan(t)) / (torch.pi - 2 * torch.atan(t))
    moderate = t.detach().abs() < 100
    torch.testing.assert_close(value[moderate], printed[moderate], rtol=1e-3, atol=0)


def test_atan_positive_in_the_limits():
    assert atan_positive(torch.zeros(1)).item() == 1
    t = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(atan_positive(t).sum(), t)
    assert slope.item() == pytest.approx(4 / torch.pi)
    far = torch.tensor([1e30, -1e30], requires_grad=True)  # counts as 1e15
    value = atan_positive(far)
    (slope,) = torch.autograd.grad(value.sum(), far)
    assert value.isfinite().all()
    assert torch.equal(slope, torch.zeros(2))
    assert gradcheck(atan_positive, (torch.randn(5, dtype=DOUBLE, requires_grad=True),))
    positive = torch.tensor([1e-3, 0.2, 0.4, 1.0, 2.0, 5.0, 1e3], dtype=DOUBLE, requires_grad=True)
    torch.testing.assert_close(atan_positive(inverse_atan_positive(positive)), positive)
    assert gradcheck(inverse_atan_positive, (positive[1:3].detach().requires_grad_(),))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 7]), st.integers(0, 10**6))
def test_spd_from_matrix_and_back(n, seed):
    weight = spd(n, seed)
    metric = CayleySPD.from_matrix(weight)
    torch.testing.assert_close(metric(), weight, rtol=1e-9, atol=1e-9)
    q = metric.factor()
    torch.testing.assert_close(q.mT @ q, metric())
    assert metric.skew.numel() + metric.t.numel() == n * (n + 1) // 2
    assert n == 1 or metric.skew.abs().max() <= 1 + 1e-6
    single = CayleySPD.from_matrix(weight.float())
    assert single().dtype == torch.float32
    torch.testing.assert_close(single(), weight.float(), rtol=1e-4, atol=1e-4)


def test_identity_start_is_exact_and_the_rotation_sleeps():
    metric = CayleySPD(6)
    assert torch.equal(metric(), torch.eye(6))
    f1, f2 = torch.randn(2, 1, 6, 4, 5, generator=seeded())
    assert torch.equal(
        cost_volume(f1, f2, radius=1, weight=metric()), cost_volume(f1, f2, radius=1)
    )
    optimizer = torch.optim.SGD(metric.parameters(), lr=0.1)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        cost_volume(f1, f2, radius=1, weight=metric()).square().sum().mul(1e-3).backward()
        sizes.append(metric.skew.grad.abs().max().item())
        optimizer.step()
    assert sizes[0] == 0
    assert sizes[1] > 1e-3
    awake = CayleySPD(6, init="perturbed")
    assert 0 < awake.t.abs().max() < 0.1
    cost_volume(f1, f2, radius=1, weight=awake()).square().sum().backward()
    assert awake.skew.grad.abs().max() > 0


def test_equal_eigenvalues_hold_the_identity():
    """Learning P alone is the plain volume (the paper's ablation)."""
    rotation = CayleySPDParametrization()(torch.randn(10, generator=seeded()), torch.zeros(5))
    torch.testing.assert_close(rotation, torch.eye(5), rtol=0, atol=1e-5)


def test_parametrization_and_weight_decay():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(spd(4))
    wanted = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", CayleySPDParametrization())
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=1.0)
    for _ in range(60):  # no loss at all: decay alone leads to the identity
        optimizer.zero_grad()
        (0 * layer.weight.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, torch.eye(4), rtol=0, atol=1e-4)


def test_spd_gradcheck():
    leaves = [torch.randn(n, generator=seeded(n), dtype=DOUBLE, requires_grad=True) for n in (3, 3)]
    assert gradcheck(CayleySPDParametrization(), leaves)


# --------------------------------------------------------------------------------------------------
# Volumes
# --------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """Two maps in float64, a weight or none, and a radius."""
    batch, channels = draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from([1, 2, 3, 5]))
    generator = seeded(draw(st.integers(0, 2**31)))
    shape = batch, channels, draw(SIDES), draw(SIDES)
    f1, f2 = torch.randn(2, *shape, generator=generator, dtype=DOUBLE)
    if draw(st.booleans()):
        f1, f2 = strided(f1), f2.to(memory_format=torch.channels_last)
    radius = draw(st.sampled_from([0, 1, (0, 3), (2, 1), (4, 4)]))
    weight = spd(channels, draw(st.integers(0, 99))) if draw(st.booleans()) else None
    return f1, f2, weight, radius


def values_and_grads(function, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves if x is not None]
    out = function(*leaves)
    finite = out.detach().isfinite()
    mix = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    total = (torch.where(finite, out, 0.0) * mix).sum()
    return [out.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("columns", [24, 1])
@settings(max_examples=40, deadline=None)
@given(pairs(), st.sampled_from(KINDS), st.sampled_from(PADDINGS))
def test_fast_equals_reference(columns, drawn, kind, padding):
    f1, f2, weight, radius = drawn
    leaves = (f1, f2) if weight is None else (f1, f2, weight)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_COLUMNS_CPU", columns)
        for backend in ("auto", "reference"):

            def run(a, b, w=None, backend=backend):
                options = {"kind": kind, "radius": radius, "padding": padding, "backend": backend}
                w = None if w is None else (w + w.mT) / 2
                return matching_score(a, b, weight=w, **options)

            found.append(values_and_grads(run, *leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_volume_entry_by_entry():
    f1, f2 = torch.randn(2, 2, 3, 4, 5, generator=seeded(), dtype=DOUBLE)
    weight = spd(3)
    volume = cost_volume(f1, f2, radius=(1, 2), weight=weight)
    assert volume.shape == (2, 3, 5, 4, 5)
    outside = cost_volume(f1, f2, radius=(1, 2), weight=weight, padding="exclude")
    edge = cost_volume(f1, f2, radius=(1, 2), weight=weight, padding="replicate")
    for b, k, m, i, j in product(*map(range, volume.shape)):
        row, column = i + k - 1, j + m - 2
        near = f2[b, :, min(max(row, 0), 3), min(max(column, 0), 4)]
        value = (f1[b, :, i, j] @ weight @ near).item()
        inside = 0 <= row < 4 and 0 <= column < 5
        assert volume[b, k, m, i, j].item() == pytest.approx(value if inside else 0.0)
        assert outside[b, k, m, i, j].item() == pytest.approx(value if inside else -torch.inf)
        assert edge[b, k, m, i, j].item() == pytest.approx(value)


def test_scores_are_what_they_say():
    f1, f2 = torch.randn(2, 1, 4, 3, 5, generator=seeded(), dtype=DOUBLE)
    weight = spd(4)
    q = CayleySPD.from_matrix(weight).factor().detach()
    g1, g2 = (torch.einsum("ij,bjhw->bihw", q, f) for f in (f1, f2))
    options = {"radius": 1, "padding": "replicate"}
    around = F.pad(g2, (1, 1, 1, 1), mode="replicate")
    for k, m in product(range(3), range(3)):
        there = around[:, :, k : k + 3, m : m + 5]
        cosine = matching_score(f1, f2, kind="cosine", weight=weight, **options)[:, k, m]
        torch.testing.assert_close(cosine, F.cosine_similarity(g1, there))
        wssd = matching_score(f1, f2, kind="wssd", weight=weight, **options)[:, k, m]
        torch.testing.assert_close(wssd, -(g1 - there).square().sum(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_volume_gradcheck(kind, padding):
    f1, f2 = torch.randn(2, 1, 2, 2, 3, generator=seeded(), dtype=DOUBLE).requires_grad_()
    weight = spd(2).requires_grad_()

    def run(a, b, w):
        w = (w + w.mT) / 2
        score = matching_score(a, b, kind=kind, radius=(1, 2), weight=w, padding=padding)
        return torch.where(score.isfinite(), score, 0.0)

    assert gradcheck(run, (f1, f2, weight))
    if padding == "exclude":
        assert gradgradcheck(run, (f1, f2, weight))
    assert gradcheck(run, (f1, f2.detach(), weight.detach()))
    assert gradcheck(run, (f1.detach(), f2, weight.detach()))


def test_swapping_the_images_reindexes_the_volume():
    f1, f2 = torch.randn(2, 1, 3, 6, 7, generator=seeded(), dtype=DOUBLE)
    for weight in (None, spd(3)):
        one = cost_volume(f1, f2, radius=2, weight=weight)
        other = cost_volume(f2, f1, radius=2, weight=weight)
        for k, m in product(range(5), range(5)):
            dy, dx = k - 2, m - 2
            here = one[:, k, m, max(0, -dy) : 6 - max(0, dy), max(0, -dx) : 7 - max(0, dx)]
            back = other[:, 4 - k, 4 - m]
            there = back[:, max(0, dy) : 6 - max(0, -dy), max(0, dx) : 7 - max(0, -dx)]
            torch.testing.assert_close(here, there)


def test_rotating_the_channels_changes_nothing():
    f1, f2 = torch.randn(2, 1, 5, 4, 4, generator=seeded(), dtype=DOUBLE)
    turn, weight = orthogonal(5), spd(5)
    turned = [torch.einsum("ij,bjhw->bihw", turn, f) for f in (f1, f2)]
    for kind in KINDS:
        plain = matching_score(f1, f2, kind=kind, radius=1)
        torch.testing.assert_close(matching_score(*turned, kind=kind, radius=1), plain)
        elliptic = matching_score(f1, f2, kind=kind, radius=1, weight=weight)
        carried = turn @ weight @ turn.T
        found = matching_score(*turned, kind=kind, radius=1, weight=(carried + carried.T) / 2)
        torch.testing.assert_close(found, elliptic)


@pytest.mark.parametrize("kind", KINDS)
def test_a_translation_is_found(kind):
    f1 = torch.randn(1, 16, 12, 14, generator=seeded())
    f1 = f1 / f1.norm(dim=1, keepdim=True)
    f2 = f1.roll((2, -1), (2, 3))  # two down, one to the left
    score = matching_score(f1, f2, kind=kind, radius=3, padding="exclude")
    best = score.flatten(1, 2).argmax(1)[0, 3:-3, 3:-3]
    assert (best == (2 + 3) * 7 + (-1 + 3)).all()
    flow = soft_argmax_flow(score, temperature=0.01)[0, :, 3:-3, 3:-3]
    torch.testing.assert_close(flow[0], torch.full_like(flow[0], -1.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(flow[1], torch.full_like(flow[1], 2.0), rtol=0, atol=1e-3)


def test_long_candidates_win_the_inner_product_alone():
    here = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    there = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.2, 1.6]]).T.reshape(1, 2, 1, 3)
    winners = {
        k: int(matching_score(here, there, kind=k, radius=(0, 1))[0, 0, :, 0, 1].argmax())
        for k in KINDS
    }
    assert winners == {"inner": 2, "cosine": 0, "wssd": 0}


def test_peer_unfold():
    f1, f2 = torch.randn(2, 2, 6, 9, 8, generator=seeded(), dtype=DOUBLE)
    around = F.unfold(f2, (3, 5), padding=(1, 2)).view(2, 6, 3, 5, 9, 8)
    peer = (f1[:, :, None, None] * around).sum(1)
    torch.testing.assert_close(cost_volume(f1, f2, radius=(1, 2)), peer)


def test_peer_raft():
    """RAFT's lookup at whole pixels: divided by the root of c, and the window transposed."""
    raft = pytest.importorskip("torchvision.models.optical_flow.raft")
    if not hasattr(raft, "CorrBlock"):
        pytest.skip("a stand-in for torchvision")
    f1, f2 = torch.randn(2, 1, 6, 16, 17, generator=seeded())
    block = raft.CorrBlock(num_levels=1, radius=2)
    block.build_pyramid(f1, f2)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(17.0), indexing="ij")
    peer = block.index_pyramid(torch.stack([columns, rows])[None])
    ours = cost_volume(f1, f2, radius=2) / 6**0.5
    torch.testing.assert_close(ours.transpose(1, 2).flatten(1, 2), peer, rtol=1e-4, atol=1e-4)


def test_degenerate_features():
    """Zero features, a constant image and one pixel: finite values, and no gradient from nothing."""
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    other = torch.randn(1, 3, 4, 4, generator=seeded())
    for a, b in ((zero, other), (other, zero)):
        (grad,) = torch.autograd.grad(matching_score(a, b, kind="cosine", radius=1).sum(), zero)
        assert torch.equal(grad, torch.zeros_like(grad))
        assert matching_score(a, b, kind="wssd", radius=1).isfinite().all()
    flat = torch.ones(1, 3, 4, 4)
    assert torch.equal(
        soft_argmax_flow(cost_volume(flat, flat, radius=1, padding="replicate")),
        torch.zeros(1, 2, 4, 4),
    )
    one = torch.randn(1, 3, 1, 1, generator=seeded())
    volume = cost_volume(one, one, radius=2, padding="exclude")
    assert volume.isfinite().sum() == 1
    assert torch.equal(soft_argmax_flow(volume), torch.zeros(1, 2, 1, 1))
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        volume = matching_score(empty, empty, kind="wssd", radius=1, padding="exclude")
        assert volume.shape == (shape[0], 3, 3, *shape[2:])
        soft_argmax_flow(volume).sum().backward()
        assert empty.grad.shape == shape


# --------------------------------------------------------------------------------------------------
# Read-out
# --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SIDES, SIDES, st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7]), st.floats(0.1, 10))
def test_soft_argmax_by_enumeration(h, w, u, v, temperature):
    cost = torch.randn(2, u, v, h, w, generator=seeded(u * v), dtype=DOUBLE)
    weights = (cost / temperature).exp()
    weights = weights / weights.sum((1, 2), keepdim=True)
    expected = torch.zeros(2, 2, h, w, dtype=DOUBLE)
    for k, m in product(range(u), range(v)):
        expected[:, 0] += weights[:, k, m] * (m - v // 2)
        expected[:, 1] += weights[:, k, m] * (k - u // 2)
    torch.testing.assert_close(soft_argmax_flow(cost, temperature=temperature), expected)
    torch.testing.assert_close(soft_argmax_flow(cost + 7, temperature=temperature), expected)


def test_soft_argmax_gradcheck():
    cost = torch.randn(1, 3, 3, 2, 2, generator=seeded(), dtype=DOUBLE)
    cost[0, 0] = -torch.inf
    leaf = cost[:, 1:].clone().requires_grad_()
    run = lambda x: soft_argmax_flow(torch.cat([cost[:, :1], x], 1), temperature=0.5)  # noqa: E731
    assert gradcheck(run, (leaf,))


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

MAPS = {"f1": torch.randn(1, 3, 4, 5), "f2": torch.randn(1, 3, 4, 5)}
NAN = torch.full((1, 3, 4, 5), float("nan"))


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "f1", {"f1": [1.0]}),
        (TypeError, "f1", {"f1": torch.ones(1, 3, 4, 5, dtype=torch.int64)}),
        (ValueError, "f1", {"f1": torch.ones(3, 4, 5)}),
        (ValueError, "f1", {"f1": NAN}),
        (ValueError, "f1", {"f1": torch.ones(1, 0, 4, 5), "f2": torch.ones(1, 0, 4, 5)}),
        (ValueError, "f2", {"f2": torch.randn(1, 3, 4, 6)}),
        (ValueError, "f2", {"f2": torch.randn(1, 2, 4, 5)}),
        (ValueError, "f2", {"f2": NAN}),
        (ValueError, "f2", {"f2": torch.ones(1, 3, 4, 5, device="meta")}),
        (ValueError, "radius", {"radius": -1}),
        (ValueError, "radius", {"radius": (1, 2, 3)}),
        (TypeError, "radius", {"radius": 1.0}),
        (TypeError, "radius", {"radius": True}),
        (TypeError, "radius", {"radius": "12"}),
        (ValueError, "weight", {"weight": torch.eye(2)}),
        (ValueError, "weight", {"weight": torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])}),
        (ValueError, "weight", {"weight": torch.full((3, 3), torch.inf)}),
        (TypeError, "weight", {"weight": torch.eye(3, dtype=torch.int64)}),
        (ValueError, "padding", {"padding": "reflect"}),
        (ValueError, "backend", {"backend": "fast"}),
    ],
)
def test_volumes_reject(error, name, arguments):
    for function in (cost_volume, matching_score):
        with pytest.raises(error, match=f"^{name}: expected"):
            function(**{**MAPS, **arguments})


def test_scores_reject():
    with pytest.raises(ValueError, match=r"^kind: expected"):
        matching_score(**MAPS, kind="ssd")
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    cost_volume(**MAPS, weight=indefinite)  # the plain bilinear form has no need of a norm
    for kind in ("cosine", "wssd"):
        with pytest.raises(ValueError, match=r"^weight: expected no negative"):
            matching_score(**MAPS, kind=kind, weight=indefinite)
        matching_score(**MAPS, kind=kind, weight=torch.diag(torch.tensor([1.0, 1.0, 0.0])))


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "skew", lambda: cayley([[0.0]])),
        (TypeError, "skew", lambda: cayley(torch.zeros(2, 2, dtype=torch.int64))),
        (ValueError, "skew", lambda: cayley(torch.zeros(2, 3))),
        (ValueError, "skew", lambda: cayley(torch.eye(2))),
        (ValueError, "skew", lambda: cayley(torch.full((2, 2), torch.nan))),
        (ValueError, "backend", lambda: cayley(torch.zeros(2, 2), backend="fast")),
        (ValueError, "rotation", lambda: inverse_cayley(torch.ones(2, 2))),
        (ValueError, "rotation", lambda: inverse_cayley(-torch.eye(2))),
        (ValueError, "rotation", lambda: inverse_cayley(torch.diag(torch.tensor([1.0, -1.0])))),
        (ValueError, "rotation", lambda: signature_fix(torch.ones(2, 2))),
        (ValueError, "rotation", lambda: signature_fix(torch.eye(2)[None])),
        (TypeError, "t", lambda: atan_positive(torch.ones(2, dtype=torch.int64))),
        (ValueError, "t", lambda: atan_positive(torch.tensor([torch.inf]))),
        (ValueError, "value", lambda: inverse_atan_positive(torch.tensor([1.0, 0.0]))),
        (TypeError, "value", lambda: inverse_atan_positive(1.0)),
        (ValueError, "channels", lambda: CayleySPD(0)),
        (TypeError, "channels", lambda: CayleySPD(2.0)),
        (ValueError, "init", lambda: CayleySPD(2, init="zeros")),
        (ValueError, "weight", lambda: CayleySPD.from_matrix(-torch.eye(2))),
        (ValueError, "weight", lambda: CayleySPD.from_matrix(torch.ones(2, 2))),
        (ValueError, "weight", lambda: CayleySPD.from_matrix(torch.ones(2, 3))),
        (ValueError, "weight", lambda: CayleySPD.from_matrix(torch.tensor([[1.0, 1], [0, 1]]))),
        (ValueError, "skew", lambda: CayleySPDParametrization()(torch.zeros(2), torch.zeros(2))),
        (ValueError, "cost", lambda: soft_argmax_flow(torch.zeros(3, 3, 2, 2))),
        (TypeError, "cost", lambda: soft_argmax_flow(torch.zeros(1, 3, 3, 2, 2).long())),
        (ValueError, "cost", lambda: soft_argmax_flow(torch.zeros(1, 2, 3, 2, 2))),
        (ValueError, "cost", lambda: soft_argmax_flow(torch.full((1, 3, 3, 2, 2), -torch.inf))),
        (ValueError, "cost", lambda: soft_argmax_flow(torch.full((1, 3, 3, 2, 2), torch.nan))),
        (
            ValueError,
            "temperature",
            lambda: soft_argmax_flow(torch.zeros(1, 3, 3, 2, 2), temperature=0),
        ),
    ],
)
def test_the_rest_rejects(error, name, call):
    with pytest.raises(error, match=rf"^{name}\b.*: expected"):
        call()


# --------------------------------------------------------------------------------------------------
# Precision, autocast, compile, memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    f1, f2 = torch.randn(2, 1, 4, 5, 6, generator=seeded()).to(dtype)
    metric = CayleySPD.from_matrix(spd(4).float())
    leaf = f1.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found = [matching_score(leaf, f2, kind=k, radius=1, weight=metric()) for k in KINDS]
        flow = soft_argmax_flow(found[0].to(dtype))
    wide = [
        matching_score(f1.float(), f2.float(), kind=k, radius=1, weight=metric()) for k in KINDS
    ]
    assert flow.dtype == torch.float32
    for got, wanted in zip(found, wide, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    sum(x.sum() for x in found).backward()
    assert leaf.grad.dtype == dtype
    assert metric.skew.grad.abs().max() > 0
    assert cost_volume(f1, f2.double()).dtype == DOUBLE
    assert cayley(skew(3, 3).to(dtype)).dtype == torch.float32
    assert atan_positive(torch.zeros(2, dtype=dtype)).dtype == torch.float32


def test_compile():
    f1, f2 = torch.randn(2, 1, 4, 5, 6, generator=seeded())
    free = torch.randn(6, generator=seeded(1)), torch.randn(4, generator=seeded(2))

    def run(a, b, s, t):
        weight = CayleySPDParametrization()(s, t)
        score = matching_score(a, b, kind="wssd", radius=1, weight=weight, padding="exclude")
        return soft_argmax_flow(score).square().sum() + cost_volume(a, b, weight=weight).sum()

    found = []
    for function in (torch.compile(run, backend="aot_eager"), run):
        leaves = [x.clone().requires_grad_() for x in (f1, f2, *free)]
        value = function(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


LARGE = """
import torch
from affnb.matching import CayleySPD, cost_volume

def peak():  # bytes; the high-water mark of this process's resident memory
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)

def step(c, h, w):
    f1, f2 = torch.randn(2, 1, c, h, w).unbind(0)
    f1, f2 = f1.requires_grad_(), f2.requires_grad_()
    metric = CayleySPD(c)
    before = peak()
    volume = cost_volume(f1, f2, weight=metric())
    volume.backward(torch.ones_like(volume))
    assert f1.grad.isfinite().all() and f2.grad.any() and metric.t.grad.any()
    return before, peak()

step(4, 16, 16)
print(*step(64, 120, 160))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_large_volume_in_bounded_memory():
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    one_map, volume = 64 * 120 * 160 * 4, 81 * 120 * 160 * 4
    # The volume and its gradient, and a dozen maps; an unfolded map alone would be 81 of them.
    assert after - before < 2 * volume + 12 * one_map


# --------------------------------------------------------------------------------------------------
# The chapter's data
# --------------------------------------------------------------------------------------------------


def test_motorcycle_pair_has_true_disparity():
    pair = motorcycle_stereo()
    assert pair.left.shape == pair.right.shape == (3, 125, 185)
    assert pair.disparity[pair.valid].min() > 1
    assert pair.disparity[pair.valid].max() < 16
    # What the disparity points to looks like where it starts, and the mirrored one does not.
    rows, columns = torch.meshgrid(torch.arange(125), torch.arange(185), indexing="ij")
    errors = []
    for sign in (-1, 1):
        there = (columns + sign * pair.disparity).round().long()
        ok = pair.valid & (columns >= 16) & (columns < 169)
        found = pair.right[:, rows[ok], there[ok]]
        errors.append((pair.left[:, ok] - found).abs().mean().item())
    assert errors[0] < 0.6 * errors[1]
    with pytest.raises(ValueError, match=r"^factor: expected"):
        motorcycle_stereo(0)


def test_warped_photographs_follow_their_flow():
    pairs_ = warped_photographs(3, reach=(4, 2), generator=seeded())
    again = warped_photographs(3, reach=(4, 2), generator=seeded())
    assert all(torch.equal(x, y) for x, y in zip(pairs_, again, strict=True))
    assert pairs_.flow[:, 0].abs().max() <= 4
    assert pairs_.flow[:, 1].abs().max() <= 2
    h, w = pairs_.flow.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = torch.stack([columns + pairs_.flow[:, 0], rows + pairs_.flow[:, 1]], -1)
    inside = ((at >= 0) & (at <= torch.tensor([w - 1, h - 1]))).all(-1)
    at = 2 * at / torch.tensor([w - 1.0, h - 1.0]) - 1
    found = F.grid_sample(pairs_.second, at, mode="bicubic", align_corners=True)
    error = (found - pairs_.first).abs().mean(1)[inside].mean()
    plain = (pairs_.second - pairs_.first).abs().mean(1)[inside].mean()
    assert error < 0.2 * plain
    assert len(warped_photographs(0).first) == 0
    for name, value in {"reach": (-1, 0), "size": (1, 8), "height": 1}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            warped_photographs(1, **{name: value})


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, small and on a stand-in for torchvision
# --------------------------------------------------------------------------------------------------


class FakeKitti:
    """What torchvision's KittiFlow offers: 15 pairs of two sizes, the second 3 pixels to the left."""

    def __init__(self, root, split, transforms):
        assert (root, split) == ("somewhere", "train")
        self.transforms = transforms

    def __len__(self):
        return 15

    def __getitem__(self, index):
        h, w = 138 + index % 2, 250
        picture = torch.rand(3, h, w, generator=seeded(index)).mul(255).byte()
        flow, valid = torch.zeros(2, h, w), torch.ones(h, w)
        flow[0], valid[:, :9] = -3, 0
        return self.transforms(picture, picture.roll(-3, 2), flow.numpy(), valid.numpy())


class FakeCorrelation(nn.Module):
    """The part of RAFT's correlation that the chapter replaces."""

    def __init__(self, *, num_levels, radius):
        super().__init__()
        assert (num_levels, radius) == (4, 4)

    def build_pyramid(self, fmap1, fmap2):
        assert fmap1.shape == fmap2.shape
        self.correlation = (fmap1 * fmap2).mean(1, keepdim=True)


class FakeRaft(nn.Module):
    """Two flows for a pair, the second the better one, both from the correlation."""

    def __init__(self):
        super().__init__()
        self.features, self.norm = nn.Conv2d(3, 256, 8, stride=8), nn.BatchNorm2d(256)
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, a, b):
        assert not self.training
        assert a.shape[-2] % 8 == a.shape[-1] % 8 == 0
        self.corr_block.build_pyramid(*(self.norm(self.features(x)) for x in (a, b)))
        flow = self.head(self.corr_block.correlation).repeat_interleave(8, 2)
        flow = flow.repeat_interleave(8, 3)
        return [flow / 2, flow]


def test_full_profile(monkeypatch):
    def raft_large(weights):
        assert weights == "chairs and things"
        torch.manual_seed(0)
        return FakeRaft()

    pretrained = types.SimpleNamespace(C_T_V2="chairs and things")
    fake_modules(
        monkeypatch,
        {
            "torchvision": {},
            "torchvision.datasets": {"KittiFlow": FakeKitti},
            "torchvision.models": {},
            "torchvision.models.optical_flow": {
                "raft_large": raft_large,
                "Raft_Large_Weights": pretrained,
            },
            "torchvision.models.optical_flow.raft": {"CorrBlock": FakeCorrelation},
            "torchvision.transforms": {},
            "torchvision.transforms.functional": {"pil_to_tensor": lambda x: x},
        },
    )
    trainings = []

    def followed(real, step, batches, optimizer, **options):
        groups = [
            dict(g, params=sum(p.numel() for p in g["params"])) for g in optimizer.param_groups
        ]
        history = real(step, batches, optimizer, **options)
        trainings.append((groups, len(history["loss"]), options["max_grad_norm"]))
        return history

    names, verdicts = run_cells(
        "matching/learnable_cost_volume",
        monkeypatch,
        define=("share_right", "Matcher", "in_words"),
        small={
            "pixel_steps": "2",
            "before_steps": "0",
            "after_steps": "3",
            "(288, 960)": "(136, 240)",
            "y + 288": "y + 136",
            "x + 960": "x + 240",
            "image_seeds": "[first_seed + 20, first_seed + 21]",
        },
        fit=followed,
        data_root="somewhere",
        first_seed=0,  # of a cell that does not run
    )

    assert {id.split(":")[1] for id in verdicts} == {
        *(f"pixels-{x}" for x in ("clean", "illumination", "noise", "patch")),
        *(f"network-{x}" for x in ("clean", "disturbed", "conv")),
    }
    # For each seed: patches, held and learned; then RAFT from its pretrained state, three times.
    groups, steps, clipping = zip(*trainings, strict=True)
    assert steps == (2, 2, 3, 3, 3) * 2
    assert clipping == (1.0,) * 10
    rates = [[g["initial_lr"] for g in each] for each in groups]
    assert rates == [[0.1], [0.1, 0.1], [1e-5], [1e-5, 1e-3], [1e-5, 1e-3]] * 2
    sizes = [[g["params"] for g in each] for each in groups]
    raft = sum(p.numel() for p in names["model"].raft.parameters())
    assert sizes[:2] == [[1], [1, 27 * 28 // 2]]
    assert sizes[2:5] == [[raft], [raft, 256 * 257 // 2], [raft, 256**2]]
    model = names["model"]
    assert isinstance(model.raft, FakeRaft)
    assert model.raft.norm.num_batches_tracked == 0  # frozen
    assert all(0 < e < 100 for by_name in names["errors"].values() for e in by_name.values())
    parts = [set(names["kitti"](part).indices) for part in ("train", "test")]
    assert parts == [set(range(15)) - {0, 5, 10}, {0, 5, 10}]
    assert names["kitti"]("train")[0][0].shape == (3, 136, 240)

    # At the identity the correlation is that of torchvision; another metric is applied to one map.
    a, b = torch.randn(2, 1, 256, 3, 4, generator=seeded())
    model = names["RaftMatcher"]()
    block = model.raft.corr_block
    for stretch, expected in ((0.0, 1), (1.0, 3)):  # eigenvalues 1 and 3
        with torch.no_grad():
            model.metric.t.fill_(stretch)
            block.build_pyramid(a, b)
        torch.testing.assert_close(block.correlation, expected * (a * b).mean(1, keepdim=True))
