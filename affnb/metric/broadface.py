"""BroadFace: a classifier over very many identities that learns from the embeddings of past steps.

An encoder maps an image to an embedding, a linear classifier holds one *identity vector* for each
class, and the loss is a softmax over their cosines. A batch shows the classifier a few identities
only, but it needs no images, just embeddings, and those can be kept (Kim et al., "BroadFace: Looking
at Tens of Thousands of People at Once for Face Recognition", ECCV 2020; equation numbers below are
that paper's). Stale embeddings are moved along with the identity vector of their class:

    e* = e_old + (|e_old| / |W_old|) (W_now - W_old).

Cosine, ArcFace and CosFace cross-entropies are here too, because with C classes and a queue of Q
embeddings the Q x C logits are what fills the memory. The loss is one number and its gradients are
as small as the embeddings and the identity vectors, so the fast form goes over blocks of rows once,
collects both gradients on the way, and keeps neither logits nor softmax.

``backend="reference"`` computes the printed equations instead: angles by ``acos`` (whose slope is
infinite at 0 and 180 degrees), the margin added to them, exponentials, their ratio, its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from affnb.checks import (
    check_at_least,
    check_between,
    check_bool,
    check_differentiated_once,
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_norms,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from affnb.distributed import check_group, check_together
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BroadFaceHead",
    "BroadFaceLosses",
    "DriftReport",
    "EmbeddingQueue",
    "arcface_logits",
    "compensate",
    "cosface_logits",
    "drift_report",
    "margin_cross_entropy",
    "tar_at_far",
]

Kind = Literal["arcface", "cosface"]
Reduction = Literal["mean", "sum"]
Backend = Literal["auto", "reference"]

# Entries of a block of logits. Large blocks, because each one adds to the C x D gradient of the
# identity vectors; on a GPU launching costs as well.
_BLOCK_CPU = 2**22
_BLOCK_CUDA = 2**26


# --------------------------------------------------------------------------------------------------
# Cosines with a margin
# --------------------------------------------------------------------------------------------------


def _check_margin(scale: float, margin: float, kind: str) -> None:
    check_positive(scale, "scale")
    check_one_of(kind, "kind", ("arcface", "cosface"))
    check_at_least(margin, "margin", 0)
    if kind == "arcface" and margin >= math.pi / 2:
        raise ValueError(f"margin: expected radians in [0, pi/2), got {margin!r}")


def _check_directions(x: Tensor, name: str, eps: float = 0.0) -> None:
    """Raise unless every row is finite and longer than ``eps``, so that it has a direction."""
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if torch.compiler.is_compiling() or not x.numel():
        return
    norms = check_norms(x, name)
    low = float(norms.amin())
    if low <= eps:
        raise ValueError(
            f"{name}: expected rows longer than {eps:g}, got row {int(norms.argmin())} of length {low:.3g}"
        )


def _check_batch(embeddings: Tensor, weight: Tensor, labels: Tensor) -> None:
    check_floating(weight, "weight", ndim=2)
    check_floating(embeddings, "embeddings", ndim=2)
    check_shape(embeddings, "embeddings", (None, weight.shape[1]))
    check_tensor(labels, "labels")
    check_same_device([("weight", weight), ("embeddings", embeddings), ("labels", labels)])
    classes = None if torch.compiler.is_compiling() else weight.shape[0]
    check_labels(labels, "labels", length=embeddings.shape[0], num_classes=classes)
    _check_directions(embeddings, "embeddings")
    _check_directions(weight, "weight")


def _with_margin(cosine: Tensor, margin: float, kind: str) -> tuple[Tensor, Tensor]:
    """Cosines of the true class with the margin, and the slope of that map."""
    if kind == "cosface":
        return cosine - margin, torch.ones_like(cosine)
    cos_m, sin_m = math.cos(margin), math.sin(margin)
    # cos(theta + m) by the sum of angles; the root's slope is infinite at +-1, hence the floor below.
    square = 1 - cosine.square()
    sine = square.clamp(min=0).sqrt()
    # Beyond theta = pi - m the cosine would rise again: go on with slope 1, without a jump.
    past = cosine < -cos_m
    value = torch.where(past, cosine + (cos_m - 1), cosine * cos_m - sine * sin_m)
    floored = square.clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
    slope = torch.where(past, 1.0, cos_m + cosine / floored * sin_m)
    return value, slope


class _Margin(torch.autograd.Function):
    """Cosines of the true class with the margin; their slope stays finite at +-1."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, margin: float, kind: str) -> Tensor:
        ctx.save_for_backward(cosine)
        ctx.margin, ctx.kind = margin, kind
        return _with_margin(cosine, margin, kind)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (cosine,) = ctx.saved_tensors
        return grads[0] * _with_margin(cosine, ctx.margin, ctx.kind)[1], None, None


