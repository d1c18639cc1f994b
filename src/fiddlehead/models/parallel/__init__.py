"""One transformer on several processes: tensor, context, expert and pipeline parallelism.

A mesh has the dimensions that a run uses, of "dp_replicate", "dp_shard", "ep", "cp" and "tp". The processes along the
first three have different samples; those along "cp" and "tp" share each sequence: outside attention and feed-forward a
process holds T / (cp x tp) tokens of it, cp's parts of tp's parts. With a ring these are tokens from the beginning and
the end of the sequence (`SequenceSplit`).

The communication of each layer's forward pass, in bytes that each process sends; the backward pass sends as much again.
x is the size of a (B, T, C) tensor of whole sequences, B T C x 2 in bfloat16:

- Tensor parallel with sequence parallelism (Korthikanti et al. 2022): tokens are all-gathered before `linear_qkv` and
  `linear_fc1`, and the outputs of `linear_proj` and `linear_fc2` are reduce-scattered: 4 (tp - 1) / tp x / cp, and half
  as much again in the backward pass, which repeats the all-gather. Only these four layers are split. Experts, their
  router and all other modules are whole on every process, and work on its own tokens. An adapter sends as much with
  its rank in place of C: before `linear_qkv` and `linear_fc1`, the products with `lora_a` are gathered; after
  `linear_proj` and `linear_fc2`, they are reduce-scattered.
- Context parallel by all-to-all (Ulysses, Jacobs et al. 2023): around attention tokens are exchanged for heads, so that
  every kernel sees whole sequences: (cp - 1) / cp (2 H + 2 G) D / C x / (cp x tp), where G is at least cp x tp.
- Context parallel by a ring (Liu et al. 2023, `fiddlehead.models.ring`): each process keeps its queries, and keys and
  values go round: (cp - 1) 2 G D / C x / (cp x tp). In the backward pass their float32 gradients follow them, which is
  4 G D / C x / tp more. Attention hides most of it, and heads do not limit cp. Where they do not allow Ulysses with cp
  processes, neighbours exchange tokens for heads, and a ring goes through their groups.
- Expert parallel (Lepikhin et al. 2020): each token goes to the processes that have its experts, and back:
  2 k (ep - 1) / ep x / (cp x tp), with k experts for each token and an even load; and the counts, for which the host
  waits.

Once in each step: the gradients of parameters that are whole on several processes, see `reduce_gradients`. Parameters
stay plain local tensors, so FSDP2's `fully_shard` can shard them over the data-parallel dimensions (and cp) afterwards.
A `Layout` knows their places in the parameters of a single process, which have the same names.

Pipeline parallel: a process has one or more `Stage`s, which are consecutive layers that take about the same time, and
the whole batch. Between two stages, x / (cp x tp) travels forward for each micro-batch, and as much backward. Tied
embeddings are in the first and in the last stage, which exchange their gradients once in each step.
"""

from fiddlehead.models.parallel.gradients import reduce_gradients
from fiddlehead.models.parallel.layers import local_batch, parallelize
from fiddlehead.models.parallel.shards import (
    ContextMethod,
    Layout,
    fsdp_slices,
    length_divisor,
    local,
    refuse_sizes,
    ring_size,
    splits_over,
)
from fiddlehead.models.parallel.stages import (
    Stage,
    first_layers,
    is_tied,
    keep_stages,
    layers_of,
    rank_of_stage,
    refuse_stages,
    stage_of,
)

__all__ = [
    "ContextMethod",
    "Layout",
    "Stage",
    "first_layers",
    "fsdp_slices",
    "is_tied",
    "keep_stages",
    "layers_of",
    "length_divisor",
    "local",
    "local_batch",
    "parallelize",
    "rank_of_stage",
    "reduce_gradients",
    "refuse_sizes",
    "refuse_stages",
    "ring_size",
    "splits_over",
    "stage_of",
]
