"""Quantize a matrix with a row for every token, block by block.

The input embedding and the output head are the largest matrices of a model: 151,936 x 4096 are
2.5 GB in float32. They are read, coded and packed in blocks of rows; of the whole matrix only the
packed tensors are ever in memory, and H, which has the size of the hidden states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.checkpoint.packed_matrix import LinearRecord, PackedMatrix, bit_fields
from vqllm.core import linalg, metrics, rng, threads
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON, Codec, State
from vqllm.core.tiles import to_tiles
from vqllm.errors import NumericalError
from vqllm.plan.packed_spec import transformed
from vqllm.quantization.encode import Encoded, encode, fit, with_transforms
from vqllm.recipes import Recipe
from vqllm_kernels.linear import LinearSpec

ReadRows = Callable[[int, int], Tensor]
"""Rows `start` to `stop` of a matrix, any float dtype."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix outside the decoder layers that is to be quantized."""

    names: tuple[str, ...]
    """the module that stores it, first; then, if the embedding is tied, the head"""
    recipe: Recipe
    """with the codec, transforms and rounding of this matrix"""
    spec: LinearSpec
    is_head: bool
    """whether it is that of the head (and perhaps of the embedding too), whose input has an H"""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the recipe that asked for it."""
        if len(self.names) > 1:
            return ("embeddings", "head")
        return ("head",) if self.is_head else ("embeddings",)

    @property
    def tied(self) -> dict[str, str]:
        """Modules that use the tensors of another one, which is the value."""
        return dict.fromkeys(self.names[1:], self.names[0])


def quantize_rows(
    matrix: Matrix,
    read_rows: ReadRows,
    device: torch.device,
    H_CC: Tensor | None = None,
    num_tokens: int = 0,
    weight_R: Tensor | None = None,
    processes: Processes | None = None,
) -> PackedMatrix:
    """Quantize a matrix block by block. A pure function of its arguments.

    Transforms and codebooks are fitted on as many rows as a block has, spread evenly over the
    matrix; scales of rows, if the codec has any, on each block.

    Args:
        read_rows: its rows.
        H_CC: E[x xᵀ] of the head's input, float32, not damped; None for an embedding alone, whose
            errors count alike in all features.
        num_tokens: how many tokens H was measured on.
        weight_R: importance of the rows for what is fitted; None for equal.
        processes: those that code some of the blocks each; all of them call this.
    """
    processes = processes or Processes()
    spec, name = matrix.spec, matrix.names[0]
    coder = _Coder.fit(matrix, read_rows, device, H_CC, weight_R)
    coded: dict[int, tuple[dict[str, Tensor], _Errors]] = {}
    for number, (start, stop) in enumerate(coder.blocks):
        if number % processes.size == processes.rank:
            W_RC = _rows(name, read_rows, start, stop, device)
            encoded = coder.encode(W_RC, None if weight_R is None else weight_R[start:stop])
            packed_RC = spec.format.decode(encoded.tensors, *W_RC.shape)
            coded[number] = encoded.tensors, _Errors.of(W_RC, packed_RC, coder, encoded.entropy)
    for others in processes.exchange(coded):
        coded |= others
    parts = [coded[number][0] for number in range(len(coder.blocks))]
    errors = _Errors()
    for number in range(len(coder.blocks)):
        errors = errors + coded[number][1]
    tensors = with_transforms(_joined(parts, spec), coder.states)
    numel = spec.rows * spec.cols
    bits = bit_fields(spec)
    record = LinearRecord(
        name=name,
        rows=spec.rows,
        cols=spec.cols,
        codec=matrix.recipe.codec.format_id,
        **bits,
        **errors.fields(bits["bits_codes"] / numel, numel),
        group=matrix.names,
        damping=matrix.recipe.hessian.damping if H_CC is not None else 0.0,
        num_tokens=num_tokens,
    )
    return PackedMatrix(name, spec, tensors, record)


def _joined(parts: list[dict[str, Tensor]], spec: LinearSpec) -> dict[str, Tensor]:
    """The format's tensors of the whole matrix from those of its blocks."""
    joined = {}
    for key, tensor in spec.format.layout(spec.rows, spec.cols).items():
        own = [part[key] for part in parts]
        if not tensor.by_tile_row:
            assert all(torch.equal(other, own[0]) for other in own), f"{key} is one for all blocks"
        joined[key] = torch.cat(own) if tensor.by_tile_row else own[0]
    return joined


def _rows(name: str, read_rows: ReadRows, start: int, stop: int, device: torch.device) -> Tensor:
    W_RC = read_rows(start, stop).to(device).float()
    bad = int((~torch.isfinite(W_RC)).sum())
    if bad:
        raise NumericalError(
            f"{name}: {bad} of the weights of rows {start} to {stop} are NaN or infinite in the "
            "source model. Get an undamaged copy of it."
        )
    return W_RC


