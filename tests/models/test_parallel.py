"""A transformer on several processes learns the same as on one."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import start_processes
from torch.testing._internal.distributed.fake_pg import FakeStore

from fiddlehead.attention import BACKENDS, AttentionSpec, watched
from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.collectives import Group
from fiddlehead.models.config import RingStep
from fiddlehead.models.parallel import (
    Layout,
    first_layers,
    layers_of,
    local_batch,
    parallelize,
    rank_of_stage,
    refuse_sizes,
    stage_of,
)
from fiddlehead.models.parallel.shards import shard_of, splits_over
from fiddlehead.models.parallel.stages import HEAD
from fiddlehead.models.ring import Ring
from tests.models import parallel_ranks
from tests.training.ranks import PRELOADED

QUICK = [("sinks", "tp=2"), ("multi-query", "cp=2"), ("experts", "cp=2"), ("adapters", "tp=2"), ("dora", "tp=2")]
QUICK += [("biases", "tp=2"), ("biases", "copies tp=2"), ("adapters", "copies tp=2")]
QUICK += [("odd heads", "ring=2"), ("attention alone", "ring=2")]
THOROUGH = [
    *((model, "cp=2 tp=2") for model in ("grouped", "multi-query", "sinks", "projection norms", "window", "experts")),
    *((model, "tp=4") for model in ("multi-query", "biases", "projection norms")),
    *((model, "copies tp=4") for model in ("multi-query", "projection norms", "dora")),
    *((model, "copies dp=2 tp=2") for model in ("grouped", "window", "experts")),
    *((model, "cp=4") for model in ("multi-query", "sinks")),
    *((model, mesh) for model in ("adapters", "dora") for mesh in ("tp=4", "cp=4", "cp=2 tp=2")),
    *((model, "ring=4") for model in ("multi-query", "multi-head", "odd heads", "experts", "dora")),
    *((model, "ring=2 tp=2") for model in ("grouped", "biases", "projection norms", "experts with biases")),
    ("attention alone", "ring=4"),
    ("few heads", "cp=4"),  # heads exchanged by neighbours, and a ring of two parts
    ("few heads", "fsdp over dp=2 ring=2"),
    ("multi-head", "dp=2 tp=2"),
    ("head norms", "dp=2 cp=2"),
    ("experts with biases", "ep=4"),
    ("experts with biases", "ep=2 cp=2"),
    ("experts", "ep=2 tp=2"),
    ("experts with biases", "fsdp over dp=2 ep=2"),
    *((model, "fsdp=2 tp=2") for model in ("biases", "projection norms")),
    ("sinks", "fsdp over dp=2 cp=2"),
]


def learn(cases: list[tuple[str, str]], folder: Path) -> None:
    """Fails with what differed, if anything, on the processes of a mesh that train each case."""
    (number,) = {math.prod(parallel_ranks.MESHES[mesh].values()) for _, mesh in cases}
    multiprocessing.set_forkserver_preload(PRELOADED)  # in vain if the server runs already, with the same
    start_processes(parallel_ranks.main, (number, folder, cases), nprocs=number, start_method="forkserver")
    wrong = [f"{case}: {said}" for n, case in enumerate(cases) if (said := (folder / f"{n}.txt").read_text())]
    assert not wrong, "\n".join(wrong)


def test_several_processes_learn_what_one_does(tmp_path: Path) -> None:
    learn(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_every_kind_of_model_learns_the_same_on_every_kind_of_mesh(tmp_path: Path) -> None:
    learn(THOROUGH, tmp_path)


@pytest.mark.parametrize("model", parallel_ranks.MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_processes_are_the_whole(model: str, size: int) -> None:
    config = TransformerConfig(**(parallel_ranks.SMALL | parallel_ranks.MODELS[model]))
    with torch.device("meta"):
        transformer = Transformer(config)
        if model in parallel_ranks.ADAPTERS:
            parallel_ranks.ADAPTERS[model].apply(transformer)
        shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
    split = 0
    for name, shape in shapes.items():
        if splits_over(name, config) is None:
            continue
        split += 1
        parts = [part for rank in range(size) if (part := shard_of(name, config, size, rank))]
        covered = sorted(
            {i for part in parts for each in part.ranges for i in range(each.start, each.start + each.size)}
        )
        assert covered == list(range(parts[0].whole)) == list(range(shape[parts[0].dim])), name
        assert len({sum(each.size for each in part.ranges) for part in parts}) == 1, name
    assert split


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        ({}, {"tp": 3}, r"tp=3: must divide num_attention_heads=4 .* allowed: 1, 2, 4$"),
        ({"ffn_hidden_size": 50}, {"tp": 4}, r"tp=4: .*ffn_hidden_size=50.* allowed: 1, 2$"),
        ({"num_attention_heads": 12, "kv_channels": 8, "num_query_groups": 3}, {"tp": 2}, r"allowed: 1, 3, 6, 12$"),
        (
            {},
            {"tp": 2, "cp": 4, "method": "ulysses"},
            r"cp=4: must divide the 2 query heads of a process \(tp=2\), and divide its 1 key/value heads or be a "
            r"multiple of them; context_parallel_method='auto' allows other numbers; allowed: 1, 2$",
        ),
        (
            {"window_size": (4, 0)},
            {"cp": 8},
            r"cp=8: must divide .*; ring attention has no windows .* allowed: 1, 2, 4$",
        ),
        (
            {"attention_dropout": 0.1},
            {"cp": 3},
            r"cp=3: .* ring attention has no attention_dropout=0.1; allowed: 1, 2, 4$",
        ),
        ({"window_size": (4, 0)}, {"cp": 2, "method": "ring"}, r"cp=2: ring .* set context_parallel_method='ulysses'$"),
        ({}, {"ep": 2}, r"ep=2: num_moe_experts=None, there are no experts to split; allowed: 1$"),
        ({"num_moe_experts": 6}, {"ep": 4}, r"ep=4: must divide num_moe_experts=6; allowed: 1, 2, 3, 6$"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse_sizes(TransformerConfig(**(parallel_ranks.SMALL | changes)), **sizes)


def test_a_ring_serves_a_window_as_long_as_the_sequences() -> None:
    refuse_sizes(TransformerConfig(**(parallel_ranks.SMALL | {"window_size": (15, 0)})), cp=8)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The last of four processes, cp=2 tp=2, the others of which are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    dist.destroy_process_group()


def test_a_model_on_the_meta_device_is_split_and_its_parts_are_those_of_the_values(mesh: DeviceMesh) -> None:
    config = TransformerConfig(**parallel_ranks.SMALL)
    full = Transformer(config).state_dict()
    with torch.device("meta"):
        model = Transformer(config)
    parallelize(model, mesh)
    assert model.layers[1].self_attention.linear_qkv.weight.is_meta  # type: ignore[union-attr]
    model.load_state_dict({n: Layout(config, mesh).own(n, x) for n, x in full.items()}, assign=True)
    q, k, v = full["layers.1.self_attention.linear_qkv.weight"].split([32, 16, 16])
    own = model.state_dict()["layers.1.self_attention.linear_qkv.weight"]
    torch.testing.assert_close(own, torch.cat([q[16:], k[8:], v[8:]]), rtol=0, atol=0)
    gate, up = full["layers.0.mlp.linear_fc1.weight"].chunk(2)
    own = model.state_dict()["layers.0.mlp.linear_fc1.weight"]
    torch.testing.assert_close(own, torch.cat([gate[24:], up[24:]]), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("model", ["grouped", "sinks", "window", "projection norms"])
def test_a_rank_asks_of_attention_what_the_configuration_says(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch, model: str, groups: int, gradients: bool, packed: bool
) -> None:
    changes: dict[str, Any] = parallel_ranks.MODELS[model] | {"num_attention_heads": 8, "num_query_groups": groups}
    config = TransformerConfig(**(parallel_ranks.SMALL | changes))
    asked: list[AttentionSpec] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, *rest: Any) -> torch.Tensor:
        assert (q.shape[-2:], k.shape[-2]) == ((spec.num_attention_heads, spec.head_dim), spec.num_query_groups)
        asked.append(spec)
        return torch.zeros_like(q)

    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "run", spy)
    split = Transformer(config)
    parallelize(split, mesh)
    documents = (torch.tensor([0, 5, 16], dtype=torch.int32), 16) if packed else ()
    with watched(lambda *_: None), torch.set_grad_enabled(gradients):  # which forgets the kinds of calls before
        split(torch.zeros(1, 4, dtype=torch.int64), *documents)
    said = [
        config.attention_spec(layer, torch.float32, packed=packed, gradients=gradients, tp=2, cp=2)
        for layer in range(config.num_layers)
    ]
    assert asked == said
    assert (said[0].num_attention_heads, said[0].num_query_groups) == (2, max(groups // 4, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_a_rank_of_a_ring_asks_of_attention_what_the_configuration_says(mesh: DeviceMesh, packed: bool) -> None:
    """The last of four ranks, with two heads: in the ring of two parts, its own comes after the other one's."""
    config = TransformerConfig(**(parallel_ranks.SMALL | parallel_ranks.WHOLE["few heads"]))
    split = Transformer(config)
    parallelize(split, init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)))
    documents = (torch.tensor([0, 5, 16], dtype=torch.int32), 16) if packed else ()
    asked: list[AttentionSpec] = []
    with watched(lambda spec, _: asked.append(spec)):
        split(torch.zeros(1, 4, dtype=torch.int64), *documents)
    steps: tuple[RingStep, ...] = ("own", "earlier")
    said = [config.attention_spec(0, torch.float32, packed=packed, cp=4, ring=2, step=step) for step in steps]
    assert asked == said
    assert [(spec.num_attention_heads, spec.causal, spec.by_passes) for spec in said] == [
        (1, True, True),
        (1, False, True),
    ]


