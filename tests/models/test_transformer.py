"""The decoder: its parameters, its masks, and its initialization."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.attention import AttentionSpec
from fiddlehead.attention.backends import sdpa_flash
from fiddlehead.errors import ConfigError
from fiddlehead.models import RopeScaling, Transformer, TransformerConfig
from fiddlehead.models.rope import Rotary, rotate

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": 31,
    "init_method_std": 0.2,
}


def transformer(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**(SMALL | changes)))


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(31, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["rope", "learned_absolute", "none"])
@pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])
def test_a_later_token_never_changes_an_earlier_logit(backend: str, positions: str) -> None:
    model = transformer(attention_backend=backend, position_embedding_type=positions, seq_length=9)
    ids = tokens(2, 9)
    before = model(ids)
    for changed in range(9):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 31
        after = model(other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed])
        assert ((after - before)[:, changed:].abs().amax(dim=-1) > 1e-5).all()


def test_samples_of_a_batch_do_not_mix() -> None:
    model, ids = transformer(), tokens(3, 7)
    together = model(ids)
    for i in range(3):
        torch.testing.assert_close(model(ids[i : i + 1])[0], together[i])


@given(base=st.sampled_from([100.0, 10_000.0]), shift=st.integers(1, 20), data=st.data())
def test_rotary_scores_depend_on_the_distance_only(base: float, shift: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    cos, sin = Rotary(8, base).tables(torch.arange(40), 40)

    def score(query: int, key: int) -> torch.Tensor:
        turned = [rotate(x, (cos[at : at + 1], sin[at : at + 1])) for x, at in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum()

    query, key = data.draw(st.integers(0, 19)), data.draw(st.integers(0, 19))
    torch.testing.assert_close(score(query, key), score(query + shift, key + shift), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score(query, query), (q * k).sum(), rtol=1e-4, atol=1e-4)


def test_without_positions_the_order_of_the_past_is_lost_and_with_them_it_is_not() -> None:
    ids = tokens(1, 6)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    for positions in ("rope", "learned_absolute"):
        model = transformer(position_embedding_type=positions, seq_length=6)
        assert not torch.allclose(model(ids)[:, -1], model(swapped)[:, -1], atol=1e-3)
    model = transformer(position_embedding_type="none", num_layers=1)
    torch.testing.assert_close(model(ids)[:, -1], model(swapped)[:, -1])


def test_a_tied_head_is_the_embedding() -> None:
    model = transformer(share_embeddings_and_output_weights=True)
    assert model.output_layer is None and not any("output_layer" in name for name in model.state_dict())
    hidden = []
    model.final_layernorm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    logits = model(tokens(2, 4))
    torch.testing.assert_close(logits, hidden[0] @ model.embedding.weight.T)
    untied = transformer()
    assert untied.output_layer is not None and untied.output_layer.weight is not untied.embedding.weight


def test_more_tokens_than_learned_positions_are_refused() -> None:
    model = transformer(position_embedding_type="learned_absolute", seq_length=5)
    model(tokens(1, 5))
    with pytest.raises(ConfigError, match="seq_length=5: the model has no position for 6 tokens"):
        model(tokens(1, 6))


def test_a_model_needs_its_vocabulary_and_the_number_of_its_positions() -> None:
    with pytest.raises(ConfigError, match="vocab_size=None"):
        transformer(vocab_size=None)
    with pytest.raises(ConfigError, match="seq_length=None"):
        transformer(position_embedding_type="learned_absolute")


@pytest.mark.parametrize(("bias", "qkv_bias"), [(False, False), (False, True), (True, False)])
def test_biases_are_where_they_are_asked_for(bias: bool, qkv_bias: bool) -> None:
    names = {name for name, _ in transformer(add_bias_linear=bias, add_qkv_bias=qkv_bias).named_parameters()}
    found = {name.split(".")[-2] for name in names if name.endswith("bias")}
    linears = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert found == (linears if bias else {"linear_qkv"} if qkv_bias else set())


def test_initial_weights_have_the_asked_spread() -> None:
    std, layers = 0.03, 8
    model = transformer(hidden_size=192, num_layers=layers, init_method_std=std, add_bias_linear=True, vocab_size=500)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            outputs = "linear_proj" in name or "linear_fc2" in name
            expected = std / math.sqrt(2 * layers) if outputs else std
            # n normal values have a spread within 4 / sqrt(2n) of what they were drawn with, and their mean is near 0.
            margin = 4 / math.sqrt(parameter.numel())
            assert abs(parameter.std().item() / expected - 1) < margin, name
            assert abs(parameter.mean().item()) < margin * expected, name


def test_initialization_is_the_seed_s() -> None:
    first, second = transformer(), transformer()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.initialize()
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_a_model_on_the_meta_device_takes_its_weights_from_a_state() -> None:
    with torch.device("meta"):
        model = transformer(share_embeddings_and_output_weights=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model(tokens(2, 3).to("meta")).shape == (2, 3, 31)
    assert not list(model.buffers())  # a buffer would be lost on the way from the meta device
    model.load_state_dict(transformer(share_embeddings_and_output_weights=True).state_dict(), assign=True)
    torch.testing.assert_close(model(tokens(2, 3)), transformer(share_embeddings_and_output_weights=True)(tokens(2, 3)))


@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout"])
def test_dropout_is_for_training_only(name: str) -> None:
    model, ids = transformer(**{name: 0.5}), tokens(1, 6)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    torch.testing.assert_close(model(ids), transformer()(ids), rtol=0, atol=0)


# -- documents in one batch that do not see each other

LENGTHS = [[3, 1, 5], [9], [2, 7]]
"""Of the documents in each window of 9 tokens."""


def borders(lengths: list[list[int]], padding: int = 0) -> torch.Tensor:
    flat = [0, *(length for window in lengths for length in window), *[0] * padding]
    return torch.tensor(flat).cumsum(0).int()


def windows_of(documents: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(documents).view(len(LENGTHS), 9)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("sdpa_flash", {}),
        ("sdpa_flash", {"position_embedding_type": "learned_absolute", "seq_length": 9}),
        ("sdpa_flash", {"window_size": (2, 0), "window_attn_skip_freq": 2}),
        ("reference", {}),
        ("reference", {"position_embedding_type": "none"}),
        ("reference", {"window_size": (2, 0), "attn_logit_softcapping": 2.0}),
        ("reference", {"rope_scaling": RopeScaling(old_context_len=16)}),
    ],
    ids=str,
)
def test_documents_kept_apart_are_each_document_alone(backend: str, changes: dict[str, Any]) -> None:
    """Logits, loss and gradients."""
    model = transformer(attention_backend=backend, **changes).double()
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(31, (length,), generator=generator) for window in LENGTHS for length in window]
    labels = [torch.randint(31, (len(document),), generator=generator) for document in ids]

    together = model(windows_of(ids), borders(LENGTHS, padding=2), 16).flatten(0, 1)
    alone = torch.cat([model(document[None])[0] for document in ids])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(model(windows_of(ids)).flatten(0, 1), alone, atol=1e-2), "documents would see each other"

    losses = [F.cross_entropy(logits, torch.cat(labels)) for logits in (together, alone)]
    torch.testing.assert_close(*losses)
    for found, expected in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_one_document_a_window_is_the_plain_batch() -> None:
    model, ids = transformer(), tokens(3, 9)
    torch.testing.assert_close(model(ids, borders([[9]] * 3), 9), model(ids))


def test_documents_need_the_longest_one_s_length() -> None:
    with pytest.raises(ConfigError, match="max_seqlen"):
        transformer()(tokens(3, 9), borders(LENGTHS))


def test_other_documents_in_the_same_shapes_compile_nothing_anew() -> None:
    model = transformer()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for lengths in (LENGTHS, [[4, 1, 1, 3], [8, 1], [9]], [[9], [9], [9]]):
        cu_seqlens = borders(lengths, padding=8 - sum(map(len, lengths)))
        torch.testing.assert_close(compiled(tokens(3, 9), cu_seqlens, 9), model(tokens(3, 9), cu_seqlens, 9))
    assert graphs == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("window", [None, (3, 0), (8, 0)])
def test_attention_is_asked_what_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int, int] | None, training: bool, packed: bool
) -> None:
    model = transformer(window_size=window, window_attn_skip_freq=None if window is None else 2, seq_length=9)
    asked: list[AttentionSpec] = []
    run = sdpa_flash.run

    def spy(q: Any, k: Any, v: Any, spec: AttentionSpec, *rest: Any) -> torch.Tensor:
        asked.append(spec)
        return run(q, k, v, spec, *rest)

    monkeypatch.setattr(sdpa_flash, "run", spy)
    # A setting that nothing had before: whatever was chosen for such calls is chosen again, and found to be the spy.
    monkeypatch.setenv("NVTE_FLASH_ATTN_V2", f"asked {window} {training} {packed}")
    with torch.set_grad_enabled(training):
        model(tokens(3, 9), *((borders(LENGTHS), 9) if packed else ()))
    said = [model.config.attention_spec(i, torch.float32, packed=packed, training=training) for i in range(2)]
    assert asked == said


def test_compiled_with_dynamic_shapes_it_serves_every_length() -> None:
    model = Transformer(
        TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=64)
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for T in (5, 9, 17):
        input_ids = torch.randint(0, 64, (2, T))
        torch.testing.assert_close(compiled(input_ids), model(input_ids))
