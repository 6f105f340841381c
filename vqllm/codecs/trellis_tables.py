"""The tables of a trellis, trained for Gaussian weights by the Lloyd algorithm.

Paths of new weights are searched with the table so far, then every entry becomes the mean of the
weights that have its code. A table is trained once in a process, and is the same for every matrix.
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from vqllm.codecs.search import viterbi
from vqllm_kernels.trellis import reference, reference_v2
from vqllm_kernels.trellis.spec import ParityTrellisSpec, TrellisSpec

LARGEST = 127
"""Of the integers of a table of int8; the scale of the matrix makes up for it."""

_ROUNDS = 60
"""Passes that train a table. At 2^8 states and 2 bits the distortion is 0.0842 with the computed
values, 0.0818 after 5 rounds, 0.0798 after 20."""
_PARITY_ROUNDS, _PARITY_TILES = 24, 96
"""The same for the 64 or 128 entries of a table that parities lead to."""


@cache
def shifts(tile_bits: int, step_weights: int) -> list[int]:
    """New bits of every step."""
    ends = reference.step_ends(tile_bits, reference.WEIGHTS // step_weights)
    return [b - a for a, b in zip([0, *ends], ends)]


@cache
def trained_table(spec: TrellisSpec, scale: float) -> Tensor:
    """A table for unit Gaussian weights, float16 [2^q, V] or [2^L, V].

    Args:
        scale: of the values that training begins with.
    """
    generator = torch.Generator().manual_seed(0)
    entries = 1 << (spec.table_bits or spec.state_bits)
    table_KV = scale * _first_table(spec, generator)
    num_tiles = max(64, min(1024, 4 * entries * spec.step_weights // 16))
    sums_KV, counts_K = torch.zeros_like(table_KV).double(), torch.zeros(entries).double()
    for _ in range(_ROUNDS):
        # Paths of new weights with the table so far, rounded as it will be stored.
        x_NTV = torch.randn(num_tiles, reference.WEIGHTS, generator=generator)
        x_NTV = x_NTV.unflatten(1, (-1, spec.step_weights))
        values_SV = reference.values(
            spec.code, spec.state_bits, spec.table_bits, table_KV.half(), table_KV.device
        )
        shift_T = shifts(spec.tile_bits, spec.step_weights)
        state_N = viterbi.tail_biting(x_NTV, values_SV, shift_T).flatten().long()
        # Each step used one entry, with signs: the weights times these signs are its samples.
        entry_N, sign_NV = reference.entries(spec.code, spec.table_bits, state_N)
        x_NV = x_NTV.flatten(0, 1).double() * sign_NV
        counts_K = counts_K / 2 + torch.bincount(entry_N, minlength=entries).double()
        totals = [torch.bincount(entry_N, column, entries) for column in x_NV.unbind(1)]
        sums_KV = sums_KV / 2 + torch.stack(totals, 1)
        # An entry with two samples or fewer keeps its value; samples of earlier rounds count less.
        trained = counts_K[:, None] > 2
        table_KV = torch.where(trained, sums_KV / counts_K[:, None], table_KV).float()
    return table_KV.half()


def _first_table(spec: TrellisSpec, generator: torch.Generator) -> Tensor:
    """Where training begins: the values of mul1 or Gaussian entries."""
    if spec.code == "table" and spec.step_weights == 1:
        return reference.computed_values("mul1", spec.state_bits, torch.device("cpu"))
    entries = 1 << (spec.table_bits or spec.state_bits)
    return torch.randn(entries, spec.step_weights, generator=generator)


@cache
def parity_table(spec: ParityTrellisSpec, scale: float) -> Tensor:
    """The trained table of a spec for unit Gaussian weights, float32 [2^K, 1], of multiples of the
    largest entry over `LARGEST`.

    Args:
        scale: of the values that training begins with.
    """
    index_S = reference_v2.indices(spec.masks, torch.arange(1 << spec.state_bits))
    generator = torch.Generator().manual_seed(0)
    table_K = scale * quantiles(1 << len(spec.masks))
    return train_parity_table(
        index_S, table_K, shifts(spec.tile_bits, 1), _PARITY_ROUNDS, _PARITY_TILES, generator
    )[:, None]


def train_parity_table(
    index_S: Tensor,
    table_K: Tensor,
    shift_T: list[int],
    rounds: int,
    num_tiles: int,
    generator: torch.Generator,
) -> Tensor:
    """A table of least distortion for an index of every state, float32 [K], as it is stored.

    Args:
        index_S: int64 [2^L].
        table_K: where training begins, float32.
        num_tiles: in every round.
    """
    entries = len(table_K)
    sums_K, counts_K = torch.zeros(entries).double(), torch.zeros(entries).double()
    for i in range(rounds):
        x_NT = torch.randn(num_tiles, reference.WEIGHTS, generator=generator)
        path_NT = viterbi.tail_biting(x_NT[..., None], table_K[index_S][:, None], shift_T)
        entry_N = index_S[path_NT.flatten().long()]
        # Early rounds move the table, so that their samples count less; the late ones all count.
        keep = 0.5 if 2 * i < rounds else 1.0
        counts_K = keep * counts_K + torch.bincount(entry_N, minlength=entries).double()
        sums_K = keep * sums_K + torch.bincount(entry_N, x_NT.flatten().double(), entries)
        table_K = torch.where(counts_K > 2, sums_K / counts_K, table_K).float()
    return storable(table_K)


def storable(table_K: Tensor) -> Tensor:
    """The nearest table whose entries are integers up to `LARGEST` times its largest one over
    that."""
    unit = table_K.abs().max() / LARGEST
    return (table_K / unit).round() * unit


def quantiles(entries: int) -> Tensor:
    """Numbers that unit Gaussian weights lie between with equal probability, ascending, float32
    [entries], of unit mean square."""
    values = [NormalDist().inv_cdf((i + 0.5) / entries) for i in range(entries)]
    table_K = torch.tensor(values, dtype=torch.float64)
    return (table_K / table_K.square().mean().sqrt()).float()
