"""The strategy for many devices: data, tensor, context, expert and pipeline parallelism."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from fiddlehead.checkpoints import sharding
from fiddlehead.checkpoints.safetensors_files import DTYPES, StoredTensor
from fiddlehead.checkpoints.sharding import ShardedTensor
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models import Transformer, TransformerConfig, peer_copies
from fiddlehead.models.autocast import compute_dtype
from fiddlehead.models.parallel import (
    ContextMethod,
    Layout,
    length_divisor,
    local_batch,
    parallelize,
    reduce_gradients,
    refuse_sizes,
    ring_size,
)
from fiddlehead.numbers import is_whole
from fiddlehead.run.team import Team
from fiddlehead.training.distributed.pipeline import FOLDED, Pipeline, Schedule, refuse_pipeline
from fiddlehead.training.distributed.sizes import MESH, Sizes
from fiddlehead.training.optim import Optim
from fiddlehead.training.optim.offloaded import Offloaded


class Parallel(ModelParallelStrategy):
    """Trains on many devices, each with a shard of the parameters, gradients and optimizer state (FSDP2).

    Ranks are numbered in the order of `MESH`, so ranks that share layers are neighbours. With one device, training is
    the same as without a strategy. Devices that only share layers do not need FSDP2, and train as one device does.

    Args:
        data_parallel: the number of ranks, or groups of ranks, with different samples; None means what the devices
            allow.
        data_parallel_replicate: the number of replicas of the model among these (HSDP). Each is sharded over
            `data_parallel / data_parallel_replicate` ranks, which should be connected by a fast network.
        tensor_parallel: the number of ranks that share each layer and, between its matrix products, each sequence.
        context_parallel: the number of ranks that share each sequence.
        context_parallel_method: how these share attention: "ulysses" exchanges tokens for heads, "ring" passes keys and
            values on; "auto" is "ulysses" where the heads allow it, or both.
        expert_parallel: the number of data-parallel ranks that share the experts of a mixture; tokens travel to them.
        pipeline_parallel: the number of ranks, or groups of ranks, with different layers; they pass micro-batches on.
        pipeline_stages_per_rank: the number of stages on each of these; with more stages, ranks wait less for each
            other and communicate more.
        pipeline_schedule: in which order they compute micro-batches; see `Schedule`.
        tensor_parallel_overlap: ranks that share layers copy from the memories of each other's GPUs while they compute,
            if these can and unless `activation_checkpointing` is a number; otherwise NCCL's kernels communicate.
        reshard_after_forward: free a layer's gathered parameters after its forward pass, and gather them again for the
            backward pass. If False, a step communicates a third less, but needs memory for all parameters. A pipeline
            always keeps them.
    """

    def __init__(
        self,
        data_parallel: int | None = None,
        data_parallel_replicate: int = 1,
        tensor_parallel: int = 1,
        context_parallel: int = 1,
        expert_parallel: int = 1,
        pipeline_parallel: int = 1,
        pipeline_stages_per_rank: int = 1,
        reshard_after_forward: bool = True,
        context_parallel_method: ContextMethod = "auto",
        pipeline_schedule: Schedule = "1F1B",
        tensor_parallel_overlap: bool = True,
    ) -> None:
        given = {
            "data_parallel": data_parallel,
            "data_parallel_replicate": data_parallel_replicate,
            "tensor_parallel": tensor_parallel,
            "context_parallel": context_parallel,
            "expert_parallel": expert_parallel,
            "pipeline_parallel": pipeline_parallel,
            "pipeline_stages_per_rank": pipeline_stages_per_rank,
        }
        problems = [
            Problem(name, value, "must be a whole number of 1 or more")
            for name, value in given.items()
            if not (is_whole(value) and value >= 1) and not (name == "data_parallel" and value is None)
        ]
        if context_parallel_method not in (methods := get_args(ContextMethod)):
            problems.append(Problem.unknown("context_parallel_method", context_parallel_method, "method", methods))
        if pipeline_schedule not in (schedules := get_args(Schedule)):
            problems.append(Problem.unknown("pipeline_schedule", pipeline_schedule, "schedule", schedules))
        if not isinstance(tensor_parallel_overlap, bool):
            problems.append(Problem("tensor_parallel_overlap", tensor_parallel_overlap, "must be True or False"))
        refuse(problems)
        super().__init__()
        self.data_parallel, self.data_parallel_replicate = data_parallel, data_parallel_replicate
        self.tensor_parallel, self.context_parallel = tensor_parallel, context_parallel
        self.tensor_parallel_overlap = tensor_parallel_overlap
        self.context_parallel_method: ContextMethod = context_parallel_method
        self.expert_parallel, self.pipeline_parallel = expert_parallel, pipeline_parallel
        self.pipeline_stages_per_rank = pipeline_stages_per_rank
        self.pipeline_schedule: Schedule = pipeline_schedule
        self.reshard_after_forward = reshard_after_forward
        self.layout: Layout | None = None
        """The places of this rank's shards of the parameters; None if it has whole parameters."""
        self.pipeline: Pipeline | None = None
        """This rank's stages; None if it has all layers."""
        self._team: Team | None = None

    def sizes(self, devices: int) -> Sizes:
        """The number of ranks along each dimension, for `devices` in all.

        Raises:
            ConfigError: the product of the sizes is not `devices`.
        """
        fields = ("tensor_parallel", "context_parallel", "pipeline_parallel")
        shared = math.prod(getattr(self, field) for field in fields)
        if devices % shared:
            message = f"does not divide the {devices} devices; allowed products: {_listed(_divisors(devices))}"
            raise ConfigError(self._product(fields, message))
        data = devices // shared
        problems = []
        if self.data_parallel not in (None, data):
            sizes = _listed(f"{field}={getattr(self, field)}" for field in fields)
            message = f"{devices} devices with {sizes} make it {data}"
            problems.append(Problem("data_parallel", self.data_parallel, message, (data, None)))
        copy, name = data, "data-parallel ranks"
        for field in ("data_parallel_replicate", "expert_parallel"):
            value = getattr(self, field)
            if copy % value:
                problems.append(Problem(field, value, f"does not divide the {copy} {name}", _divisors(copy)))
                break
            copy, name = copy // value, "data-parallel ranks of each copy"
        refuse(problems)
        return Sizes(
            data,
            self.data_parallel_replicate,
            self.expert_parallel,
            self.context_parallel,
            self.tensor_parallel,
            self.pipeline_parallel,
            self.pipeline_parallel * self.pipeline_stages_per_rank,
            self.folded,
        )

    def problems(self, config: TransformerConfig, seq_length: int, micro_batches: int | None = None) -> list[Problem]:
        """The reasons why the model, the sequence length or the number of micro-batches cannot be split."""
        pipeline = self.pipeline_parallel, self.pipeline_stages_per_rank, micro_batches, self.pipeline_schedule
        problems = refuse_pipeline(config, *pipeline)
        tp, cp = self.tensor_parallel, self.context_parallel
        try:
            refuse_sizes(config, tp=tp, cp=cp, ep=self.expert_parallel, method=self.context_parallel_method)
        except ConfigError as error:
            names = {"tp": "tensor_parallel", "cp": "context_parallel", "ep": "expert_parallel"}
            problems += [Problem(names[each.path], each.given, each.message, each.allowed) for each in error.problems]
        if seq_length % (tp * cp):
            message = f"does not divide data.seq_length={seq_length}"
            problems.append(self._product(("tensor_parallel", "context_parallel"), message))
        elif not problems and seq_length % (divisor := length_divisor(cp, tp, self.ring_size(config))):
            message = f"ring attention needs data.seq_length={seq_length} to be a multiple of {divisor}"
            problems.append(Problem("context_parallel", cp, message))
        return problems

    @property
    def folded(self) -> bool:
        """Whether the stages of a pipeline go along the ranks and back, as `Sizes` has it."""
        return self.pipeline_schedule in FOLDED

    def ring_size(self, config: TransformerConfig) -> int:
        """The number of parts of a sequence whose keys and values go round between ranks; 1: there is no ring."""
        return ring_size(config, self.tensor_parallel, self.context_parallel, self.context_parallel_method)

    def _product(self, fields: Sequence[str], message: str) -> Problem:
        """A problem of the product of these sizes; it names those above 1."""
        first, *others = [field for field in fields if getattr(self, field) > 1]
        times = "".join(f"times {field}={getattr(self, field)} " for field in others)
        return Problem(first, getattr(self, first), f"{times}{message}")

    # -- the model

    def keep_stages(self, transformer: Transformer) -> None:
        """In a pipeline, reduces a model on the meta device to this rank's layers."""
        if self.pipeline_parallel > 1:
            dtype = compute_dtype(str(self.precision_plugin.precision))
            stages, schedule = self.pipeline_stages_per_rank, self.pipeline_schedule
            self.pipeline = Pipeline(transformer, self.device_mesh, stages, dtype, schedule)

    def shard(self, transformer: Transformer) -> Layout:
        """Shards a model on the meta device over the mesh, in place; `checkpoints.sharding` fills it later.

        Ranks that share a sequence have the same parameters, so parameters are sharded over them too. The same holds
        for ranks with different experts, except for the experts themselves. Where ranks only share layers, their parts
        of the layers are not sharded: see `Sizes.fsdp`.
        """
        mesh, precision = self.device_mesh[MESH[1:]], str(self.precision_plugin.precision)
        parallelize(transformer, mesh, self.context_parallel_method, copies=self._connects(transformer, mesh))
        twice = () if self.pipeline is None else self.pipeline.tied
        self.layout = Layout(transformer.config, mesh, twice)
        if not self.sizes(self.world_size).fsdp:
            transformer.to_empty(device=self.root_device)
            return self.layout
        everyone, experts = (
            self.device_mesh[dims]._flatten("_".join(dims)) for dims in (("dp_shard", "ep", "cp"), ("dp_shard", "cp"))
        )
        if self.data_parallel_replicate > 1:
            everyone, experts = (self.device_mesh["dp_replicate", name] for name in ("dp_shard_ep_cp", "dp_shard_cp"))
        # The ranks of a pipeline keep gathered layers for a whole step: micro-batches go forward and back in turns.
        reshards = self.reshard_after_forward and self.pipeline is None
        for module in [transformer] if self.pipeline is None else self.pipeline.stages:
            sharding.shard(
                module,
                everyone,
                everyone if self.expert_parallel == 1 else experts,
                self.root_device,
                precision,
                reshard_after_forward=reshards,
            )
        return self.layout

    def _connects(self, transformer: Transformer, mesh: DeviceMesh) -> bool:
        """Whether the ranks that share layers copy from each other's memories; all ranks call it together."""
        if self.tensor_parallel == 1 or not self.tensor_parallel_overlap or self.root_device.type != "cuda":
            return False
        # A compiler with a budget takes operators that it does not know for free, and would compute them all again.
        if transformer.activation_memory_budget is not None:
            return False
        why_not = peer_copies.connect(mesh.get_group("tp"), self.root_device)
        if why_not is not None and mesh.get_local_rank("tp") == 0:
            warnings.warn(f"NCCL communicates for tensor_parallel, and slows computation down: {why_not}", stacklevel=2)
        return why_not is None

    def backward(self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
        """The backward pass of a tensor-parallel rank's part of the loss; of the parts, gradients are added up.

        To divide the loss costs nothing, and to divide all gradients later reads and writes them. A pipeline has
        losses of its own.
        """
        loss = closure_loss if self.tensor_parallel == 1 else closure_loss / self.tensor_parallel
        return super().backward(loss, optimizer, *args, **kwargs)

    def reduce_gradients(self) -> None:
        """Completes the gradients of a step, which FSDP2 has averaged only over its own dimensions."""
        module: Any = self.lightning_module
        if self.layout is not None and self.tensor_parallel * self.expert_parallel > 1:
            averaged = [dim for dim in MESH if dim != "tp"]
            reduce_gradients(module, self.layout, averaged, divided=() if self.pipeline is not None else ("tp",))
        if self.pipeline is not None:
            self.pipeline.sum_tied_gradients()

    def own_tokens(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """This rank's part of a batch that it shares with other ranks."""
        if self.world_size == 1:
            return batch
        module: Any = self.lightning_module
        return local_batch(batch, self.device_mesh, module.transformer.split.ring)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Makes tensors on the device, as other strategies do, so random numbers are the same."""
        with self.root_device, self.precision_plugin.tensor_init_context():
            yield

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulates the gradients of micro-batches before replicas of the model exchange them."""
        module: Any = self.lightning_module
        sharded = [m for m in module.children() if sharding.is_sharded(m)]
        for transformer in sharded:
            transformer.set_requires_all_reduce(False)
        yield
        for transformer in sharded:
            transformer.set_requires_all_reduce(True)

    # -- the ranks

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The data-parallel rank, and the number of such ranks."""
        sizes = self.sizes(self.world_size)
        return {"num_replicas": sizes.data, "rank": sizes.data_rank(self.global_rank)}

    def join_ranks(self) -> Team:
        """Connects the processes and returns them as a team. All processes must call it.

        If this process starts the others later, when training begins, the team is this process alone.
        """
        assert self.cluster_environment is not None
        if self.world_size == 1 or not self.cluster_environment.creates_processes_externally:
            return Team()
        if self._team is None:
            self._setup_distributed()
            self._team = Team.of_all_ranks()
        return self._team

    def setup_environment(self) -> None:
        """Connects the processes and makes the device mesh."""
        assert self.lightning_module is not None and self.accelerator is not None
        if self.world_size == 1:
            self.accelerator.setup_device(self.root_device)
            return
        self._setup_distributed()
        self._device_mesh = init_device_mesh(
            self.root_device.type, self.sizes(self.world_size).mesh, mesh_dim_names=MESH
        )
        self.lightning_module._device_mesh = self._device_mesh
        io: Any = self.checkpoint_io
        io.team = self._team = self._team or Team.of_all_ranks()
        io.pipeline_ranks = self.pipeline_parallel
        if isinstance(self.precision_plugin, MixedPrecision) and self.sizes(self.world_size).fsdp:
            self.precision_plugin = _CastByShards("bf16-mixed", self.root_device.type)

    def _configure_launcher(self) -> None:
        # A notebook may build a trainer for processes elsewhere; the launcher would refuse.
        if not _IS_INTERACTIVE:
            super()._configure_launcher()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """As in Lightning, but also for a single process."""
        return decision if self.world_size == 1 else super().reduce_boolean_decision(decision, all)

    # -- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's tensors; this rank holds a shard of each, or nothing if another stage has it."""
        state = Strategy.lightning_module_state_dict(self)
        if (layout := self.layout) is None:
            return state
        own = {name: self._sharded(name, tensor, layout) for name, tensor in state.items()}
        return own if self.pipeline is None else self.pipeline.completed(own)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's tensors; this rank holds a shard of each."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        if (layout := self.layout) is None:
            return state
        parameters = self._parameters_of(optimizer)

        def sharded(number: int, value: Any) -> Any:
            name, parameter = parameters[number]
            like_it = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            return self._sharded(name, value, layout) if like_it else value

        of_parameters = {
            number: {key: sharded(number, value) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        state |= {"state": of_parameters}
        if self.pipeline is None:
            return state
        return self.pipeline.complete_state(state, [name for name, _ in parameters], self._optim, self.layout)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves with all ranks together."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a verified checkpoint; tensors stay in their files if ranks read only shards of them."""
        if self.world_size == 1:
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        io: Any = self.checkpoint_io
        return io.open_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Reads this rank's shard of each tensor."""
        if self.world_size == 1:
            return Strategy.load_model_state_dict(self, checkpoint, strict)
        stored, own = checkpoint["state_dict"], self.lightning_module_state_dict()
        assert stored.keys() == own.keys(), "a checkpoint of another model"
        for name, tensor in own.items():
            # What is not in a file is here already: what adapters were trained on.
            if tensor.is_here and isinstance(stored[name], StoredTensor):
                sharding.read(name, tensor.local, stored[name], tensor.layout)
        return None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Reads this rank's shard of each tensor. The numbers of parameters do not depend on the number of ranks."""
        if (layout := self.layout) is None:
            return Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = self._parameters_of(optimizer)
            if self.pipeline is not None:
                saved = self.pipeline.own_state(saved, [name for name, _ in parameters], self._optim)
            device = torch.device("cpu") if isinstance(optimizer, Offloaded) else None
            state = {
                number: {key: _own_shard(parameters[number], value, layout, device) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        return None

    def _sharded(self, name: str, tensor: torch.Tensor, layout: Layout) -> ShardedTensor:
        return ShardedTensor(name, tensor, layout, 0 if self.pipeline is None else self.pipeline.holder(name))

    def _parameters_of(self, optimizer: Optimizer) -> list[tuple[str, torch.Tensor]]:
        """The optimizer's parameters and their names, in the order of their numbers."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def _optim(self) -> Optim:
        """The settings that number the parameters."""
        module: Any = self.lightning_module
        return module.optim


class _CastByShards(MixedPrecision):
    """Mixed precision without autocast, because layers are gathered in bfloat16 already."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


def _own_shard(named: tuple[str, torch.Tensor], stored: Any, layout: Layout, device: torch.device | None = None) -> Any:
    """This rank's part of an optimizer's value: a tensor of the parameter's shape is sharded like it.

    Args:
        device: where such a tensor is to be; None: where the parameter is.
    """
    name, parameter = named
    if isinstance(stored, dict):
        return {key: value.load() if isinstance(value, StoredTensor) else value for key, value in stored.items()}
    if not isinstance(stored, StoredTensor):
        return stored
    if stored.shape != layout.shape(name, parameter):
        return stored.load()
    tensor = torch.empty_like(parameter, dtype=DTYPES[stored.dtype], device=device, requires_grad=False)
    sharding.read(name, tensor, stored, layout)
    return tensor


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
