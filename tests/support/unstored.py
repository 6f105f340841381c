"""A codec for tests that only choose codes, and store nothing."""

from torch import Tensor

from vqllm.core.protocols import Codec, State
from vqllm_kernels.formats import FormatSpec


class Unstored(Codec):
    """Has no packed format."""

    def spec(self) -> FormatSpec:
        raise NotImplementedError

    def pack(self, codes_IJM: Tensor, state: State) -> dict[str, Tensor]:
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Tensor, State]:
        raise NotImplementedError
