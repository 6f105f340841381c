"""The bits of format uniform-v1: W = scale · (q − zero), scale and zero for each group."""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import unpack_bits


def decode(
    tensors: dict[str, Tensor], bits: int, group: int | None, rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` uint8 [rows, packed_bytes(cols, bits)], the q of a row packed as in
            `bitpack`; `scale` float16 and `zero` uint8, both [rows, ceil(cols/group)].
        group: consecutive columns of a row that share a scale; None is the whole row.
    """
    q_RC = unpack_bits(tensors["codes"], bits, cols)[:rows].float()
    group_C = torch.arange(cols, device=q_RC.device) // (group or cols)
    scale_RC = tensors["scale"].float()[:, group_C]
    zero_RC = tensors["zero"].float()[:, group_C]
    return scale_RC * (q_RC - zero_RC)
