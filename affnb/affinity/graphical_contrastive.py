"""Graphical contrastive losses: margins between the pairs that compete at one node of a scene graph.

A relation model gives every (subject, object) pair a softmax over predicates and "no relation". The
pair affinity ``Phi`` is one minus the probability of no relation. At each *anchor* (a subject, or an
object) the worst related pair is asked to beat the best unrelated one by a margin; three rules say who
competes: everybody (L1), entities of one class (L2), pairs with one predicate (L3). From Zhang et al.,
"Graphical Contrastive Losses for Scene Graph Parsing", CVPR 2019; equation numbers are that paper's.

Dense graphs: every tensor of pairs has the shape ``(..., S, O)``, subjects by objects, and images of
different size are padded and masked. A pair that is neither positive nor negative takes no part, which
is also how sampled pairs are given. The fast form reduces each anchor's pairs with ``amin``/``amax``
or, in groups, with ``scatter_reduce``: ``O(S O)`` time and memory per image whatever the number of
classes, and no Python loop. ``backend="reference"`` loops over anchors and groups as the sets are
defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from affnb.checks import (
    check_at_least,
    check_between,
    check_bool,
    check_finite,
    check_floating,
    check_integer,
    check_labels,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from affnb.distributed import check_together
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Relations",
    "anchor_margin",
    "box_delta",
    "class_agnostic_loss",
    "entity_class_aware_loss",
    "frequency_prior",
    "graphical_contrastive_loss",
    "normalised_box",
    "pair_affinity",
    "predicate_class_aware_loss",
    "recall_at_k",
    "spatial_pair_feature",
    "top_relations",
    "union_box",
    "weighted_map",
]

Backend = Literal["auto", "reference"]
BoxFormat = Literal["xywh", "xyxy"]
Negatives = Literal["unrelated", "incorrect"]
Normalisation = Literal["paper", "released"]
Side = Literal["both", "subject", "object"]


# --------------------------------------------------------------------------------------------------
# Affinity and margin
# --------------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, none_index: int) -> None:
    check_floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            "logits: expected shape (..., E + 1) with at least one predicate beside no relation, "
            f"got {tuple(logits.shape)}"
        )
    check_integer(none_index, "none_index")
    if not 0 <= none_index < logits.shape[-1]:
        raise ValueError(
            f"none_index: expected an index in [0, {logits.shape[-1]}), got {none_index}"
        )
    if not torch.compiler.is_compiling():
        check_finite(logits, "logits")


def _parts(logits: Tensor, none_index: int) -> list[tuple[int, Tensor]]:
    """The logits of the predicates, as one or two views without the entry of no relation."""
    before, after = logits[..., :none_index], logits[..., none_index + 1 :]
    return [(k, part) for k, part in ((0, before), (none_index + 1, after)) if part.shape[-1]]


def _pair_affinity(logits: Tensor, none_index: int) -> Tensor:
    z = logits.to(wide_dtype(logits))
    sums = [part.logsumexp(-1) for _, part in _parts(z, none_index)]
    related = sums[0] if len(sums) == 1 else torch.logaddexp(*sums)
    return torch.sigmoid(related - z[..., none_index])


def pair_affinity(logits: Tensor, none_index: int = 0) -> Tensor:
    r"""Probability that a pair is related at all (Eq. 1).

    .. math:: \Phi = 1 - p(\varnothing) = \sigma\big(\operatorname{LSE}_{e \ne \varnothing} z_e
              - z_\varnothing\big)

    The sigmoid keeps precision where ``1 - softmax`` cancels (``Phi`` near 0), and its gradient.

    Parameters
    ----------
    logits
        Predicate logits, floating, shape ``(..., E + 1)``, finite, ``E >= 1``.
    none_index
        Position of "no relation" in the last dimension. Default 0.

    Returns
    -------
    Tensor
        Shape ``(...)``, in [0, 1]; float64 for float64 logits, else float32.

    Raises
    ------
    TypeError
        ``logits`` is not a floating tensor, ``none_index`` not an int.
    ValueError
        No predicate, an index out of range, logits not finite.

    Notes
    -----
    Time and memory ``O(E)`` per pair.

    Examples
    --------
    >>> pair_affinity(torch.zeros(4))  # three predicates and "no relation", all equal
    tensor(0.7500)
    >>> pair_affinity(torch.tensor([30.0, 0.0]))  # 1 - softmax gives 0 here
    tensor(9.3576e-14)
    """
    _check_logits(logits, none_index)
    return _pair_affinity(logits, none_index)


def _check_pairs(phi: Tensor, pos: Tensor, neg: Tensor) -> None:
    check_floating(phi, "phi")
    if phi.ndim < 2:
        raise ValueError(f"phi: expected shape (..., S, O), got {tuple(phi.shape)}")
    for name, mask in (("pos", pos), ("neg", neg)):
        check_bool(mask, name)
        check_shape(mask, name, phi.shape)
    check_same_device([("phi", phi), ("pos", pos), ("neg", neg)])
    if torch.compiler.is_compiling():
        return
    check_finite(phi, "phi")
    if bool((pos & neg).any()):
        count = int((pos & neg).sum())
        raise ValueError(f"neg: expected no pair that is in pos too, got {count} in both")


def _extremes(
    phi: Tensor,
    pos: Tensor,
    neg: Tensor,
    of_pos: Tensor | None = None,
    of_neg: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Worst positive (inf if none) and best negative (-inf if none), ``(..., A, groups)``.

    The arguments are the fields of `_Anchors`.
    """
    worst, best = phi.masked_fill(~pos, torch.inf), phi.masked_fill(~neg, -torch.inf)
    if of_pos is None:
        if phi.shape[-1] == 0:  # nothing to reduce; a sum over nothing keeps the graph connected
            nothing = phi.sum(-1, keepdim=True)
            return nothing + torch.inf, nothing - torch.inf
        return worst.amin(-1, keepdim=True), best.amax(-1, keepdim=True)
    size = (*phi.shape[:-1], groups)
    return (
        phi.new_full(size, torch.inf).scatter_reduce(-1, of_pos, worst, "amin"),
        phi.new_full(size, -torch.inf).scatter_reduce(
            -1, of_pos if of_neg is None else of_neg, best, "amax"
        ),
    )


