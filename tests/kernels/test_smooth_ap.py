"""The kernel of the smoothed average precision against the printed equations in double precision."""

import pytest
import torch
import torch.nn.functional as F

from affnb.metric import smooth_ap_loss, smooth_average_precision

# A query of the interpreter takes a while; (20, 3, 1) has more than one block of relevant items.
SHAPES = [(2, 1, 1), (3, 2, 2), (17, 5, 3), (20, 3, 1), (13, 16, 13), (23, 4, 9)]


def both(function, x, *rest, **options):
    """Value and gradient: of the operation, and of the reference in double precision."""
    results = []
    for v, backend in [(x, "auto"), (x.double(), "reference")]:
        v = v.detach().clone().requires_grad_()
        result = function(v, *rest, backend=backend, **options)
        (
            result * torch.linspace(1, 2, result.numel(), device=v.device).view(result.shape)
        ).sum().backward()
        results.append((result.detach().double(), v.grad.double()))
    return results


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * (1e-3 + b.norm())


@pytest.mark.parametrize(("n", "d", "classes"), SHAPES)
@pytest.mark.parametrize("include_self", [False, True])
def test_value_and_gradient_of_the_loss(kernels_everywhere, n, d, classes, include_self):
    generator = torch.Generator().manual_seed(n * d)
    v = F.normalize(torch.randn(n, d, generator=generator), dim=1).to(kernels_everywhere)
    labels = torch.randint(classes, (n,), generator=generator).to(kernels_everywhere)
    ours, theirs = both(smooth_ap_loss, v, labels, temperature=0.03, include_self=include_self)
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize(("queries", "items"), [(1, 1), (3, 2), (5, 131), (2, 300)])
def test_rows_of_scores_with_items_left_out(kernels_everywhere, queries, items):
    generator = torch.Generator().manual_seed(items)
    scores = torch.randn(queries, items, generator=generator)
    relevance = torch.rand(queries, items, generator=generator) < 0.3
    relevance[:, 0] = True
    valid = torch.rand(queries, items, generator=generator) < 0.8
    valid[:, 0] = True
    scores, relevance, valid = (x.to(kernels_everywhere) for x in (scores, relevance, valid))
    ours, theirs = both(smooth_average_precision, scores, relevance, 0.2, valid)
    close(ours, theirs, 2e-5)
    assert (ours[1][~valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(kernels_everywhere, dtype):
    v = F.normalize(torch.randn(14, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    v = v.to(kernels_everywhere, dtype)
    labels = (torch.arange(14) % 4).to(kernels_everywhere)
    with torch.autocast(kernels_everywhere.type, dtype=dtype):
        ours, theirs = both(smooth_ap_loss, v, labels, temperature=0.1)
    close(ours[:1], theirs[:1], 2e-5)  # sums are float32; the gradient is rounded to the input's
    close(ours[1:], theirs[1:], 1e-2)


def test_it_is_the_kernel_that_runs(kernels_everywhere, monkeypatch):
    from affnb.kernels import smooth_ap

    seen = []
    original = smooth_ap.sweep
    monkeypatch.setattr(smooth_ap, "sweep", lambda *a: seen.append(a) or original(*a))
    x = torch.eye(4).to(kernels_everywhere)
    smooth_ap_loss(x, torch.tensor([0, 0, 1, 1]).to(kernels_everywhere))
    assert len(seen) == 1


def test_scores_are_not_touched_and_may_lie_in_any_order(kernels_everywhere):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 3, generator=generator).to(kernels_everywhere).T
    relevance = (torch.rand(3, 40, generator=generator) < 0.6).to(kernels_everywhere)
    before = scores.clone()
    ours, theirs = both(smooth_average_precision, scores, relevance, 0.2)
    close(ours, theirs, 2e-5)
    assert torch.equal(scores, before)


def test_no_queries(kernels_everywhere):
    scores = torch.zeros(0, 3, device=kernels_everywhere, requires_grad=True)
    result = smooth_average_precision(scores, scores > 1)
    result.sum().backward()
    assert result.shape == (0,)


def test_a_query_of_relevant_items_alone_has_no_gradient(kernels_everywhere):
    scores = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    scores = scores.to(kernels_everywhere).requires_grad_()
    result = smooth_average_precision(scores, torch.ones_like(scores, dtype=torch.bool))
    result.sum().backward()
    assert result.tolist() == [1.0]
    assert not scores.grad.any()
