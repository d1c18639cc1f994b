"""Finds our parameters among the tensors of Megatron-core's `GPTModel`, and changes their layout.

Megatron stacks the tensors of equal layers, (layers, ...), or has `layers.N.` in their names. It stacks experts too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fiddlehead.checkpoints.nemo.distributed import DistributedTensor
from fiddlehead.errors import ConfigError, Problem, first_of, nearest, refuse
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.meta import shapes_only
from fiddlehead.models.transformer import Transformer
from fiddlehead.numbers import is_whole

Shape = tuple[int, ...]
Change = Callable[[torch.Tensor], torch.Tensor]

EMBEDDING = "embedding.word_embeddings.weight"
_IGNORED = ("_extra_state", "rotary_pos_emb", "core_attention")
_NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state_machine", "opt_param_scheduler", "chained_")
_WHOLE = {
    "embedding.weight": (EMBEDDING,),
    "position_embedding.weight": ("embedding.position_embeddings.weight",),
    "final_layernorm.": ("decoder.final_layernorm.", "decoder.final_norm."),
    "output_layer.weight": ("output_layer.weight",),
}
"""The beginnings of our names outside the layers, and of theirs."""
_IN_LAYER = {
    "input_layernorm.": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "self_attention.linear_qkv.": ("self_attention.linear_qkv.",),
    "self_attention.linear_proj.": ("self_attention.linear_proj.",),
    "self_attention.q_layernorm.": ("self_attention.q_layernorm.",),
    "self_attention.k_layernorm.": ("self_attention.k_layernorm.",),
    "post_attention_layernorm.": ("self_attention.linear_proj.post_layernorm.", "post_self_attn_layernorm."),
    "pre_mlp_layernorm.": ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    "post_mlp_layernorm.": ("mlp.linear_fc2.post_layernorm.", "post_mlp_layernorm."),
    "mlp.router.": ("mlp.router.",),
    "mlp.linear_fc1.": ("mlp.linear_fc1.",),
    "mlp.linear_fc2.": ("mlp.linear_fc2.",),
    "mlp.experts.linear_fc1.": ("mlp.experts.experts.linear_fc1.", "mlp.experts.linear_fc1."),
    "mlp.experts.linear_fc2.": ("mlp.experts.experts.linear_fc2.", "mlp.experts.linear_fc2."),
}
_ONE_EXPERT = ("mlp.experts.local_experts.#.{}", "mlp.experts.experts.#.{}")
_LAYERS = "decoder.layers."
_MOST_LAYERS, _MOST_EXPERTS = 4096, 65_536


@dataclass(frozen=True)
class Part:
    """A part of a tensor: what is at these indices of its first dimensions."""

    tensor: DistributedTensor
    leading: Shape

    @property
    def shape(self) -> Shape:
        return self.tensor.shape[len(self.leading) :]

    def load(self) -> torch.Tensor:
        return self.tensor.load(self.leading)


@dataclass(frozen=True)
class MappedTensor:
    """One of our parameters, and the parts of Megatron's tensors that hold its numbers."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    stacked: bool
    """Whether the parts are experts, one after another; else rows."""
    change: Change
    """Their layout into ours."""

    @property
    def dtype(self) -> str:
        """Its dtype here, a key of `safetensors_files.DTYPES`."""
        stored = self.parts[0].tensor.dtype
        # 1 + weight has more digits than a weight of 16 bits near 0.
        return "F32" if self.change is _one_more and stored in ("BF16", "F16") else stored

    def load(self) -> torch.Tensor:
        """Our parameter; only its parts are in memory."""
        loaded = [part.load() for part in self.parts]
        if self.stacked:
            return self.change(torch.stack(loaded)).contiguous()
        return self.change(torch.cat(loaded) if len(loaded) > 1 else loaded[0]).contiguous()


