"""`Recipe`: the complete configuration of a run, which prints, compares, saves, loads and launches itself."""

from __future__ import annotations

import copy
import functools
import html
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import fiddle as fdl
from fiddle import history

from fiddlehead import notebook
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.foreign import MAX_TEXT, read_text
from fiddlehead.files.paths import user_path
from fiddlehead.recipe import in_nemo_run, nemo_names, reader, trust, writer
from fiddlehead.recipe.build import build_arguments
from fiddlehead.recipe.differences import Differences, differences
from fiddlehead.recipe.leaves import Leaf, leaves, show

history.add_exclude_location("nemo_run/config.py")  # run.Config(...) is set where it was written


class Recipe(fdl.Partial):
    """The complete configuration of a run: a task and its arguments.

    ``Recipe(pretrain, model=fdl.Config(...), trainer=fdl.Config(...))`` is a `fiddle.Partial` whose fields read and
    write as attributes: ``recipe.trainer.max_steps = 10``. A task whose parameters are named like a method of this
    class is refused.
    """

    __origin__ = in_nemo_run.ReturnType()

    def __str__(self) -> str:
        """One ``path = value`` a line, without the values that are left at their default."""
        lines = [f"{leaf.path} = {show(leaf.value)}" for leaf in leaves(self) if leaf.path]
        return "\n".join([f"# {show(fdl.get_callable(self))}", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A part for each argument of the task, which a reader opens; a table with where each value was set."""
        sources, parts = self.sources(), dict[str, list[Leaf]]()
        for leaf in leaves(self):
            if leaf.path:
                parts.setdefault(re.split(r"[.\[]", leaf.path)[0], []).append(leaf)
        shown = []
        for name, (first, *inner) in parts.items():
            rows = [(leaf.path, show(leaf.value), sources[leaf.path]) for leaf in inner or [first]]
            count = f", {len(inner)} value{'s' * (len(inner) > 1)}" if inner else ""
            content = notebook.table(("path", "value", "set in"), rows)
            shown.append(notebook.section(name, f"{show(first.value)}{count}", content))
        return f"{notebook.STYLE}<p>{html.escape(show(fdl.get_callable(self)))}</p>{''.join(shown)}"

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` loads back to an equal recipe.

        Raises:
            ConfigError: with every value that cannot be written: lambdas, live objects, tensors.
        """
        return writer.dump(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the YAML form to `path`, all or nothing."""
        path, text = user_path(path), self.to_yaml()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)

    @classmethod
    def from_yaml(cls, text: str, *, allow: Sequence[str] = (), source: str = "recipe.yaml") -> Self:
        """The recipe written in `text`; nothing that it names is called.

        It may name the parts that recipes are made of, and the user's own modules and names, ``package.module:name``,
        that are in `allow`. `source` stands for the text in errors and in `sources`.

        Raises:
            ConfigError: with the line and column of all that is wrong.
        """
        loaded = reader.load(text, allow=allow, source=source, task=True)
        if not isinstance(loaded, fdl.Partial):
            said = "not a recipe; its first keys must be _target_ and _partial_: true"
            raise ConfigError(Problem.in_file(source, said))
        return cls.__unflatten__(*loaded.__flatten__())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow: Sequence[str] = ()) -> Self:
        """The recipe saved at `path`; see `from_yaml`. A run that this user launched may use the names that it had."""
        try:
            text = read_text(user_path(path), MAX_TEXT)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path} cannot be read: {reason}") from error
        return cls.from_yaml(text, allow=(*allow, *trust.names(user_path(path), text)), source=str(path))

    def names_to_allow(self) -> list[str]:
        """The user's own names, ``package.module:name``, that `allow` must have when the recipe is loaded."""
        return writer.unlisted(self)

    def diff(self, other: fdl.Buildable) -> Differences:
        """The paths where `other` has another value, lacks or adds a configuration, or shares one differently."""
        return differences(self, other)

    def __eq__(self, other: object) -> bool:
        """Whether both configure the same call; subclasses of Fiddle's classes and the history do not count."""
        return isinstance(other, fdl.Buildable) and not self.diff(other)

    def sources(self) -> dict[str, str]:
        """Where each value was set: ``recipes/llama.py:12``, ``command line: optim.lr=1e-3`` or ``default``."""
        return {leaf.path: _source(leaf) for leaf in leaves(self, defaults=True) if leaf.path}

    def build_arguments(self) -> dict[str, Any]:
        """The task's arguments, built; a configuration used twice is built once.

        Objects whose arguments failed are not built.

        Raises:
            ConfigError: with all problems of all constructors, each with its path.
        """
        return build_arguments(self)

    def launch(self, executor: Any = None, **kwargs: Any) -> Any:
        """Runs the recipe where `executor` says; see `fiddlehead.launch.launch`."""
        from fiddlehead import launch

        return launch.launch(self, executor, **kwargs)

    def plan(self, executor: Any = None, *, gpu: str | None = None) -> Any:
        """Everything known about a run before it starts, as a table in a notebook; see `fiddlehead.launch.plan`.

        Args:
            gpu: plan for this GPU, which need not be here, such as "h100".
        """
        from fiddlehead import launch

        return launch.plan(self, executor, target=gpu)

    def fitted(self, executor: Any = None, *, gpu: str | None = None, nodes: int | None = None) -> Recipe:
        """The recipe with the fastest layout that fits its GPUs; `recipe.diff(fitted)` says what changed.

        A layout is the micro-batch, what is computed again, and how the GPUs share samples, layers, sequences and
        experts. The global batch and the objective stay.

        Args:
            gpu: the GPU that trains, which need not be here, such as "h100"; by default this machine's.
            nodes: train on so many nodes, instead of the recipe's.

        Raises:
            ConfigError: no layout fits.
        """
        from fiddlehead import launch

        recipe = self.clone()
        if nodes is not None:
            recipe.trainer.num_nodes = nodes
        return launch.fitted(recipe, launch.search(recipe, executor, target=gpu)[0])

    def clone(self) -> Self:
        """A deep copy. NeMo-Run's experiments ask for one of each task that is added."""
        in_nemo_run.join_experiments(Recipe)
        return copy.deepcopy(self)

    @property
    def is_training(self) -> bool:
        """Whether it configures one of our own tasks, which train in a run directory."""
        return fdl.get_callable(self).__module__ == "fiddlehead.tasks"

    def __build__(self, *args: Any, **kwargs: Any) -> Any:
        """A call that runs the recipe: as `launch` in this process, for one that trains."""
        return functools.partial(self.launch) if self.is_training else super().__build__(*args, **kwargs)

    @property
    def is_lazy(self) -> bool:
        """False: there is nothing to resolve. NeMo-Run asks just before it checks for its own classes."""
        in_nemo_run.register(Recipe)
        return False

    def __init_callable__(self, fn_or_cls: Any) -> None:
        super().__init_callable__(fn_or_cls)
        in_nemo_run.join_experiments(Recipe)
        clashes = [name for name in self.__signature_info__.valid_param_names if name in vars(Recipe)]
        if clashes:
            raise ConfigError(f"{show(fn_or_cls)} has a parameter {clashes[0]!r}, which is a method of Recipe")

    def __setattr__(self, name: str, value: Any) -> None:
        value = str(value) if isinstance(value, nemo_names.Text) else value
        try:
            super().__setattr__(name, value)
        except AttributeError:
            raise AttributeError(self._unknown(name)) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            value = super().__getattr__(name)
            return nemo_names.Text(value) if name == "resume" and type(value) is str else value
        except AttributeError:
            names = self.__signature_info__.valid_param_names
            raise AttributeError(f"{name} is not set" if name in names else self._unknown(name)) from None

    def _unknown(self, name: str) -> str:
        found = nemo_names.nemo_hint(fdl.get_callable(self), name)
        return found or Problem.unknown("", name, "field", self.__signature_info__.valid_param_names)


def _source(leaf: Leaf) -> str:
    if leaf.is_default:
        return "default"
    entries = leaf.owner.__argument_history__[leaf.key]
    if not entries:
        return "unknown"
    location = entries[-1].location
    if not location.line_number:  # not a file: the command line
        return location.filename
    path = Path(location.filename)
    for root in (Path.cwd(), *map(Path, sys.path)):
        if path.is_absolute() and root.is_absolute() and path.is_relative_to(root):
            path = path.relative_to(root)
            break
    return f"{path}:{location.line_number}"


nemo_names.explain_in_fiddle()
in_nemo_run.register(Recipe)  # for NeMo-Run's own runner, which loads NeMo-Run first
