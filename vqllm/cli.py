"""The command line. Nothing else of the package knows of it."""

import codecs as codecs_of_python
import errno
import io
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from vqllm.core import path_names
from vqllm.errors import EvaluationError, VqllmError

app = typer.Typer(
    help="Post-training vector quantization of language-model weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, soft_wrap=True)


class _Output(Console):
    """Standard output. Where nobody reads on (`| head -1`), the command ends without a word."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EBADF):
                message = f"vqllm: standard output cannot be written: {error}"
                err.print(message, style="red", markup=False, highlight=False)
            self.on_broken_pipe()


out = _Output(soft_wrap=True)

UsageError: type[Exception] = typer.BadParameter.__base__ or Exception
"""click's error for a wrong command line; newer typers carry a click of their own."""

INTERRUPTED = 130
WIDE = 400
"""Characters of the longest line of a table that does not go to a terminal."""

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code found in the model's folder")
]
AllowBin = Annotated[
    bool, typer.Option("--allow-bin", help="convert pytorch_model.bin to safetensors, once")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="change a key of the recipe: key=value")
]

Calibration = Annotated[
    list[str] | None,
    typer.Option(help="self, a text, jsonl or parquet file, a folder, or a datasets id"),
]
Seed = Annotated[int | None, typer.Option(help="seed of everything random")]
ComputeDtype = Annotated[
    str | None, typer.Option(help="dtype in which layers run: bfloat16, float16, float32")
]
EvalText = Annotated[
    str | None, typer.Option(help="text file to measure on (default: held-out sequences)")
]
EvalWindows = Annotated[
    int | None, typer.Option(help="windows of 2048 tokens of that text to use", min=1)
]


