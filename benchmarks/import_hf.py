"""Importing an 8B-shaped Hugging Face checkpoint, against copying its files.

    python benchmarks/import_hf.py --dir /tmp/import [--layers 32]

makes a checkpoint of random bytes at Llama 3 8B's shape (16 GB; fewer layers, less), copies it with `cp`, imports it,
and exports it again, in turns; prints the speeds and the peak of memory, and writes benchmarks/results/import_hf.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fiddle as fdl
from measure import save, table

from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
from fiddlehead.checkpoints.safetensors_files import ToWrite, write_file
from fiddlehead.recipes.llama import LLAMA3_8B

IMPORT = """
import resource, sys
from pathlib import Path
from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
kind, source, out = sys.argv[1:]
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import time
before = time.perf_counter()
(import_checkpoint if kind == "import" else export_checkpoint)(source, Path(out), progress=False)
print(time.perf_counter() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def make(folder: Path, layers: int) -> int:
    """Writes the checkpoint, and returns its size in bytes."""
    family = FAMILIES["llama"]
    config = replace(fdl.build(LLAMA3_8B), num_layers=layers, seq_length=8192)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.config_json(config) | {"dtype": "bfloat16"}))
    noise = memoryview(os.urandom(1 << 24))

    def pieces(nbytes: int):
        while nbytes:
            yield noise[: min(nbytes, len(noise))]
            nbytes -= min(nbytes, len(noise))

    shards: list[dict[str, ToWrite]] = [{}]
    for mapped in tensor_map(family, config):
        for name, shape in mapped.theirs:
            tensor = ToWrite("BF16", shape, lambda: ())
            if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > 5e9:
                shards.append({})
            shards[-1][name] = ToWrite("BF16", shape, lambda n=tensor.nbytes: pieces(n))
    for number, shard in enumerate(shards):
        write_file(folder / f"model-{number}.safetensors", shard, lambda _: None)
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(kind: str, source: Path, out: Path) -> tuple[float, int]:
    """Seconds until it is on the disk, and KiB of memory it took more than when it began."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if kind == "copy":
        start = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
        os.sync()
        return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = subprocess.run([sys.executable, "-c", IMPORT, kind, source, out], check=True, capture_output=True)
    seconds, kib = result.stdout.split()
    return float(seconds), int(kib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/import"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    shutil.rmtree(given.dir, ignore_errors=True)
    size = make(given.dir / "hf", given.layers)
    best: dict[str, tuple[float, int]] = {}
    for _ in range(given.rounds):
        for kind, source in (("copy", "hf"), ("import", "hf"), ("export", "import")):
            took = timed(kind, given.dir / source, given.dir / kind)
            best[kind] = min(best.get(kind, took), took)
    rows, figures = [], {}
    for kind, (seconds, kib) in best.items():
        speed, part = size / 1e9 / seconds, best["copy"][0] / seconds
        rows.append([kind, f"{seconds:.1f}", f"{speed:.2f}", f"{part:.2f}", f"{kib / 2**20:.2f}"])
        figures[kind] = {"seconds": seconds, "gigabytes_per_s": speed, "of_copying": part, "memory_gib": kib / 2**20}
    print(table(["", "s", "GB/s", "of copying", "GiB of memory"], rows))
    save("import_hf", figures, ["torch"], {"gigabytes": size / 1e9, "layers": given.layers})
    shutil.rmtree(given.dir)


if __name__ == "__main__":
    main()
