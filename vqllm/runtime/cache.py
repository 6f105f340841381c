"""Whether quantized linears keep their decoded weights."""

import logging
from typing import Literal, get_args

import torch

logger = logging.getLogger(__name__)

Mode = Literal["auto", "on", "off"]

_mode: Mode = "auto"
_told = False


def set_weight_cache(mode: Mode) -> None:
    """Choose whether quantized linears decode their weights once and keep them.

    Kept weights are dense, in the model's own basis and the dtype of the activations, beside the
    packed ones: a model then needs the memory of the unquantized model (2 bytes a weight in
    bfloat16) plus that of the checkpoint, and runs at its speed. The setting holds for the whole
    process and takes effect at the next call of each linear.

    Args:
        mode: "auto" keeps them on the CPU, where decoding at every call costs far more than the
            product itself, unless codes are multiplied as they are stored (trellises and e8p, where
            the processor has the instructions and no gradient of x is wanted: 8 bytes a feature are
            kept for that), and not on other devices; modules that are offloaded to disk or to
            another device never keep them. "on" keeps them on every device, "off" on none. An
            embedding, which decodes no more rows than it looks up, keeps them with "on" only.

    With "auto" and "off" codes are multiplied as they are stored where that is possible, and large
    linears whose codebooks have at most 256 entries multiply a single row on the CPU by look-up
    (`vqllm_kernels.lut.cpu`), for which they keep a copy of their codes of one byte each: an eighth
    to a quarter of a byte a weight for the formats in use.
    """
    global _mode, _told
    if mode not in get_args(Mode):
        raise ValueError(f"weight cache {mode!r}; allowed are {', '.join(get_args(Mode))}")
    _mode, _told = mode, False


def weight_cache() -> Mode:
    """The current setting."""
    return _mode


def keeps_weights(device: torch.device) -> bool:
    """Whether a linear whose tensors stay on `device` keeps its decoded weights."""
    return _mode == "on" or (_mode == "auto" and device.type == "cpu")


def tell_once(dtype: torch.dtype) -> None:
    """Log, once, what keeping the weights costs."""
    global _told
    if not _told:
        logger.info(
            "quantized weights are decoded on first use and kept, %d bytes each in %s; "
            "vqllm.set_weight_cache('off') keeps only the packed ones",
            dtype.itemsize,
            dtype,
        )
        _told = True
