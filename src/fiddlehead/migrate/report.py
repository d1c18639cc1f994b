"""What a script has become."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field


@dataclass
class Migrated:
    """The files that a script becomes, and what was done with its lines."""

    recipe: str = ""
    launch: str = ""
    lines: list[tuple[int, str, str]] = field(default_factory=list)
    """For each line of the script that matters: its number, what stood there, what has become of it."""
    steps: list[str] = field(default_factory=list)
    """What the user is to do: commands."""

    def say(self, node: ast.AST, done: str) -> None:
        """Records what became of a node of the script."""
        text = ast.unparse(node).split("\n")[0]
        line = (getattr(node, "lineno", 0), text if len(text) <= 100 else f"{text[:97]}...", done)
        if line not in self.lines:
            self.lines.append(line)

    def step(self, command: str) -> None:
        """Adds a command, once."""
        if command not in self.steps:
            self.steps.append(command)
