"""Decoding with a cache, in calls of any size, gives the same result as one pass over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddlehead.attention import BACKENDS, KVCache, Target, attend
from fiddlehead.errors import ConfigError
from tests.attention.graphs import Graphs

MAX_LENGTH = 24
CPU = torch.device("cpu")

everywhere = pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Model:
    """The attention of one layer: its heads, and what it asks for."""

    G: int = 2
    R: int = 2
    """Query heads to a key/value head: H = G x R."""
    D: int = 8
    window: int = -1
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False

    def options(self, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(7)
        slopes, sinks = (torch.rand(self.G * self.R, generator=generator) for _ in range(2))
        return {
            "window_size": (self.window, -1),
            "softcap": self.softcap,
            "alibi_slopes": slopes.to(device) if self.alibi else None,
            "sinks": sinks.to(device, dtype) if self.sinks else None,
        }

    def inputs(self, B: int, T: int) -> list[torch.Tensor]:
        """q, k and v in float64."""
        generator = torch.Generator().manual_seed(B * 100 + T)
        heads = (self.G * self.R, self.G, self.G)
        return [torch.randn(B, T, n, self.D, generator=generator, dtype=torch.float64) for n in heads]

    def cache(
        self, B: int, page_size: int = 0, dtype: torch.dtype = torch.float64, device: torch.device = CPU
    ) -> KVCache:
        """An empty cache: what it stores would show if it were read; its pages lie among foreign ones, in no order."""
        if not page_size:
            cache = KVCache.allocate(B, MAX_LENGTH, self.G, self.D, dtype, device)
        else:
            pages = -(-MAX_LENGTH // page_size)
            pool = torch.zeros(B * pages + 3, page_size, self.G, self.D, dtype=dtype, device=device)
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(3))[: B * pages]
            cache = KVCache(pool, pool.clone(), order.to(device, torch.int32).view(B, pages))
        cache.k.fill_(9.0)
        cache.v.fill_(1e4)
        return cache


@st.composite
def models(draw: st.DrawFn, backend: str) -> Model:
    special = backend == "reference"
    return Model(
        G=draw(st.integers(1, 3)),
        R=draw(st.integers(1, 3)),
        D=draw(st.sampled_from([1, 5, 8])),
        window=draw(st.sampled_from([-1, 0, 3])),
        alibi=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 1.5])) if special else 0.0,
        sinks=draw(st.booleans()) if special else False,
    )


page_sizes = st.sampled_from([0, 0, 1, 4, 7, MAX_LENGTH])
PLAIN, PAGED = 0, 4


def one_pass(model: Model, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What is right: all at once, without a cache, in float64."""
    return attend(*inputs, **model.options(), backend="reference")


def decoded(
    model: Model, cache: KVCache, inputs: list[torch.Tensor], chunks: list[int], **arguments: Any
) -> torch.Tensor:
    """The outputs of one call per chunk, one after another."""
    parts = zip(*(x.split(chunks, dim=1) for x in inputs), strict=True)
    options = model.options(cache.k.device, cache.k.dtype)
    return torch.cat([attend(*part, **options, kv_cache=cache, **arguments) for part in parts], dim=1)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@everywhere
@given(data=st.data())
def test_decoding_in_any_chunks_equals_one_pass(backend: str, data: st.DataObject) -> None:
    model = data.draw(models(backend))
    B, chunks = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    cache = model.cache(B, data.draw(page_sizes))
    inputs = model.inputs(B, sum(chunks))
    assert_equal(decoded(model, cache, inputs, chunks, backend=backend), one_pass(model, inputs))
    assert cache.length == sum(chunks)
    assert cache.lengths.tolist() == [sum(chunks)] * B


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
@pytest.mark.parametrize(("G", "R"), [(4, 1), (2, 2), (1, 4)], ids=["MHA", "GQA", "MQA"])
@everywhere
def test_a_prompt_and_then_token_by_token(backend: str, G: int, R: int, page_size: int) -> None:
    model = Model(G=G, R=R)
    inputs = model.inputs(2, MAX_LENGTH)  # until the cache is full
    chunks = [10] + [1] * (MAX_LENGTH - 10)
    found = decoded(model, model.cache(2, page_size), inputs, chunks, backend=backend)
    assert_equal(found, one_pass(model, inputs))


