"""Transformer language models: `TransformerConfig` says which, `Transformer` is the module."""

from fiddlehead.models.config import RopeScaling, TransformerConfig
from fiddlehead.models.transformer import Transformer

__all__ = ["RopeScaling", "Transformer", "TransformerConfig"]
