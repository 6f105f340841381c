"""A linear of VPTQ: its options, and its indices and numbers; `vptq` says how they are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from vqllm.foreign.base import Options, Stored
from vqllm.foreign.groups import as_bytes
from vqllm_kernels.bitpack import packed_bytes, unpack_bits

METHOD = "vptq"
SIZES = tuple(1 << bits for bits in range(1, 17))
"""Entries of a codebook."""
ANY = range(1, 1 << 24)


@dataclass(frozen=True)
class Layer:
    """The options of a linear: `outliers` inputs with vectors of `outlier_length` outputs,
    then `num_groups` groups of `group` inputs with vectors of `length`; 0 entries are none."""

    rows: int
    cols: int
    num_groups: int
    group: int
    length: int
    entries: int
    residuals: int
    outliers: int
    outlier_length: int
    outlier_entries: int
    is_packed: bool
    has_scale: bool
    has_order: bool
    of_outputs: bool
    """whether scales are of outputs"""

    @property
    def index_bits(self) -> int:
        return self.entries.bit_length() - 1

    @property
    def residual_bits(self) -> int:
        return self.residuals.bit_length() - 1 if self.residuals else 0


def read_options(values: Any, where: str) -> Layer:
    options = Options(METHOD, values if isinstance(values, Mapping) else {}, where)
    length_0, length = _pair(options, "vector_lens")
    entries_0, entries = _pair(options, "num_centroids")
    residuals_0, residuals = _pair(options, "num_res_centroids", (-1, -1))
    if length not in ANY:
        options.refuse("vector_lens", [length_0, length], "a second number of at least 1")
    if entries not in SIZES:
        _refuse_entries(options, "num_centroids", [entries_0, entries])
    if residuals > 0 and residuals not in SIZES:
        _refuse_entries(options, "num_res_centroids", [residuals_0, residuals])
    if residuals_0 > 0:
        options.refuse("num_res_centroids", [residuals_0, residuals], "none of outliers: [-1, ..]")
    cols = options.number("in_features", ANY)
    outliers = options.number("outlier_size", range(1 << 24), 0)
    if outliers and (length_0 < 2 or entries_0 not in SIZES):
        options.refuse("outlier_size", outliers, "0 where vector_lens and num_centroids have none")
    own = Layer(
        rows=options.number("out_features", ANY),
        cols=cols,
        num_groups=options.number("group_num", ANY, 1),
        group=options.number("group_size", ANY),
        length=length,
        entries=entries,
        residuals=max(residuals, 0),
        outliers=outliers,
        outlier_length=length_0 if outliers else 1,
        outlier_entries=entries_0 if outliers else 0,
        is_packed=options.choice("is_indice_packed", (True, False), False),
        has_scale=options.choice("enable_norm", (True, False), False),
        has_order=options.choice("enable_perm", (True, False), False),
        of_outputs=options.number("norm_dim", (0, 1), 0) == 1,
    )
    if outliers >= cols or not 0 <= outliers + own.num_groups * own.group - cols < own.group:
        options.refuse("group_size", own.group, f"what makes {cols} inputs with the other options")
    options.choice("vector_quant_dim", ("out",), "out")
    options.ignore("bias", "indices_as_float", "enable_proxy_error", "device", "dtype")
    options.end()
    return own


def indices(module: Stored, own: Layer, residual: bool = False) -> Callable[[int, int], Tensor]:
    """Gives the entries of rows of vectors `first` to `last`, int32 [G, last - first, S]."""
    if not own.is_packed:
        name, entries = ("res_indices", own.residuals) if residual else ("indices", own.entries)
        every = _unsigned(module.read(name))
        _check_indices(module, name, every, entries)
        return lambda first, last: every[:, first:last]
    words = module.read("indices")
    bits, shift = own.index_bits + own.residual_bits, own.index_bits

    def read(first: int, last: int) -> Tensor:
        if bits <= 16:
            both = _narrow(words[:, first:last], bits, own.group)
        else:
            both = _wide(words[:, first:last], bits, own.group)
        return both >> shift if residual else both & ((1 << shift) - 1)

    return read


def outlier_indices(module: Stored, own: Layer) -> Tensor:
    """int32 [rows of vectors, outliers]."""
    index_IO = _unsigned(module.read("outlier_indices"))[0]
    _check_indices(module, "outlier_indices", index_IO, own.outlier_entries)
    return index_IO


def _check_indices(module: Stored, name: str, index: Tensor, entries: int) -> None:
    """Raise ModelError for an index of an entry that there is not."""
    if int(index.max()) >= entries or int(index.min()) < 0:
        raise module.wrong(
            f"its {name} are {int(index.min())}..{int(index.max())}, of {entries} entries"
        )


def order(module: Stored, own: Layer) -> Tensor:
    """The model's input that each input of the codes is, int64 [C]."""
    perm_C = _unsigned(module.read("perm")).long()
    if not torch.equal(perm_C.sort().values, torch.arange(own.cols)):
        raise module.wrong(f"its perm does not have every input of 0..{own.cols - 1} once")
    return perm_C


def scale_and_bias(module: Stored, own: Layer) -> tuple[Tensor, Tensor]:
    """float32 [1, C] each, or [R, 1]."""
    axis = 1 if own.of_outputs else 0
    scale, bias = (module.read(f"weight_{name}").float() for name in ("scale", "bias"))
    return scale.unsqueeze(axis), bias.unsqueeze(axis)


def _pair(options: Options, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """A number of outliers, and one of all other inputs."""
    value = options.take(key, default)
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or any(type(number) is not int for number in numbers):
        options.refuse(key, value, "two numbers: of outliers (-1: none), and of the other inputs")
    return numbers[0], numbers[1]


def _refuse_entries(options: Options, key: str, value: list[int]) -> NoReturn:
    options.refuse(key, value, f"a power of two up to {SIZES[-1]}")


def _unsigned(stored: Tensor) -> Tensor:
    """Numbers of 16 bits without a sign, however they are stored, as int32."""
    if stored.dtype == torch.float16:
        stored = stored.view(torch.int16)
    return stored.int() & 0xFFFF if stored.dtype == torch.int16 else stored.int()


def _narrow(words: Tensor, bits: int, count: int) -> Tensor:
    """The first symbols of up to 16 bits of rows of words, int32 [..., count]."""
    return unpack_bits(as_bytes(words)[..., : packed_bytes(count, bits)], bits, count)


def _wide(words: Tensor, bits: int, count: int) -> Tensor:
    """The first symbols of more than 16 bits of rows of words, int64 [..., count]."""
    place = torch.arange(count) * bits
    padded = torch.nn.functional.pad(words, (0, 1)).long() & 0xFFFFFFFF
    pairs = padded[..., place // 32] | padded[..., place // 32 + 1] << 32
    return (pairs >> place % 32) & ((1 << bits) - 1)