Recipe = Annotated[str | None, typer.Option(help="a recipe's name, or a YAML file")]
Bits = Annotated[float | None, typer.Option(help="bits a weight, 1.1 to 5: the best recipe for it")]
Size = Annotated[
    str | None, typer.Option(help="bytes of the whole file in place of bits: 60MB, 1.5GB")
]
KL = Annotated[float | None, typer.Option("--kl", help="KL divergence to reach in place of bits")]
Preset = Annotated[
    str | None, typer.Option(help="instead of a recipe: fast, balanced (default), best or tuned")
]
Evaluate = Annotated[
    bool, typer.Option("--eval/--no-eval", help="measure the result against the original")
]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="demo, a hub id, a folder, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="folder of the quantized model")],
    recipe: Recipe = None,
    bits: Bits = None,
    size: Size = None,
    kl: KL = None,
    preset: Preset = None,
    calibration: Calibration = None,
    seed: Seed = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    changes: Changes = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = None,
    evaluate: Evaluate = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what the run would give and take")
    ] = False,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Quantize a model into a folder that transformers loads."""
    from vqllm import api
    from vqllm.core.progress_bar import progress_for

    if dry_run:
        plan(
            model,
            recipe,
            bits,
            size,
            kl,
            preset,
            calibration,
            seed,
            device,
            compute_dtype,
            changes,
            eval_text,
            eval_windows,
            evaluate,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
        )
        return
    with progress_for(err) as progress:
        summary = api.quantize(
            model,
            output,
            recipe=recipe,
            bits=bits,
            size=size,
            kl=kl,
            preset=preset,
            calibration=calibration,
            seed=seed,
            changes=tuple(changes or ()),
            device=device,
            compute_dtype=compute_dtype,
            evaluate=evaluate,
            eval_text=eval_text,
            eval_windows=eval_windows,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
            progress=progress,
            command=shlex.join(["vqllm", *sys.argv[1:]]),
        )
    if summary is not None:  # only the first of several processes has one
        _print_rows(summary.rows())
        # Outside the table, in one piece: made to be copied.
        out.print(summary.load_line(), markup=False, highlight=False)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="as for quantize, or a folder with a config.json and no weights"),
    ],
    recipe: Recipe = None,
    bits: Bits = None,
    size: Size = None,
    kl: KL = None,
    preset: Preset = None,
    calibration: Calibration = None,
    seed: Seed = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    changes: Changes = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = None,
    evaluate: Evaluate = True,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="estimate quality, time and memory too"),
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """What quantize would give and take: size, quality, time, memory, disk."""
    from vqllm import api
    from vqllm.core.progress_bar import progress_for
    from vqllm.report.summary import coverage_rows

    with progress_for(err) as progress:
        found = api.plan(
            model,
            recipe=recipe,
            bits=bits,
            size=size,
            kl=kl,
            preset=preset,
            calibration=calibration,
            seed=seed,
            changes=tuple(changes or ()),
            device=device,
            compute_dtype=compute_dtype,
            evaluate=evaluate,
            eval_text=eval_text,
            eval_windows=eval_windows,
            measure=measure,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
            progress=progress,
        )
    if json_output:
        out.print_json(json.dumps(found.to_dict()))
        return
    _print_rows([*found.rows(), *coverage_rows(found.parameters, found.not_quantized)])
    for note in found.notes:
        out.print(note, markup=False, highlight=False)


@app.command()
def tune(
    checkpoint: Annotated[Path, typer.Argument(help="a quantized folder; it is not changed")],
    output: Annotated[Path, typer.Option(help="folder of the tuned model")],
    recipe: Annotated[
        str, typer.Option(help="a tuning recipe's name, or a YAML file")
    ] = "end-to-end",
    teacher: Annotated[
        str | None, typer.Option(help="the original model (default: what the folder names)")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="stop each stage after so long: 90s, 20m, 1h30m")
    ] = None,
    calibration: Calibration = None,
    seed: Seed = None,
    device: Device = None,
    changes: Changes = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = None,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="measure the result against the original")
    ] = True,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Train what codes leave free, against the original's predictions."""
    from vqllm import api
    from vqllm.core.progress_bar import progress_for

    with progress_for(err) as progress:
        summary = api.tune(
            checkpoint,
            output,
            recipe=recipe,
            teacher=teacher,
            time=time,
            calibration=calibration,
            seed=seed,
            changes=tuple(changes or ()),
            device=device,
            evaluate=evaluate,
            eval_text=eval_text,
            eval_windows=eval_windows,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
            progress=progress,
            command=shlex.join(["vqllm", *sys.argv[1:]]),
        )
    if summary is not None:  # only the first of several processes has one
        _print_rows(summary.rows())
        out.print(summary.load_line(), markup=False, highlight=False)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="demo, a hub id, a folder, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="folder of the quantized models and their table")],
    recipe: Annotated[
        list[str],
        typer.Option(help="names, YAML files, comma-separated lists, patterns such as 'trellis-*'"),
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="run every recipe with each value: codec.bits=2,3 (inside of a YAML list)"
        ),
    ] = None,
    changes: Changes = None,
    calibration: Calibration = None,
    seed: Seed = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    eval_text: EvalText = None,
    eval_windows: EvalWindows = None,
    keep_checkpoints: Annotated[
        bool,
        typer.Option(
            "--keep-checkpoints/--no-keep-checkpoints",
            help="keep the quantized models, or only what they measured",
        ),
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write results here too")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the plot here too (PNG)")] = None,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Quantize a model with several recipes, measure all of them, and rank them."""
    from vqllm import api
    from vqllm.core.progress_bar import progress_for
    from vqllm.report import comparison as report
    from vqllm.runs.compare.grid import parse_grid

    for file in (json_file, plot):
        if file:
            _check_writable(file)
    with progress_for(err) as progress:
        compared = api.compare(
            model,
            output,
            recipe,
            grid=parse_grid(grid or ()),
            changes=tuple(changes or ()),
            calibration=calibration,
            seed=seed,
            device=device,
            compute_dtype=compute_dtype,
            eval_text=eval_text,
            eval_windows=eval_windows,
            keep_checkpoints=keep_checkpoints,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
            progress=progress,
            command=shlex.join(["vqllm", *sys.argv[1:]]),
        )
    found = compared.to_dict()
    table = Table(*(Column(title, overflow="fold") for title in report.HEAD))
    for row in report.comparison_rows(found):
        table.add_row(*row)
    (out if out.is_terminal else _Output(width=WIDE)).print(table)
    for note in report.comparison_notes(found):
        out.print(note, markup=False, highlight=False)
    pages = (report.COMPARISON_PAGE, report.COMPARISON_JSON, report.COMPARISON_PLOT)
    out.print(f"{output}: {', '.join(pages)}", markup=False, highlight=False)
    for file, page in ((json_file, report.COMPARISON_JSON), (plot, report.COMPARISON_PLOT)):
        if file:
            with _writing(file):
                file.write_bytes((output / page).read_bytes())
    if compared.failed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate_(
    model: Annotated[str, typer.Argument(help="a quantized folder, or anything quantize takes")],
    baseline: Annotated[str | None, typer.Option(help="model to compare with")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-eval tasks; names or comma-separated lists")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="text file or datasets id for perplexity")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="windows of the text to use (default: all)", min=1)
    ] = None,
    window_length: Annotated[int, typer.Option(help="tokens of a window", min=2)] = 2048,
    data: Annotated[
        Path | None, typer.Option(help="folder with local task files (default: $VQLLM_DATA)")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="items of each task", min=1)] = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write results here")] = None,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Perplexity, KL and top-1 agreement with a baseline, and lm-eval tasks."""
    from vqllm import api
    from vqllm.report.summary import result_rows

    if json_file:
        _check_writable(json_file)
    names = [name for item in tasks or [] for name in item.split(",") if name]
    results = api.evaluate(
        model,
        baseline=baseline,
        tasks=names,
        text=text,
        num_windows=windows,
        window_length=window_length,
        data=data,
        limit=limit,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    _print_rows(result_rows(results))
    if json_file:
        with _writing(json_file):
            json_file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a quantized folder, or anything quantize takes")],
    baseline: Annotated[str | None, typer.Option(help="the original, to compare with")] = None,
    batch: Annotated[int, typer.Option(help="sequences at a time", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="rounds to measure", min=1)] = 3,
    prompts: Annotated[
        list[int] | None, typer.Option(help="tokens of a further prompt (256 and 512)", min=1)
    ] = None,
    resident: Annotated[
        bool, typer.Option(help="memory of a process with each model alone, on a CPU")
    ] = True,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write results here")] = None,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Tokens a second, memory, and the time of every kind of linear, beside the original's."""
    from vqllm import api
    from vqllm.report.speed import kinds, speed_rows

    if json_file:
        _check_writable(json_file)
    results = api.bench(
        model,
        baseline=baseline,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        prompts=(256, 512) if prompts is None else prompts,
        resident=resident,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    _print_rows(speed_rows(results))
    table = Table("linears", "format", "one token a sequence", "us", "dense us", "prompt")
    for row in kinds(results):
        table.add_row(*row)
    if results["linears"]:
        out.print(table)
    if json_file:
        with _writing(json_file):
            json_file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a quantized folder, or anything quantize takes")],
    prompt: Annotated[str, typer.Option(help="text to go on from")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[bool, typer.Option(help="wrap the prompt in the chat template")] = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Generate text greedily."""
    from vqllm import api

    text = api.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_bin=allow_bin,
    )
    out.print(text, markup=False, highlight=False)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="a quantized folder")],
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    verify: Annotated[bool, typer.Option(help="check the sha256 of every shard")] = True,
) -> None:
    """What is in a checkpoint: recipe, and codec, exact bits and proxy loss of every linear."""
    from vqllm.checkpoint.inspect import inspect_checkpoint
    from vqllm.core.coverage import ParameterCounts
    from vqllm.report.summary import coverage_rows

    found = inspect_checkpoint(folder, verify=verify)
    if json_output:
        out.print_json(json.dumps(found))
        return
    out.print(found["recipe_yaml"], markup=False, highlight=False)
    name = Column("linear", overflow="fold")  # the end of a name tells it from the others
    table = Table(name, "shape", "codec", "bits", "proxy loss")
    for row in found["linears"]:
        loss = "" if row["proxy_loss"] is None else f"{row['proxy_loss']:.4g}"
        table.add_row(
            row["name"],
            f"{row['rows']} × {row['cols']}",
            row["codec"],
            f"{row['bits_per_weight']:.4f}",
            loss,
        )
    out.print(table)
    rows = [(label, f"{value:.4f}") for label, value in found["bits_per_weight"].items()]
    counts = ParameterCounts(**found["parameters"])
    _print_rows([*rows, *coverage_rows(counts, found["not_quantized"])])


@app.command()
def dequantize(
    folder: Annotated[Path, typer.Argument(help="a quantized folder")],
    output: Annotated[Path, typer.Option(help="folder of the ordinary model")],
    dtype: Annotated[
        str, typer.Option(help="float16, bfloat16, float32, or auto: that of the original")
    ] = "auto",
) -> None:
    """Write an ordinary Hugging Face folder that any tool reads."""
    from vqllm.checkpoint.dequantize import dequantize_checkpoint

    dequantize_checkpoint(folder, output, dtype)
    out.print(f"{output}: an ordinary model, which vqllm is not needed for")


@app.command("export-gguf")
def export_gguf(
    model: Annotated[str, typer.Argument(help="demo, a hub id, a folder, or a .gguf file")],
    output: Annotated[Path, typer.Option(help="the file to write, new, ending in .gguf")],
    native_type: Annotated[
        str | None, typer.Option("--type", help="llama.cpp's type for the linears: Q3_K, Q4_0, ...")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            help="types mixed by sensitivity, the size of plain --type: default, or names"
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="types mixed within this size of the whole file: 80MB, ...")
    ] = None,
    calibration: Calibration = None,
    sequences: Annotated[
        int | None, typer.Option(help="calibration sequences of 128 tokens", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of everything random", min=0)] = 0,
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py (default: installed)")
    ] = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    trust_remote_code: Trust = False,
    allow_bin: AllowBin = False,
) -> None:
    """Write a GGUF file of llama.cpp's native types, with codes chosen by full Hessians."""
    from vqllm import api
    from vqllm.core.progress_bar import progress_for

    with progress_for(err) as progress:
        api.export_gguf(
            model,
            output,
            type=native_type,
            mix=mix,
            size=size,
            calibration=calibration,
            sequences=sequences,
            seed=seed,
            converter=converter,
            device=device,
            compute_dtype=compute_dtype,
            trust_remote_code=trust_remote_code,
            allow_bin=allow_bin,
            progress=progress,
        )
    megabytes = output.stat().st_size / 1e6
    out.print(f"{output}: {megabytes:.1f} MB for llama.cpp", markup=False, highlight=False)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="a folder that another tool quantized")],
    output: Annotated[Path, typer.Option(help="folder of the same model in this format")],
) -> None:
    """Write another tool's checkpoint (GPTQ, AWQ, ...) in this format, without loss."""
    from vqllm.checkpoint.convert import convert_checkpoint

    convert_checkpoint(folder, output)
    out.print(f"{output}: the same weights, as a checkpoint of vqllm")


