"""AdamW, with moments of 32 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.parallel import Layout
from fiddlehead.recipe.resumable import Resumable
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim.bfloat16_adamw import BFloat16AdamW, OffloadedBFloat16AdamW
from fiddlehead.training.optim.clipping_adamw import ClippingAdamW, OffloadedClippingAdamW
from fiddlehead.training.optim.offloaded import PIECE, PIECES
from fiddlehead.training.optim.optim import NOT_FUSED, FusedRows, Optim


@dataclass(frozen=True, kw_only=True)
class AdamW(Optim):
    """AdamW (Loshchilov & Hutter 2019); weight decay applies only to matrices, not to gains, biases and other vectors.

    Args:
        state_bits: the bits of each of the two moments. With 8 (Dettmers et al. 2022), they take a quarter of the
            memory and the losses differ a little; torchao implements this and compiles the step.
        state_offloading: keep the moments, and with bfloat16 parameters the lower halves of the weights, in main
            memory; each step copies them to the GPU and back. The losses are bit for bit the same.
    """

    state_bits: Literal[8, 32] = 32
    state_offloading: Resumable[bool] = False

    @property
    def kind(self) -> str:
        """As `Optim.kind`."""
        return "AdamW" if self.state_bits == 32 else f"AdamW(state_bits={self.state_bits})"

    @property
    def takes_bfloat16_gradients(self) -> bool:
        """As `Optim.takes_bfloat16_gradients`."""
        return self.state_bits == 32

    def optimizer(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], fused: FusedRows = NOT_FUSED
    ) -> torch.optim.Optimizer:
        """PyTorch's, which clips in its step; for bfloat16 ours, which keeps float32 weights; for 8 bits torchao's.

        On a CPU the state is in main memory anyway.

        Raises:
            ConfigError: torchao is not installed, or the state of these parameters cannot be in main memory.
        """
        parameters = [parameter for _, parameter in named_parameters]
        groups = self.groups(parameters)
        dtypes = {parameter.dtype for parameter in parameters}
        if self.state_offloading and dtypes and dtypes not in ({torch.float32}, {torch.bfloat16}):
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            message = f"the parameters are {found}; must be all float32 or all bfloat16"
            raise ConfigError(Problem("optim.state_offloading", True, message))
        settings: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        if self.state_bits == 8:
            try:
                from fiddlehead.training.optim.adamw_8bit import SavedAdamW8bit
            except ImportError as error:
                message = f"needs torchao: pip install 'fiddlehead[torchao]' ({error})"
                raise ConfigError(Problem("optim.state_bits", 8, message)) from error
            return SavedAdamW8bit(groups, **settings)
        offloads = self.state_offloading and any(parameter.is_cuda for parameter in parameters)
        if dtypes == {torch.bfloat16}:
            return (OffloadedBFloat16AdamW if offloads else BFloat16AdamW)(groups, **settings)
        return (OffloadedClippingAdamW if offloads else ClippingAdamW)(groups, **settings)

    def share(
        self, optimizer: torch.optim.Optimizer, named_parameters: Sequence[tuple[str, nn.Parameter]], layout: Layout
    ) -> None:
        """As `Optim.share`: a checkpoint may have the codes and scales of whole parameters."""
        if self.state_bits == 8:
            sharded: Any = optimizer
            sharded.layout, sharded.names = layout, {parameter: name for name, parameter in named_parameters}

    def problems(self, precision: str, split: Sizes | None, *, adapters: bool) -> list[Problem]:
        """8-bit moments need float32 parameters."""
        problems = []
        if self.state_bits == 8 and precision == "bf16-true":
            message = (
                "trainer.precision='bf16-true' would round small steps away; set 'bf16-mixed' or '32-true', or "
                "optim.state_bits=32, which keeps what is rounded"
            )
            problems.append(Problem("optim.state_bits", 8, message))
        return problems

    def compiles(self, device: torch.device) -> bool:
        """Whether kernels of its step are compiled: torchao's anywhere, and ours, by Triton, on a GPU."""
        return self.state_bits == 8 or device.type == "cuda"

    def state_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """Two moments; for bfloat16 parameters also the lower half of each weight."""
        sizes = [parameter.numel() for _, parameter in named_parameters]
        if self.state_bits == 8:
            return sum(_moments_bytes(size) for size in sizes)
        return (10 if precision == "bf16-true" else 8) * sum(sizes)

    def step_bytes(self, named_parameters: Iterable[tuple[str, nn.Parameter]], precision: str) -> int:
        """With 8-bit moments both of one parameter in float32; with `state_offloading` the pieces that are copied."""
        largest = max((parameter.numel() for _, parameter in named_parameters), default=0)
        if self.state_offloading:
            return PIECES * (10 if precision == "bf16-true" else 8) * min(PIECE, largest)
        return 8 * largest if self.state_bits == 8 else 0

    def _refused(self) -> list[Problem]:
        problems = super()._refused()
        if self.state_bits not in (8, 32):
            problems.append(Problem("state_bits", self.state_bits, "", (8, 32)))
        if not isinstance(self.state_offloading, bool):
            problems.append(Problem("state_offloading", self.state_offloading, "must be True or False"))
        elif self.state_offloading and self.state_bits == 8:
            message = "moments of state_bits=8 stay on the GPU, where they take 2 bytes a parameter; set one of the two"
            problems.append(Problem("state_offloading", True, message))
        return problems


def _moments_bytes(size: int) -> int:
    """The bytes that torchao keeps for a parameter with this number of weights: codes, scales and code table, twice."""
    quantized = size >= 4096 and size % 256 == 0
    return 2 * (size + 4 * size // 256 + 4 * 256) if quantized else 8 * size
