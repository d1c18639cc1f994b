"""`fiddlehead attention explain` and `fiddlehead doctor`: which kernel serves a model, and which ones work here."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.attention_calls import calls_of_recipe
from fiddlehead.cli.common import (
    AllowOption,
    FactoryOption,
    WordsArgument,
    add_row,
    load_recipe,
    named_recipe,
    show,
    table,
)
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.numbers import count

if TYPE_CHECKING:
    from fiddlehead.attention import Choice, Packages, Target
    from fiddlehead.attention.tools.doctor import Finding, Report
    from fiddlehead.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="See which attention kernel serves a model, and why.")

DEFAULT_GPU = "h100"
"""The GPU to plan or explain a recipe for, if it trains on GPUs and this machine has none."""

DISTRIBUTIONS = {"flash2": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}
"""The name of each backend's package in the package index."""


@app.command("explain")
def explain(
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    gpu: str = typer.Option(None, "--gpu", metavar="NAME", help="The GPU, here or not, such as a100 or b200."),
    assume: list[str] = typer.Option(
        None, "--assume", metavar="NAME=VERSION", help="Assume this version, or none, of torch, cudnn or a flash-attn."
    ),
    as_json: bool = typer.Option(False, "--json", help="The same, for programs."),
    allow: list[str] = AllowOption,
) -> None:
    """Show which attention kernel serves each layer of a recipe's model, and why not the others.

    Without --gpu, the choice is for this machine's GPU, if there is one and the recipe uses one. For another GPU
    nothing is run: the installed versions are assumed, or those given with --assume.

    Example:  fiddlehead attention explain llama3_8b --gpu h100 --assume flash-attn-4=4.0.0b36
    """
    factory, edits = named_recipe(factory, words or (), "attention explain")
    recipe, name = load_recipe(factory, edits, allow or ())
    explained = _Explained(recipe, name, gpu, assume or ())
    if as_json:
        print(json.dumps(explained.to_dict(), indent=1))  # noqa: T201
    else:
        explained.show()
    if not all(served.choice.candidates for served in explained.served):
        raise typer.Exit(1)


