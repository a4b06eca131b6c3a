"""My Title: the fast form against the equations, what the mathematics promises, bad input."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from affnb.my_part import my_method_loss

module = importlib.import_module("affnb.my_part.my_method")

# Replace this file's tests by those of your operations; CONTRIBUTING.md lists what they cover.


def batch(n, d, classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 2 * d, generator=generator, dtype=dtype)[:, ::2]  # not contiguous
    return features, torch.randint(classes, (n,), generator=generator)


def value_and_grad(features, labels, **options):
    leaf = features.detach().requires_grad_()
    value = my_method_loss(leaf, labels, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@settings(max_examples=50, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 3, 7, 13]),
    d=st.sampled_from([1, 2, 5]),
    classes=st.sampled_from([1, 3, 100]),
    temperature=st.sampled_from([0.1, 1.0, 10.0]),
    rows=st.sampled_from([1, 4, 256]),
    seed=st.integers(0, 2**31),
)
def test_fast_equals_reference(n, d, classes, temperature, rows, seed):
    features, labels = batch(n, d, classes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", rows)
        fast, slow = (
            value_and_grad(features, labels, temperature=temperature, backend=backend)
            for backend in ("auto", "reference")
        )
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 3)
    features, labels = batch(7, 2)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda f: my_method_loss(f, labels), features.requires_grad_())


def test_invariances():
    features, labels = batch(11, 3)
    value = my_method_loss(features, labels)
    order, turn = torch.randperm(11), torch.linalg.qr(batch(3, 3)[0]).Q
    for same in (
        my_method_loss(features[order], labels[order]),
        my_method_loss(features @ turn + 5, 7 - labels),
        my_method_loss(3 * features, labels, temperature=9.0),
    ):
        torch.testing.assert_close(same, value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("labels", [[], [4], [0, 1, 2], [5, 5, 5]])
def test_nothing_to_compare_gives_zero_and_a_zero_gradient(labels):
    for backend in ("auto", "reference"):
        value, grad = value_and_grad(
            batch(len(labels), 2)[0], torch.tensor(labels).long(), backend=backend
        )
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


def test_half_precision_and_far_from_the_origin():
    features, labels = batch(32, 4, dtype=torch.float32)
    coarse = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = my_method_loss(coarse, labels)
    torch.testing.assert_close(inside, my_method_loss(coarse.float(), labels))
    moved = my_method_loss(features + 512, labels)  # rounding alone moves features by 3e-5
    torch.testing.assert_close(moved, my_method_loss(features, labels), rtol=1e-3, atol=0)


def test_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    features, labels = batch(20, 4)
    theirs = losses.NCALoss(reducer=reducers.DoNothingReducer())(features, labels)
    agreement = torch.exp(-theirs["loss"]["losses"])  # its loss is a logarithm
    ours = my_method_loss(F.normalize(features, dim=1), labels)
    torch.testing.assert_close(ours, 1 - agreement.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "^features: expected a torch.Tensor", {"features": [[0.0]]}),
        (TypeError, "^features: expected a floating", {"features": torch.ones(3, 2).long()}),
        (ValueError, "^features: expected 2 dimensions", {"features": torch.ones(3)}),
        (ValueError, "^features: expected finite", {"features": torch.full((3, 2), torch.nan)}),
        (TypeError, "^labels: expected an integer", {"labels": torch.ones(3)}),
        (ValueError, "^labels: expected length 3", {"labels": torch.tensor([0, 1])}),
        (ValueError, "^labels: expected the device", {"labels": torch.ones(3).long().to("meta")}),
        (ValueError, "^temperature: expected", {"temperature": 0.0}),
        (ValueError, "^backend: expected one of", {"backend": "fast"}),
    ],
)
def test_bad_input_is_named(error, message, change):
    good = {"features": torch.ones(3, 2), "labels": torch.tensor([0, 0, 1])}
    with pytest.raises(error, match=message):
        my_method_loss(**(good | change))
