"""The streamed kernel of PatchNCE against the printed equation in double precision."""

import pytest
import torch
import torch.nn.functional as F

import affnb.metric.patch_nce as module
from affnb.metric import patch_nce_loss

# Images, patches an image, and width: below, at and across the borders of tiles.
SHAPES = [(1, 2, 1), (2, 7, 5), (3, 16, 16), (2, 37, 33), (1, 70, 3)]
CASES = [(shape, negatives) for shape in SHAPES for negatives in ("image", "batch")]
CASES += [((4, 1, 6), "batch")]  # a single patch has no negative in its image
CASES += [((2, 35, 290), "image")]  # rows that come piece by piece
CASES += [((1, 150, 4), "image")]  # and keys in several pieces


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def value_and_gradients(query, key, **options):
    """Value, and the gradients of queries and keys (``None`` for constant keys)."""
    q, k = (x.detach().clone().requires_grad_() for x in (query, key))
    value = patch_nce_loss(q, k, **options)
    grads = torch.autograd.grad(3 * value, (q, k), allow_unused=True)
    return [None if x is None else x.double() for x in (value.detach(), *grads)]


def close(ours, theirs, tolerance=2e-5):
    # Weights are rounded at 1e-6 (logits reach 14), and a gradient is their difference times 1 / 0.07.
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None
            continue
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * (1 + b.norm())


@pytest.mark.parametrize(("shape", "negatives"), CASES, ids=str)
@pytest.mark.parametrize("detach_key", [True, False])
def test_value_and_gradients(kernels_everywhere, shape, negatives, detach_key):
    query, key = (unit(*shape, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    options = {"negatives": negatives, "detach_key": detach_key}
    ours = value_and_gradients(query, key, **options)
    theirs = value_and_gradients(query.double(), key.double(), backend="reference", **options)
    close(ours, theirs)
    assert (ours[2] is None) == detach_key


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_is_what_pytorch_computes(kernels_everywhere, monkeypatch, negatives):
    query, key = (unit(2, 19, 8, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    options = {"negatives": negatives, "detach_key": False}
    ours = value_and_gradients(query, key, **options)
    monkeypatch.setattr(module.kernels, "wanted", lambda x: False)
    close(ours, value_and_gradients(query, key, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(kernels_everywhere, dtype):
    query, key = (unit(2, 19, 8, seed=seed).to(kernels_everywhere, dtype) for seed in (0, 1))
    with torch.autocast(kernels_everywhere.type, dtype=dtype):
        ours = value_and_gradients(query, key)
    theirs = value_and_gradients(query.double(), key.double(), backend="reference")
    close(ours[:1], theirs[:1])  # the sums are float32; the gradient is rounded to the input's
    close(ours[1:], theirs[1:], 1e-2)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_queries_and_keys_of_narrow_and_mixed_dtypes(kernels_everywhere, dtypes):
    query, key = (
        unit(2, 19, 16, seed=seed).to(kernels_everywhere, dtype)
        for seed, dtype in enumerate(dtypes)
    )
    for detach_key in (True, False):
        q, k = (x.detach().clone().requires_grad_() for x in (query, key))
        value = patch_nce_loss(q, k, detach_key=detach_key)
        assert value.dtype == torch.float32
        value.backward()
        assert q.grad.dtype == dtypes[0]
        assert detach_key or k.grad.dtype == dtypes[1]
        ours = [value.double(), q.grad.double(), None if detach_key else k.grad.double()]
        theirs = value_and_gradients(
            query.double(), key.double(), detach_key=detach_key, backend="reference"
        )
        close(ours[:1], theirs[:1])
        close(ours[1:], [g if g is None else g / 3 for g in theirs[1:]], 5e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("high", 2e-4), ("medium", 3e-2)])
def test_precision_that_pytorch_is_told(kernels_everywhere, precision, tolerance):
    query, key = (unit(2, 37, 33, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    theirs = value_and_gradients(query.double(), key.double(), backend="reference")
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = value_and_gradients(query, key)
    finally:
        torch.set_float32_matmul_precision(usual)
    close(ours, theirs, tolerance)
    assert (ours[1] - theirs[1]).norm() > 1e-6 * theirs[1].norm()  # it is not float32's


def test_a_sure_query_has_a_small_loss_and_not_a_negative_one(kernels_everywhere):
    key = torch.eye(8, device=kernels_everywhere)[None]
    value, grad, _ = value_and_gradients(key, key, temperature=0.05)
    double = value_and_gradients(key.double(), key.double(), temperature=0.05, backend="reference")
    assert 0 <= value < 1e-5
    close([grad], [double[1]])


def test_features_that_are_not_contiguous(kernels_everywhere):
    query, key = (unit(2, 6, 19, seed=seed).to(kernels_everywhere).mT for seed in (0, 1))
    ours = value_and_gradients(query, key, detach_key=False)
    double = value_and_gradients(
        query.double(), key.double(), detach_key=False, backend="reference"
    )
    close(ours, double)


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_far_logits_stay_finite(kernels_everywhere, negatives):
    query, key = (unit(2, 19, 4, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    value, grad, _ = value_and_gradients(query, key, negatives=negatives, temperature=1e-6)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert value > 1e4


def test_equal_keys_give_log_of_their_number_and_no_gradient(kernels_everywhere):
    key = unit(1, 1, 6).expand(2, 32, 6).to(kernels_everywhere)
    value, grad, _ = value_and_gradients(unit(2, 32, 6, seed=1).to(kernels_everywhere), key)
    torch.testing.assert_close(value.cpu(), torch.tensor(32.0).double().log(), rtol=1e-6, atol=0)
    assert grad.abs().max() < 2e-5


def test_empty_batch_is_zero(kernels_everywhere):
    empty = torch.zeros(0, 4, 3, device=kernels_everywhere)
    value, to_query, to_key = value_and_gradients(empty, empty, detach_key=False)
    assert value == 0
    assert to_query.shape == to_key.shape == (0, 4, 3)


def test_it_is_the_kernel_that_runs(kernels_everywhere, monkeypatch):
    from affnb.kernels import patch_nce

    seen = []
    original = patch_nce.pull

    def spy(*arguments, to_keys):
        seen.append(to_keys)
        return original(*arguments, to_keys=to_keys)

    monkeypatch.setattr(patch_nce, "pull", spy)
    query, key = (unit(2, 3, 4, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    value_and_gradients(query, key)
    assert seen == [False]  # constant keys cost no second product
    value_and_gradients(query, key, detach_key=False)
    assert seen == [False, False, True]
    value_and_gradients(query.double(), key.double())
    with torch.no_grad():
        patch_nce_loss(query.clone().requires_grad_(), key)
    assert len(seen) == 3


def test_one_row_block_of_a_larger_set_finds_its_own_key(kernels_everywhere):
    """What a rank does with its shard: its first query belongs to key ``first`` of all keys."""
    query, key = (unit(1, 41, 5, seed=seed).to(kernels_everywhere) for seed in (0, 1))
    shard = slice(9, 26)
    ours = module._sweep(query[:, shard], key, 0.5, 9, True, True)
    q, k = (x.double().requires_grad_() for x in (query, key))
    logits = q[0, shard] @ k[0].T / 0.5
    loss = F.cross_entropy(logits, torch.arange(9, 26, device=q.device), reduction="sum")
    to_query, to_keys = torch.autograd.grad(loss, (q, k))
    close([x.double() for x in ours], [loss.detach(), to_query[:, shard], to_keys])
