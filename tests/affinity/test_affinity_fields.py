"""Affinity fields: pairs, divergences, terms, the adaptive loss, and the measures."""

import importlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.morphology import erosion, footprint_rectangle
from torch import distributed as dist
from torch.autograd import gradcheck, gradgradcheck

from affnb.affinity.affinity_fields import (
    AdaptiveAffinityFieldLoss,
    affinity_field_terms,
    bernoulli_kl_with_logits,
    boundary_scores,
    class_logits,
    instance_iou,
    neighbour_offsets,
    shifted_pair,
)
from affnb.measure import peak_bytes
from tests.fake_torchvision import run_on_voc
from tests.processes import message_of, rows_of, run

module = importlib.import_module("affnb.affinity.affinity_fields")

DOUBLE = torch.float64
IGNORE = 255


def make(shape, seed=0, *, scale=2.0, ignored=0.15, dtype=DOUBLE):
    """Logits and labels of a random batch (B, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=DOUBLE)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    return logits.to(dtype), labels


def gradients(function, *leaves):
    """A scalar and its gradients in fresh leaves."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def weighed_sum(terms):
    """A scalar that every term enters with a weight of its own."""
    grouping, separating, *_ = terms
    weights = torch.linspace(0.5, 1.5, len(grouping), dtype=grouping.dtype)
    return (weights * grouping).sum() + (weights.flip(0) * separating).sum()


# --------------------------------------------------------------------------------------------------
# Pairs and divergences
# --------------------------------------------------------------------------------------------------


def test_offsets_are_symmetric_and_distinct():
    for kind, number in (("ring8", lambda s: 8), ("full", lambda s: (2 * s + 1) ** 2 - 1)):
        for size in (1, 2, 3):
            found = neighbour_offsets(size, kind)
            assert len(set(found)) == len(found) == number(size)
            assert (0, 0) not in found
            assert {(-dy, -dx) for dy, dx in found} == set(found)
            assert max(max(abs(dy), abs(dx)) for dy, dx in found) == size
    assert neighbour_offsets(1, "full") == neighbour_offsets(1)


def test_shifted_pair_is_views_of_the_right_pixels():
    x = torch.arange(20).view(4, 5)
    for dy, dx in neighbour_offsets(2, "full"):
        centre, neighbour = shifted_pair(x, dy, dx)
        expected = [
            (int(x[i, j]), int(x[i + dy, j + dx]))
            for i in range(4)
            for j in range(5)
            if 0 <= i + dy < 4 and 0 <= j + dx < 5
        ]
        assert (
            list(zip(centre.flatten().tolist(), neighbour.flatten().tolist(), strict=True))
            == expected
        )
        assert centre.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shifted_pair(x, 7, 0)[0].shape == (0, 5)


def test_class_logits_are_those_of_the_softmax():
    z, _ = make((2, 5, 3, 4))
    torch.testing.assert_close(class_logits(z), z.softmax(1).logit(), rtol=1e-9, atol=1e-9)
    assert gradcheck(class_logits, z[:1, :, :1].clone().requires_grad_())
    extreme = torch.tensor([300.0, -300.0, 299.0]).view(1, 3, 1, 1)
    expected = [math.log1p(0) + 1.0, -600 - math.log1p(math.exp(-1)), -1.0]
    torch.testing.assert_close(class_logits(extreme).flatten().tolist(), expected)


