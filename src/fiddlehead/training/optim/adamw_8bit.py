"""AdamW with 8-bit moments, by torchao (https://github.com/pytorch/ao, optim)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
from torchao.optim.adam import single_param_adam  # pyright: ignore[reportMissingImports]
from torchao.optim.quant_utils import quantize_8bit_with_qmap  # pyright: ignore[reportMissingImports]
from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

from fiddlehead.models.parallel import Layout, local
from fiddlehead.training.optim.optim import loss_of


class SavedAdamW8bit(AdamW8bit):
    """torchao's AdamW with 8-bit moments (Dettmers et al. 2022); rates are numbers, and the state is plain tensors.

    A moment is 8-bit codes, with a float32 scale for each 256 codes. Moments of small parameters, and of those whose
    size is not a multiple of 256, are float32. The step is computed in float32. Groups have `state_bits`, so a
    checkpoint shows which optimizer wrote it.

    Of sharded parameters each rank has the codes and scales of its shard. Where shards begin and end between blocks of
    256, they are those of one process. A state that is saved has these moments in float32, so that it does not depend
    on the shards; the same shards get the same codes from it again.
    """

    layout: Layout | None = None
    """The places of this rank's shards of the parameters; None if it has whole parameters."""
    names: Mapping[torch.Tensor, str] = {}
    """The names of the parameters, by which the layout knows them."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; torchao would make the rate a tensor, which changes in place after it was logged."""
        torch.optim.Optimizer.add_param_group(self, {**param_group, "state_bits": 8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = loss_of(closure)  # the closure may look at the rates
        # Each shape and dtype is compiled once; a rate that is a number would be part of the code that is compiled.
        compiled = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
        with torch._dynamo.utils.disable_cache_limit():
            for group in self.param_groups:
                rate = torch.tensor(float(group["lr"]))
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group, rate, compiled)
        return loss

    def _step(
        self, parameter: torch.Tensor, group: dict[str, Any], rate: torch.Tensor, compiled: Callable[..., None]
    ) -> None:
        state, own = self.state[parameter], local(parameter.detach())
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (self._new_buffer(parameter, signed) for signed in (True, False))
        state["step"] += 1
        if not own.numel():  # a shard may be empty
            return
        moments = state["exp_avg"], state["exp_avg_sq"]
        settings = *group["betas"], group["weight_decay"], group["eps"]
        compiled(own, local(parameter.grad), state["step"], *moments, None, rate, *settings, True, False)  # type: ignore[arg-type]

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        own = local(p.detach())
        # The whole size decides, so that a moment has 8 bits or 32 however many ranks there are.
        if p.numel() >= _SMALLEST and own.numel() and own.numel() % self.block_size == 0:
            return self._subclass_zeros(own, signed, self.block_size)
        return torch.zeros_like(own)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with each 8-bit moment as its plain tensors; of a sharded parameter in float32, as sharded."""
        saved = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved["state"] = {
            number: {name: self._plain(name, value, parameters[number]) for name, value in state.items()}
            for number, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`, of however many ranks."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        state = {
            number: {name: self._moment(name, value, parameters[number]) for name, value in values.items()}
            for number, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def _plain(self, name: str, value: Any, parameter: torch.Tensor) -> Any:
        if self.layout is not None and name != "step":
            whole = value.dequantize() if isinstance(value, OptimState8bit) else value
            if not isinstance(parameter, DTensor):
                return whole
            places = parameter.device_mesh, parameter.placements
            return DTensor.from_local(whole, *places, run_check=False, shape=parameter.shape, stride=parameter.stride())
        if not isinstance(value, OptimState8bit):
            return value
        return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}

    def _moment(self, name: str, value: Any, parameter: torch.Tensor) -> Any:
        if name == "step":
            return value
        moment = self._new_buffer(parameter, name == "exp_avg")
        if isinstance(value, dict):  # of a process with whole parameters
            value = OptimState8bit(value["codes"], value["scale"], value["qmap"], value["signed"])
            if self.layout is None:
                return value
            whole, value = value.dequantize(), torch.empty(moment.shape, device=moment.device)
            for each in self.layout.local_slices(self.names[parameter], parameter):
                value[each.local] = whole[each.whole].to(value.device)
        return _fill(moment, local(value))


_SMALLEST = 4096
"""Values of a parameter whose moments have 8 bits; torchao's limit, of bitsandbytes."""


def _fill(moment: Any, values: torch.Tensor) -> torch.Tensor:
    """Sets a new moment to values that were 8-bit codes before, perhaps in other blocks."""
    if not isinstance(moment, OptimState8bit):
        return moment.copy_(values)
    blocks, codes = values.reshape(-1, moment.block_size), moment.qmap
    # A negative value of the size of the scale had the lowest code, which is above -1; so the scale is not its size.
    scale = blocks.amax(dim=-1) / codes.max()
    if codes.min() < 0:
        scale = torch.maximum(scale, blocks.amin(dim=-1) / codes.min())
    moment.scale.copy_(scale.clamp(min=1e-12))
    moment.codes.copy_(quantize_8bit_with_qmap((blocks / moment.scale[:, None]).view_as(values), codes))
    return moment
