"""Every backend on a GPU against the float64 reference, and each of its refusals.

    pytest -m gpu tests/attention/test_gpu.py -n 8        (flash-attn-4 compiles for seconds: several processes help)

The error may be twice that of plain PyTorch operations in the same dtype, plus a little, as in flash-attn's tests.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from fiddlehead.attention import BACKENDS, AttentionSpec, Target, attend, explain
from fiddlehead.attention.backends import flash4
from fiddlehead.attention.backends.backend import Extras
from fiddlehead.attention.backends.masks import alibi_bias, gathered, visible
from fiddlehead.attention.tools.trial import require_right, trial, wrong
from fiddlehead.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    # what flash-attn-4's compiler and PyTorch's own say of themselves
    pytest.mark.filterwarnings("ignore:Argument aux_data"),
    pytest.mark.filterwarnings("ignore:.*OperandMajorMode is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*cutlass.*is deprecated:DeprecationWarning"),
]
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

ATOL = {torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float32: 1e-5}
"""What an error may be beyond twice that of plain PyTorch, for outputs of order 1."""
FLASH2_BUILD = os.environ.get("FLASH2_BUILD", "").split()
"""For a flash-attn 2 that was built for less, the head dims and dtypes that it has, such as "64 128 torch.bfloat16"."""
ON_GPU = [name for name in BACKENDS if name != "reference"]


@dataclass(frozen=True)
class Case:
    """One call: its sizes and what it asks for."""

    name: str
    T: int = 173
    S: int = 173
    H: int = 8
    G: int = 2
    D: int = 64
    B: int = 2
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    extras: tuple[str, ...] = ()
    """Which of the tensors below the call has."""
    training: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{self.H}/{self.G}x{self.D}-{dtype}"


HEADS = ((32, 32), (32, 8), (32, 1), (12, 3))
PLAIN = [
    Case("causal", H=H, G=G, D=D, dtype=dtype)
    for D in (32, 64, 96, 128, 192, 256)
    for H, G in HEADS
    for dtype in (torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or (H, G) == (32, 8)
]
FEATURES = [
    Case("full", causal=False),
    Case("one", T=1, S=1),
    Case("float32", dtype=torch.float32),
    Case("more-keys", T=57, S=173),
    Case("more-keys-full", T=57, S=173, causal=False),
    Case("more-queries-full", T=173, S=57, causal=False),
    Case("scale", options={"scale": 0.3}),
    Case("window", options={"window_size": (30, -1)}),
    Case("window-both-sides", causal=False, options={"window_size": (30, 11)}),
    Case("window-more-keys", T=57, S=173, options={"window_size": (30, -1)}),
    Case("softcap", options={"softcap": 3.0}),
    Case("alibi", extras=("alibi",)),
    Case("alibi-full", causal=False, extras=("alibi",)),
    Case("sinks", extras=("sinks",)),
    Case("sinks-window", extras=("sinks",), options={"window_size": (30, -1)}),
    Case("padding", extras=("padding",)),
    Case("padding-full", causal=False, extras=("padding",)),
    Case("packed", extras=("packed",)),
    Case("packed-full", causal=False, extras=("packed",)),
    Case("packed-window", extras=("packed",), options={"window_size": (30, -1)}),
    Case("packed-more-keys", T=131, extras=("packed",)),
    Case("packed-softcap", extras=("packed",), options={"softcap": 3.0}),
    Case("deterministic", T=2500, S=2500, options={"deterministic": True}),  # many blocks, whose sums could race
    Case("dropout", options={"dropout": 0.2}),
    Case("decode", T=1, S=999, training=False),
    Case("cached", T=1, S=512, extras=("cached",), training=False),
    Case("cached-chunk", T=7, S=512, extras=("cached",), training=False),
    Case("paged", T=1, S=1024, extras=("cached", "paged"), training=False),
]
FEATURES = [replace(case, D=D) for D in (64, 128) for case in FEATURES]
EVERY_HEAD_DIM = [
    replace(case, D=D, dtype=dtype)
    for D in range(8, 257, 8)
    for dtype in (torch.bfloat16, torch.float16)
    for case in (
        Case("causal", T=301, S=301, H=20, G=5, B=1),
        Case("causal", T=173, S=173, H=3, G=3),
        Case("full", T=301, S=301, H=6, G=2, causal=False),
        Case("more-keys", T=200, S=333, H=8, G=1, B=1),
        Case("window", T=301, S=301, H=6, G=2, options={"window_size": (100, -1)}),
        Case("window-both-sides", T=301, S=301, H=4, G=4, causal=False, options={"window_size": (30, 70)}),
        Case("packed", T=517, S=517, H=6, G=2, extras=("packed",)),
        Case("packed-more-keys", T=331, S=473, H=3, G=3, extras=("packed",)),
    )
]
"""Kernels work in tiles of 16, 32 or 64 channels: what holds for multiples of 32 need not for the others."""


class Call:
    """The tensors of a case, and ways to run it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(len(case.name))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to("cuda", case.dtype)

        B, T, S, H, G, D = case.B, case.T, case.S, case.H, case.G, case.D
        int32: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
        extras = Extras()
        lead_q, lead_k = (B, T), (B, S)
        if "packed" in case.extras:
            borders_q = torch.tensor([0, 1, T // 3, T // 3, T - 2, T], **int32)  # one is empty
            borders_k = borders_q if S == T else torch.tensor([0, 1, S // 3, S // 3 + 4, S - 2, S], **int32)
            longest_q, longest_k = int(borders_q.diff().max()), int(borders_k.diff().max())
            extras = extras._replace(
                cu_seqlens_q=borders_q, cu_seqlens_k=borders_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k
            )
            lead_q, lead_k = (T,), (S,)
        if "alibi" in case.extras:
            extras = extras._replace(alibi_slopes=torch.rand(H, generator=generator).cuda())
        if "padding" in case.extras:
            mask = torch.rand(B, S, generator=generator) < 0.7
            mask[:, 0] = True
            extras = extras._replace(padding_mask=mask.cuda())
        page_size = 0
        if "cached" in case.extras:
            extras = extras._replace(cache_lengths=torch.tensor([S, S - 200], **int32))
        if "paged" in case.extras:
            page_size = 256
            pages = torch.randperm(B * S // page_size, generator=generator)
            extras = extras._replace(page_table=pages.to(**int32).view(B, -1))
            lead_k = (B * S // page_size, page_size)
        inputs = [draw(*lead_q, H, D), draw(*lead_k, G, D), draw(*lead_k, G, D)]
        if "sinks" in case.extras:
            inputs.append(draw(H))
        self.inputs, self.extras = inputs, extras
        self.gradient = draw(*lead_q, H, D)
        options = {"window_size": (-1, -1), "softcap": 0.0, "dropout": 0.0, "deterministic": False, **case.options}
        self.scale = options.pop("scale", D**-0.5)
        left, right = options["window_size"]
        options["window_size"] = (left, 0 if case.causal and left >= 0 else right)
        self.spec = AttentionSpec(
            dtype=case.dtype,
            head_dim=D,
            num_attention_heads=H,
            num_query_groups=G,
            causal=case.causal and not (T == 1 and "cached" not in case.extras),
            alibi="alibi" in case.extras,
            sinks="sinks" in case.extras,
            padding_mask="padding" in case.extras,
            packed="packed" in case.extras,
            cached="cached" in case.extras,
            page_size=page_size,
            same_length=T == S and "cached" not in case.extras,
            training=case.training,
            **options,
        )

    def by_backend(self, name: str) -> list[torch.Tensor]:
        """The output and the gradients, by the backend alone, whatever it says of itself."""
        return self._outcome(
            lambda spec, q, k, v, extras: BACKENDS[name].run(q, k, v, spec, self.scale, extras), self.inputs
        )

    def by_attend(self, name: str) -> list[torch.Tensor]:
        """The same through `attend`, which refuses what the backend says it cannot do."""
        e, spec = self.extras, self.spec
        if spec.cached:  # its cache has its own tests
            return self.by_backend(name)

        def call(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> Any:
            packed = {}
            if spec.packed:
                packed = {name: getattr(e, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
                packed |= {name: getattr(e, name) for name in ("max_seqlen_q", "max_seqlen_k")}
            return attend(
                *(q, k, v),
                causal=self.case.causal,
                **{"scale": self.scale, **self.case.options},
                alibi_slopes=e.alibi_slopes,
                sinks=extras.sinks,
                padding_mask=e.padding_mask,
                **packed,
                backend=name,
            )

        return self._outcome(call, self.inputs)

    def exact(self) -> list[torch.Tensor]:
        """By the reference in float64."""
        run = BACKENDS["reference"].run
        return self._outcome(
            lambda spec, q, k, v, extras: run(q, k, v, replace(spec, dropout=0.0), self.scale, extras),
            [x.double() for x in self.inputs],
        )

    def plain(self) -> list[torch.Tensor]:
        """By plain PyTorch operations in the dtype of the inputs."""
        return self._outcome(lambda spec, q, k, v, extras: _plain(q, k, v, spec, self.scale, extras), self.inputs)

    def _outcome(self, call: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(self.case.training) for x in inputs]
        extras = self.extras._replace(sinks=leaves[3]) if len(leaves) == 4 else self.extras
        with torch.set_grad_enabled(self.case.training):
            out = call(self.spec, *leaves[:3], extras)
        if not self.case.training:
            return [out]
        return [out, *torch.autograd.grad(out, leaves, self.gradient.to(out.dtype))]


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    if spec.packed:
        return _plain(q[None], k[None], v[None], replace(spec, packed=False), scale, extras)[0]
    k, v = gathered(k, extras), gathered(v, extras)
    T, S, R = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(R, dim=2), v.repeat_interleave(R, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q * scale, k)
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    spec = replace(spec, packed=extras.cu_seqlens_q is not None)
    if spec.alibi:
        scores = scores - alibi_bias(T, S, extras).to(scores.dtype)
    mask = visible(T, S, spec, extras, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    if extras.sinks is not None:
        scores = torch.cat([scores, extras.sinks.view(1, -1, 1, 1).expand(len(scores), -1, T, -1)], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num()[..., :S]
    return torch.einsum("bhts,bshd->bthd", weights, v)


def _target() -> Target:
    return Target.of(torch.device("cuda", torch.cuda.current_device()))


def _errors(actual: list[torch.Tensor], call: Call) -> list[str]:
    """Says which of the output and the gradients are off."""
    problems = []
    names = ["out", "dq", "dk", "dv", "dsinks"]
    for name, *three in zip(names, actual, call.exact(), call.plain(), strict=False):
        got, exact, plain = (x.detach().double() for x in three)
        error = float((got - exact).abs().max())
        allowed = 2 * float((plain - exact).abs().max()) + ATOL[call.case.dtype] * max(1.0, float(exact.abs().max()))
        if not error <= allowed:  # NaN is not
            problems.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    return problems


cases = pytest.mark.parametrize("case", [*PLAIN, *FEATURES], ids=str)
all_cases = pytest.mark.parametrize("case", [*PLAIN, *FEATURES, *EVERY_HEAD_DIM], ids=str)
backends = pytest.mark.parametrize("backend", ON_GPU)


@all_cases
@backends
def test_what_a_backend_claims_is_right(backend: str, case: Case) -> None:
    call = Call(case)
    reason = BACKENDS[backend].why_not(call.spec, _target())
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == "flash2" and FLASH2_BUILD and not {str(case.D), str(case.dtype)} <= set(FLASH2_BUILD):
        pytest.skip("this flash-attn 2 is built without these kernels, and does not say so")
    try:
        actual = call.by_attend(backend)
    except ConfigError as error:
        if "built without" in str(error):
            pytest.skip(str(error))
        raise
    if case.options.get("dropout"):
        _check_dropout(call, lambda: call.by_attend(backend))
        return
    assert not _errors(actual, call)
    if case.options.get("deterministic"):
        again = call.by_attend(backend)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 112])
def test_flash4_itself_still_has_wrong_gradients_where_we_pad(
    head_dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = Call(Case("causal", D=head_dim))
    if (reason := BACKENDS["flash4"].why_not(call.spec, _target())) or _target().sm != 90:
        pytest.skip(reason or "its kernels for Hopper")
    assert not _errors(call.by_backend("flash4"), call)
    monkeypatch.setattr(flash4, "gradient_padding", lambda _head_dim: 0)
    assert [problem.partition(":")[0] for problem in _errors(call.by_backend("flash4"), call)] == ["dq", "dk", "dv"]
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"flash4 is wrong on .* relative error of dq .*, dk .*, dv "):
        require_right("flash4", call.spec, _target(), torch.device("cuda", torch.cuda.current_device()))


@backends
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_passes_over_a_part_of_the_keys_are_right(backend: str, causal: bool, packed: bool) -> None:
    """Among the documents are some with only queries, or only keys, in the part."""
    spec = replace(Call(Case("causal", H=32, G=8, D=128)).spec, by_passes=True)
    spec = replace(spec, causal=causal, same_length=causal, packed=packed)
    if reason := explain(spec, _target(), backend).reasons.get(backend):
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    assert not wrong(trial(backend, spec, device), spec)


@backends
def test_a_trial_is_passed_and_takes_less_than_two_seconds_once_compiled(backend: str) -> None:
    spec = Call(Case("causal", H=32, G=8, D=112)).spec
    if reason := BACKENDS[backend].why_not(spec, _target()):
        pytest.skip(reason)
    if backend == "flash2" and FLASH2_BUILD:
        pytest.skip("this flash-attn 2 is built without these kernels, and does not say so")
    device = torch.device("cuda", torch.cuda.current_device())
    assert not wrong(trial(backend, spec, device), spec)
    start = time.perf_counter()
    trial(backend, spec, device)
    assert time.perf_counter() - start < 2


def _check_dropout(call: Call, run: Callable[[], list[torch.Tensor]]) -> None:
    """The share of weights that are dropped is right, and what is kept makes up for it; a seed decides which."""
    p, (q, _, v) = call.case.options["dropout"], call.inputs
    q.zero_()  # all weights are alike
    v.zero_()
    v[:, : v.shape[-1]] = torch.eye(v.shape[-1], dtype=v.dtype, device="cuda")[None, :, None]  # channel s is key s's
    torch.manual_seed(0)
    one = run()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True)), "the same seed drops other weights"
    assert not torch.equal(one[0], run()[0]), "nothing is drawn anew"
    kept = one[0][:, v.shape[-1] :].detach().float()  # queries that see all of these keys
    assert float((kept == 0).float().mean()) == pytest.approx(p, abs=0.005)
    weights = 1 / torch.arange(v.shape[-1] + 1, q.shape[1] + 1, device="cuda")
    assert float((kept / weights[:, None, None]).mean()) == pytest.approx(1, abs=0.01)
    # The gradient of the values sums the weights that were kept, so both passes tell of the same draw.
    expected = float((one[0].detach().double() * call.gradient).sum())
    own = float((one[3].double() * v).sum())
    assert own == pytest.approx(expected, rel=0.02, abs=1)


def _forced(backend: str, case: Case) -> str:
    """What happens if the backend is run although it refuses; in a process of its own, which it may take down."""
    call = Call(case)
    try:
        actual = call.by_backend(backend)
        torch.cuda.synchronize()
    except Exception as error:
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)  # the device's context is lost
        return f"refused: {type(error).__name__}"
    if case.options.get("dropout"):
        try:
            _check_dropout(call, lambda: call.by_backend(backend))
        except AssertionError as error:
            return f"wrong: {error}"
        return "right"
    if case.options.get("deterministic"):
        same = all(
            all(torch.equal(a, b) for a, b in zip(actual, call.by_backend(backend), strict=True)) for _ in range(20)
        )
        return "right" if same else "wrong: not the same each time"
    problems = _errors(actual, call)
    return f"wrong: {problems[0]}" if problems else "right"


@pytest.fixture(scope="module")
def elsewhere():
    """Runs `_forced` in another process, a new one after each that it took down."""
    pools: list[ProcessPoolExecutor] = []

    def run(backend: str, case: Case) -> str:
        if not pools:
            pools.append(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        try:
            return pools[0].submit(_forced, backend, case).result(timeout=120)
        except BrokenProcessPool:
            pools.clear()
            return "refused: the kernel's process died"

    yield run
    for pool in pools:
        pool.shutdown(cancel_futures=True)


@cases
@backends
def test_what_a_backend_refuses_is_true(backend: str, case: Case, elsewhere) -> None:
    reason = BACKENDS[backend].why_not(Call(case).spec, _target())
    if reason is None:
        pytest.skip("it does not refuse")
    if "not installed" in reason or "import fails" in reason:
        pytest.skip(reason)
    outcome = elsewhere(backend, case)
    print(f"{backend}: {reason!r} -> {outcome}")
    assert outcome != "right" or "(preference)" in reason, f"{backend} refuses with {reason!r}, but is right"


@backends
def test_compiled_is_one_node_forward_and_one_backward(backend: str) -> None:
    if backend in ("flash2", "flash3", "flash4", "cudnn", "sdpa_flash", "sdpa_efficient", "flex"):
        reason = BACKENDS[backend].why_not(Call(Case("causal")).spec, _target())
        if reason is not None:
            pytest.skip(reason)
    call = Call(Case("causal"))
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    graphs: list[list[str]] = []

    def record(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module.forward)

    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, backend=backend), fullgraph=True, backend=aot_autograd(fw_compiler=record)
    )
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out, leaves, call.gradient)
    if backend != "flex":  # whose node is plain operations unless inductor compiles it
        assert not _errors([out, *gradients], call)
    ours = ("attention", "flash", "fiddlehead")
    heavy = [[name for name in graph if any(part in name for part in ours)] for graph in graphs]
    assert [len(names) for names in heavy] == [1, 1], graphs


@backends
def test_inductor_agrees_and_nothing_waits_for_the_device(backend: str) -> None:
    call = Call(Case("causal", D=64))
    reason = BACKENDS[backend].why_not(call.spec, _target())
    if reason is not None:
        pytest.skip(reason)
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, backend=backend), fullgraph=True)
    compiled(*leaves).backward(call.gradient)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in leaves:
            x.grad = None
        out = compiled(*leaves)
        out.backward(call.gradient)
        call.by_attend(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not _errors([out, *(x.grad for x in leaves)], call)  # type: ignore[list-item]
