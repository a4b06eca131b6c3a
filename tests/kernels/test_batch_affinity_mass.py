"""The streamed kernel of the batch affinity mass against the printed equations in double precision."""

import pytest
import torch

from affnb.affinity import batch_affinity_loss

SHAPES = [(2, 1, 2), (3, 2, 2), (17, 5, 3), (33, 70, 2), (61, 16, 61), (40, 3, 1), (1, 4, 1)]


def both(features, labels, **options):
    """Value and gradient: of the operation, and of the reference in double precision."""
    results = []
    for x, backend in [(features, "auto"), (features.double(), "reference")]:
        x = x.detach().clone().requires_grad_()
        loss = batch_affinity_loss(x, labels, backend=backend, **options)
        loss.backward()
        results += [(loss.detach().double(), x.grad.double())]
    return results


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * (1e-3 + b.norm())


@pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
@pytest.mark.parametrize("include_self", [False, True])
def test_value_and_gradient(kernels_everywhere, n, d, classes, include_self):
    generator = torch.Generator().manual_seed(n * d)
    features = torch.randn(n, d, generator=generator).to(kernels_everywhere) / d**0.5
    labels = torch.randint(classes, (n,), generator=generator).to(kernels_everywhere)
    for form in ("log", "focal"):
        ours, theirs = both(features, labels, form=form, include_self=include_self)
        close(ours, theirs, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(kernels_everywhere, dtype):
    features = torch.randn(37, 9, generator=torch.Generator().manual_seed(0))
    features = features.to(kernels_everywhere, dtype)
    labels = (torch.arange(37) % 4).to(kernels_everywhere)
    with torch.autocast(kernels_everywhere.type, dtype=dtype):
        ours, theirs = both(features, labels)
    close(
        ours[:1], theirs[:1], 2e-5
    )  # the sums are float32; the gradient is rounded to the input's
    close(ours[1:], theirs[1:], 1e-2)


def test_features_that_are_not_contiguous_and_have_an_offset(kernels_everywhere):
    features = (
        torch.randn(7, 30, generator=torch.Generator().manual_seed(1)).to(kernels_everywhere).T
    )
    labels = (torch.arange(30) % 3).to(kernels_everywhere)
    ours, theirs = both(features + 100.0, labels)
    close(ours, theirs, 1e-4)


def test_it_is_the_kernel_that_runs(kernels_everywhere, monkeypatch):
    from affnb.kernels import batch_affinity_mass

    seen = []
    original = batch_affinity_mass.row_log_sums
    monkeypatch.setattr(
        batch_affinity_mass, "row_log_sums", lambda *a: seen.append(a) or original(*a)
    )
    batch_affinity_loss(
        torch.eye(4).to(kernels_everywhere), torch.tensor([0, 0, 1, 1]).to(kernels_everywhere)
    )
    assert len(seen) == 1
