"""Metrics as pandas frames; pandas is an optional extra."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.run.history import History

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]  # an optional extra


def frame(history: History) -> pandas.DataFrame:
    """A row for each logged step: `step` (int64), and each metric as float64, NaN where it was not logged.

    Raises:
        ConfigError: pandas is not installed.
    """
    columns: dict[str, Any] = {"step": history.steps, **history.columns}
    made = load_pandas().DataFrame(columns)
    return made.astype({"step": "int64", **dict.fromkeys(history.columns, "float64")})


def load_pandas() -> Any:
    """The module pandas.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ConfigError(Problem("frame", message="needs pandas: pip install 'fiddlehead[pandas]'")) from None