def test_kl_is_the_printed_one_and_keeps_its_order():
    p, q = (
        torch.rand(50, dtype=DOUBLE, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    printed = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(bernoulli_kl_with_logits(p.logit(), q.logit()), printed)
    nine, five = torch.tensor(0.9).logit(), torch.tensor(0.5).logit()
    assert abs(bernoulli_kl_with_logits(nine, five) - bernoulli_kl_with_logits(five, nine)) > 0.1
    b, a = torch.randn(2, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    b[0] = 0.0  # where the signs are chosen
    _, at_b, at_a = gradients(lambda b, a: bernoulli_kl_with_logits(b, a).sum(), b, a)
    torch.testing.assert_close(at_a, a.sigmoid() - b.sigmoid())
    torch.testing.assert_close(at_b, b.sigmoid() * (1 - b.sigmoid()) * (b - a))


def test_kl_is_finite_and_accurate_at_the_ends():
    b, a = torch.tensor([100.0, -100.0, 9.0]), torch.tensor([-100.0, 100.0, 8.0])
    value, at_b, at_a = gradients(lambda b, a: bernoulli_kl_with_logits(b, a).sum(), b, a)
    assert torch.isfinite(value)
    torch.testing.assert_close(at_a, a.sigmoid() - b.sigmoid())
    assert at_b.isfinite().all()
    near = bernoulli_kl_with_logits(b[2].double(), a[2].double()).float()
    torch.testing.assert_close(bernoulli_kl_with_logits(b[2], a[2]), near, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------
# Terms: fast against reference, and against what others compute
# --------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {
        "size": st.sampled_from([1, 2, 3, 5]),
        "margin": st.sampled_from([0.5, 3.0]),
        "same": st.sampled_from(["channel", "class"]),
        "neighbourhood": st.sampled_from(["ring8", "full"]),
        "clip": st.sampled_from([None, 1e-4, 0.05]),
        "require_opposite": st.booleans(),
    }
)
SHAPES = st.tuples(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([2, 3, 5]),
    st.sampled_from([1, 2, 7, 11]),
    st.sampled_from([1, 2, 5, 13]),
)


# As it is; and cut into single images and bands of a few rows.
@pytest.mark.parametrize("block", [2**14, 8])
@settings(max_examples=60, deadline=None)
@given(
    SHAPES, OPTIONS, st.integers(0, 10**6), st.sampled_from(["plain", "channels last", "strided"])
)
def test_terms_equal_reference(block, shape, options, seed, layout):
    logits, labels = make(shape, seed)
    if layout == "channels last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        logits = logits.repeat_interleave(2, 3)[..., ::2]
        labels = labels.repeat_interleave(3, 1)[:, ::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMALL_BLOCK", block)
        patch.setattr(module, "_CPU_BLOCK", 2 * block)
        fast = affinity_field_terms(logits, labels, **options)
        fast_grad = gradients(
            lambda z: weighed_sum(affinity_field_terms(z, labels, **options)), logits
        )
    slow = affinity_field_terms(logits, labels, **options, backend="reference")
    slow_grad = gradients(
        lambda z: weighed_sum(affinity_field_terms(z, labels, **options, backend="reference")),
        logits,
    )
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-8, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(SHAPES, OPTIONS, st.integers(0, 10**6))
def test_terms_equal_loops_over_pixels(shape, options, seed):
    logits, labels = make(shape, seed)
    got = affinity_field_terms(logits, labels, **options)
    p, y = logits.softmax(1).numpy(), labels.numpy()
    batch, classes, height, width = shape
    sums, counts = np.zeros((2, classes)), np.zeros((2, classes), int)

    def outside(b, i, j):
        return not (0 <= i < height and 0 <= j < width) or y[b, i, j] == IGNORE

    clip = options["clip"] or 0.0
    for b, i, j in np.ndindex(batch, height, width):
        for dy, dx in neighbour_offsets(options["size"], options["neighbourhood"]):
            if outside(b, i, j) or outside(b, i + dy, j + dx):
                continue
            if options["require_opposite"] and outside(b, i - dy, j - dx):
                continue
            for c in range(classes):
                here, there = y[b, i, j] == c, y[b, i + dy, j + dx] == c
                q, t = p[b, c, i, j], p[b, c, i + dy, j + dx]
                q, n_q, t, n_t = (max(clip, x) for x in (q, 1 - q, t, 1 - t))
                d = t * math.log(t / q) + n_t * math.log(n_t / n_q)
                if here != there:
                    sums[1, c] += max(0.0, options["margin"] - d)
                    counts[1, c] += 1
                elif options["same"] == "channel" or here:
                    sums[0, c] += d
                    counts[0, c] += 1
    means = torch.from_numpy(sums / counts.clip(1))
    torch.testing.assert_close(torch.stack(got[:2]), means, rtol=1e-8, atol=1e-10)
    assert torch.stack(got[2:]).tolist() == counts.tolist()


def published(prob, labels, size, margin, w_edge, w_not_edge, *, opposite=True):
    """What the authors' TensorFlow code computes, written again in NumPy: losses of all entries.

    Arrays are padded and shifted; a pair is masked where its centre, its neighbour, *or the pixel
    opposite to the neighbour* is ignored or outside; the weights are those of the centre's class.
    ``opposite=False`` leaves the third condition out.
    """
    height, width, classes = prob.shape
    frame = ((size, size), (size, size))
    bad = labels >= classes
    padded_bad = np.pad(bad, frame, constant_values=True)
    one_hot = (labels[..., None] == np.arange(classes)).astype(float)
    padded_hot = np.pad(one_hot, (*frame, (0, 0)), constant_values=255)
    padded_prob = np.pad(prob, (*frame, (0, 0)))

    def clip(x):
        return x.clip(1e-4, 1.0)

    edges, not_edges = [], []
    for dy in (0, size, 2 * size):
        for dx in (0, size, 2 * size):
            if dy == dx == size:
                continue

            def window(x, dy=dy, dx=dx):
                return x[dy : dy + height, dx : dx + width]

            oy, ox = 2 * size - dy, 2 * size - dx
            drop = bad | window(padded_bad)
            if opposite:
                drop |= padded_bad[oy : oy + height, ox : ox + width]
            keep = ~drop
            other = window(padded_prob)
            d = clip(other) * np.log(clip(other) / clip(prob))
            d += clip(1 - other) * np.log(clip(1 - other) / clip(1 - prob))
            edge = (window(padded_hot) != one_hot) & keep[..., None]
            not_edge = ~edge & keep[..., None]
            weight_edge, weight_not = (one_hot @ w for w in (w_edge, w_not_edge))
            edges.append((np.maximum(0, margin - d) * weight_edge[..., None])[edge])
            not_edges.append((d * weight_not[..., None])[not_edge])
    return np.concatenate(edges), np.concatenate(not_edges)


def with_ignored_border(seed, shape):
    """Random logits and labels; ignored pixels anywhere, and at two sides of the frame."""
    logits, labels = make(shape, seed, scale=4.0, ignored=0.1)
    generator = torch.Generator().manual_seed(seed)
    top, left = (torch.rand(n, generator=generator) < 0.5 for n in (shape[3], shape[2]))
    labels[:, 0, top] = IGNORE
    labels[:, left, -1] = IGNORE
    return logits, labels


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([2, 5, 13]),
    st.sampled_from([1, 4, 11]),
)
def test_terms_equal_the_published_code(size, opposite, seed, height, width):
    """The published rule with ``require_opposite``; by default the same without its third condition."""
    logits, labels = with_ignored_border(seed, (1, 4, height, width))
    prob = logits.softmax(1)[0].permute(1, 2, 0).numpy()
    ones = np.ones(4)
    edge, not_edge = published(prob, labels[0].numpy(), size, 3.0, ones, ones, opposite=opposite)
    grouping, separating, n_grouping, n_separating = affinity_field_terms(
        logits, labels, size=size, clip=1e-4, require_opposite=opposite
    )
    assert int(n_grouping.sum()) == len(not_edge)
    assert int(n_separating.sum()) == len(edge)
    np.testing.assert_allclose((grouping * n_grouping).sum(), not_edge.sum(), rtol=1e-9)
    np.testing.assert_allclose((separating * n_separating).sum(), edge.sum(), rtol=1e-9)


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_published_code(opposite, seed):
    sizes, classes = (1, 2, 3), 4
    logits, labels = with_ignored_border(seed, (1, classes, 12, 10))
    criterion = AdaptiveAffinityFieldLoss(
        classes, sizes, class_reduction="pairs", clip=1e-4, require_opposite=opposite
    ).double()
    with torch.no_grad():
        criterion.eta.normal_(generator=torch.Generator().manual_seed(1))
    w_not_edge, w_edge = criterion.size_weights().numpy()
    prob = logits.softmax(1)[0].permute(1, 2, 0).numpy()
    y = labels[0].numpy()
    expected = 0.0
    for k, size in enumerate(sizes):
        weights = w_edge[:, k], w_not_edge[:, k]
        parts = published(prob, y, size, 3.0, *weights, opposite=opposite)
        expected += sum(part.mean() for part in parts)
    np.testing.assert_allclose(criterion(logits, labels).item(), expected, rtol=1e-9)


def test_the_opposite_pixel_matters_to_the_published_mask_only():
    """Ignoring one pixel drops the pairs that touch it; under the published mask, others as well."""
    logits, labels = make((1, 3, 9, 9), ignored=0.0)
    ignored = labels.clone()
    ignored[0, 4, 4] = IGNORE

    def pairs(y, opposite):
        *_, n_grouping, n_separating = affinity_field_terms(
            logits, y, size=1, require_opposite=opposite
        )
        return int(n_grouping[0] + n_separating[0])

    assert pairs(labels, False) == 2 * (8 * 9 * 2 + 2 * 8 * 8)
    assert pairs(labels, False) - pairs(ignored, False) == 16  # 8 neighbours, both orders
    assert pairs(labels, True) == 8 * 7 * 7 + 2 * 4 * 7  # all in the middle; along the frame only
    assert pairs(labels, True) - pairs(ignored, True) == 16 + 8


def test_number_of_pairs():
    """The count that geometry gives, and the two identities of the channel reading."""
    logits, labels = make((1, 3, 9, 7), ignored=0.0)
    for s in (1, 2, 3):
        *_, n_grouping, n_separating = affinity_field_terms(logits, labels, size=s)
        pairs = 2 * ((9 - s) * 7 + 9 * (7 - s) + 2 * (9 - s) * (7 - s))
        unequal = sum(
            int(torch.ne(*shifted_pair(labels, dy, dx)).sum()) for dy, dx in neighbour_offsets(s)
        )
        assert int(n_separating.sum()) == 2 * unequal
        assert int(n_grouping.sum()) == 3 * pairs - 2 * unequal
        assert ((n_grouping + n_separating) == pairs).all()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["ring8", "full"])
def test_boundary_pixels_are_what_erosion_removes(size, kind):
    labels = torch.randint(3, (14, 14), generator=torch.Generator().manual_seed(size))
    labels = labels.repeat_interleave(2, 0).repeat_interleave(2, 1)
    footprint = np.zeros((2 * size + 1, 2 * size + 1), np.uint8)
    for dy, dx in [(0, 0), *neighbour_offsets(size, kind)]:
        footprint[size + dy, size + dx] = 1
    if kind == "full":
        assert (footprint == footprint_rectangle((2 * size + 1,) * 2)).all()
    survives = np.zeros(labels.shape, bool)
    for c in range(3):
        survives |= erosion((labels == c).numpy().astype(np.uint8), footprint).astype(bool)
    inner = (slice(size, -size),) * 2  # erosion has another rule at the image's frame
    boundary = torch.zeros(labels.shape, dtype=torch.bool)
    for dy, dx in neighbour_offsets(size, kind):
        centre, _ = shifted_pair(boundary, dy, dx)
        centre |= torch.ne(*shifted_pair(labels, dy, dx))
    assert (boundary.numpy()[inner] == ~survives[inner]).all()


def test_line_has_more_boundary_when_the_square_is_full():
    line = torch.zeros(1, 11, 11, dtype=torch.long)
    line[:, :, 5] = 1
    for kind, expected in (("full", 55), ("ring8", 33)):
        boundary = torch.zeros(11, 11, dtype=torch.bool)
        for dy, dx in neighbour_offsets(2, kind):
            shifted_pair(boundary, dy, dx)[0].logical_or_(torch.ne(*shifted_pair(line[0], dy, dx)))
        assert int(boundary.sum()) == expected


# --------------------------------------------------------------------------------------------------
# Invariances, gradients, numbers of bits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", ["channel", "class"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradcheck(same, clip):
    logits, labels = make((2, 3, 4, 3), seed=3)
    options = {"size": 1, "margin": 1.5, "same": same, "clip": clip}

    def function(z):
        return affinity_field_terms(z, labels, **options)[:2]

    assert gradcheck(function, logits.requires_grad_())


def test_reference_differentiates_twice_and_auto_refuses():
    logits, labels = make((1, 2, 2, 3), ignored=0.0)

    def reference(z):
        return affinity_field_terms(z, labels, size=1, backend="reference")[0]

    assert gradgradcheck(reference, logits.clone().requires_grad_())
    leaf = logits.clone().requires_grad_()
    value = affinity_field_terms(leaf, labels, size=1)[0].sum()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_invariances():
    logits, labels = make((2, 4, 8, 6), seed=5)
    base = affinity_field_terms(logits, labels, size=2)

    def close(a, b):
        return torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    shift = torch.randn(2, 1, 8, 6, dtype=DOUBLE)
    close(affinity_field_terms(logits + shift, labels, size=2), base)
    for flip in ((-1,), (-2,)):
        close(affinity_field_terms(logits.flip(flip), labels.flip(flip), size=2), base)
    close(affinity_field_terms(logits.mT, labels.mT, size=2), base)
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.where(labels == IGNORE, IGNORE, order.argsort()[labels.clamp(max=3)])
    close(affinity_field_terms(logits[:, order], renamed, size=2), tuple(x[order] for x in base))
    close(affinity_field_terms(logits, labels.to(torch.uint8), size=2), base)


def test_ignored_pixels_do_not_matter():
    logits, labels = make((2, 3, 9, 8), seed=6)
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2, 3))
    other = torch.where((labels == IGNORE)[:, None], 50 * torch.randn_like(logits), logits)
    torch.testing.assert_close(criterion(logits, labels), criterion(other, labels))
    _, grad = gradients(lambda z: criterion(z, labels), logits)
    assert (grad.movedim(1, -1)[labels == IGNORE] == 0).all()
    assert (grad.movedim(1, -1)[labels != IGNORE] != 0).any()