def test_a_ring_s_batch_is_cut_from_the_beginning_and_the_end(mesh: DeviceMesh) -> None:
    whole = torch.arange(8)[None]
    assert local_batch({"input_ids": whole}, mesh, ring=2)["input_ids"].tolist() == [[4, 5]]
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    assert local_batch({"labels": whole}, four, ring=4)["labels"].tolist() == [[3, 4]]
    assert local_batch({"labels": whole}, four, ring=2)["labels"].tolist() == [[4, 5]]
    with pytest.raises(
        ConfigError, match="12 tokens; must be a multiple of 8, for a ring of 4 and cp x tp=4, such as 16"
    ):
        local_batch({"labels": torch.arange(12)[None]}, four, ring=4)


def test_a_batch_is_cut_cp_first(mesh: DeviceMesh) -> None:
    whole = torch.arange(16).view(2, 8)
    batch = {"input_ids": whole, "labels": whole + 1, "index": torch.tensor([5, 6]), "max_seqlen": 8}
    local = local_batch(batch, mesh)
    assert local["input_ids"].tolist() == [[6, 7], [14, 15]]
    assert local["labels"].tolist() == [[7, 8], [15, 16]]
    assert local["index"] is batch["index"]
    assert local["max_seqlen"] == 8
    with pytest.raises(
        ConfigError, match="input_ids: a sequence has 7 tokens; must be a multiple of cp x tp=4, such as 8"
    ):
        local_batch({"input_ids": whole[:, 1:]}, mesh)


