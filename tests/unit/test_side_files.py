"""Which files of a model folder come into its copies."""

import json
import logging
from pathlib import Path

import pytest

from vqllm.checkpoint.side_files import copied_files, copy_files, is_side_file

OF_MODELS = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "source.spm",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "license.md", "LICENCE", "NOTICE", "Notice.txt", "COPYING",
    "USE_POLICY.md", "LICENSE-CODE", "LICENSE-MODEL", "LICENSE-APACHE-2.0.txt",
]  # fmt: skip
OF_OTHERS = [
    "notes.txt", "id_rsa", "secrets.env", "train.log", "trainer_state.json", "training_args.bin",
    "optimizer.pt", "config.yaml", "credentials.json", "wandb.json", "README.md", "config.json",
    "report.md", "report.jsonl", "proxy_loss.png", "model.safetensors", "pytorch_model.bin",
    "adapter_config.json", "events.out.tfevents.1", "license_key.txt", "tokenizer.json.bak",
    "private_vocab.json", "all_results.json", ".env", "model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", OF_MODELS)
def test_files_of_models(name: str) -> None:
    assert is_side_file(name)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_of_others(name: str) -> None:
    assert not is_side_file(name)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out" / "staging").mkdir(parents=True)
    return tmp_path / "out"


def copied(source: Path, out: Path, trust: bool = False) -> set[str]:
    copy_files(source, out, out / "staging", trust)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {str(path) for path in copied_files(source, trust)}
    return found


def test_links_that_leave_the_folder_are_left_out(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    source.mkdir()
    (secret / "templates").mkdir(parents=True)
    (secret / "key").write_text("key")
    (secret / "templates" / "a.jinja").write_text("a")
    (source / "tokenizer.json").symlink_to(secret / "key")
    (source / "additional_chat_templates").symlink_to(secret / "templates")
    (source / "modeling.py").symlink_to("../secret/key")
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").symlink_to("vocab.json")  # inside
    (source / "LICENSE").symlink_to(tmp_path / "nothing")
    with caplog.at_level(logging.WARNING, "vqllm"):
        assert copied(source, out, trust=True) == {"vocab.json", "merges.txt"}
    assert caplog.text.count("is a link to a place outside of its folder") == 3


def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path, out: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (tmp_path / "secret").write_text("key")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / "vocab.json").symlink_to("../../../secret")
    (tmp_path / "link").symlink_to(snapshot)
    assert copied(tmp_path / "link", out) == {"tokenizer.json"}


def test_paths_that_transformers_noted_become_names(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    values = {
        "name_or_path": "/home/me/x",
        "special_tokens_map_file": "/root/.cache/y",
        "a": "/b/c",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    (source / "generation_config.json").write_text('{ "eos_token_id":1 }')
    copied(source, out)
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found == {"name_or_path": "x", "special_tokens_map_file": "y", "a": "/b/c"}
    assert (out / "generation_config.json").read_text() == '{ "eos_token_id":1 }'
