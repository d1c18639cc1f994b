"""Numbers: checks of those in settings, and how people write them."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number. Comparisons alone cannot check this: with nan, all of them are false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(number: float) -> str:
    """A large number with three digits and a letter: 8030000000 is "8.03 B", 4900 "4,900"; exact below 10,000."""
    if abs(number) < 10_000:
        return plain(number)
    for exponent, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        # What rounds to 1000 of a letter is 1 of the next one.
        if abs(number) >= 0.9995 * 10**exponent:
            return f"{_three_digits(number / 10**exponent)} {letter}"
    return plain(number)


def plain(number: float) -> str:
    """A number as people write it: 3e-05 is "3e-5", 1e+22 "1e22", 12345 "12,345", 2.0 "2.0"; no digit is lost."""
    if is_whole(number):
        return f"{number:,}"
    return re.sub(r"e([-+])0*(\d+)", lambda match: f"e{match[1].strip('+')}{match[2]}", repr(float(number)))


def figure(number: float, digits: int = 6) -> str:
    """A measured number with a few digits: 7680.0 is "7,680", 3.028961e-05 "3.02896e-5", 1396.8731 "1,396.87"."""
    rounded = float(f"{number:.{digits}g}")
    if 1000 <= abs(rounded) < 1e15 and not rounded.is_integer():
        return f"{rounded:,}"
    return plain(int(rounded)) if rounded.is_integer() and abs(rounded) < 1e15 else plain(rounded)


def few_digits(number: float) -> str:
    """A number with three digits, or all those before the point: 0.529, 45.4, 150,415."""
    return f"{number:,.0f}" if abs(number) >= 99.95 else f"{number:.3g}"


def rate(number: float) -> str:
    """A learning rate, or another setting between 0 and 1, in few characters: 0.02, 3e-4, 0."""
    if number == 0 or 0.01 <= abs(number) < 1e4:
        return f"{number:.4g}"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def scientific(number: float) -> str:
    """A number in powers of ten with three digits: 4.2137e+22 is "4.21e22"."""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def count(number: int, thing: str, things: str = "") -> str:
    """A number of things: "1 device", "8 devices", "1,024 devices".

    Args:
        things: the plural, if it is not `thing` and an s.
    """
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def duration(seconds: float) -> str:
    """A time in its two largest units: "0.4 s", "48 s", "3 min 20 s", "5 h 7 min", "12 d 4 h", "4,302 d"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds >= 100 * 86400:
        return f"{round(seconds / 86400):,} d"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next(index for index, (unit, _) in enumerate(units) if whole >= unit)
    (large, name), (small, rest_name) = units[first : first + 2]
    # Rounded to the smaller unit first, which may fill the larger one: 3599.9 s is an hour.
    whole = round(whole / small) * small
    if first and whole >= units[first - 1][0]:
        return duration(whole)
    rest = whole % large // small
    return f"{whole // large} {name}" + (f" {rest} {rest_name}" if rest else "")


def clock(seconds: float) -> str:
    """A time as a clock shows it: "0:07", "12:34", "3:02:01"; it changes width rarely, for a line that is rewritten."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _three_digits(number: float) -> str:
    """A number from 1 to 1000 with three digits, without zeros at its end: "8.03", "124", "4.9"."""
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{number:.3g}")))))
    text = f"{number:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