@app.command()
def archive(
    folder: Annotated[Path, typer.Argument(help="a quantized folder")],
    output: Annotated[Path, typer.Option(help="the file, which must not be there")],
) -> None:
    """Write a checkpoint as one entropy-coded file, for storage and transport."""
    from vqllm.archive import archive

    made = archive(folder, output)
    table = Table("tensors", "MB", "in the archive", "saved")
    for kind, (before, after) in sorted(made.kinds.items(), key=lambda item: -item[1][0]):
        table.add_row(kind, *_sizes(before, after))
    table.add_row("all files", *_sizes(made.before, made.after))
    out.print(table)
    out.print(f"{output}: vqllm unarchive gives the same files back", markup=False, highlight=False)


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    saved = 100 * (1 - after / before) if before else 0.0
    return f"{before / 1e6:.2f}", f"{after / 1e6:.2f}", f"{saved:.1f} %"


@app.command()
def unarchive(
    file: Annotated[Path, typer.Argument(help="a file that vqllm archive wrote")],
    output: Annotated[Path, typer.Option(help="a new or an empty folder")],
) -> None:
    """Write the folder that an archive was made of, the same bytes."""
    from vqllm.archive import unarchive

    unarchive(file, output)
    out.print(f"{output}: the same files as before", markup=False, highlight=False)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="print this recipe with all of its keys")
    ] = None,
) -> None:
    """List the shipped recipes, or print one."""
    from vqllm.recipes import available, available_tuning, load, load_tuning

    if name:
        found = load_tuning(name) if name in available_tuning() else load(name)
        out.print(found.to_yaml(), markup=False, highlight=False)
        return
    table = Table("recipe", "folder", "description")
    for shipped, file in sorted(available().items(), key=lambda item: item[1].parent.name):
        table.add_row(shipped, file.parent.name, load(shipped).description)
    out.print(table)
    table = Table("recipe of vqllm tune", "description")
    for shipped in available_tuning():
        table.add_row(shipped, load_tuning(shipped).description)
    out.print(table)


