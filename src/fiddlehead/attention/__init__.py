"""Attention with grouped key/value heads: one function, several kernels, and an explained choice of the kernel.

- `attend`: the function that models call; `watched` reports each kind of call; `KVCache`: keys and values of earlier
  tokens
- `AttentionSpec`, `Target`: the needs of a call, and the device that would run it
- `explain`, `select`: the backend for a spec, and why the others cannot serve it
- `BACKENDS`, `backend_choices`: the backends by name, and all values of `attention_backend`
- `register`, `unregister`: add your own backend, and remove it
"""

from fiddlehead.attention.attend import attend, watched
from fiddlehead.attention.backends import BACKENDS, register, unregister
from fiddlehead.attention.kv_cache import KVCache, advance_together, truncate_together
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.selection import Choice, backend_choices, explain, select
from fiddlehead.attention.spec import GPUS, AttentionSpec, Target

__all__ = [
    "BACKENDS",
    "GPUS",
    "AttentionSpec",
    "Choice",
    "KVCache",
    "Package",
    "Packages",
    "Target",
    "advance_together",
    "attend",
    "backend_choices",
    "explain",
    "register",
    "select",
    "truncate_together",
    "unregister",
    "watched",
]
