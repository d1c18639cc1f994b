"""The speed that a plan predicts: beside measured steps, and what must follow from more work or more GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fiddlehead.models.parallel import stages
from fiddlehead.plan.activations import of_layer, of_tiled_layer
from fiddlehead.plan.cards import CARDS, MAIN_MEMORY
from fiddlehead.plan.memory import Held, moments
from fiddlehead.plan.reached import REACHED
from fiddlehead.plan.speed import Speed, speed
from fiddlehead.training.distributed.sizes import Sizes
from tests.plan.test_memory import MEASURED, as_measured, parts_of

OFF: dict[str, str] = {
    "8b4 b1 256k full tiled offloaded heads 2": "attention is 83 % of it, and flash-attn 4 is faster there"
}
"""Which measured steps differ by more than 10 %, and why."""


def predicted(case: str, card: str = "h100") -> Speed | None:
    with as_measured(case):
        config, held, setting, data, trainer = parts_of(case)
        devices = trainer.num_devices * trainer.num_nodes
        return speed(config, held, setting, CARDS[card], data.seq_length, gpus=devices, gpus_per_node=8)


def of(case: str, card: str = "h100") -> Speed:
    found = predicted(case, card)
    assert found is not None
    return found


def cases() -> list[Any]:
    return [
        pytest.param(case, marks=pytest.mark.xfail(reason=OFF[case], strict=True)) if case in OFF else case
        for case, measured in MEASURED.items()
        if "float32" not in case and "seconds_per_step" in measured["figures"]  # others shared their GPUs
    ]


@pytest.mark.parametrize("case", cases())
def test_a_measured_step_takes_as_long_as_predicted(case: str) -> None:
    card = "h200" if "H200" in MEASURED[case]["what"]["device"] else "h100"
    measured = MEASURED[case]["figures"]["seconds_per_step"]["median"]
    assert of(case, card).step == pytest.approx(measured, rel=0.1)


def test_the_parts_of_a_step_add_up_to_it() -> None:
    found = of("fsdp 1b b4")
    parts = (found.products, found.attention, found.memory_bound, found.optimizer, found.communication, found.bubble)
    assert found.step == pytest.approx(sum(parts))
    assert found.tokens_per_s == pytest.approx(2 * 4 * 4096 / found.step)
    assert found.to_dict()["seconds_per_step"] == found.step


def products(**changes: Any) -> float:
    """Seconds of the products of "1b b4", so changed."""
    config, held, setting, _, _ = parts_of("1b b4")
    found = speed(config, held, replace(setting, **changes), CARDS["h100"], 4096, gpus=1, gpus_per_node=8)
    assert found is not None
    return found.products


def test_tiles_are_computed_again_once() -> None:
    """With full recomputation the feed-forward is computed again anyway, but for its second product."""
    second = (products(tiled_mlp=4096) - products()) / 3
    assert products(recompute="full", tiled_mlp=4096) == pytest.approx(products(recompute="full") + second)
    assert products() < products(tiled_mlp=4096) < products(recompute="full", tiled_mlp=4096)


def test_tiles_of_heads_project_once_more_whatever_else_is_computed_again() -> None:
    config, _, setting, _, _ = parts_of("1b b4")
    heads = config.num_attention_heads + 2 * config.groups
    once = config.num_layers * config.hidden_size * heads * config.head_dim
    for recompute in (None, "full"):
        more = products(recompute=recompute, tiled_attention=1) - products(recompute=recompute)
        of_products = 2 * once * setting.tokens / CARDS["h100"].flops
        assert of_products < more < 2 * of_products  # a part of the peak is reached
        assert more == pytest.approx(products(recompute=recompute, tiled_attention=4) - products(recompute=recompute))


def test_inputs_in_main_memory_cost_a_fifth_of_their_way_there_and_back() -> None:
    """Where the computation takes longer than the copies."""
    config, held, setting, _, _ = parts_of("1b b4 full")

    def step(**changes: Any) -> Speed:
        found = speed(config, held, replace(setting, **changes), CARDS["h100"], 4096, gpus=1, gpus_per_node=8)
        assert found is not None
        return found

    here, there = step(), step(offloads=True)
    copied = 2 * 2 * config.num_layers * setting.tokens * config.hidden_size * setting.micro_batches
    assert there.links == {"main memory": pytest.approx(0.2 * copied / 25e9)}
    assert there.step == pytest.approx(here.step + there.links["main memory"])


def test_a_state_in_main_memory_goes_both_ways_at_once_while_it_is_computed() -> None:
    config, held, setting, _, _ = parts_of("1b b4 bf16-true")

    def optimizer(held: Held) -> float:
        found = speed(config, held, setting, CARDS["h100"], 4096, gpus=1, gpus_per_node=8)
        assert found is not None
        return found.optimizer

    there = replace(held, optimizer=0.0, offloaded=held.optimizer)
    assert optimizer(there) == pytest.approx(held.optimizer / MAIN_MEMORY) and optimizer(there) > 5 * optimizer(held)
    little = replace(there, offloaded=held.optimizer / 1e4)  # of adapters
    assert optimizer(little) == pytest.approx(optimizer(replace(held, optimizer=little.offloaded)))


def test_weights_gathered_in_float8_are_half_the_bytes_beside_their_gradients() -> None:
    config, held, setting, _, _ = parts_of("fsdp 1b b4")

    def waits(**changes: Any) -> float:
        found = speed(config, held, replace(setting, **changes), CARDS["h100"], 4096, gpus=2, gpus_per_node=8)
        assert found is not None
        return found.links["NVLink"]

    vocabulary = (config.vocab_size or 0) * config.hidden_size
    layers = config.num_matmul_parameters() - vocabulary
    # Twice 2 bytes, or twice 1; and the gradients, in float32. The computation hides the same part of both.
    part = (6 * layers + 8 * vocabulary) / (8 * layers + 8 * vocabulary)
    assert waits(fp8=True, fp8_all_gather=True) / waits(fp8=True) == pytest.approx(part, rel=1e-3)
    copies = [
        moments(config, held, replace(setting, fp8=True, fp8_all_gather=each))["last"].copies for each in (False, True)
    ]
    of_layers = layers / config.num_layers
    assert copies[0] - copies[1] == pytest.approx(2 * of_layers, rel=1e-3)  # of a byte each, of two layers


def test_a_ring_is_hidden_behind_the_attention_of_long_sequences() -> None:
    config, held, setting, _, _ = parts_of("1b b4 full")

    def waits(tokens: int, ring: int) -> float:
        at = replace(setting, tokens=tokens, sizes=Sizes(1, 1, context=2), ring=ring, micro_batches=1)
        found = speed(config, held, at, CARDS["h100"], tokens, gpus=2, gpus_per_node=8)
        assert found is not None
        return found.links["NVLink"] * CARDS["h100"].link_bytes_per_s * REACHED["link"]

    H, G, D = config.num_attention_heads, config.groups, config.head_dim
    for tokens, hidden in ((65536, True), (512, False)):
        of_layers = config.num_layers * tokens / 2 * D
        # Ulysses: q, k, v and the output, three times. A ring: the last gradients of k and v, in float32.
        difference = of_layers * (3 * 2 * 2 * (H + G) - 4 * 2 * G)
        if hidden:
            assert waits(tokens, 1) - waits(tokens, 2) == pytest.approx(difference, rel=1e-3)
        else:  # attention is over before k and v, three times, and their gradients have arrived
            assert waits(tokens, 1) - waits(tokens, 2) < 0.999 * difference


def test_a_ring_keeps_what_one_rank_keeps_and_has_buffers_in_the_backward_pass() -> None:
    config, _, setting, _, _ = parts_of("1b b4")
    alone, shared = Sizes(1, 1), Sizes(1, 1, context=8)
    of_ring, of_both, of_ulysses = (replace(setting, sizes=shared, ring=n) for n in (8, 2, 1))
    kept = of_layer(config, setting, alone)
    assert of_layer(config, of_ring, shared) == kept
    assert of_layer(config, of_both, shared) == of_layer(config, of_ulysses, shared)
    C, K = config.hidden_size, config.groups * config.head_dim
    inside = [
        of_tiled_layer(config, replace(each, tiled_mlp=512), each.sizes or alone)[1] for each in (setting, of_ring)
    ]
    assert inside[1] - inside[0] == 4 * C + 2 * 2 * K * (2 + 4)


def test_in_float32_or_on_a_card_that_is_not_known_there_is_no_prediction() -> None:
    assert predicted("1b b4 float32") is None
    config, held, setting, data, _ = parts_of("1b b4")
    unknown = replace(CARDS["h100"], flops=0.0)
    assert speed(config, held, setting, unknown, data.seq_length, gpus=1, gpus_per_node=1) is None


def test_recomputation_takes_longer_and_a_faster_card_is_faster() -> None:
    assert of("1b b4").step < of("1b b4 selective").step < of("1b b4 full").step < of("1b b4 full", "a100").step
    assert of("1b b4", "h200").step < of("1b b4").step


def test_the_links_between_nodes_slow_a_step_down() -> None:
    config, held, setting, data, _ = parts_of("fsdp 1b b4")
    within, between = (
        speed(config, held, setting, CARDS["h100"], data.seq_length, gpus=2, gpus_per_node=each) for each in (2, 1)
    )
    assert within is not None and between is not None and within.communication < between.communication


def test_communication_is_told_apart_by_link() -> None:
    config, held, setting, data, _ = parts_of("fsdp 1b b4")
    known = config, held, setting
    h100, card = CARDS["h100"], CARDS["l40s"]
    within, between = (speed(*known, h100, data.seq_length, gpus=2, gpus_per_node=each) for each in (2, 1))
    no_nvlink = speed(*known, card, data.seq_length, gpus=2, gpus_per_node=2)
    assert within and between and no_nvlink
    assert [set(each.links) for each in (within, between, no_nvlink)] == [{"NVLink"}, {"InfiniBand"}, {"PCIe"}]
    assert within.communication == within.links["NVLink"] == within.parts()["waiting for NVLink"]
    split = replace(setting, sizes=Sizes(8, 1, tensor=8))
    both = speed(config, held, split, h100, data.seq_length, gpus=64, gpus_per_node=8)
    assert both and set(both.links) == {"NVLink", "InfiniBand"} and both.communication == sum(both.links.values())


def test_energy_is_the_power_of_the_cards_times_the_hours() -> None:
    found = of("fsdp 1b b4")
    assert found.kwh(10_000) == pytest.approx(2 * 0.7 * found.step * 10_000 / 3600)
    assert replace(found, watts=0.0).kwh(10_000) is None


def _in_pipeline(stages_per_rank: int = 1, **changes: Any) -> Speed:
    config, held, setting, data, _ = parts_of("1b b4")
    sizes = Sizes(1, 1, pipeline=2, stages=2 * stages_per_rank)
    at = replace(setting, sizes=sizes, micro_batches=8, **changes)
    found = speed(config, held, at, CARDS["h100"], data.seq_length, gpus=2, gpus_per_node=8)
    assert found is not None
    return found


def test_the_ranks_of_a_pipeline_wait_for_each_other_less_with_more_stages_and_without_gradients_of_weights() -> None:
    one, two = _in_pipeline(), _in_pipeline(2)
    computed = one.products + one.attention + one.memory_bound
    # The slowest rank waits once for the other one, which takes about as long for a micro-batch.
    assert 0.85 * computed / 8 < one.bubble < 1.1 * computed / 8
    assert two.bubble == pytest.approx(one.bubble / 2, rel=0.1)
    eager = _in_pipeline(compiled=False)
    zero = _in_pipeline(compiled=False, schedule="InterleavedZeroBubble")
    folded = _in_pipeline(compiled=False, schedule="ZBVZeroBubble")
    assert eager.products == zero.products and eager.bubble > zero.bubble > folded.bubble > 0


def test_the_slowest_rank_of_a_pipeline_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = _in_pipeline()
    monkeypatch.setattr(stages, "HEAD", 0.0)
    stages.first_layers.cache_clear()
    even = _in_pipeline()
    stages.first_layers.cache_clear()
    # Eight layers and the output layer, which takes as long as about three, or seven and it.
    assert 1.04 < (even.products + even.attention) / (balanced.products + balanced.attention) < 1.16
    assert balanced.step < even.step


def test_gradients_are_added_up_where_a_step_has_several_micro_batches() -> None:
    config, held, setting, data, _ = parts_of("1b b4")
    one, four = (
        speed(config, held, replace(setting, micro_batches=n), CARDS["h100"], data.seq_length, gpus=1, gpus_per_node=8)
        for n in (1, 4)
    )
    assert one is not None and four is not None
    parameters = held.parameters / 4
    added = 3 * 4 * parameters * 3 / (CARDS["h100"].bytes_per_s * REACHED["memory"])
    assert four.memory_bound - 4 * one.memory_bound == pytest.approx(added, rel=1e-3)
