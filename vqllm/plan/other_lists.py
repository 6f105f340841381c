"""Lists of decoder layers beside the one that is quantized."""

import logging
from collections.abc import Collection
from functools import cache

from torch import nn

logger = logging.getLogger(__name__)


def say_other_lists(name: str, model: nn.Module, layers: Collection[str]) -> None:
    """Log, once, that a model has more decoder layers than those that are quantized.

    Args:
        name: what the model is called.
        layers: as of `other_lists`.
    """
    if others := other_lists(model, layers):
        _say(name, next(iter(layers)).rpartition(".")[0], ", ".join(others))


def other_lists(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Full names of lists of layers of the same class as the decoder layers, which stay as they
    are: a model with two stacks of layers, or with small models inside.

    Args:
        layers: full names of the decoder layers; all are of one list.
    """
    kinds = {type(model.get_submodule(layer)) for layer in layers}
    own = {layer.rpartition(".")[0] for layer in layers}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name not in own
        and any(type(layer) in kinds for layer in module)
    ]


@cache
def _say(model: str, quantized: str, others: str) -> None:
    logger.warning(
        "%s has several lists of decoder layers: those of %s are quantized, those of %s stay as "
        "they are",
        *(model, quantized, others),
    )
