"""Everything between text and a batch: tokenizers, token files, the sampler and the Lightning data module.

The names below are imported when they are first used, so that tokenizing text needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiddlehead.data.fine_tuning import FineTuningDataModule
    from fiddlehead.data.module import PreTrainingDataModule
    from fiddlehead.data.sampler import GlobalBatchSampler
    from fiddlehead.data.token_file import TokenFile
    from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, TokenizerFile

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "FineTuningDataModule",
    "GlobalBatchSampler",
    "PreTrainingDataModule",
    "TokenFile",
    "TokenizerFile",
]

_HOME = {
    "BPETokenizer": "tokenizers",
    "ByteTokenizer": "tokenizers",
    "FineTuningDataModule": "fine_tuning",
    "GlobalBatchSampler": "sampler",
    "PreTrainingDataModule": "module",
    "TokenFile": "token_file",
    "TokenizerFile": "tokenizers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
