"""Target affinity mass: supervise the pairwise weights themselves.

A matrix of affinity logits ``W`` is turned into one distribution over *pairs* by a softmax over all
of its entries; the share that falls on wanted pairs is the target affinity mass ``M``, and a loss
on ``M`` raises the wanted pairs at the cost of all others (Wang et al., "Affinity Graph Supervision
for Visual Recognition", CVPR 2020; equation numbers below are that paper's).

Everything here rests on one identity. With ``s`` the *mass logit*, the log-sum-exp of the target
logits minus the log-sum-exp of all others,

    M = sigmoid(s),    log M = logsigmoid(s),    1 - M = sigmoid(-s),

so each loss is a smooth function of one well-scaled number.

``backend="reference"`` computes the printed equations instead: the softmax, the sum over targets,
the loss of that sum. It is what the tests compare with, and it has the limits of the printed form:
a target whose weight underflows (in float32, about 104 below the largest logit) gives ``M = 0`` and
an infinite loss, and ``(1 - M)**gamma`` with ``0 < gamma < 1`` has an infinite slope where ``M``
rounds to 1.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affnb import kernels
from affnb.checks import (
    check_at_least,
    check_bool,
    check_differentiated_once,
    check_finite,
    check_flag,
    check_floating,
    check_integers,
    check_labels,
    check_no_nan,
    check_one_of,
    check_same_device,
    check_shape,
    check_square,
    check_tensor,
)
from affnb.distributed import (
    all_gather_uneven,
    all_reduce_logsumexp,
    check_group,
    check_together,
    gather_with_grad,
)
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BatchAffinityLoss",
    "affinity_mass",
    "affinity_mass_loss",
    "batch_affinity_loss",
    "log_affinity_mass",
    "pair_recall_at_k",
    "pairwise_sq_dist",
    "relation_target",
    "same_class_target",
]

Form = Literal["focal", "log", "l2", "smooth_l1", "bce"]
Normalisation = Literal["matrix", "row"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "reference"]

_FORMS = ("focal", "log", "l2", "smooth_l1", "bce")
_BACKENDS = ("auto", "reference")

# Sums of exponentials below it may have lost terms that count: those smaller than any number are 0.
_LEAST_SUM = {torch.float32: 1e-20, torch.float64: 1e-200}


# --------------------------------------------------------------------------------------------------
# The mass of a matrix of logits
# --------------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, target: Tensor, mask: Tensor | None, normalisation: str) -> None:
    check_floating(logits, "logits")
    check_square(logits, "logits")
    check_bool(target, "target")
    check_shape(target, "target", logits.shape)
    if mask is not None:
        check_bool(mask, "mask")
        if mask.shape != logits.shape:
            check_shape(mask, "mask", logits.shape[-2:])
    check_same_device([("logits", logits), ("target", target), ("mask", mask)])
    check_one_of(normalisation, "normalisation", ("matrix", "row"))
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if torch.compiler.is_compiling():
        return
    if logits.numel():
        # One reduction finds both: the largest value is NaN if any is, and inf if any is.
        top = float(logits.detach().amax())
        if math.isnan(top):
            check_no_nan(logits, "logits")
        if top == math.inf:
            raise ValueError(
                "logits: expected values below inf (-inf stands for a masked entry), got inf"
            )
    if mask is not None and mask.numel() and not bool(mask.any()):
        raise ValueError("mask: expected at least one True (an entry to keep), got only False")


def _mass_logit_of_sides(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass logits, their gradients, and flags ``(2, ...)``: are there targets, are there others.

    A softmax of each side; it also tells its log-sum-exp: the largest logit minus the log of the
    largest weight. Without targets or without others both results are 0.
    """
    lowest = torch.finfo(logits.dtype).min  # not -inf: a softmax of nothing else would be NaN
    tops, sums, weights = [], [], []
    for x in (torch.where(target, logits, lowest), torch.where(target, lowest, logits)):
        tops.append(x.amax(-1))
        weights.append(x.softmax(-1))
        sums.append(tops[-1] - weights[-1].amax(-1).log())
    present = torch.stack(tops) > lowest
    neither = ~present.all(0)
    slopes = weights[0].sub_(weights[1]).masked_fill_(neither[..., None], 0.0)
    return (sums[0] - sums[1]).masked_fill_(neither, 0.0), slopes, present


