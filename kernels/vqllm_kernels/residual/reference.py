"""The bits of format residual-v1: W is the sum of the weights of its stages."""

from collections.abc import Sequence

from torch import Tensor

from vqllm_kernels.formats import FormatSpec


def stage_tensors(tensors: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
    """The tensors of one stage under their own names: stored as `s{stage}_` + name."""
    prefix = f"s{stage}_"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def decode(
    tensors: dict[str, Tensor], stages: Sequence[FormatSpec], rows: int, cols: int
) -> Tensor:
    """Weights, float32 [rows, cols]: the stages added in their order."""
    W_RC = stages[0].decode(stage_tensors(tensors, 0), rows, cols)
    for i, stage in enumerate(stages[1:], start=1):
        W_RC = W_RC + stage.decode(stage_tensors(tensors, i), rows, cols)
    return W_RC


def decode_rows(
    tensors: dict[str, Tensor], stages: Sequence[FormatSpec], index_N: Tensor, cols: int
) -> Tensor:
    """Some rows of the weights, float32 [N, cols]; a stage may depend on the place of a row."""
    W_NC = stages[0].decode_rows(stage_tensors(tensors, 0), index_N, cols)
    for i, stage in enumerate(stages[1:], start=1):
        W_NC = W_NC + stage.decode_rows(stage_tensors(tensors, i), index_N, cols)
    return W_NC