@everywhere
@given(data=st.data())
def test_sequences_of_other_lengths_equal_one_pass_over_each(backend: str, data: st.DataObject) -> None:
    model = data.draw(models(backend))
    cache = model.cache(3, data.draw(page_sizes))
    # For each call, its number of positions and how many of them each of the three sequences has; None is all.
    calls = data.draw(
        st.lists(
            st.integers(1, 6).flatmap(
                lambda T: st.tuples(st.just(T), st.none() | st.lists(st.integers(0, T), min_size=3, max_size=3))
            ),
            min_size=1,
            max_size=4,
        )
    )
    real = [[T] * 3 if lengths is None else lengths for T, lengths in calls]
    totals = [sum(column) for column in zip(*real, strict=True)]
    sequences = [model.inputs(1, max(total, 1)) for total in totals]
    padded = [x.expand(3, -1, -1, -1) for x in model.inputs(1, MAX_LENGTH)]
    found: list[list[torch.Tensor]] = [[], [], []]
    starts = [0, 0, 0]
    for (T, lengths), kept in zip(calls, real, strict=True):
        new = [x[:, :T].clone() for x in padded]
        for b, n in enumerate(kept):
            for x, whole in zip(new, sequences[b], strict=True):
                x[b, :n] = whole[0, starts[b] : starts[b] + n]
        new_lengths = None if lengths is None else torch.tensor(lengths)
        out = attend(*new, **model.options(), kv_cache=cache, new_lengths=new_lengths, backend=backend)
        for b, n in enumerate(kept):
            found[b].append(out[b, :n])
            starts[b] += n
    for b, total in enumerate(totals):
        whole = [x[:, :total] for x in sequences[b]]
        if total:
            assert_equal(torch.cat(found[b]), one_pass(model, whole)[0])
    assert cache.lengths.tolist() == totals
    assert cache.length == sum(T for T, _ in calls)


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
def test_a_full_mask_sees_all_that_the_cache_holds(page_size: int) -> None:
    model = Model()
    q, k, v = model.inputs(2, 9)
    cache = model.cache(2, page_size)
    attend(q[:, :5], k[:, :5], v[:, :5], kv_cache=cache)
    found = attend(q[:, 5:], k[:, 5:], v[:, 5:], causal=False, kv_cache=cache)
    assert_equal(found, attend(q[:, 5:], k, v, causal=False, backend="reference"))


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
def test_fewer_queries_than_new_keys_are_the_last_ones(page_size: int) -> None:
    model = Model()
    q, k, v = model.inputs(2, 9)
    found = attend(q[:, -1:], k, v, kv_cache=model.cache(2, page_size))
    assert_equal(found, one_pass(model, [q, k, v])[:, -1:])


def test_prompts_padded_on_the_left_take_a_padding_mask() -> None:
    model = Model()
    inputs = model.inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    cache = model.cache(2)
    prompt = attend(*(x[:, :8] for x in inputs), kv_cache=cache, padding_mask=mask[:, :8])
    token = attend(*(x[:, 8:] for x in inputs), kv_cache=cache, padding_mask=mask)
    expected = one_pass(model, [x[1:, 3:] for x in inputs])
    assert_equal(torch.cat([prompt, token], dim=1)[1:, 3:], expected)


def test_bfloat16_is_as_near_as_its_own_rounding() -> None:
    model = Model(D=64)
    inputs = [x.bfloat16() for x in model.inputs(2, 20)]
    found = decoded(model, model.cache(2, dtype=torch.bfloat16), inputs, [17, 1, 1, 1])
    assert found.dtype == torch.bfloat16
    assert_equal(found, one_pass(model, [x.double() for x in inputs]), 2e-2)