@pytest.mark.parametrize("size", [1, 2])
def test_pixels_beyond_the_border_do_not_exist(size):
    """Padding an image by ignored pixels changes nothing, whatever is predicted there."""
    logits, labels = make((1, 3, 6, 5), seed=8)
    padded = F.pad(logits, [3] * 4, value=0.0) + F.pad(torch.zeros_like(logits), [3] * 4, value=9.0)
    around = F.pad(labels, [3] * 4, value=IGNORE)
    for opposite in (False, True):
        options = {"size": size, "require_opposite": opposite}
        torch.testing.assert_close(
            affinity_field_terms(padded, around, **options),
            affinity_field_terms(logits, labels, **options),
            rtol=1e-9, atol=1e-12,
        )  # fmt: skip


def test_no_tie_is_broken():
    """Where all predictions are equal, the separating gradient is 0: it amplifies, it cannot begin."""
    labels = torch.tensor([[[0, 1, 2, 0]]])
    _, grad = gradients(
        lambda z: affinity_field_terms(z, labels, size=1)[1].sum(),
        torch.zeros(1, 3, 1, 4, dtype=DOUBLE),
    )
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits, labels = make((2, 3, 9, 8), dtype=dtype)
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2))
    value, grad = gradients(lambda z: criterion(z, labels), logits)
    exact, exact_grad = gradients(lambda z: criterion(z, labels), logits.double())
    assert grad.dtype == dtype
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=1e-5)


