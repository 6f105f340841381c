"""How fast a model runs beside its original: prefill, decoding, every kind of linear, memory.

Everything is measured in turns, round by round in one process, and medians are compared. On a
machine with other users, only times that were measured together can be divided by each other.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.core.protocols import JSON
from vqllm.errors import EvaluationError
from vqllm.hf.loading import max_length, runs_beyond
from vqllm.hf.running import explained_run
from vqllm.runtime import VQLinear, describe, kept_bytes

MIN_SECONDS = 0.01
"""Calls of a linear are repeated until they take so long."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is run: `batch` sequences of `prompt_tokens`, then `new_tokens` each, `rounds` times;
    and `prompts`, tokens of further prompts with one token each. Those that are longer than a model
    takes are left out."""

    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 32
    rounds: int = 3
    prompts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "prompts" and value < 1:
                raise EvaluationError(f"{name} is {value}; allowed are numbers from 1 on.")


def bench(model: Any, original: Any | None, load: Load) -> JSON:
    """Tokens a second, bytes of weights, and the times of linears.

    Args:
        model: with quantized linears or without.
        original: what it is compared with; None measures the model alone.

    Returns:
        JSON values. "models": by "model" and "original" the medians of `prefill_tokens_per_s` and
        `decode_tokens_per_s` (over all sequences), their `spread` (largest over smallest),
        `prompt_tokens_per_s` by tokens of the further prompts, and `weight_bytes`. "ratios": model
        over original, the median of the ratios of rounds.
        "linears": a row for every kind of quantized linear.

    Raises:
        EvaluationError: more tokens than a model takes.
    """
    # In every round each model runs once, so that both meet the same load of the machine.
    contenders = {"model": model} | ({} if original is None else {"original": original})
    prompts = {name: _prompt(contender, load) for name, contender in contenders.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    longer = _further_prompts(contenders, load)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in longer] for name in contenders}
    for round_number in range(load.rounds + 1):
        for name, contender in contenders.items():
            measured = _generate(contender, prompts[name], load)
            if round_number > 0:  # the first one compiles, decodes and allocates
                times[name].append(measured)
        for own, (_, prompts_of) in enumerate(longer):
            for name, contender in contenders.items():
                prompt = prompts_of[name]
                took = _seconds(lambda c=contender, p=prompt: _continue(c, p, 1), prompt.device)
                if round_number > 0:
                    seconds[name][own].append(took)
    results = {
        name: _figures(times[name], load)
        | {
            "prompt_tokens_per_s": {
                str(length): load.batch * length / statistics.median(took)
                for (length, _), took in zip(longer, seconds[name])
            },
            "weight_bytes": _weight_bytes(contender),
        }
        for name, contender in contenders.items()
    }
    # Ratios are taken round by round, and their median after that.
    ratios = {}
    if original is not None:
        for i, key in enumerate(("prefill", "decode")):
            rounds = zip(times["original"], times["model"])
            ratios[key] = statistics.median(base[i] / own[i] for base, own in rounds)
    return {
        "load": vars(load),
        "device": str(_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "models": results,
        "ratios": ratios,
        "linears": _linears(model, load),
    }


def _prompt(model: Any, load: Load) -> Tensor:
    longest = max_length(model.config)
    total = load.prompt_tokens + load.new_tokens + 1
    if longest is not None and total > longest and not runs_beyond(model.config):
        raise EvaluationError(
            f"{total} tokens of prompt and continuation; the model takes {longest}: ask for fewer."
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    shape = (load.batch, load.prompt_tokens)
    return torch.randint(vocabulary, shape, generator=generator).to(_device(model))


def _further_prompts(contenders: dict[str, Any], load: Load) -> list[tuple[int, dict[str, Tensor]]]:
    """The tokens of each further prompt, and the prompt itself by the name of a model."""
    found = []
    for length in load.prompts:
        own = replace(load, prompt_tokens=length, new_tokens=1)
        with suppress(EvaluationError):  # longer than a model takes
            found.append((length, {name: _prompt(c, own) for name, c in contenders.items()}))
    return found


def _generate(model: Any, prompt_SL: Tensor, load: Load) -> tuple[float, float]:
    """Seconds of the prompt with one token, and of each further token."""
    first = _seconds(lambda: _continue(model, prompt_SL, 1), prompt_SL.device)
    whole = _seconds(lambda: _continue(model, prompt_SL, 1 + load.new_tokens), prompt_SL.device)
    # Noise can make the longer run the shorter one, by less than it measures.
    return first, max(whole - first, 1e-9) / load.new_tokens


def _continue(model: Any, prompt_SL: Tensor, num_tokens: int) -> None:
    with explained_run(model):
        model.generate(
            prompt_SL,
            attention_mask=torch.ones_like(prompt_SL),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _figures(times: list[tuple[float, float]], load: Load) -> JSON:
    first, further = zip(*times)
    return {
        "prefill_tokens_per_s": load.batch * load.prompt_tokens / statistics.median(first),
        "decode_tokens_per_s": load.batch / statistics.median(further),
        "spread": {
            "prefill": max(first) / min(first),
            "decode": max(further) / min(further),
        },
    }


def _weight_bytes(model: nn.Module) -> JSON:
    """Bytes of the stored tensors, and of further copies that the runtime holds to be fast."""
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type != "meta"
    }
    return {"stored": sum(stored.values()), "kept": kept_bytes(model)}


def _linears(model: nn.Module, load: Load) -> list[JSON]:
    """A row for every kind of quantized linear: the same specification on the same device."""
    kinds: dict[Any, list[VQLinear]] = {}
    names: dict[Any, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, VQLinear) and module.device.type != "meta":
            key = (module.spec, module.device)
            kinds.setdefault(key, []).append(module)
            names.setdefault(key, name)
    rows = (load.batch, load.batch * load.prompt_tokens)
    runs = {(run.name, run.num_rows): run for run in describe(model, rows)}
    return [
        _linear(modules[0], len(modules), [runs[names[key], num] for num in rows], load)
        for key, modules in kinds.items()
    ]


def _linear(module: VQLinear, number: int, runs: list[Any], load: Load) -> JSON:
    """Times of one token a sequence, in microseconds, beside torch's product with dense weights."""
    dtype, device = module.weight.dtype, module.device
    with torch.inference_mode():
        x = torch.randn(load.batch, module.in_features, device=device).to(dtype)
        W = module.dequantize(dtype)
        own, dense = _in_turns(
            (lambda: module.multiply(x), lambda: F.linear(x, W)), device, 2 * load.rounds + 1
        )
    return {
        "rows": module.out_features,
        "cols": module.in_features,
        "format": module.spec.format.to_dict(),
        "number": number,
        "decode": runs[0].implementation,
        "prefill": runs[1].implementation,
        "reason": runs[0].reason,
        "us": 1e6 * own,
        "dense_us": 1e6 * dense,
    }


def _in_turns(
    calls: Iterable[Callable[[], object]], device: torch.device, rounds: int
) -> list[float]:
    """Median seconds of each call."""
    # The first call compiles; the second one says how many calls take MIN_SECONDS.
    plans = []
    for call in calls:
        call()
        plans.append((call, max(1, int(MIN_SECONDS / max(_seconds(call, device), 1e-7)))))
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(rounds):
        for seconds, (call, repeats) in zip(times, plans):

            def repeated(call=call, repeats=repeats) -> None:
                for _ in range(repeats):
                    call()

            seconds.append(_seconds(repeated, device) / repeats)
    return [statistics.median(seconds) for seconds in times]


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")