def _margin_logits(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, kind: str
) -> Tensor:
    _check_margin(scale, margin, kind)
    _check_batch(embeddings, weight, labels)
    dtype = wide_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        e_hat = nn.functional.normalize(embeddings.to(dtype))
        w_hat = nn.functional.normalize(weight.to(dtype))
        cosine = (e_hat @ w_hat.T).clamp(-1, 1)
        true = labels.long()[:, None]
        moved: Tensor = _Margin.apply(cosine.gather(1, true), margin, kind)  # type: ignore[no-untyped-call]
        return scale * cosine.scatter(1, true, moved)


def arcface_logits(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
) -> Tensor:
    r"""Logits of ArcFace: an angular margin on the true class (Deng et al., 2019).

    .. math:: s\cos(\theta_{y}+m) \text{ for the true class},\qquad s\cos\theta_j \text{ for the others}

    Parameters
    ----------
    embeddings
        Floating, shape ``(B, D)``, any length but 0; normalised inside.
    weight
        Identity vectors, floating, shape ``(C, D)``; normalised inside.
    labels
        True classes, integers in ``[0, C)``, shape ``(B,)``.
    scale
        :math:`s > 0`. Default 64, ArcFace's; the BroadFace paper does not state its own.
    margin
        :math:`m` in radians, in :math:`[0, \pi/2)`. Default 0.5, ArcFace's.

    Returns
    -------
    Tensor
        Shape ``(B, C)``, within ``scale`` times [-2, 1]; float64 if either input is, else float32.

    Raises
    ------
    TypeError
        Not floating tensors, labels not integers, options not numbers.
    ValueError
        Wrong shapes, labels out of range, rows that are not finite or have length 0, devices that
        differ, ``scale <= 0`` or ``margin`` out of range.

    Notes
    -----
    Where :math:`\theta + m > \pi` the cosine would rise with the angle. There the true class gets
    :math:`\cos\theta + \cos m - 1` instead: slope 1 in the cosine, as in ArcFace's published code,
    but without the jump of that code, which subtracts :math:`m \sin m`. Gradients are finite also
    where an embedding and an identity vector coincide, second derivatives too. Time ``O(B C D)``,
    memory ``O(B C)``; to train, :func:`margin_cross_entropy` needs much less.

    Examples
    --------
    >>> logits = arcface_logits(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=1.0)
    >>> logits  # cos(0 + 0.5) for the true class, cos(90 degrees) for the other
    tensor([[0.8776, 0.0000],
            [0.0000, 0.8776]])
    """
    return _margin_logits(embeddings, weight, labels, scale, margin, "arcface")


def cosface_logits(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.35,
) -> Tensor:
    r"""Logits of CosFace: a margin taken off the cosine of the true class (Wang et al., 2018).

    .. math:: s(\cos\theta_{y}-m) \text{ for the true class},\qquad s\cos\theta_j \text{ for the others}

    Parameters
    ----------
    embeddings, weight, labels, scale
        As for :func:`arcface_logits`.
    margin
        :math:`m \ge 0`, in units of the cosine. Default 0.35, CosFace's for faces.

    Returns
    -------
    Tensor
        Shape ``(B, C)``; float64 if either input is, else float32.

    Raises
    ------
    TypeError, ValueError
        As :func:`arcface_logits`; ``margin`` may be any finite number >= 0.

    Notes
    -----
    Time ``O(B C D)``, memory ``O(B C)``. With margin 0 this is the normalised softmax.

    Examples
    --------
    >>> cosface_logits(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=1.0)
    tensor([[0.6500, 0.0000],
            [0.0000, 0.6500]])
    """
    return _margin_logits(embeddings, weight, labels, scale, margin, "cosface")


# --------------------------------------------------------------------------------------------------
# The cross-entropy, without the logits
# --------------------------------------------------------------------------------------------------


