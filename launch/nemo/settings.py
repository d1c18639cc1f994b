"""Our settings from an executor of NeMo-Run's, by the table in `fields`."""

from __future__ import annotations

import dataclasses
from typing import Any

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.launch.nemo.fields import ADVICE, KINDS, LAUNCHERS, OF_NEMO_RUN, PARTS
from fiddlehead.launch.nemo.takes import Field, Settings

_UNKNOWN = Field("is a field whose meaning is not known here; leave it out", refused=True)


def kind_of(executor: Any, *, exact: bool = False) -> str:
    """Which of our kinds takes an executor of NeMo-Run's over: "local", "slurm" or "docker"; "" for none.

    Args:
        exact: leave out subclasses, which may do anything.
    """
    return KINDS.get(_listed(type(executor), exact=exact), "")


def settings_of(executor: Any, kind: str) -> Settings:
    """The settings of our executor `kind` that mean the same as an executor of NeMo-Run's.

    Raises:
        ConfigError: it is another kind of executor; or with every field whose value is refused.
    """
    if kind_of(executor) != kind:
        wanted = next(name for name, known in KINDS.items() if known == kind).rpartition(".")[2]
        raise ConfigError(Problem("", message=f"a {_name(type(executor))} is not a nemo_run.{wanted}"))
    return _settings(executor, _listed(type(executor)))


def said_of(kind: str, name: str) -> str:
    """What becomes of the field `name` of NeMo-Run's executor that our `kind` takes over; "" if there is none."""
    listed = next((each for each, known in KINDS.items() if known == kind), "")
    known = PARTS.get(listed, {}).get(name)
    return f"{'refused: ' * known.refused}{known.says}" if known else ""


def table() -> str:
    """What becomes of each field, as tables in Markdown."""
    tables = []
    for name, fields in PARTS.items():
        rows = [
            f"| `{field}` | {'refused: ' * known.refused}{known.says} |"
            for field, known in fields.items()
            if known is not OF_NEMO_RUN
        ]
        kind = f", as `{KINDS[name]}`" if name in KINDS else ""
        tables.append("\n".join([f"| `{name.rpartition('.')[2]}`{kind} | becomes |", "|---|---|", *rows]))
    return "\n\n".join(tables) + "\n"


def _settings(owner: Any, listed: str) -> Settings:
    """The settings from all fields of an object, whose class is in the table as `listed`."""
    made: Settings = {}
    problems: list[Problem] = []
    for each in dataclasses.fields(owner):
        value, known = getattr(owner, each.name), PARTS[listed].get(each.name, _UNKNOWN)
        try:
            if known.refused and value != (default := _default(each)) and (value or default):
                raise ConfigError(Problem(each.name, value, known.says))
            if known.is_part:
                for part in value.values() if isinstance(value, dict) else (value,):
                    _merge(made, _settings_of_part(each.name, part))
            _merge(made, known.take(owner, value))
        except ConfigError as error:
            problems += error.problems
        except (AttributeError, TypeError, ValueError):  # NeMo-Run checks no types
            kind = each.type.__name__ if type(each.type) is type else each.type
            problems.append(Problem(each.name, value, f"is not of the field's type, {kind}"))
    refuse(problems)
    return made


def _settings_of_part(name: str, part: Any) -> Settings:
    """The settings from the packager, the tunnel or the launcher in the field `name`."""
    if part is None or (isinstance(part, str) and part in LAUNCHERS):
        return {}
    listed = part if isinstance(part, str) else _name(type(part))
    if listed not in PARTS:
        short = listed.rpartition(".")[2]
        raise ConfigError(Problem(name, short, ADVICE.get(short, "is not one that can be taken over; leave it out")))
    try:
        return _settings(part, listed)
    except ConfigError as error:
        raise error.under(name) from None


def _merge(made: Settings, more: Settings) -> None:
    """Adds settings; what several fields give to one setting is put together."""
    for name, value in more.items():
        if isinstance(value, dict):
            made[name] = {**made.get(name, {}), **value}
        else:
            made[name] = [*made.get(name, ()), *value] if isinstance(value, list) else value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _listed(kind: type, *, exact: bool = False) -> str:
    """The first class in the table that an executor's class is, or inherits from; "" if there is none."""
    return next((name for name in map(_name, kind.__mro__[: 1 if exact else None]) if name in KINDS), "")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
