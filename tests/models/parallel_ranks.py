"""The program of each process in `test_parallel`: compares training steps of several processes with one.

Every process computes the step of a single process with the whole batch, and compares its own part with it.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fiddlehead.attention import attend
from fiddlehead.models import LongRopeScaling, LoRA, Transformer, TransformerConfig
from fiddlehead.models.collectives import Group, SequenceSplit
from fiddlehead.models.parallel import Layout, local_batch, parallelize, reduce_gradients
from fiddlehead.models.places import Documents
from fiddlehead.models.ring import Ring
from fiddlehead.models.speed import recompute_activations, tile_mlp
from fiddlehead.training.distributed.gradients import global_norm, gradients_of
from tests.models import file_peers

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 61,
    "seq_length": 16,
    "init_method_std": 0.2,
}
# Documents of both kinds are in a batch: those of up to five tokens, and longer ones.
LONGROPE = LongRopeScaling(
    short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 4.0, 6.0, 8.0), scale_factor=3.2, old_context_len=5, mscale=1.0
)
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_query_groups": None, "normalization": "LayerNorm", "activation": "gelu"},
    "multi-query": {"num_query_groups": 1, "share_embeddings_and_output_weights": True, "rope_scaling": LONGROPE},
    "biases": {"add_bias_linear": True, "position_embedding_type": "learned_absolute"},
    "sinks": {"attention_sinks": True, "add_bias_linear": True, "activation": "clamped_swiglu"},
    "head norms": {"qk_layernorm": "head", "norm_placement": "both", "layernorm_zero_centered_gamma": True},
    "projection norms": {"qk_layernorm": "projection", "norm_placement": "post"},
    "window": {"window_size": (4, 0), "window_attn_skip_freq": 2, "add_qkv_bias": True},
    "experts": {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.1, "ffn_hidden_size": 16},
    "experts with biases": {
        "num_moe_experts": 8,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": 0.1,
        "ffn_hidden_size": 16,
        "add_bias_linear": True,
        "activation": "clamped_swiglu",
    },
}
WHOLE = {
    "odd heads": {
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 6,
        "qk_layernorm": "head",
        "attn_logit_softcapping": 2.0,
    },
    "few heads": {"num_attention_heads": 2, "num_query_groups": 1, "attention_sinks": True, "add_qkv_bias": True},
}
"""Models whose heads are too odd or too few for some meshes."""
DROPS = {"hidden_dropout": 0.1, "num_query_groups": 1, "add_bias_linear": True}
MODELS |= {"adapters": DROPS, "dora": DROPS | {"num_query_groups": 2, "normalization": "LayerNorm"}}
ADAPTERS = {
    "adapters": LoRA(rank=3, alpha=3, dropout=0.2),
    "dora": LoRA(rank=2, alpha=2, dropout=0.2, dora=True, target_modules=["linear_qkv", "linear_proj", "layers.1.*"]),
}
"""The adapters of models that only train these; and which drop what one process drops."""
MESHES: dict[str, dict[str, int]] = {
    "tp=2": {"tp": 2},
    "cp=2": {"cp": 2},
    "tp=4": {"tp": 4},
    "cp=4": {"cp": 4},
    "cp=2 tp=2": {"cp": 2, "tp": 2},
    "dp=2 tp=2": {"dp_shard": 2, "tp": 2},
    "dp=2 cp=2": {"dp_replicate": 2, "cp": 2},
    "fsdp=2 tp=2": {"dp_shard": 2, "tp": 2},
    "fsdp over dp=2x2": {"dp_replicate": 2, "dp_shard": 2},
    "ep=4": {"ep": 4},
    "ep=2 cp=2": {"ep": 2, "cp": 2},
    "ep=2 tp=2": {"ep": 2, "tp": 2},
    "dp=2 ep=2": {"dp_shard": 2, "ep": 2},
    "fsdp over dp=2 ep=2": {"dp_shard": 2, "ep": 2},
    "fsdp over dp=2 cp=2": {"dp_shard": 2, "cp": 2},
    "ring=2": {"cp": 2},
    "ring=4": {"cp": 4},
    "ring=2 tp=2": {"cp": 2, "tp": 2},
    "fsdp over dp=2 ring=2": {"dp_shard": 2, "cp": 2},
    "copies tp=2": {"tp": 2},
    "copies tp=4": {"tp": 4},
    "copies dp=2 tp=2": {"dp_shard": 2, "tp": 2},
}
"""Those with a ring pass keys and values on along "cp"; those with copies read from each other along "tp"."""
PACKED = ("multi-query", "sinks", "window", "experts with biases", "odd heads", "few heads")
"""Models that are trained on documents kept apart."""
TILED = ("multi-query", "sinks", "biases", "projection norms")
"""Models whose feed-forward several processes compute in tiles."""
RECOMPUTED = ("odd heads", "few heads")
"""Models whose layers several processes compute again."""
STEPS = 6
B, T = 4, 16


def compare(model_name: str, mesh_name: str, folder: Path) -> None:
    """Raises AssertionError unless several processes learn what one does."""
    sizes = MESHES[mesh_name]
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    config = TransformerConfig(**(SMALL | {**MODELS, **WHOLE}[model_name]))
    torch.manual_seed(0)
    alone: Any = Transformer(config)
    if model_name in ADAPTERS:
        ADAPTERS[model_name].apply(alone)
    if config.num_moe_experts is None:  # grouped products have no float64
        alone.double()  # in float32 the rounding of these steps alone can come to the limit
    with torch.no_grad():  # what starts at 0 or 1 would hide what is put in the wrong place
        for parameter in alone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
        if model_name == "experts with biases":
            for layer in alone.layers:
                layer.mlp.router.bias[4:] -= 10  # the last ones get no token, nor their processes a row
    before = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    split: Any = copy.deepcopy(alone)
    if model_name in TILED:
        tile_mlp(split, 5)
    if model_name in RECOMPUTED:
        recompute_activations(split, "full")
    if copies := mesh_name.startswith("copies"):
        file_peers.connect(mesh, folder)
    parallelize(split, mesh, "ring" if "ring" in mesh_name else "auto", copies=copies)
    layout = Layout(config, mesh)
    averaged: tuple[str, ...] = ()
    if mesh_name.startswith("fsdp"):
        averaged = tuple(dim for dim in sizes if dim != "tp")
        over = mesh[averaged] if "dp_replicate" in sizes or len(averaged) == 1 else mesh[averaged]._flatten()
        for layer in split.layers:
            if "ep" in sizes:
                fully_shard(layer.mlp.experts, mesh=mesh["dp_shard"])
            fully_shard(layer, mesh=over)
        fully_shard(split, mesh=over)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (alone, split)]
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        batch = random_batch(generator, packed=model_name in PACKED)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (whole,), samples = shares(batch, {}), list(shares(batch, sizes))
        torch.manual_seed(step)
        expected = loss_of(alone, whole)
        expected.backward()
        mine = local_batch(samples[sample_share(mesh)], mesh, split.split.ring)
        torch.manual_seed(step)
        loss = loss_of(split, mine)
        loss.backward()
        reduce_gradients(split, layout, averaged)
        total = loss.detach().clone()
        dist.all_reduce(total)
        close(total / dist.get_world_size(), expected, f"loss of step {step}")
        norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.grad is not None])
        close(global_norm(gradients_of(split.named_parameters()), layout), norm, f"norm of step {step}")
        for optimizer in optimizers:
            optimizer.step()
    for (name, theirs), (_, own) in zip(alone.named_parameters(), split.named_parameters(), strict=True):
        gathered = layout.gather(name, own.detach())
        # What is learned is compared, and not what was there before.
        if theirs.requires_grad:
            close(gathered - before[name], theirs - before[name], name)
        else:
            assert torch.equal(gathered, before[name]), name


def compare_attention(processes: int) -> None:
    """Raises AssertionError unless a ring gives the output and the gradients of attention by one process."""
    cp = Group.of(init_device_mesh("cpu", (processes,), mesh_dim_names=("cp",)), "cp")
    split, length = SequenceSplit(cp, ring=processes), 8 * processes
    torch.manual_seed(0)
    documents = Documents(torch.tensor([0, 3, 3, 4, length, length + 1, 2 * length - 3], dtype=torch.int32), length)
    for heads, groups, D in ((4, 4, 5), (4, 2, 8), (3, 1, 7), (6, 3, 6)):
        for packed, softcap, sinks in ((None, 0.0, None), (documents, 2.0, torch.randn(heads).double())):
            whole = [torch.randn(2, length, n, D, dtype=torch.float64) for n in (heads, groups, groups)]
            own = [split.own(x, dim=1).clone().requires_grad_() for x in whole]
            asked: dict[str, Any] = {"softcap": softcap, "scale": 0.3}
            q, k, v = own
            by_ring = Ring(cp, processes).attend(q, k, v, packed, sinks=_leaf(sinks, own), **asked)
            whole = [x.requires_grad_() for x in whole]
            flat, cu = whole, {}
            if packed:
                flat, cu = [x.flatten(0, 1) for x in whole[:3]], {"cu_seqlens_q": packed[0], "max_seqlen_q": packed[1]}
            by_one = attend(*flat[:3], sinks=_leaf(sinks, whole), backend="reference", **cu, **asked).view(
                whole[0].shape
            )
            gradient = torch.randn_like(by_one)
            found = torch.autograd.grad(by_ring, own, split.own(gradient, dim=1))
            expected = torch.autograd.grad(by_one, whole, gradient)
            close(by_ring, split.own(by_one, dim=1), f"output with {heads}/{groups} heads")
            for name, got, wanted in zip(("q", "k", "v"), found, expected, strict=False):
                close(got, split.own(wanted, dim=1), f"gradient of {name} with {heads}/{groups} heads")
            if sinks is not None:
                dist.all_reduce(found[3])
                close(found[3], expected[3], "gradient of the sinks")


def _leaf(sinks: torch.Tensor | None, leaves: list[torch.Tensor]) -> torch.Tensor | None:
    """A copy of the sinks that asks for a gradient, and is one of the leaves."""
    if sinks is None:
        return None
    leaves.append(sinks.clone().requires_grad_())
    return leaves[-1]


def loss_of(model: Transformer, batch: dict[str, Any]) -> torch.Tensor:
    """The mean cross-entropy over a batch, and what the experts add."""
    logits = model(batch["input_ids"], batch.get("cu_seqlens"), batch.get("max_seqlen"))
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    balance = model.aux_loss()
    return loss if balance is None else loss + balance / batch["labels"].numel()


def random_batch(generator: torch.Generator, *, packed: bool) -> dict[str, Any]:
    """B sequences of T tokens, whose documents end at other places each time."""
    tokens = torch.randint(SMALL["vocab_size"], (B, T + 1), generator=generator)
    batch: dict[str, Any] = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    if packed:
        batch["cuts"] = torch.randint(1, T, (B,), generator=generator)
    return batch


def shares(batch: dict[str, Any], sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The samples of each data-parallel process."""
    number = sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1) * sizes.get("ep", 1)
    for i in range(number):
        share = {name: tensor.chunk(number)[i] for name, tensor in batch.items()}
        if (cuts := share.pop("cuts", None)) is not None:
            starts = torch.arange(len(cuts)) * T
            ends = torch.stack([starts + cuts, starts + T], dim=1).flatten()
            share |= {"cu_seqlens": F.pad(ends, (1, 0)).int(), "max_seqlen": T}
        yield share


def sample_share(mesh: DeviceMesh) -> int:
    """Which of the `shares` this process has."""
    names, number = mesh.mesh_dim_names or (), 0
    for dim in ("dp_replicate", "dp_shard", "ep"):
        if dim in names:
            number = number * mesh.size(names.index(dim)) + mesh.get_local_rank(dim)
    return number


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises AssertionError unless the difference, as a whole, is at most 1e-5 of what is expected."""
    difference = float((actual.detach() - expected.detach()).norm() / expected.detach().norm())
    assert difference <= 1e-5, f"{what}: differs by {difference:.1e}"


def main(rank: int, world_size: int, folder: Path, wanted: list[tuple[str, str]]) -> None:
    """Writes, from the first process, a file with what went wrong for each case; empty if nothing did."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    for number, case in enumerate(wanted):
        said = ""
        try:
            compare(*case, folder) if case[0] != "attention alone" else compare_attention(world_size)
        except Exception:
            said = traceback.format_exc()
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, said)
        if rank == 0:
            (folder / f"{number}.txt").write_text("\n".join(dict.fromkeys(filter(None, every))))
    dist.destroy_process_group()