def test_autocast_and_extreme_logits():
    logits, labels = make((2, 3, 6, 6), scale=100.0, dtype=torch.float32)
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2))
    value, grad = gradients(lambda z: criterion(z, labels), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = gradients(lambda z: criterion(z, labels), logits)
    torch.testing.assert_close(under, (value, grad), rtol=0, atol=0)
    exact = gradients(lambda z: criterion(z, labels), logits.double())
    torch.testing.assert_close((value.double(), grad.double()), exact, rtol=1e-4, atol=1e-5)
    assert grad.abs().max() > 0
    huge = gradients(lambda z: criterion(z, labels), 1e30 * logits.sign())
    assert all(x.isfinite().all() for x in huge)


def test_torch_compile():
    logits, labels = make((1, 3, 6, 6), dtype=torch.float32)
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2))
    eager = gradients(lambda z: criterion(2 * z, labels), logits)
    compiled = torch.compile(lambda z: criterion(2 * z, labels), backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, logits), eager)


def test_memory():
    """Forward and backward hold at most three times the logits; the unfolded copy would be 16 times."""
    logits, labels = make((4, 8, 96, 96), dtype=torch.float32, scale=1.0)
    logits.requires_grad_()
    criterion = AdaptiveAffinityFieldLoss(8, (1, 2))
    criterion(logits, labels)

    def step():
        logits.grad = None
        criterion(logits, labels).backward()

    step()
    assert peak_bytes(step) < 3 * logits.nbytes


