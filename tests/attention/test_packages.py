"""Detection of the flash-attn packages, with fake packages in a folder, because none can be installed here."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from fiddlehead.attention import packages
from fiddlehead.attention.packages import CUDNN_OF_CUDA_BUILDS, NEWEST_KNOWN, SOURCES, Package, installed, interface

FUNCTIONS = """
def flash_attn_func(): ...
def _flash_attn_forward(window_size_left): ...
def _flash_attn_bwd(learnable_sink): ...
"""
FLASH2 = "flash_attn/flash_attn_interface.py"
FLASH4 = "flash_attn/cute/interface.py"


class Site:
    """A folder on the path of imports to write packages into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, path: str, text: str = FUNCTIONS) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def distribution(self, name: str, version: str) -> None:
        self.write(
            f"{name.replace('-', '_')}-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    roots = {path.partition(".")[0] for source in SOURCES.values() for path in source.modules}

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            del sys.modules[name]
        for cached in (packages._import, packages._probed, packages._listed):
            cached.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield Site(tmp_path)
    forget()


@pytest.mark.parametrize("probe", [False, True])
def test_without_packages_none_is_found(site: Site, probe: bool) -> None:
    found = installed(probe=probe)
    assert (found.flash2, found.flash3, found.flash4) == (Package(), Package(), Package())
    assert found.torch == torch.__version__


def test_interface_of_what_is_not_installed_cannot_be_had(site: Site) -> None:
    with pytest.raises(ModuleNotFoundError, match="flash_attn_interface"):
        interface("flash2")


@pytest.mark.parametrize("probe", [False, True])
def test_each_installed_package_is_found_with_its_version(site: Site, probe: bool) -> None:
    site.write("flash_attn/__init__.py", "__path__ = __import__('pkgutil').extend_path(__path__, __name__)")
    for path in (FLASH2, "flash_attn_interface.py", FLASH4):
        site.write(path)
    for name, version in (("flash-attn", "2.8.3"), ("flash-attn-3", "3.0.0"), ("flash-attn-4", "4.0.0b36")):
        site.distribution(name, version)
    found = installed(probe=probe)
    assert (found.flash2, found.flash3, found.flash4) == (Package("2.8.3"), Package("3.0.0"), Package("4.0.0b36"))
    assert interface("flash4").__name__ == "flash_attn.cute.interface"


def test_flash4_alone_is_a_namespace_package_and_not_flash2(site: Site) -> None:
    site.write(FLASH4)
    site.distribution("flash-attn-4", "4.0.0b36")
    found = installed(probe=True)
    assert (found.flash2, found.flash4) == (Package(), Package("4.0.0b36"))


@pytest.mark.parametrize("path", SOURCES["flash3"].modules)
def test_flash3_is_found_under_each_of_its_names(site: Site, path: str) -> None:
    site.write(path.replace(".", "/") + ".py", FUNCTIONS + "__version__ = '3.0.0b1'")
    package = path.partition(".")[0]
    if package != path:
        site.write(f"{package}/__init__.py", "__version__ = '3.0.0b1'")
    assert installed(probe=True).flash3 == Package("3.0.0b1")
    assert interface("flash3").__name__ == path


def test_a_module_of_the_same_name_is_not_taken_for_the_package(site: Site) -> None:
    site.write("flash_attn_interface.py", "")
    assert "no attribute 'flash_attn_func'" in (installed(probe=True).flash3.problem or "")


def test_an_undefined_symbol_is_reported_once_with_what_to_do(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.write("flash_attn/__init__.py", "")
    site.write(FLASH2, "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E\\nmore')")
    site.distribution("flash-attn", "2.8.3")
    with caplog.at_level(logging.WARNING):
        package = installed(probe=True).flash2
        assert installed(probe=True).flash2 is package
    assert [record.message for record in caplog.records] == [f"flash-attn cannot be used: {package.problem}"]
    assert package.why_not("flash-attn") == (
        "flash-attn 2.8.3 is installed but its import fails: ImportError: flash_attn_2_cuda.so: "
        f"undefined symbol: _ZN3c105ErrorC2E (built for another PyTorch or CUDA than {torch.__version__}: "
        "build or install it again)"
    )
    assert installed(probe=False).flash2 == Package("2.8.3"), "it is listed, as nothing was tried"


@pytest.mark.parametrize(
    ("name", "path", "missing"),
    [
        ("flash2", FLASH2, "flash_attn_2_cuda"),
        ("flash3", "flash_attn_interface.py", "flash_attn_3._C"),
        ("flash4", FLASH4, "cutlass_dsl_of_nobody"),
    ],
)
def test_a_package_without_what_it_needs_is_broken_and_not_absent(
    site: Site, name: str, path: str, missing: str
) -> None:
    site.write(path, f"import {missing}")
    problem = getattr(installed(probe=True), name).problem
    assert problem is not None and problem.startswith("its import fails: ModuleNotFoundError: No module named")


def test_whatever_an_import_raises_is_reported(site: Site) -> None:
    site.write(FLASH4, "raise RuntimeError('no CUDA driver')")
    site.distribution("flash-attn-4", "4.0.0b36")
    assert installed(probe=True).flash4 == Package("4.0.0b36", "its import fails: RuntimeError: no CUDA driver")


@pytest.mark.parametrize(("name", "path"), [("flash2", FLASH2), ("flash3", "flash_attn_interface.py")])
def test_a_build_from_before_its_operators_is_too_old(site: Site, name: str, path: str) -> None:
    site.write(path, FUNCTIONS.replace("window_size_left", "window_size"))
    assert "_flash_attn_forward" in (getattr(installed(probe=True), name).problem or "")


def test_the_arguments_of_an_operator_are_seen_through_its_wrapper(site: Site) -> None:
    site.write(
        "flash_attn_interface.py",
        """import torch
@torch.library.custom_op("fiddlehead_test_packages::forward", mutates_args=())
def _flash_attn_forward(q: torch.Tensor, window_size_left: int) -> torch.Tensor:
    return q.clone()
def flash_attn_func(): ...
""",
    )
    assert installed(probe=True).flash3.problem is None


@pytest.mark.parametrize(
    ("version", "note"),
    [
        *((version, None) for version in NEWEST_KNOWN.values()),
        ("2.8.3", None),
        ("2.8.3+cu13torch2.11", None),
        ("3.0.0.b1", None),
        ("3.0.0+cu130", None),
        ("4.0.0b9", None),
        (None, None),
        ("of unknown version", None),
        ("2.8.4", "newer than 2.8.3.post2, the newest tried"),
        ("2.10.0", "newer than 2.8.3.post2, the newest tried"),
        ("3.0.1", "newer than 3.0.0, the newest tried"),
        ("4.0.0b100", "newer than 4.0.0b36, the newest tried"),
        ("4.0.0", "newer than 4.0.0b36, the newest tried"),
    ],
)
def test_a_version_newer_than_known_has_a_note(version: str | None, note: str | None) -> None:
    assert Package(version).note == note


def test_a_newer_version_is_used(site: Site) -> None:
    site.write(FLASH4)
    site.distribution("flash-attn-4", "4.1.0")
    package = installed(probe=True).flash4
    assert package.why_not("flash-attn-4", oldest="4.0.0b36") is None and package.note


@pytest.mark.parametrize(
    ("version", "oldest", "refused"),
    [
        ("2.6.3", "2.7.0", True),
        ("2.7.0", "2.7.0", False),
        ("2.10.0", "2.7.0", False),
        ("4.0.0b9", "4.0.0b36", True),
        ("of unknown version", "2.7.0", False),
    ],
)
def test_versions_are_compared_as_versions(version: str, oldest: str, refused: bool) -> None:
    reason = f"flash {version} is installed but too old: at least {oldest} is needed"
    assert Package(version).why_not("flash", oldest=oldest) == (reason if refused else None)


@pytest.mark.parametrize(
    ("number", "text"), [(91900, "9.19.0"), (90100, "9.1.0"), (91002, "9.10.2"), (8907, "8.9.7"), (None, None)]
)
def test_reads_the_version_of_cudnn(monkeypatch: pytest.MonkeyPatch, number: int | None, text: str | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert installed(probe=True).cudnn == text
    # A PyTorch without CUDA says nothing of what a GPU machine has.
    monkeypatch.setattr(torch.version, "cuda", None)
    assert installed(probe=False).cudnn == (text or CUDNN_OF_CUDA_BUILDS)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert installed(probe=False).cudnn == text