def doctor(as_json: bool = typer.Option(False, "--json", help="The same, for programs.")) -> None:
    """Try every attention kernel on this machine, and say what to install.

    Each kernel runs forward and backward and is compared with the reference; so are those for the feed-forward. The
    exit code is 1 if a package is installed but broken, or if nothing works.
    """
    try:
        from fiddlehead.attention.tools.doctor import examine
        from fiddlehead.models import adapted_mlp, gated_mlp
    except (ImportError, OSError) as error:
        print(f"error: PyTorch cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None
    from rich.console import Console

    with Console(stderr=True).status("trying the kernels of this machine") as status:  # silent in a file or a pipe

        def trying(name: str) -> None:
            status.update(f"trying {name}; its kernels may have to be compiled first")

        report = examine(trying)
        feed_forwards = {
            name: _feed_forward(name, module, report, trying)
            for name, module in {"quack": gated_mlp, "triton": adapted_mlp}.items()
        }
    broken = [name for name, finding in feed_forwards.items() if finding.state == "broken"]
    healthy = report.healthy and not broken
    advice = report.advice + tuple(_REPAIRS[name] for name in broken)
    report = replace(report, findings=(*report.findings, *feed_forwards.values()), advice=advice)
    if as_json:
        print(json.dumps({**asdict(report), "healthy": healthy}, indent=1))  # noqa: T201
    else:
        facts, backends = table("", ""), table("backend", "version", "state", "relative error")
        facts.show_header = False
        for fact in report.facts.items():
            add_row(facts, *fact)
        for finding in report.findings:
            state = f"{finding.state}: {finding.detail}" if finding.detail else finding.state
            error = "" if finding.error is None else f"{finding.error:.1e}"
            add_row(backends, finding.backend, finding.version or "none", state, error)
        show(facts, "", backends, *(f"\n[bold]{_escaped(line)}[/bold]" for line in report.advice))
    if not healthy:
        raise typer.Exit(1)


_REPAIRS = {
    "quack": 'quack-kernels is installed but broken; install it again:  pip install --upgrade "fiddlehead[flash]"',
    "triton": "Triton's kernels are broken; install PyTorch again, which brings Triton:  pip install --upgrade torch",
}
"""What to do if a kernel for the feed-forward is broken."""


def _feed_forward(backend: str, module: Any, report: Report, progress: Callable[[str], None]) -> Finding:
    """The result for kernels of the feed-forward, after that for attention.

    Args:
        module: `gated_mlp` or `adapted_mlp`.
    """
    import torch

    from fiddlehead.attention import Target
    from fiddlehead.attention.tools.doctor import Finding, cuda_works
    from fiddlehead.models import mlp_choice

    name, works = f"{backend} (feed-forward{' with adapters' if backend == 'triton' else ''})", cuda_works()
    reason = mlp_choice.why_not_there(Target.of(torch.device("cuda" if works else "cpu")))
    if not works and any(each.state == "broken" for each in report.findings):
        reason = "not tried: CUDA does not work in this process"
    if reason is not None:
        return Finding(name, module.installed().version, "unavailable", reason)
    progress(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say to its developers
        package, error = module.tried()
    reason = module.why_not_installed(package)
    state = "works" if reason is None else "broken" if package.problem else "unavailable"
    return Finding(name, package.version, state, reason or "", error)


class _Explained:
    """The choices for a recipe's layers, and the facts that decided them."""

    def __init__(self, recipe: Recipe, name: str, gpu: str | None, assume: Sequence[str]) -> None:
        import torch

        from fiddlehead.plan.attention import explain_calls, on_longest

        calls = calls_of_recipe(recipe)
        self.name = name
        self.micro_batch_size: int = recipe.data.micro_batch_size
        self.seq_length = calls.seq_length
        self.calls = calls
        target, self.note, here = _target(str(recipe.trainer.accelerator), gpu)
        self.target = replace(target, packages=_assumed(target.packages, assume))
        installed_here = "installed here" if here else "installed here, assumed there"
        if torch.version.cuda is None and target.device_type == "cuda":
            installed_here += "; cuDNN as PyTorch for CUDA brings it"
        self.versions = (
            f"{_versions(self.target.packages)} ({'as --assume says, the rest ' * bool(assume)}{installed_here})"
        )
        self.served = explain_calls(calls, self.target)
        self.steps = on_longest(self.served)

    def memory(self, choice: Choice, backend: str) -> int:
        """The bytes that a layer needs in addition to q, k and v."""
        from fiddlehead.attention.tools.memory import extra_bytes

        device = self.target.device_type
        length = self.seq_length // self.calls.ring
        return extra_bytes(backend, choice.spec, self.micro_batch_size, length, device_type=device)

    def to_dict(self) -> dict[str, Any]:
        """What `show` prints, as JSON values: each of `layers` has a choice's `to_dict`, and its `backends` in order of
        preference."""
        return {
            "recipe": self.name,
            "note": self.note,
            "micro_batch_size": self.micro_batch_size,
            "seq_length": self.seq_length,
            "tensor_parallel": self.calls.tensor,
            "context_parallel": self.calls.context,
            "ring": self.calls.ring,
            "variables": dict(_variables()),
            "layers": [
                {
                    **served.to_dict(),
                    "backends": [
                        {
                            "name": name,
                            "verdict": verdict,
                            "reason": reason,
                            "extra_bytes": self.memory(served.choice, name),
                        }
                        for name, verdict, reason in served.choice.rows()
                    ],
                }
                for served in self.steps
            ],
            "other_calls": [served.to_dict() for served in self.served if served not in self.steps],
        }

    def show(self) -> None:
        """Prints the facts, a table for each spec of a training step, and the choices for other calls."""
        from fiddlehead.plan.attention import ranges, rows

        facts = table(self.name, f"{self.target.name}{f', sm{self.target.sm}' if self.target.sm else ''}: {self.note}")
        add_row(facts, "versions", self.versions)
        for fact in self._shares():
            add_row(facts, *fact)
        sequences = count(self.micro_batch_size, "sequence")
        add_row(
            facts,
            "memory",
            f"of one layer in a training step, beside q, k and v: {sequences} of {self.seq_length:,} tokens",
        )
        for variable, effect in _variables():
            add_row(facts, variable, effect)
        show(facts)
        for served in self.steps:
            show("", f"[bold]layers {ranges(list(served.layers))}[/bold]: {_escaped(str(served.choice.spec))}")
            self._show_choice(served.choice)
        if others := rows(self.served)[len(rows(self.steps)) :]:
            show("", "[bold]other calls[/bold]", *map(_escaped, others))

    def _shares(self) -> Iterator[tuple[str, str]]:
        """The rank's share of the model, if it does not have all of it."""
        from fiddlehead.plan.attention import ranges

        calls, config, spec = self.calls, self.calls.config, self.steps[0].choice.spec
        sizes = {"tensor_parallel": calls.tensor, "context_parallel": calls.context}
        parts = "whole sequences" if calls.ring == 1 else f"parts of the sequences, a ring of {calls.ring}"
        if split := " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1):
            yield (
                "each rank",
                f"attends with {spec.num_attention_heads} of {config.num_attention_heads} query heads and "
                f"{spec.num_query_groups} of {config.groups} key/value heads, on {parts} ({split})",
            )
        if calls.pipeline > 1:
            of_ranks = calls.on_pipeline_ranks(range(config.num_layers))
            listed = "; ".join(f"{rank}: layers {ranges(list(layers))}" for rank, layers in enumerate(of_ranks))
            yield "pipeline ranks", listed

    def _show_choice(self, choice: Choice) -> None:
        from rich.text import Text

        made = table("", "backend", "", "memory", "reason")
        made.columns[3].justify = "right"
        for name, verdict, reason in choice.rows():
            memory = (
                "" if verdict in ("dropped", "not asked for") and name != "reference" else self.memory(choice, name)
            )
            style = {"chosen": "bold green", "kept": ""}.get(verdict, "dim")
            mark = "->" if verdict == "chosen" else ""
            size = _size(memory) if isinstance(memory, int) else memory
            add_row(made, mark, Text(name, style), Text(verdict, style), Text(size, style), Text(reason, style))
        show(made)
        if not choice.candidates:
            show(f"nothing serves attention_backend={choice.asked!r}: the run would be refused")
        elif choice.measured:
            show("attention_backend='measured': the kept ones are timed when the run starts, all but the reference")


def _target(accelerator: str, gpu: str | None) -> tuple[Target, str, bool]:
    """Where the recipe would run, why that is assumed, and whether it is a device of this machine."""
    import torch

    from fiddlehead.attention import Target

    if gpu is not None:
        return Target.gpu(gpu), "as --gpu says, not tried out", False
    if accelerator == "cpu":
        return Target.of(torch.device("cpu")), "the recipe's trainer.accelerator", True
    if torch.cuda.is_available():
        return Target.of(torch.device("cuda")), "this machine's GPU", True
    if accelerator == "auto":
        return Target.of(torch.device("cpu")), "trainer.accelerator='auto', and there is no GPU here", True
    return Target.gpu(DEFAULT_GPU), "assumed, as there is no GPU here; --gpu NAME takes another", False


def _assumed(packages: Packages, assume: Sequence[str]) -> Packages:
    """The packages, with the versions that `--assume` gives."""
    from fiddlehead.attention import Package

    backends = {**{name: name for name in DISTRIBUTIONS}, **{label: name for name, label in DISTRIBUTIONS.items()}}
    for assumption in assume:
        name, equals, version = assumption.partition("=")
        known = ["torch", "cudnn", *DISTRIBUTIONS.values()]
        if not equals or not (version == "none" or re.match(r"\d+(\.\d+)*", version)):
            said = "expected NAME=VERSION or NAME=none, such as flash-attn=2.8.3"
            raise ConfigError(Problem(f"--assume {assumption}", message=said))
        if name in backends:
            packages = replace(packages, **{backends[name]: Package(None if version == "none" else version)})
        elif name == "cudnn" or (name == "torch" and version != "none"):
            packages = replace(packages, **{name: None if version == "none" else version})
        elif name == "torch":
            raise ConfigError(Problem("--assume torch=none", message="nothing runs without it"))
        else:
            raise ConfigError(Problem(f"--assume {assumption}", message=Problem.unknown("", name, "package", known)))
    return packages


def _versions(packages: Packages) -> str:
    found = {"torch": packages.torch, "cuDNN": packages.cudnn}
    found |= {label: getattr(packages, name).version for name, label in DISTRIBUTIONS.items()}
    return ", ".join(f"{name} {version or 'none'}" for name, version in found.items())


def _variables() -> Iterator[tuple[str, str]]:
    """Each environment variable that changes the choice, and how."""
    import os

    from fiddlehead.attention import switches

    for variable, backends in switches.by_variable().items():
        if os.environ.get(variable) == "0":
            yield f"{variable}=0", f"turns off {', '.join(backends)}"
    if os.environ.get(switches.DETERMINISM) == "0":
        yield f"{switches.DETERMINISM}=0", "asks for gradients that are the same each time"


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _escaped(text: str) -> str:
    """`text` escaped for rich, which would otherwise read brackets as markup."""
    from rich.markup import escape

    return escape(text)
