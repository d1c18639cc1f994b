"""The smallest changes of a recipe that make it fit its GPUs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fiddlehead.plan.cards import Card
from fiddlehead.plan.layouts import INPUTS_OFFLOADED, TILE, Layout, computing, fitting, head_tiles
from fiddlehead.plan.rank_memory import OFFLOADED, Training
from fiddlehead.plan.speed import Speed
from fiddlehead.training import AdamW, PreferenceModel

MOST_EDITS = 3
"""Of a remedy; with more it is another recipe, and `layouts` finds those."""
MOST_REMEDIES = 6
MOST_TIMES = 64
"""More GPUs than these times the recipe's are not tried."""
TILES = (TILE, 2048)
"""The numbers of tokens that are tried for a tile of the feed-forward."""
MORE_GPUS = ("trainer.devices", "trainer.num_nodes")
"""What is edited for them."""


@dataclass(frozen=True)
class Remedy:
    """A change that makes a recipe fit with 5 % of the memory to spare, and what it costs."""

    layout: Layout
    """With all edits of the change."""
    relative_speed: float | None
    """Tokens per second of all GPUs together, over those of the recipe as it is; None if not known."""

    def row(self) -> str:
        """A line of a summary, with the edits as a shell takes them."""
        speed = "" if self.relative_speed is None else f", {self.relative_speed:.2f} x the tokens/s"
        return f"{shlex.join(self.layout.edits)}: {self.layout.memory.needed_gib:.1f} GiB{speed}"

    def to_dict(self) -> dict[str, Any]:
        """The edits, the memory and the speed with them, and the relative speed, as JSON values."""
        return {**self.layout.to_dict(), "relative_speed": self.relative_speed}


def remedies(training: Training, card: Card, speed: Speed | None) -> tuple[Remedy, ...]:
    """The remedies on these GPUs with the fewest edits, the fastest first; then that with more GPUs, if it is as small.

    Of each kind, the fastest counts. Tried are another micro-batch, computing more again, other splits over the GPUs,
    tiles of the feed-forward and of attention, layers' inputs or the optimizer's state in main memory, bfloat16
    parameters and 8-bit moments. The global batch stays as it is.

    Args:
        speed: of the training as it is.
    """
    here: list[Remedy] = []
    more: list[Remedy] = []
    for most in range(1, MOST_EDITS + 1):
        here = _best(_changed(training), card, speed, most)
        more = more or _best(_larger(training), card, speed, most)
        if here:
            break
    return (*here[: MOST_REMEDIES - 1], *more[:1])


def _best(tries: Iterable[tuple[list[str], Training]], card: Card, speed: Speed | None, most: int) -> list[Remedy]:
    """The best remedy of each kind, the fastest first; it stops at the first number of more GPUs that is enough."""
    best: dict[tuple[str, ...], Remedy] = {}
    for edits, changed in tries:
        for layout in fitting(changed, card, most_edits=most - len(edits)):
            relative = None
            if speed is not None and layout.speed is not None:
                relative = layout.speed.tokens_per_s / speed.tokens_per_s
            remedy = Remedy(replace(layout, edits=(*edits, *layout.edits)), relative)
            kind = tuple(edit.partition("=")[0] for edit in remedy.layout.edits)
            if kind not in best or _rank(remedy) > _rank(best[kind]):
                best[kind] = remedy
        if best and edits and edits[0].startswith(MORE_GPUS):
            break
    return sorted(best.values(), key=_rank, reverse=True)


def _rank(remedy: Remedy) -> tuple[float, float]:
    """The fastest is best; if speeds are not known, the one that changes memory least."""
    return remedy.relative_speed or 0.0, remedy.layout.memory.peak


def _changed(training: Training) -> Iterator[tuple[list[str], Training]]:
    """The training as it is, with fewer bits, and with less of its state and its activations on the GPU."""
    devices, optim, model = training.devices, training.optim, training.model
    precisions = {"32-true": ("bf16-mixed", "bf16-true"), "bf16-mixed": ("bf16-true",)}.get(devices.precision, ())
    for precision in (devices.precision, *precisions):
        edits = [] if precision == devices.precision else [f"trainer.precision={precision}"]
        changed = replace(training, devices=replace(devices, precision=precision))
        yield edits, changed
        if (offloaded := changed.offloaded()) is not None:
            yield [*edits, OFFLOADED], offloaded
    if isinstance(optim, AdamW) and optim.state_bits == 32 and not optim.state_offloading:
        yield ["optim.state_bits=8"], replace(training, optim=replace(optim, state_bits=8))
    if isinstance(model, PreferenceModel):  # it has no such fields
        return
    now = model.computation
    for tile in (now.tiled_mlp,) if now.tiled_mlp is not None else (None, *TILES):
        edits = [] if tile == now.tiled_mlp else [f"model.tiled_mlp={tile}"]
        for offloads in dict.fromkeys((now.activation_offloading, True)):
            chosen = edits if offloads == now.activation_offloading else [*edits, INPUTS_OFFLOADED]
            tiled = computing(training, tiled_mlp=tile, activation_offloading=offloads)
            if chosen:
                yield chosen, tiled
            if tile is not None and now.tiled_attention is None:  # otherwise the feed-forward has the peak
                for groups in head_tiles(training):
                    yield [*chosen, f"model.tiled_attention={groups}"], computing(tiled, tiled_attention=groups)


def _larger(training: Training) -> Iterator[tuple[list[str], Training]]:
    """The training on more GPUs, the fewest first: on more of one machine if it has one, or else on more nodes."""
    devices = training.devices
    name, now = ("devices", 1) if devices.gpus == 1 else ("num_nodes", devices.num_nodes)
    numbers = (2, 4, 8) if devices.gpus == 1 else (*range(now + 1, 2 * now), *range(2 * now, MOST_TIMES * now + 1, now))
    for number in numbers:
        more = {"num_devices" if name == "devices" else name: number}
        yield [f"trainer.{name}={number}"], replace(training, devices=replace(devices, **more))
