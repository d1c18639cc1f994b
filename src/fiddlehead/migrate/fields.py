"""Lines of a script that set a field of a recipe, under the names of this package."""

from __future__ import annotations

import ast

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
DOWNLOADED = "download its data as JSONL or Parquet, and set data.paths"
LORA = {"dim": "rank", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"}
"""NeMo's names of a LoRA's fields that have a counterpart."""
FLAGS = ("log.tensorboard", "log.wandb", "data.packed_sequence_specs")
"""Fields that are objects in NeMo's recipes, and true or false here."""
TEMPLATED = ("chat", "use_hf_tokenizer_chat_template")
"""Keys of `dataset_kwargs` that are always so: conversations have the chat template."""


def edit(scope: Scope, node: ast.AST, path: str, value: ast.expr) -> None:
    """One field that a script sets: a line of the recipe, and a line of the report."""
    if isinstance(value, ast.Call) and last_name(value.func) == "Path" and len(value.args) == 1:
        value = value.args[0]  # a text does here
    said = _part(scope, node, path, value) if isinstance(value, ast.Call) else None
    scope.out.say(node, _line(scope, path, value) if said is None else said)


def weights(scope: Scope, source: str) -> str:
    """The folder of the weights that stand at `hf://` or `nemo://`; what makes it is a step."""
    scheme, _, name = source.rpartition("://")
    if not scheme:
        return source
    folder = name.rstrip("/").rpartition("/")[2]
    scope.out.step(f"fiddlehead import hf {name.rstrip('/')} --out {folder}")
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
        return "trainer.val_check_interval is a whole number of steps; set it"
    elif path == "resume.resume_if_exists":
        text = repr("auto" if literal is not False else "never")
    elif path == "resume.restore_config.path" and isinstance(literal, str):
        text, note = repr(weights(scope, literal)), _about_weights(literal)
    elif path in FLAGS:
        text = str(bool(literal) or not isinstance(value, ast.Constant))
    elif path == "data.dataset_kwargs" and isinstance(value, ast.Dict):
        return _dataset_kwargs(scope, value)
    elif path == "peft" and text == "None":
        ours = "model.lora"
    elif named is not None and not named.same:
        return str(named)
    if ours.startswith("trainer.strategy.") and text == "None":
        text = "1"
    if not ours:
        return str(named)
    if not scope.is_plain(value):
        return f"not migrated: the recipe does not know {text}; set {ours}"
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
    if path == "trainer.plugins":
        kind += getattr(given.get("precision"), "value", "") + ("mixed" if "Mixed" in kind else "")
        if "bf16" not in kind:
            return "not migrated: trainer.precision is 'bf16-mixed', 'bf16-true' or '32-true'"
        scope.put("trainer.precision", repr("bf16-mixed" if "mixed" in kind else "bf16-true"))
        return "recipe.trainer.precision" + ("; model.fp8 turns float8 on" if "fp8" in kind else "")
    if path.startswith("trainer.callbacks"):
        return f"not migrated: {kind}; a callback of Lightning's or of your own is fdl.Config(...) in a list there"
    if path in FLAGS:
        ours = NAMED[path].ours
        scope.put(ours, "True")
        if path == "log.wandb" and "project" in given:
            edit(scope, call, "log.wandb.project", given["project"])
        return f"recipe.{ours}"
    is_config = last_name(call.func) in CONFIGS and bool(call.args)
    if path.split(".")[0] not in PARTS or not (is_config or given) or scope.is_plain(call):
        return None
    for keyword in named:
        edit(scope, keyword, f"{path}.{keyword.arg}", keyword.value)
    return DATA.get(kind, DOWNLOADED) if path == "data" else f"the fields of {kind}, in lines of their own"


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
        elif name not in TEMPLATED:
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
