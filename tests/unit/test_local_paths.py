"""Names in place of local paths, and nothing else changed."""

from pathlib import Path

import pytest

from vqllm.core import local_paths

KEPT = [
    "demo",
    "self",
    "org/name",
    "wikitext:wikitext-2-raw-v1:test",
    "codes / linears / file",
    "and/or, 1/2, tokens/s",
    "text.txt",
    "",
    "/",
    "'model.layers.0.*'",
    "x" * 5000 + "/y",
]
REPLACED = {
    "/home/me/cal.txt": "cal.txt",
    "~/models/tiny": "tiny",
    "./cal.txt": "cal.txt",
    "../../texts": "texts",
    "texts/cal.txt": "cal.txt",
    "/home/me/data.jsonl#content": "data.jsonl#content",
    "models/x.gguf": "x.gguf",
    "/home/me/my texts/cal.txt": "cal.txt",
    "calibration.source=[/home/me/a.txt,self,~/b]": "calibration.source=[a.txt,self,b]",
    "failed: /home/me/x cannot be read": "failed: x cannot be read",
}


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_local_path_is_kept(text: str) -> None:
    assert local_paths.in_text(text) == text


@pytest.mark.parametrize("text", REPLACED)
def test_paths_become_names(text: str) -> None:
    assert local_paths.in_text(text) == REPLACED[text]


def test_a_folder_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_paths.name_of("a/b") == "a/b"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert local_paths.name_of("a/b") == "b"
    monkeypatch.chdir(tmp_path / "a")
    assert local_paths.name_of(".") == "a"
    assert local_paths.name_of("..") == tmp_path.name


def test_command_lines_and_calls() -> None:
    command = "vqllm quantize '/home/me/my models/x' --output=/home/me/out --set a=[/b/c.txt]"
    assert local_paths.in_command(command) == "vqllm quantize x --output=out --set 'a=[c.txt]'"
    call = "vqllm.quantize('/home/me/a b', '/x/out', seed=1, changes=('a=/b/c.txt',))"
    assert (
        local_paths.in_command(call) == "vqllm.quantize('a b', 'out', seed=1, changes=('a=c.txt',))"
    )
    assert local_paths.in_command("it's made by /home/me/run.sh") == "it's made by run.sh"


def test_all_texts_of_values() -> None:
    values = {"calibration": {"source": ["self", "/a/b.txt"]}, "bits": 2, "none": None}
    assert local_paths.in_values(values) == {
        "calibration": {"source": ["self", "b.txt"]},
        "bits": 2,
        "none": None,
    }
