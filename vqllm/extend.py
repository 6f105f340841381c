"""For authors of codecs, transforms and rounding rules: everything they import, in one place.

    from vqllm.extend import CODECS, Codec, Field, LutSpec, Point, State, pack_bits, unpack_bits

What to derive from, and what passes between the parts (`vqllm.core.protocols`):
    Codec           how a tile of weights becomes integers, and back
    ScaledCodec     a codec with a fixed code for Gaussian weights, times one scale
    SearchableCodec a codec that lists several codes near a tile, which stages of `residual` must
    OutlierCodec    a codec that stores some weights of each row apart
    Transform       an invertible change of one side of W and H
    Rounding        the rule that chooses codes, given H
    OutputRounding  a rule that also asks what errors in the outputs do to the loss
    Tuning          a step after rounding that moves codes or what the codec learned
    Settings, Field a group of options of a part, and one option with bounds and description
    Point           a configuration of a codec, and the distortion that it must reach
    State           what `fit` or `forward` learned: tensors by name

Where a class becomes a `type` of recipes, with `@CODECS.register("name")`:
    CODECS, TRANSFORMS, ROUNDINGS, TUNINGS

What is stored, and how readers decode it:
    FormatSpec      a packed format; `register_format` makes a new one known
    TensorLayout    shape, dtype and purpose of a stored tensor
    LutSpec         the format lut-v1: indices into one table, with kernels
    TransformSpec   what a transform is at run time
    HadamardSpec, ScaleSpec, CodedScaleSpec, PermutationSpec, BlockDiagonalSpec
    pack_bits, unpack_bits, packed_bytes    integers of 1 to 16 bits in bytes

Help:
    tiles           from a matrix to its grid of tiles and back
    linalg          Cholesky and LDLᵀ factors of H
    codec_bench     distortion and speed of a codec on Gaussian weights
    build_part      a codec inside a codec, from its options
    check_finite, nearest_entry, root_mean_square, weigh    see `vqllm.codecs.base`
    NumericalError, RecipeError, VqllmError    what a mistake of the user raises

A name is looked up in its own module when it is first used. So codecs inside this package may
import from here too, and this module imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import Field

    from vqllm.codecs.base import (
        CODECS,
        ScaledCodec,
        SearchableCodec,
        build_part,
        check_finite,
        nearest_entry,
        root_mean_square,
        weigh,
    )
    from vqllm.core import linalg, tiles
    from vqllm.core.protocols import (
        Codec,
        OutlierCodec,
        OutputRounding,
        Point,
        Rounding,
        Settings,
        State,
        Transform,
        Tuning,
    )
    from vqllm.errors import NumericalError, RecipeError, VqllmError
    from vqllm.evaluation import codec_bench
    from vqllm.rounding.base import ROUNDINGS
    from vqllm.transforms.base import TRANSFORMS
    from vqllm.tuning.base import TUNINGS
    from vqllm_kernels.bitpack import pack_bits, packed_bytes, unpack_bits
    from vqllm_kernels.formats import FormatSpec
    from vqllm_kernels.formats import register as register_format
    from vqllm_kernels.layout import TensorLayout
    from vqllm_kernels.lut.spec import LutSpec
    from vqllm_kernels.transform_spec import TransformSpec
    from vqllm_kernels.transforms import (
        BlockDiagonalSpec,
        CodedScaleSpec,
        HadamardSpec,
        PermutationSpec,
        ScaleSpec,
    )

HOMES = {
    "BlockDiagonalSpec": "vqllm_kernels.transforms:BlockDiagonalSpec",
    "CODECS": "vqllm.codecs.base:CODECS",
    "CodedScaleSpec": "vqllm_kernels.transforms:CodedScaleSpec",
    "Codec": "vqllm.core.protocols:Codec",
    "Field": "pydantic:Field",
    "FormatSpec": "vqllm_kernels.formats:FormatSpec",
    "HadamardSpec": "vqllm_kernels.transforms:HadamardSpec",
    "LutSpec": "vqllm_kernels.lut.spec:LutSpec",
    "NumericalError": "vqllm.errors:NumericalError",
    "OutlierCodec": "vqllm.core.protocols:OutlierCodec",
    "OutputRounding": "vqllm.core.protocols:OutputRounding",
    "PermutationSpec": "vqllm_kernels.transforms:PermutationSpec",
    "Point": "vqllm.core.protocols:Point",
    "ROUNDINGS": "vqllm.rounding.base:ROUNDINGS",
    "RecipeError": "vqllm.errors:RecipeError",
    "Rounding": "vqllm.core.protocols:Rounding",
    "ScaleSpec": "vqllm_kernels.transforms:ScaleSpec",
    "ScaledCodec": "vqllm.codecs.base:ScaledCodec",
    "SearchableCodec": "vqllm.codecs.base:SearchableCodec",
    "Settings": "vqllm.core.protocols:Settings",
    "State": "vqllm.core.protocols:State",
    "TRANSFORMS": "vqllm.transforms.base:TRANSFORMS",
    "TUNINGS": "vqllm.tuning.base:TUNINGS",
    "TensorLayout": "vqllm_kernels.layout:TensorLayout",
    "Transform": "vqllm.core.protocols:Transform",
    "TransformSpec": "vqllm_kernels.transform_spec:TransformSpec",
    "Tuning": "vqllm.core.protocols:Tuning",
    "VqllmError": "vqllm.errors:VqllmError",
    "build_part": "vqllm.codecs.base:build_part",
    "check_finite": "vqllm.codecs.base:check_finite",
    "codec_bench": "vqllm.evaluation.codec_bench:",
    "linalg": "vqllm.core.linalg:",
    "nearest_entry": "vqllm.codecs.base:nearest_entry",
    "pack_bits": "vqllm_kernels.bitpack:pack_bits",
    "packed_bytes": "vqllm_kernels.bitpack:packed_bytes",
    "register_format": "vqllm_kernels.formats:register",
    "root_mean_square": "vqllm.codecs.base:root_mean_square",
    "tiles": "vqllm.core.tiles:",
    "unpack_bits": "vqllm_kernels.bitpack:unpack_bits",
    "weigh": "vqllm.codecs.base:weigh",
}
"""Where each name is defined; a module has nothing after the colon."""

__all__ = [
    "CODECS",
    "ROUNDINGS",
    "TRANSFORMS",
    "TUNINGS",
    "BlockDiagonalSpec",
    "Codec",
    "CodedScaleSpec",
    "Field",
    "FormatSpec",
    "HadamardSpec",
    "LutSpec",
    "NumericalError",
    "OutlierCodec",
    "OutputRounding",
    "PermutationSpec",
    "Point",
    "RecipeError",
    "Rounding",
    "ScaleSpec",
    "ScaledCodec",
    "SearchableCodec",
    "Settings",
    "State",
    "TensorLayout",
    "Transform",
    "TransformSpec",
    "Tuning",
    "VqllmError",
    "build_part",
    "check_finite",
    "codec_bench",
    "linalg",
    "nearest_entry",
    "pack_bits",
    "packed_bytes",
    "register_format",
    "root_mean_square",
    "tiles",
    "unpack_bits",
    "weigh",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'vqllm.extend' has no attribute {name!r}")
    module, _, attribute = HOMES[name].partition(":")
    value = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
