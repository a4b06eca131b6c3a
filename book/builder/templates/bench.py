"""My Title: ours, the equations as they stand, and the obvious PyTorch form."""

from __future__ import annotations

import torch

from affnb.my_part import my_method_loss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (cdist)"

# Replace this form, and add the peers: well-known packages that compute the same.


def whole_matrix_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All distances at once, through autograd; every class has two items or more."""
    W = (-torch.cdist(features, features).square()).fill_diagonal_(-torch.inf).softmax(1)
    return (W * (labels[:, None] != labels)).sum() / len(labels)


def setup(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    features = torch.randn(shape["N"], shape["d"], device=device, requires_grad=True)
    labels = torch.arange(shape["N"], device=device) // 4
    if implementation.startswith(PYTORCH):
        loss = as_named(whole_matrix_loss, implementation)
    else:
        backend = "auto" if implementation == OURS else "reference"

        def loss(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return my_method_loss(f, y, backend=backend)

    def step() -> None:
        features.grad = None
        loss(features, labels).backward()

    return step


def cases(device: str) -> list[Case]:
    found = []
    for n, names in (
        (256, [OURS, LITERAL, PYTORCH, PYTORCH + COMPILED]),
        (1024, [OURS, LITERAL, PYTORCH, PYTORCH + COMPILED]),
        (4096, [OURS, PYTORCH, PYTORCH + COMPILED]),
    ):
        shape, small = {"N": n, "d": 64}, {"N": 8, "d": 64}
        # The features read, their gradient written; the logits, and their slopes times the features.
        work = Work(bytes=2 * 4 * n * 64, flops=3 * 2 * n * n * 64)
        found += [Case("my_method_loss", name, shape, setup, small, work) for name in names]
    return found
