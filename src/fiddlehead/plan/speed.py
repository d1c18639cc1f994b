"""How long a step takes, worked out from the work in it and from how much of a card's peak each kind of work reaches.

Matrix products and attention are counted in operations, all else in bytes that are read and written. The parts that an
H100 reaches are fitted to `benchmarks/results/plan.json`. Other cards are taken to reach the same part of the peak in
their data sheet, unless `fiddlehead bench --calibrate` has measured them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fiddlehead.models import TransformerConfig
from fiddlehead.plan.activations import Setting, halved_gradients
from fiddlehead.plan.cards import MAIN_MEMORY, PCIE, Card
from fiddlehead.plan.memory import Held
from fiddlehead.plan.reached import REACHED, reached
from fiddlehead.plan.work import Exchanges, Work
from fiddlehead.training.distributed.sizes import Sizes

HIDDEN = 0.9
"""The part of a computation's time behind which an exchange can be."""
INFINIBAND = 50e9
"""Bytes a second and GPU between nodes: 400 Gbit/s a GPU."""


@dataclass(frozen=True)
class Speed:
    """The seconds of a step on the slowest rank, by what they are spent on."""

    products: float
    attention: float
    memory_bound: float
    """Norms, activations, residuals, the softmax of the loss, casts of weights."""
    optimizer: float
    links: dict[str, float] = field(hash=False)
    """Exchanges that no computation hides, by what they wait for: NVLink or PCIe, InfiniBand, main memory."""
    bubble: float
    """In which ranks of a pipeline wait for each other."""
    tokens_per_s: float
    """Of all GPUs together."""
    mfu: float
    """The part of the peak that the model's own operations take, as `Metrics` reports it."""
    watts: float
    """Of all GPUs together, at most; 0 if not known."""
    calibrated: bool = False
    """Whether such a GPU was measured on this machine."""

    @property
    def communication(self) -> float:
        """Seconds of exchanges that no computation hides, over all links."""
        return sum(self.links.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.parts().values())

    def hours(self, steps: int) -> float:
        """Hours of so many steps."""
        return self.step * steps / 3600

    def parts(self) -> dict[str, float]:
        """The seconds of a step by what they are spent on, in words."""
        return {
            "products": self.products,
            "attention": self.attention,
            "memory-bound work": self.memory_bound,
            "optimizer": self.optimizer,
            **{f"waiting for {link}": seconds for link, seconds in self.links.items()},
            "pipeline bubble": self.bubble,
        }

    def kwh(self, steps: int) -> float | None:
        """Kilowatt-hours of so many steps, if the cards take all their power; None if that is not known."""
        return self.watts * self.hours(steps) / 1000 or None

    def to_dict(self) -> dict[str, Any]:
        """The fields, the seconds of all communication and those of a step."""
        return {**vars(self), "communication": self.communication, "seconds_per_step": self.step}


def speed(
    config: TransformerConfig,
    held: Held,
    setting: Setting,
    card: Card,
    seq_length: int,
    *,
    gpus: int,
    gpus_per_node: int,
) -> Speed | None:
    """How long a step takes; None where that is not known: in float32, or if the card's peak is not.

    It takes microseconds: no module is made.

    Args:
        config: with `vocab_size`.
        held: what the rank has of the parameters that has most of them.
        gpus: how many train.
    """
    if setting.precision == "32-true" or not card.flops or not card.bytes_per_s:
        return None
    part = reached(card)
    ranks = _Rank.of_all(config, setting, seq_length, part, card)
    slowest = max(ranks, key=lambda rank: rank.computed)
    work, products, attention, memory_bound = slowest.work, slowest.products, slowest.attention, slowest.memory_bound
    sizes, batches, computed = work.sizes, setting.micro_batches, slowest.computed
    # Parameters and states are read and written; gradients are read for the norm, read and scaled, and read again.
    # AdamW scales them where it reads them, but the rate was measured before it did.
    stepped = held.gradients if setting.adapters or setting.compares else held.parameters
    gradients = held.gradients - halved_gradients(config, setting)
    moved = 2 * stepped + 4 * gradients + 2 * (held.optimizer + held.offloaded)
    optimizer = (moved + held.step_moved) / (card.bytes_per_s * part["optimizer"])
    optimizer += held.step_operations / (card.flops * part["products"])
    optimizer = max(optimizer, held.offloaded / MAIN_MEMORY)  # it is copied both ways while pieces are computed
    links = _Links.of(card, part["link"], gpus_per_node)
    exchanged = links.seconds(work.exchanged())
    for link, seconds in links.seconds(work.passed_on()).items():  # behind attention, which it is a part of
        exchanged[link] = exchanged.get(link, 0.0) + max(0.0, seconds - HIDDEN * attention)
    shared = links.seconds(work.shared())
    if setting.offloads:  # to main memory and back
        shared["main memory"] = batches * 2 * work.inputs() / PCIE
    communication = _waited(batches, exchanged, shared, computed * batches)
    bubble = _bubble(ranks, slowest, sum(exchanged.values()))
    step = batches * computed + bubble + optimizer + sum(communication.values())
    groups = gpus // (sizes.context * sizes.tensor * sizes.pipeline)
    rate = batches * groups * setting.tokens / step
    adapters = int(held.gradients / 4) if setting.adapters else None
    flops = config.train_flops_per_token(seq_length, adapters=adapters)
    return Speed(
        products=batches * products,
        attention=batches * attention,
        memory_bound=batches * memory_bound,
        optimizer=optimizer,
        links=communication,
        bubble=bubble,
        tokens_per_s=rate,
        mfu=rate * flops / (gpus * card.flops),
        watts=gpus * card.watts,
        calibrated=part is not REACHED,
    )


