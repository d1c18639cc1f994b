"""Decodes one token with a full cache: multi-head, grouped-query and multi-query attention, with each backend.

    python benchmarks/decode.py                                 writes results/decode.json and docs/decode.png
    python benchmarks/decode.py --draw                          draws the picture again from the results
    python benchmarks/decode.py --device cpu --length 256       tries itself out, within a minute or two

A call appends a token to the cache of one layer and attends to the whole cache. Small caches are measured as several
layers in turn, which together are larger than the GPU's L2 cache, as in a model. On a GPU the calls are replayed from a
CUDA graph, so the host's time does not count. The bytes read from the cache are compared with the bandwidth of a large
copy in the same run. A paged cache grows during the replay: one of 32k by less than 0.2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, picture, save, save_picture
from rich import box
from rich.console import Console
from rich.table import Table

from fiddlehead.attention import AttentionSpec, KVCache, Target, attend, explain
from fiddlehead.attention.packages import installed
from fiddlehead.attention.spec import length_class
from fiddlehead.errors import ConfigError

PICTURE = Path(__file__).parents[1] / "docs" / "decode.png"
HEADS = {"MHA": 32, "GQA-8": 8, "MQA": 1}
"""Key/value heads of each kind; there are 32 query heads."""
NUM_ATTENTION_HEADS, HEAD_DIM, DTYPE = 32, 128, torch.bfloat16
PAGE_SIZE = 256
CHUNK = 1024
"""Positions that fill a cache at once."""
MOST_REPLAYS = 48

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One cache that is decoded with."""

    kind: str
    batch: int
    length: int
    paged: bool

    @property
    def groups(self) -> int:
        return HEADS[self.kind]

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, for each position of each sequence, in one layer."""
        return 2 * self.groups * HEAD_DIM * DTYPE.itemsize

    @property
    def bytes_read(self) -> int:
        return self.batch * self.length * self.bytes_per_token

    def spec(self) -> AttentionSpec:
        """What `attend` makes of the call."""
        return AttentionSpec(
            dtype=DTYPE,
            head_dim=HEAD_DIM,
            num_attention_heads=NUM_ATTENTION_HEADS,
            num_query_groups=self.groups,
            causal=self.paged,
            cached=self.paged,
            page_size=PAGE_SIZE if self.paged else 0,
            same_length=False,
            length=0 if self.paged else length_class(self.length),
            training=False,
        )


class Decoder:
    """The caches of a few layers, each a token short of full."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        shape = (case.batch, case.length + MOST_REPLAYS + 1, case.groups, HEAD_DIM)
        layers = -(-_must_exceed(device) // case.bytes_read)
        page_size = PAGE_SIZE if case.paged else 0
        self.caches = [KVCache.allocate(*shape, DTYPE, device, page_size) for _ in range(layers)]
        draw = {"device": device, "dtype": DTYPE}
        self.prompt = torch.randn(case.batch, min(CHUNK, case.length), case.groups, HEAD_DIM, **draw)
        self.q = torch.randn(case.batch, 1, NUM_ATTENTION_HEADS, HEAD_DIM, **draw)
        self.k, self.v = torch.randn(2, case.batch, 1, case.groups, HEAD_DIM, **draw)

    def prepare(self) -> None:
        """Fills the caches up to the token that is to be decoded."""
        for cache in self.caches:
            cache.reset()
            while left := self.case.length - 1 - cache.length:
                new = self.prompt[:, :left]
                cache.write(new, new)
                cache.advance(new.shape[1])

    def step(self, backend: str) -> None:
        """Decodes a token in every layer."""
        for cache in self.caches:
            attend(self.q, self.k, self.v, kv_cache=cache, backend=backend)


def main() -> None:
    """Measures, prints a table, and writes the results and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=32768, help="positions of each sequence, the new one among them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    parser.add_argument("--png", type=Path, default=PICTURE)
    parser.add_argument("--draw", action="store_true", help="only draw --png from --out")
    arguments = parser.parse_args()
    if not arguments.draw:
        device = torch.device(arguments.device)
        with torch.no_grad():
            figures = measured(device, arguments.length, arguments.batches, arguments.rounds)
        Console(width=150).print(table(figures))
        where = {"device": Target.of(device).name, "packages": asdict(installed(probe=device.type == "cuda"))}
        save(arguments.out.stem, figures, ["torch"], where, folder=arguments.out.parent)
    draw(json.loads(arguments.out.read_text()), arguments.png)


def measured(device: torch.device, length: int, batches: list[int], rounds: int) -> dict[str, Any]:
    """The bandwidth of a copy, and a row for each cache and backend."""
    bandwidth = copy_bandwidth(device, rounds)
    rows = []
    for paged in (False, True):
        for kind in HEADS:
            for batch in batches:
                for row in _rows(Case(kind, batch, length, paged), device, rounds):
                    row["share_of_copy"] = row["gb_per_s"] * 1e9 / bandwidth
                    rows.append(row)
    return {"length": length, "copy_gb_per_s": bandwidth / 1e9, "rows": rows}


def _rows(case: Case, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """What each backend that can serve takes; those that run out of memory are said and left out."""
    choice = explain(case.spec(), Target.of(device))
    # The reference would copy the cache to float32, which is not how anyone decodes on a GPU.
    names = [name for name in choice.candidates if name != "reference" or device.type != "cuda"]
    try:
        decoder = Decoder(case, device)
    except torch.OutOfMemoryError:
        print(f"{case}: its caches do not fit", flush=True)
        return
    for name in names:
        try:
            seconds, how = _seconds_of_a_call(decoder, name, device, rounds)
        except (torch.OutOfMemoryError, ConfigError, RuntimeError) as error:
            print(f"{case}: {name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
            continue
        print(f"{time.strftime('%X')} {case}: {name}: {seconds * 1e6:.1f} us", flush=True)
        yield {
            **asdict(case),
            "backend": name,
            "chosen": name == choice.backend,
            "timed": how,
            "layers": len(decoder.caches),
            "microseconds": seconds * 1e6,
            "tokens_per_s": case.batch / seconds,
            "bytes_per_token": case.bytes_per_token,
            "bytes": case.bytes_read,
            "gb_per_s": case.bytes_read / seconds / 1e9,
        }


# -- time


def _seconds_of_a_call(decoder: Decoder, backend: str, device: torch.device, rounds: int) -> tuple[float, str]:
    """The median time of a token in one layer, and whether it is that of a CUDA graph."""
    step, how = _replayed(decoder, backend, device)
    decoder.prepare()
    replays = max(1, min(MOST_REPLAYS, int(0.005 / _seconds(step, 1, device))))
    seconds = []
    for _ in range(rounds):
        decoder.prepare()
        seconds.append(_seconds(step, replays, device) / len(decoder.caches))
    return statistics.median(seconds), how


def _replayed(decoder: Decoder, backend: str, device: torch.device) -> tuple[Step, str]:
    """A step from a CUDA graph; where that cannot be, by calls from the host, which is said."""

    def step() -> None:
        decoder.step(backend)

    for _ in range(2):  # compiles, and chooses for just this length
        decoder.prepare()
        step()
    if device.type != "cuda":
        return step, "host"
    decoder.prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"{backend}: not in a CUDA graph, but with the host's time: {str(error)[:160]}", flush=True)
        return step, "host"
    return graph.replay, "graph"


def _seconds(step: Step, repeats: int, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1e3


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes read and written a second by a copy much larger than any cache of the processor."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2 * size / statistics.median(_seconds(copy, 4, device) for _ in range(rounds))


def _must_exceed(device: torch.device) -> int:
    """Bytes of which the GPU's L2 cache can keep only a small part from one step to the next."""
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1


# -- what is shown


def table(figures: dict[str, Any]) -> Table:
    """A row for each cache and backend; the one that "auto" takes has an asterisk."""
    shown = Table(
        box=box.MARKDOWN,
        title=f"one token with a cache of {figures['length']}, one layer, {NUM_ATTENTION_HEADS} heads of {HEAD_DIM}; "
        f"a copy reaches {figures['copy_gb_per_s']:.0f} GB/s",
    )
    for name in ("cache", "batch", "backend", "timed by"):
        shown.add_column(name)
    for name in ("us", "tokens/s", "KiB/token", "GiB", "GB/s", "of the copy"):
        shown.add_column(name, justify="right")
    for row in figures["rows"]:
        shown.add_row(
            f"{row['kind']}{', paged' if row['paged'] else ''}",
            str(row["batch"]),
            f"{row['backend']}{' *' if row['chosen'] else ''}",
            row["timed"],
            f"{row['microseconds']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['bytes_per_token'] / 2**10:g}",
            f"{row['bytes'] / 2**30:.3g}",
            f"{row['gb_per_s']:,.0f}",
            f"{row['share_of_copy']:.2f}",
        )
    return shown


def draw(results: dict[str, Any], png: Path) -> None:
    """Draws tokens a second and the size of the cache, for each kind of heads and batch, by the backend of "auto"."""
    from fiddlehead.runs.curves import PALETTE

    figures = results["figures"]
    chosen = [row for row in figures["rows"] if row["chosen"] and not row["paged"]]
    names = [f"{row['kind']} ({NUM_ATTENTION_HEADS}/{HEADS[row['kind']]}), batch {row['batch']}" for row in chosen]
    figure, both = picture(9, 4.8, columns=2)
    both[0].set_title(f"Decoding, a cache of {figures['length']:,} tokens, one layer, bfloat16, heads of {HEAD_DIM}")
    panels = (("tokens/s", "tokens_per_s", 1), ("size of the cache (MiB)", "bytes", 2**20))
    for axis, (label, field, unit) in zip(both, panels, strict=True):
        values = [row[field] / unit for row in chosen]
        for place, (row, value) in enumerate(zip(chosen, values, strict=True)):
            axis.plot(value, place, "o", color=PALETTE[list(HEADS).index(row["kind"])], markersize=8)
            beside = {"textcoords": "offset points", "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 1}}
            axis.annotate(f"{value:,.0f}", (value, place), (10, 0), **beside)
        axis.set(xscale="log", xlabel=f"{label}, logarithmic", xlim=(min(values) / 2, max(values) * 5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_yticks(range(len(names)), names if axis is both[0] else [""] * len(names))
        axis.invert_yaxis()
    save_picture(figure, png, results["where"])


if __name__ == "__main__":
    main()
