"""Low-rank adapters: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), which Hugging Face's PEFT can read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fiddlehead.attention.backends.reference import without_autocast
from fiddlehead.errors import ConfigError, Problem, nearest, refuse
from fiddlehead.models.adapted_linear import adapted_linear
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.collectives import SequenceSplit
from fiddlehead.models.linear import Linear
from fiddlehead.models.nf4 import dequantize, is_quantized, nf4_linear, quantized
from fiddlehead.models.transformer import Transformer
from fiddlehead.numbers import is_number, is_whole

PEFT_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""PEFT's names of an adapter's tensors."""

PEFT_CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False}

Base = Literal["nf4"]
"""How the frozen weights can be stored."""

Parts = Mapping[str, Sequence[tuple[str, int]]]
"""For each linear layer of a model: the Hugging Face modules whose rows it holds, in order, and how many each has."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters for chosen linear layers; all other parameters are frozen."""

    rank: int = 16
    """Megatron's and NeMo's `dim`, PEFT's `r`."""
    alpha: int = 32
    """The change is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on an adapter's input, in training."""
    target_modules: Sequence[str] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Patterns, with * and ?, for a linear layer's name or the last part of it: "linear_qkv", "layers.0.*"."""
    dora: bool = False
    """Weight-decomposed: the length of each row of the weights is learned separately from its direction."""
    quantize_base: Base | None = None
    """Store the frozen weights of the layers' linear products in 4 bits: "nf4" is QLoRA (Dettmers et al. 2023)."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    @property
    def scaling(self) -> float:
        """The factor on the change: alpha / rank."""
        return self.alpha / self.rank

    def apply(self, transformer: Transformer) -> None:
        """Puts an adapter on each matching linear layer, in place, and freezes everything else.

        The model's results do not change. This also works on the meta device: `load_state_dict` with weights without
        adapters, or `reset_adapters`, then initializes the adapters.

        Raises:
            ConfigError: a pattern matches no linear layer of the transformer's layers, or there are adapters already.
        """
        if adapter_state(transformer):
            raise ConfigError(Problem("lora", message="the model has adapters already; merge them first"))
        names = self.adapted(transformer)
        transformer.requires_grad_(False)
        for name in names:
            transformer.set_submodule(name, LoRALinear(cast(nn.Linear, transformer.get_submodule(name)), self))
        transformer.register_load_state_dict_post_hook(_start_adapters)

    def adapted(self, transformer: Transformer) -> list[str]:
        """The linear layers that have or will have an adapter, in the order in which adapters are initialized.

        Raises:
            ConfigError: a pattern matches no linear layer of the transformer's layers.
        """
        # Of the layers: the output layer's forward is never called, so that an adapter would do nothing there.
        linears = [n for n, m in transformer.layers.named_modules(prefix="layers") if isinstance(m, nn.Linear)]
        found = {pattern: [name for name in linears if _matches(pattern, name)] for pattern in self.target_modules}
        refuse(_unmatched(pattern, transformer, linears) for pattern in found if not found[pattern])
        return list(dict.fromkeys(name for names in found.values() for name in names))

    def adapts(self, name: str) -> bool:
        """Whether a linear layer of this name, such as "layers.0.mlp.linear_fc1", gets an adapter."""
        return any(_matches(pattern, name) for pattern in self.target_modules)

    def _problems(self) -> Iterator[Problem]:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                yield Problem(name, value, "must be a whole number of 1 or more")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            yield Problem("dropout", self.dropout, "must be at least 0 and below 1")
        names = self.target_modules
        if not (isinstance(names, list | tuple) and names and all(isinstance(name, str) and name for name in names)):
            yield Problem("target_modules", names, "must be a list of names or patterns, at least one")
        if not isinstance(self.dora, bool):
            yield Problem("dora", self.dora, "must be True or False")
        if self.quantize_base not in (None, *get_args(Base)):
            yield Problem("quantize_base", self.quantize_base, "", (*get_args(Base), None))


class LoRALinear(Linear):
    """A linear layer with an adapter: y = x W'^T + bias, where W' = W + scaling x lora_b lora_a.

    With DoRA, each row of W' is scaled to the length in `magnitude`. `weight` and `bias` are those of the replaced
    layer; its weight may be in NF4. `lora_a` is (rank, in), `lora_b` (out, rank), `magnitude` (out,) or None. These
    three are float32 or wider for all dtypes of the weights, because bfloat16 would lose small steps.
    """

    joined = True
    """Whether one function has the products of the layer and of its adapter, as `adapted_linear`. Not where processes
    share the layer, nor in a pipeline, whose schedules part the gradients of the adapter from those of the input."""

    def __init__(self, linear: nn.Linear, lora: LoRA) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora, self.fan_in = lora, linear.in_features
        self.enabled = True
        """Whether the adapter is active."""
        self.split = SequenceSplit()  # `parallelize` says which part of each sequence this process has
        self.magnitude: nn.Parameter | None = None
        self._allocate()
        self.reset_adapter()
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype that the layer without the adapter would return."""
        # The adapter's two matrices are small and its input is large, so the matrices are scaled and cast to the
        # products' dtype. Their gradients are accumulated in their own dtype.
        x = input.to(product_dtype(input))
        a, b = self.factors
        drops = self.training and self.lora.dropout > 0
        frozen = not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))
        if self.joined and self.magnitude is None and not drops and frozen:
            return adapted_linear(x, self.weight, self.bias, a, b)
        base = self._product(x, self.bias)
        if not self.enabled:
            return base
        dropped = self._dropout(x)
        change = self._change(dropped, a.to(x.dtype), b.to(x.dtype))
        if self.magnitude is None:
            return base + change
        # As in PEFT, dropout applies to the input of what DoRA adds, and not to that of the layer itself.
        if drops:
            plain = self._product(dropped, None)
        else:
            plain = base if self.bias is None else base - self.bias
        with torch.no_grad():  # the rows' lengths count as constants (section 4.3 of the paper)
            changed = _changed(self._full_weight(), self.lora_a, self.lora_b, self.lora.scaling)
            length = self._lengths(changed)
        factor = self.magnitude / length
        return (base + (factor - 1) * plain + factor * change).to(base.dtype)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """`lora_a` and the scaled `lora_b`, which is 0 if the adapter is not active.

        So the same kernels compute the layer with and without it, and round alike.
        """
        return self.lora_a, self.lora_b * (self.lora.scaling if self.enabled else 0.0)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Resets the adapter to no change of the layer; `weight` must have its values.

        `lora_a` is drawn as PEFT does, `lora_b` is 0, `magnitude` is the length of each row of `weight`.
        """
        if self.lora_a.device != self.weight.device:
            self._allocate()
        # As `nn.init.kaiming_uniform_`, which would take the width of a process's part for that of the layer.
        bound = math.sqrt(3) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(self.fan_in))
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)
        if self.magnitude is not None:
            self.magnitude.copy_(self._lengths(self._full_weight(), self.magnitude.dtype))

    def _full_weight(self) -> Tensor:
        """The weight without its adapter, (out, in)."""
        if not is_quantized(self.weight):
            return self.weight
        # FSDP2 cuts bits anywhere, so they have to be gathered.
        bits = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        return dequantize(bits, (self.out_features, self.in_features), torch.float32)

    # What `parallelize` replaces where processes share the layer.

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without its adapter."""
        if is_quantized(self.weight):
            return nf4_linear(x, self.weight, bias, self.out_features)
        return F.linear(x, self.weight, bias)

    def _change(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)

    def _dropout(self, x: Tensor) -> Tensor:
        return self.split.dropout(x, self.lora.dropout, self.training)

    def _lengths(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The length of each row of a weight like the layer's."""
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype)

    def _allocate(self) -> None:
        options: Any = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_a = nn.Parameter(torch.empty(self.lora.rank, self.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, self.lora.rank, **options))
        if self.lora.dora:
            self.magnitude = nn.Parameter(torch.empty(self.out_features, **options))


