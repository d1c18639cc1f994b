"""Checks for numbers in settings."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number. Comparisons alone cannot check this: with nan, all of them are false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