def test_equal_lengths_are_read_as_views_and_others_in_place() -> None:
    model = Model()
    _, k, v = model.inputs(2, 5)
    cache = model.cache(2)
    written = cache.write(k, v)
    assert written.k.shape == k.shape and written.k.data_ptr() == cache.k.data_ptr()
    assert written.cache_lengths is None and written.page_table is None
    cache.advance(5, torch.tensor([5, 2]))
    written = cache.write(k[:, :1], v[:, :1])
    assert written.k is cache.k and written.v is cache.v
    assert written.cache_lengths is not None and written.cache_lengths.tolist() == [6, 3]
    assert written.cache_lengths.dtype == torch.int32


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
def test_the_host_never_asks_the_device(page_size: int) -> None:
    # Tensors of this device have no values: to read one is an error.
    cache = KVCache.allocate(2, MAX_LENGTH, 2, 8, torch.float32, "meta", page_size)
    k = torch.empty(2, 5, 2, 8, device="meta")
    cache.write(k, k)
    cache.advance(5, torch.empty(2, dtype=torch.int32, device="meta"))
    cache.write(k, k)
    cache.advance(5)
    assert cache.length == 10 and cache.lengths.shape == (2,)
    cache.reset()


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
def test_after_a_reset_a_cache_is_like_a_new_one(page_size: int) -> None:
    model = Model()
    inputs = model.inputs(2, 12)
    cache = model.cache(2, page_size)
    lengths, storage = cache._lengths, cache.k.data_ptr()
    attend(*inputs, kv_cache=cache, new_lengths=torch.tensor([12, 3]))
    cache.reset()
    assert cache.length == 0 and cache.lengths.tolist() == [0, 0]
    assert_equal(decoded(model, cache, inputs, [4, 8]), one_pass(model, inputs))
    assert cache.k.data_ptr() == storage and cache._lengths is lengths  # where a captured graph looks for them


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
def test_what_is_cut_off_is_read_again_as_if_it_had_not_been(page_size: int, ragged: bool) -> None:
    model = Model()
    inputs, others = model.inputs(2, 12), model.inputs(2, 12)
    cache = model.cache(2, page_size)
    begun = [each[:, :4] for each in inputs]
    attend(*begun, kv_cache=cache, **({"new_lengths": torch.tensor([4, 4])} if ragged else {}))  # type: ignore[arg-type]
    attend(*[each[:, 4:9] + 1 for each in others], kv_cache=cache)
    cache.truncate(4)
    cache.truncate(7)  # which it does not have
    assert cache.length == 4 and cache.lengths.tolist() == [4, 4]
    rest = attend(*[each[:, 4:] for each in inputs], kv_cache=cache)
    assert_equal(rest, one_pass(model, inputs)[:, 4:])


def test_the_lengths_given_out_stay_as_they_were() -> None:
    model = Model()
    cache = model.cache(2, PAGED)
    before = cache.lengths
    attend(*model.inputs(2, 3), kv_cache=cache)
    assert before.tolist() == [0, 0] and cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("groups", [32, 8, 1])
def test_bytes_go_with_the_number_of_groups(groups: int) -> None:
    cache = KVCache.allocate(2, 100, groups, 16, torch.bfloat16, "meta")
    assert cache.nbytes == 2 * 2 * 100 * groups * 16 * 2
    paged = KVCache.allocate(2, 100, groups, 16, torch.bfloat16, "meta", page_size=64)
    assert (paged.max_length, paged.nbytes) == (128, 2 * 2 * 128 * groups * 16 * 2)


def test_inference_mode_may_begin_and_end_around_any_call() -> None:
    model = Model()
    inputs = model.inputs(2, 9)
    parts = list(zip(*(x.split(3, dim=1) for x in inputs), strict=True))
    cache = model.cache(2, PAGED)
    out = [attend(*parts[0], kv_cache=cache)]
    with torch.inference_mode():
        out.append(attend(*parts[1], kv_cache=cache))
    out.append(attend(*parts[2], kv_cache=cache))
    assert_equal(torch.cat(out, dim=1), one_pass(model, inputs))


