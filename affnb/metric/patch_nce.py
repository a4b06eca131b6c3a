"""PatchNCE: each patch of an output image must recognise its own patch of the input.

The contrastive loss of CUT (Park et al., "Contrastive Learning for Unpaired Image-to-Image
Translation", ECCV 2020; equation numbers below are that paper's), and what it stands on: locations
drawn at random, a small head that turns feature maps into unit vectors, the feature maps themselves
read off a generator's encoder, and the adversarial loss beside it.

The loss is a cross-entropy on a matrix of similarities in which the diagonal must win each row. Its
answer is one number and its gradient as small as the features, so the fast form goes over blocks of
rows once, collects the gradient on the way, and keeps neither the matrix nor its softmax.

``backend="reference"`` computes the printed equation instead, with its limits: an exponential that
overflows (in float32 a logit above 88) gives an infinite or undefined loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from affnb import kernels
from affnb.checks import (
    check_differentiated_once,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_norms,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from affnb.distributed import (
    all_gather_uneven,
    check_group,
    check_together,
    gather_with_grad,
)
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "PatchNCELoss",
    "PatchProjector",
    "encoder_features",
    "lsgan_d",
    "lsgan_g",
    "patch_nce_loss",
    "receptive_field",
    "sample_patch_ids",
]

Negatives = Literal["image", "batch"]
Backend = Literal["auto", "reference"]

# Entries of a block of logits. On the CPU a block (2 MB in float32) stays in a core's L2 cache
# between the matrix products and the softmax; on a GPU launching is what costs.
_BLOCK_CPU = 2**19
_BLOCK_CUDA = 2**25


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def _check_options(
    temperature: float, negatives: str, detach_key: bool, group: ProcessGroup | None, backend: str
) -> None:
    check_positive(temperature, "temperature")
    check_one_of(negatives, "negatives", ("image", "batch"))
    check_flag(detach_key, "detach_key")
    check_one_of(backend, "backend", ("auto", "reference"))
    if group is not None:
        check_group(group)


def _check_features(query: Tensor, key: Tensor, temperature: float, negatives: str) -> None:
    check_floating(query, "query", ndim=3)
    check_floating(key, "key", ndim=3)
    check_shape(key, "key", query.shape)
    check_same_device([("query", query), ("key", key)])
    if negatives == "image" and query.shape[1] < 2:
        raise ValueError(
            "query: expected at least two patches an image (a single one has no negative), "
            f"got shape {tuple(query.shape)}"
        )
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if torch.compiler.is_compiling() or not query.numel():
        return
    longest = [float(check_norms(x, n).amax()) for x, n in ((query, "query"), (key, "key"))]
    bound = longest[0] * longest[1] / temperature
    if bound > torch.finfo(wide_dtype(query)).max / 4:
        raise ValueError(
            f"temperature: expected logits that {wide_dtype(query)} can hold, got {temperature!r} for "
            f"norms of up to {longest[0]:.3g} (query) and {longest[1]:.3g} (key)"
        )


def _blocks(sets: int, rows: int, columns: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``sets`` matrices of ``rows x columns`` into blocks of whole rows with that many entries."""
    together = max(1, entries // max(1, rows * columns))
    height = rows if rows * columns <= entries else max(1, entries // columns)
    for first in range(0, sets, together):
        for start in range(0, rows, max(1, height)):
            yield slice(first, first + together), slice(start, min(start + height, rows))


def _sweep(
    query: Tensor,
    keys: Tensor,
    temperature: float,
    first: int,
    with_query: bool,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the rows' cross-entropies, and its gradients in the queries and the keys.

    ``query`` is (sets, n, C), ``keys`` (sets, m, C); query i belongs to key ``first + i``. With ``w``
    the softmax of a row and ``e`` its target, the gradient in the logits is ``w - e``, and two
    products carry it to queries and keys, block by block. The results are float32 or wider.
    """
    if kernels.wanted(query) and not torch.compiler.is_compiling():
        return _sweep_on_gpu(query, keys, temperature, first, with_query, with_keys)
    wide, scale = wide_dtype(query, keys), 1 / temperature
    query, keys = query.to(wide), keys.to(wide)
    to_query = torch.empty_like(query) if with_query else None
    to_keys = torch.zeros_like(keys) if with_keys else None
    total = query.new_zeros(())
    entries = _BLOCK_CUDA if query.is_cuda else _BLOCK_CPU
    blocks = list(_blocks(len(query), query.shape[1], keys.shape[1], entries))
    # Fresh memory costs more than what is done in it: all blocks are made in the same.
    largest = query[blocks[0]].shape[:2].numel() if blocks else 0
    buffer = query.new_empty(largest, keys.shape[1])
    for some, rows in blocks:
        q, k = query[some, rows], keys[some]
        logs = buffer[: q.shape[:2].numel()].view(*q.shape[:2], -1)
        torch.baddbmm(logs, q, k.mT, beta=0, alpha=scale, out=logs)
        torch.log_softmax(logs, -1, out=logs)
        target = logs.diagonal(first + rows.start, -2, -1)
        total -= target.sum()
        if to_query is None and to_keys is None:
            continue
        logs.exp_()
        target -= 1  # a view of the diagonal: logs is w - e from here on
        if to_query is not None:
            out = to_query[some, rows]
            torch.baddbmm(out, logs, k, beta=0, alpha=scale, out=out)
        if to_keys is not None:
            to_keys[some].baddbmm_(logs.mT, q, alpha=scale)
    return total, to_query, to_keys


def _sweep_on_gpu(
    query: Tensor,
    keys: Tensor,
    temperature: float,
    first: int,
    with_query: bool,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `_sweep` returns, by the kernels, which take half precision as it is."""
    from affnb.kernels.pairs import as_parts
    from affnb.kernels.patch_nce import pull, row_losses

    width, scale = query.shape[-1], 1 / temperature
    q, k = as_parts(query), as_parts(keys)
    losses, logs = row_losses(q, k, scale, first, width)
    to_query = pull(q, k, logs, scale, first, width, to_keys=False) if with_query else None
    to_keys = pull(q, k, logs, scale, first, width, to_keys=True) if with_keys else None
    return losses.sum(), to_query, to_keys


class _SumOfLosses(torch.autograd.Function):
    """Sum of the cross-entropies of all rows of all ranks, its gradients made in the forward pass.

    ``query`` and ``key`` are (sets, n, C); patches compete within a set. Backward only multiplies, and
    communicates nothing.

    ``shared`` says that all ranks' patches are one set: each rank then sweeps its own rows against
    all keys, and the gradient of its keys is the sum over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        temperature: float,
        shared: bool,
        with_grads: tuple[bool, bool],
        group: ProcessGroup | None,
    ) -> Tensor:
        keys, first = key, 0
        if shared and group is not None:
            parts = all_gather_uneven(key[0], group)
            first = sum(len(part) for part in parts[: torch.distributed.get_rank(group)])
            keys = torch.cat(parts)[None]
        total, to_query, to_keys = _sweep(query, keys, temperature, first, *with_grads)
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
            if shared and to_keys is not None:
                to_keys = to_keys.contiguous()
                torch.distributed.all_reduce(to_keys, group=group)
                to_keys = to_keys[:, first : first + key.shape[1]]
        ctx.save_for_backward(to_query, to_keys)
        ctx.dtype = query.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("patch_nce_loss")
        to_features = (None if g is None else (grad * g).to(ctx.dtype) for g in ctx.saved_tensors)
        return *to_features, None, None, None, None


def _sum_of_printed(query: Tensor, key: Tensor, group: ProcessGroup | None) -> Tensor:
    """Equation 2 for every patch, summed over patches and ranks (gathered before, for one set)."""
    similarities = (query @ key.mT).exp()
    own = torch.eye(key.shape[1], dtype=torch.bool, device=key.device)
    positive = similarities.diagonal(0, -2, -1)
    negatives = similarities.masked_fill(own, 0.0).sum(-1)
    total = -(positive / (positive + negatives)).log().sum()
    return total if group is None else gather_with_grad(total[None], group).sum()


def patch_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Negatives = "image",
    detach_key: bool = True,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Contrastive loss of corresponding patches (Eqs. 2 and 3), averaged over all patches.

    For patch ``s`` of an image, with query :math:`\hat z^s` (from the output) and keys
    :math:`z` (from the input),

    .. math:: \ell_s = -\log \frac{e^{\hat z^s \cdot z^s / \tau}}{\sum_n e^{\hat z^s \cdot z^n / \tau}}

    where the sum runs over the keys of the same image, or of the whole batch.

    Parameters
    ----------
    query
        Features of patches of the output, floating, shape ``(B, P, C)``. The products are taken as
        the features come: normalise them (:class:`PatchProjector` does), as the paper has them.
    key
        Features of the same places of the input, same shape, in the same order.
    temperature
        What the products are divided by, :math:`\tau > 0`. Default 0.07, the paper's (Eq. 2).
    negatives
        ``"image"`` (default, the paper's choice): the other patches of the same image, internal
        negatives. ``"batch"``: all other patches of the batch, internal and external ones.
    detach_key
        Whether the keys are constants (default), so that the output must follow the input and not
        the input's features the output. The paper's text leaves it open; its released code detaches.
    group
        A ``torch.distributed`` process group: the loss of the batch that its ranks hold together, a
        mean over all their patches, and for each rank the exact gradient of that one loss with
        respect to its own features (see Notes). Default ``None``: this process's alone.
    backend
        ``"auto"``: memory ``O(B P C)``; in blocks of rows, or on a GPU, where Triton is installed and
        the features are not float64, by a kernel. ``"reference"``: the printed equation, memory
        ``O(B P^2)`` or ``O((B P)^2)``; it can be differentiated twice.

    Returns
    -------
    Tensor
        A scalar, at least 0; float64 for float64 input, else float32. An empty batch gives 0. Where
        all keys of a set are equal it is ``log P`` (``log (B P)`` for ``"batch"``).

    Raises
    ------
    TypeError
        Not floating tensors, ``detach_key`` not a bool, ``group`` not a process group, a temperature
        that is no number.
    ValueError
        Shapes or devices that differ, no negative (``P < 2``, or a single patch in the batch for
        ``"batch"``), a temperature that is not positive or so small that logits overflow, values
        that are not finite, an unknown option. With ``group``, an error on one rank is raised on
        all. (While ``torch.compile`` traces, values are not looked at.)

    Notes
    -----
    Equation 3 *sums* over patches, and over the layers of the encoder. Beside an adversarial loss of
    order 1 only means make sense; the released code takes them, and so does this function. Average
    over layers with :class:`PatchNCELoss`.

    ``"auto"`` makes the logits of a block of rows, one log-softmax, and two products that carry the
    gradient back, so neither the matrix nor its softmax is kept; backward multiplies. (The kernel
    makes each tile of logits again for each product instead.) Time ``O(B P^2 C)``, or
    ``O((B P)^2 C)`` for ``"batch"``. With ``create_graph=True`` it raises a ``RuntimeError``.
    Autocast does not reach inside, and half-precision features are widened to float32. Under
    ``torch.compile``, ``negatives="image"`` is traced whole, without the kernel; ``"batch"`` and
    ``group`` run uncompiled (a graph break).

    The kernel multiplies half-precision features as they are and adds in float32, which gives the
    same logits; the weights that multiply them in the gradient are rounded to their precision. Of
    float32 features it keeps what ``torch.set_float32_matmul_precision`` asks for: all 24 bits at
    ``"highest"`` (PyTorch's default; a float32 number is the sum of three bfloat16 ones, and the six
    largest of their nine products are taken), 16 bits at ``"high"``, 8 at ``"medium"``.

    With ``group``, shards may be uneven, or empty. For ``"batch"`` the keys are gathered, each rank
    sweeps its own rows, and the sums (and, if ``detach_key=False``, the gradient of the keys) are
    all-reduced. Every rank gets the same value, and its features get the gradient of that value times
    the rank's own upstream gradient. ``DistributedDataParallel`` *averages* gradients over ranks, so
    under it multiply the loss by the world size.

    Examples
    --------
    >>> key = torch.eye(4)[None]  # one image, four patches, orthonormal features
    >>> patch_nce_loss(key, key, temperature=1.0)  # log(1 + 3 / e)
    tensor(0.7437)
    >>> patch_nce_loss(key.flip(1), key, temperature=1.0)  # every patch finds another one
    tensor(1.7437)
    """

    def check() -> None:
        _check_options(temperature, negatives, detach_key, group, backend)
        _check_features(query, key, temperature, negatives)

    check_together(check, group)
    if group is None and negatives == "image":
        return _patch_nce(query, key, temperature, negatives, detach_key, group, backend)
    return _patch_nce_uncompiled(query, key, temperature, negatives, detach_key, group, backend)


def _patch_nce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    negatives: str,
    detach_key: bool,
    group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    patches = query.shape[0] * query.shape[1]
    if group is not None:
        count = torch.tensor(patches, device=query.device)
        torch.distributed.all_reduce(count, group=group)
        patches = int(count)
    shared = negatives == "batch"
    if shared and patches == 1:
        raise ValueError("query: expected at least two patches in the batch, got 1")
    with torch.autocast(query.device.type, enabled=False):
        wide = wide_dtype(query, key)
        if query.dtype != key.dtype or group is not None or backend == "reference":
            query, key = query.to(wide), key.to(wide)
        if detach_key:
            key = key.detach()
        if shared:
            query, key = query.flatten(0, 1)[None], key.flatten(0, 1)[None]
        if backend == "reference":
            if shared and group is not None:
                query, key = (gather_with_grad(x[0], group)[None] for x in (query, key))
                group = None  # every rank has all patches now
            total = _sum_of_printed(query / temperature, key, group)
        else:
            with_query, with_key = (
                x.requires_grad and torch.is_grad_enabled() for x in (query, key)
            )
            if shared and group is not None:
                # Ranks must agree on whether the keys' gradient is reduced, whatever each one needs.
                with_key = not detach_key
            with_grads = (with_query, with_key)
            total = _SumOfLosses.apply(  # type: ignore[no-untyped-call]
                query, key, temperature, shared, with_grads, group
            )
        return total / max(1, patches)


_patch_nce_uncompiled = uncompiled(_patch_nce)  # many blocks, or collectives: not to be traced


class PatchNCELoss(nn.Module):
    """Criterion of :func:`patch_nce_loss` for several layers: the mean over layers.

    Parameters
    ----------
    temperature, negatives, detach_key, group, backend
        See :func:`patch_nce_loss`.

    Raises
    ------
    TypeError, ValueError
        As :func:`patch_nce_loss`, for the options when the criterion is made.

    Notes
    -----
    No parameters, no state: the head that makes the features is :class:`PatchProjector`.

    Examples
    --------
    >>> criterion = PatchNCELoss(temperature=1.0)
    >>> criterion
    PatchNCELoss(temperature=1.0, negatives='image', detach_key=True, backend='auto')
    >>> shallow, deep = torch.eye(4)[None], torch.eye(2)[None]  # two layers
    >>> criterion([shallow, deep], [shallow, deep])  # the mean of log(1 + 3/e) and log(1 + 1/e)
    tensor(0.5285)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        negatives: Negatives = "image",
        detach_key: bool = True,
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_options(temperature, negatives, detach_key, group, backend)
        self.temperature = temperature
        self.negatives: Negatives = negatives
        self.detach_key = detach_key
        self.group = group
        self.backend: Backend = backend

    def forward(
        self, queries: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Return the loss of features (B, P, C), or the mean over the layers of two lists of them."""
        if isinstance(queries, Tensor) and isinstance(keys, Tensor):
            queries, keys = [queries], [keys]
        if len(queries) != len(keys) or not len(queries):
            raise ValueError(
                f"keys: expected as many layers as queries, at least one, got {len(keys)} for "
                f"{len(queries)}"
            )
        losses = [
            patch_nce_loss(
                query,
                key,
                temperature=self.temperature,
                negatives=self.negatives,
                detach_key=self.detach_key,
                group=self.group,
                backend=self.backend,
            )
            for query, key in zip(queries, keys, strict=True)
        ]
        return torch.stack(losses).mean()

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"temperature={self.temperature}, negatives={self.negatives!r}, "
            f"detach_key={self.detach_key}, backend={self.backend!r}"
        )


# --------------------------------------------------------------------------------------------------
# Patches and their features
# --------------------------------------------------------------------------------------------------


def sample_patch_ids(
    shape: Sequence[int], n: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw ``n`` different places of a feature map, in random order.

    Draw once for a layer, and use the places for the input *and* the output: the loss compares
    patches of the same place.

    Parameters
    ----------
    shape
        ``(..., H, W)``: the shape of a feature map; only its last two numbers count.
    n
        How many places, from 1 to ``H W``. The paper takes 256 a layer.
    generator
        Source of randomness; the places lie on its device. Default: PyTorch's global one, on the CPU.

    Returns
    -------
    Tensor
        int64, shape ``(n,)``: indices ``row * W + column`` into the flattened map.

    Raises
    ------
    TypeError
        ``n`` or a size is not an integer.
    ValueError
        Fewer than two sizes, or more places asked for than there are, or none.

    Notes
    -----
    Time and memory ``O(H W)``.

    Examples
    --------
    >>> ids = sample_patch_ids((2, 3), 6, torch.Generator().manual_seed(0))
    >>> ids.sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    sizes = list(shape)
    if len(sizes) < 2:
        raise ValueError(f"shape: expected (..., H, W), got {tuple(sizes)}")
    for name, value in (("shape", sizes[-2]), ("shape", sizes[-1]), ("n", n)):
        check_integer(value, name)
    places = sizes[-2] * sizes[-1]
    if not 1 <= n <= places:
        raise ValueError(f"n: expected a number from 1 to {places} (places in the map), got {n}")
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randperm(places, generator=generator, device=device)[:n]


class PatchProjector(nn.Module):
    """The head of one layer: features at given places, through a two-layer MLP, on the unit sphere.

    Parameters
    ----------
    channels
        Channels of the layer's feature map, at least 1.
    dim
        Units of both layers of the MLP, and length of the result. Default 256, the paper's.

    Raises
    ------
    TypeError, ValueError
        Not a positive integer.

    Notes
    -----
    Input and output image share one head (the paper's choice; its appendix finds separate ones
    worse). A vector that the MLP maps to zero stays zero, with a zero gradient, where a division by
    its length would not. Lengths are taken in float32 or wider. Time ``O(B P dim (channels + dim))``.

    Examples
    --------
    >>> head = PatchProjector(8, dim=16)
    >>> z = head(torch.randn(2, 8, 4, 4), torch.tensor([0, 5, 10]))
    >>> z.shape
    torch.Size([2, 3, 16])
    >>> torch.allclose(z.norm(dim=-1), torch.ones(2, 3))
    True
    """

    def __init__(self, channels: int, dim: int = 256) -> None:
        super().__init__()
        check_integer(channels, "channels", 1)
        check_integer(dim, "dim", 1)
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the unit vectors (B, P, dim) of the places ``ids`` (P,) of ``features`` (B, C, H, W)."""
        check_floating(features, "features", ndim=4)
        check_shape(features, "features", (None, self.channels, None, None))
        places = features.shape[2] * features.shape[3]
        tracing = torch.compiler.is_compiling()  # values cannot be looked at then
        check_labels(ids, "ids", num_classes=None if tracing else places)
        at_places = features.flatten(2)[:, :, ids.to(features.device)].mT
        projected: Tensor = self.mlp(at_places)
        projected = projected.to(wide_dtype(projected))
        length = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
        # Where the length is 0 so is the factor, and with it the gradient.
        factor = length.clamp(min=1e-12).reciprocal().masked_fill(length < 1e-12, 0.0)
        unit: Tensor = projected * factor
        return unit


class _Enough(Exception):  # noqa: N818  (no error: it ends a forward pass early)
    pass


def encoder_features(module: nn.Module, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Feature maps of named layers, from a forward pass that stops after the last of them.

    A place of a feature map *is* a patch of the image, as large as its receptive field, so a
    generator's own encoder provides the patches of :func:`patch_nce_loss` for free.

    Parameters
    ----------
    module
        Any network; it is called as ``module(x)``.
    x
        Its input.
    layers
        Names of submodules, as in ``module.named_modules()``, whose outputs are wanted; ``"input"``
        stands for ``x`` itself (the pixels).

    Returns
    -------
    list of Tensor
        One tensor a name, in the order of ``layers``, with their autograd history. Of a submodule
        that is called several times it is the first output.

    Raises
    ------
    TypeError
        ``layers`` is a string, or a submodule returns no tensor.
    ValueError
        No layers, a name twice, a name that the module does not have, or a submodule that the forward
        pass does not call.

    Notes
    -----
    An in-place operation that follows a layer (``ReLU(inplace=True)``) changes the tensor that was
    taken from it; ask for that operation's own output instead.

    Examples
    --------
    >>> encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    >>> maps = encoder_features(encoder, torch.zeros(1, 3, 8, 8), ["input", "1", "2"])
    >>> [tuple(m.shape) for m in maps]
    [(1, 3, 8, 8), (1, 4, 6, 6), (1, 5, 4, 4)]
    """
    if isinstance(layers, str):
        raise TypeError(f"layers: expected a sequence of names, got the text {layers!r}")
    names = list(layers)
    known = dict(module.named_modules())
    if not names or len(set(names)) != len(names):
        raise ValueError(f"layers: expected different names, at least one, got {names}")
    for name in names:
        if name != "input" and name not in known:
            raise ValueError(f"layers: expected names of submodules or 'input', got {name!r}")
    found: dict[str, Tensor] = {"input": x}
    wanted = [name for name in names if name != "input"]

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layers: expected submodules that return a tensor, got "
                    f"{type(output).__name__} from {name!r}"
                )
            found.setdefault(name, output)
            if all(other in found for other in wanted):
                raise _Enough

        return hook

    hooks = [known[name].register_forward_hook(keep(name)) for name in wanted]
    try:
        if wanted:
            module(x)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"layers: expected submodules that the forward pass calls, got {name!r}"
            )
    return [found[name] for name in names]


def receptive_field(layers: Sequence[tuple[int, int]]) -> list[int]:
    """Side of the patch that one place of each layer of a chain of convolutions sees.

    Parameters
    ----------
    layers
        ``(kernel, stride)`` of each layer, in order; pooling and blurring count as layers.

    Returns
    -------
    list of int
        Receptive fields in pixels of the input, one a layer.

    Raises
    ------
    TypeError
        Something other than pairs of integers.
    ValueError
        A kernel or a stride below 1.

    Examples
    --------
    >>> receptive_field([(7, 1), (3, 2), (3, 2)])  # a 7 x 7 convolution and two of stride 2
    [7, 9, 13]
    """
    field, step, fields = 1, 1, []
    for layer in layers:
        if not isinstance(layer, Sequence) or len(layer) != 2:
            raise TypeError(f"layers: expected (kernel, stride) pairs, got {layer!r}")
        for value in layer:
            check_integer(value, "layers", 1)
        kernel, stride = layer
        field += (kernel - 1) * step
        step *= stride
        fields.append(field)
    return fields


# --------------------------------------------------------------------------------------------------
# The adversarial loss beside it
# --------------------------------------------------------------------------------------------------


def lsgan_d(real: Tensor, fake: Tensor) -> Tensor:
    r"""Least-squares loss of the discriminator, :math:`E (D(y) - 1)^2 + E D(\hat y)^2`.

    Parameters
    ----------
    real, fake
        Its scores of real images and of outputs, floating, any shapes (a PatchGAN has one score a
        patch). Detach the outputs before scoring them.

    Returns
    -------
    Tensor
        A scalar, at least 0. The released code of the paper takes half of it.

    Raises
    ------
    TypeError
        Not floating tensors.
    ValueError
        No score, which has no mean.

    Examples
    --------
    >>> lsgan_d(torch.tensor([1.0, 0.0]), torch.tensor([0.0]))
    tensor(0.5000)
    """
    _check_scores(real, "real")
    _check_scores(fake, "fake")
    return (real - 1).square().mean() + fake.square().mean()


def lsgan_g(fake: Tensor) -> Tensor:
    r"""Least-squares loss of the generator, :math:`E (D(\hat y) - 1)^2`.

    Parameters
    ----------
    fake
        The discriminator's scores of outputs, floating, any shape.

    Returns
    -------
    Tensor
        A scalar, at least 0.

    Raises
    ------
    TypeError
        Not a floating tensor.
    ValueError
        No score, which has no mean.

    Examples
    --------
    >>> lsgan_g(torch.tensor([0.0, 1.0]))
    tensor(0.5000)
    """
    _check_scores(fake, "fake")
    return (fake - 1).square().mean()


def _check_scores(scores: Tensor, name: str) -> None:
    check_floating(scores, name)
    if not scores.numel():
        raise ValueError(f"{name}: expected at least one score, got shape {tuple(scores.shape)}")