class _MarginCrossEntropy(torch.autograd.Function):
    """Sum of the rows' losses, with both gradients made in the forward pass.

    The inputs are raw; a gradient in a unit vector becomes one in the raw vector by removing its
    radial part and dividing by the length.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        margin: float,
        kind: str,
    ) -> Tensor:
        want_e, want_w = ctx.needs_input_grad[:2]
        e_length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        w_length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        e_hat, w_hat = embeddings / e_length, weight / w_length
        e_grad = torch.empty_like(e_hat) if want_e else None
        w_grad = torch.zeros_like(w_hat) if want_w else None
        rows, classes = len(e_hat), len(w_hat)
        height = max(1, (_BLOCK_CUDA if weight.is_cuda else _BLOCK_CPU) // max(1, classes))
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        room = e_hat.new_empty(min(height, rows), classes)  # one block, used again and again
        for start in range(0, rows, height):
            own = slice(start, start + height)
            y = labels[own, None]
            block = torch.mm(e_hat[own], w_hat.T, out=room[: len(y)])
            value, slope = _with_margin(block.gather(1, y).clamp_(-1, 1), margin, kind)
            block.scatter_(1, y, value).mul_(scale)
            top = block.amax(1, keepdim=True)
            block.sub_(top).exp_()
            mass = block.sum(1, keepdim=True)  # of which the softmax is a share
            # Both terms are at least 0 and of the size of the result, so nothing cancels.
            total += (top - scale * value + mass.log()).sum(dtype=torch.float64)
            if not (want_e or want_w):
                continue
            # dl/dcos: scale (softmax - [true class]), the true class through the margin's slope. The
            # block holds softmax times mass; the rest of the factor goes to the smaller matrices.
            block.scatter_(1, y, (block.gather(1, y) - mass) * slope)
            factor = scale / mass
            if e_grad is not None:
                torch.mm(block, w_hat, out=e_grad[own]).mul_(factor)
            if w_grad is not None:
                w_grad.addmm_(block.T, e_hat[own] * factor)
        for grad, unit, length in ((e_grad, e_hat, e_length), (w_grad, w_hat, w_length)):
            if grad is not None:
                radial = (grad * unit).sum(1, keepdim=True)
                grad.addcmul_(unit, radial, value=-1).div_(length)
        ctx.save_for_backward(e_grad, w_grad)
        return total.to(embeddings.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("margin_cross_entropy")
        e_grad, w_grad = (None if g is None else grads[0] * g for g in ctx.saved_tensors)
        return e_grad, w_grad, None, None, None, None


@uncompiled  # the gradient is made in forward, which a traced graph would make again
def _sum_auto(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, kind: str
) -> Tensor:
    result: Tensor = _MarginCrossEntropy.apply(  # type: ignore[no-untyped-call]
        embeddings, weight, labels, scale, margin, kind
    )
    return result


def _sum_reference(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, kind: str
) -> Tensor:
    """Equation 2, with the margin and the scale that it leaves out."""
    e_hat = embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    w_hat = weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    cosine = (e_hat @ w_hat.T).clamp(-1, 1)
    true = nn.functional.one_hot(labels, len(weight)).bool()
    if kind == "cosface":
        moved = cosine[true] - margin
    else:
        theta = cosine[true].acos()
        turned = theta.cos() + math.cos(margin) - 1
        moved = torch.where(theta + margin <= math.pi, (theta + margin).cos(), turned)
    logits = scale * cosine.masked_scatter(true, moved)
    probability: Tensor = logits[true].exp() / logits.exp().sum(1)
    return -probability.log().sum()


def _mean_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    kind: str,
    reduction: str,
    group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    """:func:`margin_cross_entropy` without its checks."""
    dtype = wide_dtype(embeddings, weight)
    e, w, y = embeddings.to(dtype), weight.to(dtype), labels.long()
    run = _sum_auto if backend == "auto" else _sum_reference
    with torch.autocast(embeddings.device.type, enabled=False):
        if y.numel():
            total = run(e, w, y, float(scale), float(margin), kind)
        else:  # no row: 0, with its history, so that backward finds zeros
            total = (e.sum() + w.sum()) * 0
    count = float(y.numel())
    if group is not None:
        sums = torch.stack([total.detach().double(), total.new_tensor(count, dtype=torch.float64)])
        torch.distributed.all_reduce(sums, group=group)
        # The value of all ranks together, with the gradient of the own rows.
        total = total + (sums[0].to(dtype) - total.detach())
        count = float(sums[1])
    return total if reduction == "sum" else total / max(1.0, count)


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    kind: Kind = "arcface",
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy of the cosines of embeddings and identity vectors (Eqs. 1 and 2).

    .. math:: l(e, y) = -\log\frac{e^{z_y}}{\sum_j e^{z_j}}

    with the logits :math:`z` of :func:`arcface_logits` or :func:`cosface_logits`, which are never
    held all at once. Equation 2 as printed has neither scale nor margin: ``scale=1, margin=0``. Its
    loss cannot fall below :math:`\log(1 + (C-1) e^{-2s})`, which is why training needs a scale.

    Parameters
    ----------
    embeddings
        Floating, shape ``(B, D)``, any length but 0; normalised inside.
    weight
        Identity vectors, floating, shape ``(C, D)``; normalised inside. Detach either of the two to
        train the other alone.
    labels
        True classes, integers in ``[0, C)``, shape ``(B,)``.
    scale
        :math:`s > 0`. Default 64, ArcFace's.
    margin
        Radians in :math:`[0, \pi/2)` for ``"arcface"``, a cosine >= 0 for ``"cosface"``. Default 0.5,
        ArcFace's; CosFace's own is 0.35.
    kind
        Where the margin goes: ``"arcface"`` (default) or ``"cosface"``.
    reduction
        ``"mean"`` (default, Eq. 1) or ``"sum"`` over the rows.
    group
        A ``torch.distributed`` process group: the loss of the rows that its ranks hold together, and
        the exact gradient of the own rows. Every rank holds the whole ``weight``, and gets the part
        of its gradient that comes from the own rows: the *sum* over ranks is the gradient.
    backend
        ``"auto"``: blocks of rows. ``"reference"``: the printed equations, in logits of ``(B, C)``.

    Returns
    -------
    Tensor
        A scalar; float64 if either input is, else float32. Without any row it is 0 with a zero
        gradient, as it is with a single class and no margin.

    Raises
    ------
    TypeError
        Not floating tensors, labels not integers, options not numbers, ``group`` not a group.
    ValueError
        Wrong shapes, labels out of range, rows that are not finite or have length 0, devices that
        differ, options out of range. With ``group``, an error on one rank is raised on all.

    Notes
    -----
    Time ``O(B C D)``: three matrix products, the third only where both gradients are wanted.
    Memory ``O((B + C) D)``, and one block of logits (16 MiB in float32 on the CPU). Backward only
    multiplies. Differentiating twice raises a ``RuntimeError``. Under ``torch.compile`` it runs
    uncompiled (a graph break); autocast does not reach inside.

    ``DistributedDataParallel`` averages gradients over ranks, so under it multiply the loss by the
    world size.

    Examples
    --------
    >>> embeddings, weight = torch.tensor([[2.0, 0.0]]), torch.eye(2)
    >>> margin_cross_entropy(embeddings, weight, torch.tensor([0]), scale=1.0, margin=0.0)
    tensor(0.3133)
    >>> margin_cross_entropy(embeddings, weight, torch.tensor([0]), scale=8.0)
    tensor(0.0009)
    """

    def check() -> None:
        _check_margin(scale, margin, kind)
        check_one_of(reduction, "reduction", ("mean", "sum"))
        check_one_of(backend, "backend", ("auto", "reference"))
        _check_batch(embeddings, weight, labels)

    check_together(check, group)
    return _mean_loss(
        embeddings,
        weight,
        labels,
        scale=scale,
        margin=margin,
        kind=kind,
        reduction=reduction,
        group=group,
        backend=backend,
    )