# -- what is refused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch=0: must be 1 or more"),
        ({"max_length": 0, "head_dim": -1}, "max_length=0: must be 1 or more\nhead_dim=-1: must be 1 or more"),
        ({"page_size": -1}, "page_size=-1: must be 1 or more, or 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    fitting = {"batch": 1, "max_length": 8, "num_query_groups": 1, "head_dim": 8}
    with pytest.raises(ConfigError, match=message):
        KVCache.allocate(**(fitting | sizes), dtype=torch.float32, device="cpu")


def test_storage_that_does_not_fit_together_is_refused() -> None:
    k = torch.zeros(4, 8, 1, 8)
    with pytest.raises(ConfigError, match="expected two alike of four dimensions"):
        KVCache(k, k.double())
    with pytest.raises(ConfigError, match="expected two alike of four dimensions"):
        KVCache(k[0], k[0])
    with pytest.raises(ConfigError, match=r"page_table: is \(2, 2\) torch.int64; expected .* int32"):
        KVCache(k, k, torch.arange(4).view(2, 2))


INPUTS = Model().inputs(2, 4)
MASKED = {"new_lengths": torch.tensor([4, 2])}
REFUSED: dict[str, tuple[list[torch.Tensor], dict[str, Any], str]] = {
    "another batch": ([x[:1] for x in INPUTS], {}, r"do not fit the cache: expected \(2, T, 2, 8\) twice"),
    "packed": ([x.flatten(0, 1) for x in INPUTS], {}, "do not fit"),
    "another head dim": ([x[..., :4] for x in INPUTS], {}, "do not fit the cache"),
    "fewer queries' sequences": ([INPUTS[0][:1], *INPUTS[1:]], {}, "expected as many sequences of both"),
    "another dtype": ([x.float() for x in INPUTS], {}, "k is torch.float32 .* the cache is torch.float64"),
    "another device": ([x.to("meta") for x in INPUTS], {}, "k is torch.float64 on meta .* on cpu"),
    "too many": (Model().inputs(2, MAX_LENGTH), {}, "max_length=24: 3 positions are taken, with padding, and 24"),
    "padding without a mask": (
        INPUTS,
        {"causal": False, **MASKED},
        "new_lengths: needs causal=True, .* has causal=False",
    ),
    "padding of fewer queries": ([INPUTS[0][:, :1], *INPUTS[1:]], MASKED, "1 queries and 4 new keys"),
    "lengths of another batch": (
        INPUTS,
        {"new_lengths": torch.tensor([4])},
        r"new_lengths: has shape \(1,\); expected \(2,\)",
    ),
    "heads of no group": ([INPUTS[0][:, :, :3], *INPUTS[1:]], {}, "G dividing H"),
    "a backend that is not here": (INPUTS, {"backend": "flash2"}, "flash2: needs an NVIDIA GPU"),
}


@pytest.mark.parametrize("page_size", [PLAIN, PAGED])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_leaves_the_cache_as_it_was(case: str, page_size: int) -> None:
    inputs, arguments, message = REFUSED[case]
    model = Model()
    whole = model.inputs(2, 7)
    cache = model.cache(2, page_size)
    first = decoded(model, cache, [x[:, :3] for x in whole], [3])
    with pytest.raises(ConfigError, match=message):
        attend(*inputs, kv_cache=cache, **arguments)
    assert cache.length == 3 and cache.lengths.tolist() == [3, 3]
    rest = decoded(model, cache, [x[:, 3:] for x in whole], [4])
    assert_equal(torch.cat([first, rest], dim=1), one_pass(model, whole))


def test_gradients_are_refused() -> None:
    q, k, v = Model().inputs(2, 4)
    with torch.enable_grad(), pytest.raises(ConfigError, match=r"decode under torch\.no_grad"):
        attend(q, k.requires_grad_(), v, kv_cache=Model().cache(2))


def test_lengths_of_new_positions_need_a_cache() -> None:
    with pytest.raises(ConfigError, match="new_lengths: needs a kv_cache"):
        attend(*INPUTS, new_lengths=MASKED["new_lengths"])


# -- compiled


@pytest.mark.parametrize("kind", ["equal lengths", "other lengths", "paged"])
def test_compiled_it_is_one_graph_that_is_traced_a_few_times(kind: str) -> None:
    graphs = Graphs()

    @torch.compile(fullgraph=True, backend=graphs.backend)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return attend(q, k, v, kv_cache=cache, backend="reference")

    model = Model()
    inputs = model.inputs(2, 20)
    cache = model.cache(2, PAGED if kind == "paged" else PLAIN)
    new_lengths = torch.tensor([8, 8]) if kind == "other lengths" else None
    out = [attend(*(x[:, :8] for x in inputs), kv_cache=cache, new_lengths=new_lengths)]
    q, k, v = inputs
    out += [step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache) for t in range(8, 20)]
    assert_equal(torch.cat(out, dim=1), one_pass(model, inputs))
    assert len(graphs.names) == 2  # the second one for a length that changes
    assert cache.length == 20


