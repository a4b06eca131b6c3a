"""A batch loss over several GPUs (or processes of one CPU), exact, in one file.

Start it on one machine with

    torchrun --standalone --nproc-per-node 2 examples/several_processes.py

or on two with eight GPUs each, the same command on both:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/several_processes.py

Every process embeds its own share of each batch, and ``group=`` makes the loss that of the whole
batch: a query of one process is ranked among the items of all. `DistributedDataParallel` averages the
gradients of the processes, while the gradient of one loss over all rows is their sum, so the loss is
multiplied by their number before `backward`.

The first process then trains the same network on the same batches alone and reports how far the
weights are apart. ``--loss`` takes any loss over a batch; so will your training script.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from affnb.affinity import batch_affinity_loss
from affnb.metric import PKSampler, patch_nce_loss, smooth_ap_loss

CLASSES, DIM = 30, 24


def smooth_ap(embed: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, group: object) -> Tensor:
    """Rank the batch for each of its items."""
    return smooth_ap_loss(F.normalize(embed(x), dim=1), y, temperature=0.1, group=group)


def batch_affinity(
    embed: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, group: object
) -> Tensor:
    """Put the affinity mass of the batch on pairs of one class."""
    return batch_affinity_loss(embed(x), y, group=group)


def patch_nce(embed: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, group: object) -> Tensor:
    """Tell each item, seen through noise, from the items of the whole batch."""
    noisy = x + 0.1 * x.roll(1, dims=1)
    query, key = (F.normalize(v, dim=1)[:, None] for v in embed(torch.cat([noisy, x])).chunk(2))
    return patch_nce_loss(query, key, negatives="batch", group=group)


LOSSES = {f.__name__: f for f in (smooth_ap, batch_affinity, patch_nce)}


def train(loss: Callable[..., Tensor], device: torch.device, group: object, steps: int) -> Tensor:
    """Train on the same batches, each process on its share; return all weights."""
    torch.manual_seed(0)  # the same data, weights and batches in every process
    centres = torch.randn(CLASSES, DIM)
    labels = torch.arange(CLASSES).repeat(20)
    data = centres[labels] + torch.randn(len(labels), DIM)
    network: nn.Module = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, 16)).to(device)
    rank, size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    if group is not None:
        network = DistributedDataParallel(network)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    batches = PKSampler(labels, 10, 5, torch.Generator().manual_seed(1), batches=steps)
    for step, batch in enumerate(batches):
        own = batch[rank::size]  # shares of different sizes are fine
        value = loss(network, data[own].to(device), labels[own].to(device), group)
        optimiser.zero_grad()
        (value * size).backward()
        optimiser.step()
        if rank == 0 and step in (0, steps - 1):
            print(f"{size} process(es), step {step + 1}: loss {value.item():.6f}")
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def main() -> None:
    """Train with all processes, then with one, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--loss", choices=LOSSES, default="smooth_ap")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    with torch.cuda.device(device) if cuda else nullcontext():
        together = train(LOSSES[arguments.loss], device, dist.group.WORLD, arguments.steps)
        if dist.get_rank() == 0:
            alone = train(LOSSES[arguments.loss], device, None, arguments.steps)
            print(f"largest difference of the weights: {(together - alone).abs().max():.2e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