def reset_adapters(transformer: nn.Module) -> None:
    """Resets all adapters; needed if `load_state_dict` did not set the model's weights."""
    for module in transformer.modules():
        if isinstance(module, LoRALinear):
            module.reset_adapter()


@contextmanager
def without_adapters(transformer: nn.Module) -> Iterator[None]:
    """In the block, the model computes without its adapters and without dropout."""
    layers = [module for module in transformer.modules() if isinstance(module, LoRALinear)]
    training = transformer.training
    try:
        for layer in layers:
            layer.enabled = False
        transformer.eval()
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        transformer.train(training)


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Only the adapters' tensors, under their names in the `state_dict`; they share the model's memory."""
    return {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in transformer.named_modules()
        if isinstance(module, LoRALinear)
        for part in PEFT_NAMES
        if getattr(module, part) is not None
    }


@torch.no_grad()
def load_adapter_state(transformer: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copies the result of `adapter_state` into a model with the same adapters.

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape; the model is then unchanged.
    """
    own = adapter_state(transformer)
    ours, theirs = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, state))
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if different:
        what = "{}: is {} among the adapters, and {} in the model"
        raise ConfigError(*(what.format(n, theirs.get(n, "missing"), ours.get(n, "missing")) for n in different))
    for name, tensor in own.items():
        tensor.copy_(state[name])


