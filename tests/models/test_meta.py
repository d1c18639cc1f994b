"""Models without values."""

from __future__ import annotations

import torch

from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.models.meta import shapes_only

CONFIG = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=64, seq_length=16,
    num_moe_experts=4, moe_router_topk=2,
)  # fmt: skip


def test_shapes_are_those_of_the_model_and_no_number_is_drawn() -> None:
    made = Transformer(CONFIG)
    LoRA(rank=2, target_modules=["linear_qkv", "router"], dora=True).apply(made)
    state = torch.get_rng_state()
    with shapes_only():
        shapes = Transformer(CONFIG)
        LoRA(rank=2, target_modules=["linear_qkv", "router"], dora=True).apply(shapes)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in shapes.parameters())

    def described(transformer: Transformer) -> dict[str, tuple]:
        named = transformer.state_dict(keep_vars=True).items()
        return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in named}

    assert described(shapes) == described(made)
    assert torch.zeros(2).fill_(3.0).tolist() == [3.0, 3.0], "elsewhere all is as before"
