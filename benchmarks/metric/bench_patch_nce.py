"""PatchNCE: ours, the printed equation, the cross-entropy of the matrix, and the published layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from affnb.metric import patch_nce_loss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL = "affnb", "literal equations"
PYTORCH, PUBLISHED = "PyTorch (cross-entropy)", "published layout"


def of_matrix(query: Tensor, key: Tensor) -> Tensor:
    """Cross-entropy of the rows, with the diagonal as target; sets of patches in the first axis."""
    logits = (query @ key.mT / 0.07).flatten(0, 1)
    target = torch.arange(query.shape[1], device=query.device).repeat(len(query))
    return F.cross_entropy(logits, target)


def of_published_layout(query: Tensor, key: Tensor) -> Tensor:
    """The positive in a column of its own, beside a matrix whose diagonal is put out."""
    positive = (query * key).sum(-1, keepdim=True)
    own = torch.eye(key.shape[1], dtype=torch.bool, device=key.device)
    negatives = (query @ key.mT).masked_fill(own, -10.0)
    logits = torch.cat([positive, negatives], -1).flatten(0, 1) / 0.07
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target)


def setup(implementation: str, shape: dict[str, int], device: str, negatives: str) -> Step:
    torch.manual_seed(0)
    size = (shape["B"], shape["P"], shape["C"])
    query = F.normalize(torch.randn(size, device=device), dim=-1).requires_grad_()
    key = F.normalize(torch.randn(size, device=device), dim=-1)
    cross_entropy = as_named(of_matrix, implementation)

    def step() -> Tensor:
        query.grad = None
        if implementation.startswith((PYTORCH, PUBLISHED)):
            q, k = query, key
            if negatives == "batch":
                q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
            loss = of_published_layout(q, k) if implementation == PUBLISHED else cross_entropy(q, k)
        else:
            backend = "auto" if implementation == OURS else "reference"
            loss = patch_nce_loss(query, key, negatives=negatives, backend=backend)
        loss.backward()
        return loss

    return step


def setup_image(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup(implementation, shape, device, "image")


def setup_batch(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup(implementation, shape, device, "batch")


def work(shape: dict[str, int], pairs: int) -> Work:
    """Queries and keys in, the queries' gradient out; one product for the logits and one for it."""
    features = shape["B"] * shape["P"] * shape["C"]
    return Work(bytes=4 * 3 * features, flops=2 * 2 * pairs * shape["C"])


def cases(device: str) -> list[Case]:
    found = []
    everyone = [OURS, PYTORCH, PYTORCH + COMPILED, PUBLISHED, LITERAL]
    small = {"B": 1, "P": 4, "C": 8}
    # The paper's size (a batch of 1, 256 places), a larger batch, and all places of a 64 x 64 map.
    for images, patches in ((1, 256), (16, 256), (1, 4096)):
        shape = {"B": images, "P": patches, "C": 256}
        least = work(shape, images * patches**2)
        found += [
            Case("patch_nce_loss, image", name, shape, setup_image, small, least)
            for name in everyone
        ]
    # All patches of the batch; in the paper's single-image variant there are 16 crops.
    for images in (4, 16, 32) if device == "cpu" else (16, 64, 256):
        shape = {"B": images, "P": 256, "C": 256}
        least = work(shape, (images * 256) ** 2)
        found += [
            Case("patch_nce_loss, batch", name, shape, setup_batch, small, least)
            for name in everyone
        ]
    return found