@torch.no_grad()
def merge(transformer: Transformer) -> None:
    """Folds the adapters into the weights, in place. The model then has no adapters and nothing frozen.

    Raises:
        ConfigError: the weights are in NF4; `merge_state` merges the adapters into the original ones.
    """
    if quantized(transformer):
        message = "the model's weights are rounded to 4 bits; load the run's checkpoint, which has them merged"
        raise ConfigError(Problem("lora.quantize_base", "nf4", message))
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, LoRALinear):
            linear = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            weight = _merged(layer.weight, layer.lora_a, layer.lora_b, layer.magnitude, layer.lora.scaling)
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            transformer.set_submodule(name, linear.train(layer.training))
    transformer.requires_grad_(True)


@torch.no_grad()
def merge_state(state: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """The `state_dict` that a model with adapters would have after `merge`."""
    merged = dict(state)
    for module in [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]:
        a, b = merged.pop(f"{module}.lora_a"), merged.pop(f"{module}.lora_b")
        magnitude = merged.pop(f"{module}.magnitude", None)
        merged[f"{module}.weight"] = _merged(merged[f"{module}.weight"], a, b, magnitude, lora.scaling)
    return merged


def to_peft(
    adapters: Mapping[str, Tensor], parts: Parts, lora: LoRA, base_model_name_or_path: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same adapters as PEFT stores them: its tensors by name, and its adapter_config.json.

    If a layer holds the rows of several Hugging Face layers, each of these gets the whole `lora_a` and its own rows of
    the other tensors. The result is the same, also for DoRA, which works row by row.

    Args:
        adapters: what `adapter_state` returned.
        parts: all linear layers of the transformer's layers, also those without adapters: a short name in PEFT's
            `target_modules` must not match these.
        base_model_name_or_path: the model on Hugging Face's hub, or a folder, that the adapters belong to.

    Raises:
        ConfigError: `parts` lacks a layer, or its rows do not add up.
    """
    problems: list[Problem] = []
    tensors: dict[str, Tensor] = {}
    adapted: set[str] = set()
    for name, tensor in adapters.items():
        layer, _, part = name.rpartition(".")
        if part == "lora_b" and sum(rows for _, rows in parts.get(layer, ())) != len(tensor):
            problems.append(
                Problem("parts", message=f"{layer} has {len(tensor)} rows, and its parts are {parts.get(layer)}")
            )
        start = 0
        for module, rows in parts.get(layer, ()):
            own = tensor if part == "lora_a" else tensor[start : start + rows]
            # A copy: safetensors refuses tensors that share memory.
            tensors[f"base_model.model.{module}.{PEFT_NAMES[part]}"] = own.clone()
            adapted.add(module)
            start += rows
    refuse(problems)
    config = PEFT_CONFIG | {
        "base_model_name_or_path": base_model_name_or_path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(adapted, parts),
        "use_dora": lora.dora,
    }
    return tensors, config


def save_peft(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes what `to_peft` returned to a folder that PEFT's `from_pretrained` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _start_adapters(transformer: nn.Module, keys: Any) -> None:
    """Runs after `load_state_dict`: accepts a state without adapters, as of the base model."""
    absent = [key for key in keys.missing_keys if key.rpartition(".")[2] in PEFT_NAMES]
    if len(keys.missing_keys) == len(absent) == len(adapter_state(transformer)):
        reset_adapters(transformer)
        keys.missing_keys.clear()


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _unmatched(pattern: str, transformer: Transformer, linears: list[str]) -> Problem:
    allowed = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for name, module in transformer.named_modules():
        if _matches(pattern, name) and next(module.parameters(recurse=False), None) is not None:
            message = f"{pattern!r} is {name}, a {type(module).__name__}, which takes no adapter"
            return Problem("target_modules", message=message, allowed=allowed)
    close = "." in pattern and nearest(pattern, linears)
    return Problem.unknown("target_modules", pattern, "linear layer", linears if close else allowed)


def _target_modules(adapted: set[str], parts: Parts) -> list[str]:
    """The last part of each module's name, if all modules with that last part have adapters; else its whole name."""
    others = {module for group in parts.values() for module, _ in group} - adapted
    taken = {module.rpartition(".")[2] for module in others}
    return sorted({module if (last := module.rpartition(".")[2]) in taken else last for module in adapted})


def _changed(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling x B A, in float32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scaling)


def _merged(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    changed = _changed(weight, a, b, scaling)
    if magnitude is not None:
        changed *= (magnitude.to(changed.dtype) / torch.linalg.vector_norm(changed, dim=1))[:, None]
    return changed.to(weight.dtype)
