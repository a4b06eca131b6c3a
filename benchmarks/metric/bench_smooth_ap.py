"""Smooth-AP: ours, the printed equations, the obvious PyTorch form, and pytorch-metric-learning.

Also the exact AP of a gallery: ours, torchmetrics and scikit-learn.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from affnb.metric import average_precision, smooth_ap_loss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL = "affnb", "literal equations"
PYTORCH, PML = "PyTorch (relevant rows)", "pytorch-metric-learning"
TORCHMETRICS, SKLEARN = "torchmetrics", "scikit-learn"


def relevant_rows_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, temperature: float = 0.01
) -> torch.Tensor:
    """The comparisons of (query, relevant item) pairs with all items, through autograd."""
    scores = embeddings @ embeddings.T
    same = labels[:, None] == labels
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    query, item = (same & others).nonzero(as_tuple=True)
    rows = torch.arange(len(query), device=labels.device)
    g = torch.sigmoid((scores[query] - scores[query, item][:, None]) / temperature)
    g = g * others[query]
    g = g.index_put((rows, item), g.new_zeros(()))
    ratio = (1 + (g * same[query]).sum(1)) / (1 + g.sum(1))
    count = torch.bincount(query, minlength=len(labels))
    return 1 - (ratio / count[query]).sum() / (count > 0).sum()


def setup_loss(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    batch, each = shape["B"], shape["per class"]
    embeddings = F.normalize(torch.randn(batch, shape["d"], device=device), dim=1).requires_grad_()
    labels = torch.arange(batch, device=device) // each
    if implementation == PML:
        from pytorch_metric_learning.losses import SmoothAPLoss

        loss = SmoothAPLoss(temperature=0.01)
    elif implementation.startswith(PYTORCH):
        loss = as_named(relevant_rows_loss, implementation)
    else:
        backend = "auto" if implementation == OURS else "reference"

        def loss(e: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return smooth_ap_loss(e, y, backend=backend)

    def step() -> torch.Tensor:
        embeddings.grad = None
        value = loss(embeddings, labels)
        value.backward()
        return value

    return step


def setup_exact(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    queries, items = shape["Q"], shape["M"]
    scores = torch.rand(queries, items, device=device)  # positive: torchmetrics drops the others
    relevance = torch.rand(queries, items, device=device) < 0.01
    relevance[:, 0] = True

    def step() -> object:
        if implementation == OURS:
            return average_precision(scores, relevance).mean()
        if implementation == TORCHMETRICS:
            from torchmetrics.retrieval import RetrievalMAP

            index = torch.arange(queries, device=device)[:, None].expand(queries, items)
            return RetrievalMAP().to(device)(scores, relevance, indexes=index)
        from sklearn.metrics import average_precision_score

        pairs = zip(relevance.cpu().numpy(), scores.cpu().numpy(), strict=True)
        return np.mean([average_precision_score(r, s) for r, s in pairs])

    return step


def cases(device: str) -> list[Case]:
    found = []
    on_gpu = device == "cuda"
    for batch in (96, 384, 1024, 4096, *[16_384] * on_gpu):
        names = [OURS]
        # The literal form and the peer hold B x B x B numbers, several times over.
        names += [LITERAL, PML] * (on_gpu or batch <= 384)
        names += [PYTORCH, PYTORCH + COMPILED] * (on_gpu or batch <= 1024)
        names += [PYTORCH] * (batch == 4096 and not on_gpu)
        shape = {"B": batch, "per class": 4, "d": 128}
        small = {"B": 16, "per class": 4, "d": 128}
        # Scores, and their gradient times the embeddings on either side.
        work = Work(bytes=2 * 4 * batch * 128, flops=3 * 2 * batch * batch * 128)
        found += [Case("smooth_ap_loss", name, shape, setup_loss, small, work) for name in names]
    for queries, items in ((100, 1000), (1000, 10_000)):
        shape, small = {"Q": queries, "M": items}, {"Q": 4, "M": 20}
        names = [OURS, TORCHMETRICS, SKLEARN]
        found += [Case("average_precision", name, shape, setup_exact, small) for name in names]
    return found
