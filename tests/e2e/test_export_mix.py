"""GGUF files of mixed types: how large they are, which tensor gets which type, bad input."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.support.tiny import TEXT, tiny_model
from tests.unit.test_models import ROPE_THETA, write_gguf
from vqllm import api
from vqllm.core.file_size import parse_bytes
from vqllm.errors import RecipeError
from vqllm.export.mix import DEFAULT_TYPES, Mix, mix_of
from vqllm.export.native_types import TYPES

MIXED = ("Q2_K", "IQ4_XS", "Q5_K", "Q8_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 divides the columns of down alone. Errors of layer 1's down count for nothing."""
    tiny = tiny_model(
        "llama",
        intermediate_size=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
    )
    with torch.no_grad():
        tiny.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight").mul_(1e-3)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model=tiny)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"{i}. {TEXT}" for i in range(300)))
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_CACHE", str(tmp_path / "cache"))


def types_of(file: Path) -> dict[str, str]:
    reader: Any = gguf.GGUFReader(file)
    return {own.name: own.tensor_type.name for own in reader.tensors if len(own.shape) == 2}


def test_a_file_has_the_size_that_is_asked_for(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vqllm")
    files = [tmp_path / f"{i}.gguf" for i in range(2)]
    for file in files:
        api.export_gguf(model, file, mix=MIXED, size="90KB", calibration=text, sequences=4)
    assert files[0].read_bytes() == files[1].read_bytes()
    size = files[0].stat().st_size
    assert 0.99 * 90_000 <= size <= 90_000
    assert f"types for a file of {size} bytes; expected KL divergence 0." in caplog.text
    found = types_of(files[0])
    assert len({*found.values()}) > 2
    for name, own in found.items():
        assert own in (*MIXED, "IQ4_NL", "Q5_1")
        assert TYPES[own].block == 32 or "ffn_down" in name
    assert found["blk.1.ffn_down.weight"] == "Q2_K"
    assert found["blk.0.ffn_down.weight"] != "Q2_K"


def test_a_mix_is_no_larger_than_the_plain_type(model: Path, text: Path, tmp_path: Path) -> None:
    plain, mixed = tmp_path / "plain.gguf", tmp_path / "mixed.gguf"
    given = {"calibration": text, "sequences": 8}
    api.export_gguf(model, plain, type="Q4_K", **given)
    api.export_gguf(model, mixed, type="Q4_K", mix=["Q3_K", "q5_0", "Q8_0"], **given)
    assert 0.99 * plain.stat().st_size <= mixed.stat().st_size <= plain.stat().st_size
    assert {*types_of(mixed).values()} <= {"Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q8_0"}
    for file in (plain, mixed):
        main = gguf.GGUFReader(file).get_field("general.file_type")
        assert main is not None
        assert main.contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S


def test_sizes_out_of_reach(model: Path, text: Path, tmp_path: Path) -> None:
    for size in ("20 KB", "2MB"):
        with pytest.raises(RecipeError, match=r"with Q3_K, Q8_0 the file takes from \d+ to \d+"):
            api.export_gguf(model, tmp_path / "a.gguf", mix="Q3_K,Q8_0", size=size)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), "Allowed are --type T"),
        ((None, "Q4_0", None), "--mix alone says"),
        (("Q4_0", None, "80MB"), "--type Q4_0 and --size 80MB"),
        (("Q4_0", "default", "80MB"), "--type Q4_0 and --size 80MB"),
        ((None, "Q4_0,Q9_K", "80MB"), "'Q9_K' is no GGUF type"),
        ((None, " ,", "80MB"), "names no type"),
        ((None, [], "80MB"), "names no type"),
        ((None, None, "large"), "--size large is no size"),
        ((None, None, "-3MB"), "--size -3MB is no size"),
        ((None, None, 0), "--size 0 is no size"),
    ],
)
def test_options_that_do_not_go_together(given: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        mix_of(*given)
    assert message in str(error.value)


def test_what_is_asked_for() -> None:
    assert mix_of("q4_0", None, None) == TYPES["Q4_0"]
    own = mix_of("Q4_0", "default", None)
    assert isinstance(own, Mix)
    assert [native.name for native in own.types] == [*DEFAULT_TYPES, "Q4_0"]
    assert mix_of(None, None, 10**8) == Mix(own.types[:-1], 10**8)


def test_sizes_as_people_write_them() -> None:
    assert parse_bytes("80MB") == parse_bytes(" 80 mb") == 80 * 10**6
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes("12345") == 12345
    assert [parse_bytes(text) for text in ("", "MB", "1e3", "3 TB x", "0")] == [None] * 5
