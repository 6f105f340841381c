"""The transforms that a stored linear can have: what is stored, and what is done to x, y and W.

`transform_spec` says what A is to each side. What is stored is what W was changed by, bit for bit.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vqllm_kernels import plugins
from vqllm_kernels.bitpack import pack_bits, packed_bytes, unpack_bits
from vqllm_kernels.hadamard import reference as hadamard
from vqllm_kernels.layout import TensorLayout, check_numbers, not_finite
from vqllm_kernels.transform_spec import Tensors, TransformSpec

if TYPE_CHECKING:
    from vqllm_kernels.kernels import TransformKernels


@dataclass(frozen=True, kw_only=True)
class HadamardSpec(TransformSpec):
    """A = Q diag(s): random signs s, then an orthonormal Hadamard transform Q.

    Q is block diagonal with blocks of `block` features (None: one block, the full transform); how
    a block is built from its order is fixed by `vqllm_kernels.hadamard.matrices`.
    Stored: `signs`, one bit a feature (1 means −1), packed as in `bitpack`.
    """

    kind: ClassVar[str] = "hadamard"
    block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and (self.block < 1 or self.size % self.block):
            raise ValueError(f"a block of {self.block} does not divide {self.size} features")

    @property
    def order(self) -> int:
        """Features that are transformed together."""
        return self.block or self.size

    def layout(self) -> dict[str, TensorLayout]:
        return {"signs": TensorLayout((packed_bytes(self.size, 1),), torch.uint8, "side")}

    @staticmethod
    def pack_signs(signs: Tensor) -> Tensors:
        """The stored form of a vector of ±1."""
        return {"signs": pack_bits(signs < 0, 1)}

    def _signs(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return 1 - 2 * unpack_bits(tensors["signs"], 1, self.size).to(dtype)

    def apply(self, v: Tensor, tensors: Tensors) -> Tensor:
        return hadamard.transform(v * self._signs(tensors, v.dtype), self.order)

    def apply_inverse(self, v: Tensor, tensors: Tensors) -> Tensor:
        Qt_v = hadamard.transform(v, self.order, transpose=True)
        return Qt_v * self._signs(tensors, v.dtype)

    def kernels(self) -> "TransformKernels":
        """The Triton kernels of the transform."""
        from vqllm_kernels.hadamard.kernels import HadamardKernels

        return HadamardKernels()

    # A is orthogonal, so A⁻ᵀ = A and Aᵀ = A⁻¹.
    apply_inverse_transpose = apply
    apply_transpose = apply_inverse


@dataclass(frozen=True, kw_only=True)
class ScaleSpec(TransformSpec):
    """A = diag(d) on side "in" (x' = d x, W' = W / d); A = diag(1/d) on side "out" (y = d y').

    Stored: `scale` = d, float16 [size].
    """

    kind: ClassVar[str] = "scale"

    def layout(self) -> dict[str, TensorLayout]:
        return {"scale": TensorLayout((self.size,), torch.float16, "side")}

    def scale(self, tensors: Tensors) -> Tensor:
        """d [size], float16."""
        return tensors["scale"]

    def apply(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._multiply(v, tensors, inverse=self.side == "out")

    def apply_inverse(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._multiply(v, tensors, inverse=self.side == "in")

    def _multiply(self, v: Tensor, tensors: Tensors, inverse: bool) -> Tensor:
        # W was changed by exactly the stored d. Rounding d to bfloat16 would leave a gain of up to
        # 2^-9 on a channel; in float32 only the product is rounded.
        wide = torch.promote_types(v.dtype, torch.float32)
        d = self.scale(tensors).to(wide)
        return (v.to(wide) / d if inverse else v.to(wide) * d).to(v.dtype)

    apply_inverse_transpose = apply_inverse
    apply_transpose = apply

    def problem(self, tensors: Tensors) -> str | None:
        return not_finite(tensors) or _zeros("scale", tensors["scale"])


@dataclass(frozen=True, kw_only=True)
class CodedScaleSpec(ScaleSpec):
    """The scales of `ScaleSpec` as numbers of `bits` bits: d = levels[index].

    Stored: `levels`, float16 [2^bits]; `index`, one a feature, packed as in `bitpack`.
    """

    kind: ClassVar[str] = "coded_scale"
    bits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise ValueError(f"scales in codes of {self.bits} bits; allowed are 1 to 8")

    def layout(self) -> dict[str, TensorLayout]:
        return {
            "levels": TensorLayout((1 << self.bits,), torch.float16, "side"),
            "index": TensorLayout((packed_bytes(self.size, self.bits),), torch.uint8, "side"),
        }

    def scale(self, tensors: Tensors) -> Tensor:
        return tensors["levels"][unpack_bits(tensors["index"], self.bits, self.size).long()]

    def problem(self, tensors: Tensors) -> str | None:
        return not_finite(tensors) or _zeros("levels", tensors["levels"])


def _zeros(name: str, scales: Tensor) -> str | None:
    zeros = int((scales == 0).sum())
    return f"{zeros} entries of {name} are 0" if zeros else None


@dataclass(frozen=True, kw_only=True)
class PermutationSpec(TransformSpec):
    """A v = v[p]. Stored: `permutation` = p, every index once, int32 [size]."""

    kind: ClassVar[str] = "permutation"

    def layout(self) -> dict[str, TensorLayout]:
        return {"permutation": TensorLayout((self.size,), torch.int32, "side")}

    def apply(self, v: Tensor, tensors: Tensors) -> Tensor:
        return v[..., tensors["permutation"].long()]

    def apply_inverse(self, v: Tensor, tensors: Tensors) -> Tensor:
        return v[..., torch.argsort(tensors["permutation"].long())]

    apply_inverse_transpose = apply
    apply_transpose = apply_inverse

    def problem(self, tensors: Tensors) -> str | None:
        p = tensors["permutation"]
        once = torch.arange(self.size, dtype=p.dtype, device=p.device)
        if torch.equal(p.sort().values, once):
            return None
        return f"permutation does not have every index of 0..{self.size - 1} once"


@dataclass(frozen=True, kw_only=True)
class BlockDiagonalSpec(TransformSpec):
    """A = diag(T_1, T_2, ...): dense invertible blocks of `block` features, the last one of what
    is left of `size`.

    Stored, float16: `blocks` [size // block, block, block] and, where `block` does not divide
    `size`, `last`, the square block that is left. On side "in" run time takes A and the decoded
    weights take Aᵀ; inverses are only needed to quantize (and on side "out").
    """

    kind: ClassVar[str] = "block_diagonal"
    block: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.block <= self.size:
            raise ValueError(f"blocks of {self.block} features, of {self.size} in all")

    def layout(self) -> dict[str, TensorLayout]:
        num_blocks, left = divmod(self.size, self.block)
        shapes = {"blocks": (num_blocks, self.block, self.block), "last": (left, left)}
        return {
            name: TensorLayout(shape, torch.float16, "side")
            for name, shape in shapes.items()
            if shape[-1] > 0
        }

    def apply(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._times(v, {name: T.mT for name, T in tensors.items()})

    def apply_inverse(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._times(v, {name: _inverse(T, v).mT for name, T in tensors.items()})

    def apply_inverse_transpose(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._times(v, {name: _inverse(T, v) for name, T in tensors.items()})

    def apply_transpose(self, v: Tensor, tensors: Tensors) -> Tensor:
        return self._times(v, tensors)

    def _times(self, v: Tensor, factors: Tensors) -> Tensor:
        """The product of the rows of v with diag(factors)."""
        # Scale says why the product is wide: only it is rounded.
        wide = torch.promote_types(v.dtype, torch.float32)
        factors = {name: T.to(wide) for name, T in factors.items()}
        budget = hadamard.CHUNK_ELEMENTS["cpu" if v.device.type == "cpu" else "other"]
        v_NC = v.reshape(-1, self.size)
        parts = [
            self._times_chunk(part.to(wide), factors).to(v.dtype)
            for part in v_NC.split(max(1, budget // self.size))
        ]
        return torch.cat(parts).reshape(v.shape)

    def _times_chunk(self, v_NC: Tensor, factors: Tensors) -> Tensor:
        whole = self.size - self.size % self.block
        v_KNG = v_NC[:, :whole].unflatten(1, (-1, self.block)).transpose(0, 1)
        y_NC = torch.bmm(v_KNG, factors["blocks"]).transpose(0, 1).flatten(1)
        if whole == self.size:
            return y_NC
        return torch.cat((y_NC, v_NC[:, whole:] @ factors["last"]), 1)

    def problem(self, tensors: Tensors) -> str | None:
        if problem := super().problem(tensors):
            return problem
        for name, T in tensors.items():
            singular = int((torch.linalg.inv_ex(T.float()).info != 0).sum())
            if singular:
                return f"{singular} of the matrices of {name} have no inverse"
        return None


def _inverse(T: Tensor, like: Tensor) -> Tensor:
    """T⁻¹ for a product with `like`, from float64 on the CPU, which not every device has."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.linalg.inv(T.cpu().double()).to(like.device, wide)


_KINDS: dict[str, type[TransformSpec]] = {
    spec.kind: spec
    for spec in (HadamardSpec, ScaleSpec, CodedScaleSpec, PermutationSpec, BlockDiagonalSpec)
}


def from_dict(values: dict[str, Any], size: int) -> TransformSpec:
    """The spec that `to_dict` described, for a side of `size` features.

    Raises:
        ValueError: wrong fields, an unknown kind, or one of a package that is broken.
    """
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in _KINDS and (problem := _load_plugins().get(str(kind))):
        raise ValueError(problem)
    if kind not in _KINDS:
        raise ValueError(
            f"unknown transform {kind!r}; known: {', '.join(sorted(_KINDS))}; one of another "
            "package is known where that package is installed"
        )
    spec = _KINDS[kind]
    known = {f.name for f in fields(spec)} - {"size"}
    if set(rest) != known:
        raise ValueError(f"transform {kind}: fields {sorted(rest)}, expected {sorted(known)}")
    check_numbers(spec, rest)
    return spec(size=size, **rest)


@cache
def _load_plugins() -> dict[str, str]:
    """Kinds that other installed packages bring, in entry points that have the kind for their name
    and lead to the class. What is wrong with those that fail, by kind."""
    return plugins.load("vqllm.transform_kinds", _KINDS, TransformSpec)