# --------------------------------------------------------------------------------------------------
# The queue and its compensation
# --------------------------------------------------------------------------------------------------


def compensate(
    embeddings: Tensor, proxy_old: Tensor, proxy_new: Tensor, *, eps: float = 1e-12
) -> Tensor:
    r"""Move stale embeddings along with the identity vectors of their classes (Eq. 7).

    .. math:: e^* = e^- + \frac{\|e^-\|}{\|W^-\|}\,(W - W^-)

    The error that remains is the change of the embedding's offset from its scaled identity vector,
    :math:`e^* - e = (e^- - \lambda W^-) - (e - \lambda W)`.

    Parameters
    ----------
    embeddings
        Past embeddings :math:`e^-`, floating, shape ``(Q, D)``.
    proxy_old, proxy_new
        Identity vectors of their classes, then and now, floating, shape ``(Q, D)``.
    eps
        Lengths up to this count as 0. Default 1e-12.

    Returns
    -------
    Tensor
        Shape ``(Q, D)``; the widest dtype of the three. Differentiable in all of them: detach
        ``proxy_new`` where the result must be a constant, as in :class:`BroadFaceHead`.

    Raises
    ------
    TypeError
        Not floating tensors, ``eps`` not a number.
    ValueError
        Wrong shapes, devices that differ, rows of length 0 or not finite, ``eps < 0``.

    Notes
    -----
    Time and memory ``O(Q D)``. Multiplying both proxies by one number changes nothing.

    Examples
    --------
    >>> old, new = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> compensate(torch.tensor([[3.0, 0.0]]), old, new)  # along its identity vector: exact
    tensor([[0., 3.]])
    """
    check_tensor(embeddings, "embeddings", ndim=2)
    named = [("embeddings", embeddings), ("proxy_old", proxy_old), ("proxy_new", proxy_new)]
    check_at_least(eps, "eps", 0)
    for name, x in named:
        check_floating(x, name)
        check_shape(x, name, embeddings.shape)
    check_same_device(named)
    for name, x in named:
        _check_directions(x, name, eps)
    return _compensate(embeddings, proxy_old, proxy_new)


