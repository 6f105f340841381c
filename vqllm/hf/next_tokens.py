"""Layers for multi-token prediction: stored behind the model's own, and not run by transformers.

They predict the tokens after the next one, for speculative decoding in other programs. DeepSeek-V3
stores such a layer as `model.layers.61`, behind its 61 layers; others as `mtp.layers.0`.
"""

import contextlib
import logging
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

PARTS = re.compile(r"(^|\.)(mtp\w*|nextn\w*|eh_proj|enorm|hnorm|shared_head)\.")
"""Modules that only such a layer has: what joins a token's embedding to the states before it, their
norms, the head; or a name for the whole."""


def surplus(model: Any, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The tensors of layers beyond the model's, in two lists: of layers for multi-token prediction,
    and of others.

    A layer is one for multi-token prediction if the configuration has as many, or if a tensor of it
    is a part that only those have.

    Args:
        model: as transformers makes it; its tensors may be on the meta device.
        names: of stored tensors.
    """
    layers: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if layer := further_layer(model, name):
            layers.setdefault(layer, []).append(name)
    known = _num_layers(model.config)
    further: list[str] = []
    others: list[str] = []
    for (parent, index), own in layers.items():
        place = index - len(model.get_submodule(parent))
        is_known = place < known or any(PARTS.search(name) for name in own)
        (further if is_known else others).extend(own)
    return further, others


def say_what_is_unused(folder: Path, model: Any, names: Iterable[str]) -> None:
    """Log, once, the stored tensors of layers for multi-token prediction that the model has no
    place for."""
    names = list(names)
    own = model.state_dict().keys()
    apart = [name for name in names if PARTS.search(name) and name not in own]
    if unused := {*surplus(model, names)[0], *apart}:
        _say(folder, len(unused), min(unused))


@cache
def _say(folder: Path, num: int, example: str) -> None:
    logger.warning(
        "%s: %d tensors are of layers for multi-token prediction (%s), which transformers does not "
        "run: they are copied as they are",
        *(folder, num, example),
    )


def _num_layers(config: Any) -> int:
    """How many such layers there are: `num_nextn_predict_layers`, `num_mtp_layers` or the like."""
    values = config.get_text_config().to_dict()
    keys = [key for key in values if "num" in key and ("nextn" in key or "mtp" in key)]
    return max((values[key] for key in keys if isinstance(values[key], int)), default=0)


def further_layer(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The list of the model's modules beyond whose end a tensor's name has an index, and this."""
    for match in re.finditer(r"\.(\d+)\.", name):
        parent = name[: match.start()]
        with contextlib.suppress(AttributeError):
            modules = model.get_submodule(parent)
            if isinstance(modules, nn.ModuleList) and int(match[1]) >= len(modules):
                return parent, int(match[1])
    return None
