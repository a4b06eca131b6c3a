"""The propagation's kernel against the loop over pixels in double precision."""

import pytest
import torch

from affnb.affinity import dilated_offsets, propagate_affinity

SHAPES = [(2, 3, 5, 4), (1, 1, 1, 1), (1, 21, 2, 5), (1, 2, 7, 3)]


def run(prob, affinity, weights, backend, **options):
    p, a = (x.detach().clone().requires_grad_() for x in (prob, affinity))
    result = propagate_affinity(p, a, dilated_offsets([1, 2]), backend=backend, **options)
    (weights.to(result.dtype) * result).sum().backward()
    # A map of one pixel has no neighbour, and in the reference then no affinity.
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (p, a)]
    return [x.double() for x in (result.detach(), *grads)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"anchored": True}, {"iterations": 1, "lam": 0.5}], ids=str
)
def test_result_and_gradients(kernels_everywhere, shape, options):
    options = {"iterations": 3} | options
    generator = torch.Generator().manual_seed(0)
    prob = torch.randn(shape, generator=generator).softmax(1).to(kernels_everywhere)
    affinity = torch.rand(shape[0], 16, *shape[2:], generator=generator).to(kernels_everywhere)
    weights = torch.randn(shape, generator=generator).to(kernels_everywhere)
    ours = run(prob, affinity, weights, "auto", **options)
    theirs = run(prob.double(), affinity.double(), weights, "reference", **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_half_precision_from_channels_last(kernels_everywhere):
    prob = torch.rand(1, 4, 4, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    affinity = torch.rand(1, 16, 4, 3, generator=torch.Generator().manual_seed(2))
    prob, affinity = (
        x.half().contiguous(memory_format=torch.channels_last).to(kernels_everywhere)
        for x in (prob, affinity)
    )
    ours = run(prob, affinity, torch.ones_like(prob), "auto")
    theirs = run(prob.double(), affinity.double(), torch.ones_like(prob), "reference")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_no_images_and_no_pixels(kernels_everywhere, shape):
    from affnb.kernels import affinity_propagation as kernel

    p = torch.ones(shape, device=kernels_everywhere)
    affinity = torch.ones(shape[0], 16, *shape[2:], device=kernels_everywhere)
    offsets = dilated_offsets([1, 2]).int().to(kernels_everywhere)
    after, totals = kernel.step(p, p, affinity, offsets, 0.5)
    rest = after, totals, p, affinity, offsets, torch.zeros_like(affinity), 0.5
    before, means = kernel.back(p, *rest, anchored=False)
    assert before.shape == after.shape == shape
    assert means.shape == totals.shape