@app.command()
def codecs(
    bench: Annotated[
        bool, typer.Option("--bench", help="measure every codec on Gaussian weights")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="measure this codec only")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the measurements here")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the measurements here (PNG)")] = None,
    device: Device = None,
) -> None:
    """List codecs, transforms, rounding rules and tuning steps, or measure the codecs."""
    if bench:
        _bench_codecs(only or [], json_file, plot, device or "cpu")
        return
    for option, value in (("--only", only), ("--json", json_file), ("--plot", plot)):
        if value:
            raise typer.BadParameter(f"{option} is about measurements: add --bench")
    from vqllm.codecs import CODECS
    from vqllm.recipes import fields_of
    from vqllm.rounding import ROUNDINGS
    from vqllm.transforms import TRANSFORMS
    from vqllm.tuning import MODEL_TUNINGS, TUNINGS

    for registry in (CODECS, TRANSFORMS, ROUNDINGS, TUNINGS, MODEL_TUNINGS):
        table = Table(registry.kind, "option", "meaning")
        for name in registry:
            part: Any = registry.get(name)
            options = list(fields_of(part).items()) or [("", "no options")]
            for i, (option, meaning) in enumerate(options):
                table.add_row(name if i == 0 else "", option, meaning)
        out.print(table)


def _bench_codecs(only: list[str], json_file: Path | None, plot: Path | None, device: str) -> None:
    from vqllm.evaluation.codec_bench import bench as measured
    from vqllm.report.plot import plot_codecs

    for file in (json_file, plot):
        if file:
            _check_writable(file)
    rows = []
    table = Table("codec", "bits", "MSE", "expected", "above Shannon", "encode", "decode")
    table.caption = "encode, decode: 10⁶ weights a second"
    for row in measured(only, device):
        rows.append(row)
        err.print(f"{row['codec']}: {row['label']}", markup=False, highlight=False)
        table.add_row(
            f"{row['codec']}: {row['label']}",
            f"{row['bits']:.3f}",
            f"{row['mse']:.5f}",
            f"{row['expected_mse']:.5f}",
            f"{row['gap_db']:.2f} dB",
            f"{row['encode_mweights_per_s']:.3g}",
            f"{row['decode_mweights_per_s']:.3g}",
        )
    out.print(table)
    if json_file:
        with _writing(json_file):
            json_file.write_text(json.dumps(rows, indent=2) + "\n")
    if plot:
        with _writing(plot):
            plot.write_bytes(plot_codecs(rows))


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log more")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vqllm").setLevel(logging.DEBUG if verbose else logging.INFO)
    # OpenMP's threads wait for work by spinning 300,000 times, and so keep others from the core.
    # Two runs side by side on two cores took 4.5 times as long as with no spinning. Alone, no
    # spinning costs 1.5 times (17 s to sample 80 sequences of 96 tokens, 12.5 s with 1000 turns,
    # 11.2 s with all). Read when torch is imported, which is later than this.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not verbose:
        # Loading bars and notices about offloaded layers would bury our own lines. Read by
        # transformers when it is imported, which is later than this.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("accelerate").setLevel(logging.ERROR)


