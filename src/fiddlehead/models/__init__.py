"""Transformer language models: `TransformerConfig` says which, `Transformer` is the module."""

from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.lora import LoRA
from fiddlehead.models.rope import LinearRopeScaling, LongRopeScaling, RopeScaling, YarnRopeScaling
from fiddlehead.models.transformer import Transformer

__all__ = [
    "LinearRopeScaling",
    "LoRA",
    "LongRopeScaling",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "YarnRopeScaling",
]
