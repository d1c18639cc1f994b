"""Lines of a script that set a field of a recipe, under the names of this package."""

from __future__ import annotations

import ast
import shlex

from fiddlehead.errors import ConfigError
from fiddlehead.migrate.scope import CONFIGS, Scope, last_name, made_by
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.nemo_names import NAMES, answer, names_at
from fiddlehead.recipe.slots import find_slot

NAMED = {name.nemo: name for name in NAMES}
PARTS = ("data", "optim", "log", "resume", "trainer", "model")
"""The parts of a recipe that NeMo's scripts replace."""
DATA = {
    "MockDataModule": "random data: `fiddlehead bench --random-tokens` times it; to train, set data.paths",
    "PreTrainingDataModule": "its fields, in lines of their own",
    "FineTuningDataModule": "its fields, in lines of their own",
}
"""What to do about the data modules of a script; another one's data is downloaded by the user."""
SIZES = {"seq_length": 2048, "micro_batch_size": 4, "global_batch_size": 8}
"""What NeMo's data modules have where nothing else is given."""
DOWNLOADED = "download its data as JSONL or Parquet, and set data.paths"
LORA = {"dim": "rank", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"}
"""NeMo's names of a LoRA's fields that have a counterpart."""
WANDB = ("project", "entity", "group", "tags", "notes")
"""The fields of `WandbLogger` that `log` has too."""
FLAGS = ("log.tensorboard", "log.wandb", "data.packed_sequence_specs")
"""Fields that are objects in NeMo's recipes, and true or false here."""
TEMPLATED = ("chat", "use_hf_tokenizer_chat_template", "answer_only_loss")
"""Keys of `dataset_kwargs` that are always so: conversations have the chat template, and answers have the loss."""
ALIASES = {
    "log.dir": "log.log_dir",
    "log.tensorboard_logger": "log.tensorboard",
    "log.wandb_logger": "log.wandb",
    "trainer.logger": "log.extra_loggers",
    "optim.optimizer_config": "optim.config",
}
"""Other names of NeMo's fields: arguments of its functions that make a part."""
LIGHTNING = (
    "BatchSizeFinder", "DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "Timer", "TQDMProgressBar"
)  # fmt: skip
"""The callbacks of Lightning's that a recipe may have."""
CALLBACKS = {
    "TimingCallback": "leave it out: the time of each step is in the metrics",
    "GarbageCollectionCallback": "leave it out: garbage is collected in step here",
    "MegatronCommOverlapCallback": "leave it out: communication overlaps with the steps here",
    "ModelCheckpoint": "its fields, in lines of their own",
    "PreemptionCallback": "leave it out: a run saves its step before it is stopped",
    "NsysCallback": "log.nsys='10:12' profiles these steps",
    "MemoryProfileCallback": "log.profile='10:12' profiles these steps, with each allocation",
    "DDPParityChecker": "leave it out: weights are sharded, so there are no copies",
    "MegatronTokenDropCallback": "leave it out: no token is dropped",
    "LearningRateMonitor": "leave it out: the learning rate is in the metrics",
    "RichProgressBar": "leave it out: the command shows the progress",
    "TQDMProgressBar": "leave it out: the command shows the progress",
    "ProgressPrinter": "leave it out: the command shows the progress",
    "straggler_det_callback": "leave it out: the metrics say how long each rank waits",
    "StragglerDetectionCallback": "leave it out: the metrics say how long each rank waits",
    "FLOPsMeasurementCallback": "leave it out: TFLOP/s are in the metrics",
}
"""What has become of NeMo's callbacks, and of those that are not needed."""


def edit(scope: Scope, node: ast.AST, path: str, value: ast.expr, *, method: str = "") -> None:
    """One field that a script sets: a line of the recipe, and a line of the report.

    Args:
        method: what adds the value to a list; "" if it is set.
    """
    path = ALIASES.get(path, path)
    if path.startswith("optim.") and f"optim.config.{path[6:]}" in NAMED and path not in NAMED:
        path = f"optim.config.{path[6:]}"
    if isinstance(value, (ast.List, ast.Tuple)) and path in ("trainer.callbacks", "log.extra_loggers"):
        for each in value.elts:
            edit(scope, each, path, each, method="append" if path == "trainer.callbacks" else "")
        return
    if isinstance(value, ast.Call) and last_name(value.func) == "Path" and len(value.args) == 1:
        value = value.args[0]  # a text does here
    said = _part(scope, node, path, value) if isinstance(value, ast.Call) else None
    if said is None and method:
        said = _added(scope, path, value, method)
    scope.out.say(node, _line(scope, path, value) if said is None else said)


def _added(scope: Scope, path: str, value: ast.expr, method: str) -> str:
    """Writes the line that adds plain values to a list, and returns what became of it."""
    ours = NAMED[path].ours if path in NAMED else path
    if not scope.is_plain(value) or not ours or (scope.sample is not None and _missing(scope.sample, ours)):
        return f"not migrated: {answer(names_at(path)) or f'set {path}'}"
    scope.body.append(f"recipe.{ours}.{method}({ast.unparse(value)})")
    scope.edited = True
    return f"recipe.{ours}"


def weights(scope: Scope, source: str, out: str | None = None) -> str:
    """The folder of the weights that stand at `hf://` or `nemo://`; what makes it is a step."""
    scheme, _, name = source.rpartition("://")
    if not scheme:
        return source
    folder = out or name.rstrip("/").rpartition("/")[2]
    scope.out.step(f"fiddlehead import hf {shlex.quote(name.rstrip('/'))} --out {shlex.quote(folder)}")
    return folder


def _line(scope: Scope, path: str, value: ast.expr) -> str:
    """Writes one plain value, and returns what became of it."""
    named = NAMED.get(path)
    literal = value.value if isinstance(value, ast.Constant) else None
    text = ast.unparse(value)
    ours, note = (path, "") if named is None else (named.ours, named.note)
    if path == "trainer.limit_val_batches" and isinstance(literal, int):
        ours, text = "data.val_samples", f"{text} * recipe.data.global_batch_size"
    elif path == "trainer.val_check_interval" and isinstance(literal, float):
        return "not migrated: trainer.val_check_interval is a whole number of steps; set it"
    elif path == "log.ckpt.save_top_k" and text in ("-1", "None"):
        return "not migrated: checkpoint.keep_last says how many of the newest to keep; set it, all has no name"
    elif path == "log.ckpt" and text == "None":
        return "not migrated: a run always saves its last step; leave it out"
    elif path == "optim.lr_scheduler.warmup_steps" and isinstance(value, ast.BinOp):
        text = f"int({text})"
    elif path == "resume.resume_if_exists":
        text = repr("auto" if literal is not False else "never")
    elif path == "resume.restore_config.path" and isinstance(literal, str):
        text, note = repr(weights(scope, literal)), _about_weights(literal)
    elif path == "resume.restore_config.path":
        note = "the name of NeMo's weights; `fiddlehead import nemo` makes the folder to name"
    elif path in FLAGS:
        text = str(bool(literal) or not isinstance(value, ast.Constant))
    elif path == "data.dataset_kwargs" and isinstance(value, ast.Dict):
        return _dataset_kwargs(scope, value)
    elif path == "peft" and text == "None":
        ours = "model.lora"
    elif named is not None and not named.same and path != "resume.restore_config.path":
        return str(named)
    if ours.startswith("trainer.strategy.") and text == "None":
        text = "1"
    if not ours:
        return str(named) if named is not None else f"not migrated: set {text} yourself"
    if not scope.is_plain(value):
        return f"not migrated: the recipe does not know {text}; set {ours}"
    if (
        path == "data.paths"
        and isinstance(value, ast.Dict)
        and getattr(scope.sample and scope.sample.data, "split", None)
    ):
        scope.put("data.split", "None")
    if scope.sample is not None and (why := _missing(scope.sample, ours)):
        return f"not migrated: {answer(names_at(path)) or why}"
    scope.put(ours, text)
    return f"recipe.{ours}{note and f': {note}'}"


def _part(scope: Scope, node: ast.AST, path: str, call: ast.Call) -> str | None:
    """A field that is a part with fields of its own, or a preset; None if it is a plain value."""
    kind, _ = made_by(call)
    named = [keyword for keyword in call.keywords if keyword.arg]
    given = {str(keyword.arg): keyword.value for keyword in named}
    if path == "peft":
        return _adapters(scope, kind, given)
    if path == "data.tokenizer":
        return f"not migrated: {NAMED[path]}"
    if path == "log.ckpt.train_time_interval":
        return _interval(scope, given)
    if path == "log.extra_loggers":
        return _logger(scope, call, kind)
    if path == "trainer.plugins":
        kind += getattr(given.get("precision"), "value", "") + ("mixed" if "Mixed" in kind else "")
        if "bf16" not in kind:
            return "not migrated: trainer.precision is 'bf16-mixed', 'bf16-true' or '32-true'"
        scope.put("trainer.precision", repr("bf16-mixed" if "mixed" in kind else "bf16-true"))
        return "recipe.trainer.precision" + ("; model.fp8 turns float8 on" if "fp8" in kind else "")
    if path.startswith("trainer.callbacks"):
        return _callback(scope, call, kind)
    if path in FLAGS:
        ours = NAMED[path].ours
        scope.put(ours, "True")
        for name in WANDB if path == "log.wandb" else ():
            if name in given:
                edit(scope, call, "log.wandb.project" if name == "project" else f"log.wandb_{name}", given[name])
        return f"recipe.{ours}"
    if path == "resume.restore_config":
        if "path" in given:
            edit(scope, call, "resume.restore_config.path", given["path"])
        left = sorted(set(given) - {"path"})
        return "model.init_from begins with the weights" + (f"; without {', '.join(left)}" if left else "")
    is_config = last_name(call.func) in CONFIGS and bool(call.args)
    is_part = is_config or bool(given) or kind[:1].isupper()
    if path.split(".")[0] not in PARTS or not is_part or scope.is_plain(call):
        return None
    for keyword in named:
        edit(scope, keyword, f"{path}.{keyword.arg}", keyword.value)
    if path == "data":
        for name, default in SIZES.items():
            if name not in given:
                scope.put(f"data.{name}", str(default))
    return DATA.get(kind, DOWNLOADED) if path == "data" else f"the fields of {kind}, in lines of their own"


def _interval(scope: Scope, given: dict[str, ast.expr]) -> str:
    """A `timedelta` in minutes."""
    minutes = {"days": "1440 * {}", "hours": "60 * {}", "minutes": "{}", "seconds": "{} / 60"}
    if not given or not set(given) <= set(minutes) or not all(map(scope.is_plain, given.values())):
        return f"not migrated: {NAMED['log.ckpt.train_time_interval']}"
    scope.put(
        "checkpoint.every_n_minutes", " + ".join(minutes[key].format(ast.unparse(each)) for key, each in given.items())
    )
    return "recipe.checkpoint.every_n_minutes"


def _logger(scope: Scope, call: ast.Call, kind: str) -> str | None:
    if kind == "WandbLogger":
        return _part(scope, call, "log.wandb", call)
    if kind == "TensorBoardLogger":
        return _part(scope, call, "log.tensorboard", call)
    return f"not migrated: {kind}; fdl.Config({kind}, ...) in the list log.loggers, or log.mlflow"


def _callback(scope: Scope, call: ast.Call, kind: str) -> str:
    """A callback: Lightning's own stays; of NeMo's, what has become of it."""
    _, bare = made_by(call)
    if kind == "ModelCheckpoint":
        for keyword in bare.keywords:
            edit(scope, keyword, f"log.ckpt.{keyword.arg}", keyword.value)
    if kind in CALLBACKS:
        return CALLBACKS[kind]
    if kind in LIGHTNING and all(map(scope.is_plain, [*bare.args, *bare.keywords])):
        scope.imports |= {"import fiddle as fdl", f"from lightning.pytorch.callbacks import {kind}"}
        arguments = ", ".join(map(ast.unparse, [ast.Name(kind), *bare.args, *bare.keywords]))
        scope.body.append(f"recipe.trainer.callbacks.append(fdl.Config({arguments}))")
        scope.edited = True
        return "recipe.trainer.callbacks"
    return f"not migrated: {kind}; a callback of Lightning's or of your own is fdl.Config(...) in a list there"


def _adapters(scope: Scope, kind: str, given: dict[str, ast.expr]) -> str:
    taken = {key: value for key, value in given.items() if key in LORA and scope.is_plain(value)}
    scope.imports |= {"import fiddle as fdl", "from fiddlehead.models import LoRA"}
    fields = [f"{LORA[key]}={ast.unparse(value)}" for key, value in taken.items()]
    scope.put("model.lora", f"fdl.Config({', '.join(['LoRA', *fields, *(['dora=True'] * ('dora' in kind.lower()))])})")
    left = sorted(set(given) - set(taken))
    return "recipe.model.lora" + (f"; without {', '.join(left)}" if left else "")


def _dataset_kwargs(scope: Scope, value: ast.Dict) -> str:
    left = []
    for key, each in zip(value.keys, value.values, strict=True):
        name = getattr(key, "value", None) or "**"
        if name == "prompt_template" and scope.is_plain(each):
            scope.put("data.prompt_template", ast.unparse(each))
        elif name not in TEMPLATED and not (name == "label_key" and getattr(each, "value", None) == "output"):
            left.append(str(name))
    said = "recipe.data.prompt_template" if len(left) < len(value.keys) else str(NAMED["data.dataset_kwargs"])
    return said + (f"; without {', '.join(left)}" if left else "")


def _about_weights(source: str) -> str:
    """What there is to know of the weights that a script begins with."""
    scheme, _, name = source.rpartition("://")
    if scheme == "nemo":
        return (
            f"the weights of {name} from Hugging Face; `fiddlehead import nemo` reads NeMo's own copy, "
            f"~/.cache/nemo/models/{name}"
        )
    return "" if scheme else "`fiddlehead import nemo` reads a checkpoint of NeMo; name the folder that it makes"


def _missing(sample: Recipe, path: str) -> str:
    try:
        find_slot(sample, path)
    except ConfigError as error:
        return str(error)
    return ""
