"""Fuzzes the readers of foreign files for a while: `python -m tests.fuzz [--seconds N] [READER]...`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from tests.fuzz.check import FaultError, check
from tests.fuzz.damage import damaged
from tests.fuzz.readers import READERS


def fuzz(name: str, seconds: float, number: int, show: bool = True) -> FaultError | None:
    """Damages the reader's file for so long; the smallest fault that was found, or None."""
    reader = READERS[name]
    deadline = time.monotonic() + seconds
    tried = 0
    fault: FaultError | None = None
    with TemporaryDirectory() as folder:
        valid = Path(folder) / "valid"
        valid.mkdir()
        reader.make(valid)
        content = (valid / reader.file).read_bytes()
        check(reader, valid, content)

        @seed(number)
        @settings(
            max_examples=10**6, deadline=None, database=None, verbosity=Verbosity.quiet, derandomize=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        @given(st.data())
        def attack(data: st.DataObject) -> None:
            nonlocal tried
            if time.monotonic() > deadline:
                raise KeyboardInterrupt
            tried += 1
            check(reader, valid, damaged(data.draw, reader, content))

        try:
            attack()
        except KeyboardInterrupt:
            pass
        except FaultError as error:
            fault = error
        except FlakyFailure as error:  # it was too slow, say, but not when the same file was tried again
            fault = FaultError(f"once, and not again: {error.exceptions[0]}")
    print(f"{name}: {tried} files, {fault or 'no fault'}", flush=True)
    return fault


def main() -> None:
    """Fuzzes each reader for its share of the time; exits with 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"{', '.join(READERS)}; all by default")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    names = [name for name in READERS if not arguments.readers or name in arguments.readers]
    warnings.simplefilter("error")
    print(f"seed {arguments.seed}")
    faults = [fuzz(name, arguments.seconds / len(names), arguments.seed) for name in names]
    sys.exit(1 if any(faults) else 0)


if __name__ == "__main__":
    main()
