"""Settings of all tests: one thread, and none of the user's own settings."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from lightning.fabric.utilities import registry

from tests.macs import a_mac as a_mac
from tests.start import sitecustomize

# The processes that tests start, and those that these start, do the same first.
START = str(Path(sitecustomize.__file__).parent)
if START not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [START, os.environ.get("PYTHONPATH")]))


# One thread: sums are then taken in the same order in every run, and test processes do not fight for cores, where the
# threads of OpenMP wait for each other in loops. Those that tests start have it from the environment.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# For each trainer, Lightning reads what all installed packages say of themselves: most of what making one takes.
registry.entry_points = functools.cache(registry.entry_points)

# No deadline: the first example of a property pays for what torch sets up lazily.
settings.register_profile("fiddlehead", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fiddlehead")


_unfreeze = gc.unfreeze
"""The true one: a training ends with `gc.unfreeze`, which would undo what is done before each test."""
gc.unfreeze = lambda: None
_begun = itertools.count()


def pytest_runtest_setup() -> None:
    """Lets no collection of garbage look at what there is when a test begins: the imported modules, and all tests.

    Each training collects several times, and that would take most of its time. What tests have left is looked at once
    in five hundred of them.
    """
    if next(_begun) % 500 == 0:
        _unfreeze()
        gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes long, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests launch is not noted among what the user has launched."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Seeding and launching write environment variables; the next test must not see them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's garbage collector is as programs have it: all objects are looked at."""
    monkeypatch.setattr(gc, "unfreeze", _unfreeze)
    _unfreeze()


def once(tmp_path_factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first test process which asks for it fills, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (done := folder.with_suffix(".done")).exists():
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder


def cpu_seconds() -> float:
    """What this process, and the ended ones that it has started, have computed: the same on a busy machine."""
    return sum(os.times()[:4])


def forget_modules(*packages: str) -> None:
    """Lets the `recipes/` and `launch/` of a project, and other `packages` of it, be imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("recipes", "launch", *packages)]:
        del sys.modules[name]


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what a test adds to the places that are imported from is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "recipes").exists()])
    return tmp_path