LARGE = """
import torch
from affnb.affinity.affinity_fields import AdaptiveAffinityFieldLoss

def peak():  # bytes; the high-water mark of this process's resident memory
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)

def step(batch, side):
    logits = torch.randn(batch, 21, side, side).requires_grad_()
    labels = torch.randint(0, 21, (batch, side // 16, side // 16))
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[:, :5] = 255
    before = peak()
    AdaptiveAffinityFieldLoss(21, (1, 2))(logits, labels).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()
    return before, peak(), logits.nbytes

step(1, 32)
print(*step(16, 240))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_large_batch_in_bounded_memory():
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    before, after, logits = map(int, run.stdout.split())
    assert after - before < 3 * logits


# --------------------------------------------------------------------------------------------------
# Degenerate input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["adversarial", "uniform", "hard_max", "entropic"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "pairs"])
@pytest.mark.parametrize(
    ("shape", "label"),
    [((2, 3, 5, 5), IGNORE), ((1, 3, 1, 1), 1), ((0, 3, 5, 5), 0), ((1, 3, 0, 4), 0)],
)
def test_no_pairs(weights, reduction, shape, label):
    logits, labels = make(shape)
    labels.fill_(label)
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2), weights=weights, class_reduction=reduction)
    value, grad = gradients(lambda z: criterion(z, labels), logits)
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-7, rtol=0)
    assert (grad == 0).all()
    assert grad.shape == logits.shape


def test_one_class():
    logits, labels = make((2, 3, 5, 5), ignored=0.0)
    labels.fill_(2)
    grouping, separating, n_grouping, n_separating = affinity_field_terms(logits, labels, size=1)
    assert (separating == 0).all()
    assert (n_separating == 0).all()
    assert (n_grouping == 2 * 2 * (4 * 5 * 2 + 2 * 16)).all()
    assert (grouping > 0).all()
    only = affinity_field_terms(logits, labels, size=1, same="class")
    assert only[2].tolist() == [0, 0, int(n_grouping[0])]
    torch.testing.assert_close(
        only[0], torch.stack([0 * grouping[0], 0 * grouping[0], grouping[2]])
    )


def test_row_of_pixels_has_horizontal_pairs_only():
    logits, labels = make((1, 2, 1, 6), ignored=0.0)
    *_, n_grouping, n_separating = affinity_field_terms(logits, labels, size=2)
    assert (n_grouping + n_separating).tolist() == [8, 8]
    *_, n_grouping, n_separating = affinity_field_terms(logits, labels, size=6)
    assert (n_grouping + n_separating).tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------
# The game over the sizes
# --------------------------------------------------------------------------------------------------


def terms_of(logits, labels, sizes, **options):
    """The terms of all sizes, (2, C, K)."""
    found = [affinity_field_terms(logits, labels, size=s, **options)[:2] for s in sizes]
    return torch.stack([torch.stack(pair) for pair in found], -1)


def test_loss_is_the_weighed_sum_of_the_terms():
    sizes = (1, 2, 3)
    logits, labels = make((2, 4, 9, 8), seed=11)
    terms = terms_of(logits, labels, sizes, same="class", neighbourhood="full", margin=1.0)
    options = {"same": "class", "neighbourhood": "full", "margin": 1.0, "class_reduction": "sum"}

    def loss(weights, **more):
        return AdaptiveAffinityFieldLoss(4, sizes, weights=weights, **options, **more)

    torch.testing.assert_close(loss("uniform")(logits, labels), terms.mean(-1).sum())
    torch.testing.assert_close(loss("hard_max")(logits, labels), terms.amax(-1).sum())
    torch.testing.assert_close(
        loss("adversarial")(logits, labels), terms.mean(-1).sum()
    )  # at first
    tau = 0.3
    entropic = tau * ((terms / tau).logsumexp(-1) - math.log(3)).sum()
    torch.testing.assert_close(loss("entropic", tau=tau)(logits, labels), entropic)
    near = loss("entropic", tau=1e-4)(logits, labels)
    torch.testing.assert_close(near, terms.amax(-1).sum(), rtol=1e-3, atol=1e-3)
    mean = AdaptiveAffinityFieldLoss(
        4, sizes, weights="uniform", **{**options, "class_reduction": "mean"}
    )
    torch.testing.assert_close(mean(logits, labels), terms.mean(-1).sum() / 4)


@pytest.mark.parametrize("weights", ["hard_max", "entropic", "adversarial"])
def test_network_feels_the_weighed_terms_and_weights_ascend(weights):
    sizes = (1, 2)
    logits, labels = make((2, 3, 9, 8), seed=12)
    criterion = AdaptiveAffinityFieldLoss(3, sizes, weights=weights, class_reduction="sum").double()
    value, grad = gradients(lambda z: criterion(z, labels), logits)
    w = criterion.size_weights()
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, dtype=DOUBLE))
    _, expected = gradients(lambda z: (w * terms_of(z, labels, sizes)).sum(), logits)
    torch.testing.assert_close(grad, expected)
    expected_size = w @ torch.tensor([3.0, 5.0], dtype=DOUBLE)
    torch.testing.assert_close(criterion.effective_size(), expected_size)
    if weights == "adversarial":
        terms = terms_of(logits, labels, sizes)
        criterion(logits, labels).backward()
        mean = (w * terms).sum(-1, keepdim=True)
        torch.testing.assert_close(
            criterion.eta.grad, -w * (terms - mean)
        )  # replicator, turned round
        torch.optim.SGD(criterion.parameters(), lr=1.0).step()
        after = (criterion.size_weights() * terms).sum()
        assert after > value


def test_one_size_is_the_plain_loss():
    logits, labels = make((1, 3, 6, 6))
    for weights in ("adversarial", "uniform", "hard_max", "entropic"):
        criterion = AdaptiveAffinityFieldLoss(3, (2,), weights=weights)
        expected = terms_of(logits, labels, (2,)).sum() / 3
        torch.testing.assert_close(criterion(logits, labels), expected)


def test_state_and_repr():
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2))
    assert list(criterion.state_dict()) == ["eta"]
    assert not list(AdaptiveAffinityFieldLoss(3, weights="uniform").parameters())
    assert "sizes=(1, 2)" in repr(criterion)


# --------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------


def test_boundary_scores_against_loops():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 5, 6), generator=generator).repeat_interleave(2, 1)
    prediction = torch.randint(3, (2, 5, 6), generator=generator).repeat_interleave(2, 1)
    labels[0, 3, 2] = IGNORE
    got = boundary_scores(prediction, labels, 3, tolerance=1)

    def edges(y):
        found = set()
        for b, i, j in np.ndindex(*y.shape):
            for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                k, m = i + di, j + dj
                if 0 <= k < y.shape[1] and 0 <= m < y.shape[2] and y[b, k, m] != y[b, i, j]:
                    pair = int(labels[b, i, j]), int(labels[b, k, m])
                    if IGNORE not in pair:
                        found.add((b, i, j, int(y[b, i, j])))
        return found

    true, own = edges(labels), edges(prediction)

    def close(x, y):
        return x[0] == y[0] and x[3] == y[3] and max(abs(x[1] - y[1]), abs(x[2] - y[2])) <= 1

    for scores, these, those in ((got[0], true, own), (got[1], own, true)):
        for c in range(3):
            mine = [x for x in these if x[3] == c]
            hits = sum(any(close(x, y) for y in those) for x in mine)
            assert scores[c].item() == pytest.approx(hits / len(mine))


def test_measures_of_the_truth_and_of_nothing():
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    labels[:, 2:4, 2:4] = 1
    recall, precision = boundary_scores(labels, labels, 3, tolerance=0)
    assert recall[:2].tolist() == precision[:2].tolist() == [1.0, 1.0]
    assert recall[2].isnan()
    counts = torch.tensor([[1, 1, 0]])
    scores = instance_iou(labels, labels, counts)
    assert scores[:2].tolist() == [1.0, 1.0]
    assert scores[2].isnan()
    wrong = torch.where(labels == 1, 0, 1)
    labels[:, 0] = IGNORE  # what is predicted there does not count
    assert instance_iou(wrong, labels, counts)[:2].tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "word", "arguments"),
    [
        (TypeError, "logits", {"logits": [1.0]}),
        (TypeError, "logits", {"logits": Z.long()}),
        (ValueError, "logits", {"logits": Z[0]}),
        (ValueError, "logits", {"logits": Z[:, :1]}),
        (ValueError, "logits", {"logits": Z / 0}),
        (ValueError, "logits", {"logits": torch.full_like(Z, torch.inf)}),
        (TypeError, "labels", {"labels": Y.float()}),
        (TypeError, "labels", {"labels": None}),
        (ValueError, "labels", {"labels": Y[0]}),
        (ValueError, "labels", {"labels": Y[:, :2]}),
        (ValueError, "labels", {"labels": Y + 3}),
        (ValueError, "labels", {"labels": Y - 1}),
        (ValueError, "labels", {"labels": Y + 255, "ignore_index": -1}),
        (ValueError, "labels", {"labels": Y.to("meta")}),
        (ValueError, "size", {"size": 0}),
        (TypeError, "size", {"size": 1.0}),
        (ValueError, "margin", {"margin": 0.0}),
        (TypeError, "margin", {"margin": "3"}),
        (TypeError, "ignore_index", {"ignore_index": None}),
        (ValueError, "same", {"same": "pixel"}),
        (ValueError, "neighbourhood", {"neighbourhood": "ring4"}),
        (ValueError, "clip", {"clip": 0.5}),
        (ValueError, "clip", {"clip": 0.0}),
        (TypeError, "require_opposite", {"require_opposite": 1}),
        (ValueError, "backend", {"backend": "triton"}),
        (TypeError, "group", {"group": "world"}),
    ],
)
def test_errors_of_the_terms(error, word, arguments):
    with pytest.raises(error, match=f"^{word}: expected"):
        affinity_field_terms(**{"logits": Z, "labels": Y, "size": 1, **arguments})


@pytest.mark.parametrize(
    ("error", "word", "arguments"),
    [
        (ValueError, "num_classes", {"num_classes": 1}),
        (TypeError, "num_classes", {"num_classes": 3.0}),
        (ValueError, "sizes", {"sizes": ()}),
        (ValueError, "sizes", {"sizes": (1, 1)}),
        (ValueError, "sizes", {"sizes": (0,)}),
        (ValueError, "weights", {"weights": "min"}),
        (ValueError, "tau", {"tau": 0.0}),
        (ValueError, "class_reduction", {"class_reduction": "none"}),
    ],
)
def test_errors_of_the_loss(error, word, arguments):
    with pytest.raises(error, match=f"^{word}: expected"):
        AdaptiveAffinityFieldLoss(**{"num_classes": 3, **arguments})


def test_other_errors():
    with pytest.raises(ValueError, match=r"^logits: expected shape \(\*, 4, \*, \*\)"):
        AdaptiveAffinityFieldLoss(4)(Z, Y)
    with pytest.raises(ValueError, match=r"^kind"):
        neighbour_offsets(1, "cross")
    with pytest.raises(ValueError, match=r"^x: expected at least 2 dimensions"):
        shifted_pair(torch.zeros(3), 0, 1)
    with pytest.raises(TypeError, match=r"^centre"):
        bernoulli_kl_with_logits(torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^prediction: expected values"):
        boundary_scores(Y + 3, Y, 3)
    with pytest.raises(ValueError, match=r"^labels: expected shape"):
        boundary_scores(Y, Y[:, :2], 3)
    with pytest.raises(ValueError, match=r"^tolerance"):
        boundary_scores(Y, Y, 3, tolerance=-1)
    with pytest.raises(TypeError, match=r"^tolerance"):
        boundary_scores(Y, Y, 3, tolerance=1.0)
    with pytest.raises(ValueError, match=r"^instances: expected numbers"):
        instance_iou(Y, Y, torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match=r"^instances: expected shape"):
        instance_iou(Y, Y, torch.ones(2, 3))


# --------------------------------------------------------------------------------------------------
# Over two processes
# --------------------------------------------------------------------------------------------------

SHARDS = (1, 2)


def whole_batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 6, 5, generator=g, dtype=torch.float64)
    return logits, torch.randint(3, (3, 6, 5), generator=g)


def adaptive_loss_and_grads(z, y, group, backend):
    criterion = AdaptiveAffinityFieldLoss(3, (1, 2), group=group, backend=backend).double()
    leaf = z.clone().requires_grad_()
    value = criterion(leaf, y)
    value.backward()
    return value.detach(), leaf.grad, criterion.eta.grad


def work(rank, world):
    z, y = (v[rows_of(rank, SHARDS)] for v in whole_batch())
    seen, group = {}, dist.group.WORLD
    for backend in ("auto", "reference"):
        seen[backend] = adaptive_loss_and_grads(z, y, group, backend)
        wrong = y + 9 * (rank == 1)
        seen["wrong", backend] = message_of(
            lambda b=backend, wrong=wrong: adaptive_loss_and_grads(z, wrong, group, b)
        )
    return seen


def test_global_batch(tmp_path):
    ranks = run(work, len(SHARDS), tmp_path)
    for backend in ("auto", "reference"):
        value, grad, eta = adaptive_loss_and_grads(*whole_batch(), None, backend)
        for rank, seen in enumerate(ranks):
            expected = (value, grad[rows_of(rank, SHARDS)], eta)
            torch.testing.assert_close(seen[backend], expected)
            own = "labels: expected values" if rank else "group: expected valid input"
            assert seen["wrong", backend].startswith(f"ValueError: {own}")


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, on a stand-in for the data and the ResNet
# --------------------------------------------------------------------------------------------------


def test_full_profile(tmp_path, monkeypatch):
    names, verdicts, trainings = run_on_voc(
        "affinity/affinity_fields",
        tmp_path,
        monkeypatch,
        define=("pair_errors", "gain_text", "torn_field", "signed_gaps", "widths"),
        call=("settle", "display"),
        small={
            "steps": "2",
            "batch_size": "2",
            "workers": "0",
            "voc(crop=)": "40",
            "PSPNet(width=)": "8",
            "whole_images(window=)": "73",
            "whole_images(stride=)": "73",
            "(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)": "(0.5, 1.0)",
            "seeds": "[seed + 50, seed + 51]",
            "more_seeds": "[seed + 50, seed + 51]",
            "range(8)": "range(5)",
        },
    )
    assert len(verdicts) == 8

    # Two stages each: the augmented set at 0.001, VOC's own at 0.0001; new layers ten times as fast.
    assert len(trainings) % 2 == 0
    for k, (optimizer, groups, _, steps, images) in enumerate(trainings):
        rate = (1e-3, 1e-4)[k % 2]
        assert (optimizer, steps) == ("SGD", 2)
        assert (len(images), images.crop) == ((5, 3)[k % 2], 40)
        assert [g["initial_lr"] for g in groups] == pytest.approx(
            [rate, 10 * rate, rate][: len(groups)]
        )
        assert [g["weight_decay"] for g in groups] == [5e-4, 5e-4, 0.0][: len(groups)]
        assert all(g["momentum"] == 0.9 for g in groups)
        # The adversary: grouping and separating, classes, sizes 1 and 2.
        assert [g["params"] for g in groups[2:]] in ([], [2 * 21 * 2])
    assert {len(groups) for _, groups, *_ in trainings} == {2, 3}

    model, x = names["plain"], torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, f = model(x)
        assert z.shape == (2, 21, 6, 6)  # stride 8, not upsampled
        assert f.shape == (2, 8, 6, 6)
        probabilities, mirrored = (names["whole_images"](model, v, 24, 16) for v in (x, x.flip(-1)))
    assert probabilities.shape == (2, 21, 48, 48)
    torch.testing.assert_close(
        probabilities.sum(1), torch.full((2, 48, 48), 4.0)
    )  # 2 scales, 2 sides
    torch.testing.assert_close(mirrored, probabilities.flip(-1))

    # A network that sees single pixels says of an even picture the same in all windows and scales.
    pixelwise = torch.nn.Conv2d(3, 21, 1)
    even = torch.randn(2, 3, 1, 1).expand(2, 3, 50, 50)
    with torch.no_grad():
        found = names["whole_images"](lambda v: (pixelwise(v),), even, 24, 16)
        torch.testing.assert_close(found, 4 * pixelwise(even).softmax(1))