def _compensate(embeddings: Tensor, proxy_old: Tensor, proxy_new: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    length = norm(embeddings, dim=1, keepdim=True) / norm(proxy_old, dim=1, keepdim=True)
    moved: Tensor = embeddings + length * (proxy_new - proxy_old)
    return moved


class EmbeddingQueue(nn.Module):
    """The last ``size`` embeddings with their labels and identity vectors, first in, first out.

    Parameters
    ----------
    size
        Number of entries, at least 0 (0 keeps nothing). The paper has 8192 for each GPU.
    dim
        Length of an embedding, at least 1.

    Attributes
    ----------
    embeddings, proxies
        Floating ``(size, dim)``: embeddings, and the identity vectors of their classes when they
        were enqueued. A ring: the order of the rows is not that of time.
    labels
        int64 ``(size,)``; -1 where empty.
    age
        int64 ``(size,)``: how many calls of :meth:`enqueue` ago, 1 for the newest; 0 where empty.

    Raises
    ------
    TypeError
        ``size`` or ``dim`` not an integer.
    ValueError
        ``size < 0`` or ``dim < 1``.

    Notes
    -----
    Memory ``2 size dim`` numbers: 32 MiB for 8192 embeddings of 512 float32. All four are registered
    buffers, so they follow ``.to(device)`` and ``state_dict``.
    ``DistributedDataParallel`` overwrites buffers by those of rank 0 unless it is told
    ``broadcast_buffers=False``; each rank should keep a queue of its own, so do tell it.

    Examples
    --------
    >>> queue = EmbeddingQueue(3, 2)
    >>> for label in range(4):
    ...     queue.enqueue(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([label]))
    >>> len(queue), sorted(queue.labels.tolist())
    (3, [1, 2, 3])
    """

    embeddings: Tensor
    proxies: Tensor
    labels: Tensor
    age: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        check_integer(size, "size", 0)
        check_integer(dim, "dim", 1)
        self.size, self.dim = size, dim
        self._written = 0  # rows enqueued so far, of which the last `size` are kept
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("proxies", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("age", torch.zeros(size, dtype=torch.long))

    def __len__(self) -> int:
        return min(self._written, self.size)

    def valid(self) -> Tensor:
        """Return the mask of the entries that are filled, bool ``(size,)``."""
        return self.age > 0

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> None:
        """Add a batch in place of the oldest entries.

        Parameters
        ----------
        embeddings, proxies
            Floating, shape ``(B, dim)``, ``B <= size``: embeddings, and the identity vector of each
            one's class. Detached; converted to the dtype of the queue.
        labels
            Integers >= 0, shape ``(B,)``.

        Raises
        ------
        TypeError
            Wrong dtypes.
        ValueError
            Wrong shapes, a batch larger than the queue, labels below 0, devices that differ, rows
            of length 0 or not finite.
        """
        self._check(embeddings, proxies, labels)
        self._enqueue(embeddings, proxies, labels)

    def _check(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> None:
        check_tensor(embeddings, "embeddings", ndim=2)
        count = embeddings.shape[0]
        for name, x in (("embeddings", embeddings), ("proxies", proxies)):
            check_floating(x, name)
            check_shape(x, name, (count, self.dim))
        check_labels(labels, "labels", length=count)
        check_same_device(
            [
                ("queue", self.embeddings),
                ("embeddings", embeddings),
                ("proxies", proxies),
                ("labels", labels),
            ]
        )
        if count > self.size:
            raise ValueError(
                f"embeddings: expected at most {self.size} rows (the size of the queue), got {count}"
            )
        if not torch.compiler.is_compiling() and count and int(labels.min()) < 0:
            raise ValueError(f"labels: expected values >= 0, got {int(labels.min())}")
        _check_directions(embeddings, "embeddings")
        _check_directions(proxies, "proxies")

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> None:
        self.age[: len(self)] += 1
        start, done = self._written % max(1, self.size), 0
        count = len(labels)
        while done < count:  # twice where the batch goes over the end of the ring
            stop = min(self.size, start + count - done)
            part = slice(done, done + stop - start)
            self.embeddings[start:stop] = embeddings[part].to(self.embeddings.dtype)
            self.proxies[start:stop] = proxies[part].to(self.proxies.dtype)
            self.labels[start:stop] = labels[part]
            self.age[start:stop] = 1
            done, start = part.stop, 0
        self._written += count

    def get_extra_state(self) -> dict[str, int]:
        """Return what ``state_dict`` saves beside the buffers."""
        return {"written": self._written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what ``get_extra_state`` returned."""
        self._written = state["written"]

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"size={self.size}, dim={self.dim}"


# --------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------


class BroadFaceLosses(NamedTuple):
    """The two losses of a step.

    Attributes
    ----------
    encoder
        Mean loss of the batch (Eq. 8), a scalar; its gradient goes to the embeddings alone.
    classifier
        Mean loss of the batch and the queue (Eq. 9), a scalar; its gradient goes to the identity
        vectors alone.

    Examples
    --------
    >>> head = BroadFaceHead(num_classes=3, dim=2, queue_size=4)
    >>> found = head.losses(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    >>> found.encoder.shape == found.classifier.shape == ()
    True
    """

    encoder: Tensor
    classifier: Tensor


class BroadFaceHead(nn.Module):
    r"""A margin classifier that also learns from a queue of past embeddings (Eqs. 7 to 9).

    .. math::
        L_{enc} = \frac{1}{|X|} \sum_{i \in X} l(e_i), \qquad
        L_{cls} = \frac{1}{|X| + |\mathcal E|}
            \Big( \sum_{i \in X} l(e_i) + \sum_{j \in \mathcal E} l(e^*_j) \Big)

    The encoder learns from the first, the identity vectors ``weight`` from the second; ``forward``
    returns their sum, which trains both. Use it in place of the last layer and its loss::

        head = BroadFaceHead(num_classes, dim)
        optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=5e-3)
        for images, labels in loader:
            loss = head(encoder(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    A batch enters the queue at the *next* call, that is, after the optimiser's step, together with
    the identity vectors that it met (those before the step).

    Parameters
    ----------
    num_classes
        Number of identities C, at least 1.
    dim
        Length D of an embedding, at least 1.
    queue_size
        Embeddings kept, of this process. Default 8192, the paper's for each GPU; 0 is plain training.
    scale, margin, kind
        See :func:`margin_cross_entropy`. Defaults 64 and 0.5, ArcFace's.
    compensate
        Whether to move stale embeddings by :func:`compensate`. Default ``True``.
    group
        A ``torch.distributed`` process group. Each rank keeps a queue of its own rows (as in the
        paper), and the losses are those of all batches and queues together.
    backend
        See :func:`margin_cross_entropy`.

    Attributes
    ----------
    weight
        Parameter ``(C, D)``, identity vectors; only their directions count.
    queue
        The :class:`EmbeddingQueue`.

    Raises
    ------
    TypeError, ValueError
        Options of another type or out of range. ``forward``: as :func:`margin_cross_entropy`, and a
        batch larger than a queue that is not empty by choice (``queue_size=0``).

    Notes
    -----
    Compensated embeddings are constants: no gradient enters ``weight`` through them. Of the queue
    only the filled part counts, so the first step is that of plain ArcFace. In evaluation mode the
    loss is that of the batch alone, and nothing is enqueued.

    Time ``O((B + Q) C D)`` a step, memory ``O((B + Q + C) D)``; no logits are kept. Under
    ``torch.compile`` it runs uncompiled.

    With ``group`` under ``DistributedDataParallel``: multiply the loss by the world size, and pass
    ``broadcast_buffers=False`` (see :class:`EmbeddingQueue`). Labels are those of all ranks together.

    Examples
    --------
    >>> head = BroadFaceHead(num_classes=10, dim=4, queue_size=8)
    >>> embeddings, labels = torch.ones(3, 4, requires_grad=True), torch.tensor([0, 5, 5])
    >>> for _ in range(3):
    ...     loss = head(embeddings, labels)
    >>> len(head.queue)  # the batches of the first two calls
    6
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        queue_size: int = 8192,
        *,
        scale: float = 64.0,
        margin: float = 0.5,
        kind: Kind = "arcface",
        compensate: bool = True,
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_integer(num_classes, "num_classes", 1)
        check_integer(dim, "dim", 1)
        check_integer(queue_size, "queue_size", 0)
        _check_margin(scale, margin, kind)
        check_flag(compensate, "compensate")
        if group is not None:
            check_group(group)
        check_one_of(backend, "backend", ("auto", "reference"))
        self.scale, self.margin = scale, margin
        self.kind: Kind = kind
        self.compensate = compensate
        self.group = group
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        # Rows of about unit length: their gradient goes as 1 / length, and with it the angle of a step.
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.queue = EmbeddingQueue(queue_size, dim)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of embeddings ``(B, D)`` and labels ``(B,)``: the sum of both parts.

        In evaluation mode it is the plain loss of the batch.
        """
        if self.training:
            losses = self.losses(embeddings, labels)
            return losses.encoder + losses.classifier
        self._validate(embeddings, labels)
        return self._loss(embeddings, self.weight, labels)

    @uncompiled  # what is in the queue changes at each call
    def losses(self, embeddings: Tensor, labels: Tensor) -> BroadFaceLosses:
        """Enqueue the batch of the last call, and return the two losses of this one, apart.

        Parameters
        ----------
        embeddings
            Floating, shape ``(B, D)``.
        labels
            Integers in ``[0, C)``, shape ``(B,)``.

        Returns
        -------
        BroadFaceLosses
            Two scalars; add them and call ``backward`` once.
        """
        self._validate(embeddings, labels)
        if self._pending is not None:
            self.queue._enqueue(*self._pending)
            self._pending = None
        encoder = self._loss(embeddings, self.weight.detach(), labels)
        past, past_labels = self.past()
        union = torch.cat([embeddings.detach().to(past.dtype), past])
        classifier = self._loss(union, self.weight, torch.cat([labels.long(), past_labels]))
        if self.queue.size:
            proxies = self.weight.detach()[labels]  # indexing copies: those before the step
            self._pending = embeddings.detach(), proxies, labels
        return BroadFaceLosses(encoder, classifier)

    @torch.no_grad()
    def past(self) -> tuple[Tensor, Tensor]:
        """Return the queue's embeddings as the next loss will see them, and their labels.

        Returns
        -------
        tuple of Tensor
            ``(Q, D)``, compensated with the present ``weight`` if the head compensates, and
            ``(Q,)``; Q is how many entries the queue holds. Constants, without a graph.
        """
        filled = len(self.queue)
        embeddings, labels = self.queue.embeddings[:filled], self.queue.labels[:filled]
        if self.compensate and filled:
            embeddings = _compensate(embeddings, self.queue.proxies[:filled], self.weight[labels])
        return embeddings, labels

    def _loss(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return _mean_loss(
            embeddings,
            weight,
            labels,
            scale=self.scale,
            margin=self.margin,
            kind=self.kind,
            reduction="mean",
            group=self.group,
            backend=self.backend,
        )

    def _validate(self, embeddings: Tensor, labels: Tensor) -> None:

        def check() -> None:
            _check_batch(embeddings, self.weight, labels)
            if self.training and 0 < self.queue.size < len(labels):
                raise ValueError(
                    f"embeddings: expected at most {self.queue.size} rows (the size of the queue), "
                    f"got {len(labels)}"
                )

        check_together(check, self.group)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"num_classes={len(self.weight)}, scale={self.scale}, margin={self.margin}, "
            f"kind={self.kind!r}, compensate={self.compensate}, backend={self.backend!r}"
        )


# --------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------


def tar_at_far(similarities: Tensor, same: Tensor, far: Sequence[float]) -> Tensor:
    """True accept rate of a verification at given false accept rates.

    A pair is accepted when its similarity is *above* a threshold, the lowest one at which no more
    than the allowed share of the pairs of different identities is accepted.

    Parameters
    ----------
    similarities
        Floating, shape ``(P,)``: one number a pair, larger for more alike.
    same
        Bool, shape ``(P,)``: whether the pair shows one identity. Both kinds must occur.
    far
        Allowed false accept rates, each in [0, 1].

    Returns
    -------
    Tensor
        float64, shape ``(len(far),)``, in [0, 1].

    Raises
    ------
    TypeError
        Wrong dtypes, ``far`` not a sequence of numbers.
    ValueError
        Wrong shapes, NaN or infinite similarities, no pair of one kind, a rate outside [0, 1],
        devices that differ.

    Notes
    -----
    Time ``O(P log P)``, memory ``O(P)``. A rate below one over the number of pairs of different
    identities accepts none of them: the result then hangs on a single pair. Equal to the largest
    ``tpr`` with ``fpr <= far`` of scikit-learn's ``roc_curve``.

    Examples
    --------
    >>> scores = torch.tensor([0.9, 0.6, 0.3, 0.7, 0.2])
    >>> same = torch.tensor([True, True, True, False, False])
    >>> tar_at_far(scores, same, [0.0, 0.5])
    tensor([0.3333, 1.0000], dtype=torch.float64)
    """
    check_floating(similarities, "similarities", ndim=1)
    check_bool(same, "same")
    check_shape(same, "same", similarities.shape)
    check_same_device([("similarities", similarities), ("same", same)])
    check_finite(similarities, "similarities")
    if not isinstance(far, Sequence) or isinstance(far, str):
        raise TypeError(f"far: expected a sequence of numbers, got {far!r}")
    for rate in far:
        check_between(rate, "far", 0, 1)
    if bool(same.all()) or not bool(same.any()):
        raise ValueError("same: expected pairs of both kinds, got only one")
    genuine = similarities[same].sort().values
    impostor = similarities[~same].sort(descending=True).values
    count = len(impostor)
    rates = []
    for rate in far:
        allowed = math.floor(rate * count)
        allowed += (allowed + 1) / count <= rate  # where the product was rounded down
        if allowed >= count:
            rates.append(1.0)
            continue
        rejected = int(torch.searchsorted(genuine, impostor[allowed], right=True))
        rates.append(1 - rejected / len(genuine))
    return torch.tensor(rates, dtype=torch.float64, device=similarities.device)


class DriftReport(NamedTuple):
    """How far the entries of a queue have drifted, by age; one number for each age.

    Attributes
    ----------
    age
        int64, the ages that occur, ascending.
    before, after
        Mean cosine error (1 minus the cosine) to the present embedding, in [0, 2]: of the entry as
        it was kept, and compensated.
    tracking
        Mean cosine of the correction and the embedding's own drift, in [-1, 1]; 0 for an entry where
        one of the two is 0.
    angle
        Mean angle between entry and identity vector when it was enqueued, in degrees.

    Examples
    --------
    >>> queue = EmbeddingQueue(2, 2)
    >>> queue.enqueue(torch.eye(2)[:1], torch.eye(2)[:1], torch.tensor([0]))
    >>> drift_report(queue, torch.eye(2).flip(0), torch.eye(2)).before  # it turned by a right angle
    tensor([1.], dtype=torch.float64)
    """

    age: Tensor
    before: Tensor
    after: Tensor
    tracking: Tensor
    angle: Tensor


@torch.no_grad()
def drift_report(queue: EmbeddingQueue, current: Tensor, weight: Tensor) -> DriftReport:
    r"""Compare a queue with what the present encoder makes of the same items.

    Parameters
    ----------
    queue
        An :class:`EmbeddingQueue` with at least one entry.
    current
        The same items encoded anew, floating, shape ``(size, dim)``, row by row as in the queue;
        rows of empty entries are not looked at.
    weight
        Present identity vectors, floating, shape ``(C, dim)``.

    Returns
    -------
    DriftReport
        float64 except for ``age``. For a single entry the correction :math:`\rho` brings the
        entry closer to its present self, in Euclidean distance, if and only if its cosine to the
        drift :math:`\Delta` is above :math:`\|\rho\| / (2 \|\Delta\|)`.

    Raises
    ------
    TypeError
        ``queue`` of another type, not floating tensors.
    ValueError
        Wrong shapes, an empty queue, a label without a row in ``weight``, devices that differ, rows
        of length 0 or not finite.

    Notes
    -----
    Time and memory ``O(Q D)``.

    Examples
    --------
    >>> queue = EmbeddingQueue(2, 2)
    >>> queue.enqueue(torch.eye(2)[:1], torch.eye(2)[:1], torch.tensor([0]))
    >>> turned = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> report = drift_report(queue, turned, turned)  # embedding and identity vector turned alike
    >>> report.before, report.after
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"queue: expected an EmbeddingQueue, got {type(queue).__name__}")
    valid = queue.valid()
    if not bool(valid.any()):
        raise ValueError("queue: expected at least one entry, got an empty queue")
    labels, age = queue.labels[valid], queue.age[valid]
    check_floating(weight, "weight")
    check_shape(weight, "weight", (None, queue.dim))
    if int(labels.max()) >= len(weight):
        raise ValueError(
            f"weight: expected a row for each label, up to {int(labels.max())}, got {len(weight)} rows"
        )
    check_floating(current, "current")
    check_shape(current, "current", (queue.size, queue.dim))
    check_same_device([("queue", age), ("current", current), ("weight", weight)])
    past, old, now, proxies = (
        x.double() for x in (queue.embeddings[valid], queue.proxies[valid], current[valid], weight)
    )
    _check_directions(now, "current")
    _check_directions(proxies, "weight")
    moved = _compensate(past, old, proxies[labels])
    cosine = nn.functional.cosine_similarity
    columns = [
        1 - cosine(past, now),
        1 - cosine(moved, now),
        cosine(moved - past, now - past),
        cosine(past, old).clamp(-1, 1).acos().rad2deg(),
    ]
    ages, which = torch.unique(age, return_inverse=True)
    sums = torch.zeros(len(ages), len(columns), dtype=torch.float64, device=age.device)
    sums.index_add_(0, which, torch.stack(columns, 1))
    before, after, tracking, angle = (sums / which.bincount()[:, None]).unbind(1)
    return DriftReport(ages, before, after, tracking, angle)
