"""The peak GPU memory of a training, worked out from its sizes.

Every term is a tensor that is in memory; those of the layers are counted by `fiddlehead.plan.activations`. What the
terms are compared with is `benchmarks/results/plan.json`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from fiddlehead.models import TransformerConfig, nf4
from fiddlehead.models.linear_cross_entropy import CHUNK_TOKENS
from fiddlehead.plan import activations
from fiddlehead.plan.activations import Setting
from fiddlehead.training.distributed.sizes import Sizes

GIB = 2**30
WORKSPACE = 64 * 2**20
"""Of cuBLAS, 32 MiB on Hopper for each of the threads of the two passes; it stays allocated."""
OUTSIDE = {"alone": 0.75, "data": 3.5, "context": 3.9, "tensor": 4.3, "pipeline": 4.7}
"""GiB outside PyTorch's allocator, measured: the CUDA context and kernels, and NCCL's buffers by what is divided."""


OPTIMIZER = "the optimizer's step"
"""When it has the most, if that is not in a pass."""


@dataclass(frozen=True)
class Held:
    """What a rank has of the parameters, in bytes, all through a step or at its end, and what its optimizer does."""

    parameters: float
    gradients: float
    """As if all had the dtype of their weights; see `activations.halved_gradients`."""
    optimizer: float
    """The optimizer's state on the GPU."""
    offloaded: float = 0.0
    """The optimizer's state in main memory."""
    stepping: float = 0.0
    """What the optimizer's step needs besides."""
    buckets: float = 0.0
    """The copy of the gradients that DDP exchanges."""
    step_operations: float = 0.0
    """Of the optimizer's step, in matrix products."""
    step_moved: float = 0.0
    """The bytes that the optimizer's step reads and writes besides parameters, gradients and state."""

    @property
    def state(self) -> float:
        """Parameters, gradients and optimizer state on the GPU."""
        return self.parameters + self.gradients + self.optimizer


class Memory(NamedTuple):
    """What a rank has in memory when it has the most, in bytes."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """What the forward pass keeps of the layers, and what the backward pass computes again."""
    copies: float
    """Weights in bfloat16: copies for the products, or gathered from other ranks."""
    loss: float
    """Of the cross-entropy: its gradients, and logits where they are at hand."""
    transient: float
    """What a layer's backward pass, or the optimizer's step, needs and frees."""
    where: str
    """When it has the most."""
    outside: float
    """What is not PyTorch's: the CUDA context and the buffers of NCCL."""
    workspace: float = 0.0
    """Of matrix products."""

    @property
    def peak(self) -> float:
        """The most that PyTorch has allocated."""
        held = self.parameters + self.gradients + self.optimizer  # added up by hand: a search asks for it very often
        return held + self.activations + self.copies + self.loss + self.transient + self.workspace

    def parts(self) -> dict[str, float]:
        """What PyTorch has allocated at the peak, in words, and its bytes."""
        return {said: getattr(self, name) for name, said in _PARTS.items()}

    def fits(self, gib: float) -> str:
        """Whether a card of so much memory has enough: "fits", "tight" or "does not fit".

        The allocator reserves more than is allocated, measured 2 to 9 % where there was room; 3 % are needed. "tight"
        is within 5 % of the card.
        """
        return "does not fit" if self.needed_gib > gib else "tight" if self.needed_gib > 0.95 * gib else "fits"

    @property
    def needed_gib(self) -> float:
        """What a card must have, in GiB, with what the allocator reserves and what is outside PyTorch."""
        return (self.peak + self.reserved + self.outside) / GIB

    @property
    def reserved(self) -> float:
        """What the allocator is taken to reserve besides what is allocated."""
        return 0.03 * self.peak

    def to_dict(self) -> dict[str, Any]:
        """The fields and the peak; in bytes."""
        return {**self._asdict(), "peak": self.peak}


_PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "copies": "gathered layers, or copies of weights",
    "loss": "the loss: its gradients and logits",
    "transient": "what one layer, or the optimizer, needs and frees",
    "workspace": "workspace of matrix products",
}


def memory(config: TransformerConfig, held: Held, setting: Setting) -> Memory:
    """The memory of the rank that has the most, at the moment when it has the most.

    It takes microseconds: no module is made.

    Args:
        config: with `vocab_size`.
        held: the rank's part of the parameters and of what belongs to them.
    """
    return max(moments(config, held, setting).values(), key=lambda moment: moment.peak)


