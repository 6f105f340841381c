"""A quantized matrix in memory, as it will be stored, and its line of the report."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vqllm.core.bits import count
from vqllm.core.protocols import JSON
from vqllm_kernels.linear import LinearSpec


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """What the report says of a quantized matrix: a line of `report.jsonl`.

    Losses are those of the rounding. Training afterwards follows outputs, not weights, and leaves
    them as they are.
    """

    name: str
    rows: int
    cols: int
    codec: str
    """format id"""
    bits_codes: int
    bits_codebook: int
    bits_side: int
    bits_per_weight: float
    """of all three together"""
    code_entropy: float
    """bits a weight that a lossless coder would need for the codes"""
    proxy_loss: float
    """tr((T − Ŵ) H (T − Ŵ)ᵀ) / tr(T H Tᵀ), T the matrix that was rounded"""
    sqnr_db: float
    gaussian_efficiency: float
    group: tuple[str, ...]
    """linears that read the same input, this one included"""
    damping: float
    """added to the diagonal of H, relative to its mean"""
    num_tokens: int
    """that H was measured on"""
    layer: int | None = None
    """None outside the decoder layers"""
    target: str | None = None
    """name of the rounded matrix, where it is not the weights: `vqllm.quantization.target`"""
    target_change: float | None = None
    """distance of the target from the weights, as a proxy loss"""
    fragile: JSON | None = None
    """codec and proxy loss before it was coded again with more bits"""
    training: JSON | None = None
    """record of the training after its rounding"""
    expected_kl: float | None = None
    """nats a token that errors in this linear alone add to the KL divergence"""

    def to_dict(self) -> JSON:
        """JSON values; fields that do not apply are left out."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {**values, "group": list(self.group), "layer": self.layer}

    @classmethod
    def from_dict(cls, values: JSON) -> "LinearRecord":
        """Inverse of `to_dict`."""
        return cls(**{**values, "group": tuple(values["group"])})


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix: `tensors` are the stored tensors of `spec`."""

    name: str
    """full name of its module"""
    spec: LinearSpec
    tensors: dict[str, Tensor]
    record: LinearRecord
    decoded_RC: Tensor | None = None
    """`W_hat_RC`, where it was decoded to measure it"""

    @property
    def W_hat_RC(self) -> Tensor:
        """What a reader decodes, in the model's own basis, float32 [R, C]."""
        if self.decoded_RC is not None:
            return self.decoded_RC
        return self.spec.dequantize(self.tensors)


def bit_fields(spec: LinearSpec) -> dict[str, Any]:
    """The fields of a record about the size of a matrix."""
    bits = count(spec.layout())
    return {
        "bits_codes": bits.codes,
        "bits_codebook": bits.codebook,
        "bits_side": bits.side,
        "bits_per_weight": round(bits.total / (spec.rows * spec.cols), 4),
    }