@dataclass(frozen=True)
class _Coder:
    """What is fitted to a matrix, and codes its blocks."""

    matrix: Matrix
    states: list[State]
    """of the transforms"""
    H_CC: Tensor
    """as measured, or the identity"""
    H_damped: Tensor
    """in the transformed basis"""
    state: State
    """of the codec; of the sampled rows where `fits_rows`"""
    fits_rows: bool
    """whether the codec's state belongs to single rows"""
    blocks: list[tuple[int, int]]

    @classmethod
    def fit(
        cls,
        matrix: Matrix,
        read_rows: ReadRows,
        device: torch.device,
        H_CC: Tensor | None,
        weight_R: Tensor | None,
    ) -> "_Coder":
        recipe, name = matrix.recipe, matrix.names[0]
        blocks = matrix.spec.row_blocks()
        in_blocks = not recipe.rounding.tunes_state and len(blocks) > 1
        if not in_blocks or not _fits_blocks(recipe.codec, matrix.spec, read_rows):
            blocks = [(0, matrix.spec.rows)]
        # Every so many rows of tiles, whole.
        drawn = [
            torch.arange(stop - start) // recipe.codec.tile[0] % len(blocks) == 0
            for start, stop in blocks
        ]
        sample_RC = torch.cat(
            [
                _rows(name, read_rows, start, stop, device)[own.to(device)]
                for (start, stop), own in zip(blocks, drawn)
            ]
        )
        if weight_R is not None:
            weight_R = weight_R[torch.cat(drawn)]
        if H_CC is None:
            H_CC = torch.eye(matrix.spec.cols, device=device)
        linears, H_prime = transformed({name: sample_RC}, H_CC, recipe)
        sample = linears[name]
        H_damped = linalg.damp(H_prime, recipe.hessian.damping, recipe.hessian.shrinkage)
        state = fit(name, recipe, sample.W_RC, H_damped, weight_R)
        layout = matrix.spec.format.layout(matrix.spec.rows, matrix.spec.cols)
        by_row = {key for key, tensor in layout.items() if tensor.by_tile_row}
        fits_rows = len(blocks) > 1 and bool(state.keys() & by_row)
        return cls(matrix, sample.states, H_CC, H_damped, state, fits_rows, blocks)

    def encode(self, W_RC: Tensor, weight_R: Tensor | None) -> Encoded:
        """A block of rows, with what was fitted to the matrix, or scales of rows fitted to it."""
        recipe, state = self.matrix.recipe, self.state
        W_RC = self.transformed(W_RC)
        if self.fits_rows:
            state = fit(self.matrix.names[0], recipe, W_RC, self.H_damped, weight_R)
        return encode(recipe, W_RC, self.H_damped, state)

    def transformed(self, W_RC: Tensor) -> Tensor:
        """Rows in the basis in which they are coded."""
        for transform, state in zip(self.matrix.spec.transforms, self.states):
            W_RC = transform.forward(W_RC, state)
        return W_RC

    def own_basis(self, W_RC: Tensor) -> Tensor:
        """Rows in the basis of the model."""
        for transform, state in reversed(list(zip(self.matrix.spec.transforms, self.states))):
            W_RC = transform.inverse(W_RC, state)
        return W_RC


def _fits_blocks(codec: Codec, spec: LinearSpec, read_rows: ReadRows) -> bool:
    """Whether a codec's state is one of the whole matrix or one of each row, not both, and is not
    changed while the matrix is coded: then blocks of rows are coded as the whole would be."""
    if codec.refit_cols is not None:
        return False
    few_RC = read_rows(0, min(spec.rows, 16 * codec.tile[0])).float()
    state = codec.fit(to_tiles(few_RC, codec.tile), None, rng.generator(0, "", ""))
    layout = spec.format.layout(spec.rows, spec.cols)
    kinds = {layout[key].by_tile_row if key in layout else None for key in state}
    return len(kinds) <= 1 and None not in kinds


Sums = tuple[float, float]
"""Of errors, and of what they are errors of."""


@dataclass(frozen=True)
class _Errors:
    """Sums over blocks of a matrix, for its line of the report."""

    entropy: float = 0.0
    coded: Sums = (0.0, 0.0)
    plain: Sums = (0.0, 0.0)
    weighed: Sums = (0.0, 0.0)

    @classmethod
    def of(cls, W_RC: Tensor, packed_RC: Tensor, coder: _Coder, entropy: float) -> "_Errors":
        """Those of a block: as it was, and as its packed tensors decode in the transformed
        basis."""
        transformed_RC = coder.transformed(W_RC)
        E_RC = coder.own_basis(packed_RC) - W_RC
        return cls(
            entropy,
            _sums(packed_RC - transformed_RC, transformed_RC),
            _sums(E_RC, W_RC),
            _sums(E_RC, W_RC, coder.H_CC),
        )

    def __add__(self, other: "_Errors") -> "_Errors":
        return _Errors(
            self.entropy + other.entropy,
            _added(self.coded, other.coded),
            _added(self.plain, other.plain),
            _added(self.weighed, other.weighed),
        )

    def fields(self, bits: float, numel: int) -> JSON:
        """Of the matrix's record."""
        mse, relative, proxy = (
            error / signal if signal > 0 else 0.0 if error == 0 else math.inf
            for error, signal in (self.coded, self.plain, self.weighed)
        )
        return {
            "code_entropy": round(self.entropy / numel, 4),
            "proxy_loss": proxy,
            "sqnr_db": -10 * math.log10(relative) if relative > 0 else math.inf,
            "gaussian_efficiency": metrics.gaussian_efficiency(mse, bits),
        }


def _sums(E_RC: Tensor, W_RC: Tensor, H_CC: Tensor | None = None) -> Sums:
    """tr(E H Eᵀ) and tr(W H Wᵀ); H is the identity by default."""
    error, signal = (
        float(threads.total((A_RC if H_CC is None else A_RC @ H_CC).double() * A_RC))
        for A_RC in (E_RC, W_RC)
    )
    return error, signal


def _added(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1]