class MegatronTensors:
    """The weights of a checkpoint by Megatron's names, without what is before them, such as `module.`.

    Raises:
        ConfigError: the checkpoint has no weights of a `GPTModel`.
    """

    def __init__(self, where: Any, tensors: Mapping[str, DistributedTensor]) -> None:
        self.where = where
        found = [name for name in tensors if name.endswith(EMBEDDING) and not name.startswith(_NOT_WEIGHTS)]
        if not found:
            message = f"has no {EMBEDDING}, so it is not a GPTModel of Megatron-core; it has {len(tensors)} tensors"
            raise ConfigError(Problem.in_file(where, message))
        prefix = min(found, key=len).removesuffix(EMBEDDING)
        self.tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and not any(part in name for part in _IGNORED)
            and not name.startswith(_NOT_WEIGHTS)
        }  # fmt: skip
        if adapters := [name for name in self.tensors if ".adapter." in name or "lora" in name.lower()]:
            message = f"has adapters ({adapters[0]}); merge them with NeMo's llm.peft.merge_lora first"
            raise ConfigError(Problem.in_file(where, message))
        if len(self.tensors[EMBEDDING].shape) != 2:
            raise ConfigError(Problem.in_file(where, f"{EMBEDDING} is {list(self.tensors[EMBEDDING].shape)}"))

    @property
    def hidden_size(self) -> int:
        """Channels of the model."""
        return self.tensors[EMBEDDING].shape[1]

    @property
    def longest(self) -> int:
        """The longest side of any tensor."""
        return max((side for tensor in self.tensors.values() for side in tensor.shape), default=0)

    def layer(self, name: str, number: int = 0) -> Part | None:
        """A tensor of one layer; None if there is none."""
        stacked, single = self.tensors.get(_LAYERS + name), self.tensors.get(f"{_LAYERS}{number}.{name}")
        if single is not None:
            return Part(single, ())
        return Part(stacked, (number,)) if stacked is not None and 0 <= number < (stacked.shape or (0,))[0] else None

    def shapes(self) -> dict[str, Any]:
        """Fields of `TransformerConfig` that the tensors show.

        Raises:
            ConfigError: it has more layers or experts than any model.
        """
        ours: dict[str, Any] = {"vocab_size": self.tensors[EMBEDDING].shape[0], "hidden_size": self.hidden_size}
        numbers = {int(each) for name in self.tensors for each in re.findall(r"^decoder\.layers\.(\d{1,6})\.", name)}
        stacked = self.tensors.get(f"{_LAYERS}self_attention.linear_proj.weight")
        ours["num_layers"] = stacked.shape[0] if stacked is not None else max(numbers, default=-1) + 1
        if router := self.layer("mlp.router.weight"):
            ours["num_moe_experts"] = router.shape[0] if router.shape else 0
        if not ours["num_layers"] <= _MOST_LAYERS or not ours.get("num_moe_experts", 0) <= _MOST_EXPERTS:
            raise ConfigError(Problem.in_file(self.where, f"has {ours['num_layers']:,} layers, or too many experts"))
        ours["share_embeddings_and_output_weights"] = "output_layer.weight" not in self.tensors
        ours["add_bias_linear"] = self.layer("self_attention.linear_proj.bias") is not None
        ours["add_qkv_bias"] = self.layer("self_attention.linear_qkv.bias") is not None
        if "decoder.final_layernorm.bias" in self.tensors:
            ours["normalization"] = "LayerNorm"
        if any(self.layer(f"{name}weight") for name in _IN_LAYER["post_attention_layernorm."]):
            ours["norm_placement"] = "both"
        return ours

    def head_shapes(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that the tensors show once the number of heads is known."""
        heads = ours["num_attention_heads"]
        proj, qkv = (self.layer(f"self_attention.linear_{name}.weight") for name in ("proj", "qkv"))
        names = (*_theirs("mlp.linear_fc2.weight", _IN_LAYER), *_theirs("mlp.experts.linear_fc2.weight", _IN_LAYER))
        names += tuple(pattern.format("linear_fc2.weight").replace("#", "0") for pattern in _ONE_EXPERT)
        fc2 = next((part for part in map(self.layer, (*names, "mlp.experts.linear_fc2.weight0")) if part), None)
        found: dict[str, Any] = {"ffn_hidden_size": fc2.shape[-1]} if fc2 and fc2.shape else {}
        if not (is_whole(heads) and heads > 0 and proj and qkv and proj.shape and qkv.shape):
            return found
        given = ours.get("kv_channels")
        D = given if is_whole(given) and given > 0 else max(1, proj.shape[-1] // heads)
        return {**found, "kv_channels": D, "num_query_groups": max(1, (qkv.shape[0] // D - heads) // 2)}

    def mapped(self, config: TransformerConfig, *, adds_one: bool = False) -> list[MappedTensor]:
        """Every parameter of a model of `config`, in the order of the module.

        Args:
            adds_one: whether the weights of the norms are the factors less 1.

        Raises:
            ConfigError: tensors are missing, of another shape, or left over; with all of them.
        """
        with shapes_only():
            expected = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
        found, problems, used = [], [], set()
        for name, shape in expected.items():
            mapped = self._find(name, shape, _change(name, shape, config, adds_one))
            if mapped is None:
                problems.append(Problem.in_file(f"{self.where}: {_their_name(name)}", f"is missing, for {list(shape)}"))
                continue
            used |= {part.tensor.name for part in mapped.parts}
            problems += _problems(self.where, mapped)
            found.append(mapped)
        extra = [name for name, tensor in self.tensors.items() if tensor.name not in used]
        for name in extra:
            if name == "output_layer.weight" and config.share_embeddings_and_output_weights:
                message = "is there, and share_embeddings_and_output_weights is True"
            else:
                like = nearest(name, [_their_name(each) for each in expected])
                message = f"is not part of such a model{f'; the nearest is {like}' if like else ''}"
            problems.append(Problem.in_file(f"{self.where}: {name} {list(self.tensors[name].shape)}", message))
        refuse(first_of(problems))
        return found

    def _find(self, name: str, shape: Shape, change: Change) -> MappedTensor | None:
        in_layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if in_layer is None:
            tensors = (self.tensors.get(each) for each in _theirs(name, _WHOLE))
            tensor = next((each for each in tensors if each is not None), None)
            return None if tensor is None else MappedTensor(name, shape, (Part(tensor, ()),), False, change)
        number, rest = int(in_layer[1]), in_layer[2]
        for theirs in _theirs(rest, _IN_LAYER):
            if part := self.layer(theirs, number):
                return MappedTensor(name, shape, (part,), False, change)
            halves = [self.layer(f"{theirs}_{half}", number) for half in ("w", "v")]  # the gate and the other apart
            if halves[0] and halves[1]:
                return MappedTensor(name, shape, (halves[0], halves[1]), False, change)
        if rest.startswith("mlp.experts."):
            linear = rest.removeprefix("mlp.experts.")
            patterns = (*(each.format(linear) for each in _ONE_EXPERT), f"{rest}#")
            for pattern in patterns:
                parts = [self.layer(pattern.replace("#", str(expert)), number) for expert in range(shape[0])]
                if all(parts):
                    return MappedTensor(name, shape, tuple(part for part in parts if part), True, change)
        return None


def _theirs(name: str, names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """The names that one of ours may have there."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            yield from (each + name.removeprefix(ours) for each in theirs)


def _their_name(name: str) -> str:
    in_layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    names = _theirs(in_layer[2], _IN_LAYER) if in_layer else _theirs(name, _WHOLE)
    return (f"{_LAYERS}{in_layer[1]}." if in_layer else "") + next(names, name)


def _problems(where: Any, mapped: MappedTensor) -> Iterator[Problem]:
    """What is wrong with the shapes and the types of the parts."""
    first = mapped.parts[0]
    shapes, name = [part.shape for part in mapped.parts], f"{where}: {first.tensor.name}"
    if mapped.stacked:
        whole = (len(shapes), *first.shape)
    else:
        whole = (sum(shape[0] for shape in shapes if shape), *first.shape[1:])
    rows = mapped.name in ("embedding.weight", "output_layer.weight")  # they may have rows of padding
    fits = whole == mapped.shape or (
        rows and len(whole) == 2 and whole[0] >= mapped.shape[0] and whole[1:] == mapped.shape[1:]
    )
    if not fits or len({shape[1:] for shape in shapes}) > 1:
        yield Problem.in_file(name, f"is {list(whole)}, and the settings make it {list(mapped.shape)}")
    stored = first.tensor.dtype
    if stored not in ("F64", "F32", "BF16", "F16") or len({part.tensor.dtype for part in mapped.parts}) > 1:
        yield Problem.in_file(name, f"is {stored}: only F64, F32, F16 and BF16 are read, one in each parameter")


def _change(name: str, shape: Shape, config: TransformerConfig, adds_one: bool) -> Change:
    """The change of layout that a parameter needs."""
    if name in ("embedding.weight", "output_layer.weight"):
        return lambda x: x[: shape[0]]
    if ".linear_qkv." in name:
        return lambda x: _ungrouped(x, config)
    return _one_more if adds_one and name.endswith("layernorm.weight") else lambda x: x


def _one_more(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) + 1


def _ungrouped(x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Megatron has for each group its queries, its key and its value; here all queries are first, then all keys."""
    G, D, rest = config.groups, config.head_dim, x.shape[1:]
    each = x.view(G, config.num_attention_heads // G + 2, D, *rest)
    parts = each[:, :-2], each[:, -2], each[:, -1]
    return torch.cat([part.reshape(-1, *rest) for part in parts])
