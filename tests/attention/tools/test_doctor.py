"""The doctor, on complete, missing and broken installations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fiddlehead.attention import packages
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.spec import AttentionSpec, Target
from fiddlehead.attention.tools import doctor
from fiddlehead.attention.tools.doctor import Finding, Report, examine

SPEC = AttentionSpec(dtype=torch.bfloat16, head_dim=64, num_attention_heads=4, num_query_groups=2)
UNDEFINED = "its import fails: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine without a GPU, with the packages that are given, and PyTorch's own kernels only."""

    def install(**found: Package) -> None:
        everything = replace(Packages("2.11.0", None), **found)
        monkeypatch.setattr(doctor, "_cuda", lambda: (False, "no driver"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(doctor, "_nvidia_smi", list)
        monkeypatch.setattr(packages, "installed", lambda probe: everything)
        # flex is compiled for seconds; the doctor treats it as any other.
        monkeypatch.setattr(doctor.BACKENDS["flex"], "why_not", lambda spec, target: "left out")

    return install


def finding(report: Report, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.backend == name)


def test_working_backends_are_tried_and_the_others_have_a_reason(cpu_only: Callable[..., None]) -> None:
    cpu_only()
    report = examine()
    works = {finding.backend: finding.error for finding in report.findings if finding.state == "works"}
    assert works.keys() == {"sdpa_flash", "reference"}
    assert all(error is not None and 0 < error < 1e-5 for error in works.values())
    assert all(finding.state == "unavailable" and finding.detail for finding in report.findings if not finding.error)
    assert report.healthy and not report.advice
    assert report.facts.keys() == {"Python", "PyTorch", "CUDA", "cuDNN", "driver", "GPU"}


def test_a_package_that_does_not_fit_is_broken_and_has_a_command(cpu_only: Callable[..., None]) -> None:
    cpu_only(flash2=Package("2.8.3", UNDEFINED))
    report = examine()
    assert finding(report, "flash2") == Finding("flash2", "2.8.3", "broken", UNDEFINED)
    assert finding(report, "sdpa_flash").state == "works"
    assert not report.healthy
    assert len(report.advice) == 1 and "--no-build-isolation" in report.advice[0] and "2.11.0" in report.advice[0]


def test_a_login_node_without_a_driver_is_not_broken(cpu_only: Callable[..., None]) -> None:
    cpu_only(flash4=Package("4.0.0b36", "its import fails: ImportError: libcuda.so.1: cannot open shared object file"))
    report = examine()
    assert finding(report, "flash4").state == "unavailable"
    assert report.healthy and not report.advice


def _raising(*_: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nand more")


def _wrong(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q * 1.5


def _not_a_number(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q + (k.sum() + v.sum()) * float("nan")


def _wrong_gradients_at_odd_head_dims(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:
    k = k.detach() + 0 * k if k.shape[-1] % 32 else k
    return doctor.BACKENDS["reference"].run(q, k, *rest)


@pytest.mark.parametrize(
    ("run", "detail"),
    [
        (_raising, "it fails: RuntimeError: no kernel image is available"),
        (_wrong, "it fails: RuntimeError: The differentiated Tensor"),
        (_not_a_number, "it is wrong: head_dim=64: relative error of out nan, dq "),
        (
            _wrong_gradients_at_odd_head_dims,
            "it is wrong: head_dim=80: relative error of dk 1.0e+00, above 1e-04; head",
        ),
    ],
)
def test_a_kernel_that_fails_or_is_wrong_is_broken(
    cpu_only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, run: Callable[..., torch.Tensor], detail: str
) -> None:
    cpu_only()
    monkeypatch.setattr(doctor.BACKENDS["sdpa_flash"], "run", run)
    report = examine()
    assert finding(report, "sdpa_flash").state == "broken"
    assert finding(report, "sdpa_flash").detail.startswith(detail)
    assert finding(report, "reference").state == "works"
    assert not report.healthy


def test_after_a_kernel_that_broke_cuda_no_other_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def tried(name: str, version: str | None, spec: AttentionSpec, device: torch.device) -> Finding:
        calls.append(name)
        return Finding(name, version, "broken", "it fails: illegal memory access")

    monkeypatch.setattr(doctor, "_tried", tried)
    monkeypatch.setattr(doctor, "cuda_works", lambda: False)
    target = Target.gpu("a100", Packages("2.11.0", "9.19.0", flash2=Package("2.8.3")))
    findings = list(doctor._findings(SPEC, target, torch.device("cuda")))
    assert calls == ["flash2"]
    assert next(f.detail for f in findings if f.backend == "cudnn").startswith("not tried: flash2 made CUDA fail")


@pytest.mark.parametrize(
    ("gpu", "installed", "advice"),
    [
        ("a100", {}, "flash2"),
        ("h100", {"flash2": Package("2.8.3")}, "flash4"),
        ("b200", {}, "flash4"),
        ("h100", {"flash4": Package("4.0.0b36")}, None),
        ("t4", {}, None),
    ],
)
def test_what_to_install_depends_on_the_gpu(
    gpu: str, installed: dict[str, Package], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_tried", lambda name, version, spec, device: Finding(name, version, "works"))
    target = Target.gpu(gpu, Packages("2.11.0", "9.19.0", **installed))
    findings = tuple(doctor._findings(SPEC, target, torch.device("cuda")))
    lines = list(doctor._advice(findings, target, [], ""))
    assert lines == (
        [f"the fastest kernels for this GPU are those of {advice}:  {doctor.INSTALL[advice]}"] if advice else []
    )


def test_a_gpu_that_pytorch_cannot_use_is_said(cpu_only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_only()
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: [("NVIDIA H100 80GB HBM3", "550.54.15")])
    report = examine()
    assert report.facts["driver"] == "550.54.15" and "cannot use it" in report.facts["GPU"]
    assert "no driver" in report.advice[0] and "pytorch.org" in report.advice[0]
