"""BroadFace: the classifier's cross-entropy over batch and queue, and a whole step of the head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from affnb.metric import BroadFaceHead, compensate, margin_cross_entropy
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL = "affnb", "literal equations"
PYTORCH, PEER = "PyTorch (normalize, cross_entropy)", "pytorch-metric-learning"


def plain_arcface(e: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    cosine = F.normalize(e) @ F.normalize(w).T
    theta = cosine.gather(1, y[:, None]).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return F.cross_entropy(64 * cosine.scatter(1, y[:, None], (theta + 0.5).cos()), y)


def draw(shape: dict[str, int], rows: int, device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    e = torch.randn(rows, shape["D"], device=device)
    w = torch.randn(shape["C"], shape["D"], device=device).requires_grad_()
    return e, w, torch.randint(shape["C"], (rows,), device=device)


def setup_loss(implementation: str, shape: dict[str, int], device: str) -> Step:
    """Mean loss of the rows, and its gradient for the identity vectors."""
    e, w, y = draw(shape, shape["rows"], device)
    if implementation == PEER:
        from pytorch_metric_learning.losses import ArcFaceLoss

        peer = ArcFaceLoss(shape["C"], shape["D"], margin=math.degrees(0.5), scale=64).to(device)
        peer.collect_stats = False
        peer.W.data.copy_(w.detach().T)

    plain = as_named(plain_arcface, implementation)

    def step() -> torch.Tensor:
        w.grad = None
        if implementation == PEER:
            peer.W.grad = None
            loss = peer(e, y)
        elif implementation.startswith(PYTORCH):
            loss = plain(e, w, y)
        else:
            backend = "auto" if implementation == OURS else "reference"
            loss = margin_cross_entropy(e, w, y, backend=backend)
        loss.backward()
        return loss

    return step


def setup_head(implementation: str, shape: dict[str, int], device: str) -> Step:
    """One step with a full queue: both losses and their gradients."""
    batch, queue_size = shape["B"], shape["Q"]
    e, w, y = draw(shape, queue_size + batch, device)
    head = BroadFaceHead(shape["C"], shape["D"], queue_size).to(device)
    leaf, own = e[:batch].requires_grad_(), y[:batch]
    with torch.no_grad():
        head.weight.copy_(w)
        head.queue.enqueue(e[batch:], w[y[batch:]], y[batch:])
    past, labels, proxies = e[batch:].clone(), y[batch:].clone(), head.queue.proxies.clone()

    plain = as_named(plain_arcface, implementation)

    def step() -> torch.Tensor:
        leaf.grad = head.weight.grad = w.grad = None
        if implementation == OURS:
            loss: torch.Tensor = head(leaf, own)
            loss.backward()
            return loss
        with torch.no_grad():
            star = compensate(past, proxies, w[labels])
        union = torch.cat([leaf.detach(), star])
        loss = plain(leaf, w.detach(), own) + plain(union, w, torch.cat([own, labels]))
        loss.backward()
        return loss

    return step


def cases(device: str) -> list[Case]:
    found = []
    sizes = [(1024, 1000, 64), (2176, 11_318, 128)]  # the second: the identities of SOP
    if device == "cuda":
        sizes.append((8320, 85_000, 512))  # one GPU of the paper
    for rows, classes, dim in sizes:
        shape = {"rows": rows, "C": classes, "D": dim}
        small = {"rows": 8, "C": 8, "D": dim}
        names = [OURS, LITERAL, PYTORCH, PYTORCH + COMPILED, PEER]
        # Embeddings and identities in, the identities' gradient out; the products of all pairs, and
        # their gradient times the embeddings.
        work = Work(bytes=4 * dim * (rows + 2 * classes), flops=2 * 2 * rows * classes * dim)
        found += [
            Case("margin_cross_entropy", name, shape, setup_loss, small, work) for name in names
        ]
    for batch, queue_size, classes, dim in ((32, 1024, 1000, 64), (128, 2048, 11_318, 128)):
        shape = {"B": batch, "Q": queue_size, "C": classes, "D": dim}
        small = {"B": 2, "Q": 8, "C": 8, "D": dim}
        found += [
            Case("BroadFaceHead", name, shape, setup_head, small)
            for name in (OURS, PYTORCH, PYTORCH + COMPILED)
        ]
    return found
