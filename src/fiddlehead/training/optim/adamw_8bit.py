"""AdamW with 8-bit moments, by torchao (https://github.com/pytorch/ao, optim)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]


class SavedAdamW8bit(AdamW8bit):
    """torchao's AdamW with 8-bit moments (Dettmers et al. 2022); rates are numbers, and the state is plain tensors.

    A moment is 8-bit codes, with a float32 scale for each 256 codes. Moments of small parameters, and of those whose
    size is not a multiple of 256, are float32. The step is computed in float32. Groups have `state_bits`, so a
    checkpoint shows which optimizer wrote it.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; torchao would make the rate a tensor, which changes in place after it was logged."""
        torch.optim.Optimizer.add_param_group(self, {**param_group, "state_bits": 8})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:  # which may look at the rates
            with torch.enable_grad():
                loss = closure()
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(float(rate))  # a number would be part of the code that is compiled
        try:
            super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with each 8-bit moment as its plain tensors."""
        saved = super().state_dict()
        saved["state"] = {
            number: {name: _plain(value) for name, value in state.items()} for number, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`."""
        state = {
            number: {name: _moment(value) for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})


def _plain(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _moment(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return OptimState8bit(value["codes"], value["scale"], value["qmap"], value["signed"])
