"""What one layer of a transformer keeps from its forward to its backward pass, in bytes of a token."""

from __future__ import annotations

from dataclasses import dataclass

from fiddlehead.models import TransformerConfig, nf4
from fiddlehead.models.mlp_choice import RECOMPUTED
from fiddlehead.models.speed import Recompute
from fiddlehead.plan.partitioned import Chosen, choose
from fiddlehead.training.distributed.pipeline import Schedule
from fiddlehead.training.distributed.sizes import Sizes


@dataclass(frozen=True)
class Setting:
    """How a rank trains, besides the model's shape."""

    tokens: int
    """Of a micro-batch, in whole sequences."""
    sequences: int = 1
    """Of a micro-batch."""
    precision: str = "bf16-mixed"
    compiled: bool = True
    recompute: Recompute | None = None
    fp8: bool = False
    fp8_all_gather: bool = False
    """The weights of the layers' products are gathered in float8."""
    tiled_mlp: int | None = None
    """The tokens of a rank for which the feed-forward is computed at a time; None: for all at once."""
    tiled_attention: int | None = None
    """The key/value heads for which attention is computed at a time; None: for all at once."""
    offloads: bool = False
    """Layers' inputs are in main memory between the passes."""
    micro_batches: int = 1
    """How many of them are accumulated in a step."""
    adapters: bool = False
    """Only adapters are trained; in mixed precision the rest is bfloat16."""
    rank: int = 0
    """Of the adapters; 0: there are none."""
    adapted: int = 0
    """The inputs and outputs of all layers that have adapters, in values of a token."""
    compares: bool = False
    """Preferences are learned: each micro-batch first passes through the reference, and the loss has all logits."""
    quantizes: bool = False
    """The weights of the layers' products are in NF4, and dequantized for each product."""
    sizes: Sizes | None = None
    """The ranks of `Parallel`; None if each rank has all parameters."""
    reshard_after_forward: bool = True
    overlaps: bool = False
    """Ranks that share layers may copy from the memories of each other's GPUs while they compute; see `copies`."""
    ring: int = 1
    """Parts of a sequence whose keys and values go round between the ranks that share it."""
    by_flex: float = 0.0
    """The part of the layers whose attention PyTorch's FlexAttention computes, which is slower."""
    schedule: Schedule = "1F1B"
    """Of a pipeline."""
    fuses: bool = False
    """Kernels compute SwiGLU and what is around it, where `recompute` goes with them."""
    bfloat16_gradients: bool = False
    """A micro-batch makes bfloat16 gradients of the layers' products; see `narrow`."""
    joins: bool = True
    """An embedding adds its gradient to the output layer's in place, where they share a weight."""

    @property
    def fused_mlp(self) -> bool:
        """Whether kernels compute SwiGLU, so that its result is not kept."""
        return self.fuses and self.recompute in RECOMPUTED

    @property
    def narrow(self) -> bool:
        """Whether it does so, where it computes no layer again."""
        return self.bfloat16_gradients and self.recompute is None

    @property
    def widened(self) -> float:
        """The part of a step's micro-batches whose gradients of the layers' products become float32.

        Of several narrow ones it is the first, to which the others are added.
        """
        if not self.narrow:
            return 1.0
        return 1 / self.micro_batches if self.micro_batches > 1 else 0.0

    @property
    def copies(self) -> bool:
        """Whether ranks that share layers do so, which they do not where the compiler has a budget."""
        return self.overlaps and not isinstance(self.recompute, int | float)

    @property
    def exchanging(self) -> int:
        """How many ranks exchange tokens for heads around attention."""
        return 1 if self.sizes is None else self.sizes.context // self.ring

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 has the parameters, and casts them."""
        return self.sizes is not None and self.sizes.fsdp

    @property
    def of_products(self) -> int:
        """Bytes of a value that goes into a product."""
        return 4 if self.precision == "32-true" else 2

    @property
    def of_weights(self) -> int:
        """Bytes of a weight as the modules see it, whole or gathered, and so of what goes into a norm."""
        halved = self.precision == "bf16-mixed" and (self.adapters or self.fsdp)
        return 2 if halved or self.precision == "bf16-true" else 4

    @property
    def of_layers(self) -> float:
        """Bytes of a weight of the layers' products, whole or gathered."""
        if self.quantizes:
            return nf4.BITS / 8
        return 1 if self.fp8_all_gather else self.of_weights


