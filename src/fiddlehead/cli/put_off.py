"""Puts off imports of Lightning's that most commands do not need, until something of them is used.

Importing Lightning imports torchmetrics with all its metrics, for which transformers and matplotlib are imported where
they are installed, and PyTorch's compiler. They take half of the time of a `fiddlehead plan`. Lightning itself uses the
class `Metric` of the one, and asks of the other whether a module is an `OptimizedModule`. All private names that this
needs are in this file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_METRICS = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}
"""What Lightning takes from torchmetrics, and the modules that define it."""


def put_off() -> None:
    """From now on, importing Lightning imports neither the compiler nor the metrics; whoever uses them does."""
    if "lightning" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the two packages whose import is changed."""

    def __init__(self) -> None:
        self.imports: dict[str, Callable[[Callable[[], None]], None]] = {
            "lightning": _lightning,
            "torchmetrics": _torchmetrics,
        }

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of such a package, with a loader of ours around its own."""
        changed = self.imports.pop(fullname, None)
        spec = None if changed is None else importlib.util.find_spec(fullname)
        if changed is not None and spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, changed)
        return spec


class _Around(Loader):
    """A package's loader, and what is done around it."""

    def __init__(self, own: Loader, changed: Callable[[Callable[[], None]], None]) -> None:
        self.own, self.changed = own, changed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the package's module as its own loader does."""
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Imports the package; its own loader is put back first, as resources of the package are found by it."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.changed(lambda: self.own.exec_module(module))


def _lightning(imports: Callable[[], None]) -> None:
    """Imports Lightning with modules that stand for the two, and takes these away again."""
    standing = {}
    if "torchmetrics" not in sys.modules:
        standing["torchmetrics"] = _Metrics("torchmetrics")
    if "torch._dynamo" not in sys.modules:
        standing["torch._dynamo"] = _Compiler("torch._dynamo")
    sys.modules.update(standing)
    try:
        with _without_matplotlib():
            imports()
    finally:
        for name, module in standing.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _torchmetrics(imports: Callable[[], None]) -> None:
    """Imports all of torchmetrics, of which Lightning has imported a part without matplotlib."""
    imports()
    package = sys.modules["torchmetrics"]
    for name, module in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent == "torchmetrics":
            setattr(package, child, module)
    importlib.reload(sys.modules["torchmetrics.utilities.plot"])


class _StandIn(ModuleType):
    """Stands for a package while Lightning is imported. Anything that it does not have imports the package itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # there is nothing inside, so that nothing is imported from the inside

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for its file
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Metrics(_StandIn):
    """Stands for torchmetrics; its classes of metrics are the true ones."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        spec = PathFinder.find_spec(name)
        self.__path__ = [] if spec is None else list(spec.submodule_search_locations or ())
        self.__version__ = importlib.metadata.version(name)
        self._logger = logging.getLogger(name)

    def __getattr__(self, name: str) -> Any:
        if name not in _METRICS:
            return super().__getattr__(name)
        importlib.import_module("torchmetrics.utilities")  # which imports the metrics before it is complete
        return getattr(importlib.import_module(_METRICS[name]), name)


class _IsOptimizedModule(type):
    def __instancecheck__(cls, instance: object) -> bool:
        """Nothing is one before the compiler has been imported."""
        compiler = sys.modules.get("torch._dynamo")
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _Compiler(_StandIn):
    """Stands for PyTorch's compiler."""

    class OptimizedModule(metaclass=_IsOptimizedModule):
        """Stands for the class in Lightning's questions."""

    @staticmethod
    def disable(fn: Any, recursive: bool = True, *, reason: str | None = None) -> Any:
        """What `torch.compiler.disable` asks for; PyTorch's own way imports the compiler at the first call."""
        from torch._compile import _disable_dynamo

        return _disable_dynamo(fn, recursive)


@contextmanager
def _without_matplotlib() -> Iterator[None]:
    """Says to torchmetrics that matplotlib is not installed."""
    from lightning_utilities.core.imports import RequirementCache

    met = RequirementCache.__bool__
    RequirementCache.__bool__ = lambda self: self.requirement != "matplotlib" and met(self)
    try:
        yield
    finally:
        RequirementCache.__bool__ = met
