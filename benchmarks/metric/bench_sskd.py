"""Copying a batch affinity: ours, the printed equations, and whole matrices in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.metric import affinity_transfer_loss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (kl_div of whole matrices)"


def whole_matrices(
    rows: torch.Tensor, cols: torch.Tensor, t_rows: torch.Tensor, t_cols: torch.Tensor
) -> torch.Tensor:
    student = F.normalize(rows, dim=1) @ F.normalize(cols, dim=1).T
    teacher = F.normalize(t_rows, dim=1) @ F.normalize(t_cols, dim=1).T
    log_s, log_t = (student / 0.5).log_softmax(1), (teacher / 0.5).log_softmax(1)
    return 0.25 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def setup(implementation: str, shape: dict[str, int], device: str) -> Step:
    generator = torch.Generator().manual_seed(0)
    n, d = shape["N"], shape["d"]
    rows, cols, t_rows, t_cols = (
        torch.randn(n, width, generator=generator).to(device) for width in (d, d, 2 * d, 2 * d)
    )
    rows.requires_grad_()
    cols.requires_grad_()
    options = {}
    if implementation.startswith(PYTORCH):
        loss = as_named(whole_matrices, implementation)
    else:  # every row is kept: all forms do the same work
        loss = affinity_transfer_loss
        options = {
            "keep_percent": 100,
            "backend": "reference" if implementation == LITERAL else "auto",
        }

    def step() -> torch.Tensor:
        rows.grad = cols.grad = None
        value = loss(rows, cols, t_rows, t_cols, **options)
        value.backward()
        return value

    return step


def cases(device: str) -> list[Case]:
    d, found = 64, []
    for n in (256, 1024, 4096) if device == "cpu" else (1024, 4096, 16_384, 65_536):
        # The student's embeddings are read and their gradients written, the teacher's read. Products:
        # the student's cosines and two for their gradient, and the teacher's, twice as wide.
        work = Work(bytes=4 * n * d * (2 + 2 + 4), flops=(3 + 2) * 2 * n * n * d)
        found += [
            Case("affinity_transfer_loss", name, {"N": n, "d": d}, setup, {"N": 8, "d": d}, work)
            for name in (OURS, LITERAL, PYTORCH, PYTORCH + COMPILED)
        ]
    return found
