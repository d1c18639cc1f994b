"""Transformer language models: `TransformerConfig` says which, `Transformer` is the module."""

from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.transformer import Transformer

__all__ = ["Transformer", "TransformerConfig"]