def moments(config: TransformerConfig, held: Held, setting: Setting) -> dict[str, Memory]:
    """The memory at each moment that can be the peak, and when the forward pass has "ended".

    In a pipeline they are those of the rank that has most at that moment: the first, the last, or the one with most
    layers.
    """
    step = _Step(config, held, setting)
    ranks = [step]
    if setting.sizes is not None and setting.sizes.pipeline > 1:
        layers = setting.sizes.layers_of_ranks(config)
        numbers = {0, len(layers) - 1, layers.index(max(layers))}
        ranks = [step.on_rank(number, layers[number]) for number in numbers]
    of_ranks = [
        {
            "ended": each.forward(),
            "forward": each.forward(logits=True),
            "last": each.backward(0),
            "first": each.backward(each.layers - 1),
            "embedding": each.end(),
            "optimizer": each.optimizer(),
        }
        for each in ranks
    ]
    return {name: max((each[name] for each in of_ranks), key=lambda moment: moment.peak) for name in of_ranks[0]}


def main_memory(config: TransformerConfig, held: Held, setting: Setting) -> dict[str, float]:
    """What a rank keeps in main memory instead of on its GPU, in words, and its bytes."""
    inputs = config.num_layers * _Step(config, held, setting).stream if setting.offloads else 0.0
    parts = {_PARTS["optimizer"]: held.offloaded, "the inputs of layers": inputs}
    return {said: size for said, size in parts.items() if size}


