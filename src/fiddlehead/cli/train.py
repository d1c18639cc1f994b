"""`fiddlehead pretrain` and `finetune`: start a run, or many, from a recipe and edits."""

from __future__ import annotations

from pathlib import Path

import typer

from fiddlehead.cli.common import (
    AllowOption,
    DespiteOption,
    FactoryOption,
    WordsArgument,
    configure_executor,
    named_recipe,
    split_executor,
)
from fiddlehead.cli.completion import complete_run
from fiddlehead.cli.start import Request, start_run
from fiddlehead.cli.start_sweep import start_sweep
from fiddlehead.errors import ConfigError
from fiddlehead.files.paths import user_path

FINETUNE_HELP = """Train a pretrained model on examples of answers.

Recipes: [bold]full[/bold], [bold]lora[/bold], [bold]dora[/bold] and [bold]qlora[/bold] learn from messages, or \
prompts with completions; [bold]dpo[/bold] from pairs of answers; each for any model. A model's name, such as \
[bold]llama3_8b[/bold], is the recipe that fine-tunes it. What to begin with and what to learn are edits; the options \
are pretrain's.

Example:  fiddlehead finetune lora model.init_from=llama data.paths=answers.jsonl log.name=tuned

Example:  fiddlehead finetune "llama3_8b(peft_scheme='dora')" model.init_from=llama data.paths=answers.jsonl
"""


def pretrain(
    context: typer.Context,
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    dryrun: bool = typer.Option(False, "--dryrun", help="Check everything and show the plan; start nothing."),
    gpu: str = typer.Option(
        None, "--gpu", metavar="NAME", help="Plan for this GPU, such as h100; to start, where the GPU is not known."
    ),
    script: bool = typer.Option(
        False, "--script", help="With --dryrun: also print the scripts that executor=NAME would submit."
    ),
    fit: bool = typer.Option(
        False, "--fit", help="Take the fastest layout that fits the GPUs; the global batch stays. It says what changes."
    ),
    direct: bool = typer.Option(False, "--direct", help="Run in this process, without an executor."),
    detach: bool = typer.Option(False, "--detach", help="Return as soon as the job is submitted."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask before starting."),
    to_yaml: Path = typer.Option(
        None, "--to-yaml", metavar="FILE", parser=user_path, help="Write the resolved recipe; start nothing."
    ),
    after: list[str] = typer.Option(
        None, "--after", metavar="RUN", help="Start when this run has succeeded.", autocompletion=complete_run
    ),
    sweep: bool = typer.Option(False, "--sweep", help="A run for every combination of values: optim.lr=1e-3,3e-4"),
    zipped: bool = typer.Option(False, "--zip", help="With --sweep: pair the values instead."),
    max_running: int = typer.Option(None, "--max-running", min=1, help="With --sweep: the most runs at a time."),
    metric: str = typer.Option(
        "", "--metric", metavar="NAME", help="With --sweep: sort by this; by default val_loss or loss."
    ),
    allow: list[str] = AllowOption,
    despite: list[str] = DespiteOption,
) -> None:
    """Train a language model from scratch, or continue an interrupted run.

    [bold]Edits[/bold] change the recipe, in the order given; a value is read as the type of its field:

      trainer.max_steps=50   model.config.num_query_groups=1   optim.lr*=0.5

      data=@data.yaml   log.name=first

    [bold]executor=NAME[/bold] selects where it runs, executor.KEY=VALUE sets how:

      executor=local executor.ntasks_per_node=2   executor=slurm executor.nodes=2

      executor=docker executor.image=IMAGE

    With the log.name of an earlier run, the command continues that run from its newest checkpoint.

    Example:  fiddlehead pretrain tiny trainer.max_steps=50 log.name=first

    Example:  fiddlehead pretrain tiny_test optim.lr=1e-3,4e-3 model.config.num_query_groups=1,2 --sweep
    """
    if direct and (detach or after or sweep):
        other = "--detach" if detach else "--after" if after else "--sweep"
        raise ConfigError(f"--direct and {other} exclude each other: one stays in this process, the other leaves it")
    for option, given in (("--zip", zipped), ("--max-running", max_running), ("--metric", metric)):
        if given and not sweep:
            raise ConfigError(f"{option} goes with --sweep")
    if script and (sweep or to_yaml or not dryrun):
        raise ConfigError("--script goes with --dryrun, of one run")
    task = context.info_name or "pretrain"
    factory, edits = named_recipe(factory, words or (), task)
    edits, executor_edits = split_executor(edits)
    if gpu is not None and sweep:
        raise ConfigError("--gpu and --sweep exclude each other: --gpu plans one run")
    if direct and executor_edits:
        raise ConfigError(f"--direct runs without an executor; leave out {' '.join(executor_edits)}")
    executor, name = configure_executor(executor_edits)
    if gpu is not None and not (dryrun or to_yaml) and (direct or not executor.ships_code):
        raise ConfigError("--gpu goes with --dryrun here, as the run trains on the GPUs of this machine")
    if sweep and (to_yaml or after or fit):
        other = "--to-yaml" if to_yaml else "--after" if after else "--fit"
        raise ConfigError(f"--sweep and {other} exclude each other")
    request = Request(task, factory, edits, executor, name, dryrun, detach, yes, allow or (), despite or ())
    if sweep:
        start_sweep(request, zipped=zipped, max_running=max_running, metric=metric)
        return
    planned = executor if executor_edits or not (direct or gpu is not None) else None
    start_run(request, planned, gpu=gpu, fit=fit, direct=direct, to_yaml=to_yaml, script=script, after=after or ())
