"""The command line as a user meets it, in a process of its own where exit codes matter."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.params import slow
from tests.support.tiny import TEXT, save_tiny
from vqllm import api, cli
from vqllm.errors import ModelError
from vqllm.runs.devices import device_of

SMALL = ("--set", "calibration.sequences=4", "--set", "calibration.length=32")
COMMAND = (sys.executable, "-c", "from vqllm.cli import main; main()")


def vqllm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    root = Path(cli.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of 256 positions."""
    return save_tiny(tmp_path_factory.mktemp("model") / "learned", "opt")


@pytest.fixture(scope="module")
def renumbered(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with a tokenizer of the same words under other numbers."""
    folder = shutil.copytree(source, tmp_path_factory.mktemp("model") / "renumbered")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = list(tokenizer["model"]["vocab"])
    numbers = [0, 1, 2, *range(len(words) - 1, 2, -1)]
    tokenizer["model"]["vocab"] = dict(zip(words, numbers))
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    # In a process of its own: what it logs goes to its standard error.
    done = vqllm("quantize", source, "--output", output, "--calibration", text, *SMALL)
    assert done.returncode == 0, done.stderr
    for shown in ("bits per weight", "perplexity", "KL divergence", "top-1", "peak memory"):
        assert shown in done.stdout
    assert "from_pretrained" in done.stdout
    assert "layer 1: 7 linears" in done.stderr
    return output


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_eval_against_the_original(quantized: Path, source: Path, text: Path) -> None:
    results = quantized.parent / "results.json"
    options = ("--text", text, "--window-length", 64, "--windows", 3, "--json", results)
    assert "perplexity" in invoke("eval", quantized, "--baseline", source, *options)
    measured = json.loads(results.read_text())["text"]
    assert measured["num_windows"] == 3
    assert measured["kl"] > 0
    assert 0 <= measured["top1"] <= 1
    invoke("eval", source, "--baseline", source, *options)
    itself = json.loads(results.read_text())["text"]
    assert abs(itself["kl"]) < 1e-6
    assert itself["top1"] == 1


def test_generate_inspect_dequantize(quantized: Path) -> None:
    prompt = "The quick brown fox"
    assert invoke("generate", quantized, "--prompt", prompt, "--max-new-tokens", 4).startswith(
        prompt
    )
    found = json.loads(invoke("inspect", quantized, "--json"))
    assert len(found["linears"]) == 14
    assert all(row["proxy_loss"] > 0 for row in found["linears"])
    share = found["parameters"]["layers_quantized"] / found["parameters"]["layers"]
    shown = invoke("inspect", quantized)
    assert f"│ {100 * share:.2f} % of the" in shown  # the table breaks its lines
    assert "modules not quantized" in shown
    dense = quantized.parent / "dense"
    invoke("dequantize", quantized, "--output", dense)
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    dense_text = invoke("generate", dense, "--prompt", prompt, "--max-new-tokens", 4)
    assert dense_text == invoke("generate", quantized, "--prompt", prompt, "--max-new-tokens", 4)


def test_a_refused_json_file_is_left_as_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    for file in (old, new):
        with pytest.raises(ModelError):
            invoke("eval", tmp_path / "none", "--text", "text.txt", "--json", file)
    assert old.read_text() == "{}"
    assert not new.exists()


def test_devices_are_those_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(device_of(None)) == "cuda"
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert str(device_of(name)) == name
    for name in ("cuda:2", "cuda:-1", "cpu:3", "meta", "tpu", "", "0"):
        with pytest.raises(ModelError, match="use one of cpu, cuda, cuda:0, cuda:1"):
            device_of(name)


@pytest.mark.parametrize("reader", ["true", slow("head -1")])
def test_output_that_nobody_reads_ends_quietly(reader: str) -> None:
    command = f'"$@" recipes | {reader}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *COMMAND],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.stderr == ""


def test_output_that_cannot_be_written_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert done.returncode == 1
    assert done.stderr.startswith("vqllm: standard output cannot be written")
    assert "Traceback" not in done.stderr


def test_listings() -> None:
    assert "e8p-2bit" in invoke("recipes")
    assert "type: e8p" in invoke("recipes", "e8p-2bit")
    listing = invoke("codecs")
    for name in ("e8p", "kmeans", "residual", "uniform", "hadamard", "ldlq"):
        assert name in listing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such-model", "--output", "out"), "no/such-model"),
        (("SOURCE", "--output", "out", "--recipe", "e8p-9bit"), "unknown recipe"),
        (("SOURCE", "--output", "out", "--bits", "9"), "numbers of bits from 1.1 to 5"),
        (("SOURCE", "--output", "out", "--set", "codec.tpye=3"), "unknown key"),
        (("SOURCE", "--output", "SOURCE"), "not empty"),
        (("SOURCE", "--output", "out", "--calibration", "missing.txt"), "missing.txt"),
        (("SOURCE", "--output", "out", "--calibration", "SHORT"), "tokens"),
        (("SOURCE", "--output", "out", "--device", "tpu9"), "no device"),
        (("SOURCE", "--output", "out", "--device", "meta"), "no device"),
        (("SOURCE", "--output", "out", "--bits", "0"), "numbers of bits from 1.1 to 5"),
        (("SOURCE", "--output", "out", "--recipe", ""), "unknown recipe ''"),
        (("SOURCE", "--output", "out", "--calibration", ""), "name of a text is empty"),
        (("eval", "SOURCE", "--text", "TEXT", "--windows", "0"), "'--windows'"),
        (("eval", "SOURCE", "--text", "TEXT", "--window-length", "0"), "'--window-length'"),
        (("eval", "SOURCE", "--text", "TEXT", "--window-length", "-5"), "'--window-length'"),
        (("eval", "SOURCE", "--text", "", "--windows", "1"), "name of a text is empty"),
        (("eval", "none", "--text", "TEXT", "--json", "no/x.json"), "No such file or directory"),
        (("eval", "none", "--text", "TEXT", "--json", "."), "Is a directory"),
        (("eval", "LEARNED", "--text", "TEXT", "--windows", "1"), "pass --window-length 256"),
        (
            ("eval", "SOURCE", "--baseline", "OTHER", "--text", "TEXT", "--window-length", "64"),
            "different tokenizers",
        ),
        (("generate", "SOURCE", "--prompt", ""), "has no tokens"),
        (("generate", "SOURCE", "--prompt", "a", "--chat"), "--chat cannot be used"),
        (("generate", "SOURCE", "--prompt", "\udcff"), "lone surrogates"),
        (("generate", "SOURCE", "--prompt", "a", "--device", "cpu:3"), "use one of cpu"),
        (
            ("generate", "LEARNED", "--prompt", "a", "--max-new-tokens", "400"),
            "the 256 positions of this model",
        ),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    source: Path,
    learned: Path,
    renumbered: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # click breaks its messages
    (tmp_path / "short.txt").write_text("Too short.")
    names = {
        "SOURCE": source,
        "LEARNED": learned,
        "OTHER": renumbered,
        "TEXT": text,
        "SHORT": tmp_path / "short.txt",
    }
    command = [] if arguments[0] in ("eval", "generate") else ["quantize"]
    argv = ["vqllm", *command, *(str(names.get(a, a)) for a in arguments)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in printed.replace("\n", " ")
    assert "Traceback" not in printed


@pytest.mark.parametrize("error", [AttributeError("half done"), ModelError("half done"), None])
def test_ctrl_c_that_became_another_error_is_ctrl_c(
    error: Exception | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if error is None:
                raise
        assert error is not None
        raise error

    monkeypatch.setattr(api, "generate", interrupted)
    monkeypatch.setattr(sys, "argv", ["vqllm", "generate", "folder", "--prompt", "text"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGINT, 130), slow(signal.SIGKILL, -signal.SIGKILL)], ids=str
)
def test_ctrl_c_and_kill_leave_a_folder_that_goes_on(
    source: Path, text: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    common = ("quantize", source, "--calibration", text, "--no-eval", *SMALL)
    invoke(*common, "--output", tmp_path / "whole")
    with subprocess.Popen(
        [*COMMAND, *map(str, common), "--output", str(tmp_path / "stopped")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**environment(), "OMP_NUM_THREADS": f"{torch.get_num_threads()}"},
        # A shell lets what it starts in the background ignore Ctrl-C, these tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("layer 0"):
                process.send_signal(stop)
                break
        rest = process.stderr.read()
        assert process.wait() == code
    if stop == signal.SIGINT:
        assert "the same command goes on" in rest
    invoke(*common, "--output", tmp_path / "stopped")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes()
