"""Attention with grouped key/value heads: one function, several kernels, a choice that explains itself.

- `attend`: what models call, and `watched`: of which kinds; `KVCache`: what a decoder keeps between calls
- `AttentionSpec`, `Target`: what a call needs, and where it would run
- `explain`, `select`: which backend serves a spec, and why the others do not
"""

from fiddlehead.attention.attend import attend, watched
from fiddlehead.attention.kv_cache import KVCache
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.selection import BACKENDS, CHOICES, Choice, explain, select
from fiddlehead.attention.spec import GPUS, AttentionSpec, Target

__all__ = [
    "BACKENDS",
    "CHOICES",
    "GPUS",
    "AttentionSpec",
    "Choice",
    "KVCache",
    "Package",
    "Packages",
    "Target",
    "attend",
    "explain",
    "select",
    "watched",
]