def _mass_logit_at_once(
    logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The same with all weights relative to the largest logit, and no flags where all have both sides.

    On a CPU a step with booleans costs as much as five with numbers, and a softmax as much as three:
    so the targets are numbers, and each weight is made once. Without targets or without others both
    results are some numbers. ``None``, if one side is so far below the other that its weights are lost.
    """
    least = _LEAST_SUM[logits.dtype]
    others = logits - logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    others.exp_()
    wanted = target.view(torch.uint8).to(logits.dtype)
    targets = wanted.sum(-1)
    wanted.mul_(others)
    others.sub_(wanted)  # exact: each weight is on one side
    sums = torch.stack([wanted.sum(-1), others.sum(-1)])
    present = None
    if not float(sums.amin()) > least:
        entries = torch.stack([targets, logits.shape[-1] - targets]).clamp_(max=1)
        if not bool((sums >= least * entries).all()):  # nor for NaN
            return None
        present = entries > 0
        sums.clamp_(min=least)
    factors = sums.reciprocal()[..., None]
    slopes = wanted.mul_(factors[0]).addcmul_(others, factors[1], value=-1)
    return torch.log(sums[0] / sums[1]), slopes, present


class _MassLogit(torch.autograd.Function):
    """Mass logits of the last dimension, with their gradient made in the forward pass.

    The gradient of ``s`` is the softmax over the targets minus the softmax over the others, so
    backward is one product. The second result says whether there are targets, and whether there are
    others; it is ``None`` if all have both, and without both ``s`` is some number (see `_fill_in`).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        # Which way to go depends on values, which a traced graph cannot look at.
        tracing = torch.compiler.is_compiling()
        found = None if tracing else _mass_logit_at_once(logits, target)
        s, slopes, present = found or _mass_logit_of_sides(logits, target)
        ctx.save_for_backward(logits, target, slopes)
        if present is not None:
            ctx.mark_non_differentiable(present)
        return s, present

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, target, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: the same, through autograd
            lowest = torch.finfo(logits.dtype).min
            x = logits.clamp(min=lowest)
            slopes = torch.where(target, x, lowest).softmax(-1)
            slopes = slopes - torch.where(target, lowest, x).softmax(-1)
        return grads[0][..., None] * slopes, None


def _mass_logit(
    logits: Tensor, target: Tensor, mask: Tensor | None, normalisation: str
) -> tuple[Tensor, Tensor | None]:
    """Mass logit per graph (row), and whether there are targets and others; ``None``: all have both."""
    x = logits.to(wide_dtype(logits))
    if mask is not None:  # 0 or -inf; far faster on a CPU than a choice
        x = x + mask.view(torch.uint8).to(x.dtype).log()
        target = target & mask
    if normalisation == "matrix":
        x, target = x.flatten(-2), target.flatten(-2)
    if x.numel() == 0:  # no entry has no largest one; keep the (empty) history for backward
        s = x.sum(-1)
        return s, torch.zeros_like(s, dtype=torch.bool).expand(2, *s.shape)
    result: tuple[Tensor, Tensor | None] = _MassLogit.apply(x, target)  # type: ignore[no-untyped-call]
    return result


def _fill_in(
    values: Tensor, present: Tensor | None, without_targets: float, without_others: float
) -> Tensor:
    """Put the values that hold where a graph (row) has no target, or targets but no others."""
    if present is None:
        return values
    has_target, has_other = present
    if without_targets == without_others:
        return values.masked_fill(~(has_target & has_other), without_targets)
    values = values.masked_fill(~has_target, without_targets)
    return values.masked_fill(has_target & ~has_other, without_others)


def affinity_mass(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    normalisation: Normalisation = "matrix",
) -> Tensor:
    r"""Share of the softmax weight that falls on the target pairs (Eq. 3).

    .. math:: \mathcal M = \sum_{mn} T_{mn} \, e^{\omega_{mn}} / \sum_{ij} e^{\omega_{ij}}

    Parameters
    ----------
    logits
        Affinity logits, shape ``(..., N, N)``, any floating dtype, any value below ``inf``. An
        entry of ``-inf`` takes no part, exactly as if it were masked.
    target
        Wanted pairs, bool, the shape of ``logits``.
    mask
        Bool, ``(..., N, N)`` or ``(N, N)``: ``True`` where an entry takes part. Default: all do.
    normalisation
        ``"matrix"`` (the paper's): one softmax over all entries of a graph. ``"row"`` (its
        supplement): one softmax, and one mass, for each row.

    Returns
    -------
    Tensor
        Shape ``(...)`` for ``"matrix"`` or ``(..., N)`` for ``"row"``, in [0, 1]; float64 for
        float64 input, else float32. A graph (row) without any target has mass 0, one in which
        every entry is a target has mass 1, both with a zero gradient.

    Raises
    ------
    TypeError
        ``logits`` not floating, ``target`` or ``mask`` not bool, or not tensors.
    ValueError
        Shapes or devices that do not fit, NaN or ``+inf`` logits, a mask that removes everything.
        (While ``torch.compile`` traces, values are not looked at.)

    Notes
    -----
    Time and memory ``O(N^2)`` per graph.

    Examples
    --------
    >>> logits = torch.zeros(3, 3)
    >>> affinity_mass(logits, torch.eye(3, dtype=torch.bool))  # equal logits: |S| / N^2
    tensor(0.3333)
    """
    _check_logits(logits, target, mask, normalisation)
    s, present = _mass_logit(logits, target, mask, normalisation)
    return _fill_in(s.sigmoid(), present, 0.0, 1.0)


def log_affinity_mass(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    normalisation: Normalisation = "matrix",
) -> Tensor:
    """Logarithm of :func:`affinity_mass`, exact also where the mass itself underflows.

    Parameters
    ----------
    logits, target, mask, normalisation
        As for :func:`affinity_mass`.

    Returns
    -------
    Tensor
        Shape ``(...)`` or ``(..., N)``, at most 0; ``-inf`` with a zero gradient for a graph (row)
        without a target.

    Raises
    ------
    TypeError, ValueError
        As :func:`affinity_mass`.

    Notes
    -----
    Time and memory ``O(N^2)`` per graph.

    Examples
    --------
    >>> logits = torch.tensor([[-500.0, 0.0], [0.0, 0.0]])
    >>> target = torch.tensor([[True, False], [False, False]])
    >>> log_affinity_mass(logits, target)
    tensor(-501.0986)
    """
    _check_logits(logits, target, mask, normalisation)
    s, present = _mass_logit(logits, target, mask, normalisation)
    return _fill_in(F.logsigmoid(s), present, -torch.inf, 0.0)


def _loss_of_mass_logit(s: Tensor, form: str, gamma: float) -> Tensor:
    """The loss forms as functions of the mass logit; finite with finite slopes for every ``s``."""
    if form == "focal":  # (1 - M)^gamma = exp(gamma log(1 - M)) has no singular slope at M = 1
        return -(gamma * F.logsigmoid(-s)).exp() * F.logsigmoid(s)
    if form == "log":
        return -F.logsigmoid(s)
    x = torch.sigmoid(-s)
    if form == "l2":
        return x.square()
    return torch.where(x < 0.5, x.square(), x - 0.25)


def _loss_of_mass(mass: Tensor, form: str, gamma: float) -> Tensor:
    """The same forms as the paper prints them, in ``M`` (Eqs. 5 to 7)."""
    x = 1 - mass
    if form == "focal":
        return -(x**gamma) * mass.log()
    if form == "log":
        return -mass.log()
    if form == "l2":
        return x**2
    return torch.where(x < 0.5, x**2, x - 0.25)


def _reference_losses(
    logits: Tensor, target: Tensor, keep: Tensor, form: str, gamma: float, normalisation: str
) -> Tensor:
    """One loss per graph (row) by the printed equations; 0 where there is no target."""
    x, t, k = ((v.flatten(-2) if normalisation == "matrix" else v) for v in (logits, target, keep))
    t = t & k
    chosen = t.any(-1)  # graphs (rows) with a target; only these enter the equations
    x, t, k = x[chosen], t[chosen], k[chosen]
    if form == "bce":
        p = torch.sigmoid(x.masked_fill(~k, 0.0))
        terms = torch.where(t, -p.log(), torch.where(k, -(1 - p).log(), 0.0))
        values = terms.sum(-1)
    else:
        weights = x.masked_fill(~k, -torch.inf).softmax(-1)
        values = _loss_of_mass((weights * t).sum(-1), form, gamma)
    losses = logits.new_zeros(chosen.shape)
    losses[chosen] = values
    return losses


def affinity_mass_loss(
    logits: Tensor,
    target: Tensor,
    *,
    form: Form = "focal",
    gamma: float = 2.0,
    normalisation: Normalisation = "matrix",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Loss on the target affinity mass of a matrix of logits (Eqs. 5 to 7).

    With :math:`\mathcal M` from :func:`affinity_mass` and :math:`x = 1 - \mathcal M`:

    =============== ======================================================================
    ``form``        loss
    =============== ======================================================================
    ``"focal"``     :math:`-x^\gamma \log \mathcal M` (Eq. 7, the paper's choice)
    ``"log"``       :math:`-\log \mathcal M`
    ``"l2"``        :math:`x^2` (Eq. 5)
    ``"smooth_l1"`` :math:`x^2` if :math:`x < 1/2`, else :math:`x - 1/4` (Eq. 6)
    ``"bce"``       :math:`-\sum_{ij} T_{ij} \log p_{ij} + (1 - T_{ij}) \log (1 - p_{ij})`,
                    :math:`p = \sigma(\omega)` entry by entry: no mass, no competition (supplement)
    =============== ======================================================================

    Parameters
    ----------
    logits
        Affinity logits, shape ``(..., N, N)``, any floating dtype; ``-inf`` means masked.
    target
        Wanted pairs, bool, the shape of ``logits``. It need not be symmetric.
    form
        One of the table. Default ``"focal"``.
    gamma
        Focusing parameter of ``"focal"``, at least 0 (0 is ``"log"``). Default 2, the paper's value
        for attention graphs (Table 1). The other forms ignore it.
    normalisation
        ``"matrix"`` (default) or ``"row"``; see :func:`affinity_mass`.
    mask
        Bool, ``(..., N, N)`` or ``(N, N)``: ``True`` where an entry takes part. To leave the
        diagonal out: ``~torch.eye(N, dtype=torch.bool)``.
    reduction
        ``"mean"`` over the graphs (rows) that have a target, ``"sum"`` (for rows: the supplement's
        formula, whose scale grows with N), or ``"none"``.
    backend
        ``"auto"``: in the mass logit, stable for all finite logits. ``"reference"``: the printed
        equations, which over- and underflow where those do (see the module's text).

    Returns
    -------
    Tensor
        A scalar, or shape ``(...)`` or ``(..., N)`` for ``reduction="none"``; float64 for float64
        logits, else float32. A graph (row) without a target contributes 0 with a zero gradient and
        is left out of the mean, for every form; if none has a target, the loss is 0. One in which
        every entry is a target has mass 1 and loss 0 (``"bce"`` excepted, which has no mass).

    Raises
    ------
    TypeError
        ``logits`` not floating, ``target`` or ``mask`` not bool, or not tensors.
    ValueError
        Shapes or devices that do not fit, NaN or ``+inf`` logits, a mask that removes everything,
        ``gamma < 0``, an unknown option, or ``form="bce"`` with ``normalisation="row"``.

    Notes
    -----
    Time and memory ``O(N^2)`` per graph: one exponential an entry forward (three where targets and
    others lie so far apart that each side needs its own), one product backward. Works
    under ``torch.autocast`` (float32 inside), ``torch.compile(fullgraph=True)`` and twice through
    autograd.

    Examples
    --------
    >>> logits = torch.zeros(2, 2, requires_grad=True)
    >>> target = torch.tensor([[True, False], [False, False]])
    >>> loss = affinity_mass_loss(logits, target, form="log")
    >>> loss.item()  # the mass is 1/4
    1.3862943649291992
    >>> loss.backward()
    >>> logits.grad  # softmax over all minus softmax over targets; sums to 0
    tensor([[-0.7500,  0.2500],
            [ 0.2500,  0.2500]])
    """
    _check_logits(logits, target, mask, normalisation)
    check_one_of(form, "form", _FORMS)
    check_at_least(gamma, "gamma", 0)
    check_one_of(reduction, "reduction", ("mean", "sum", "none"))
    check_one_of(backend, "backend", _BACKENDS)
    if form == "bce" and normalisation == "row":
        raise ValueError(
            "form: expected a form of the mass with normalisation='row', got 'bce', which scores "
            "each entry by itself and has nothing to normalise"
        )

    x = logits.to(wide_dtype(logits))
    has_target: Tensor | None  # None: every graph (row) has one
    if backend == "reference" or form == "bce":
        keep = x > -torch.inf if mask is None else (x > -torch.inf) & mask
        has_target = (target & keep).flatten(-2 if normalisation == "matrix" else -1).any(-1)
        if backend == "reference":
            losses = _reference_losses(x, target, keep, form, float(gamma), normalisation)
        else:
            x = x.masked_fill(~keep, 0.0)  # -inf would make its own gradient NaN
            terms = F.logsigmoid(torch.where(target, x, -x))
            losses = -terms.masked_fill(~(keep & has_target[..., None, None]), 0.0).sum((-2, -1))
    else:
        s, present = _mass_logit(logits, target, mask, normalisation)
        losses = _fill_in(_loss_of_mass_logit(s, form, float(gamma)), present, 0.0, 0.0)
        has_target = None if present is None else present[0]

    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (losses.numel() if has_target is None else has_target.sum().clamp(min=1))


# --------------------------------------------------------------------------------------------------
# Targets and distances
# --------------------------------------------------------------------------------------------------


def same_class_target(labels: Tensor) -> Tensor:
    """Target of the batch variant: pairs of the same class (section 5.2).

    Parameters
    ----------
    labels
        Class labels, integers, shape ``(N,)``; any values.

    Returns
    -------
    Tensor
        Bool, shape ``(N, N)``, symmetric. The diagonal is ``True``, as the definition says
        literally; mask it out to leave self-pairs aside.

    Raises
    ------
    TypeError
        Not an integer tensor.
    ValueError
        Not one-dimensional.

    Notes
    -----
    Time and memory ``O(N^2)``.

    Examples
    --------
    >>> same_class_target(torch.tensor([0, 1, 0])).int()
    tensor([[1, 0, 1],
            [0, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """
    check_labels(labels, "labels")
    return labels[:, None] == labels[None, :]


def _check_boxes(boxes: Tensor, name: str) -> None:
    check_floating(boxes, name)
    check_shape(boxes, name, (None, 4))
    check_finite(boxes, name)
    if bool((boxes[:, 2:] < boxes[:, :2]).any()):
        raise ValueError(f"{name}: expected (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")


@cache  # a failing import is looked for again and again, which takes longer than the boxes
def _torchvision_box_iou() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from torchvision.ops import box_iou
    except (ImportError, RuntimeError):  # RuntimeError: built for another PyTorch
        return None
    found: Callable[[Tensor, Tensor], Tensor] = box_iou
    return found


def _box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """``torchvision.ops.box_iou`` where torchvision is installed, else the same in plain PyTorch.

    torchvision is an optional dependency (it serves the data sets), and its compiled operators load
    only beside the very PyTorch build that they were made for, so its absence must not take this
    function away.
    """
    box_iou = _torchvision_box_iou()
    if box_iou is None:
        low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
        overlap = (high - low).clamp(min=0).prod(-1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        other_area = (others[:, 2:] - others[:, :2]).prod(-1)
        return overlap / (area[:, None] + other_area[None, :] - overlap)
    return box_iou(boxes, others)


def relation_target(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    iou_threshold: float = 0.5,
    rule: Literal["different_category", "different_instance"] | Tensor = "different_category",
) -> Tensor:
    r"""Target of the attention variant: proposals on two related objects (section 4.1).

    With :math:`A_{a\alpha} = [\mathrm{IoU}(a, \alpha) > \text{threshold}]` and :math:`D` the
    objects' relation, :math:`T = [A D A^\top > 0]`.

    Parameters
    ----------
    boxes
        Proposals, floating, shape ``(P, 4)``, rows ``(x1, y1, x2, y2)`` in pixels (any unit, the
        same for all boxes).
    gt_boxes
        Ground-truth objects, floating, shape ``(G, 4)``; ``G = 0`` is legal (no target).
    gt_labels
        Their classes, integers, shape ``(G,)``.
    iou_threshold
        In [0, 1); a proposal lies on an object when their IoU is strictly above it. Default 0.5.
    rule
        Which objects are related: ``"different_category"`` (default, the paper's main target),
        ``"different_instance"`` (any two different objects), or a bool tensor ``(G, G)`` of
        annotated relations, not necessarily symmetric, with a ``False`` diagonal: no object is
        related to itself.

    Returns
    -------
    Tensor
        Bool, shape ``(P, P)``. A proposal that lies on two related objects gets ``T[a, a] = True``.

    Raises
    ------
    TypeError
        Boxes not floating tensors, labels not integers, ``rule`` of another type.
    ValueError
        Wrong shapes, boxes that are not finite or not ordered, a threshold outside [0, 1), an
        unknown rule or one that relates an object to itself, devices that differ.

    Notes
    -----
    Time ``O(P G (P + G))``, memory ``O(P^2 + P G)``.

    Examples
    --------
    >>> gt = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    >>> proposals = torch.cat([gt, torch.tensor([[50.0, 0, 60, 10]])])
    >>> relation_target(proposals, gt, torch.tensor([3, 7])).int()
    tensor([[0, 1, 0],
            [1, 0, 0],
            [0, 0, 0]], dtype=torch.int32)
    """
    _check_boxes(boxes, "boxes")
    _check_boxes(gt_boxes, "gt_boxes")
    count = gt_boxes.shape[0]
    check_labels(gt_labels, "gt_labels", length=count)
    check_at_least(iou_threshold, "iou_threshold", 0)
    if iou_threshold >= 1:
        raise ValueError(f"iou_threshold: expected a number in [0, 1), got {iou_threshold!r}")
    if isinstance(rule, Tensor):
        check_bool(rule, "rule")
        check_shape(rule, "rule", (count, count))
        check_same_device([("boxes", boxes), ("rule", rule)])
        if bool(rule.diagonal().any()):
            raise ValueError("rule: expected a False diagonal, got an object related to itself")
        related = rule
    elif isinstance(rule, str):
        check_one_of(rule, "rule", ("different_category", "different_instance"))
        if rule == "different_category":
            related = gt_labels[:, None] != gt_labels[None, :]
        else:
            related = ~torch.eye(count, dtype=torch.bool, device=gt_labels.device)
    else:
        raise TypeError(f"rule: expected a str or a bool tensor, got {type(rule).__name__}")
    check_same_device([("boxes", boxes), ("gt_boxes", gt_boxes), ("gt_labels", gt_labels)])

    # Double precision, so that an IoU beside the threshold does not depend on the boxes' dtype.
    on_object = (_box_iou(boxes.double(), gt_boxes.double()) > iou_threshold).float()
    return on_object @ related.float() @ on_object.T > 0


def pairwise_sq_dist(features: Tensor) -> Tensor:
    r"""Squared Euclidean distances of all pairs of rows.

    Computed as :math:`\|f_m\|^2 + \|f_n\|^2 - 2 f_m \cdot f_n` of the mean-centred features, so one
    matrix product does the work and a common offset of the features costs no precision.

    Parameters
    ----------
    features
        Floating, shape ``(..., N, d)``.

    Returns
    -------
    Tensor
        Shape ``(..., N, N)``, at least 0, the diagonal exactly 0; float64 for float64 input, else
        float32 (the squared norms of half-precision features overflow above 65504), also under
        autocast.

    Raises
    ------
    TypeError
        Not a floating tensor.
    ValueError
        Fewer than two dimensions, or values that are not finite.

    Notes
    -----
    Time ``O(N^2 d)``, memory ``O(N^2)``. The absolute error is about ``eps * max ||f||^2`` of the
    centred features; on CUDA, ``torch.set_float32_matmul_precision("high")`` makes ``eps`` that of
    TF32.

    Examples
    --------
    >>> pairwise_sq_dist(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[ 0., 25.],
            [25.,  0.]])
    """
    check_floating(features, "features")
    if features.ndim < 2:
        raise ValueError(f"features: expected shape (..., N, d), got {tuple(features.shape)}")
    if not torch.compiler.is_compiling():  # looking at values would break the graph
        check_finite(features, "features")
    with torch.autocast(features.device.type, enabled=False):
        x = features.to(wide_dtype(features))
        if x.shape[-2]:
            # Distances do not depend on the centre, so neither does any derivative: detach it.
            x = x - x.detach().mean(-2, keepdim=True)
        norms = x.square().sum(-1)
        distance = norms[..., :, None] + norms[..., None, :] - 2 * (x @ x.mT)
        own = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        return distance.clamp(min=0).masked_fill(own, 0.0)


def pair_recall_at_k(
    logits: Tensor,
    gt_pairs: Tensor,
    assign: Tensor,
    ks: Sequence[int],
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Share of the ground-truth relations found among the K heaviest pairs of one graph.

    The candidates are *all* entries of the matrix, ordered by their logit (the order of the matrix
    softmax; a row softmax would reorder pairs across rows). A relation ``(alpha, beta)`` is found
    when some pair ``(a, b)`` among the first K has proposal ``a`` on object ``alpha`` and ``b`` on
    ``beta``, and counts once however many pairs find it.

    Parameters
    ----------
    logits
        Floating, shape ``(P, P)``. Of equal logits, the entry that comes first in row-major order
        ranks first. Entries of ``-inf`` are not candidates.
    gt_pairs
        Ground-truth relations, integers, shape ``(R, 2)``, rows ``(alpha, beta)`` of object indices
        in ``[0, G)``. Direction matters; list both directions if either should count. A relation
        listed twice counts as one.
    assign
        Bool, shape ``(P, G)``: which proposals lie on which objects (IoU above 0.5 in the paper).
    ks
        The values of K, positive integers. More than there are candidates means all of them.
    mask
        Bool, shape ``(P, P)``: ``True`` for candidates. Default: every entry, self-pairs included.

    Returns
    -------
    Tensor
        float32, shape ``(len(ks),)``, recalls in [0, 1].

    Raises
    ------
    TypeError
        Wrong dtypes, or ``ks`` not integers.
    ValueError
        Wrong shapes, NaN or ``+inf`` logits, an object index out of range, no relation at all (the
        recall is undefined), a K below 1, a mask that removes everything, devices that differ.

    Notes
    -----
    Time ``O(P^2 log P + G P^2)`` for G objects, memory ``O(P^2)``.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 3.0], [2.0, 1.0]])
    >>> pair_recall_at_k(logits, torch.tensor([[0, 1], [1, 0]]), torch.eye(2).bool(), [1, 2])
    tensor([0.5000, 1.0000])
    """
    check_tensor(logits, "logits", ndim=2)
    check_bool(assign, "assign", ndim=2)
    check_shape(assign, "assign", (logits.shape[0], None))
    _check_logits(logits, torch.zeros_like(logits, dtype=torch.bool), mask, "matrix")
    check_labels(gt_pairs, "gt_pairs", ndim=2)
    check_shape(gt_pairs, "gt_pairs", (None, 2))
    check_labels(gt_pairs, "gt_pairs", ndim=2, num_classes=assign.shape[1])
    check_same_device([("logits", logits), ("gt_pairs", gt_pairs), ("assign", assign)])
    if gt_pairs.shape[0] == 0:
        raise ValueError("gt_pairs: expected at least one relation, got shape (0, 2)")
    check_integers(ks, "ks", 1)

    if not logits.numel():
        return torch.zeros(len(ks), device=logits.device)
    flat = logits.detach().flatten()
    never = flat.numel()  # the rank of what is not a candidate
    order = flat.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(never, device=order.device)
    candidate = flat > -torch.inf
    if mask is not None:
        candidate &= mask.flatten()
        # Masked entries must not use up places in the ranking.
        ranks[order] = candidate[order].cumsum(0) - 1
    ranks = ranks.masked_fill(~candidate, never).view_as(logits)
    # The best rank of the pairs of two objects: over the rows of the one, then the columns of the other.
    best = torch.stack([torch.where(own[:, None], ranks, never).amin(0) for own in assign.T])
    best = torch.stack([torch.where(own, best, never).amin(1) for own in assign.T], 1)
    rank = best[tuple(torch.unique(gt_pairs, dim=0).long().T)]
    # A relation that no candidate finds keeps the rank `never`, however large K is.
    recalls = [float(((rank < k) & (rank < never)).float().mean()) for k in ks]
    return torch.tensor(recalls, device=logits.device)


# --------------------------------------------------------------------------------------------------
# The batch variant
# --------------------------------------------------------------------------------------------------

# Rows and columns of a tile. On the CPU a tile (2 MB in float32) stays in a core's L2 cache between
# the matrix products and the element-wise passes; on a GPU launching is what costs.
_TILE_CPU = (512, 1024)
_TILE_CUDA = (4096, 8192)
# How far a new maximum may lie above the shift of a running sum before the sum is rescaled. exp(30)
# times any feasible number of pairs is far from the overflow of float32.
_SLACK = 30.0
# Where exp of a shifted logit stops falling. Beside a sum of at least 1 what lies below is nothing,
# but the arithmetic of subnormal numbers, which it would bring in, is tens of times slower.
_FLOOR = {torch.float32: -60.0, torch.float64: -100.0}


def _tile_size(x: Tensor) -> tuple[int, int]:
    return _TILE_CUDA if x.is_cuda else _TILE_CPU


def _log_add(a: float, b: float) -> float:
    """``log(e^a + e^b)``, where one of the two may be ``-inf``."""
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


class _Batch(NamedTuple):
    """Features in label order, and where each class lies: what the sweep over the pairs reads.

    ``left @ right.T`` are the affinity logits: ``left = [f, -q, 1]`` and ``right = [f, 1, -q]``
    with ``q = ||f||^2 / 2``. In label order the targets of a run of whole classes lie in one block
    of columns, so the ``N x N`` target need not exist, and most tiles are of one kind.
    """

    left: Tensor  # (n, d + 2): the rows of this process
    right: Tensor  # (N, d + 2): all columns
    row_labels: Tensor  # (n,)
    column_labels: Tensor  # (N,)
    row_ends: list[int]  # for each class among the rows: one past its last row
    spans: list[tuple[int, int]]  # and the range of its columns
    own_columns: Tensor  # (n,): the column that holds the same item as the row
    rows_are_columns: bool
    target_pairs: int  # ordered pairs of two different items of one class
    other_pairs: int  # ordered pairs of two classes


class _Tile(NamedTuple):
    logits: Tensor  # (rows, columns); self-pairs and entries of the other kind are -inf
    is_target: bool
    rows: slice
    columns: slice
    mirrored: bool  # stands for its transpose as well


def _check_half_norms(half_norms: Tensor) -> None:
    # A logit is at most 4 times that large, so none overflows if this does not.
    if not 4 * float(half_norms.amax()) <= torch.finfo(half_norms.dtype).max:
        raise ValueError(
            f"features: expected finite values with squared norms that {half_norms.dtype} can hold, "
            "got an overflow"
        )


def _prepare(features: Tensor, labels: Tensor, first: int, rows: int) -> tuple[_Batch, Tensor]:
    """Centre the features, extend them, and sort them by label.

    Rows ``[first, first + rows)`` of the batch are this process's; the second result holds, in
    label order, the index of each among them.
    """
    count = labels.shape[0]
    # The loss depends on differences alone; without a common offset the products lose less.
    centred = features - features.mean(0, keepdim=True)
    sorted_labels, order = labels.sort(stable=True)
    sorted_features = centred[order]
    half_norms = sorted_features.square().sum(1, keepdim=True) / 2
    _check_half_norms(half_norms)
    ones = torch.ones_like(half_norms)
    left = torch.cat([sorted_features, -half_norms, ones], 1)
    right = torch.cat([sorted_features, ones, -half_norms], 1)
    sizes_tensor = torch.unique_consecutive(sorted_labels, return_counts=True)[1]
    ends_tensor = sizes_tensor.cumsum(0)
    ends, sizes = ends_tensor.tolist(), sizes_tensor.tolist()
    spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    same = sum(size * size for size in sizes)
    if rows == count:
        own = torch.arange(count, device=labels.device)
        row_ends, row_labels = ends, sorted_labels
    else:
        own = ((order >= first) & (order < first + rows)).nonzero().squeeze(1)
        left, row_labels = left[own], sorted_labels[own]
        all_ends = torch.searchsorted(own, ends_tensor).tolist()
        present = [end > start for start, end in zip([0, *all_ends], all_ends, strict=False)]
        row_ends = [end for end, here in zip(all_ends, present, strict=True) if here]
        spans = [span for span, here in zip(spans, present, strict=True) if here]
    batch = _Batch(
        left=left,
        right=right,
        row_labels=row_labels,
        column_labels=sorted_labels,
        row_ends=row_ends,
        spans=spans,
        own_columns=own,
        rows_are_columns=rows == count,
        target_pairs=same - count,
        other_pairs=count * count - same,
    )
    return batch, order[own] - first


def _tiles(batch: _Batch) -> Iterator[_Tile]:
    """All pairs of a row and another column, tile by tile; each tile is valid until the next.

    A block of rows is either a run of whole classes or part of one class. Where the rows are all
    the columns, only tiles on and above the diagonal are made, those above it mirrored.
    """
    height, width = _tile_size(batch.left)
    rows, columns = batch.left.shape[0], batch.right.shape[0]
    buffer = batch.left.new_empty(min(height, rows) * min(width, columns))
    start = 0
    while start < rows:
        first = bisect_right(batch.row_ends, start)  # the class of this row
        last = first
        begin = batch.row_ends[first - 1] if first else 0
        stop = min(batch.row_ends[first], start + height)
        if start == begin and stop == batch.row_ends[first]:
            last = bisect_right(batch.row_ends, start + height) - 1
            stop = batch.row_ends[last]
        one_class = first == last
        low, high = batch.spans[first][0], batch.spans[last][1]
        # (columns from, to, holds targets, mirrored)
        if batch.rows_are_columns:
            sections = [
                (start, stop, True, False),
                (stop, high, True, True),
                (high, columns, False, True),
            ]
        else:
            sections = [
                (0, low, False, False),
                (low, high, True, False),
                (high, columns, False, False),
            ]
        block = slice(start, stop)
        left = batch.left[block]
        for begin, end, has_targets, mirrored in sections:
            for at in range(begin, end, width):
                part = slice(at, min(at + width, end))
                shape = (stop - start, part.stop - at)
                tile = buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(left, batch.right[part].T, out=tile)
                if not has_targets:
                    yield _Tile(tile, False, block, part, mirrored)
                    continue
                if not mirrored:
                    own = batch.own_columns[block, None] - at
                    if batch.rows_are_columns:
                        tile.diagonal().fill_(-torch.inf)
                    else:
                        own_here = own == torch.arange(shape[1], device=own.device)
                        tile.masked_fill_(own_here, -torch.inf)
                if one_class:
                    yield _Tile(tile, True, block, part, mirrored)
                    continue
                same = batch.row_labels[block, None] == batch.column_labels[None, part]
                yield _Tile(tile.masked_fill(~same, -torch.inf), True, block, part, mirrored)
                yield _Tile(tile.masked_fill_(same, -torch.inf), False, block, part, mirrored)
        start = stop


def _pull(sums: Tensor, batch: _Batch, tile: _Tile, weights: Tensor, sign: float = 1.0) -> None:
    """Add ``sum_b w_ab [f_b, 1]`` to row ``a`` of ``sums``, for all pairs that the tile stands for."""
    points = batch.right[:, :-1]
    sums[tile.rows].addmm_(weights, points[tile.columns], alpha=sign)
    if tile.mirrored:
        sums[tile.columns].addmm_(weights.T, points[tile.rows], alpha=sign)


def _laplacian(sums: Tensor, batch: _Batch) -> Tensor:
    """``2 sum_b w_ab (f_b - f_a)``: the gradient of a sum over pairs with slopes ``w = w^T``."""
    return 2 * (sums[:, :-1] - sums[:, -1:] * batch.left[:, :-2])


class _RunningSum:
    """``sum exp(logit)`` over tiles of one kind, relative to ``exp(shift)``.

    With ``sums`` (see :func:`_pull`) the gradient is collected in the same sweep: the result is a
    scalar, so its gradient is one ``n x d`` matrix, and no tile need be made again in backward.
    """

    def __init__(self, batch: _Batch, *, with_grad: bool) -> None:
        self.batch = batch
        self.shift = -math.inf
        self.total = 0.0
        self.sums = torch.zeros_like(batch.left[:, 1:]) if with_grad else None
        self.floor = _FLOOR[batch.left.dtype]

    def add(self, tile: _Tile) -> None:
        x = tile.logits
        top = min(float(x.amax()), 0.0)
        if top == -math.inf:
            return
        if top > self.shift + _SLACK:
            scale = math.exp(self.shift - top)
            self.shift = top
            self.total *= scale
            if self.sums is not None:
                self.sums *= scale
        # The upper bound undoes a squared distance that rounding made negative.
        x.sub_(self.shift).clamp_(self.floor, -self.shift).exp_()
        if self.sums is None:
            self.total += (1 + tile.mirrored) * float(x.sum())
        else:
            _pull(self.sums, self.batch, tile, x)

    def log(self) -> float:
        total = self.total if self.sums is None else float(self.sums[:, -1].sum())
        return math.log(total) + self.shift if total > 0 else -math.inf


def _mass_logit_of_batch(
    batch: _Batch, include_self: bool, group: ProcessGroup | None, with_grad: bool
) -> tuple[float, Tensor | None]:
    """The mass logit of the whole batch, and its gradient with respect to the rows."""
    inside = _RunningSum(batch, with_grad=with_grad)
    outside = _RunningSum(batch, with_grad=with_grad)
    for tile in _tiles(batch):
        (inside if tile.is_target else outside).add(tile)
    logs = torch.tensor([inside.log(), outside.log()], dtype=torch.float64)
    if group is not None:
        logs = all_reduce_logsumexp(logs.to(batch.left.device), group)
    log_inside, log_outside = logs.tolist()
    if include_self:
        # N self-pairs with logit 0. They pull on nothing, so they enter the value alone.
        log_inside = _log_add(log_inside, math.log(batch.right.shape[0]))
    if inside.sums is None or outside.sums is None:
        return log_inside - log_outside, None
    inside.sums *= math.exp(inside.shift - log_inside)
    outside.sums *= math.exp(outside.shift - log_outside)
    return log_inside - log_outside, _laplacian(inside.sums.sub_(outside.sums), batch)


def _bce_of_batch(
    batch: _Batch, include_self: bool, group: ProcessGroup | None, with_grad: bool
) -> tuple[float, Tensor | None]:
    """The single-entry cross-entropy of the whole batch, and its gradient for the rows."""
    sums = torch.zeros_like(batch.left[:, 1:]) if with_grad else None
    value = 0.0
    for tile in _tiles(batch):
        x = tile.logits
        # softplus(x) for others, softplus(-x) for targets; -inf marks an absent entry, which adds 0.
        if tile.is_target:
            absent = x == -torch.inf
            x.clamp_(max=0).neg_().masked_fill_(absent, -torch.inf)
        else:
            x.clamp_(max=0)
        value -= (1 + tile.mirrored) * float(F.logsigmoid(-x).sum(dtype=torch.float64))
        if sums is not None:
            _pull(sums, batch, tile, x.sigmoid_(), -1.0 if tile.is_target else 1.0)
    if group is not None:
        total = torch.tensor(value, dtype=torch.float64, device=batch.left.device)
        torch.distributed.all_reduce(total, group=group)
        value = float(total)
    if include_self:
        value += batch.right.shape[0] * math.log(2)
    return value, None if sums is None else _laplacian(sums, batch)


def _mass_logit_of_tile(
    features: Tensor, labels: Tensor, include_self: bool, with_grad: bool
) -> tuple[float, Tensor | None, bool]:
    """Value, gradient and whether they count, for the mass of a batch that fits into one tile.

    The arithmetic of the sweep without its sorting and cutting, which at the paper's batch size
    would cost more than the matrix itself.
    """
    centred = features - features.mean(0, keepdim=True)
    x = centred @ centred.T
    half_norms = x.diagonal() / 2
    _check_half_norms(half_norms)
    x.sub_(half_norms).sub_(half_norms[:, None]).fill_diagonal_(-torch.inf)
    same = labels[:, None] == labels
    inside, outside = x.masked_fill(~same, -torch.inf), x.masked_fill_(same, -torch.inf)
    tops = [min(float(part.amax()), 0.0) for part in (inside, outside)]
    if tops[1] == -math.inf or (tops[0] == -math.inf and not include_self):
        return 0.0, None, False
    logs = []
    for part, top in zip((inside, outside), tops, strict=True):
        if top == -math.inf:
            logs.append(top)
            continue
        total = float(part.sub_(top).clamp_(_FLOOR[x.dtype], -top).exp_().sum())
        logs.append(top + math.log(total))
    if include_self:
        logs[0] = _log_add(logs[0], math.log(len(features)))
    value = logs[0] - logs[1]
    if not with_grad:
        return value, None, True
    # The weights relative to their sums; exp(-inf) = 0 where there was no target but the item.
    slopes = inside if tops[0] > -math.inf else inside.zero_()
    slopes *= math.exp(tops[0] - logs[0])
    slopes.sub_(outside, alpha=math.exp(tops[1] - logs[1]))
    return value, 2 * (slopes @ centred - slopes.sum(1, keepdim=True) * centred), True


class _BatchValue(torch.autograd.Function):
    """Mass logit (or cross-entropy) of a batch, with its gradient made in the forward pass.

    Returns the value, and whether it counts: whether the batch has targets (and, for the mass,
    others). A value that does not count is 0, and so is its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        bce: bool,
        include_self: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, bool]:
        value, gradient, counts = 0.0, None, False
        with_grad = ctx.needs_input_grad[0]
        with torch.autocast(features.device.type, enabled=False):
            rows, first = features.shape[0], 0
            everything = features
            if group is not None:
                parts = all_gather_uneven(features, group)
                first = sum(len(part) for part in parts[: torch.distributed.get_rank(group)])
                everything = torch.cat(parts)
                labels = torch.cat(all_gather_uneven(labels.long(), group))
            if group is None and not bce and 0 < rows <= min(_tile_size(features)):
                value, gradient, counts = _mass_logit_of_tile(
                    features, labels, include_self, with_grad
                )
            elif everything.shape[0]:
                batch, index = _prepare(everything, labels, first, rows)
                targets = batch.target_pairs + include_self * everything.shape[0]
                counts = targets > 0 and (bce or batch.other_pairs > 0)
                if counts:
                    sweep = _bce_of_batch if bce else _mass_logit_of_batch
                    value, in_order = sweep(batch, include_self, group, with_grad)
                    if in_order is not None:
                        gradient = torch.empty_like(in_order)
                        gradient[index] = in_order
        if with_grad:
            ctx.save_for_backward(torch.zeros_like(features) if gradient is None else gradient)
        return features.new_tensor(value), counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("batch_affinity_loss")
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None, None


class _BatchValueOnGpu(torch.autograd.Function):
    """Mass logit of a batch by the kernel: a streamed forward, and tiles made again in backward.

    Returns what `_BatchValue` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        include_self: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, bool]:
        from affnb.kernels.batch_affinity_mass import row_log_sums
        from affnb.kernels.pairs import number_of_parts, split

        (rows, width), first = features.shape, 0
        everything, all_labels = features, labels.long()
        if group is not None:
            shards = all_gather_uneven(features, group)
            first = sum(len(shard) for shard in shards[: torch.distributed.get_rank(group)])
            everything = torch.cat(shards)
            all_labels = torch.cat(all_gather_uneven(all_labels, group))
        ctx.counts = False
        ctx.shape = features.shape
        if not len(everything):
            return features.new_zeros(()), False
        # The loss depends on differences alone; without a common offset the products lose less.
        centred = (everything - everything.mean(0, keepdim=True)).contiguous()
        parts, half_norms = split(centred, number_of_parts(centred.dtype))
        _check_half_norms(half_norms)
        all_labels = all_labels.contiguous()
        sums = row_log_sums(parts, half_norms, all_labels, first, rows, width)
        logs = torch.stack([part.flatten().logsumexp(0) for part in sums])
        if group is not None:
            logs = all_reduce_logsumexp(logs, group)
        if include_self:  # N self-pairs with logit 0, which pull on nothing
            selves = torch.tensor([math.log(len(centred)), -math.inf], device=logs.device)
            logs = torch.logaddexp(logs, selves)
        ctx.counts = bool(torch.isfinite(logs).all())
        if not ctx.counts:
            return features.new_zeros(()), False
        ctx.first = first
        mine = centred[first : first + rows]
        ctx.save_for_backward(mine, parts, half_norms, all_labels, logs)
        return logs[0] - logs[1], True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("batch_affinity_loss")
        if not ctx.counts:
            return grads[0].new_zeros(ctx.shape), None, None, None
        from affnb.kernels.batch_affinity_mass import pull

        mine, parts, half_norms, labels, logs = ctx.saved_tensors
        half = pull(mine, parts, half_norms, labels, ctx.first, logs)
        return half.mul_(2 * grads[0]), None, None, None


@uncompiled  # the sweep follows the labels' values, which a traced graph cannot
def _batch_auto(
    features: Tensor,
    labels: Tensor,
    form: str,
    gamma: float,
    include_self: bool,
    group: ProcessGroup | None,
) -> Tensor:
    if form != "bce" and features.shape[1] and kernels.wanted(features):
        value, counts = _BatchValueOnGpu.apply(features, labels, include_self, group)  # type: ignore[no-untyped-call]
    else:
        value, counts = _BatchValue.apply(  # type: ignore[no-untyped-call]
            features, labels, form == "bce", include_self, group
        )
    result: Tensor = value
    return _loss_of_mass_logit(result, form, gamma) if counts and form != "bce" else result


def _check_batch(features: Tensor, labels: Tensor) -> None:
    check_floating(features, "features", ndim=2)
    check_labels(labels, "labels", length=features.shape[0])
    check_same_device([("features", features), ("labels", labels)])
    if not torch.compiler.is_compiling():  # looking at values would break the graph
        check_finite(features, "features")


def _check_batch_options(
    gamma: float, form: str, include_self: bool, group: ProcessGroup | None, backend: str
) -> None:
    check_at_least(gamma, "gamma", 0)
    check_one_of(form, "form", _FORMS)
    check_flag(include_self, "include_self")
    check_one_of(backend, "backend", _BACKENDS)
    if group is not None:
        check_group(group)


def batch_affinity_loss(
    features: Tensor,
    labels: Tensor,
    *,
    gamma: float = 4.0,
    form: Form = "focal",
    include_self: bool = False,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Affinity mass loss of a batch: pairs of one class should be close (section 5).

    The logits are :math:`\omega_{mn} = -\tfrac12 \|f_m - f_n\|_2^2` (Eq. 11), the targets the pairs
    of equal labels, and the loss is that of :func:`affinity_mass_loss` over the whole matrix.

    Parameters
    ----------
    features
        Embeddings, floating, shape ``(N, d)``. Their scale acts as an inverse temperature: at unit
        variance and d = 64 the logits are near -64 and hardly any pair has weight, so normalise
        or rescale them (the paper does not say which layer it takes).
    labels
        Classes, integers, shape ``(N,)``, any values.
    gamma
        Focusing parameter of ``form="focal"``, at least 0. Default 4, the paper's for batches.
    form
        As for :func:`affinity_mass_loss`. With ``"bce"`` (a sum over all pairs) note that no logit
        here is above 0, so no probability exceeds 1/2 and the loss cannot fall below
        ``log 2`` per target pair.
    include_self
        Whether the N pairs of an item with itself count, as targets of logit 0. Read literally, the
        paper's target includes them. They carry no gradient of their own, and scaling all features
        up then raises the mass to 1 *whatever the labels*; so the default is ``False``.
    group
        A ``torch.distributed`` process group: the loss of the batch that its ranks hold together,
        and for each rank the exact gradient of that one loss with respect to its own rows (see
        Notes). Default ``None``: this process's rows alone, also where others run.
    backend
        ``"auto"``: streamed, memory ``O(N d)``. ``"reference"``: the printed equations, memory
        ``O(N^2 d)``; it can be differentiated twice.

    Returns
    -------
    Tensor
        A scalar; float64 for float64 features, else float32. With no target pair, or for the forms
        of the mass with no other pair (one class, N = 1, an empty batch), it is 0 with a zero
        gradient.

    Raises
    ------
    TypeError
        ``features`` not floating, ``labels`` not integers, ``include_self`` not a bool, ``group``
        not a process group.
    ValueError
        Wrong shapes or lengths, values that are not finite or whose squared norms overflow,
        devices that differ, ``gamma < 0``, an unknown option. With ``group``, an error on one rank
        is raised on all.

    Notes
    -----
    ``"auto"`` sorts the batch by label and visits each unordered pair once, in tiles: one matrix
    product makes a tile's logits, one ``exp`` its weights, and two products collect the gradient
    ``-2 (diag(G 1) - G) F`` at once, because the loss is one number and its gradient as small as the
    features. Backward then only multiplies. Time ``O(N^2 d)``, memory ``O(N d)`` plus one tile.
    Differentiating twice raises a ``RuntimeError``. Under ``torch.compile`` the sweep runs
    uncompiled (a graph break). Autocast does not reach inside; half-precision features are widened
    to float32.

    On CUDA, products are as precise as ``torch.set_float32_matmul_precision`` asks for; keep it at
    ``"highest"`` (PyTorch's default) for features of large norm. The kernel writes a float32 number as
    the sum of three bfloat16 ones and takes the six largest of their nine products, which is as exact
    as float32; at ``"high"`` and ``"medium"`` it takes the distances of the features rounded to 16 and
    to 8 bits.

    With ``group``, features and labels are gathered (shards may be uneven, or empty), each rank
    sweeps its ``n x N`` rows, and two log-sum-exps are all-reduced; since the matrix of slopes is
    symmetric, a rank's rows hold its whole gradient. Backward communicates nothing. Every rank gets
    the same value, and its features get the gradient of that value times the rank's own upstream
    gradient. ``DistributedDataParallel`` *averages* gradients over ranks, so under it multiply the
    loss by the world size::

        loss = batch_affinity_loss(model(x), y, group=dist.group.WORLD)
        (main_loss + 0.1 * dist.get_world_size() * loss).backward()

    Examples
    --------
    >>> features = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    >>> labels = torch.tensor([0, 0, 1])
    >>> loss = batch_affinity_loss(features, labels, form="log")
    >>> loss.detach()  # the mass is e^-0.5 / (e^-0.5 + e^-2 + e^-4.5)
    tensor(0.2163)
    >>> loss.backward()
    >>> features.grad  # the pair attracts, the third point is pushed away; the sum is 0
    tensor([[-0.1502],
            [ 0.5540],
            [-0.4037]])
    """

    def check() -> None:
        _check_batch(features, labels)
        _check_batch_options(gamma, form, include_self, group, backend)

    check_together(check, group)

    x = features.to(wide_dtype(features))
    if backend == "reference":
        return _batch_reference(x, labels, form, float(gamma), include_self, group)
    return _batch_auto(x, labels, form, float(gamma), include_self, group)


def _batch_reference(
    features: Tensor,
    labels: Tensor,
    form: str,
    gamma: float,
    include_self: bool,
    group: ProcessGroup | None,
) -> Tensor:
    """Equation 11 and the printed loss, over all pairs at once."""
    if group is not None:
        features = gather_with_grad(features, group)
        labels = torch.cat(all_gather_uneven(labels.long(), group))
    logits = -(features[:, None] - features[None, :]).square().sum(-1) / 2
    target = labels[:, None] == labels[None, :]
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    keep = torch.ones_like(own) if include_self else ~own
    return _reference_losses(logits, target, keep, form, gamma, "matrix")


class BatchAffinityLoss(nn.Module):
    """Criterion of :func:`batch_affinity_loss`; the arguments are that function's.

    Parameters
    ----------
    gamma, form, include_self, group, backend
        See :func:`batch_affinity_loss`. Weigh the result by 0.1 beside a cross-entropy (Eq. 8).

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_affinity_loss`, for the options when the criterion is made.

    Notes
    -----
    Time ``O(N^2 d)``, memory ``O(N d)``. No parameters, no state.

    Examples
    --------
    >>> criterion = BatchAffinityLoss(gamma=2.0)
    >>> criterion
    BatchAffinityLoss(gamma=2.0, form='focal', include_self=False, backend='auto')
    >>> criterion(torch.tensor([[0.0], [0.0], [9.0]]), torch.tensor([0, 0, 1])).item()
    0.0
    """

    def __init__(
        self,
        gamma: float = 4.0,
        form: Form = "focal",
        include_self: bool = False,
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_batch_options(gamma, form, include_self, group, backend)
        self.gamma = gamma
        self.form: Form = form
        self.include_self = include_self
        self.group = group
        self.backend: Backend = backend

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of features ``(N, d)`` and labels ``(N,)``."""
        return batch_affinity_loss(
            features,
            labels,
            gamma=self.gamma,
            form=self.form,
            include_self=self.include_self,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"gamma={self.gamma}, form={self.form!r}, include_self={self.include_self}, "
            f"backend={self.backend!r}"
        )