def _margin(worst: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    valid = (worst < torch.inf) & (best > -torch.inf)
    # Fill before subtracting: the gradient of a difference of infinities is NaN.
    return worst.masked_fill(~valid, 0.0) - best.masked_fill(~valid, 0.0), valid


def anchor_margin(phi: Tensor, pos: Tensor, neg: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    r"""Margin between the worst positive and the best negative pair of each anchor (Eq. 2).

    .. math:: m(i) = \min_{j \in V_i^+} \Phi(i, j) - \max_{k \in V_i^-} \Phi(i, k)

    Parameters
    ----------
    phi
        Affinities, floating, shape ``(..., S, O)``, finite. Any real scale will do.
    pos, neg
        Related and unrelated pairs, bool, the shape of ``phi``. No pair may be in both; one that is in
        neither takes no part.
    dim
        The dimension to compare along: -1 for anchors that are subjects, -2 for objects. Default -1.

    Returns
    -------
    margin : Tensor
        Shape of ``phi`` without ``dim``: in (-1, 1) for affinities in (0, 1), and 0, with a zero
        gradient, where an anchor lacks positives or negatives. Pairs that tie for the minimum or the
        maximum share the gradient equally, so the order of the entities does not matter.
    valid : Tensor
        Bool, the same shape: whether the anchor has both.

    Raises
    ------
    TypeError
        Wrong dtypes.
    ValueError
        Shapes or devices that differ, values that are not finite, a pair in both sets, another ``dim``.

    Notes
    -----
    Time and memory ``O(S O)``.

    Examples
    --------
    >>> phi = torch.tensor([[0.9, 0.4, 0.6]])
    >>> pos, neg = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    >>> anchor_margin(phi, pos, neg)
    (tensor([0.3000]), tensor([True]))
    >>> anchor_margin(phi, pos, neg, dim=-2)[1]  # no object here has two kinds of pairs
    tensor([False, False, False])
    """
    _check_pairs(phi, pos, neg)
    check_one_of(dim, "dim", (-1, -2))
    if dim == -2:
        phi, pos, neg = phi.mT, pos.mT, neg.mT
    margin, valid = _margin(*_extremes(phi, pos, neg))
    return margin.squeeze(-1), valid.squeeze(-1)


# --------------------------------------------------------------------------------------------------
# The three losses
# --------------------------------------------------------------------------------------------------


class _Anchors(NamedTuple):
    """What one side of a loss compares: pairs ``(..., A, K)`` with the anchors in rows.

    ``of_pos`` and ``of_neg`` number the group of each pair, as a positive and as a negative, from 0 to
    ``groups - 1``. Without ``of_neg`` they are the same; without ``of_pos`` all pairs are one group.
    """

    phi: Tensor
    pos: Tensor
    neg: Tensor
    of_pos: Tensor | None = None
    of_neg: Tensor | None = None
    groups: int = 1


def _shares(
    phi: Tensor, among: Tensor, extreme: Tensor, weight: Tensor, key: Tensor | None
) -> Tensor:
    """Each group's weight at the pairs that are at its extreme; ties share it equally."""
    if key is None:
        chosen = (among & (phi == extreme)).to(phi.dtype)
        return chosen * (weight / chosen.sum(-1, keepdim=True).clamp(min=1))
    chosen = (among & (phi == extreme.gather(-1, key))).to(phi.dtype)
    ties = torch.zeros_like(weight).scatter_add(-1, key, chosen)
    return chosen * (weight / ties.clamp(min=1)).gather(-1, key)


class _HingeSum(torch.autograd.Function):
    """Sum of the weighted hinges of one side, and the number to divide by.

    The sum is piecewise linear in the affinities, so its gradient is a sparse matrix of weights: those
    of the worst positive and of the best negative of each active group. Plain autograd would keep two
    masked copies of the pairs for each side to find it; this keeps none, and looks the pairs up again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        phi: Tensor,
        pos: Tensor,
        neg: Tensor,
        of_pos: Tensor | None,
        of_neg: Tensor | None,
        groups: int,
        alpha: float,
        normalisation: str,
    ) -> tuple[Tensor, Tensor]:
        worst, best = _extremes(phi, pos, neg, of_pos, of_neg, groups)
        margin, compared = _margin(worst, best)
        hinge = torch.relu(alpha - margin).masked_fill(~compared, 0.0)
        if normalisation == "released":
            # The released code starts its list of couples with one that is satisfied.
            weight, divisor = torch.ones_like(hinge), compared.sum() + 1
        else:
            present = (worst < torch.inf).sum(-1, keepdim=True)  # groups among the positives
            weight, divisor = 1 / present.clamp(min=1).to(phi.dtype), (present > 0).sum()
        ctx.save_for_backward(phi, pos, neg, of_pos, of_neg, worst, best, weight * (hinge > 0))
        ctx.mark_non_differentiable(divisor)
        return (hinge * weight).sum(), divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        phi, pos, neg, of_pos, of_neg, worst, best, weight = ctx.saved_tensors
        slope = _shares(phi, neg, best, weight, of_pos if of_neg is None else of_neg)
        slope = slope - _shares(phi, pos, worst, weight, of_pos)
        return grads[0] * slope, *(None,) * 7


def _hinge_sum(anchors: _Anchors, alpha: float, normalisation: str) -> tuple[Tensor, Tensor]:
    total, divisor = _HingeSum.apply(  # type: ignore[no-untyped-call]
        *anchors, alpha, normalisation
    )
    return total, divisor


def _reference_hinge_sum(
    anchors: _Anchors, alpha: float, normalisation: str
) -> tuple[Tensor, Tensor]:
    """The same by the definition of the sets: a loop over anchors, groups and pairs."""
    count = anchors.phi.shape[-1]
    phi, pos, neg = (t.flatten(0, -2) for t in anchors[:3])
    of_pos = of_neg = torch.zeros_like(phi, dtype=torch.long)
    if anchors.of_pos is not None:
        of_pos = of_neg = anchors.of_pos.flatten(0, -2)
    if anchors.of_neg is not None:
        of_neg = anchors.of_neg.flatten(0, -2)
    total, divisor = (0 * phi).sum(), int(normalisation == "released")  # a zero with a gradient
    for i in range(len(phi)):
        positives = [j for j in range(count) if pos[i, j]]
        negatives = [k for k in range(count) if neg[i, k]]
        groups = sorted({int(of_pos[i, j]) for j in positives})
        hinges = []
        for g in groups:
            own = [phi[i, j] for j in positives if of_pos[i, j] == g]
            rivals = [phi[i, k] for k in negatives if of_neg[i, k] == g]
            if rivals:
                margin = torch.stack(own).amin() - torch.stack(rivals).amax()
                hinges.append(torch.relu(alpha - margin))
        if hinges:
            share = 1 if normalisation == "released" else len(groups)
            total = total + torch.stack(hinges).sum() / share
        divisor += len(hinges) if normalisation == "released" else bool(groups)
    return total, torch.tensor(divisor, device=phi.device)


def _ratio(terms: list[tuple[Tensor, Tensor]], group: ProcessGroup | None) -> Tensor:
    """Sum over the terms of total / divisor; over all ranks of ``group``, when there is one."""
    totals = torch.stack([total for total, _ in terms])
    divisors = torch.stack([divisor for _, divisor in terms]).to(totals.dtype)
    if group is not None:
        import torch.distributed as dist

        both = torch.stack([totals.detach(), divisors]).double()
        dist.all_reduce(both, group=group)
        # The value is that of all ranks, the gradient that of this rank's own pairs.
        totals = totals + (both[0].to(totals.dtype) - totals.detach())
        divisors = both[1].to(totals.dtype)
    return (totals / divisors.clamp(min=1)).sum()


class _Options(NamedTuple):
    """The arguments that the three losses share."""

    alpha: float
    side: str
    normalisation: str
    group: ProcessGroup | None
    backend: str

    def check(self, name: str = "alpha") -> None:
        check_between(self.alpha, name, 0, 1)
        check_one_of(self.side, "side", ("both", "subject", "object"))
        check_one_of(self.normalisation, "normalisation", ("paper", "released"))
        check_one_of(self.backend, "backend", ("auto", "reference"))


def _contrast(both: tuple[_Anchors, _Anchors], options: _Options) -> Tensor:
    """One of the three losses, from its anchors at the subjects and at the objects."""
    sides = {"subject": both[:1], "object": both[1:], "both": both}[options.side]
    hinge_sum = _hinge_sum if options.backend == "auto" else _reference_hinge_sum
    terms = [hinge_sum(anchors, options.alpha, options.normalisation) for anchors in sides]
    return _ratio(terms, options.group)


def _check_affinity(phi: Tensor, pos: Tensor, neg: Tensor) -> None:
    _check_pairs(phi, pos, neg)
    if not torch.compiler.is_compiling() and phi.numel():
        low, high = (float(v) for v in phi.detach().aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"phi: expected affinities in [0, 1], got values from {low:.4g} to {high:.4g} "
                "(pass pair_affinity(logits), not logits)"
            )


def _checked_contrast(
    check: Callable[[], None],
    anchors: Callable[[], tuple[_Anchors, _Anchors]],
    options: _Options,
) -> Tensor:
    """`_contrast` once the options, and whatever else is given, have been checked."""

    def check_all() -> None:
        options.check()
        check()

    check_together(check_all, options.group)
    return _contrast(anchors(), options)


def _class_agnostic(phi: Tensor, pos: Tensor, neg: Tensor) -> tuple[_Anchors, _Anchors]:
    return (
        _Anchors(phi, pos, neg),
        _Anchors(phi.mT, pos.mT, neg.mT),
    )


def class_agnostic_loss(
    phi: Tensor,
    pos: Tensor,
    neg: Tensor,
    alpha: float = 0.2,
    *,
    side: Side = "both",
    normalisation: Normalisation = "paper",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Class agnostic loss: all pairs of an anchor compete (Eqs. 2 and 3).

    .. math:: L_1 = \frac1{N_s} \sum_i [\alpha - m_1^s(i)]_+ + \frac1{N_o} \sum_j [\alpha - m_1^o(j)]_+

    with the margins of :func:`anchor_margin` at the subjects and at the objects.

    Parameters
    ----------
    phi
        Pair affinities, floating, shape ``(..., S, O)``, in [0, 1]: see :func:`pair_affinity`.
    pos, neg
        Related and unrelated pairs, bool, the shape of ``phi``, without a pair in both. A pair in
        neither (padding, a pair that was not sampled) takes no part.
    alpha
        Margin, in [0, 1]. Default 0.2, the paper's (its Table 4).
    side
        ``"both"`` sums (default), ``"subject"`` or ``"object"`` gives one of the two terms.
    normalisation
        ``"paper"`` (default): :math:`N_s` is the number of subjects with at least one related pair, in
        the whole batch, and :math:`N_o` that of objects; an anchor with no negative counts with a
        hinge of 0. ``"released"``: as in the authors' published code, the mean over the couples that
        are compared and one more that is satisfied.
    group
        A process group: the loss is that of the pairs of all ranks, and each rank gets the gradient of
        its own. ``DistributedDataParallel`` averages gradients, so multiply by the world size there.
    backend
        ``"auto"``: vectorised. ``"reference"``: loops over anchors and pairs.

    Returns
    -------
    Tensor
        Scalar in [0, 4], float64 for float64 affinities, else float32; 0 with a zero gradient when no
        anchor has both kinds of pairs.

    Raises
    ------
    TypeError
        Wrong dtypes.
    ValueError
        Shapes or devices that differ, affinities outside [0, 1], a pair in both sets, ``alpha``
        outside [0, 1], an unknown option.

    Notes
    -----
    Time and memory ``O(S O)``. The gradient reaches one positive and one negative an anchor (several
    if they tie).

    Examples
    --------
    >>> phi = torch.tensor([[0.9, 0.8, 0.1]])
    >>> pos = torch.tensor([[True, False, False]])
    >>> class_agnostic_loss(phi, pos, ~pos)  # 0.2 - (0.9 - 0.8); no object is an anchor with rivals
    tensor(0.1000)
    """
    return _checked_contrast(
        lambda: _check_affinity(phi, pos, neg),
        lambda: _class_agnostic(phi.to(wide_dtype(phi)), pos, neg),
        _Options(alpha, side, normalisation, group, backend),
    )


def _check_classes(phi: Tensor, subj_cls: Tensor, obj_cls: Tensor) -> None:
    for name, classes, shape in (
        ("subj_cls", subj_cls, phi.shape[:-1]),
        ("obj_cls", obj_cls, (*phi.shape[:-2], phi.shape[-1])),
    ):
        check_labels(classes, name, ndim=None)
        check_shape(classes, name, shape)
        check_same_device([("phi", phi), (name, classes)])
        if not torch.compiler.is_compiling() and classes.numel() and int(classes.min()) < 0:
            raise ValueError(f"{name}: expected class ids >= 0, got {int(classes.min())}")


def _ranks(classes: Tensor) -> Tensor:
    """Number the classes that occur in each row ``(..., K)`` from 0, so that groups are at most K."""
    ordered, order = classes.long().sort(-1)
    first = torch.ones_like(ordered[..., :1])[..., : ordered.shape[-1]]
    steps = torch.cat([first, (ordered.diff(dim=-1) != 0).long()], -1)
    return torch.empty_like(ordered).scatter(-1, order, steps.cumsum(-1) - 1)


def _entity_class_aware(
    phi: Tensor, pos: Tensor, neg: Tensor, subj_cls: Tensor, obj_cls: Tensor
) -> tuple[_Anchors, _Anchors]:
    subjects, objects = phi.shape[-2:]
    of_object = _ranks(obj_cls)[..., None, :].expand(phi.shape)
    of_subject = _ranks(subj_cls)[..., None, :].expand(phi.mT.shape)
    return (
        _Anchors(phi, pos, neg, of_object, None, objects),
        _Anchors(phi.mT, pos.mT, neg.mT, of_subject, None, subjects),
    )


def entity_class_aware_loss(
    phi: Tensor,
    pos: Tensor,
    neg: Tensor,
    subj_cls: Tensor,
    obj_cls: Tensor,
    alpha: float = 0.2,
    *,
    side: Side = "both",
    normalisation: Normalisation = "paper",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Entity class aware loss: entities of one class compete (Eqs. 4 and 5).

    .. math:: L_2 = \frac1{N_s} \sum_i \frac1{|\mathcal C(V_i^+)|} \sum_{c \in \mathcal C(V_i^+)}
              [\alpha - m_2^s(i, c)]_+ + \text{the same over objects}

    where :math:`m_2^s(i, c)` is the margin within the objects of class :math:`c`, and
    :math:`\mathcal C(V_i^+)` the classes of the objects related to subject :math:`i`.

    Parameters
    ----------
    phi, pos, neg
        As for :func:`class_agnostic_loss`.
    subj_cls, obj_cls
        Classes, integers from 0, shapes ``(..., S)`` and ``(..., O)``.
    alpha, side, group, backend
        As for :func:`class_agnostic_loss`.
    normalisation
        ``"paper"`` (default): the formula above; a class without negatives adds no hinge, but counts
        in :math:`|\mathcal C|`. ``"released"``: the mean over all compared (anchor, class) couples of
        the batch, and one more that is satisfied; no average within an anchor.

    Returns
    -------
    Tensor
        Scalar in [0, 4]; 0 with a zero gradient when no class has both kinds of pairs at an anchor.

    Raises
    ------
    TypeError, ValueError
        As :func:`class_agnostic_loss`; classes that are not integers, negative, or of another shape.

    Notes
    -----
    Time ``O(S O + O log O)`` and memory ``O(S O)`` an image, whatever the number of classes.

    Examples
    --------
    >>> phi = torch.tensor([[0.9, 0.5, 0.8]])  # a held glass, another glass, a plate
    >>> pos = torch.tensor([[True, False, False]])
    >>> classes = torch.tensor([0]), torch.tensor([3, 3, 7])
    >>> entity_class_aware_loss(phi, pos, ~pos, *classes)  # the plate does not compete
    tensor(0.)
    """

    def check() -> None:
        _check_affinity(phi, pos, neg)
        _check_classes(phi, subj_cls, obj_cls)

    return _checked_contrast(
        check,
        lambda: _entity_class_aware(phi.to(wide_dtype(phi)), pos, neg, subj_cls, obj_cls),
        _Options(alpha, side, normalisation, group, backend),
    )


def _predicted(logits: Tensor, none_index: int, include_none: bool) -> Tensor:
    """Most probable predicate of each pair; no relation may win only if ``include_none``."""
    if include_none:
        return logits.argmax(-1)
    tops = [(part.max(-1), k) for k, part in _parts(logits, none_index)]
    (values, indices), k = tops[0]
    best = indices + k
    if len(tops) == 2:
        (others, later), k = tops[1]
        best = torch.where(others > values, later + k, best)
    return best


def _check_predicates(
    logits: Tensor,
    gt_pred: Tensor,
    mask: Tensor | None,
    include_none: bool,
    negatives: str,
    none_index: int,
) -> None:
    check_one_of(include_none, "include_none", (False, True))
    check_one_of(negatives, "negatives", ("unrelated", "incorrect"))
    _check_logits(logits, none_index)
    if logits.ndim < 3:
        raise ValueError(f"logits: expected shape (..., S, O, E + 1), got {tuple(logits.shape)}")
    check_labels(gt_pred, "gt_pred", ndim=None)
    check_shape(gt_pred, "gt_pred", logits.shape[:-1])
    if mask is not None:
        check_bool(mask, "mask")
        check_shape(mask, "mask", gt_pred.shape)
    check_same_device([("logits", logits), ("gt_pred", gt_pred), ("mask", mask)])
    if not torch.compiler.is_compiling():
        check_labels(gt_pred, "gt_pred", ndim=None, num_classes=logits.shape[-1])


def _sets(gt_pred: Tensor, mask: Tensor | None, none_index: int) -> tuple[Tensor, Tensor]:
    pos, neg = gt_pred != none_index, gt_pred == none_index
    return (pos, neg) if mask is None else (pos & mask, neg & mask)


def _predicate_class_aware(
    phi: Tensor,
    logits: Tensor,
    gt_pred: Tensor,
    mask: Tensor | None,
    include_none: bool,
    negatives: str,
    none_index: int,
) -> tuple[_Anchors, _Anchors]:
    predicted = _predicted(logits.detach(), none_index, include_none)
    truth, groups = gt_pred.long(), logits.shape[-1]
    pos, neg = _sets(gt_pred, mask, none_index)
    if negatives == "incorrect":  # related pairs with another predicate, too
        neg = neg | (pos & (predicted != truth))
    return (
        _Anchors(phi, pos, neg, truth, predicted, groups),
        _Anchors(phi.mT, pos.mT, neg.mT, truth.mT, predicted.mT, groups),
    )


def predicate_class_aware_loss(
    phi: Tensor,
    logits: Tensor,
    gt_pred: Tensor,
    alpha: float = 0.2,
    include_none: bool = False,
    negatives: Negatives = "unrelated",
    *,
    mask: Tensor | None = None,
    none_index: int = 0,
    side: Side = "both",
    normalisation: Normalisation = "paper",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Predicate class aware loss: pairs with one predicate compete (Eqs. 6 and 7).

    .. math:: L_3 = \frac1{N_s} \sum_i \frac1{|\mathcal E(V_i^+)|} \sum_{e \in \mathcal E(V_i^+)}
              [\alpha - m_3^s(i, e)]_+ + \text{the same over objects}

    The positives of :math:`m_3^s(i, e)` are the objects whose true predicate with subject :math:`i` is
    :math:`e`; the negatives are those for which the model wrongly predicts :math:`e` now. The
    prediction is an arg max, taken without gradient.

    Parameters
    ----------
    phi
        Pair affinities, floating, shape ``(..., S, O)``, in [0, 1].
    logits
        Predicate logits, floating, shape ``(..., S, O, E + 1)``, which say what is predicted.
    gt_pred
        True predicates, integers in [0, E], shape ``(..., S, O)``; ``none_index`` is "no relation".
    alpha, side, normalisation, group, backend
        As for :func:`entity_class_aware_loss`, with predicates in place of classes.
    include_none
        Whether "no relation" takes part in the arg max. ``False`` (default, and so in the authors'
        code): every unrelated pair is a negative of some predicate. ``True``: only one whose
        predicate already beats "no relation".
    negatives
        ``"unrelated"`` (default, and so in the authors' code): only unrelated pairs. ``"incorrect"``:
        the definition to the letter, which adds related pairs with another predicate that are
        predicted as ``e``; the loss then lowers an affinity that the cross-entropy and L1 raise.
    mask
        Bool, shape of ``gt_pred``: ``True`` where a pair takes part. Default: all do.
    none_index
        Position of "no relation" in the last dimension of ``logits``. Default 0.

    Returns
    -------
    Tensor
        Scalar in [0, 4]; 0 with a zero gradient when no predicate has both kinds of pairs at an
        anchor. The gradient flows into ``phi`` only.

    Raises
    ------
    TypeError, ValueError
        As :func:`class_agnostic_loss`; labels out of range, shapes that do not fit.

    Notes
    -----
    Time ``O(S O E)`` (the arg max), memory ``O(S O + (S + O) E)``.

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]])
    >>> gt_pred = torch.tensor([[1, 0, 0]])  # only the second object rivals for predicate 1
    >>> predicate_class_aware_loss(pair_affinity(logits), logits, gt_pred, side="subject")
    tensor(0.2000)
    """
    labels = (logits, gt_pred, mask, include_none, negatives, none_index)

    def check() -> None:
        _check_predicates(*labels)
        nothing = torch.zeros_like(gt_pred, dtype=torch.bool)
        _check_affinity(phi, nothing, nothing)

    return _checked_contrast(
        check,
        lambda: _predicate_class_aware(phi.to(wide_dtype(phi)), *labels),
        _Options(alpha, side, normalisation, group, backend),
    )


def graphical_contrastive_loss(
    logits: Tensor,
    gt_pred: Tensor,
    subj_cls: Tensor,
    obj_cls: Tensor,
    *,
    weights: Sequence[float] = (1.0, 0.5, 0.1),
    alphas: Sequence[float] = (0.2, 0.2, 0.2),
    mask: Tensor | None = None,
    none_index: int = 0,
    include_none: bool = False,
    negatives: Negatives = "unrelated",
    normalisation: Normalisation = "paper",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    r"""Cross-entropy and the three contrastive losses of predicate logits (Eq. 8).

    .. math:: L = L_0 + \lambda_1 L_1 + \lambda_2 L_2 + \lambda_3 L_3

    Parameters
    ----------
    logits
        Predicate logits, floating, shape ``(..., S, O, E + 1)``.
    gt_pred
        True predicates, integers in [0, E], shape ``(..., S, O)``.
    subj_cls, obj_cls
        Entity classes, integers from 0, shapes ``(..., S)`` and ``(..., O)``.
    weights
        The three :math:`\lambda`, at least 0; a loss with weight 0 is not computed and reported as 0.
        Default the paper's.
    alphas
        The three margins, in [0, 1]. Default the paper's.
    mask
        Bool, shape of ``gt_pred``: ``True`` where a pair takes part, in all four losses.
    none_index, include_none, negatives, normalisation, group, backend
        As for :func:`predicate_class_aware_loss`.

    Returns
    -------
    dict of str to Tensor
        Scalars: ``"loss"`` (the total, to minimise), ``"cross_entropy"`` (mean over the pairs that
        take part; the paper samples 512 of them, at most 128 related), ``"class_agnostic"``,
        ``"entity_class_aware"``, ``"predicate_class_aware"`` (without their weights).

    Raises
    ------
    TypeError, ValueError
        As the four parts.

    Notes
    -----
    Time and memory ``O(S O E)``. To sample pairs for each loss on its own, as the paper does, call the
    parts with masks of their own.

    Examples
    --------
    >>> logits = torch.tensor([[[0.0, 2.0], [0.0, 2.0]]], requires_grad=True)
    >>> parts = graphical_contrastive_loss(
    ...     logits, torch.tensor([[1, 0]]), torch.tensor([0]), torch.tensor([4, 4]))
    >>> {name: round(value.item(), 3) for name, value in parts.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'loss': 1.447, 'cross_entropy': 1.127, 'class_agnostic': 0.2, 'entity_class_aware': 0.2,
     'predicate_class_aware': 0.2}
    """
    labels = (logits, gt_pred, mask, include_none, negatives, none_index)

    def options(alpha: float) -> _Options:
        return _Options(alpha, "both", normalisation, group, backend)

    def check() -> None:
        for name, values in (("weights", weights), ("alphas", alphas)):
            if not isinstance(values, Sequence) or len(values) != 3:
                raise ValueError(f"{name}: expected three numbers, got {values!r}")
        for weight in weights:
            check_at_least(weight, "weights", 0)
        for alpha in alphas:
            options(alpha).check("alphas")
        _check_predicates(*labels)
        _check_classes(logits[..., 0], subj_cls, obj_cls)

    check_together(check, group)
    phi = _pair_affinity(logits, none_index)
    pos, neg = _sets(gt_pred, mask, none_index)
    each = F.cross_entropy(
        logits.movedim(-1, 0).unsqueeze(0).to(phi.dtype), gt_pred.long()[None], reduction="none"
    )[0]
    keep = torch.ones_like(pos) if mask is None else mask
    parts = {"cross_entropy": _ratio([(each.masked_fill(~keep, 0.0).sum(), keep.sum())], group)}
    sides: dict[str, Callable[[], tuple[_Anchors, _Anchors]]] = {
        "class_agnostic": lambda: _class_agnostic(phi, pos, neg),
        "entity_class_aware": lambda: _entity_class_aware(phi, pos, neg, subj_cls, obj_cls),
        "predicate_class_aware": lambda: _predicate_class_aware(phi, *labels),
    }
    loss = parts["cross_entropy"]
    for (name, anchors), weight, alpha in zip(sides.items(), weights, alphas, strict=True):
        parts[name] = loss.new_zeros(())
        if weight:
            parts[name] = _contrast(anchors(), options(alpha))
            loss = loss + weight * parts[name]
    return {"loss": loss, **parts}


# --------------------------------------------------------------------------------------------------
# The parts of RelDN that hold no weights
# --------------------------------------------------------------------------------------------------


def frequency_prior(triples: Tensor, C: int, E: int, smoothing: float = 1.0) -> Tensor:
    r"""Log-frequencies of predicates given the two classes: RelDN's semantic module.

    .. math:: f_{sem}(e \mid c_s, c_o) = \log \frac{n(c_s, c_o, e) + k}{\sum_{e'} n(c_s, c_o, e') + k (E+1)}

    Parameters
    ----------
    triples
        Integers, shape ``(n, 3)``, rows (subject class, object class, predicate) of the training pairs;
        predicate 0 is "no relation".
    C, E
        Number of classes, and of predicates without "no relation"; at least 1.
    smoothing
        What is added to each count, above 0. Default 1 (the paper states none; the authors' code adds
        1 to the count of "no relation", and 0.001 to each frequency).

    Returns
    -------
    Tensor
        float32, shape ``(C, C, E + 1)``; ``exp`` of it sums to 1 over the last dimension.

    Raises
    ------
    TypeError
        Triples that are not integers.
    ValueError
        Another shape, ids out of range, ``smoothing`` not above 0, ``C`` or ``E`` below 1.

    Notes
    -----
    Time ``O(n + C^2 E)``, memory ``O(C^2 E)``.

    Examples
    --------
    >>> frequency_prior(torch.tensor([[0, 0, 1], [0, 0, 1]]), C=1, E=1).exp()
    tensor([[[0.2500, 0.7500]]])
    """
    check_labels(triples, "triples", ndim=2)
    check_shape(triples, "triples", (None, 3))
    for name, count in (("C", C), ("E", E)):
        check_at_least(count, name, 1)
    check_positive(smoothing, "smoothing")
    check_labels(triples[:, :2], "triples", ndim=2, num_classes=C)
    check_labels(triples[:, 2], "triples", num_classes=E + 1)
    s, o, e = triples.long().unbind(1)
    counts = torch.bincount((s * C + o) * (E + 1) + e, minlength=C * C * (E + 1))
    counts = counts.view(C, C, E + 1).double() + smoothing
    return (counts / counts.sum(-1, keepdim=True)).log().float()


def _xywh(box: Tensor, name: str, fmt: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_floating(box, name)
    check_one_of(fmt, "fmt", ("xywh", "xyxy"))
    if box.ndim < 1 or box.shape[-1] != 4:
        raise ValueError(f"{name}: expected shape (..., 4), got {tuple(box.shape)}")
    x, y, w, h = box.unbind(-1)
    if fmt == "xyxy":
        w, h = w - x, h - y
    if not torch.compiler.is_compiling():
        if not box.detach().sum().isfinite():
            check_finite(box, name)
        if box.numel() and not bool(((w > 0) & (h > 0)).all()):
            raise ValueError(
                f"{name}: expected positive widths and heights ({fmt}), "
                f"got {float(torch.minimum(w, h).min()):.4g}"
            )
    return x, y, w, h


def box_delta(b1: Tensor, b2: Tensor, *, fmt: BoxFormat = "xywh") -> Tensor:
    r"""Offset and log-scale of box 1 relative to box 2 (Eq. 9).

    .. math:: \Delta = \Big\langle \frac{x_1 - x_2}{w_2}, \frac{y_1 - y_2}{h_2},
              \log \frac{w_1}{w_2}, \log \frac{h_1}{h_2} \Big\rangle

    Parameters
    ----------
    b1, b2
        Boxes, floating, shapes ``(..., 4)`` that broadcast, in any unit of length (the same for both).
    fmt
        ``"xywh"`` (default, the equation's): top left corner, width, height. ``"xyxy"``: two corners.
        :math:`(x, y)` is the top left corner in both, as Eq. 10 has it (the authors' code takes the
        centre).

    Returns
    -------
    Tensor
        Shape ``(..., 4)``, no unit; unchanged when both boxes are shifted and scaled together.

    Raises
    ------
    TypeError
        Not floating tensors.
    ValueError
        Another last dimension, a width or height that is not positive, values not finite.

    Examples
    --------
    >>> box_delta(torch.tensor([20.0, 10, 10, 10]), torch.tensor([0.0, 0, 10, 20]))
    tensor([ 2.0000,  0.5000,  0.0000, -0.6931])
    """
    x1, y1, w1, h1 = _xywh(b1, "b1", fmt)
    x2, y2, w2, h2 = _xywh(b2, "b2", fmt)
    parts = ((x1 - x2) / w2, (y1 - y2) / h2, (w1 / w2).log(), (h1 / h2).log())
    return torch.stack(parts, -1)  # each depends on both boxes, so all have the broadcast shape


def normalised_box(b: Tensor, size: tuple[float, float], *, fmt: BoxFormat = "xywh") -> Tensor:
    r"""Corners and area of a box in units of the image (Eq. 10).

    .. math:: c(b) = \Big\langle \frac x{w_I}, \frac y{h_I}, \frac{x + w}{w_I}, \frac{y + h}{h_I},
              \frac{w h}{w_I h_I} \Big\rangle

    Parameters
    ----------
    b
        Boxes, floating, shape ``(..., 4)``, in pixels.
    size
        Width and height of the image, in pixels.
    fmt
        As for :func:`box_delta`.

    Returns
    -------
    Tensor
        Shape ``(..., 5)``, in [0, 1] for boxes inside the image.

    Raises
    ------
    TypeError, ValueError
        As :func:`box_delta`; a size that is not two positive numbers.

    Examples
    --------
    >>> normalised_box(torch.tensor([160.0, 120, 320, 240]), (640, 480))
    tensor([0.2500, 0.2500, 0.7500, 0.7500, 0.2500])
    """
    x, y, w, h = _xywh(b, "b", fmt)
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size: expected (width, height), got {size!r}")
    for length in size:
        check_positive(length, "size")
    wide, high = size
    return torch.stack(
        [x / wide, y / high, (x + w) / wide, (y + h) / high, w * h / (wide * high)], -1
    )


def union_box(b1: Tensor, b2: Tensor, *, fmt: BoxFormat = "xywh") -> Tensor:
    """Tightest box around two boxes: the box of the predicate.

    Parameters
    ----------
    b1, b2
        Boxes, floating, shapes ``(..., 4)`` that broadcast.
    fmt
        As for :func:`box_delta`; also the format of the result.

    Returns
    -------
    Tensor
        Shape ``(..., 4)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`box_delta`.

    Examples
    --------
    >>> union_box(torch.tensor([0.0, 0, 10, 10]), torch.tensor([20.0, 5, 10, 10]))
    tensor([ 0.,  0., 30., 15.])
    """
    x1, y1, w1, h1 = _xywh(b1, "b1", fmt)
    x2, y2, w2, h2 = _xywh(b2, "b2", fmt)
    left, top = torch.minimum(x1, x2), torch.minimum(y1, y2)
    right, bottom = torch.maximum(x1 + w1, x2 + w2), torch.maximum(y1 + h1, y2 + h2)
    if fmt == "xywh":
        right, bottom = right - left, bottom - top
    return torch.stack([left, top, right, bottom], -1)


def spatial_pair_feature(
    bs: Tensor,
    bo: Tensor,
    size: tuple[float, float],
    *,
    fmt: BoxFormat = "xywh",
    reverse: bool = False,
) -> Tensor:
    r"""Spatial features of a pair: RelDN's spatial module before its layers (Eq. 11).

    .. math:: \langle \Delta(b_s, b_o), \Delta(b_s, b_p), \Delta(b_p, b_o), c(b_s), c(b_o) \rangle

    with :math:`b_p` the :func:`union_box`.

    Parameters
    ----------
    bs, bo
        Boxes of subjects and objects, floating, shapes ``(..., 4)`` that broadcast, in pixels: give
        ``(B, S, 1, 4)`` and ``(B, 1, O, 4)`` for all pairs.
    size
        Width and height of the image, in pixels.
    fmt
        As for :func:`box_delta`.
    reverse
        Add to each delta the two offsets in the reverse direction, which makes the 28 numbers of the
        paper's Figure 3 (and of the authors' code). Default ``False``: the equation's 22.

    Returns
    -------
    Tensor
        Shape ``(..., 22)``, or ``(..., 28)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`normalised_box`.

    Examples
    --------
    >>> boxes = torch.rand(5, 4) + 1
    >>> spatial_pair_feature(boxes[:, None], boxes[None], (10, 10)).shape
    torch.Size([5, 5, 22])
    """
    bp = union_box(bs, bo, fmt=fmt)
    parts = []
    for a, b in ((bs, bo), (bs, bp), (bp, bo)):
        parts.append(box_delta(a, b, fmt=fmt))
        if reverse:
            parts.append(box_delta(b, a, fmt=fmt)[..., :2])
    parts += [normalised_box(b, size, fmt=fmt) for b in (bs, bo)]
    shape = bp.shape[:-1]
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


# --------------------------------------------------------------------------------------------------
# The paper's metrics
# --------------------------------------------------------------------------------------------------


class Relations(NamedTuple):
    """A list of n relations in several images, detected or annotated.

    Attributes
    ----------
    image
        (n,) int64, the image of each.
    labels
        (n, 3) int64: subject class, predicate (from 1), object class.
    boxes
        (n, 2, 4) floating: the boxes of subject and object, as x1, y1, x2, y2.
    score
        (n,) floating, higher is surer; the annotations' score is not used.

    Examples
    --------
    >>> one = Relations(
    ...     image=torch.tensor([0]),
    ...     labels=torch.tensor([[3, 1, 5]]),
    ...     boxes=torch.tensor([[[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 4.0, 2.0]]]),
    ...     score=torch.tensor([0.9]),
    ... )
    >>> recall_at_k(one, one, [20]).tolist()
    [1.0]
    """

    image: Tensor
    labels: Tensor
    boxes: Tensor
    score: Tensor


def _check_relations(relations: Relations, name: str) -> None:
    if not isinstance(relations, Relations):
        raise TypeError(f"{name}: expected Relations, got {type(relations).__name__}")
    count = len(relations.image)
    check_labels(relations.image, f"{name}.image")
    check_labels(relations.labels, f"{name}.labels", ndim=2)
    check_shape(relations.labels, f"{name}.labels", (count, 3))
    check_shape(relations.boxes, f"{name}.boxes", (count, 2, 4))
    check_shape(relations.score, f"{name}.score", (count,))
    _xywh(relations.boxes, f"{name}.boxes", "xyxy")
    if count and int(relations.image.min()) < 0:
        raise ValueError(f"{name}.image: expected ids >= 0, got {int(relations.image.min())}")


def top_relations(
    probabilities: Tensor,
    subj_cls: Tensor,
    obj_cls: Tensor,
    subj_boxes: Tensor,
    obj_boxes: Tensor,
    *,
    subj_prob: Tensor | None = None,
    obj_prob: Tensor | None = None,
    mask: Tensor | None = None,
    k: int = 100,
    predicates_per_pair: int = 2,
) -> Relations:
    """Rank the relations of each image by ``p(subject) p(predicate) p(object)`` and keep the first k.

    Parameters
    ----------
    probabilities
        Predicate probabilities, shape ``(B, S, O, E + 1)``; index 0, "no relation", is left out.
    subj_cls, obj_cls
        Classes, integers, shapes ``(B, S)`` and ``(B, O)``.
    subj_boxes, obj_boxes
        Boxes x1, y1, x2, y2, shapes ``(B, S, 4)`` and ``(B, O, 4)``.
    subj_prob, obj_prob
        The detector's probabilities of the classes, shapes ``(B, S)`` and ``(B, O)``. Default 1: the
        entities are given.
    mask
        Bool, shape ``(B, S, O)``: pairs that may be ranked. Default: all.
    k
        How many relations to keep an image. Default 100, as in the authors' evaluation.
    predicates_per_pair
        How many predicates of one pair may be ranked. Default 2, as in the authors' evaluation on
        OpenImages (1 is the "graph constraint" of Visual Genome).

    Returns
    -------
    Relations
        At most ``B * k``, images in order, best first in each.

    Raises
    ------
    TypeError, ValueError
        Wrong dtypes or shapes; ``k`` or ``predicates_per_pair`` below 1.

    Notes
    -----
    Time ``O(B S O (E + log(S O)))``, memory ``O(B S O predicates_per_pair)``.

    Examples
    --------
    >>> p = torch.tensor([[[[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]]]])  # one subject, two objects
    >>> box = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    >>> found = top_relations(p, torch.tensor([[7]]), torch.tensor([[8, 9]]), box, box.repeat(1, 2, 1))
    >>> found.labels.tolist()
    [[7, 1, 8], [7, 2, 9], [7, 2, 8], [7, 1, 9]]
    """
    check_floating(probabilities, "probabilities", ndim=4)
    B, S, O, E = probabilities.shape  # noqa: E741
    for name, value, shape in (
        ("subj_cls", subj_cls, (B, S)),
        ("obj_cls", obj_cls, (B, O)),
        ("subj_boxes", subj_boxes, (B, S, 4)),
        ("obj_boxes", obj_boxes, (B, O, 4)),
        ("subj_prob", subj_prob, (B, S)),
        ("obj_prob", obj_prob, (B, O)),
        ("mask", mask, (B, S, O)),
    ):
        if value is not None:
            check_tensor(value, name)
            check_shape(value, name, shape)
    for name, count in (("k", k), ("predicates_per_pair", predicates_per_pair)):
        check_at_least(count, name, 1)
    if E < 2:
        raise ValueError(f"probabilities: expected shape (B, S, O, E + 1), got {(B, S, O, E)}")

    score, predicate = probabilities[..., 1:].topk(min(predicates_per_pair, E - 1), -1)
    if subj_prob is not None:
        score = score * subj_prob[:, :, None, None]
    if obj_prob is not None:
        score = score * obj_prob[:, None, :, None]
    if mask is not None:
        score = score.masked_fill(~mask[..., None], -torch.inf)
    per_pair = score.shape[-1]
    value, index = score.flatten(1).sort(dim=-1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k]
    keep = value > -torch.inf
    image = torch.arange(B, device=score.device)[:, None].expand_as(index)[keep]
    predicate = predicate.flatten(1).gather(1, index)[keep] + 1
    pair = index[keep] // per_pair
    s, o = pair // O, pair % O
    return Relations(
        image,
        torch.stack([subj_cls[image, s].long(), predicate, obj_cls[image, o].long()], -1),
        torch.stack([subj_boxes[image, s], obj_boxes[image, o]], 1),
        value[keep],
    )


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), row by row."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    area = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    both = inner.prod(-1)
    return both / (area[0] + area[1] - both)


def _candidates(found: Relations, truth: Relations, phrase: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All (detection, annotation) couples of one image with equal labels, and their overlap."""
    images = int(torch.cat([found.image, truth.image]).max()) + 1 if len(truth.image) else 1
    order = truth.image.argsort(stable=True)
    count = torch.bincount(truth.image, minlength=images)
    start = count.cumsum(0) - count
    repeats = count[found.image] if len(found.image) else found.image
    d = torch.arange(len(found.image), device=order.device).repeat_interleave(repeats)
    within = torch.arange(len(d), device=order.device) - (repeats.cumsum(0) - repeats)[d]
    g = order[start[found.image[d]] + within]
    same = (found.labels[d] == truth.labels[g]).all(-1)
    d, g = d[same], g[same]
    a, b = found.boxes[d].double(), truth.boxes[g].double()
    if phrase:
        a, b = (union_box(x[:, 0], x[:, 1], fmt="xyxy") for x in (a, b))
        return d, g, _iou(a, b)
    return d, g, _iou(a, b).amin(-1)


def recall_at_k(
    found: Relations,
    truth: Relations,
    ks: Sequence[int],
    *,
    iou_threshold: float = 0.5,
    per_image: bool = False,
    phrase: bool = False,
) -> Tensor:
    """Share of the annotated relations that are among the K best of their image (R@K).

    An annotation is found when a detection has its three labels and both boxes overlap with an
    intersection over union of at least the threshold. One detection may find several.

    Parameters
    ----------
    found, truth
        Detections and annotations.
    ks
        The values of K, at least 1.
    iou_threshold
        In (0, 1]. Default 0.5.
    per_image
        ``False`` (default): one recall over all annotations (OpenImages, VRD). ``True``: the mean of
        the images' recalls, over images with annotations (Visual Genome).
    phrase
        Compare the boxes around subject and object instead (phrase detection). Default ``False``.

    Returns
    -------
    Tensor
        float64, shape ``(len(ks),)``, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        Malformed lists, no annotation at all, a K below 1, a threshold outside (0, 1].

    Notes
    -----
    Time ``O(n log n + m)``, for n detections and m couples of detection and annotation in one image.

    Examples
    --------
    >>> boxes = torch.tensor([[[0.0, 0, 2, 2], [4.0, 0, 6, 2]]])
    >>> truth = Relations(torch.tensor([0]), torch.tensor([[1, 2, 3]]), boxes, torch.ones(1))
    >>> labels = torch.tensor([[1, 1, 3], [1, 2, 3]])
    >>> found = Relations(torch.tensor([0, 0]), labels, boxes.repeat(2, 1, 1), torch.tensor([0.9, 0.5]))
    >>> recall_at_k(found, truth, [1, 2])
    tensor([0., 1.], dtype=torch.float64)
    """
    _check_metric(found, truth, iou_threshold)
    if not isinstance(ks, Sequence) or not ks:
        raise ValueError(f"ks: expected a sequence of integers >= 1, got {ks!r}")
    for k in ks:
        check_at_least(k, "ks", 1)
    # The rank of each detection within its image: sort by score, then stably by image.
    order = found.score.argsort(descending=True, stable=True)
    order = order[found.image[order].argsort(stable=True)]
    sizes = torch.bincount(found.image)
    rank = torch.empty_like(order)
    places = torch.arange(len(order), device=order.device)
    rank[order] = places - (sizes.cumsum(0) - sizes)[found.image[order]]
    d, g, overlap = _candidates(found, truth, phrase)
    hit = overlap >= iou_threshold
    never = max(int(k) for k in ks) + len(order)
    first = torch.full_like(truth.image, never).scatter_reduce(0, g[hit], rank[d[hit]], "amin")
    caught = torch.stack([(first < k).double() for k in ks])
    if not per_image:
        return caught.mean(-1)
    image = _ranks(truth.image)
    share = 1 / torch.bincount(image).double()  # of one annotation in its image
    return (caught * share[image]).sum(-1) / len(share)


def _check_metric(found: Relations, truth: Relations, iou_threshold: float) -> None:
    _check_relations(found, "found")
    _check_relations(truth, "truth")
    if len(truth.image) == 0:
        raise ValueError("truth: expected at least one annotated relation, got none")
    check_positive(iou_threshold, "iou_threshold")
    if iou_threshold > 1:
        raise ValueError(f"iou_threshold: expected a number in (0, 1], got {iou_threshold!r}")


def weighted_map(
    found: Relations,
    truth: Relations,
    num_predicates: int,
    *,
    iou_threshold: float = 0.5,
    phrase: bool = False,
    interpolated: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Average precision of each predicate, and their mean weighted by frequency (wmAP, section 6.1).

    .. math:: \mathrm{wmAP} = \sum_e \frac{n_e}{\sum_{e'} n_{e'}} \mathrm{AP}_e

    Detections of one predicate are ranked over all images. Each claims the annotation with the same
    three labels that it overlaps most; the claim holds if the overlap reaches the threshold and no
    better ranked detection holds the same annotation.

    Parameters
    ----------
    found, truth
        Detections and annotations.
    num_predicates
        Number of predicates E; labels are 1 to E.
    iou_threshold
        In (0, 1]. Default 0.5, for both boxes.
    phrase
        ``False`` (default): relationship detection (wmAP_rel). ``True``: phrase detection, where only
        the box around subject and object must overlap (wmAP_phr).
    interpolated
        ``True`` (default): area under the envelope of precision, as in the official evaluation.
        ``False``: area under the steps themselves, as scikit-learn defines it.

    Returns
    -------
    wmap : Tensor
        Scalar, float64, in [0, 1].
    ap : Tensor
        Shape ``(E,)``, float64: the average precision of predicates 1 to E; NaN for one without
        annotations. Their plain mean is the official mAP, in which a rare predicate weighs as much as
        a common one.
    weights : Tensor
        Shape ``(E,)``, float64, sum 1: how frequent each is among the annotations.

    Raises
    ------
    TypeError, ValueError
        Malformed lists, no annotation at all, a predicate outside [1, E], a threshold outside (0, 1].

    Notes
    -----
    Time ``O(n log n + m)``, for n detections and m couples of detection and annotation in one image.

    Examples
    --------
    >>> boxes = torch.tensor([[[0.0, 0, 2, 2], [4.0, 0, 6, 2]]])
    >>> truth = Relations(torch.tensor([0]), torch.tensor([[1, 2, 3]]), boxes, torch.ones(1))
    >>> labels = torch.tensor([[1, 2, 5], [1, 2, 3]])  # the better ranked one has a wrong class
    >>> found = Relations(torch.tensor([0, 0]), labels, boxes.repeat(2, 1, 1), torch.tensor([0.9, 0.5]))
    >>> weighted_map(found, truth, 2)[0]
    tensor(0.5000, dtype=torch.float64)
    """
    _check_metric(found, truth, iou_threshold)
    check_at_least(num_predicates, "num_predicates", 1)
    for name, relations in (("found", found), ("truth", truth)):
        labels = relations.labels[:, 1]
        if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= num_predicates):
            raise ValueError(
                f"{name}.labels: expected predicates in [1, {num_predicates}], "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
    place = torch.empty_like(found.image)
    place[found.score.argsort(descending=True, stable=True)] = torch.arange(
        len(place), device=place.device
    )
    d, g, overlap = _candidates(found, truth, phrase)
    # The annotation that each detection claims: the one of largest overlap.
    largest = overlap.new_zeros(len(place)).scatter_reduce(0, d, overlap, "amax")
    claim = (overlap == largest[d]) & (overlap >= iou_threshold)
    chosen = torch.full_like(place, len(truth.image)).scatter_reduce(0, d[claim], g[claim], "amin")
    holder = torch.full((len(truth.image) + 1,), len(place), device=place.device)
    holder = holder.scatter_reduce(0, chosen, place, "amin")
    holds = (chosen < len(truth.image)) & (holder[chosen] == place)

    counts = torch.bincount(truth.labels[:, 1] - 1, minlength=num_predicates).double()
    ap = torch.full((num_predicates,), torch.nan, dtype=torch.float64, device=place.device)
    for e in range(num_predicates):
        if counts[e]:
            own = (found.labels[:, 1] == e + 1).nonzero().squeeze(1)
            true = holds[own[place[own].argsort()]].double()
            precision = true.cumsum(0) / torch.arange(1, len(true) + 1, device=true.device)
            if interpolated:
                precision = precision.flip(0).cummax(0).values.flip(0) if len(true) else precision
            ap[e] = (precision * true).sum() / counts[e]
    weights = counts / counts.sum()
    return (ap.nan_to_num() * weights).sum(), ap, weights