# -- on a GPU

QUIET = [
    pytest.mark.filterwarnings("ignore:Argument aux_data"),
    pytest.mark.filterwarnings("ignore:.*OperandMajorMode is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:.*cutlass.*is deprecated:DeprecationWarning"),
]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for a GPU, where compilers' warnings of themselves do not count."""
    for mark in [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), *QUIET]:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("page_size", [0, 256], ids=["plain", "paged"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_decoding_equals_one_pass(backend: str, ragged: bool, page_size: int) -> None:
    device = torch.device("cuda")
    cache = KVCache.allocate(2, 512, 2, 128, torch.bfloat16, device, page_size)
    if cache.page_table is not None:
        cache.page_table.copy_(cache.page_table.flip(0, 1))
    model = Model(G=2, R=4, D=128)
    inputs = [x.bfloat16() for x in model.inputs(2, 270)]  # into the second page
    moved = [x.to(device) for x in inputs]
    missing = 3 if ragged else 0
    new_lengths = torch.tensor([260, 260 - missing], device=device) if ragged else None

    def new(t: int) -> list[torch.Tensor]:
        """The t-th tokens, of the second sequence the one that follows those it has."""
        return [torch.stack([x[0, t : t + 1], x[1, t - missing : t - missing + 1]]) for x in moved]

    try:
        out = [attend(*(x[:, :260] for x in moved), kv_cache=cache, new_lengths=new_lengths, backend=backend)]
        out.append(attend(*new(260), kv_cache=cache, backend=backend))
    except ConfigError as error:  # why is the business of other tests
        pytest.skip(str(error))
    steps = [new(t) for t in range(261, 270)]
    if backend != "flex":  # which compiles once more for a length that changes
        torch.cuda.set_sync_debug_mode("error")
    try:
        out += [attend(*step, kv_cache=cache, backend=backend) for step in steps]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = torch.cat(out, dim=1)
    expected = one_pass(model, [x.double() for x in inputs])
    assert_equal(found[0], expected[0], 2e-2)
    assert_equal(found[1, : 260 - missing], expected[1, : 260 - missing], 2e-2)
    assert_equal(found[1, 260:], expected[1, 260 - missing : 270 - missing], 2e-2)


@on_gpu
@pytest.mark.parametrize("page_size", [0, 256], ids=["ragged", "paged"])
def test_on_a_gpu_a_captured_graph_moves_on_with_each_replay(page_size: int) -> None:
    device = torch.device("cuda")
    if Target.of(device).sm < 80:
        pytest.skip("bfloat16 kernels need sm80")
    model = Model(G=2, R=4, D=128)
    inputs = [x.to(device, torch.bfloat16) for x in model.inputs(2, 40)]
    cache = KVCache.allocate(2, 512, 2, 128, torch.bfloat16, device, page_size)

    def prompt() -> torch.Tensor:
        cache.reset()
        new_lengths = torch.tensor([30, 30], device=device)
        return attend(*(x[:, :30] for x in inputs), kv_cache=cache, new_lengths=new_lengths)

    token = [x[:, :1].clone() for x in inputs]
    stream = torch.cuda.Stream()
    prompt()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(*token, kv_cache=cache)  # what is made at the first call must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*token, kv_cache=cache)
    found = [prompt()]
    for t in range(30, 40):
        for x, whole in zip(token, inputs, strict=True):
            x.copy_(whole[:, t : t + 1])
        graph.replay()
        found.append(out.clone())
    assert_equal(torch.cat(found, dim=1), one_pass(model, [x.cpu().double() for x in inputs]), 2e-2)
    assert cache.lengths.tolist() == [40, 40]
