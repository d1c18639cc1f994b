"""Attention with grouped key/value heads: one function, several kernels, a choice that explains itself.

- `attend`: what models call
- `AttentionSpec`, `Target`: what a call needs, and where it would run
- `explain`, `select`: which backend serves a spec, and why the others do not
"""

from fiddlehead.attention.attend import attend
from fiddlehead.attention.selection import BACKENDS, Choice, explain, select
from fiddlehead.attention.spec import AttentionSpec, Target

__all__ = ["BACKENDS", "AttentionSpec", "Choice", "Target", "attend", "explain", "select"]
