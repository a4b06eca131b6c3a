r"""My Title: how often a neighbour that is drawn at random has the right label.

Replace this: the paper, its equation numbers, the formulas, and what the fast form does otherwise.
The example is neighbourhood components analysis (Goldberger et al., "Neighbourhood Components
Analysis", NIPS 2004). Item ``i`` of a batch draws another item ``j`` with probability

    w_ij = exp(-|f_i - f_j|^2 / tau) / sum over k != i of exp(-|f_i - f_k|^2 / tau),

and the loss is the mean probability of drawing one of another class. The same number added to all
logits of a row changes no ``w_ij``, so that ``(2 f_i . f_j - |f_j|^2) / tau`` will do: a product of
matrices in place of all differences. Rows go block by block and are made again in the backward
pass, so that nothing of the size ``N x N`` is kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from affnb.checks import (
    check_finite,
    check_floating,
    check_labels,
    check_one_of,
    check_positive,
    check_same_device,
    check_tensor,
)

__all__ = ["my_method_loss"]

_ROWS = 256  # how many rows exist at one time


def _reference(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The equations as they stand: N x N x d differences."""
    D = (features[:, None] - features).square().sum(-1)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    W = (-D / temperature).masked_fill(itself, torch.finfo(D.dtype).min).softmax(1)
    same = (labels[:, None] == labels) & ~itself
    counted = same.any(1)
    error = 1 - (W * same).sum(1)
    return (error * counted).sum() / counted.sum().clamp(min=1)


def _block(features: Tensor, labels: Tensor, rows: Tensor, temperature: float) -> Tensor:
    logits = (2 * features[rows] @ features.T - features.square().sum(1)) / temperature
    W = logits.scatter(1, rows[:, None], -torch.inf).softmax(1)
    return (W * (labels[rows, None] != labels)).sum()


def _auto(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    _, place, count = torch.unique(labels, return_inverse=True, return_counts=True)
    counted = (count[place] > 1).nonzero()[:, 0]
    features = features - features.detach().mean(0)  # distances stay, and fewer digits cancel
    total = features[:0].sum()
    for rows in counted.split(_ROWS):
        total = total + checkpoint(
            _block, features, labels, rows, temperature, use_reentrant=False
        )
    return total / max(len(counted), 1)


def my_method_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    backend: Literal["auto", "reference"] = "auto",
) -> Tensor:
    r"""Probability that the soft neighbour of an item has another label, mean over the batch.

    .. math::
        L = \frac1{|Q|} \sum_{i \in Q} \Big(1 - \sum_{j \ne i,\, y_j = y_i} w_{ij}\Big), \qquad
        w_{ij} \propto e^{-\|f_i - f_j\|^2 / \tau}, \quad \sum_{j \ne i} w_{ij} = 1

    where :math:`Q` are the items that are not alone in their class.

    Parameters
    ----------
    features
        Floating, finite, shape ``(N, d)``.
    labels
        Classes, integers of any value, shape ``(N,)``.
    temperature
        :math:`\tau`, in the unit of a squared feature, positive. Default 1, the paper's.
    backend
        ``"auto"``: block by block. ``"reference"``: the equations, ``N x N x d`` numbers.

    Returns
    -------
    Tensor
        A scalar in [0, 1]; float64 for float64 features, else float32. It is 0 with a zero gradient
        where no item has another of its class, and for an empty batch.

    Raises
    ------
    TypeError
        ``features`` not floating, ``labels`` not integers, or not tensors.
    ValueError
        Shapes or devices that do not fit, features that are not finite, ``temperature <= 0``, an
        unknown backend.

    Notes
    -----
    Time ``O(N^2 d)``, memory ``O(N d)`` and a block of rows; autocast does not reach inside.

    Examples
    --------
    >>> features = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    >>> loss = my_method_loss(features, torch.tensor([0, 0, 1]))
    >>> round(loss.item(), 4)  # the first two count: (e^-9 / (e^-1 + e^-9) + e^-4 / (e^-1 + e^-4)) / 2
    0.0239
    >>> loss.backward()
    """
    check_tensor(features, "features", ndim=2)
    check_floating(features, "features")
    check_labels(labels, "labels", length=len(features))
    check_same_device([("features", features), ("labels", labels)])
    check_finite(features, "features")
    check_positive(temperature, "temperature")
    check_one_of(backend, "backend", ("auto", "reference"))
    compute = _auto if backend == "auto" else _reference
    with torch.autocast(features.device.type, enabled=False):
        x = features if features.dtype == torch.float64 else features.float()
        return compute(x, labels, float(temperature))
