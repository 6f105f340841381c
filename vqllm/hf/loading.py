"""transformers' loaders, with one clear error for a model that is wrong.

transformers fills tensors that a checkpoint lacks with random values and only logs a warning. A
damaged file, or a value in config.json that it does not understand, is an exception of any type.
Every model and tokenizer of this package is loaded here, and both cases become a `ModelError`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import GENERATION_CONFIG_NAME

from vqllm.errors import ModelError, VqllmError
from vqllm.foreign import without_codes
from vqllm.hf.claims import refuse_claims, refuse_larger, stored_numbers
from vqllm.hf.classes import auto_class
from vqllm.hf.next_tokens import say_what_is_unused
from vqllm.hf.refusals import (
    DECODERS,
    SAVE_TOKENIZER,
    refuse_empty_tokenizer,
    refuse_no_tokenizer,
)
from vqllm.hf.released_formats import dequantizing_config
from vqllm.hf.wrong_tensors import refuse_wrong_tensors

MAX_REASON = 300
"""Characters of transformers' own message: some list all the models that it knows."""
COMPLETE = "Its files must be complete, undamaged and of one model; weights as safetensors."


def load_model(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    tensors: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model in `folder`, in evaluation mode, every tensor of it as stored.

    Args:
        tensors: those to load, where they are not those of the files: tensors, or what becomes one
            by an index or `to`.
        options: more arguments for `from_pretrained` of its class.

    Raises:
        ModelError: a tensor is missing or of another shape, or transformers cannot load the model.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    quantized = tensors or getattr(config, "quantization_config", None) is not None
    whole = skeleton(folder, trust_remote_code=trust_remote_code)
    refuse_larger(whole, stored_numbers(folder, bool(quantized)), f"{folder}/config.json")
    own_class = type(whole)
    del whole
    options["output_loading_info"] = True
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if (dense := dequantizing_config(config)) is not None:
        options["quantization_config"] = dense
    with explained(folder):
        if tensors is not None:
            options |= {"config": config, "state_dict": dict(tensors)}
            loaded: Any = own_class.from_pretrained(None, **options)
        else:
            loaded = auto_class(config).from_pretrained(
                folder,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **options,
            )
    model, info = loaded
    if tensors is not None and (folder / GENERATION_CONFIG_NAME).is_file():
        with explained(folder):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    refuse_wrong_tensors(folder, model, info)
    if {parameter.device.type for parameter in model.parameters()} <= {"cpu", "meta"}:
        # The products of all experts at once need rows of 16 bytes, so they fail for experts whose
        # width is no multiple of 8; one after the other take the same time on a CPU (32 experts of
        # 512 x 256: 31 against 30 ms for 128 tokens, 196 against 209 ms for 2048).
        model.set_experts_implementation("eager")
    return model.eval()


PROBE = "A text, with 2 numbers: é and 漢 \n"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`. ModelError when there is none that can be loaded, or an empty one:
    of some model types transformers makes one without a word where the files are missing."""
    refuse_no_tokenizer(folder)
    with explained(folder, "has no tokenizer that transformers {} can load", SAVE_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer(PROBE)  # a damaged one may fail with its first text only
    refuse_empty_tokenizer(folder, tokenizer)
    return tokenizer


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration in `folder`. ModelError when it cannot be understood, or claims more than
    its weights can be."""
    refuse_claims(folder)
    with explained(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return _without_codes(config)


def _without_codes(config: Any) -> Any:
    """A configuration as it is for the dense weights, into which checkpoints of other tools are
    decoded."""
    for part in (config, getattr(config, "text_config", None)):
        own = dict(vars(part)) if part is not None else {}
        own = {key: value for key, value in own.items() if isinstance(value, dict)}
        for key in own.keys() - without_codes(own).keys():
            delattr(part, key)
    return config


def skeleton(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model that `folder` configures, on the meta device; its weights are not read.

    Args:
        options: more arguments for `from_config` of its class.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    with explained(folder), torch.device("meta"):
        return auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code, **options
        )


def check_tensors(
    folder: Path, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse stored tensors that are not those of the model, without reading any.

    transformers' own loader is run on empty tensors of these shapes, because what a tensor is
    called in a file and in the model may differ, and several may become one.

    Args:
        model: as `skeleton` gives it.
        shapes: of every stored tensor, by its name in the files.

    Raises:
        ModelError: tensors are missing or of another shape, or there are more layers than the
            configuration has.
    """
    empty = {name: _Empty(shape) for name, shape in shapes.items()}
    with explained(folder):
        loaded: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            quantization_config=dequantizing_config(model.config),
        )
    refuse_wrong_tensors(folder, *loaded)
    say_what_is_unused(folder, model, shapes)


class _Empty:
    """What a stored tensor of this shape is to transformers' loader, on the meta device whatever
    device is asked for: some rules ask for the CPU, where a meta tensor cannot go."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._tensor = torch.empty(shape, device="meta")

    def __getitem__(self, index: object) -> "_Empty":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._tensor.to(dtype=dtype)


@torch.no_grad()
def make_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file stores (frequencies of positions, masks), wherever they are
    on the meta device; nothing else of the model changes.

    A model of transformers makes them anew in the initialization of its modules, because it is
    itself always made on the meta device. Parameters there stay there: what initializes them has
    no effect.
    """
    stored = set(model.state_dict())
    waiting = []
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and (f"{prefix}.{key}" if prefix else key) not in stored:
                module._buffers[key] = torch.empty_like(buffer, device=device)
                waiting.append((module, key))
    # What is there already must not be initialized; the marks are transformers' own.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for module, key in waiting:
        module._buffers[key]._is_hf_initialized = False  # type: ignore[union-attr]
    # Only modules with such a buffer in them: what initializes a mixture of experts may ask for
    # parameters that it does not have in linear form.
    owners = {module for module, _ in waiting}
    for module in model.modules():
        concerned = not owners.isdisjoint(module.modules())
        module._is_hf_initialized = not concerned  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[operator]


def max_length(config: Any) -> int | None:
    """The longest sequence that a model is made for, in tokens, where its configuration says."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def runs_beyond(config: Any) -> bool:
    """Whether the model runs on sequences longer than `max_length`: with rotary positions it does
    (and is worse there); a table of positions has no entries for them."""
    text = config.get_text_config()
    return any(getattr(text, key, None) for key in ("rope_parameters", "rope_theta"))


@contextlib.contextmanager
def explained(
    folder: Path, what: str = "cannot be loaded by transformers {}", advice: str = COMPLETE
) -> Iterator[None]:
    """Turn any exception of transformers inside into a `ModelError` about `folder`."""
    try:
        yield
    except (VqllmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Two lines of transformers' message, which may be pages, and advice for the known cause.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join([f"{type(error).__name__}:", *lines[:2]])[:MAX_REASON].rstrip(".: ")
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which is executed only on request"
            advice = "Read it, then pass --trust-remote-code (in Python: trust_remote_code=True)."
        if "Unrecognized configuration class" in str(error):
            reason, advice = lines[0].rstrip("."), DECODERS
        raise ModelError(
            f"{folder} {what.format(transformers_version)} ({reason}). {advice}"
        ) from error
