"""Attention to parts of the keys, put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Target, attend, explain
from fiddlehead.attention.attend import NOTHING
from fiddlehead.attention.backends.backend import Passes
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.parts import Part, attend_to_part, part_gradients
from fiddlehead.attention.tools.trial import trial, wrong

SPEC = AttentionSpec(dtype=torch.float32, head_dim=5, num_attention_heads=6, num_query_groups=3, by_passes=True)


@pytest.fixture(params=[False, True], ids=["", "careless kernel"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, or one that leaves whatever there was where queries of a document have no keys, or keys none."""
    right = BACKENDS["reference"].PASSES  # type: ignore[attr-defined]

    def alone(cu: Any, others: Any, tokens: int) -> torch.Tensor:
        found = torch.ones(tokens, dtype=torch.bool)
        for begin, end, count in zip(cu[:-1].tolist(), cu[1:].tolist(), others.diff().tolist(), strict=True):
            found[begin:end] = count == 0
        return found

    def forward(q, k, v, spec, scale, extras):
        out, lse, state = right.forward(q, k, v, spec, scale, extras)
        if extras.cu_seqlens_q is not None:
            none = alone(extras.cu_seqlens_q, extras.cu_seqlens_k, len(q))
            out[none], lse[:, none] = float("nan"), 3.0
        return out, lse, state

    def backward(dout, q, k, v, out, lse, state, spec, scale, extras):
        dq, dk, dv, _ = right.backward(dout, q, k, v, out, lse, state, spec, scale, extras)
        if extras.cu_seqlens_q is not None:
            dq[alone(extras.cu_seqlens_q, extras.cu_seqlens_k, len(q))] = float("nan")
            none = alone(extras.cu_seqlens_k, extras.cu_seqlens_q, len(k))
            dk[none] = dv[none] = float("nan")
        return dq, dk, dv, None

    if request.param:
        monkeypatch.setattr(BACKENDS["reference"], "PASSES", Passes(forward, backward))


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("packed", [False, True])
def test_the_parts_of_the_keys_give_the_output_and_the_gradients_of_all(packed: bool, softcap: float) -> None:
    torch.manual_seed(0)
    q = torch.randn(12, 6, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(20, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gradient = torch.randn_like(q)
    # The first document has no queries, the second no keys in the first part, the third none at all; tokens follow it.
    borders = {"cu_seqlens_q": [0, 0, 4, 6, 11], "cu_seqlens_k": [0, 3, 9, 9, 19]} if packed else {}
    cu = {name: torch.tensor(at, dtype=torch.int32) for name, at in borders.items()}
    longest = {"max_seqlen_q": 12, "max_seqlen_k": 20} if packed else {}
    whole = (q, k, v) if packed else (q[None], k[None], v[None])
    out = attend(*whole, causal=False, softcap=softcap, backend="reference", **cu, **longest).view(q.shape)
    expected = torch.autograd.grad(out, (q, k, v), gradient)

    of_part = []
    for keys in (slice(0, 3), slice(3, 20)):
        part = Part(5**-0.5, softcap=softcap)
        if packed:
            cu_k = (cu["cu_seqlens_k"] - keys.start).clamp(0, keys.stop - keys.start)
            part = part._replace(cu_seqlens_q=cu["cu_seqlens_q"], cu_seqlens_k=cu_k, **longest)
        of_part.append((keys, part))

    def shaped(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.detach() if packed else x.detach()[None] for x in tensors]

    results = [attend_to_part(*shaped(q, k[keys], v[keys]), part) for keys, part in of_part]
    lse = torch.stack([lse.view(6, 12) for _, lse in results])
    total = lse.logsumexp(dim=0)
    blind = total == float("-inf")
    assert blind.any() == packed
    shares = (lse - total.masked_fill(blind, 0)).exp().transpose(1, 2)[..., None]
    torch.testing.assert_close(sum(s * o.view(q.shape) for s, (o, _) in zip(shares, results, strict=True)), out)
    total = total.masked_fill(blind, float("inf"))
    of_all = *shaped(gradient, q), *shaped(out), total if packed else total[None]
    found = [part_gradients(*of_all[:2], *shaped(k[ks], v[ks]), *of_all[2:], part) for ks, part in of_part]
    dq, dk, dv = (
        [each[n].view(-1, *q.shape[1:]) if n == 0 else each[n].view(-1, 3, 5) for each in found] for n in range(3)
    )
    for got, wanted in zip((sum(dq), torch.cat(dk), torch.cat(dv)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("queries", [1, 3])
def test_cudnn_s_passes_serve_a_single_key(queries: int) -> None:
    """Which cuDNN itself does not; a ring has one where a rank has two tokens."""
    torch.manual_seed(0)
    q, dout, out = (torch.randn(2, queries, 6, 8).bfloat16() for _ in range(3))
    k, v = (torch.randn(2, 1, 3, 8).bfloat16() for _ in range(2))
    passes = BACKENDS["cudnn"].PASSES  # type: ignore[attr-defined]
    spec = replace(SPEC, dtype=torch.bfloat16, head_dim=8, causal=False, same_length=False)
    found, lse, state = passes.forward(q, k, v, spec, 0.3, NOTHING)
    wide = [x.double().repeat_interleave(2, dim=2) for x in (k, v)]
    logits = 0.3 * (q.double() * wide[0]).sum(dim=-1)
    torch.testing.assert_close(found, wide[1].to(found.dtype).expand_as(found))
    torch.testing.assert_close(lse, logits.transpose(1, 2).float(), rtol=1e-2, atol=1e-2)
    # The key's weight among all keys, of which `total` is the softmax's sum.
    total = logits.transpose(1, 2) + 1.0
    weight = (logits - total.transpose(1, 2)).exp()[..., None]
    slope = 0.3 * weight * (dout.double() * (wide[1] - out.double())).sum(dim=-1, keepdim=True)
    expected = [slope * wide[0], (slope * q.double()), weight * dout.double()]
    expected[1:] = [x.sum(dim=1, keepdim=True).unflatten(2, (3, 2)).sum(dim=3) for x in expected[1:]]
    gradients = passes.backward(dout, q, k, v, out, total.float(), state, spec, 0.3, NOTHING)[:3]
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_trial_of_a_part_sees_a_wrong_logarithm_and_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, causal: bool, packed: bool
) -> None:
    spec, device = replace(SPEC, causal=causal, packed=packed, same_length=causal), torch.device("cpu")
    right = BACKENDS["reference"].PASSES  # type: ignore[attr-defined]
    assert wrong(trial("reference", spec, device), spec) is None

    def forward(q, k, v, spec, scale, extras):
        out, lse, state = right.forward(q, k, v, spec, scale, extras)
        return out, lse / torch.log(torch.tensor(2.0)) if q.dtype == torch.float32 else lse, state

    monkeypatch.setattr(BACKENDS["reference"], "PASSES", right._replace(forward=forward))
    assert "lse" in (wrong(trial("reference", spec, device), spec) or "")


def test_only_backends_with_both_passes_serve_parts() -> None:
    newest = Packages("2.11.0", "9.19.0", *(Package(version) for version in ("2.8.3", "3.0.0", "4.0.0b36")))
    spec = replace(SPEC, dtype=torch.bfloat16, head_dim=64)
    for packed, served in ((False, {"cudnn"}), (True, set())):
        choice = explain(replace(spec, packed=packed), Target.gpu("h100", newest))
        assert set(choice.candidates) == {"flash2", "flash3", "flash4", "sdpa_flash", "reference"} | served
        assert "does not return the logarithm of the softmax's sum" in choice.reasons["flex"]
    assert explain(SPEC, Target.of(torch.device("cpu"))).candidates == ("reference",)
    assert str(SPEC).endswith("training, pass by pass")