def test_what_does_not_go_with_a_split_is_refused(mesh: DeviceMesh) -> None:
    model = Transformer(TransformerConfig(**parallel_ranks.SMALL))
    parallelize(model, mesh)
    with pytest.raises(ConfigError, match="caches: a model whose sequences are split over processes has no caches"):
        model(torch.zeros(1, 4, dtype=torch.int64), caches=[])
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    ring = Ring(Group.of(mesh, "cp"), 2)
    for mixed in ((q, k, k), (q, q, k), (q, k, q)):
        with pytest.raises(ConfigError, match="they must have the same dtype"):
            ring.attend(*mixed, None)


@pytest.mark.parametrize(
    ("vocabulary", "layers", "count", "expected"),
    [
        (8, 16, 2, [8, 8]),  # the output layer takes almost no time
        (8, 7, 4, [2, 2, 2, 1]),
        (128_256, 16, 2, [9, 7]),  # as long as three layers
        (128_256, 16, 4, [4, 5, 5, 2]),
        (128_256, 5, 5, [1, 1, 1, 1, 1]),
        (128_256, 3, 1, [3]),
    ],
)
def test_the_stages_of_a_pipeline_take_about_the_same_time(
    vocabulary: int, layers: int, count: int, expected: list[int]
) -> None:
    """The shape is that of Llama 3.2 1B."""
    shape = {"hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32, "num_query_groups": 8}
    config = TransformerConfig(**shape, num_layers=layers, vocab_size=vocabulary, seq_length=4096)
    assert [len(layers_of(config, number, count)) for number in range(count)] == expected
    first = first_layers(config, count)
    stages = [stage_of(f"transformer.layers.{layer}.mlp.linear_fc1.weight", first) for layer in range(layers)]
    assert stages == [number for number, size in enumerate(expected) for _ in range(size)]
    assert (stage_of("embedding.weight", first), stage_of("output_layer.weight", first)) == (0, count - 1)


@pytest.mark.parametrize(("layers", "count"), [(5, 2), (7, 3), (9, 4)])
@pytest.mark.parametrize("vocabulary", [16, 400, 900, 4000])
def test_no_other_stages_have_a_faster_slowest_one(layers: int, count: int, vocabulary: int) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "seq_length": 128}
    config = TransformerConfig(**shape, num_layers=layers, vocab_size=vocabulary)
    a_token = config.train_flops_per_token(128)
    head = 6 * vocabulary * 64
    of_head = HEAD * head / ((a_token - head) / layers)

    def slowest(sizes: Sequence[int]) -> float:
        return max(*sizes[:-1], sizes[-1] + of_head)

    borders = itertools.combinations(range(1, layers), count - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *cuts, layers))] for cuts in borders]
    found = [len(layers_of(config, number, count)) for number in range(count)]
    assert slowest(found) == pytest.approx(min(map(slowest, ways)))


def test_folded_stages_go_along_the_ranks_and_back() -> None:
    assert [rank_of_stage(stage, 3) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [rank_of_stage(stage, 3, folded=True) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