def _check_writable(file: Path) -> None:
    """Raise EvaluationError before hours of measuring, and leave the file as it is."""
    existed = file.exists()
    with _writing(file):
        file.open("a").close()
        if not existed:
            file.unlink()


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be written: {error.strerror}. Name a file in a folder that "
            "exists, on a disk with space."
        ) from error


def _print_rows(rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    out.print(table)


def main() -> None:
    """Entry point: a user's mistake ends in one message and exit code 2, without a traceback."""
    interrupts: list[int] = []
    _print_anywhere()
    try:
        with _noting(interrupts):
            code = app(standalone_mode=False)
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        code = 2
    except Exception as error:
        if isinstance(error, typer.Abort) or interrupts:
            code = 128 + interrupts[-1] if interrupts else INTERRUPTED
        elif isinstance(error, VqllmError):
            err.print(f"vqllm: {error}", style="red", markup=False, highlight=False)
            code = 2
        elif isinstance(error, OSError) and error.strerror and not _wants_more():
            err.print(f"vqllm: {_of_the_system(error)}", style="red", markup=False, highlight=False)
            code = 2
        elif _is_of_memory(error) and not _wants_more():
            err.print(f"vqllm: {OUT_OF_MEMORY}", style="red", markup=False, highlight=False)
            code = 2
        else:
            raise
    # Newer typers return the code for Ctrl-C where older ones raise Abort.
    if code == INTERRUPTED:
        err.print("vqllm: interrupted. Finished layers are kept: the same command goes on.")
    raise SystemExit(code)


def _wants_more() -> bool:
    """Whether the user asked for more lines, and so for the whole trace of an error."""
    return logging.getLogger("vqllm").level == logging.DEBUG


OUT_OF_MEMORY = (
    "out of memory. What is finished is kept: the same command goes on. Fewer or shorter sequences "
    "(--set calibration.sequences=, calibration.length=) take less; -v shows where it ended."
)


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has a class of its own for that of a GPU only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _of_the_system(error: OSError) -> str:
    """What the system said about a file or a folder."""
    place = path_names.shown(str(error.filename)) if error.filename is not None else "a file"
    return (
        f"{place}: {error.strerror}. Look whether it is there, whether you may read and write it, "
        "and whether its disk has room; -v shows where this came from."
    )


PLAIN = str.maketrans({"→": "->", "×": "x", "−": "-", "≥": ">=", "⁶": "^6", "…": "..."})
"""Our own signs for terminals and files whose encoding does not have them."""


def _print_anywhere() -> None:
    """Let whatever the encoding of an output lacks be printed as what comes next to it."""

    def nearest(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        plain = lacking.translate(PLAIN)
        return "".join(c if c.isascii() else "?" for c in plain), error.end

    codecs_of_python.register_error("vqllm-nearest", nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vqllm-nearest")


STOPS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Signals that end a command with all that it has open closed, as Ctrl-C does."""


@contextmanager
def _noting(interrupts: list[int]) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever, the signals of `STOPS` raise SystemExit, and their
    numbers are added to the list.

    The exception alone does not tell: a library's clean-up may fail on what the interrupt left half
    done (accelerate's hooks, once in 25 runs), and compiled code may make another error of it
    (torch's tensor constructor a ValueError).
    """

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    def stop(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.signal(number, signal.SIG_IGN)  # a second one would end the removal of a folder
        raise SystemExit(128 + number)

    # Each by itself, and only where nobody else has chosen: a shell's job in the background ignores
    # Ctrl-C, and is ended by SIGTERM all the same.
    ours = {number: stop for number in STOPS if signal.getsignal(number) is signal.SIG_DFL}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ours[signal.SIGINT] = note
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
