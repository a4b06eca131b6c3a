"""The cost volume's kernel against the equation, displacement by displacement, in double precision."""

import pytest
import torch

from affnb.matching import cost_volume, matching_score

# More pixels than one program takes, more channels than one step adds, sides of 1, no radius.
SHAPES = [((2, 3, 4, 5), 1), ((1, 1, 1, 1), 2), ((1, 33, 2, 3), (0, 1)), ((1, 2, 9, 11), (2, 1))]


def inputs(shape, device):
    generator = torch.Generator().manual_seed(0)
    f1, f2 = torch.randn(2, *shape, generator=generator)
    x = torch.randn(shape[1], shape[1], generator=generator)
    return f1.to(device), f2.to(device), (x @ x.T / shape[1] + torch.eye(shape[1])).to(device)


def run(function, f1, f2, weight, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (f1, f2)]
    w = None
    if weight is not None:  # a gradient is compared along symmetric matrices, the only legal ones
        leaves.append(weight.detach().clone().requires_grad_())
        w = (leaves[2] + leaves[2].mT) / 2
    result = function(*leaves[:2], weight=w, **options)
    kept = torch.where(result.isfinite(), result, 0.0)
    mix = torch.linspace(-1, 2, kept.numel(), dtype=kept.dtype, device=kept.device)
    grads = torch.autograd.grad((mix.view(kept.shape) * kept).sum(), leaves)
    return [x.double() for x in (result.detach(), *grads)]


def compare(function, f1, f2, weight, **options):
    wide = [None if x is None else x.double() for x in (f1, f2, weight)]
    ours = run(function, f1, f2, weight, **options)
    theirs = run(function, *wide, backend="reference", **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "radius"), SHAPES)
@pytest.mark.parametrize("padding", ["zeros", "replicate", "exclude"])
@pytest.mark.parametrize("learned", [False, True], ids=["plain", "weighted"])
def test_values_and_gradients(kernels_everywhere, shape, radius, padding, learned):
    f1, f2, weight = inputs(shape, kernels_everywhere)
    options = {"radius": radius, "padding": padding}
    compare(cost_volume, f1, f2, weight if learned else None, **options)


@pytest.mark.parametrize("kind", ["cosine", "wssd"])
def test_other_scores(kernels_everywhere, kind):
    compare(matching_score, *inputs((1, 3, 3, 4), kernels_everywhere), kind=kind, radius=1)


def test_half_precision_from_channels_last(kernels_everywhere):
    f1, f2, _ = inputs((1, 4, 4, 3), kernels_everywhere)
    f1, f2 = (x.half().contiguous(memory_format=torch.channels_last) for x in (f1, f2))
    ours = cost_volume(f1, f2, radius=1)
    torch.testing.assert_close(ours, cost_volume(f1, f2, radius=1, backend="reference"))


@pytest.mark.parametrize("held", [0, 1])
def test_one_input_at_a_time_and_twice(kernels_everywhere, held):
    f1, f2, _ = inputs((1, 2, 3, 3), kernels_everywhere)
    found = []
    for backend in ("auto", "reference"):
        pair = [x.clone().requires_grad_(i != held) for i, x in enumerate((f1, f2))]
        leaf = pair[1 - held]
        total = cost_volume(*pair, radius=1, backend=backend).pow(3).sum()
        (once,) = torch.autograd.grad(total, leaf, retain_graph=True)  # by the kernel
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        (twice,) = torch.autograd.grad(slope.square().sum(), leaf)
        found.append((once, slope.detach(), twice))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-2)


def test_no_images(kernels_everywhere):
    from affnb.kernels import cost_volume as kernel

    a = torch.ones(0, 2, 3, 3, device=kernels_everywhere)
    b = torch.ones(0, 2, 5, 5, device=kernels_everywhere)
    grad = kernel.forward(a, b)
    assert grad.shape == (0, 3, 3, 3, 3)
    for to_padded, like in ((False, a), (True, b)):
        assert kernel.backward(a, b, grad, to_padded=to_padded).shape == like.shape
