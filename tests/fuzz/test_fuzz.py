"""Files that once caused endless reading, full memory or a traceback; `make fuzz` looks for more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fiddlehead.checkpoints.huggingface.convert import import_checkpoint
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.errors import ConfigError
from fiddlehead.files.foreign import read_object
from tests.fuzz.check import check
from tests.fuzz.damage import Raw, nested, write
from tests.fuzz.readers import READERS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The valid folder of each reader."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "valid"
            made[name].mkdir()
            READERS[name].make(made[name])
        return made[name]

    return folder


def changed(content: bytes, path: tuple[Any, ...], value: Any) -> bytes:
    """JSON in which one value is another; with no path, it is all."""
    values = json.loads(content)
    at = values
    for key in path[:-1]:
        at = at[key]
    if path:
        at[path[-1]] = value
    return write(values if path else value).encode()


TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [32, 56]}
DIGITS, BRACKETS = Raw("1" * 5000), Raw("[" * 5000)
VALUES: list[tuple[str, tuple[Any, ...], Any]] = [
    *((f"config-{name}", ("num_hidden_layers",), 10**9) for name in ("llama", "gemma2", "mixtral", "qwen3_moe")),
    ("config-gpt2", ("n_layer",), 10**9),
    ("config-gpt2", ("n_positions",), 10**18),
    ("config-llama", ("num_hidden_layers",), 1e9),
    ("config-llama", ("vocab_size",), 10**18),
    ("config-llama", ("hidden_size",), DIGITS),
    ("config-llama", ("num_attention_heads",), 10**30),
    ("config-mixtral", ("num_local_experts",), 10**9),
    ("config-gpt_oss", ("max_position_embeddings",), 0),
    ("config-granite", ("max_position_embeddings",), 0),
    ("config-gemma3_text", ("rope_parameters", "full_attention"), True),
    ("config-gemma3_text", ("sliding_window_pattern",), 0),
    ("config-llama", ("rope_parameters",), {"rope_type": "yarn", "factor": 2.0, "mscale": "a", "mscale_all_dim": "a"}),
    ("config-phi3", ("original_max_position_embeddings",), "a"),
    ("config-llama", (), []),
    ("config-llama", (), BRACKETS),
    ("config-llama", (), nested(200)),
    ("index", ("weight_map", "model.norm.weight"), "../../x"),
    ("index", ("weight_map", "model.norm.weight"), "/etc/passwd"),
    ("index", ("weight_map", "model.norm.weight"), "\ud800"),
    ("index", ("weight_map", "model.norm.weight"), "x" * 300),
    ("index", ("weight_map", "model.norm.weight"), "x/" * 3000),
    ("index", ("weight_map", "model.norm.weight"), "config.json/x"),
    ("index", ("weight_map",), [[]]),
    ("tokenizer-bpe", ("model", "vocab", "a"), 10**12),
    ("tokenizer-bpe", ("model", "vocab"), [[[]]]),
    ("tokenizer-bpe", ("added_tokens",), 1),
    *(("tokenizer-unigram", ("decoder", "type"), value) for value in ([], {}, 1, None)),
    *(("tokenizer-unigram", ("decoder", "decoders"), value) for value in (1, None, [1])),
    ("tokenizer-bpe", ("pre_tokenizer",), {"type": "FixedLength", "length": 0}),
    ("tokenizer-bpe", ("decoder",), {"type": "Strip", "content": "d", "start": 10**9, "stop": 10**9}),
    ("tokenizer-bpe", ("normalizer",), {"normalizers": [{"pattern": {"String": "a"}, "content": "a" * 99}] * 9}),
    ("tokenizer-bpe", (), BRACKETS),
    ("tokenizer-config", ("chat_template",), [0]),
    ("tokenizer-config", (), None),
    ("tokenizer-config", (), BRACKETS),
    ("saved-dataset", ("_data_files", 0, "filename"), "../../x"),
    ("saved-dataset", ("_data_files", 0, "filename"), []),
    ("token-dataset", ("vocab_size",), "a"),
    ("token-dataset", ("dtype",), "O"),
    ("token-dataset", ("train", "tokens"), -1.5),
    ("token-dataset", ("sources",), "abc"),
    ("token-dataset", (), BRACKETS),
    ("status", ("pid",), "../self"),
    ("status", ("started",), []),
    ("status", (), BRACKETS),
    ("stop", ("reason",), 1),
    ("checkpoint", ("format_version",), Raw("Infinity")),
    ("forged-checkpoint", ("config",), {}),
    ("forged-checkpoint", ("config",), {"hidden_size": 8}),
    ("forged-checkpoint", ("config",), None),
    ("forged-checkpoint", ("config", "num_layers"), 10**9),
    ("forged-checkpoint", ("config", "num_moe_experts"), 10**9),
    ("forged-checkpoint", ("files",), {"../x": {}}),
    ("forged-checkpoint", ("files", "model.safetensors"), 1),
    ("forged-checkpoint", ("saved",), []),
    ("checkpoint", (), BRACKETS),
]


@pytest.mark.parametrize(("name", "path", "value"), VALUES, ids=lambda part: str(part)[:40])
def test_a_value_of_another_kind_is_read_or_refused(
    name: str, path: tuple[Any, ...], value: Any, folders: Callable[[str], Path]
) -> None:
    content = (folders(name) / READERS[name].file).read_bytes()
    check(READERS[name], folders(name), changed(content, path, value))


@pytest.mark.parametrize(
    "entry",
    [
        *({"shape": [-2, -3]}, {"shape": [2.0, 3]}, {"shape": [True, 6]}, {"shape": "23"}, {"shape": [2, 10**30]}),
        {"shape": [0, 10**30], "data_offsets": [56, 56]},
        *({"data_offsets": [0, 24]}, {"data_offsets": [-24, 0]}, {"data_offsets": [32.0, 56.0]}, {"data_offsets": []}),
        *({"dtype": []}, {"dtype": "F4"}, {"dtype": None}, {"extra": Raw("NaN")}, {"extra": [Raw("-Infinity")]}),
        *({"extra": "\ud800"}, {"\udfff": 1}),  # half of a surrogate pair
    ],
    ids=str,
)
def test_a_tensor_that_overlaps_or_has_no_shape_is_refused(
    entry: dict[str, Any], folders: Callable[[str], Path]
) -> None:
    """As the `safetensors` package, which the reader asks, refuses it."""
    content = (folders("safetensors") / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = changed(content[8 : 8 + length], ("a",), TENSOR | entry)
    damaged = len(header).to_bytes(8, "little") + header + content[8 + length :]
    check(READERS["safetensors"], folders("safetensors"), damaged)
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        READERS["safetensors"].read(folders("safetensors").parent / "damaged")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("overrides", b"model.config.hidden_size=" + b"1" * 5000),
        ("overrides", b"data.paths=" + b"[" * 5000),
        ("overrides", b"optim.betas=" + b"[" * 3000 + b"]" * 3000),
        ("overrides", b"log.name='a'" + b"+(" * 5000 + b"'"),
        ("overrides", b"model=" + b"tiny(a=" * 1000),
        ("overrides", b"model=@/dev/zero"),
        ("recipe", b"a: " + b"[" * 5000),
        ("recipe", b"a: [" + b"1," * 60000 + b"]"),
        ("recipe", b"a: " + b"1" * 5000),
        ("recipe", b"\xff"),
        ("metrics", b"step,loss\n" + b"1" * 5000 + b",2\n"),
        ("metrics", "step,loss\n²,2\n".encode()),
        ("metrics", b"\xff\n1,2\n"),
        ("examples", b'{"messages": ' + b"1" * 5000 + b"}"),
        ("lines", b'{"text": ' + b"[" * 5000),
        ("safetensors", (2**63).to_bytes(8, "little")),
        ("safetensors", b"\x04" + bytes(7) + b"null"),
    ],
    ids=lambda part: str(part)[:50],
)
def test_text_that_no_person_writes_is_read_or_refused(
    name: str, content: bytes, folders: Callable[[str], Path]
) -> None:
    check(READERS[name], folders(name), content)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("overrides", "recipe")])
def test_the_valid_file_is_read(name: str, folders: Callable[[str], Path]) -> None:
    READERS[name].read(folders(name))


def test_bytes_that_are_not_utf8_in_a_table_are_named(folders: Callable[[str], Path]) -> None:
    content = (folders("parquet") / "a.parquet").read_bytes()
    for name in ("parquet", "examples-parquet"):
        check(READERS[name], folders(name), content.replace(b"a fern", b"\xff\xfe fer").replace(b"moss", b"\xffoss"))


def test_a_table_with_two_fields_of_one_name_is_refused(tmp_path: Path) -> None:
    fields = [pa.field("content", pa.string())] * 2
    twice = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], fields=fields)
    table = pa.table({"messages": twice, "text": twice})
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("parquet", "examples-parquet"):
        with pytest.raises(ConfigError, match=r"cannot be read.*duplicate field names"):
            READERS[name].read(tmp_path)


@pytest.mark.parametrize("linked", ["config.json", "model-00001-of-00001.safetensors", "merges.txt"])
def test_a_link_out_of_the_folder_is_not_followed(linked: str, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """What is imported is copied, so that a link would carry a file of the user's away."""
    (tmp_path / "hf").mkdir()
    for file in folders("config-llama").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "hf" / linked
    (tmp_path / "elsewhere").write_bytes(file.read_bytes() if file.exists() else b"secret")
    file.unlink(missing_ok=True)
    file.symlink_to("../elsewhere")
    with pytest.raises(ConfigError, match=f"{linked}: is a link that leads out of the folder"):
        import_checkpoint(str(tmp_path / "hf"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hub_s_cache_are_followed(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    model = tmp_path / "models--a--b"
    (snapshot := model / "snapshots" / "main").mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(folders("config-llama").iterdir()):
        (model / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert HuggingFaceCheckpoint.open(snapshot).config.num_layers == 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="it is not a plain file"):
        read_object(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="it is not a plain file"):
        HuggingFaceCheckpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["config", "step", "val_loss", "format_version", "saved", "files", "crc32"])
def test_a_checkpoint_s_state_without_a_field_is_read_or_refused(name: str, folders: Callable[[str], Path]) -> None:
    reader = READERS["forged-checkpoint"]
    state = json.loads((folders("forged-checkpoint") / reader.file).read_text())
    del state[name]
    check(reader, folders("forged-checkpoint"), json.dumps(state).encode())
