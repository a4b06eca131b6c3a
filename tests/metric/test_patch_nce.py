"""PatchNCE: the loss, its criterion, the places, the head, the features, and the adversarial loss."""

import math
import types
from functools import partial, reduce

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import affnb.metric.patch_nce as module
from affnb.measure import peak_bytes
from affnb.metric import (
    PatchNCELoss,
    PatchProjector,
    encoder_features,
    lsgan_d,
    lsgan_g,
    patch_nce_loss,
    receptive_field,
    sample_patch_ids,
)
from tests.chapter_cells import fake_modules, run_cells
from tests.processes import message_of, rows_of, run

DOUBLE = torch.float64
KINDS = ("image", "batch")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=DOUBLE):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=dtype), dim=-1)


def value_and_grads(loss, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), *grads


def assert_same(got, wanted, tolerance=1e-11):
    for a, b in zip(got, wanted, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def enumerated(query, key, temperature, negatives):
    """The printed equation, one query and one negative at a time."""
    images, patches, _ = query.shape
    losses = []
    for b in range(images):
        for s in range(patches):
            positive = torch.exp(query[b, s] @ key[b, s] / temperature)
            total = positive
            for c in range(images):
                for n in range(patches):
                    if (c, n) != (b, s) and (c == b or negatives == "batch"):
                        total = total + torch.exp(query[b, s] @ key[c, n] / temperature)
            losses.append(-torch.log(positive / total))
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------
# The loss against the equation, peers and finite differences
# --------------------------------------------------------------------------------------------------


@st.composite
def features(draw):
    """Queries and keys in float64, of any strides, with a temperature and a block size."""
    images, patches = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 3, 5, 7]))
    width = draw(st.sampled_from([1, 2, 3, 5]))
    seed = draw(st.integers(0, 2**31))
    query, key = (
        unit(images, patches, width, seed=seed),
        unit(images, patches, width, seed=seed + 1),
    )
    if draw(st.booleans()):  # other strides, and lengths other than 1
        query = (2 * query).mT.contiguous().mT
        key = key.repeat_interleave(2, 1)[:, ::2]
    return query, key, draw(st.sampled_from([0.07, 0.5, 2.0])), draw(st.sampled_from([1, 6, 2**19]))


@settings(max_examples=40, deadline=None)
@given(features(), st.sampled_from(KINDS), st.booleans())
def test_both_backends_are_the_equation(case, negatives, detach):
    query, key, temperature, entries = case
    options = {"temperature": temperature, "negatives": negatives, "detach_key": detach}
    wanted = value_and_grads(
        lambda q, k: enumerated(q, k.detach() if detach else k, temperature, negatives), query, key
    )
    before, module._BLOCK_CPU = module._BLOCK_CPU, entries
    try:
        for backend in ("auto", "reference"):
            assert_same(
                value_and_grads(
                    lambda q, k, b=backend: patch_nce_loss(q, k, backend=b, **options), query, key
                ),
                wanted,
            )
    finally:
        module._BLOCK_CPU = before


@pytest.mark.parametrize("negatives", KINDS)
def test_is_the_cross_entropy_of_the_matrix(negatives):
    query, key = unit(4, 50, 16), unit(4, 50, 16, seed=1)

    def peer(q, k):
        if negatives == "batch":
            q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
        logits = (q @ k.mT / 0.07).flatten(0, 1)
        return F.cross_entropy(logits, torch.arange(q.shape[1]).repeat(len(q)))

    def ours(q, k):
        return patch_nce_loss(q, k, negatives=negatives, detach_key=False)

    assert_same(value_and_grads(ours, query, key), value_and_grads(peer, query, key))


