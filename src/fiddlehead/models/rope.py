"""Rotary positions (Su et al. 2021), and ways to extend them to longer sequences than the model was trained on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.numbers import is_number

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of each position's angles, (T, 1, R / 2) or (B, T, 1, R / 2) each, float32; R channels turn."""


class Scaling(ABC):
    """Changes the rotation angles of the channels between one position and the next."""

    @abstractmethod
    def frequencies(self, frequencies: torch.Tensor, base: float, length: int | torch.Tensor) -> torch.Tensor:
        """Returns the scaled `frequencies`, (R / 2,) float32, for sequences of `length` tokens.

        If `length` is a tensor and the frequencies depend on it, they are returned for each of its elements.
        """

    @property
    def attention_factor(self) -> float:
        """The factor on rotated queries and keys."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Scaling):
    """Slower rotation, for longer sequences than a model was first trained on, as in Llama 3.1; NeMo's names.

    A channel pair that rotates at least `high_freq_factor` times within `old_context_len` positions is unchanged. One
    that rotates at most `low_freq_factor` times is slowed down by `scale_factor`. Between these it is interpolated.
    """

    scale_factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192

    def __post_init__(self) -> None:
        _refuse_unless_positive(self)
        if self.low_freq_factor >= self.high_freq_factor:
            message = f"must be below high_freq_factor={self.high_freq_factor!r}"
            raise ConfigError(Problem("low_freq_factor", self.low_freq_factor, message))

    def frequencies(self, frequencies: torch.Tensor, base: float, length: int | torch.Tensor) -> torch.Tensor:
        """As `Scaling.frequencies`."""
        turns = self.old_context_len * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.scale_factor)


@dataclass(frozen=True, kw_only=True)
class LinearRopeScaling(Scaling):
    """Divides all positions by `scale_factor` (Chen et al. 2023), as in Gemma 3's layers without a window."""

    scale_factor: float = 8.0

    def __post_init__(self) -> None:
        _refuse_unless_positive(self)

    def frequencies(self, frequencies: torch.Tensor, base: float, length: int | torch.Tensor) -> torch.Tensor:
        """As `Scaling.frequencies`."""
        return frequencies / self.scale_factor


@dataclass(frozen=True, kw_only=True)
class YarnRopeScaling(Scaling):
    """YaRN (Peng et al. 2023), as in gpt-oss and Qwen's long contexts.

    Channel pairs that rotate more than `beta_fast` times within `old_context_len` are unchanged. Those that rotate less
    than `beta_slow` times are slowed down by `scale_factor`. Between these, the factor changes linearly with the
    channel (between whole channels if `truncate`). Scores grow by the square of `mscale`; None means 0.1
    ln(scale_factor) + 1.
    """

    scale_factor: float
    old_context_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _refuse_unless_positive(self)

    def frequencies(self, frequencies: torch.Tensor, base: float, length: int | torch.Tensor) -> torch.Tensor:
        """As `Scaling.frequencies`."""
        pairs = frequencies.shape[-1]
        low, high = (
            pairs * math.log(self.old_context_len / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        channel = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        slowed = ((channel - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequencies * (1 - slowed) + frequencies / self.scale_factor * slowed

    @property
    def attention_factor(self) -> float:
        """As `Scaling.attention_factor`."""
        if self.mscale is not None:
            return self.mscale
        return 0.1 * math.log(self.scale_factor) + 1.0 if self.scale_factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al. 2024), as in Phi-3's 128k models: a factor for each channel pair, found by search.

    `short_factor` is for sequences of up to `old_context_len` tokens, `long_factor` for longer ones. Scores grow by the
    square of `mscale`; None means sqrt(1 + ln(scale_factor) / ln(old_context_len)).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    scale_factor: float
    """The longest sequence, as a multiple of `old_context_len`."""
    old_context_len: int
    mscale: float | None = None

    def __post_init__(self) -> None:
        _refuse_unless_positive(self)
        if len(self.short_factor) != len(self.long_factor):
            message = f"has {len(self.short_factor)} numbers; long_factor has {len(self.long_factor)}"
            raise ConfigError(Problem("short_factor", message=message))

    def frequencies(self, frequencies: torch.Tensor, base: float, length: int | torch.Tensor) -> torch.Tensor:
        """As `Scaling.frequencies`; only a sequence's own length decides its factors."""
        short, long = (
            frequencies / torch.tensor(factors, dtype=torch.float32, device=frequencies.device)
            for factors in (self.short_factor, self.long_factor)
        )
        if isinstance(length, int):
            return long if length > self.old_context_len else short
        return torch.where((length > self.old_context_len)[..., None], long, short)

    @property
    def attention_factor(self) -> float:
        """As `Scaling.attention_factor`."""
        if self.mscale is not None:
            return self.mscale
        if self.scale_factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.scale_factor) / math.log(self.old_context_len))


SCALINGS = (RopeScaling, LinearRopeScaling, YarnRopeScaling, LongRopeScaling)


def scaling_from_dict(values: dict[str, Any]) -> Scaling:
    """The scaling whose `asdict` is `values`; the field names decide its class."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for kind in SCALINGS:
        if set(values) == set(kind.__dataclass_fields__):
            return kind(**values)
    message = f"has the fields {', '.join(values)}; no kind of rope_scaling has these"
    raise ConfigError(Problem("rope_scaling", message=message))


@dataclass(frozen=True)
class Rotary:
    """The rotation of a layer's queries and keys by their position."""

    channels: int
    """R, the number of a head's channels that rotate, from the first on; it is even."""
    base: float
    scaling: Scaling | None = None

    def tables(self, positions: torch.Tensor, length: int | torch.Tensor) -> Rope:
        """The cosines and sines of `positions`, (T,) or (B, T), in sequences of `length` tokens; they are cheap.

        Args:
            length: of all sequences, or for each position the length of its sequence, (B, T).
        """
        # In float32, because positions times frequencies need the precision.
        channel = torch.arange(0, self.channels, 2, device=positions.device, dtype=torch.float32)
        frequencies = self.base ** (-channel / self.channels)
        factor = 1.0
        if self.scaling is not None:
            frequencies = self.scaling.frequencies(frequencies, self.base, length)
            factor = self.scaling.attention_factor
        angles = positions.float()[..., None] * frequencies
        cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotates the heads of x (B, T, heads, D): channel i pairs with i + R / 2, as in Hugging Face's checkpoints."""
    cos, sin = rope
    R = 2 * cos.shape[-1]
    x1, x2 = x[..., :R].float().chunk(2, dim=-1)
    turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return torch.cat(turned if x.shape[-1] == R else [*turned, x[..., R:].float()], dim=-1).to(x.dtype)


def _refuse_unless_positive(scaling: Scaling) -> None:
    problems = []
    for name, value in vars(scaling).items():
        if name == "truncate":
            if not isinstance(value, bool):
                problems.append(Problem(name, value, "must be true or false"))
            continue
        if name in ("short_factor", "long_factor") and not isinstance(value, tuple):
            problems.append(Problem(name, value, "must be a list of numbers"))
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number is None and name == "mscale":
                continue
            if not is_number(number) or not number > 0:
                problems.append(Problem(name, value, "must be a number above 0"))
                break
    refuse(problems)
