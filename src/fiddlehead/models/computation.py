"""How the layers of a model are computed: compiled, computed again, in tiles, in float8, by which kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from fiddlehead.errors import Problem
from fiddlehead.models.mlp_choice import MlpBackend, MlpChoice
from fiddlehead.models.speed import (
    Compile,
    Float8,
    Recompute,
    compile_transformer,
    convert_to_float8,
    fuse_mlp,
    offload_inputs,
    recompute_activations,
    tile_attention,
    tile_mlp,
)
from fiddlehead.models.transformer import Transformer
from fiddlehead.numbers import is_whole


@dataclass(frozen=True)
class Computation:
    """How the layers of a model are computed; the fields are the arguments of `LanguageModel` with the same names."""

    compile: Compile | None = None
    activation_checkpointing: Recompute | None = None
    fp8: Float8 | None = None
    fp8_all_gather: bool = False
    tiled_mlp: int | None = None
    tiled_attention: int | None = None
    activation_offloading: bool = False
    mlp_backend: MlpBackend = "auto"

    def apply(self, transformer: Transformer, mlp: MlpChoice, *, gathers_float8: bool) -> None:
        """Changes how the layers of a model are computed, before it is sharded; parameters and their names stay.

        Args:
            mlp: what computes the feed-forward.
            gathers_float8: whether FSDP2 is to gather weights in float8.
        """
        fuse_mlp(transformer, mlp.backend)
        # In this order, because recomputation is part of what is compiled, and tiles are parts of what is recomputed.
        if self.fp8 is not None:
            convert_to_float8(transformer, self.fp8, gathers_float8)
        if self.tiled_mlp is not None:
            tile_mlp(transformer, self.tiled_mlp)
        if self.tiled_attention is not None:
            tile_attention(transformer, self.tiled_attention)
        if self.activation_checkpointing is not None:
            recompute_activations(transformer, self.activation_checkpointing)
        if self.activation_offloading:
            offload_inputs(transformer)
        if self.compile is not None:
            compile_transformer(transformer, self.compile)

    def problems(self) -> list[Problem]:
        """Impossible values, and values that exclude each other."""
        return [
            *self._of_name("compile", "mode", get_args(Compile)),
            *self._of_recomputation(),
            *self._of_name("fp8", "recipe", get_args(Float8)),
            *self._of_gathering(),
            *self._of_tiles(),
            *self._of_offloading(),
            *self._of_name("mlp_backend", "backend", get_args(MlpBackend)),
        ]

    def _of_name(self, field: str, what: str, allowed: tuple[str, ...]) -> Iterator[Problem]:
        given = getattr(self, field)
        if given not in (getattr(Computation, field), *allowed):  # the default may be None
            yield Problem.unknown(field, given, what, allowed)

    def _of_recomputation(self) -> Iterator[Problem]:
        field, given = "activation_checkpointing", self.activation_checkpointing
        if isinstance(given, str) and given not in ("selective", "full"):
            yield Problem.unknown(field, given, "mode", ("selective", "full"))
        if isinstance(given, int | float):
            if isinstance(given, bool) or not 0 <= given <= 1:
                yield Problem(field, given, "a number is the part of the activations to keep, 0 to 1")
            elif self.compile is None:
                message = "the compiler chooses the part to keep; set compile='layers', or 'selective' or 'full' here"
                yield Problem(field, given, message)

    def _of_gathering(self) -> Iterator[Problem]:
        if not isinstance(self.fp8_all_gather, bool):
            yield Problem("fp8_all_gather", self.fp8_all_gather, "must be True or False")
        elif self.fp8_all_gather and self.fp8 != "tensorwise":
            message = "gathers weights that have one scale each; set fp8='tensorwise', or False here"
            yield Problem("fp8_all_gather", True, message)

    def _of_tiles(self) -> Iterator[Problem]:
        for field, (of_number, of_part, of_float8) in _OF_TILES.items():
            given = getattr(self, field)
            if given is None:
                continue
            if not (is_whole(given) and given >= 1):
                yield Problem(field, given, of_number)
            if field == "tiled_mlp" and self.compile == "model":
                message = "tiles are not for a model that is compiled as one; set compile='layers', or None here"
                yield Problem(field, given, message)
            if isinstance(self.activation_checkpointing, int | float):
                others = "set activation_checkpointing to 'full', 'selective' or None, or None here"
                yield Problem(
                    field, given, f"{of_part}, so no part of a whole layer's activations can be chosen; {others}"
                )
            if self.fp8 is not None:
                yield Problem(field, given, f"{of_float8}; set fp8=None, or None here")

    def _of_offloading(self) -> Iterator[Problem]:
        field, given = "activation_offloading", self.activation_offloading
        if not isinstance(given, bool):
            yield Problem(field, given, "must be True or False")
        if given is not True:
            return
        if self.activation_checkpointing != "full":
            message = "moves the inputs of layers that are computed again; set activation_checkpointing='full'"
            yield Problem(field, given, message)
        if self.compile is not None and self.tiled_mlp is None:
            message = (
                "where a layer is compiled as one, the compiler decides what it keeps; set tiled_mlp, such as 8192, or "
                "compile=None"
            )
            yield Problem(field, given, message)


_OF_TILES = {
    "tiled_mlp": (
        "is the number of tokens of a tile: a whole number of 1 or more, such as 8192, or None",
        "tiles are computed again",
        "float8 products are scaled by whole tensors, not by tiles",
    ),
    "tiled_attention": (
        "is the number of key/value heads of a tile: a whole number of 1 or more, or None",
        "tiles keep what attention gives and compute queries, keys and values again",
        "attention in tiles has no float8 products",
    ),
}
"""What is wrong with a field of tiles: its number; with a part of the activations to keep; with float8."""