def exchanged_keys(config: TransformerConfig, setting: Setting, sizes: Sizes) -> int:
    """The width of all keys where ranks exchange heads: with fewer heads than ranks, several have the same."""
    return max(config.groups, setting.exchanging * sizes.tensor) * config.head_dim


class _Layer:
    """The widths of a layer's tensors in values of a token, and what their lists add up to in bytes."""

    def __init__(self, config: TransformerConfig, setting: Setting, sizes: Sizes) -> None:
        self.config, self.setting, self.sizes = config, setting, sizes
        self.b = setting.of_products
        self.C = config.hidden_size
        self.Q = config.num_attention_heads * config.head_dim
        self.K = max(config.groups, sizes.tensor) * config.head_dim  # fewer heads than ranks are held in copies
        served = 1 if config.num_moe_experts is None else config.moe_router_topk
        width = config.ffn_size if config.num_moe_experts is None else config.expert_size
        self.F = served * width
        self.F1 = (2 if config.gated else 1) * self.F
        self.kept_activations = 0 if setting.fused_mlp else self.F
        """What SwiGLU gives is not kept where the backward pass computes it on the way."""
        self.routed = 0 if config.num_moe_experts is None else 2 * served * self.C  # the experts' input and output
        self.lse = 4 * config.num_attention_heads

    @property
    def qkv(self) -> int:
        return self.Q + 2 * self.K

    @property
    def turned(self) -> int:
        """Queries and keys after their norm and their rotation, a tensor of its own if there are any."""
        changed = self.config.position_embedding_type == "rope" or self.config.qk_layernorm is not None
        return self.Q + self.K if changed else 0

    @property
    def rotated(self) -> int:
        """Of these, those that are kept in the place of a view of what the product gave."""
        return self.turned if self.config.qk_layernorm is None else 0

    @property
    def attention(self) -> int:
        """What attention keeps, in bytes."""
        if self.setting.tiled_attention is not None:
            return self.b * self.Q + self.lse
        if self.setting.exchanging > 1:  # q, k and v as they were exchanged; what attention gave, before and after
            K = exchanged_keys(self.config, self.setting, self.sizes)
            return self.b * (self.Q + 2 * K + 2 * self.Q) + self.lse
        return self.b * (self.qkv + self.turned + self.Q) + self.lse

    @property
    def norms(self) -> int:
        """How many norms of the stream there are."""
        return 4 if self.config.norm_placement == "both" else 2

    @property
    def scales(self) -> int:
        """The norms' float32 factors, of each token and, where heads have norms, of each head."""
        return self.scale * self.norms + self.scales_of_heads

    @property
    def scale(self) -> int:
        """The factors of one norm of the stream."""
        return 8 if self.config.normalization == "LayerNorm" else 4

    @property
    def norms_heads(self) -> bool:
        """Whether autograd sees norms of queries and keys, and keeps their inputs and factors."""
        return self.config.qk_layernorm is not None and self.setting.tiled_attention is None

    @property
    def scales_of_heads(self) -> int:
        """The factors of the norms of queries and keys."""
        heads = {"head": self.config.num_attention_heads + self.config.groups, "projection": 2}
        return 4 * heads[self.config.qk_layernorm] if self.config.qk_layernorm and self.norms_heads else 0

    @property
    def projected(self) -> int:
        """What the first product of attention gives, where it is kept as such."""
        return self.qkv if self.setting.tiled_attention is None else 0

    @property
    def masks(self) -> int:
        """Of the two dropouts, a byte a value."""
        return 2 * self.C if self.config.hidden_dropout else 0

    @property
    def all_compiled(self) -> int:
        """Everything that the compiler keeps if nothing is to be computed again."""
        # The input, the output of the first norm, the middle of the layer and the output of its norm; with norms after
        # the products alone, their outputs instead of the norms'; with norms before and after all but the middle.
        streams = 5 if self.config.norm_placement == "both" else 4
        feed_forward = self.b * (streams * self.C + self.F1 + self.kept_activations + self.routed)
        return feed_forward + self.attention + self.scales + self.masks + self.gathered + self.reordered

    @property
    def gathered(self) -> int:
        """What the compiler keeps of the inputs of products that NCCL gathered, in bytes; others come again."""
        splits = self.setting.compiled and not self.setting.adapters and not self.setting.copies
        return self.b * 2 * (self.sizes.tensor - 1) * self.C if splits else 0

    @property
    def reordered(self) -> int:
        """What attention gave once more, in the order in which ranks share sequences; one sequence needs no other."""
        splits = self.sizes.tensor > 1 and not self.setting.adapters and self.setting.tiled_attention is None
        return self.b * self.Q if splits and self.setting.sequences > 1 else 0

    @property
    def all_eager(self) -> int:
        """Everything that autograd keeps, operation by operation."""
        products = 2 * self.C + self.F1 + self.activated * self.kept_activations + self.routed
        into_norms = self.setting.of_weights * self.norms * self.C
        if self.norms_heads:
            into_norms += self.setting.of_weights * (self.Q + self.K)
        return self.b * products + into_norms + self.attention + self.scales + self.masks + self.reordered

    @property
    def activated(self) -> int:
        """How many tensors of the feed-forward's width autograd keeps from the activation on."""
        return {"gelu": 1, "squared_relu": 1, "clamped_swiglu": 5}.get(self.config.activation, 2)

    @property
    def normed_after(self) -> bool:
        """Whether the backward pass of a norm reads what the last products of attention and the feed-forward give."""
        return self.config.norm_placement != "pre"

    @property
    def attention_sublayer(self) -> int:
        """Everything that is kept of a layer whose feed-forward is tiled; with the middle, the tiles' input."""
        of_half = self.scale * self.norms // 2 + self.scales_of_heads + self.masks // 2
        if self.setting.compiled:
            streams = 4 if self.config.norm_placement == "both" else 3
            return self.b * streams * self.C + self.attention + of_half
        into_norms = self.setting.of_weights * self.norms // 2 * self.C
        if self.norms_heads:
            into_norms += self.setting.of_weights * (self.Q + self.K)
        return self.b * 2 * self.C + into_norms + self.attention + of_half

    def tile(self) -> float:
        """Bytes of a token of the tile at work in the backward pass: what it keeps, and the gradients inside it."""
        of_half = self.scale * self.norms // 2 + self.masks // 2
        if self.setting.compiled:
            streams = 2 if self.config.norm_placement == "both" else 1
            return self.b * (streams * self.C + self.F1 + self.F) + of_half + self.inside()
        into_norms = self.setting.of_weights * self.norms // 2 * self.C
        products = self.b * (self.C + self.F1 + self.activated * self.F)
        return products + into_norms + of_half + self.inside()

    def inside_attention(self) -> float:
        """Bytes of the gradients inside the attention part: of what it gave, and of queries, keys and values twice.

        The kernels add up the queries' gradient in float32. So does a ring, with the keys and values of two ranks, and
        their gradients in float32: what is there and what is on its way. In tiles of heads these are a tile's, beside
        the gradients of what the first product gave; when all tiles are done, its input's gradient takes their place.
        """
        if (n := self.setting.tiled_attention) is not None:
            tile = (self.b * 2 * (self.Q + self.qkv) + 4 * self.Q) * n / self.config.groups
            freed = self.Q if self.setting.recompute == "full" else 0  # what attention gave
            return self.b * self.qkv + max(tile, self.b * (self.C - freed))
        exchanged = self.Q + 2 * self.K if self.setting.exchanging > 1 else 0
        found = self.b * (self.Q + 2 * self.qkv + exchanged) + 4 * self.Q
        if self.setting.ring > 1:
            K = exchanged_keys(self.config, self.setting, self.sizes)
            found += 4 * self.Q + 2 * (self.b + 4) * 2 * K
        return found

    def kept(self) -> float:
        """Bytes from the forward to the backward pass."""
        b, C, recompute = self.b, self.C, self.setting.recompute
        if self.setting.offloads:
            return 0
        if self.setting.tiled_mlp is not None:
            if recompute == "full":
                return b * C
            read = C if self.normed_after or not self.setting.compiled else 0
            selected = b * (2 * C + self.projected + self.Q + read) + self.lse
            return selected if recompute == "selective" else self.attention_sublayer
        everything = self.all_compiled if self.setting.compiled else self.all_eager
        if self.setting.fp8 and recompute is None:  # products' inputs are cast anew
            return b * (2 * C + self.F1 + self.routed) + self.attention + self.scales
        products = b * (self.projected + self.Q + C + self.F1 + self.routed // 2) + self.lse
        if recompute is None or recompute == 1:
            return everything
        if recompute == "selective":
            down = self.normed_after and self.config.num_moe_experts is None
            return b * C + products + (b * C if down or not self.setting.compiled else 0)
        if recompute == "full":
            # What NCCL has moved between ranks is not computed again in a compiled layer, nor what follows from it.
            if self.sizes.tensor > 1 and self.setting.compiled and not self.setting.copies:
                return b * C + products
            if self.setting.exchanging > 1 and self.setting.compiled:
                return b * (C + self.qkv + self.Q)
            return b * C
        chosen = self.chosen()
        of_products = {"qkv": self.qkv + self.rotated, "out": C, "up": self.F1, "down": C}
        kept = b * (C + sum(of_products[name] for name in chosen.products))
        if chosen.attention:
            kept = everything if chosen.cheap else everything - self.cheap
        return max(kept, b * C + products) if self.sizes.tensor * self.sizes.context > 1 else kept

    @property
    def cheap(self) -> int:
        """What the compiler computes again first: activations, outputs of norms before products, experts' outputs."""
        norms = 0 if self.gathered else 1 if self.config.norm_placement == "post" else 2
        return self.b * (self.F + norms * self.C + self.routed // 2)

    def outputs(self) -> dict[str, int]:
        """The values of the outputs that the backward pass needs, of products that the compiler counts as expensive.

        It does not count those of experts.
        """
        outputs = {"qkv": self.qkv, "out": self.C}
        if self.config.num_moe_experts is None:
            outputs["up"] = self.F1
            if self.normed_after:
                outputs["down"] = self.C
        return outputs

    def flops(self) -> dict[str, float]:
        """The multiplications of each of them, and of "down"."""
        return {
            "qkv": self.C * self.qkv,
            "out": self.Q * self.C,
            "up": self.C * self.F1,
            "down": self.F * self.C,
        }

    def chosen(self) -> Chosen:
        """What the compiler keeps besides the input where it may keep a part."""
        assert isinstance(self.setting.recompute, int | float)
        b = self.b
        all = self.all_compiled - b * (self.C + self.rotated)
        dear = all - self.cheap
        # Weights that are cast in the layer are an input, and if all is kept, their copies are in their place.
        all += (b - self.setting.of_weights) * layer_weights(self.config, self.sizes) / self.setting.tokens
        outputs = {name: b * size for name, size in self.outputs().items()}
        return choose(self.setting.recompute, all, dear, outputs, self.flops())

    def again(self) -> float:
        """Bytes that the backward pass computes again before the feed-forward's: its own, or those of all the layer."""
        recompute, everything = self.setting.recompute, self.all_compiled if self.setting.compiled else self.all_eager
        if self.setting.tiled_mlp is not None:
            return max(self.attention_sublayer - self.kept(), 0.0)
        missing = max(everything - self.kept(), 0.0)
        if recompute == "full" or not self.setting.compiled:
            return missing
        if isinstance(recompute, int | float) and recompute != 1 and not self.chosen().attention:
            return missing
        return min(missing, self.b * (self.C + self.F))

    def inside(self) -> float:
        """Bytes of the gradients inside the feed-forward part, less what they take the place of."""
        recomputes = self.setting.recompute == "full" or self.setting.tiled_mlp is not None
        width = self.F1 if self.setting.compiled or not self.config.gated else 2 * self.F
        if (self.setting.compiled and recomputes) or self.setting.fused_mlp:
            width = self.F1 + self.F
        if self.setting.adapters and self.setting.fused_mlp:
            # Parts of a sum in float32, one for 64 columns of the width.
            return self.b * width + 4 * self.setting.rank * self.F / 64
        if self.setting.adapters:
            # An adapter's change of the first product; or what its gradient needs of the second's.
            width += self.F1 if recomputes else self.F
        return self.b * width


def of_layer(config: TransformerConfig, setting: Setting, sizes: Sizes) -> tuple[float, float, float]:
    """What a layer keeps, what it computes again, and the gradients inside it: bytes of a token.

    Ranks that share layers share each of its tensors, so that a rank has tokens over ranks times these.

    With a number for `recompute` the compiler chooses what to keep: see `fiddlehead.plan.partitioned`.
    """
    layer = _Layer(config, setting, sizes)
    return layer.kept(), layer.again(), layer.inside()


def computed_again(config: TransformerConfig, setting: Setting, sizes: Sizes) -> tuple[float, bool]:
    """The part of a layer's products that its backward pass computes again, and whether it computes attention again.

    It is for a number as `recompute`, of which the compiler makes a choice.
    """
    layer = _Layer(config, setting, sizes)
    chosen, flops = layer.chosen(), layer.flops()
    if chosen.attention:
        return 0.0, False
    again = sum(flops[name] for name in {"up", *layer.outputs()} - chosen.products)
    return again / sum(flops.values()), True


def of_tiled_layer(config: TransformerConfig, setting: Setting, sizes: Sizes) -> tuple[float, float]:
    """Bytes of a token inside the backward pass of a tile of the feed-forward, and inside that of attention."""
    layer = _Layer(config, setting, sizes)
    return layer.tile(), layer.inside_attention()


def layer_weights(config: TransformerConfig, sizes: Sizes) -> float:
    """The weights of a layer's products on a rank: of its tensor-parallel part and its experts."""
    H, G, D, C = config.num_attention_heads, max(config.groups, sizes.tensor), config.head_dim, config.hidden_size
    attention = (C * (H + 2 * G) * D + H * D * C) / sizes.tensor
    router = 0 if config.num_moe_experts is None else C * config.num_moe_experts
    return attention + mlp_weights(config, sizes) + router


def halved_gradients(config: TransformerConfig, setting: Setting) -> float:
    """The bytes by which the gradients of a step are less than float32 ones."""
    return 0.0 if setting.widened else 2 * layer_weights(config, Sizes(1, 1)) * config.num_layers


def mlp_weights(config: TransformerConfig, sizes: Sizes) -> float:
    """The weights of the feed-forward's products on a rank."""
    return (3 if config.gated else 2) * second_product(config, sizes)


def largest_product(config: TransformerConfig) -> int:
    """The weights of the largest product of a layer without experts."""
    heads = (config.num_attention_heads + 2 * config.groups) * config.head_dim
    return config.hidden_size * max(heads, (2 if config.gated else 1) * config.ffn_size)


def second_product(config: TransformerConfig, sizes: Sizes) -> float:
    """The weights of the feed-forward's second product on a rank."""
    if config.num_moe_experts is None:
        return config.hidden_size * config.ffn_size / sizes.tensor
    return config.hidden_size * config.expert_size * config.num_moe_experts / sizes.expert
