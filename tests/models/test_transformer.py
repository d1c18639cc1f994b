"""The decoder: what it is made of, what it may see, and how it starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.transformer import rotary_tables, rotate

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
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
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
    cos, sin = rotary_tables(40, 8, base, torch.device("cpu"))

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
