"""Measures every attention backend on one GPU: time, the cost of choosing and wrapping, and memory.

    python benchmarks/attention.py                 measures all, writes results/attention.json and docs/attention.png
    python benchmarks/attention.py --draw          draws the picture again from the results

Each kernel is called directly, as its package documents, and through `attend()` with "auto" and "measured". All take
turns, and ratios are computed within a round. TFLOP/s count the query/key pairs that the mask allows: 4 x head_dim
FLOPs for each pair and head forward, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, picture, save, save_picture, table
from torch.nn.attention import SDPBackend, sdpa_kernel

from fiddlehead.attention import BACKENDS, AttentionSpec, Target, attend, explain
from fiddlehead.attention.packages import installed, interface
from fiddlehead.attention.spec import length_class
from fiddlehead.attention.tools.measure import fastest
from fiddlehead.attention.tools.sample import Shape
from fiddlehead.errors import ConfigError

TOKENS = 16384
"""Tokens a call, or one sequence where that is longer."""
PICTURE = Path(__file__).parents[1] / "docs" / "attention.png"


@dataclass(frozen=True)
class Case:
    """One shape of the table."""

    head_dim: int
    heads: int
    groups: int
    length: int
    window: int = -1
    packed: bool = False
    """Documents of 64 to `length` tokens, one after another."""

    @property
    def name(self) -> str:
        extra = f", window {self.window}" if self.window >= 0 else ", packed" if self.packed else ""
        return f"{self.head_dim}, {self.heads}/{self.groups}, {self.length // 1024}k{extra}"

    def lengths(self) -> list[int]:
        """The length of each sequence of a call."""
        if not self.packed:
            return [self.length] * max(1, TOKENS // self.length)
        generator = torch.Generator().manual_seed(0)
        lengths, left = [], TOKENS
        while left:  # log-uniform, as documents are: many short ones, and a few that hold most of the tokens
            drawn = int(64 * (self.length / 64) ** float(torch.rand((), generator=generator)))
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        return lengths

    def flops(self) -> float:
        """FLOPs of the forward pass."""
        pairs = sum(_causal_pairs(length, self.window) for length in self.lengths())
        return 4.0 * self.head_dim * self.heads * pairs


CASES = [
    *(
        Case(head_dim, heads, groups, length)
        for head_dim in (64, 128)
        for heads, groups in ((32, 32), (32, 8), (32, 1))
        for length in (1024, 4096, 16384)
    ),
    *(Case(head_dim, 32, 8, 32768) for head_dim in (64, 128)),
    *(Case(head_dim, 32, 8, 8192, packed=True) for head_dim in (64, 128)),
    *(Case(head_dim, 32, 8, length, window=1024) for head_dim in (64, 128) for length in (8192, 32768)),
]

Step = Callable[[], Any]


def main() -> None:
    """Measures what `--only` says, and writes the results and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of attention.json")
    parser.add_argument("--png", type=Path, default=PICTURE)
    parser.add_argument("--draw", action="store_true", help="only draw --png from --out")
    arguments = parser.parse_args()
    if not arguments.draw:
        results = arguments.out / "attention.json"
        figures = json.loads(results.read_text())["figures"] if results.exists() else {}
        where = {"gpu": torch.cuda.get_device_name(), "packages": asdict(installed(probe=True))}
        for part in arguments.only:
            figures[part] = PARTS[part](arguments.rounds)
            save("attention", figures, ["torch"], where, folder=arguments.out)
    draw(json.loads((arguments.out / "attention.json").read_text()), arguments.png)


# -- time


def times(rounds: int) -> dict[str, Any]:
    """Forward, and forward with backward, of each kernel and of `attend`, for every case."""
    results, rows = {}, []
    for case in CASES:
        result = {"case": asdict(case), "forward": _case(case, rounds, False), "both": _case(case, rounds, True)}
        results[case.name] = result
        forward, both = result["forward"], result["both"]
        rows.append(
            [
                case.name,
                *(f"{forward['tflops'].get(k, 0):.0f} / {both['tflops'].get(k, 0):.0f}" for k in KERNELS),
                f"{both['chosen']} {both['ratio']['auto']:.3f}",
                f"{both['measured']} {both['ratio']['measured']:.3f}",
                f"{forward['chosen']} {forward['ratio']['auto']:.3f}",
                f"{both['nemo']:.2f}",
            ]
        )
        print(f"{time.strftime('%X')} {' | '.join(rows[-1])}", flush=True)
    header = ["head dim, heads, length", *KERNELS, "auto / fastest", "measured / fastest", "auto, forward", "over NeMo"]
    print("\nTFLOP/s forward / both; times as ratios\n")
    print(table(header, rows))
    worst = max(results.values(), key=lambda result: result["both"]["ratio"]["auto"])
    print(f"\nauto at worst {worst['both']['ratio']['auto']:.3f} of the fastest kernel's time")
    return results


