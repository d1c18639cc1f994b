"""What counts as a number where one is asked for."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number. Comparisons alone do not say so: each one with a nan is false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
