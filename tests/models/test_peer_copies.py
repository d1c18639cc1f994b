"""Copies between the memories of GPUs, against NCCL. `test_parallel` and `test_gated_mlp` have them between files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from fiddlehead.models import gated_mlp, peer_copies, peer_products
from fiddlehead.models.collectives import (
    Group,
    end,
    linear_of_columns,
    linear_of_whole,
    start_gather,
    start_reduce_scatter,
)

GPUS = torch.cuda.device_count()
NAN = float("nan")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def test_there_are_none_between_cpus() -> None:
    reason = peer_copies.connect(dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
    assert reason == "cpu devices cannot copy from each other's memory"


def groups(rank: int, ranks: int, folder: str) -> tuple[Group, Group, dict[str, Any]]:
    """The processes with copies and with NCCL; and how their tensors are drawn."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    group: Any = dist.group.WORLD
    assert peer_copies.connect(group, device) is None
    copies, nccl = (Group(group.group_name, ranks, rank, copies=each) for each in (True, False))
    return copies, nccl, {"device": device, "generator": torch.Generator(device).manual_seed(rank)}


def near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < (6e-3 if found.dtype == torch.bfloat16 else 1e-6), f"{what}: {error}"


def transfers(rank: int, ranks: int, folder: str) -> None:
    copies, nccl, like = groups(rank, ranks, folder)
    busy = torch.randn(2048, 2048, **like)
    # Later transfers are larger than the buffers of earlier ones, and some smaller.
    shapes = [(1, 3, 8, 5), (5, 7, 40, 24), (2, 111, 72, 1009), (3, 1, 8, 8), (4, 300, 333, 96)]
    for dtype in (torch.bfloat16, torch.float32):
        for B, t, C, D in shapes * 8:
            what = f"{dtype} {B, t, C, D}"
            x, whole = (torch.randn(n * B, t, C, dtype=dtype, **like) for n in (1, ranks))
            grad, whole_grad = (torch.randn(n * B, t, D, dtype=dtype, **like) for n in (1, ranks))
            weight = torch.randn(D, C, dtype=dtype, **like)
            xs, grads = end(start_gather(x, nccl)), end(start_gather(grad, nccl))
            wanted = [
                xs @ weight.T,
                end(start_reduce_scatter(whole_grad @ weight, nccl)),
                whole_grad.flatten(0, 1).T @ xs.flatten(0, 1),
                end(start_reduce_scatter(whole @ weight.T, nccl)),
                grads @ weight,
                grads.flatten(0, 1).T @ whole.flatten(0, 1),
            ]
            # Several at a time, with tensors that are overwritten and freed while they travel, and products meanwhile.
            where, both = (copies.name, copies.size), (True, True)
            given = [each.clone() for each in (x, weight, whole_grad, whole, grad)]
            found = [
                peer_products.product_of_whole(*given[:2], *where),
                *peer_products.gradients_of_whole(*given[:3], *where, *both),
                peer_products.sum_of_products(given[3], given[1], *where),
                *peer_products.gradients_of_sum(given[3], given[1], given[4], *where, *both),
            ]
            for each in given:
                each.fill_(NAN)
            del each, given
            busy = (busy @ busy).tanh()
            for number, (result, expected) in enumerate(zip(found, wanted, strict=True)):
                near(result, expected, f"{what}, result {number}")
            alone = peer_products.gradients_of_whole(x, weight, whole_grad, *where, False, True)
            assert alone[0] is None, what
            near(alone[1], wanted[2], what)
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("ranks", [2, *([GPUS] if GPUS > 2 else [])])
def test_they_give_what_nccl_gives(tmp_path: Path, ranks: int) -> None:
    mp.spawn(transfers, (ranks, str(tmp_path)), nprocs=ranks)


def layers(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, gated: torch.Tensor, group: Group) -> torch.Tensor:
    """Layers that a group splits."""
    for _ in range(3):
        h = F.silu(linear_of_whole(x.tanh(), w1, None, group))
        x = x + linear_of_columns(h * h, w2, group)
        if gated.numel():
            x = x + gated_mlp.gated_mlp(x.tanh(), gated, w2, group)
    return x


def learns(rank: int, ranks: int, folder: str, quack: bool) -> None:
    copies, nccl, like = groups(rank, ranks, folder)
    w1, w2, gated = (
        torch.randn(shape, dtype=torch.bfloat16, **like) / 8
        for shape in ((96, 64), (64, 96), (192 if quack else 0, 64))
    )
    for step in range(4):
        x = torch.randn(3, 37 + step, 64, dtype=torch.bfloat16, **like)
        results = []
        for function, group in ((layers, nccl), (layers, copies), (torch.compile(layers, fullgraph=True), copies)):
            given = [each.clone().requires_grad_() for each in (x, w1, w2, *([gated] if quack else []))]
            y = function(*given, *([] if quack else [gated]), group)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), given)))
        for number, (by_nccl, eager, compiled) in enumerate(zip(*results, strict=True)):
            for name, found in (("eager", eager), ("compiled", compiled)):
                error = (found - by_nccl).float().norm() / by_nccl.float().norm()
                assert error < 2e-2, f"{name}, step {step}, result {number}: {error}"
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.mark.gpu
@two_gpus
def test_layers_learn_as_with_nccl_also_compiled(tmp_path: Path) -> None:
    quack = gated_mlp.why_not_installed(gated_mlp.installed()) is None
    mp.spawn(learns, (2, str(tmp_path), quack), nprocs=2)