class _Step:
    """The terms of a step of one rank; all sizes in bytes, or in weights. Without a pipeline it has all layers."""

    def __init__(self, config: TransformerConfig, held: Held, setting: Setting) -> None:
        self.config, self.held, self.setting = config, held, setting
        self.sizes = sizes = setting.sizes or Sizes(1, 1)
        self.layers = config.num_layers
        self.tokens = setting.tokens / (sizes.context * sizes.tensor)  # of the stream, as ranks share it
        self.stream = setting.of_products * self.tokens * config.hidden_size
        self.shards = sizes.data // sizes.replicate * sizes.context
        of_token = activations.of_layer(config, setting, sizes)
        self.kept, self.again, self.inside = (self.tokens * each for each in of_token)
        self.layer = activations.layer_weights(config, sizes)
        self.halved = activations.halved_gradients(config, setting) / config.num_layers
        self.tiled = 0.0 if setting.tiled_mlp is None else activations.mlp_weights(config, sizes)
        vocabulary = (config.vocab_size or 0) * config.hidden_size
        learned = config.position_embedding_type == "learned_absolute"
        positions = (config.seq_length or 0) * config.hidden_size if learned else 0
        self.output, self.embedding = vocabulary, vocabulary + positions
        self.tied = config.share_embeddings_and_output_weights
        self.root = self.embedding + (0 if self.tied else self.output)  # what is outside the layers
        self.in_flight = 1.0
        divided = [name for name in ("pipeline", "tensor", "context", "data") if getattr(sizes, name) > 1]
        self.outside = OUTSIDE[divided[0] if divided else "data" if held.buckets else "alone"] * GIB
        if sizes.tensor > 1 and setting.copies:  # two buffers for whole sequences
            self.outside += 2 * sizes.tensor * self.stream
        self.trains = not setting.adapters
        # A rank of a pipeline adds up a step's gradients in float32 before it shares them with others.
        self.adds_up = self.trains and sizes.pipeline > 1 and self.shards > 1

    def on_rank(self, rank: int, layers: int) -> _Step:
        """That of a rank of a pipeline, with this number of layers."""
        step = copy.copy(self)
        step.layers = layers
        if rank != self.sizes.pipeline_rank(0):
            step.embedding = 0
        if rank != self.sizes.pipeline_rank(self.sizes.stages - 1):
            step.output = 0
        step.tied = False  # the first and the last rank have a copy each, which is used once
        step.root = step.embedding + step.output
        step.in_flight = _in_flight(self.sizes, self.setting.micro_batches, rank)
        return step

    def _moment(
        self,
        where: str,
        *,
        gradients: float,
        transient: float = 0.0,
        activations: float = 0.0,
        copies: float = 0.0,
        loss: float = 0.0,
    ) -> Memory:
        """Args: gradients: those of the step so far, where none are accumulated."""
        held = self.held
        there = held.gradients if self.setting.micro_batches > 1 else max(gradients, 0.0)
        if self.adds_up and where != OPTIMIZER:
            there += 4 * (self.root + self.layers * self.layer)
        return Memory(
            parameters=held.parameters,
            gradients=there + held.buckets,
            optimizer=held.optimizer,
            activations=activations,
            copies=copies,
            loss=loss,
            transient=transient,
            where=where,
            outside=self.outside,
            workspace=WORKSPACE,
        )

    def _activations(self, layers: int) -> float:
        """What the forward pass keeps of the first so many layers, and of the micro-batches in flight before."""
        received = self.setting.micro_batches * self.stream if self.sizes.pipeline > 1 else 0
        return self.kept * (layers + (self.in_flight - 1) * self.layers) + received

    def _copies(self, layers: int, *, again: int = 0) -> float:
        """The weights in bfloat16: copies for the products, or what is gathered from other ranks.

        Args:
            layers: how many of the first layers are still to have their backward pass.
            again: how many layers have been gathered again for it, or cast again.
        """
        setting = self.setting
        if not setting.fsdp:
            if setting.of_weights == setting.of_products:
                return 0
            keeps = setting.recompute is None and not setting.fp8
            tiled = self.tiled if keeps else 0.0  # those of tiles are not kept
            cast = (self.layer - tiled) * (layers if keeps else min(again, 1)) + tiled * min(again, 1)
            return setting.of_products * cast
        if self.shards == 1 and setting.precision != "bf16-mixed":
            return 0  # they are as they are stored
        if self.shards == 1 or self.sizes.pipeline > 1 or not setting.reshard_after_forward:
            gathered = self.layers
        else:  # the last layer stays gathered between the two passes
            gathered = again or int(layers == self.layers)
        return setting.of_weights * self.root + setting.of_layers * gathered * self.layer

    def _waiting(self) -> float:
        """The gradient of the output layer's weights, as the loss leaves it."""
        return self.setting.of_weights * self.output if self.trains else 0.0

    def _loss(self) -> float:
        """The gradients that the loss leaves when it has been computed; or, where answers are compared, the values."""
        if self.setting.compares:
            return 4 * self._logits
        return self.stream + self._waiting() if self.output else 0.0

    @property
    def _logits(self) -> float:
        """How many there are of a micro-batch."""
        return self.tokens * (self.config.vocab_size or 0) if self.output else 0.0

    def _norm(self) -> float:
        """The last norm's input."""
        return self.tokens * self.config.hidden_size * self.setting.of_weights if self.output else 0.0

    def forward(self, *, logits: bool = False) -> Memory:
        """The forward pass has ended; or, with `logits`, is at the last chunk of its loss."""
        loss = self._loss()
        if logits and self.output:
            loss += self._of_logits()
        return self._moment(
            "the forward pass's loss" if logits else "the forward pass",
            gradients=0,
            activations=self._activations(self.layers) + self._norm(),
            copies=self._copies(self.layers),
            loss=loss,
        )

    def _of_logits(self) -> float:
        """What `linear_cross_entropy` has besides the gradients that it leaves."""
        setting, config = self.setting, self.config
        each = setting.of_products
        copy = each * self.output if setting.of_weights != each else 0
        if setting.compares:  # two gradients in float32 beside the log-probabilities
            return 8 * self._logits + copy
        chunk = min(self.tokens, CHUNK_TOKENS) * (config.vocab_size or 0)
        if setting.compiled:
            buffers = each * chunk  # the logits, which their gradient overwrites
        else:  # the logits, if they are not float32 already; in float32 they, their exponential and what it is times
            capped, scaled = config.final_logit_softcapping is not None, config.logits_scaling != 1
            buffers = (4 * (3 + capped) + (each if each == 2 or scaled else 0)) * chunk
        learned = 0.0
        if self.trains and self.tokens <= CHUNK_TOKENS:  # it is made when the only chunk's logits are gone
            learned = -self._waiting()
        elif self.trains:  # it is float32 until the last chunk
            learned = 4 * self.output - self._waiting()
        return copy + buffers + learned + self.stream  # the last is the output layer's input

    def backward(self, done: int) -> Memory:
        """The backward pass is inside a layer, after so many others."""
        setting, left = self.setting, self.layers - done
        # The gradient of shared weights waits for the embedding's part; with FSDP2, that of an output layer waits too.
        waits = self.tied or setting.fsdp
        missing = left * self.layer + self.embedding + (self.output if waits and not self.tied else 0)
        reducing = 0.0
        if self.trains and self.shards > 1 and done:  # the gradient of the layer before, and the same in float32
            reducing = (setting.of_weights + 4) * self.layer
        product = activations.second_product(self.config, self.sizes) if self.trains else 0.0
        arriving = self.stream if setting.offloads else 0.0  # the input of the layer before, for its backward pass
        dequantized = 0.0
        if setting.quantizes:
            dequantized = nf4.DEQUANTIZING[setting.compiled] * activations.largest_product(self.config)
        again, inside = self.again, self.inside + setting.of_products * product
        if setting.tiled_mlp is not None:
            again, inside = max(self._in_tile(setting.tiled_mlp), self._in_attention(), key=sum)
        return self._moment(
            "the backward pass",
            gradients=self.held.gradients - self._of_gradient() * missing - self.halved * done,
            activations=self._activations(left) + again,
            copies=self._copies(left, again=1 if left == 1 else 2),
            loss=self._waiting() if waits else 0.0,
            transient=self.stream + inside + reducing + arriving + dequantized,
        )

    def _in_tile(self, tile: int) -> tuple[float, float]:
        """What is computed again of a layer and kept, and what is inside it, when the last tile has its backward pass.

        All tokens have their gradient with respect to the tiles' input. The weights' gradients are summed in float32 if
        there are several tiles, and each tile has its own.
        """
        setting = self.setting
        of_token, _ = activations.of_tiled_layer(self.config, setting, self.sizes)
        learned = self.tiled if self.trains else 0.0
        sums = 4 * learned if self.tokens > tile else 0.0
        at_work = max(
            min(tile, self.tokens) * of_token + learned / 3 * setting.of_weights, learned * setting.of_weights
        )
        return self.again if setting.recompute == "full" else 0.0, self.stream + sums + at_work

    def _in_attention(self) -> tuple[float, float]:
        """The same in the backward pass of attention, when the gradients of the feed-forward wait to be reduced."""
        _, of_token = activations.of_tiled_layer(self.config, self.setting, self.sizes)
        waiting = self.tiled * self.setting.of_weights if self.trains and self.shards > 1 else 0.0
        middle = self.setting.of_products * self.tokens * self.config.hidden_size  # the tiles' input, which is gone
        return self.again - middle, self.tokens * of_token + waiting

    def _of_gradient(self) -> float:
        """Bytes on the rank for each weight that the ranks of a layer's copy have together."""
        return self.held.gradients / (self.root + self.layers * self.layer) if self.trains else 0.0

    def _gradients(self) -> float:
        """All of them, after the backward pass."""
        return self.held.gradients - self.halved * self.layers

    def end(self) -> Memory:
        """The last gradient of all is made, that of the embedding."""
        setting = self.setting
        gradients, transient = self._gradients(), 0.0
        copies, loss = 0.0, 0.0
        if not self.trains:
            pass
        elif not setting.fsdp:
            transient = self.stream + 4 * self.tokens * self.config.hidden_size
            loss = self._waiting() if self.tied and not setting.joins else 0.0  # beside one as large for the embedding
        elif self.shards == 1:  # what is gathered stays; its gradients become float32
            copies = self._copies(0)
            transient = setting.of_weights * self.root if copies else 0.0
        else:  # what is outside the layers is reduced at once: its gradients, the same in float32, and the sums
            transient = (setting.of_weights + 4 + 4 / self.shards) * self.root
            gradients -= self._of_gradient() * self.root
        return self._moment("the backward pass", gradients=gradients, copies=copies, loss=loss, transient=transient)

    def optimizer(self) -> Memory:
        """The optimizer takes its step."""
        return self._moment(OPTIMIZER, gradients=self._gradients(), transient=self.held.stepping)


def _in_flight(sizes: Sizes, micro_batches: int, rank: int) -> float:
    """Of how many micro-batches a rank keeps activations: those in flight before the first comes back."""
    ranks, each = sizes.pipeline, sizes.stages // sizes.pipeline
    later = ranks - 1 - rank
    if sizes.folded:  # of all ranks as many, in their two stages
        chunks = 2 * ranks + 1
    else:
        chunks = later + 1 if each == 1 else 2 * later + (each - 1) * ranks + 1
    return min(chunks / each, micro_batches)
