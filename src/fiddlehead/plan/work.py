"""What a rank does in a step: operations of matrix products and attention, bytes that are moved, and exchanges."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fiddlehead.models import TransformerConfig, nf4
from fiddlehead.plan.activations import Setting, computed_again, exchanged_keys, layer_weights, mlp_weights
from fiddlehead.plan.cards import Card
from fiddlehead.training.distributed.sizes import Sizes

Exchanges = list[tuple[int, float]]
"""Among how many neighbours each exchange is, and how many bytes."""
FUSED = 0.65
"""The part of SwiGLU's time that remains where quack's products apply it, of which one then takes longer, as two
arms of `benchmarks/results/train_mlp.json` have it."""
ADAPTED = 0.65
"""The values that an adapter moves for each value of its layer's input and output, as two steps of Llama 3 8B in
`benchmarks/results/lora_8b.json` have it. Counted one by one there are more, which the GPU's cache may have, or which
move while a product is computed."""


class Work:
    """What a rank has to do for a micro-batch.

    Args:
        layers: how many it has.
        head: whether it has the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        setting: Setting,
        seq_length: int,
        reached: Mapping[str, float],
        layers: int,
        head: bool,
    ) -> None:
        self.config, self.setting, self.reached = config, setting, reached
        self.sizes = sizes = setting.sizes or Sizes(1, 1)
        self.tokens = setting.tokens / (sizes.context * sizes.tensor)  # of the stream, as ranks share it
        self.layers, self.head = layers, head
        self.vocabulary = (config.vocab_size or 0) * config.hidden_size
        in_layers = config.num_matmul_parameters() - self.vocabulary
        share = self.tokens * layers / config.num_layers
        self.in_layers = 2 * in_layers * share  # operations of the forward pass
        self.in_head = 2 * self.vocabulary * self.tokens * head
        self.in_attention = (config.train_flops_per_token(seq_length) - 6 * config.num_matmul_parameters()) / 3 * share
        self.learned = 1 if setting.adapters else 2
        """Products of the backward pass for each of the forward pass."""
        width = config.ffn_size if config.num_moe_experts is None else config.expert_size
        self.served = 1 if config.num_moe_experts is None else config.moe_router_topk
        self.F = self.served * width
        self.F1 = (2 if config.gated else 1) * self.F
        self.shards = sizes.data // sizes.replicate * sizes.context if setting.sizes is not None else 1
        weights, outside = self.layers * layer_weights(config, sizes), self.vocabulary / sizes.tensor
        self.gathered = weights * setting.of_layers / setting.of_weights + outside
        """What is gathered, as weights of those outside the layers."""
        self.summed = weights + outside if setting.fp8_all_gather else self.gathered
        """The same of what gradients are summed of."""
        matrices = 3 if config.gated else 2
        self.in_tiles = 2 * self.layers * self.tokens * matrices * config.hidden_size * self.F
        """Operations of the forward pass of the feed-forward."""
        self.in_second = self.in_tiles / matrices
        """Those of its second product."""
        values = (config.num_attention_heads + 2 * config.groups) * config.head_dim
        self.in_qkv = 2 * self.layers * self.tokens * config.hidden_size * values
        """Those of attention's first product."""
        by_compiler = isinstance(setting.recompute, int | float) and setting.recompute < 1
        self.chosen = computed_again(config, setting, sizes) if by_compiler else (0.0, False)
        """The part of the layers' products that the compiler has computed again, and whether it has attention."""
        self.QK = (config.num_attention_heads + config.groups) * config.head_dim

    def products(self, card: Card) -> float:
        """Seconds of matrix products. The loss has those of both passes in the forward pass."""
        recompute, again = self.setting.recompute, 0.0
        if recompute == "full":
            # The backward pass of a layer without a norm after its second product does not need what that gives.
            ended = self.setting.tiled_mlp is None and self.config.norm_placement == "pre"
            dense = self.config.num_moe_experts is None
            again = self.in_layers - (self.in_second if ended and dense else 0.0)
        elif self.setting.tiled_mlp is not None:
            again = self.in_tiles
        else:
            again = self.in_layers * self.chosen[0]
        if self.setting.tiled_attention is not None:  # queries, keys and values; and once more for a gradient of norms
            again += self.in_qkv * (1 if self.config.qk_layernorm is None else 2)
        compared = 1 if self.setting.compares else 0  # the forward pass through the reference
        operations = (1 + self.learned + compared) * self.in_layers + again
        of_layers = operations / self.reached["fp8" if self.setting.fp8 else "products"]
        even = (self.config.vocab_size or 0) % 8 == 0
        of_head = (1 + self.learned + compared) * self.in_head / self.reached["products" if even else "odd vocabulary"]
        return (of_layers + of_head) / card.flops

    def attention(self, card: Card) -> float:
        """Seconds of the attention kernels; the backward pass has five products for the two of the forward pass."""
        forward, backward = (self._attention(direction) for direction in ("forward", "backward"))
        again = forward if self.setting.recompute == "full" or self.chosen[1] else 0.0
        again += forward if self.setting.compares else 0.0
        return (forward + again + 2.5 * backward) / card.flops

    def _attention(self, direction: str) -> float:
        """The operations of the forward pass of attention over the part of the peak that is reached in a direction."""
        by_flex = self.setting.by_flex
        slower = by_flex / self.reached[f"FlexAttention, {direction}"]
        return self.in_attention * ((1 - by_flex) / self.reached[f"attention, {direction}"] + slower)

    def moved(self) -> float:
        """Bytes that memory-bound work reads and writes."""
        setting, C, b = self.setting, self.config.hidden_size, self.setting.of_products
        routed = 4 * self.served * C if self.config.num_moe_experts is not None else 0
        activation = (self.F1 + self.F) * (FUSED if setting.fused_mlp else 1)
        forward = 6 * C + 2 * self.QK + activation + routed
        backward = 12 * C + 2 * self.QK + 2 * activation + 1.5 * routed
        again = forward if setting.recompute is not None else 0
        if setting.tiled_mlp is not None:
            again = max(again, 3 * C + self.F1 + self.F)
        if setting.tiled_attention is not None:
            again += 2 * self.QK
        if setting.compares:
            again += forward
        values = self.layers * (forward + backward + again)
        if not setting.compiled:  # each operation reads and writes by itself
            values *= 2.6 if setting.of_weights == 4 else 2.0
        values += ADAPTED * setting.adapted * self.layers / self.config.num_layers
        # Compiled, it hides beside the head's products.
        logits = 3 if self.head and not setting.compiled else 0
        weights = self._of_weights()
        if setting.of_weights == 4 and b == 2:  # casts of weights, and of their gradients
            weights += 1.5 * (1 + setting.widened) * layer_weights(self.config, self.sizes) * self.layers
        if setting.quantizes:
            weights += nf4.DEQUANTIZED[setting.compiled] * self.layers * self._dequantized()
        if self.shards > 1:  # what is gathered is copied once more, and gradients become float32 to be summed
            weights += 8 * self.gathered + 12 * self.summed
        return self.tokens * (b * values + 8 * logits * (self.config.vocab_size or 0)) + weights

    def _of_weights(self) -> float:
        """Bytes that a micro-batch moves of weights that no other rank has a shard of, and of their gradients."""
        setting, sizes = self.setting, self.sizes
        # Sums over ranks are cast and added beside the computation, except those of a step of a pipeline.
        if setting.adapters or (self.shards > 1 and sizes.pipeline == 1):
            return 0.0
        batches, stored = setting.micro_batches, 2 if setting.precision == "bf16-true" else 4
        sums = 1 - 1 / batches
        moved = 3 * stored * sums  # gradients are added to others: two are read, one is written
        narrower = 2 * sums if setting.narrow else 0  # bfloat16 ones to float32 ones
        if setting.fsdp and setting.precision == "bf16-mixed":
            # FSDP2 casts layers when it gathers them, and their gradients afterwards.
            gathered = 1 / batches if sizes.pipeline > 1 else 1 + setting.reshard_after_forward
            moved += (4 + 2) * (1 + gathered)
        vocabularies = 1 if self.config.share_embeddings_and_output_weights or sizes.pipeline > 1 else 2
        layers = self.layers * layer_weights(self.config, sizes)
        return moved * (layers + vocabularies * self.vocabulary) - narrower * layers

    def inputs(self) -> float:
        """Bytes of the inputs of all layers."""
        return self.layers * self.tokens * self.config.hidden_size * self.setting.of_products

    def _dequantized(self) -> float:
        """The weights of a layer that a micro-batch dequantizes: each for each of its products, of each tile."""
        tiled = 0.0 if self.setting.tiled_mlp is None else mlp_weights(self.config, self.sizes)
        tiles = math.ceil(self.tokens / (self.setting.tiled_mlp or self.tokens))
        again = self.setting.recompute == "full"
        whole = (2 + again) * (layer_weights(self.config, self.sizes) - tiled)
        return whole + 3 * tiled * tiles

    def exchanged(self) -> Exchanges:
        """What ranks exchange of a micro-batch's activations and have to wait for."""
        sizes, b = self.sizes, self.setting.of_products
        stream = self.tokens * sizes.tensor * self.config.hidden_size * b
        found = []
        if sizes.tensor > 1:  # around both halves of a layer, in both passes
            again = not self.setting.adapters and not (self.setting.compiled and self.setting.recompute is None)
            times = 10 if again else 8  # once more for the weights' gradients, unless what was gathered is kept
            if self.setting.copies and sizes.tensor == 2 and not sizes.fsdp:
                # Copies hide the gathering behind products, and sums hardly (benchmarks/results/many_two_overlap.json).
                times = 4  # More ranks, and others that FSDP2 has beside them, were not measured.
            found.append((sizes.tensor, times * self.layers * stream * (sizes.tensor - 1) / sizes.tensor))
        if (exchanging := self.setting.exchanging) > 1:
            found.append((exchanging * sizes.tensor, 3 * self.layers * self.tokens * b * 2 * self.QK))
        if self.setting.ring > 1:  # the last rank's gradients of keys and values come back when all is computed
            found.append((sizes.context * sizes.tensor, self.layers * self._keys_and_values() * 4))
        if sizes.expert > 1:
            found.append((sizes.expert * sizes.context * sizes.tensor, 8 * self.layers * self.served * stream))
        if sizes.pipeline > 1:  # each stage passes on its output, and the gradient of its input
            of_rank = sizes.stages // sizes.pipeline * 2 * stream / sizes.tensor
            found.append((sizes.data * sizes.context * sizes.tensor * sizes.pipeline, of_rank))
        return found

    def passed_on(self) -> Exchanges:
        """What goes round of a micro-batch while attention computes."""
        sizes, ring, b = self.sizes, self.setting.ring, self.setting.of_products
        if ring == 1:
            return []
        again = self.setting.recompute == "full" or self.chosen[1]
        values = (ring - 1) * ((2 + again + self.setting.compares) * b + 4)  # and their gradients, in float32
        return [(sizes.context * sizes.tensor, self.layers * self._keys_and_values() * values)]

    def _keys_and_values(self) -> float:
        """How many keys and values of a layer a rank sends in a step of a ring."""
        return 2 * self.tokens * exchanged_keys(self.config, self.setting, self.sizes)

    def shared(self) -> Exchanges:
        """The parameters that ranks gather in a step and the gradients that they sum."""
        sizes, setting, b = self.sizes, self.setting, self.setting.of_products
        sums = 0 if setting.adapters else 4
        found = []
        if self.shards > 1:  # gathered for each micro-batch, and gradients summed in float32
            step = sizes.pipeline > 1
            kept = step or not setting.reshard_after_forward
            # The ranks of a pipeline add up a step's gradients before they are summed; and what is kept stays there.
            moved = b * (1 if kept else 2) * (1 if step else setting.micro_batches)
            moved += b * setting.micro_batches if setting.compares else 0
            summed = sums * (1 if step else setting.micro_batches)
            moved = moved * self.gathered + summed * self.summed
            found.append((self.shards * sizes.tensor, moved * (self.shards - 1) / self.shards))
        if sizes.replicate > 1:  # replicas sum their shards of a step's gradients
            moved = 2 * sums * self.summed / self.shards * (sizes.replicate - 1) / sizes.replicate
            found.append((sizes.data * sizes.context * sizes.tensor, moved))
        if sizes.pipeline > 1 and self.config.share_embeddings_and_output_weights:
            # The first and the last rank send each other their gradients.
            moved = sums * self.vocabulary / self.shards
            found.append((sizes.data * sizes.context * sizes.tensor * sizes.pipeline, moved))
        return found
