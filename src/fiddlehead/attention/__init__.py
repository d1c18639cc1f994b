"""Attention with grouped key/value heads: one function, several kernels, and an explained choice of the kernel.

- `attend`: what models call; `watched` tells of each kind of call; `KVCache`: what a decoder keeps between calls
- `AttentionSpec`, `Target`: what a call needs, and where it would run
- `explain`, `select`: which backend serves a spec, and why the others do not
- `BACKENDS`, `backend_choices`: the backends by name, and what may be asked for
- `register`, `unregister`: add a backend of your own, and take it away
"""

from fiddlehead.attention.attend import attend, watched
from fiddlehead.attention.backends import BACKENDS, register, unregister
from fiddlehead.attention.kv_cache import KVCache
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
    "attend",
    "backend_choices",
    "explain",
    "register",
    "select",
    "unregister",
    "watched",
]
