"""Small real data sets that come with scikit-learn; no network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_at_least

__all__ = ["Digits", "digits"]


class Digits(NamedTuple):
    """A split of the 8 x 8 handwritten digits.

    Attributes
    ----------
    train_images, test_images
        (n, 8, 8) float32 in [0, 1].
    train_labels, test_labels
        (n,) int64 in 0..9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(*, train: int = 1000, seed: int = 0) -> Digits:
    """Load scikit-learn's 1,797 digits (Alpaydin and Kaynak, 1998), split at random.

    Parameters
    ----------
    train
        How many images to train on, between 1 and 1,796; the rest is the test set. Default 1000.
    seed
        Seed of the split. Default 0.

    Raises
    ------
    ValueError
        ``train`` leaves one of the two sets empty.

    Examples
    --------
    >>> split = digits(train=1500)
    >>> split.train_images.shape, split.test_images.shape
    (torch.Size([1500, 8, 8]), torch.Size([297, 8, 8]))
    """
    from sklearn.datasets import load_digits

    check_at_least(train, "train", 1)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    if train >= len(labels):
        raise ValueError(f"train: expected fewer than {len(labels)} images, got {train}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train:]
    return Digits(images[first], labels[first], images[rest], labels[rest])
