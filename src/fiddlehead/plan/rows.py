"""The summary of a plan for people: lines of text in sections, always in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fiddlehead.models import TransformerConfig
from fiddlehead.numbers import count, duration, few_digits, scientific, short
from fiddlehead.plan import attention

if TYPE_CHECKING:
    from pathlib import Path

    from fiddlehead.plan.speed import Speed
    from fiddlehead.plan.training import TrainingPlan

GIB = 2**30
_ON_A_CPU = "not worked out on a CPU"


def sections(plan: TrainingPlan, usd_per_gpu_hour: float | None = None) -> dict[str, list[str]]:
    """The lines of each section: data, model, step, optimizer, memory, speed, attention, and feed-forward on a GPU.

    Args:
        usd_per_gpu_hour: what a GPU costs, to say also what the run costs.
    """
    return {
        "data": plan.data.lines(),
        "model": _model(plan),
        "step": _step(plan),
        "optimizer": plan.optimizer.lines(),
        "memory": _memory(plan),
        "speed": _speed(plan, usd_per_gpu_hour),
        "attention": attention.rows(plan.attention) or [_unknown_kernel(plan.config.attention_backend)],
        **({"feed-forward": [str(plan.mlp)]} if plan.mlp is not None and plan.memory is not None else {}),
    }


def as_rows(lines: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Section and text of each line; the section is named in its first line only."""
    return [("" if number else name, line) for name, each in lines.items() for number, line in enumerate(each)]


def resume_lines(plan: TrainingPlan, start: Path | None, step: int | None) -> list[str]:
    """From where the run starts, and what is left of it.

    Args:
        start: the checkpoint; None for a fresh start.
        step: how many steps that has finished; None if that is not known here.
    """
    if step is None:
        return ["from the newest checkpoint there is when it begins, which is not known here"]
    if start is None:
        return ["anew, from step 0"]
    left, of = plan.max_steps - step, f"of {plan.max_steps:,}"
    if left <= 0:
        return [f"from {start}", f"step {step:,} {of}: nothing is left to train"]
    time = f", {duration(3600 * plan.speed.hours(left))}" if plan.speed is not None else ""
    return [f"from {start}", f"step {step:,} {of}: {left:,} steps are left{time}"]


def _model(plan: TrainingPlan) -> list[str]:
    config = plan.config
    trained = "" if plan.trained == plan.parameters else f", {short(plan.trained)} of them trained"
    heads = f"{config.num_attention_heads} heads in {config.groups} groups of {config.head_dim} channels"
    return [
        f"{short(plan.parameters)} parameters{trained}, {config.num_layers} layers{_experts(config)}",
        f"{heads}, vocabulary {config.vocab_size:,}, sequences of {config.seq_length:,}",
        *([f"the shape is model.config's, without weights: {plan.lacks_weights}"] if plan.lacks_weights else []),
    ]


def _unknown_kernel(backend: str) -> str:
    chosen = "chosen" if backend == "auto" else "measured and chosen" if backend == "measured" else f"{backend},"
    return f"{chosen} on the GPU that trains"


def _experts(config: TransformerConfig) -> str:
    if config.num_moe_experts is None:
        return ""
    return f" of {config.num_moe_experts} experts, {config.moe_router_topk} for each token"


def _step(plan: TrainingPlan) -> list[str]:
    sequences = count(plan.micro_batch_size, "sequence")
    return [
        f"{plan.tokens_per_step:,} tokens: {_ranks(plan)} x {sequences} x {plan.accumulate_grad_batches} accumulated",
        f"{plan.max_steps:,} steps: {short(plan.tokens)} tokens, {scientific(plan.flops)} FLOPs",
    ]


def _ranks(plan: TrainingPlan) -> str:
    if plan.data_parallel == plan.world_size:
        return count(plan.world_size, "device")
    return f"{plan.data_parallel} groups of {plan.world_size // plan.data_parallel} devices"


def _memory(plan: TrainingPlan) -> list[str]:
    """Whether it fits, the parts of the peak, the largest first, and what would make it fit."""
    state = f"{plan.state_gib:,.2f} GiB"
    if plan.device_gib != plan.state_gib:
        state = f"{plan.device_gib:.2f} GiB on each device (of {state} in all)"
    state += " for weights, gradients and optimizer state"
    memory, card = plan.memory, plan.card
    if memory is None:
        return [state, f"activations: {_ON_A_CPU}"]
    lines = []
    if card is not None:
        lines.append(
            f"{plan.verdict}: {card.name} has {card.gib:.1f} GiB, and the run needs {memory.needed_gib:.1f} GiB at its "
            f"peak, in {memory.where}"
        )
    else:
        lines.append(f"{memory.needed_gib:.1f} GiB at the peak, in {memory.where}")
    parts = sorted(((size, said) for said, size in memory.parts().items()), reverse=True)
    parts.append((memory.reserved, "what PyTorch's allocator reserves besides"))
    parts.append((memory.outside, "CUDA context, and the buffers of NCCL" if plan.world_size > 1 else "CUDA context"))
    lines += [f"{size / GIB:7.2f} GiB  {said}" for size, said in parts if size >= 0.005 * GIB]
    lines.append(state)
    for said, size in plan.main_memory.items():
        each = " for each device" if plan.world_size > 1 else ""
        lines.append(f"{size / GIB:,.2f} GiB of main memory{each}: {said}")
    if plan.remedies:
        lines += ["what makes it fit:", *(f"  {remedy.row()}" for remedy in plan.remedies)]
    return lines


def _speed(plan: TrainingPlan, usd_per_gpu_hour: float | None) -> list[str]:
    speed, gpus = plan.speed, plan.world_size
    if speed is None:
        return [_why_no_speed(plan)]
    hours, gpu_hours, kwh = speed.hours(plan.max_steps), plan.gpu_hours or 0.0, speed.kwh(plan.max_steps)
    each = f", {few_digits(speed.tokens_per_s / gpus)} on each GPU" if gpus > 1 else ""
    step = f"{few_digits(speed.step)} s" if speed.step >= 1 else f"{few_digits(1000 * speed.step)} ms"
    energy = f", {few_digits(kwh)} kWh at the most" if kwh is not None else ", energy not known"
    lines = [
        f"{few_digits(speed.tokens_per_s)} tokens/s{each}, {step} a step, MFU {speed.mfu:.1%}",
        _spent(speed),
        f"the whole run: {duration(3600 * hours)}, {few_digits(gpu_hours)} GPU-hours{energy}",
    ]
    if speed.calibrated:
        lines.append("by what `fiddlehead bench --calibrate` measured")
    if usd_per_gpu_hour is not None:
        lines.append(f"cost: {usd_per_gpu_hour * gpu_hours:,.0f} USD at {usd_per_gpu_hour:g} USD a GPU-hour")
    return lines


def _spent(speed: Speed) -> str:
    """What a step's time is spent on, the most first."""
    parts = sorted(((seconds, said) for said, seconds in speed.parts().items()), reverse=True)
    return ", ".join(f"{said} {seconds / speed.step:.0%}" for seconds, said in parts if seconds > 0.005 * speed.step)


def _why_no_speed(plan: TrainingPlan) -> str:
    if plan.memory is None:
        return _ON_A_CPU
    if plan.card is None:
        return "not known, as the GPU is not; --gpu names one"
    if not plan.card.flops or not plan.card.bytes_per_s:
        return f"not known, as the data sheet of {plan.card.name} is not"
    return "not worked out in float32"