@pytest.mark.parametrize("negatives", KINDS)
def test_is_a_positive_beside_a_masked_matrix(negatives):
    """The arrangement of published implementations: the positive first, -10 on the diagonal."""
    query, key = unit(3, 9, 5), unit(3, 9, 5, seed=1)

    def published(q, k):
        k = k.detach()
        positive = (q * k).sum(-1).flatten()[:, None]
        if negatives == "batch":
            q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
        others = (q @ k.mT).masked_fill(torch.eye(q.shape[1], dtype=torch.bool), -10.0)
        logits = torch.cat([positive, others.flatten(0, 1)], 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    def ours(q, k):
        return patch_nce_loss(q, k, negatives=negatives)

    got, wanted = value_and_grads(ours, query, key), value_and_grads(published, query, key)
    assert_same(got, wanted)
    assert got[2] is None  # the keys are constants


def test_is_supervised_contrast_with_one_positive():
    """NT-Xent of pytorch-metric-learning, where each query has one positive among the references."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    query, key = unit(1, 12, 6)[0], unit(1, 12, 6, seed=1)[0]
    labels = torch.arange(12)
    theirs = losses.NTXentLoss(temperature=0.07)(
        query, labels, ref_emb=key, ref_labels=labels.clone()
    )
    torch.testing.assert_close(patch_nce_loss(query[None], key[None]), theirs)


@pytest.mark.parametrize("negatives", KINDS)
def test_gradcheck(negatives):
    query, key = unit(2, 3, 4).requires_grad_(), unit(2, 3, 4, seed=1).requires_grad_()
    options = {"temperature": 0.5, "negatives": negatives, "detach_key": False}
    reference = partial(patch_nce_loss, backend="reference", **options)
    assert gradcheck(partial(patch_nce_loss, **options), (query, key))
    assert gradcheck(reference, (query, key))
    assert gradgradcheck(reference, (query, key))


def test_auto_cannot_be_differentiated_twice():
    query, key = unit(1, 3, 4).requires_grad_(), unit(1, 3, 4)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(patch_nce_loss(query, key), query, create_graph=True)


def test_gradient_is_tangential_after_normalisation():
    raw = torch.randn(2, 5, 6, generator=seeded(), dtype=DOUBLE).requires_grad_()
    patch_nce_loss(F.normalize(raw, dim=-1), unit(2, 5, 6, seed=1)).backward()
    assert raw.grad.abs().max() > 1e-3
    assert (raw.grad * raw).sum(-1).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------
# Invariances, limits and degenerate input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", KINDS)
def test_invariances(negatives):
    query, key = unit(3, 8, 5), unit(3, 8, 5, seed=1)
    loss = partial(patch_nce_loss, negatives=negatives)
    value = loss(query, key)
    order = torch.randperm(8, generator=seeded())
    torch.testing.assert_close(loss(query[:, order], key[:, order]), value)
    torch.testing.assert_close(loss(query.flip(0), key.flip(0)), value)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=seeded(), dtype=DOUBLE))[0]
    torch.testing.assert_close(loss(query @ turn, key @ turn), value)
    # Products divided by the temperature: their common scale is that of the temperature.
    torch.testing.assert_close(loss(2 * query, key, temperature=0.14), value)
    # The same vector added to all keys moves every logit of a row alike.
    torch.testing.assert_close(loss(query, key + key[0, 0]), value)
    assert loss(query, key.flip(1)) != value


def test_one_image_has_the_same_negatives_either_way():
    query, key = unit(1, 8, 5), unit(1, 8, 5, seed=1)
    both = [patch_nce_loss(query, key, negatives=kind) for kind in KINDS]
    torch.testing.assert_close(both[0], both[1])
    query, key = unit(2, 8, 5), unit(2, 8, 5, seed=1)
    assert patch_nce_loss(query, key, negatives="batch") > patch_nce_loss(query, key)


def test_softmax_runs_over_keys():
    query, key = torch.tensor([[[1.0, 0], [1, 0]]]), torch.tensor([[[1.0, 0], [0, 1]]])
    over_keys = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert patch_nce_loss(query, key, temperature=1.0).item() == pytest.approx(over_keys)
    assert patch_nce_loss(key, query, temperature=1.0).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("negatives", KINDS)
def test_equal_keys_give_log_of_their_number_and_no_gradient(negatives):
    key = unit(1, 1, 6).expand(2, 32, 6)
    value, to_query, to_key = value_and_grads(
        lambda q, k: patch_nce_loss(q, k, negatives=negatives), unit(2, 32, 6, seed=1), key
    )
    assert value.item() == pytest.approx(math.log(32 if negatives == "image" else 64))
    assert to_query.abs().max() < 1e-13
    assert to_key is None


def test_copies_set_a_floor():
    key = torch.eye(8, dtype=DOUBLE)[[0, 0, 0, 0, 1, 2, 3, 4]][None]
    assert patch_nce_loss(key, key, temperature=1e-3).item() == pytest.approx(math.log(4) / 2)


def test_small_temperature_is_a_hinge_on_the_hardest_negative():
    query, key = unit(2, 6, 4), unit(2, 6, 4, seed=1)
    similarity = query @ key.mT
    positive = similarity.diagonal(0, 1, 2)
    hardest = similarity.masked_fill(torch.eye(6, dtype=torch.bool), -9).amax(-1)
    hinge = (hardest - positive).clamp(min=0).mean()
    torch.testing.assert_close(
        1e-4 * patch_nce_loss(query, key, temperature=1e-4), hinge, atol=1e-3, rtol=0
    )
    flat = patch_nce_loss(query, key, temperature=1e6).item()
    assert flat == pytest.approx(math.log(6), abs=1e-4)


@pytest.mark.parametrize("negatives", KINDS)
def test_far_logits_stay_finite(negatives):
    query, key = unit(2, 5, 4, dtype=torch.float32), unit(2, 5, 4, seed=1, dtype=torch.float32)
    value, grad, _ = value_and_grads(
        lambda q, k: patch_nce_loss(q, k, negatives=negatives, temperature=1e-6), query, key
    )
    assert value.isfinite()
    assert grad.isfinite().all()
    assert value > 1e4


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("negatives", KINDS)
def test_empty_batch_is_zero(negatives, backend):
    query = torch.zeros(0, 4, 3, requires_grad=True)
    key = torch.zeros(0, 4, 3, requires_grad=True)
    loss = patch_nce_loss(query, key, negatives=negatives, detach_key=False, backend=backend)
    loss.backward()
    assert loss == 0
    assert query.grad.shape == key.grad.shape == (0, 4, 3)


def test_single_patches_of_several_images_compare_over_the_batch():
    query, key = unit(5, 1, 3), unit(5, 1, 3, seed=1)
    loss = patch_nce_loss(query, key, negatives="batch")
    torch.testing.assert_close(loss, patch_nce_loss(query.mT.mT.view(1, 5, 3), key.view(1, 5, 3)))


# --------------------------------------------------------------------------------------------------
# Precision, compilation, memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype):
    query, key = unit(2, 16, 8).to(dtype), unit(2, 16, 8, seed=1).to(dtype)
    value, grad, _ = value_and_grads(patch_nce_loss, query, key)
    exact, exact_grad, _ = value_and_grads(patch_nce_loss, query.double(), key.double())
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=1e-4)
    mixed = patch_nce_loss(query, key.double())
    assert mixed.dtype == DOUBLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_inside(dtype):
    query, key = unit(2, 16, 8, dtype=torch.float32), unit(2, 16, 8, seed=1, dtype=torch.float32)
    outside = value_and_grads(patch_nce_loss, query, key)
    with torch.autocast("cpu", dtype=dtype):
        inside = value_and_grads(patch_nce_loss, query, key)
        head = PatchProjector(3, dim=8)
        projected = head(torch.randn(1, 3, 4, 4), torch.arange(4))
    assert_same(inside, outside, 0)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(1, 4))


def test_compiles_whole():
    torch._dynamo.reset()
    query, key = unit(2, 6, 4, dtype=torch.float32), unit(2, 6, 4, seed=1, dtype=torch.float32)
    for options in ({"detach_key": False}, {"negatives": "batch"}):
        loss = partial(patch_nce_loss, **options)
        compiled = torch.compile(loss, backend="eager", fullgraph="negatives" not in options)
        assert_same(value_and_grads(compiled, query, key), value_and_grads(loss, query, key), 1e-6)


def test_batch_form_holds_no_matrix():
    query, key = (
        unit(16, 128, 16, dtype=torch.float32),
        unit(16, 128, 16, seed=1, dtype=torch.float32),
    )

    def step():
        leaf, other = query.clone().requires_grad_(), key.clone().requires_grad_()
        patch_nce_loss(leaf, other, negatives="batch", detach_key=False).backward()

    matrix = 4 * 2048**2
    assert peak_bytes(step) < 0.7 * matrix


def test_no_grad_makes_no_gradient():
    query, key = unit(2, 6, 4).requires_grad_(), unit(2, 6, 4, seed=1).requires_grad_()
    with torch.no_grad():
        loss = patch_nce_loss(query, key, detach_key=False)
    assert not loss.requires_grad
    (grad,) = torch.autograd.grad(patch_nce_loss(query.detach(), key, detach_key=False), key)
    wanted = value_and_grads(lambda q, k: patch_nce_loss(q, k, detach_key=False), query, key)[2]
    torch.testing.assert_close(grad, wanted)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("error", "message", "query", "key", "options"),
    [
        (TypeError, "query: expected a torch.Tensor", [1.0], GOOD, {}),
        (TypeError, "query: expected a floating", GOOD.long(), GOOD, {}),
        (TypeError, "key: expected a floating", GOOD, GOOD.long(), {}),
        (ValueError, "query: expected 3 dimensions", GOOD[0], GOOD, {}),
        (ValueError, "key: expected 3 dimensions", GOOD, GOOD[0], {}),
        (ValueError, r"key: expected shape \(2, 3, 4\)", GOOD, GOOD[:, :2], {}),
        (ValueError, "key: expected the device of query", GOOD, GOOD.to("meta"), {}),
        (ValueError, "query: expected at least two patches an image", GOOD[:, :1], GOOD[:, :1], {}),
        (
            ValueError,
            "query: expected at least two patches in the batch",
            GOOD[:1, :1],
            GOOD[:1, :1],
            {"negatives": "batch"},
        ),
        (ValueError, "query: expected finite values", GOOD * math.nan, GOOD, {}),
        (ValueError, "key: expected finite values", GOOD, GOOD + math.inf, {}),
        (ValueError, "key: expected vectors whose norm is finite", GOOD, GOOD + 3e38, {}),
        (
            ValueError,
            "temperature: expected logits that",
            GOOD + 1,
            GOOD + 1,
            {"temperature": 1e-39},
        ),
        (ValueError, "temperature: expected a finite number > 0", GOOD, GOOD, {"temperature": 0}),
        (
            ValueError,
            "temperature: expected a finite number > 0",
            GOOD,
            GOOD,
            {"temperature": -1.0},
        ),
        (TypeError, "temperature: expected a real number", GOOD, GOOD, {"temperature": "warm"}),
        (ValueError, "negatives: expected one of", GOOD, GOOD, {"negatives": "others"}),
        (TypeError, "detach_key: expected a bool", GOOD, GOOD, {"detach_key": 1}),
        (ValueError, "backend: expected one of", GOOD, GOOD, {"backend": "fast"}),
        (TypeError, "group: expected a torch.distributed", GOOD, GOOD, {"group": "world"}),
    ],
)
def test_loss_rejects(error, message, query, key, options):
    with pytest.raises(error, match=rf"^{message}"):
        patch_nce_loss(query, key, **options)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "negatives", {"negatives": "x"}),
        (TypeError, "detach_key", {"detach_key": None}),
        (ValueError, "backend", {"backend": "x"}),
        (TypeError, "group", {"group": 3}),
    ],
)
def test_criterion_rejects_when_made(error, message, options):
    with pytest.raises(error, match=rf"^{message}: expected"):
        PatchNCELoss(**options)


# --------------------------------------------------------------------------------------------------
# The criterion
# --------------------------------------------------------------------------------------------------


def test_criterion_is_the_mean_over_layers():
    layers = [(unit(2, p, 4, seed=p), unit(2, p, 4, seed=p + 50)) for p in (3, 7, 9)]
    criterion = PatchNCELoss(temperature=0.2, negatives="batch", detach_key=False)
    queries, keys = zip(*layers, strict=True)
    expected = sum(
        patch_nce_loss(q, k, temperature=0.2, negatives="batch", detach_key=False)
        for q, k in layers
    )
    torch.testing.assert_close(criterion(queries, keys), expected / 3)
    torch.testing.assert_close(criterion(*layers[0]), criterion([layers[0][0]], [layers[0][1]]))
    for wrong in (([], []), (list(queries), list(keys[:2]))):
        with pytest.raises(ValueError, match=r"^keys: expected as many layers"):
            criterion(*wrong)


# --------------------------------------------------------------------------------------------------
# Places, head, features
# --------------------------------------------------------------------------------------------------


def test_places_are_different_reproducible_and_uniform():
    ids = sample_patch_ids((3, 8, 5, 7), 20, seeded(3))
    assert ids.dtype == torch.int64
    assert len(ids.unique()) == 20
    assert torch.equal(ids, sample_patch_ids((5, 7), 20, seeded(3)))
    assert torch.equal(sample_patch_ids((4, 3), 12).sort().values, torch.arange(12))
    generator = seeded()
    counts = torch.bincount(
        torch.cat([sample_patch_ids((2, 5), 3, generator) for _ in range(2000)]), minlength=10
    )
    assert (counts - 600).abs().max() < 100  # more than four standard deviations


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "shape: expected", ((4,), 1)),
        (ValueError, "n: expected a number from 1 to 6", ((2, 3), 7)),
        (ValueError, "n: expected a number from 1 to 6", ((2, 3), 0)),
        (TypeError, "n: expected", ((2, 3), 2.0)),
        (TypeError, "n: expected", ((2, 3), True)),
        (TypeError, "shape: expected", ((2.0, 3), 2)),
    ],
)
def test_places_reject(error, message, arguments):
    with pytest.raises(error, match=f"^{message}"):
        sample_patch_ids(*arguments)


def test_head_reads_the_places_in_order():
    head = PatchProjector(3, dim=5).double()
    maps = torch.randn(2, 3, 4, 6, generator=seeded(), dtype=DOUBLE)
    ids = torch.tensor([7, 0, 23, 7])
    z = head(maps, ids)
    for p, place in enumerate(ids.tolist()):
        expected = F.normalize(head.mlp(maps[:, :, place // 6, place % 6]), dim=-1)
        torch.testing.assert_close(z[:, p], expected)
    assert z.dtype == DOUBLE
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 3), (5,), (5, 5), (5,)]
    assert PatchProjector(3)(maps.float(), ids).shape == (2, 4, 256)


def test_head_maps_zero_to_zero_with_a_zero_gradient():
    head = PatchProjector(3, dim=4)
    head.mlp = nn.Identity()
    maps = torch.zeros(1, 3, 1, 2)
    maps[0, :, 0, 1] = torch.tensor([3.0, 0.0, 4.0])
    maps.requires_grad_()
    z = head(maps, torch.arange(2))
    torch.testing.assert_close(z[0], torch.tensor([[0.0, 0, 0], [0.6, 0, 0.8]]))
    (z * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert (maps.grad[0, :, 0, 0] == 0).all()
    assert maps.grad[0, :, 0, 1].abs().max() > 0.1


@pytest.mark.parametrize(
    ("error", "message", "features", "ids"),
    [
        (TypeError, "features: expected a torch.Tensor", None, torch.arange(2)),
        (ValueError, "features: expected 4 dimensions", torch.zeros(3, 2, 2), torch.arange(2)),
        (
            TypeError,
            "features: expected a floating",
            torch.zeros(1, 3, 2, 2).int(),
            torch.arange(2),
        ),
        (ValueError, "features: expected shape", torch.zeros(1, 2, 2, 2), torch.arange(2)),
        (TypeError, "ids: expected an integer", torch.zeros(1, 3, 2, 2), torch.zeros(2)),
        (
            ValueError,
            r"ids: expected values in \[0, 4\)",
            torch.zeros(1, 3, 2, 2),
            torch.tensor([4]),
        ),
    ],
)
def test_head_rejects(error, message, features, ids):
    with pytest.raises(error, match=f"^{message}"):
        PatchProjector(3, dim=2)(features, ids)


@pytest.mark.parametrize(
    ("error", "arguments"), [(TypeError, (2.0,)), (ValueError, (0,)), (ValueError, (2, 0))]
)
def test_head_rejects_sizes(error, arguments):
    with pytest.raises(error, match=r"^(channels|dim): expected"):
        PatchProjector(*arguments)


class Counting(nn.Module):
    """Three layers in a row, of which the last counts its calls; the first is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.third, self.unused, self.calls = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 1, 1), 0
        self.pair = Pair()

    def forward(self, x):
        self.first(x + 1)
        x = self.second(self.first(x))
        self.pair(x)
        self.calls += 1
        return self.third(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_features_are_those_of_the_layers_and_the_pass_stops():
    net, x = Counting(), torch.randn(1, 1, 5, 5, generator=seeded())
    second, pixels, first = encoder_features(net, x, ["second", "input", "first"])
    assert pixels is x
    torch.testing.assert_close(first, net.first(x + 1))  # the first call
    torch.testing.assert_close(second, net.second(net.first(x)))
    assert net.calls == 0
    assert not net.first._forward_hooks
    second.sum().backward()
    assert net.first.weight.grad is not None
    assert encoder_features(net, x, ["input"]) == [x]


@pytest.mark.parametrize(
    ("error", "message", "layers"),
    [
        (TypeError, "expected a sequence", "first"),
        (ValueError, "expected different names", []),
        (ValueError, "expected different names", ["first", "first"]),
        (ValueError, "expected names of submodules", ["fourth"]),
        (ValueError, "expected submodules that the forward pass calls", ["first", "unused"]),
        (TypeError, "expected submodules that return a tensor", ["pair"]),
    ],
)
def test_features_reject(error, message, layers):
    net = Counting()
    with pytest.raises(error, match=f"^layers: {message}"):
        encoder_features(net, torch.zeros(1, 1, 5, 5), layers)
    assert not any(part._forward_hooks for part in net.modules())


def test_receptive_fields_are_the_pixels_that_have_a_gradient():
    layers = [(5, 1), (3, 2), (4, 2), (3, 1)]
    net, x = nn.Sequential(), torch.zeros(1, 1, 61, 61, dtype=DOUBLE, requires_grad=True)
    for (kernel, stride), field in zip(layers, receptive_field(layers), strict=True):
        conv = nn.Conv2d(1, 1, kernel, stride, bias=False, dtype=DOUBLE)
        nn.init.ones_(conv.weight)
        net.append(conv)
        (grad,) = torch.autograd.grad(net(x)[0, 0, 2, 2], x)
        assert int((grad[0, 0] != 0).any(0).sum()) == field
    assert receptive_field([]) == []


def test_receptive_fields_of_the_paper():
    plan = [(7, 1), (3, 1), (3, 2), (3, 1), (3, 2), *[(3, 1)] * 10]
    assert [receptive_field(plan)[i] for i in (1, 3, 6, 14)] == [9, 15, 35, 99]


@pytest.mark.parametrize(
    ("error", "layers"), [(TypeError, [3]), (TypeError, [(3, 1.0)]), (ValueError, [(0, 1)])]
)
def test_receptive_field_rejects(error, layers):
    with pytest.raises(error, match=r"^layers: expected"):
        receptive_field(layers)


# --------------------------------------------------------------------------------------------------
# The adversarial loss
# --------------------------------------------------------------------------------------------------


def test_least_squares():
    real = torch.randn(3, 1, 2, 2, generator=seeded(), dtype=DOUBLE)
    fake = torch.randn(5, generator=seeded(1), dtype=DOUBLE)
    mse = F.mse_loss
    expected = mse(real, torch.ones_like(real)) + mse(fake, torch.zeros_like(fake))
    torch.testing.assert_close(lsgan_d(real, fake), expected)
    torch.testing.assert_close(lsgan_g(fake), mse(fake, torch.ones_like(fake)))


def test_least_squares_reject():
    good = torch.zeros(2)
    for call, name in (
        (lambda bad: lsgan_d(bad, good), "real"),
        (lambda bad: lsgan_d(good, bad), "fake"),
        (lsgan_g, "fake"),
    ):
        for bad, error in ((1.0, TypeError), (good.long(), TypeError), (good[:0], ValueError)):
            with pytest.raises(error, match=f"^{name}: expected"):
                call(bad)


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------

SHARDS = {3: (2, 0, 3)}  # images a rank: uneven, and one rank is empty


def whole_batch(world):
    images = sum(SHARDS[world])
    return unit(images, 5, 4, seed=3), unit(images, 5, 4, seed=4)


CASES = [(n, d, b) for n in KINDS for d in (True, False) for b in ("auto", "reference")]


def work(rank, world):
    group, rows, seen = dist.group.WORLD, rows_of(rank, SHARDS[world]), {}
    query, key = (x[rows] for x in whole_batch(world))
    module._BLOCK_CPU = 30  # several blocks of rows
    for negatives, detach, backend in CASES:
        seen[negatives, detach, backend] = value_and_grads(
            lambda q, k, n=negatives, d=detach, b=backend: patch_nce_loss(
                q, k, negatives=n, detach_key=d, group=group, backend=b
            ),
            query,
            key,
        )
    seen["upstream"] = value_and_grads(
        lambda q, k: (
            (rank + 1) * patch_nce_loss(q, k, negatives="batch", detach_key=False, group=group)
        ),
        query,
        key,
    )
    fixed = key if rank else key.clone().requires_grad_()  # who needs a gradient may differ
    seen["mixed"] = patch_nce_loss(
        query, fixed, negatives="batch", detach_key=False, group=group
    ).item()
    bad = query.clone()
    if rank == 0:
        bad[0, 0, 0] = math.nan
    seen["nan"] = message_of(lambda: patch_nce_loss(bad, key, negatives="batch", group=group))
    single = query[:1, :1] if rank == 0 else query[:0, :1]
    seen["single"] = message_of(
        lambda: patch_nce_loss(single, single, negatives="batch", group=group)
    )
    return seen


@pytest.fixture(scope="module", params=sorted(SHARDS))
def ranks(request, tmp_path_factory):
    world = request.param
    return run(work, world, tmp_path_factory.mktemp(f"world{world}"))


def in_one_process(world, negatives, detach):
    return value_and_grads(
        lambda q, k: patch_nce_loss(
            q, k, negatives=negatives, detach_key=detach, backend="reference"
        ),
        *whole_batch(world),
    )


@pytest.mark.parametrize(("negatives", "detach", "backend"), CASES)
def test_ranks_together_are_one_process(ranks, negatives, detach, backend):
    world = len(ranks)
    value, to_query, to_key = in_one_process(world, negatives, detach)
    for rank, seen in enumerate(ranks):
        own = rows_of(rank, SHARDS[world])
        expected = (value, to_query[own], None if to_key is None else to_key[own])
        assert_same(seen[negatives, detach, backend], expected)


def test_each_rank_scales_its_gradient_by_its_own_upstream(ranks):
    _, to_query, to_key = in_one_process(len(ranks), "batch", False)
    for rank, seen in enumerate(ranks):
        own = rows_of(rank, SHARDS[len(ranks)])
        assert_same(seen["upstream"][1:], [(rank + 1) * g[own] for g in (to_query, to_key)])


def test_ranks_agree_whoever_needs_a_gradient(ranks):
    value = in_one_process(len(ranks), "batch", False)[0].item()
    assert all(seen["mixed"] == pytest.approx(value, rel=1e-12) for seen in ranks)


def test_bad_input_on_one_rank_raises_on_all(ranks):
    for rank, seen in enumerate(ranks):
        own = "ValueError: query: expected finite values"
        assert seen["nan"].startswith(
            own if rank == 0 else "ValueError: group: expected valid input"
        )
        assert seen["single"].startswith("ValueError: query: expected at least two patches in the")


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, small and on a stand-in for torchvision
# --------------------------------------------------------------------------------------------------


class FakeFolder:
    """What torchvision's ImageFolder of horse2zebra offers: bright and dark pictures in four folders."""

    def __init__(self, root, transform):
        assert root.name == "horse2zebra"
        self.class_to_idx = {n: i for i, n in enumerate(("testA", "testB", "trainA", "trainB"))}
        self.targets, self.transform = [i for i in range(4) for _ in range(6)], transform

    def __getitem__(self, index):
        label = self.targets[index]
        picture = torch.rand(3, 60, 70, generator=seeded(index)) / 2 + (label % 2) / 2
        return self.transform(picture), label


class FakeFID:
    def __init__(self, normalize):
        assert normalize
        self.seen = {True: [], False: []}

    def to(self, device):
        return self

    def update(self, images, real):
        assert images.shape[:2] == (1, 3)
        assert images.min() >= 0
        assert images.max() <= 1
        self.seen[real].append(images.mean())

    def compute(self):
        real, fake = (torch.stack(self.seen[kind]).mean() for kind in (True, False))
        return (real - fake).square()


class FakeDetector(nn.Module):
    """Sees a horse on the left half of every picture, and a zebra on the upper half."""

    def forward(self, images):
        masks = torch.zeros(2, 1, *images[0].shape[-2:])
        masks[0, :, :, : masks.shape[-1] // 2] = 1
        masks[1, :, : masks.shape[-2] // 2] = 1
        return [{"labels": torch.tensor([19, 24]), "scores": torch.ones(2), "masks": masks}]


def test_full_profile_runs_on_a_stand_in(monkeypatch, tmp_path):
    resize = lambda size: lambda x: F.interpolate(x[None], size=size)[0]  # noqa: E731
    v2 = types.SimpleNamespace(
        Compose=lambda steps: lambda x: reduce(lambda v, step: step(v), steps, x),
        ToImage=lambda: lambda x: x,
        Resize=resize,
        RandomCrop=lambda side: lambda x: x[:, :side, :side],
        RandomHorizontalFlip=lambda: lambda x: x,
        ToDtype=lambda dtype, scale: lambda x: x.to(dtype),
        Normalize=lambda mean, sd: lambda x: (x - mean[0]) / sd[0],
    )
    fake_modules(
        monkeypatch,
        {
            "torchvision": {},
            "torchvision.transforms": {"v2": v2},
            "torchvision.transforms.v2": vars(v2),
            "torchvision.datasets": {"ImageFolder": FakeFolder},
            "torchvision.models": {},
            "torchvision.models.detection": {
                "maskrcnn_resnet50_fpn": lambda weights: FakeDetector()
            },
            "torchmetrics.image.fid": {"FrechetInceptionDistance": FakeFID},
        },
    )
    names, verdicts = run_cells(
        "metric/patch_nce",
        monkeypatch,
        define=("strip", "PatchNCETerm", "runs", "figures"),
        small={
            "SIDE": "32",
            'Generator(3, 64, 5, 4, 7, blur=True, padding="reflect")': (
                'Generator(3, 2, 5, 4, 7, blur=True, padding="reflect")'
            ),
            "discriminator(3, (64, 128, 256, 512), (2, 2, 2, 1))": (
                "discriminator(3, (2, 2, 2), (2, 2, 1))"
            ),
            "epochs": "2",
            "judged": "range(2)",
            'PatchNCETerm(G, ["input", "conv1", "conv2", "block1", "block5"], 256, 256)': (
                'PatchNCETerm(G, ["input", "conv1", "conv2", "block1", "block5"], 16, 8)'
            ),
            "DataLoader(num_workers=)": "0",
            "seeds": "[first_seed, first_seed + 1]",
        },
        data_root=str(tmp_path),
    )
    assert set(verdicts) == {"metric/patch_nce:content-kept", "metric/patch_nce:style-reached"}
    followed = names["runs"]["CUT", names["first_seed"]]
    assert [f["content"] for f in followed] == [
        pytest.approx(1 / 3)
    ] * 2  # left half and upper half
    assert all(f["style error"] > 0 for f in followed)
    assert names["term"].layers == ["input", "conv1", "conv2", "block1", "block5"]
