"""The batch loss over several processes (gloo, CPU) against one process that holds everything."""

import importlib
import math
import os
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from affnb.affinity import batch_affinity_loss
from affnb.checks import check_positive
from affnb.distributed import (
    all_gather_uneven,
    all_reduce_logsumexp,
    check_group,
    check_together,
    gather_with_grad,
    raise_together,
)
from affnb.metric import patch_nce_loss, smooth_ap_loss
from tests.processes import message_of, rows_of, run

FORMS = ("focal", "log", "l2", "smooth_l1", "bce")
# Uneven shards; with three ranks one of them is empty.
SHARDS = {2: (7, 4), 3: (6, 0, 5)}


def whole_batch():
    """Eleven points in float64. The rows of the last rank hold no pair of one class."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(11, 4, generator=generator, dtype=torch.float64) + 2
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3, 0, 1, 4])
    return features, labels


def work(rank, world):
    """Everything that one process does: what it saw, for the tests to judge."""
    group = dist.group.WORLD
    features, labels = whole_batch()
    rows = rows_of(rank, SHARDS[world])
    seen = {}

    def loss_and_grad(own, own_labels, **options):
        own = own.clone().requires_grad_()
        loss = batch_affinity_loss(own, own_labels, group=group, **options)
        loss.backward()
        return loss.detach(), own.grad

    # By its full name: affnb.affinity.affinity_mass is also the function of that name.
    module = importlib.import_module("affnb.affinity.affinity_mass")
    for tile, backend in (((512, 1024), "auto"), ((2, 3), "auto"), ((512, 1024), "reference")):
        module._TILE_CPU = tile
        for form, include_self in product(FORMS, (False, True)):
            seen["loss", tile, backend, form, include_self] = loss_and_grad(
                features[rows], labels[rows], form=form, include_self=include_self, backend=backend
            )
    module._TILE_CPU = (512, 1024)
    seen["half"] = loss_and_grad(features[rows].half(), labels[rows].int())
    seen["no target"] = loss_and_grad(features[rows], torch.arange(11)[rows])
    seen["one class"] = loss_and_grad(features[rows], torch.zeros(11, dtype=torch.long)[rows])
    seen["upstream"] = features[rows].clone().requires_grad_()
    (batch_affinity_loss(seen["upstream"], labels[rows], group=group) * (rank + 1)).backward()
    seen["upstream"] = seen["upstream"].grad

    # Averaging over ranks, as DDP does, undone by the world size.
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3).double())
    (world * batch_affinity_loss(model(features[rows]), labels[rows], group=group)).backward()
    seen["ddp"] = model.module.weight.grad

    nan = features[rows].clone()
    if rank == 0:
        nan[0, 0] = torch.nan
    seen["nan"] = message_of(lambda: batch_affinity_loss(nan, labels[rows], group=group))
    short = labels[rows][1:] if rank == 0 else labels[rows]
    seen["short"] = message_of(lambda: batch_affinity_loss(features[rows], short, group=group))
    wide = torch.zeros(2, 3 + rank)
    seen["wide"] = message_of(lambda: all_gather_uneven(wide, group))
    single = torch.zeros(2, 3, dtype=torch.float32 if rank else torch.float64)
    seen["dtype"] = message_of(lambda: all_gather_uneven(single, group))
    seen["together"] = message_of(
        lambda: raise_together(KeyError("x") if rank == world - 1 else None, group)
    )
    seen["fine"] = message_of(lambda: raise_together(None, group))
    size = -1 if rank == 0 else 1
    seen["check"] = message_of(lambda: check_together(lambda: check_positive(size, "size"), group))
    seen["checked"] = message_of(lambda: check_together(lambda: None, group))

    seen["gathered"] = all_gather_uneven(labels[rows], group)
    own = features[rows].clone().requires_grad_()
    everything = gather_with_grad(own, group)
    (everything.square().sum() * 0.5).backward()
    seen["with grad"] = (everything.detach(), own.grad)
    inf = torch.inf
    seen["logsumexp"] = all_reduce_logsumexp(
        torch.tensor([float(rank), -inf, -inf if rank else -900.0, 900.0]), group
    )
    outsider = dist.new_group([0])
    seen["member"] = message_of(lambda: check_group(outsider))
    return seen


@pytest.fixture(scope="module", params=sorted(SHARDS))
def ranks(request, tmp_path_factory):
    """What each rank of a world of two, and of three, saw."""
    world = request.param
    return run(work, world, tmp_path_factory.mktemp(f"world{world}"))


def one_process(**options):
    features, labels = whole_batch()
    features.requires_grad_()
    loss = batch_affinity_loss(features, labels, backend="reference", **options)
    loss.backward()
    return loss.detach(), features.grad


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tile", "backend"), [((512, 1024), "auto"), ((2, 3), "auto"), ((512, 1024), "reference")]
)
def test_loss_and_gradient_are_those_of_one_process(ranks, tile, backend, form, include_self):
    loss, grad = one_process(form=form, include_self=include_self)
    assert loss > 0
    for rank, seen in enumerate(ranks):
        own_loss, own_grad = seen["loss", tile, backend, form, include_self]
        torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=1e-12)
        expected = grad[rows_of(rank, SHARDS[len(ranks)])]
        torch.testing.assert_close(own_grad, expected, rtol=1e-12, atol=1e-12)


def test_each_rank_scales_its_gradient_by_its_own_upstream(ranks):
    _, grad = one_process()
    for rank, seen in enumerate(ranks):
        expected = (rank + 1) * grad[rows_of(rank, SHARDS[len(ranks)])]
        torch.testing.assert_close(seen["upstream"], expected, rtol=1e-12, atol=1e-12)


def test_ddp_gradient_times_world_size(ranks):
    features, labels = whole_batch()
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch_affinity_loss(model(features), labels, backend="reference").backward()
    for seen in ranks:
        torch.testing.assert_close(seen["ddp"], model.weight.grad, rtol=1e-11, atol=1e-13)


def test_half_precision_shards(ranks):
    loss, _ = one_process()
    for seen in ranks:
        own_loss, own_grad = seen["half"]
        assert own_loss.dtype == torch.float32
        assert own_grad.dtype == torch.float16
        torch.testing.assert_close(own_loss.double(), loss, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", ["no target", "one class"])
def test_degenerate_global_batch_is_zero(ranks, case):
    for seen in ranks:
        loss, grad = seen[case]
        assert loss == 0
        assert (grad == 0).all()


def test_bad_input_on_one_rank_raises_on_all(ranks):
    for rank, seen in enumerate(ranks):
        for case, own in (
            ("nan", "ValueError: features:"),
            ("short", "ValueError: labels:"),
            ("check", "ValueError: size:"),
        ):
            expected = own if rank == 0 else "ValueError: group: expected valid input on every rank"
            assert seen[case].startswith(expected)
        last = rank == len(ranks) - 1
        assert seen["together"].startswith("KeyError" if last else "ValueError: group:")
        assert seen["fine"] == seen["checked"] == "no error"
        assert seen["wide"].startswith("ValueError: x: expected the same trailing shape")
        assert seen["dtype"].startswith("ValueError: x: expected the same trailing shape")
        assert seen["member"].startswith("ValueError: group" if rank else "no error")


def test_collectives(ranks):
    features, labels = whole_batch()
    world = len(ranks)
    for rank, seen in enumerate(ranks):
        assert [part.tolist() for part in seen["gathered"]] == [
            labels[rows_of(other, SHARDS[world])].tolist() for other in range(world)
        ]
        everything, grad = seen["with grad"]
        torch.testing.assert_close(everything, features, rtol=0, atol=0)
        torch.testing.assert_close(grad, features[rows_of(rank, SHARDS[world])], rtol=0, atol=0)
        expected = torch.stack(
            [
                torch.arange(world).float().logsumexp(0),
                torch.tensor(-torch.inf),
                torch.tensor(-900.0),
                torch.tensor(900.0 + math.log(world)),
            ]
        )
        torch.testing.assert_close(seen["logsumexp"], expected)


def test_group_must_be_a_process_group():
    for wrong in ("world", 0, os):
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed"):
            check_group(wrong)
        with pytest.raises(TypeError, match="group"):
            batch_affinity_loss(torch.zeros(2, 2), torch.tensor([0, 0]), group=wrong)


def test_mean_of_local_losses_is_another_objective():
    """Why the group exists: each rank's own loss, averaged, has another gradient."""
    features, labels = whole_batch()
    features.requires_grad_()
    losses = [
        batch_affinity_loss(
            features[rows_of(r, SHARDS[2])], labels[rows_of(r, SHARDS[2])], include_self=True
        )
        for r in range(2)
    ]
    (local,) = torch.autograd.grad(sum(losses) / 2, features)
    _, exact = one_process(include_self=True)
    cosine = torch.cosine_similarity(local.flatten(), exact.flatten(), dim=0)
    assert cosine < 0.95


# --- a process that dies -----------------------------------------------------------------------------


def step(rank, loss, folder):
    """Take one step of training; the second process is gone before it takes part."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    features = torch.nn.functional.normalize(torch.randn(6, 4)).requires_grad_()
    dist.barrier()
    if rank == 1:
        os._exit(1)
    group, labels = dist.group.WORLD, torch.tensor([0, 0, 1, 1, 2, 2])
    losses = {
        "affinity": lambda: batch_affinity_loss(features, labels, group=group),
        "smooth_ap": lambda: smooth_ap_loss(features, labels, group=group),
        "patch_nce": lambda: patch_nce_loss(
            features[None], features[None], group=group, negatives="batch"
        ),
    }
    Path(folder, "said").write_text(message_of(lambda: losses[loss]().backward()))
    os._exit(0)


@pytest.mark.parametrize("loss", ["affinity", "smooth_ap", "patch_nce"])
def test_a_process_that_dies_does_not_hang_the_others(loss, tmp_path):
    processes = [
        torch.multiprocessing.get_context("spawn").Process(
            target=step, args=(r, loss, str(tmp_path))
        )
        for r in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert hanging == [], "beyond the group's timeout"
    assert "Error" in (tmp_path / "said").read_text()