@dataclass(frozen=True)
class _Links:
    """The links by which ranks exchange tensors."""

    node: str
    """The name of those within a node."""
    within: float
    """The bytes that a rank can exchange over them in a second."""
    gpus_per_node: int

    @classmethod
    def of(cls, card: Card, reached: float, gpus_per_node: int) -> _Links:
        """Those of a card; `reached` is the part of their peak that is reached."""
        node = "NVLink" if card.link_bytes_per_s > PCIE else "PCIe"
        return cls(node, card.link_bytes_per_s * reached, gpus_per_node)

    def seconds(self, exchanges: Exchanges) -> dict[str, float]:
        """The seconds by link of exchanges.

        They are between nodes if a node does not hold whole groups of so many.
        """
        between = min(self.within, INFINIBAND * REACHED["link"] / 0.5)  # nobody measures it
        found: dict[str, float] = {}
        for ranks, moved in exchanges:
            inside = self.gpus_per_node % ranks == 0
            link, rate = (self.node, self.within) if inside else ("InfiniBand", between)
            found[link] = found.get(link, 0.0) + moved / rate
        return found


@dataclass(frozen=True)
class _Rank:
    """The seconds of a micro-batch on one rank of a pipeline, or on the only one."""

    work: Work
    products: float
    attention: float
    memory_bound: float

    @classmethod
    def of_all(
        cls, config: TransformerConfig, setting: Setting, seq_length: int, reached: Mapping[str, float], card: Card
    ) -> list[_Rank]:
        """Those of all ranks of a pipeline."""
        sizes = setting.sizes or Sizes(1, 1)
        layers, known = [config.num_layers], dict[tuple[int, bool], _Rank]()
        if sizes.pipeline > 1:
            layers = sizes.layers_of_ranks(config)
        with_head = sizes.pipeline_rank(sizes.stages - 1)
        ranks = [(number, rank == with_head) for rank, number in enumerate(layers)]
        for number, head in {*ranks}:
            work = Work(config, setting, seq_length, reached, number, head)
            memory_bound = work.moved() / (card.bytes_per_s * reached["memory"])
            known[number, head] = cls(work, work.products(card), work.attention(card), memory_bound)
        return [known[rank] for rank in ranks]

    @property
    def computed(self) -> float:
        """All of them."""
        return self.products + self.attention + self.memory_bound


def _bubble(ranks: list[_Rank], slowest: _Rank, exchanged: float) -> float:
    """The seconds of a step in which the slowest rank of a pipeline waits for others.

    It has to wait for the first micro-batch to come from those before it, and for the last one to come back to them.

    Args:
        exchanged: seconds of a micro-batch.
    """
    if len(ranks) == 1:
        return 0.0
    setting, sizes = slowest.work.setting, slowest.work.sizes
    waits = sum(rank.computed for rank in ranks) - slowest.computed + (len(ranks) - 1) * exchanged
    # The gradients of weights, a third of the products, fill a part of it (Qi et al. 2023, section 2.3).
    filled = {"1F1B": 0, "InterleavedZeroBubble": 2}.get(setting.schedule, 3)
    part = max(0.0, 1 - filled / 3 * slowest.products / slowest.computed)
    return waits * part / (sizes.stages // sizes.pipeline)


def _waited(
    batches: int, exchanged: Mapping[str, float], shared: Mapping[str, float], computed: float
) -> dict[str, float]:
    """Seconds of a step in which ranks communicate and nothing hides it, by link.

    Args:
        exchanged: seconds of each of the micro-batches.
        shared: seconds of a step, of what ranks share and of what is in main memory between the passes; the computation
            hides a part of them.
        computed: the seconds of a step's computation.
    """
    # A layer is gathered while the one before computes, but the first has to wait, and both share the GPU.
    seconds = sum(shared.values())
    exposed = max(0.2, 1 - HIDDEN * computed / seconds) if seconds else 0.0
    each = {
        link: batches * exchanged.get(link, 0.0) + exposed * shared.get(link, 0.0) for link in {**exchanged, **shared}
    }
    return {link: seconds for link, seconds in each.items() if seconds}
