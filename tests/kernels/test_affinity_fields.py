"""The kernel of the affinity field's sums against the printed equations in double precision."""

import itertools

import pytest
import torch

from affnb.affinity import AdaptiveAffinityFieldLoss, affinity_field_terms

OPTIONS = [
    {"same": same, "clip": clip, "require_opposite": opposite, "neighbourhood": neighbourhood}
    for same, clip, opposite, neighbourhood in itertools.product(
        ("channel", "class"), (None, 1e-2), (False, True), ("ring8", "full")
    )
]


def batch(shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits.to(device), labels.to(device)


def terms(logits, labels, weights, **options):
    x = logits.detach().clone().requires_grad_()
    grouping, separating, n, m = affinity_field_terms(x, labels, **options)
    (weights.to(x.dtype) * torch.stack([grouping, separating])).sum().backward()
    return (
        torch.stack([grouping, separating]).detach().double(),
        torch.stack([n, m]),
        x.grad.double(),
    )


CASES = [((1, 3, 5, 7), options) for options in OPTIONS]
CASES += [
    (shape, OPTIONS[0]) for shape in [(1, 2, 1, 1), (2, 3, 5, 7), (1, 5, 13, 7), (1, 21, 4, 9)]
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_terms_counts_and_gradient(kernels_everywhere, shape, options):
    logits, labels = batch(shape, kernels_everywhere)
    weights = torch.rand(2, shape[1], device=logits.device)
    ours = terms(logits, labels, weights, size=2, **options)
    theirs = terms(logits.double(), labels, weights, size=2, backend="reference", **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"same": "class"},
        {"clip": 1e-2},
        {"require_opposite": True},
        {"same": "class", "require_opposite": True, "neighbourhood": "full"},
    ],
    ids=str,
)
def test_sums_by_the_class_of_the_centre(kernels_everywhere, options):
    logits, labels = batch((1, 3, 5, 4), kernels_everywhere, seed=2)
    results = []
    for backend, x in (("auto", logits), ("reference", logits.double())):
        x = x.clone().requires_grad_()
        loss = AdaptiveAffinityFieldLoss(
            3, sizes=(1, 2), class_reduction="pairs", backend=backend, **options
        ).to(x)
        value = loss(x, labels)
        value.backward()
        results.append((value.detach().double(), x.grad.double()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_labels_of_one_class_and_none_at_all(kernels_everywhere):
    logits, labels = batch((1, 2, 3, 3), kernels_everywhere)
    weights = torch.ones(2, 2, device=logits.device)
    for label, pairs in ((1, 40), (255, 0)):
        sums, numbers, grad = terms(logits, torch.full_like(labels, label), weights, size=1)
        assert numbers.tolist() == [[pairs, pairs], [0, 0]]
        assert (sums[0] > 0).all() == (pairs > 0)
        assert (sums[1] == 0).all()
        assert bool(grad.any()) == (pairs > 0)


@pytest.mark.parametrize("class_reduction", ["mean", "pairs"])
def test_the_loss_in_half_precision_and_from_channels_last(kernels_everywhere, class_reduction):
    logits, labels = batch((2, 4, 9, 8), kernels_everywhere, seed=1)
    logits = logits.bfloat16()
    results = []
    for backend, x in (("auto", logits), ("reference", logits.double())):
        loss = AdaptiveAffinityFieldLoss(
            4, sizes=(1, 3), class_reduction=class_reduction, backend=backend
        ).to(x.device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        value = loss.to(x.dtype if backend == "reference" else torch.float32)(x, labels)
        value.backward()
        results.append((value.detach().double(), x.grad.double()))
    (a, g), (b, h) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (g - h).norm() <= 1e-2 * h.norm()


def test_logits_of_all_sizes_stay_finite(kernels_everywhere):
    logits, labels = batch((1, 3, 4, 4), kernels_everywhere)
    logits = (1e4 * logits).requires_grad_()
    grouping, separating, _, _ = affinity_field_terms(logits, labels, size=1)
    (grouping.sum() + separating.sum()).backward()
    assert torch.isfinite(grouping).all()
    assert torch.isfinite(separating).all()
    assert torch.isfinite(logits.grad).all()
