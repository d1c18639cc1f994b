"""Counts the parts of a compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func


class Graphs:
    """A backend for torch.compile that runs each graph as it is and keeps the names of its operators.

    It forgets what was compiled before, which might otherwise be taken for the next function's.
    """

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.names: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.names.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module.forward)

    def attention(self) -> list[list[str]]:
        """The attention operators of each graph."""
        words = ("attention", "fiddlehead")
        return [[name for name in names if any(word in name for word in words)] for names in self.names]
