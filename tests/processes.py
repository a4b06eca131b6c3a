"""Several processes that compute together: gloo on the CPU, for the tests of ``group=``."""

import torch
import torch.distributed as dist


def run(work, world, folder):
    """Return what ``work(rank, world)`` returns in each of ``world`` processes, in rank order.

    ``work`` is a function of a test module, which the processes import. What it returns goes through a
    file in ``folder``, so that the tests judge it, and not the processes.
    """
    torch.multiprocessing.spawn(_join, args=(work, world, str(folder)), nprocs=world)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _join(rank, work, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.save(work(rank, world), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves early makes the others abort
    dist.destroy_process_group()


def rows_of(rank, sizes):
    """Return the rows of the whole batch that a rank holds, given how many each rank holds."""
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def message_of(call):
    """Return the error that a call raises as text, or ``"no error"``."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
