"""Whether a module keeps its weights packed, or decodes them at load and is dense from then on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from vqllm.integrations.vllm.refusals import unknown_mode
from vqllm_kernels import dispatch
from vqllm_kernels.linear import LinearSpec

Mode = Literal["auto", "packed", "decoded"]

KEY = "vqllm_weights"
"""The key of vLLM's `additional_config`, which all of its processes have, and which its cache of
compiled graphs looks at."""


def requested(additional_config: object) -> Mode:
    """What the user asked for. ModelError for anything else than a mode."""
    value: Any = "auto"
    if isinstance(additional_config, Mapping):
        value = additional_config.get(KEY, "auto")
    if value not in get_args(Mode):
        raise unknown_mode(value, get_args(Mode))
    return value


def is_packed(
    mode: Mode, specs: Sequence[LinearSpec], device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether linears of one module stay packed.

    "auto" keeps them packed on a GPU; on a CPU where their codes are multiplied as they are stored
    (`dispatch.multiplied_packed`), which is faster than torch's product with decoded weights.
    """
    if mode != "auto":
        return mode == "packed"
    if device.type != "cpu":
        return True
    return all(dispatch.multiplied_packed(spec.format, dtype) for spec in specs)