def _case(case: Case, rounds: int, training: bool) -> dict[str, Any]:
    """TFLOP/s of each kernel, and the time of "auto" and "measured" over that of the fastest."""
    inputs = _inputs(case, training)
    gradient = torch.randn_like(inputs[0])
    arms: dict[str, Step] = {}
    for name in (*KERNELS, "auto", "measured"):
        try:
            call = _bare(name, case, inputs) if name in KERNELS else _attended(name, case, inputs)
            arms[name] = _step(call, inputs, gradient, training)
            arms[name]()
        except (ImportError, ConfigError, RuntimeError, AssertionError, _NoneSuchError) as error:
            arms.pop(name, None)
            if name not in KERNELS:
                raise
            if not isinstance(error, _NoneSuchError):
                print(f"{case.name}: {name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
    kernels = {name: arm for name, arm in arms.items() if name in KERNELS}
    first = {name: statistics.median(values) for name, values in _take_turns(kernels, max(3, rounds // 3)).items()}
    # The comparison that counts, among those that are nearly as fast: a slow one would only let the GPU cool down.
    ahead = sorted(first, key=lambda name: first[name])[:2]
    nemo = "cudnn" if "cudnn" in arms else "flash2" if "flash2" in arms else "sdpa_flash"
    compared = {name: arms[name] for name in dict.fromkeys([*ahead, nemo, "auto", "measured"])}
    seconds = _take_turns(compared, rounds)
    medians = first | {name: statistics.median(values) for name, values in seconds.items()}
    best = min(ahead, key=lambda name: medians[name])

    def ratio(one: str, other: str) -> float:
        return statistics.median(seconds[one]) / statistics.median(seconds[other])

    flops = case.flops() * (3.5 if training else 1)
    spec = _spec(case, training)
    device = inputs[0].device
    target = Target.of(device)
    choice = explain(spec, target)
    longest = max(case.lengths())
    shape = Shape(max(1, sum(case.lengths()) // longest), longest, longest)
    return {
        "tflops": {name: flops / median / 1e12 for name, median in medians.items()},
        "fastest": best,
        "chosen": choice.backend,
        "measured": fastest({name: BACKENDS[name] for name in choice.candidates}, spec, target, device, shape),
        "ratio": {name: ratio(name, best) for name in ("auto", "measured")},
        "nemo": ratio(nemo, "auto"),
    }


def _take_turns(arms: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each arm in each round, by the GPU's own clock, each round in another order.

    A GPU at its power limit runs the slower the more the one before has heated it.
    """
    steps = {name: max(1, int(0.01 / _gpu_seconds(arm, 3))) for name, arm in arms.items()}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in order.sample(list(arms), len(arms)):
            seconds[name].append(_gpu_seconds(arms[name], steps[name]))
    return seconds


def _gpu_seconds(arm: Step, steps: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        arm()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps / 1e3


def _step(call: Step, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor, training: bool) -> Step:
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return call()

        return forward
    return lambda: torch.autograd.grad(call(), inputs, gradient)


# -- the kernels, as their own packages say


class _NoneSuchError(Exception):
    """A kernel has nothing for a case."""


def _flash(name: str) -> Callable[[Case, tuple[torch.Tensor, ...]], Step]:
    def bare(case: Case, inputs: tuple[torch.Tensor, ...]) -> Step:
        package = interface(name)
        no_limit = None if name == "flash4" else -1
        window = (case.window if case.window >= 0 else no_limit, 0 if case.window >= 0 else no_limit)
        if not case.packed:
            return lambda: _first(package.flash_attn_func(*inputs, causal=True, window_size=window))
        borders, longest = _borders(case)
        return lambda: _first(
            package.flash_attn_varlen_func(
                *inputs,
                cu_seqlens_q=borders,
                cu_seqlens_k=borders,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=True,
                window_size=window,
            )
        )

    return bare


def _sdpa(kernel: SDPBackend) -> Callable[[Case, tuple[torch.Tensor, ...]], Step]:
    def bare(case: Case, inputs: tuple[torch.Tensor, ...]) -> Step:
        if case.packed or case.window >= 0:
            raise _NoneSuchError
        q, k, v = inputs

        def call() -> torch.Tensor:
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
                )
            return out.transpose(1, 2)

        return call

    return bare


KERNELS = {
    "flash2": _flash("flash2"),
    "flash3": _flash("flash3"),
    "flash4": _flash("flash4"),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
}


def _bare(name: str, case: Case, inputs: tuple[torch.Tensor, ...]) -> Step:
    return KERNELS[name](case, inputs)


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _attended(backend: str, case: Case, inputs: tuple[torch.Tensor, ...]) -> Step:
    q, k, v = inputs
    options: dict[str, Any] = {"backend": backend, "window_size": (case.window, -1)}
    if case.packed:
        borders, longest = _borders(case)
        options |= {"cu_seqlens_q": borders, "max_seqlen_q": longest}
    return lambda: attend(q, k, v, **options)


def _inputs(case: Case, training: bool) -> tuple[torch.Tensor, ...]:
    lengths = case.lengths()
    lead = (sum(lengths),) if case.packed else (len(lengths), case.length)
    return tuple(
        torch.randn(*lead, heads, case.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=training)
        for heads in (case.heads, case.groups, case.groups)
    )


def _borders(case: Case) -> tuple[torch.Tensor, int]:
    """cu_seqlens and the longest sequence."""
    lengths = torch.tensor([0, *case.lengths()])
    return lengths.cumsum(0).to("cuda", torch.int32), max(case.lengths())


def _spec(case: Case, training: bool) -> AttentionSpec:
    return AttentionSpec(
        dtype=torch.bfloat16,
        head_dim=case.head_dim,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        window_size=(case.window, 0) if case.window >= 0 else (-1, -1),
        packed=case.packed,
        length=length_class(max(case.lengths())),
        training=training,
    )


def _causal_pairs(length: int, window: int) -> int:
    """Query/key pairs of a causal mask, with a window of `window` keys to the left."""
    reach = length if window < 0 else min(window + 1, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


# -- the cost of choosing and wrapping


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds that a call takes on the CPU, bare and through `attend`, for a shape whose kernel is shorter."""
    case = Case(64, 8, 2, 1024)
    plain = tuple(x[:1, :128].detach().contiguous() for x in _inputs(case, False))
    leaves = tuple(x.clone().requires_grad_() for x in plain)
    gradient = torch.randn_like(plain[0])
    kinds = ("", ", training", ", with backward")
    order = random.Random(0)
    results, rows = {}, []
    for name in ("flash2", "flash3", "flash4", "cudnn", "sdpa_flash"):
        try:
            arms: dict[str, Step] = {}
            for arm, made in (("bare", _bare), ("attend", _attended)):
                call = made(name, case, leaves)
                arms[arm] = made(name, case, plain)
                arms[f"{arm}, training"] = call
                arms[f"{arm}, with backward"] = _step(call, leaves, gradient, True)
            microseconds: dict[str, list[float]] = {arm: [] for arm in arms}
            for _ in range(16 * rounds):  # short ones: a processor's pace changes from one moment to the next
                for arm in order.sample(list(arms), len(arms)):
                    microseconds[arm].append(_cpu_microseconds(arms[arm]))
        except (ImportError, ConfigError, RuntimeError) as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
            continue
        medians = {arm: statistics.median(values) for arm, values in microseconds.items()}
        results[name] = medians
        extra = {kind: medians[f"attend{kind}"] - medians[f"bare{kind}"] for kind in kinds}
        rows.append(
            [name, *(text for kind in kinds for text in (f"{medians[f'bare{kind}']:.1f}", f"{extra[kind]:+.1f}"))]
        )
    print("\nmicroseconds a call on the CPU\n")
    print(table(["kernel", *(f"{arm}{kind}" for kind in kinds for arm in ("bare", "attend"))], rows))
    return results


def _cpu_microseconds(step: Step, calls: int = 20) -> float:
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls * 1e6


# -- memory


def memory(rounds: int) -> dict[str, Any]:
    """MiB that a forward and backward pass needs beside its inputs, for one sequence of 4k to 128k tokens."""
    results: dict[str, Any] = {}
    lengths = [4096 * 2**i for i in range(6)]
    for name in ("flash2", "flash3", "flash4", "cudnn", "sdpa_flash", "reference"):
        used: dict[int, float] = {}
        for length in lengths:
            case = Case(128, 32, 8, length)
            try:
                inputs = tuple(x[:1].detach().requires_grad_() for x in _inputs(case, True))
                used[length] = _peak_mib(_attended(name, case, inputs), inputs)
            except torch.OutOfMemoryError:
                break
            except (ConfigError, RuntimeError) as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
                break
            finally:
                inputs = ()
                torch.cuda.empty_cache()
        if len(used) > 2:
            results[name] = {"mib": used, "residual": _linear_residual(used)}
        elif used:
            results[name] = {"mib": used}
    print("\nMiB forward and backward beside q, k, v and the gradient: 32/8 heads of 128, one sequence\n")
    rows = [
        [name, *(f"{r['mib'][n]:,.0f}" if n in r["mib"] else "out of memory" for n in lengths), f"{r['residual']:.1%}"]
        if "residual" in r
        else [name, *(f"{r['mib'][n]:,.0f}" if n in r["mib"] else "out of memory" for n in lengths), ""]
        for name, r in results.items()
    ]
    print(table(["kernel", *(f"{n // 1024}k" for n in lengths), "off a line"], rows))
    return results


def _peak_mib(call: Step, inputs: tuple[torch.Tensor, ...]) -> float:
    gradient = torch.randn_like(inputs[0])
    torch.autograd.grad(call(), inputs, gradient)  # compiles, and fills the caches that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call(), inputs, gradient)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _linear_residual(used: dict[int, float]) -> float:
    """The largest distance from a fitted straight line, as a share of the value there."""
    x, y = torch.tensor(list(used), dtype=torch.float64), torch.tensor(list(used.values()), dtype=torch.float64)
    design = torch.stack([x, torch.ones_like(x)], dim=1) / y[:, None]  # relative: each point counts the same
    line = torch.linalg.lstsq(design, torch.ones_like(y)[:, None]).solution
    return float((design @ line - 1).abs().max())


PARTS = {"times": times, "overhead": overhead, "memory": memory}


def draw(results: dict[str, Any], png: Path) -> None:
    """Draws TFLOP/s against length, and memory against length."""
    from fiddlehead.runs.curves import PALETTE
    from fiddlehead.runs.picture import INK, name_lines

    figure, (*speed, memory) = picture(8, 10.5, rows=3)
    colours = dict(zip(("flash4", "cudnn", "flash3", "sdpa_flash", "flash2", "reference"), PALETTE, strict=True))
    for axis, head_dim in zip(speed, (64, 128), strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for result in results["figures"]["times"].values():
            case = Case(**result["case"])
            if (case.head_dim, case.groups, case.window, case.packed) == (head_dim, 8, -1, False):
                for name, tflops in result["both"]["tflops"].items():
                    points.setdefault(name, []).append((case.length, tflops))
        for name in filter(points.get, colours):
            style = "o--" if name == "flash3" else "o-"  # which often is as fast as flash4
            axis.plot(*zip(*points[name], strict=True), style, color=colours[name], label=name)
        rings = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK}
        axis.plot(*zip(*points["auto"], strict=True), "o", label="_", **rings)
        axis.set(title=f"32/8 heads of {head_dim}, forward and backward; rings: auto", ylabel="TFLOP/s", ylim=0)
        ticks(axis, [1024, 4096, 16384, 32768])
        name_lines(axis)
    for names, line in _together(results["figures"]["memory"]).items():
        style = {"color": colours[names[0]], "label": ", ".join(names)}
        memory.plot([length for length, _ in line], [mib / 1024 for _, mib in line], "o-", **style)
    memory.set(title="Memory of one layer, 32/8 heads of 128", xlabel="tokens", ylabel="GiB")
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter("{x:g}")
    ticks(memory, [4096 * 2**i for i in range(6)])
    name_lines(memory)
    save_picture(figure, png, results["where"])


def _together(memory: dict[str, Any]) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """The lengths and MiB of the kernels; those that need the same, to a hundredth, are one line."""
    found: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for name, result in memory.items():
        line = [(int(length), mib) for length, mib in result["mib"].items()]
        same = [names for names, other in found.items() if _same(other, line)]
        found[(*same[0], name) if same else (name,)] = found.pop(same[0]) if same else line
    return found


def _same(left: list[tuple[int, float]], right: list[tuple[int, float]]) -> bool:
    return len(left) == len(right) and all(abs(a / b - 1) < 0.01 for (_, a), (_, b) in zip(left, right, strict=True))


def ticks(axis: Any, lengths: list[int]) -> None:
    """Lengths on a logarithmic axis, as people write them."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])


if __name__ == "__main__":
    main()
