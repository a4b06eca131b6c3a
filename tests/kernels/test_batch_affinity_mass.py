"""The streamed kernel of the batch affinity mass against the printed equations in double precision."""

import pytest
import torch

from affnb.affinity import batch_affinity_loss

SHAPES = [(2, 1, 2), (3, 2, 2), (17, 5, 3), (33, 70, 2), (61, 16, 61), (40, 3, 1), (1, 4, 1)]
SHAPES += [(35, 300, 3), (150, 6, 4)]  # rows that come piece by piece; columns in several pieces


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


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("highest", 2e-3), ("high", 5e-3), ("medium", 0.5)]
)
def test_near_points_far_from_the_others(kernels_everywhere, precision, tolerance):
    """Distances are differences of products 2e4 times as large; precision as PyTorch is told."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(60) % 4
    labels = (
        torch.arange(60) // 30
    )  # each cluster has items of both classes: the sums are of near ones
    centres = 100 * torch.nn.functional.normalize(torch.randn(4, 128, generator=generator), dim=1)
    features = centres[cluster] + 0.1 * torch.randn(60, 128, generator=generator)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours, theirs = both(
            features.to(kernels_everywhere), labels.to(kernels_everywhere), form="log"
        )
    finally:
        torch.set_float32_matmul_precision(usual)
    assert theirs[0] > 0.5
    assert abs(ours[0] - theirs[0]) <= tolerance * theirs[0] / 10
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm()


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_very_near_and_very_far(kernels_everywhere, scale):
    """Exponentials that are all 1, or 0 in float32 (but not yet in the reference's float64)."""
    features = scale * torch.randn(45, 30, generator=torch.Generator().manual_seed(2))
    labels = (torch.arange(45) % 5).to(kernels_everywhere)
    ours, theirs = both(features.to(kernels_everywhere), labels, form="log")
    close(ours, theirs, 1e-4)


def test_rows_of_one_rank_among_all(kernels_everywhere):
    """The sums of some rows over all columns, and their gradient, are those rows of the whole."""
    from affnb.kernels.batch_affinity_mass import pull, row_log_sums
    from affnb.kernels.pairs import split

    x = torch.randn(83, 11, generator=torch.Generator().manual_seed(3)).to(kernels_everywhere)
    labels = (torch.arange(83) % 3).to(kernels_everywhere)
    parts, half_norms = split(x, 3)
    logits = -(x[:, None] - x).double().square().sum(-1) / 2
    logits.fill_diagonal_(-torch.inf)
    same = labels[:, None] == labels
    logs = torch.stack([logits[same].logsumexp(0), logits[~same].logsumexp(0)])
    slopes = torch.where(same, (logits - logs[0]).exp(), -(logits - logs[1]).exp())
    gradient = slopes @ x.double() - slopes.sum(1, keepdim=True) * x
    for first, rows in [(0, 83), (17, 40), (80, 3), (5, 0)]:
        some = slice(first, first + rows)
        sums = row_log_sums(parts, half_norms, labels, first, rows, 11)
        for ours, kept in zip(sums, (same, ~same), strict=True):
            theirs = logits.masked_fill(~kept, -torch.inf)[some].logsumexp(1)
            torch.testing.assert_close(ours.double().logsumexp(0), theirs, rtol=0, atol=1e-5)
        ours = pull(x[some], parts, half_norms, labels, first, logs.float())
        torch.testing.assert_close(ours.double(), gradient[some], rtol=1e-4, atol=1e-6)


def test_float32_is_a_sum_of_three_bfloat16(kernels_everywhere):
    from affnb.kernels.pairs import split

    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(4)).to(kernels_everywhere)
    x *= torch.logspace(-20, 15, 300, device=x.device)
    parts, half_norms = split(x, 3)
    assert parts.shape == (3, 5, 384)
    assert (parts == parts.bfloat16()).all()
    assert (parts[..., 300:] == 0).all()
    assert (parts.double().sum(0)[:, :300] == x.double()).all()
    torch.testing.assert_close(half_norms, x.square().sum(1) / 2)


def test_precision_set_by_the_newer_name(kernels_everywhere, monkeypatch):
    from affnb.kernels.pairs import number_of_parts

    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert number_of_parts(torch.float32) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
def test_memory_of_a_large_batch(kernels_everywhere):
    """The matrix of 65,536 items would take 16 GB."""
    features = torch.randn(65_536, 128, device=kernels_everywhere).mul_(0.1).requires_grad_()
    labels = torch.arange(65_536, device=kernels_everywhere) % 1000
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    batch_affinity_loss(features, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9


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
