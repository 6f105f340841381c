"""The operations of a packed linear, as the run-time layer calls them.

    linear     y = x Wᵀ + bias: all transforms, the product and the bias, one operator
    linears    the same for linears of one input, whose transforms of it are applied once, and
               whose products are one where formats are equal and kernels run
    matmul     y = x Wᵀ in the transformed basis, W packed
    decode     W in the transformed basis
    transform  x' from x, or y from y' (a transform on one side of the product)

    implementation  what it does                                       taken for
    triton          decodes in registers, feeds the tensor cores       CUDA, up to 64 rows of x
    dense           decodes W (with a kernel if there is one), then    CUDA, more rows, or a format
                    torch's product in the dtype of x                  without a kernel
    lookup          looks up products with the entries of a small      CPU, up to 8 rows of x
                    codebook (numba)
    reference       the definition in torch, products in float32       every other case

The limit of 64 rows is computed, not measured: on an H100 the small-batch kernels are bound by
decoding (2 to 4 instructions a weight) up to about 50 rows and by the tensor cores from there on.

Every operation is one operator of `torch.library`, so that `torch.compile` sees a single call and
the choice happens inside it, and has a derivative with respect to the activations. The packed
tensors are constants.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vqllm_kernels import formats, gpu, transforms
from vqllm_kernels.choice import (
    BATCH_BUCKETS,
    Call,
    Choice,
    Implementation,
    Operation,
    bucket,
    choices,
    choose,
    force,
    forget,
)
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut import cpu as lookup
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec, TransformSpec

if TYPE_CHECKING:  # it needs triton
    from vqllm_kernels.activations import Quantized, Wanted

    Operand = Tensor | Quantized

__all__ = [
    "Call",
    "Choice",
    "beats_kept_weights",
    "choices",
    "decode",
    "decode_rows",
    "force",
    "forget",
    "linear",
    "linears",
    "matmul",
    "transform",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

LOOKUP_ROWS = 1
"""Rows of x up to which look-ups are not slower than torch's product with decoded weights: 4096 x
4096 takes 0.14 (1 bit) to 0.39 ms (2 bits, d = 2) a row, torch 1.7 ms for 1 to 4 rows in bfloat16;
one by one it takes 0.8 to 1.6."""


def linear(
    x: Tensor, tensors: dict[str, Tensor], spec: LinearSpec, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias in the model's own basis.

    Scales next to a Hadamard transform are part of it: nothing is rounded between them.

    Args:
        x: [..., spec.cols].
        tensors: the stored tensors of the linear under their own names.
        bias: [spec.rows].

    Returns:
        [..., spec.rows] in the dtype of x.
    """
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.linear(x, packed, bias, _text(spec), spec.rows, spec.cols)


def linears(
    x: Tensor,
    tensors: Sequence[dict[str, Tensor]],
    specs: Sequence[LinearSpec],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """x Wᵀ + bias of each of several linears with equal transforms of the input.

    Args:
        x: [..., cols].
        tensors: the stored tensors of each linear; those of the input's transforms are equal.
        biases: [rows] of each, or None.

    Returns:
        [..., rows] of each, in the dtype of x.

    Raises:
        ValueError: the transforms of the input differ.
    """
    packed = [own[name] for own in tensors for name in sorted(own)]
    texts, rows = [_text(spec) for spec in specs], [spec.rows for spec in specs]
    products = torch.ops.vqllm_kernels.linears(x, packed, texts, rows, specs[0].cols)
    return [y if bias is None else y + bias for y, bias in zip(products, biases)]


def matmul(
    x_NC: Tensor, tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int
) -> Tensor:
    """x Wᵀ in the transformed basis, without bias.

    Args:
        x_NC: activations [..., cols].
        tensors: the stored tensors of the format under their own names.
        rows, cols: size of W.

    Returns:
        [..., rows] in the dtype of x; float32 accumulation.
    """
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.matmul(x_NC, packed, _text(spec), rows, cols)


def decode(
    tensors: dict[str, Tensor],
    spec: FormatSpec,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights [rows, cols] in the transformed basis, rounded once to `dtype`."""
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.decode(packed, _text(spec), rows, cols, dtype)


def decode_rows(tensors: dict[str, Tensor], spec: FormatSpec, index_N: Tensor, cols: int) -> Tensor:
    """Some rows of the weights in the transformed basis, float32 [N, cols]."""
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.decode_rows(packed, _text(spec), index_N, cols)


def transform(v: Tensor, spec: TransformSpec, tensors: dict[str, Tensor], direction: str) -> Tensor:
    """One transform of activations along the last axis.

    Args:
        v: [..., size].
        tensors: the stored tensors of the transform under their own names.
        direction: "input" gives x' from x, "output" gives y from y'.
    """
    if direction not in ("input", "output"):
        raise ValueError(f"direction {direction!r}; allowed are 'input' and 'output'")
    if not isinstance(spec, HadamardSpec):
        # A product or an index: left to torch, which fuses it with its neighbours.
        return spec.input(v, tensors) if direction == "input" else spec.output(v, tensors)
    packed = [tensors[name] for name in sorted(tensors)]
    text = _text(spec)
    return torch.ops.vqllm_kernels.transform(v, packed, text, spec.size, direction)


# An operator takes a list of tensors, here in the order of their names, and a text in place of a
# spec. All conversions are cached, because they stand in the path of every call.


@torch.compiler.assume_constant_result
def _text(spec: FormatSpec | TransformSpec | LinearSpec) -> str:
    return _text_cached(spec)


@cache
def _text_cached(spec: FormatSpec | TransformSpec | LinearSpec) -> str:
    return json.dumps(spec.to_dict())


@cache
def _linear(text: str, rows: int, cols: int) -> tuple[LinearSpec, list[str], list[tuple[int, int]]]:
    """The spec, the names of its tensors in order, and the blocks of rows of a large one."""
    spec = LinearSpec.from_dict(json.loads(text), rows, cols)
    return spec, sorted(spec.layout()), spec.row_blocks()


@cache
def _format(text: str) -> FormatSpec:
    return formats.from_dict(json.loads(text))


@cache
def _transform(text: str, size: int) -> TransformSpec:
    return transforms.from_dict(json.loads(text), size)


@cache
def _names(spec: FormatSpec | TransformSpec) -> list[str]:
    return sorted(spec.layout(1, 1) if isinstance(spec, FormatSpec) else spec.layout())


def _order(device: torch.device, operation: Operation) -> tuple[str, ...]:
    if device.type == "cpu" and operation == "matmul":
        return ("lookup", "reference")
    if device.type != "cuda":
        return ("reference",)
    return ("triton", "dense") if operation == "matmul" else ("triton", "reference")


def _never(call: Call) -> str | None:
    return None


def _triton_declines(call: Call) -> str | None:
    if call.dtype not in FLOATS:
        return f"{call.dtype} is none of float16, bfloat16, float32"
    if call.batch > BATCH_BUCKETS[-1]:
        return f"more than {BATCH_BUCKETS[-1]} rows"
    reason = gpu.declines(call.device)
    if reason is not None:
        return reason
    kernels = gpu.module(call.spec)
    return "the format has no kernel" if kernels is None else kernels.declines(call)


def _lookup_declines(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}, not on a CPU"
    if call.batch > BATCH_BUCKETS[0]:
        return f"more than {BATCH_BUCKETS[0]} rows"
    if call.dtype not in FLOATS:
        return f"{call.dtype} is none of float16, bfloat16, float32"
    return lookup.declines(cast(FormatSpec, call.spec))


def beats_kept_weights(spec: LinearSpec, device: torch.device, num_rows: int) -> bool:
    """Whether the packed product of so many rows of x is faster than torch's with weights that were
    decoded before: where the codes of a large matrix are looked up on a CPU."""
    return (
        device.type == "cpu"
        and num_rows <= LOOKUP_ROWS
        and spec.rows * spec.cols >= lookup.fewest_weights(spec.cols)
        and _looked_up(spec.format)
    )


@cache
def _looked_up(spec: FormatSpec) -> bool:
    return lookup.declines(spec) is None


def _triton_matmul(
    x_NC: "Operand", tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int
) -> Tensor:
    kernels = gpu.module(spec)
    assert kernels is not None
    [y_NR] = kernels.matmuls(x_NC, [tensors], spec, [rows], cols, x_NC.dtype)
    return y_NR


def _dense_matmul(
    x_NC: Tensor, tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int
) -> Tensor:
    W_RC = _decode_as(tensors, spec, rows, cols, x_NC.dtype)
    return x_NC @ W_RC.T


def _reference_matmul(
    x_NC: Tensor, tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int
) -> Tensor:
    W_RC = spec.decode(tensors, rows, cols)
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    return (x_NC.to(wide) @ W_RC.to(wide).T).to(x_NC.dtype)


def _triton_decode(
    tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    kernels = gpu.module(spec)
    assert kernels is not None
    return kernels.decode(tensors, spec, rows, cols, dtype)


def _reference_decode(
    tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    return spec.decode(tensors, rows, cols).to(dtype)


Staged = tuple[TransformSpec, dict[str, Tensor]]
"""A transform and its stored tensors."""


def _triton_transform(
    v: Tensor,
    spec: TransformSpec,
    tensors: dict[str, Tensor],
    direction: str,
    scales: Sequence[Staged] = (),
) -> Tensor:
    kernels = gpu.module(spec)
    assert kernels is not None
    [out] = kernels.transforms([v], [spec], [tensors], direction, [scales])
    return out


def _reference_transform(
    v: Tensor,
    spec: TransformSpec,
    tensors: dict[str, Tensor],
    direction: str,
    scales: Sequence[Staged] = (),
) -> Tensor:
    out = v.to(torch.promote_types(v.dtype, torch.float32))
    if direction == "input":
        for scale, own in scales:
            out = scale.input(out, own)
        return spec.input(out, tensors).to(v.dtype)
    out = spec.output(out, tensors)
    for scale, own in scales:
        out = scale.output(out, own)
    return out.to(v.dtype)


_MATMULS = {
    "triton": Implementation(run=_triton_matmul, declines=_triton_declines),
    "dense": Implementation(run=_dense_matmul, declines=_never),
    "lookup": Implementation(run=lookup.matmul, declines=_lookup_declines),
    "reference": Implementation(run=_reference_matmul, declines=_never),
}
_DECODES = {
    "triton": Implementation(run=_triton_decode, declines=_triton_declines),
    "reference": Implementation(run=_reference_decode, declines=_never),
}
_TRANSFORMS = {
    "triton": Implementation(run=_triton_transform, declines=_triton_declines),
    "reference": Implementation(run=_reference_transform, declines=_never),
}


def _named(spec: FormatSpec | TransformSpec, packed: list[Tensor]) -> dict[str, Tensor]:
    names = _names(spec)
    if len(packed) != len(names):
        raise ValueError(f"{spec}: {len(packed)} tensors, expected {names}")
    return dict(zip(names, packed))


def _decode_as(
    tensors: dict[str, Tensor], spec: FormatSpec, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    device = next(iter(tensors.values())).device
    call = Call(operation="decode", spec=spec, device=device, dtype=dtype)
    return choose(call, _DECODES, _order(device, "decode")).run(tensors, spec, rows, cols, dtype)


def _linear_op(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, text: str, rows: int, cols: int
) -> Tensor:
    [y_NR] = _products(x.reshape(-1, cols), [_Loaded.of(text, rows, cols, packed)])
    if bias is not None:
        y_NR = y_NR + bias
    return y_NR.view(*x.shape[:-1], rows)


def _linears_op(
    x: Tensor, packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[Tensor]:
    every = _split(packed, texts, rows, cols)
    first = every[0]
    for other in every[1:]:
        if other.spec.inputs != first.spec.inputs:
            raise ValueError(
                f"linears of one input with different transforms of it: {first.spec.inputs} and "
                f"{other.spec.inputs}"
            )
    products = _products(x.reshape(-1, cols), every)
    return [y_NR.view(*x.shape[:-1], own) for y_NR, own in zip(products, rows)]


def _split(packed: list[Tensor], texts: list[str], rows: list[int], cols: int) -> list["_Loaded"]:
    """The linears whose tensors stand one after the other in `packed`."""
    every, start = [], 0
    for text, own_rows in zip(texts, rows):
        stop = start + len(_linear(text, own_rows, cols)[1])
        every.append(_Loaded.of(text, own_rows, cols, packed[start:stop]))
        start = stop
    return every


@dataclass(frozen=True)
class _Loaded:
    """A linear with its tensors."""

    spec: LinearSpec
    blocks: list[tuple[int, int]]
    own: dict[str, Tensor]
    """the tensors of the format"""
    staged: list[Staged]

    @classmethod
    def of(cls, text: str, rows: int, cols: int, packed: list[Tensor]) -> "_Loaded":
        spec, names, blocks = _linear(text, rows, cols)
        own, states = spec.split(dict(zip(names, packed)))
        return cls(spec, blocks, own, list(zip(spec.transforms, states)))

    @property
    def inputs(self) -> list[Staged]:
        return [s for s in self.staged if s[0].side == "in"]

    @property
    def outputs(self) -> list[Staged]:
        """In the order in which they are applied to an output."""
        return [s for s in reversed(self.staged) if s[0].side == "out"]

    def wanted(self, x_NC: Tensor) -> "Wanted | None":
        """What the kernel of the product takes in place of x, if it takes bytes, and the last of
        the transforms, with the scales before it, can write them; None for x itself."""
        stages = self.inputs
        if not stages or not isinstance(stages[-1][0], HadamardSpec):
            return None
        if _chosen_matmul(x_NC, self.spec.format) is not _MATMULS["triton"]:
            return None
        hadamard = stages[-1][0]
        kernels, transform_kernels = gpu.module(self.spec.format), gpu.module(hadamard)
        assert kernels is not None
        assert transform_kernels is not None
        wanted = kernels.wanted(self.spec.format, x_NC)
        if (
            wanted is None
            or _chosen_transform(x_NC, hadamard) is not _TRANSFORMS["triton"]
            or not transform_kernels.quantizes(hadamard, x_NC.dtype)
        ):
            return None
        return wanted

    def operand(self, x_NC: Tensor, wanted: "Wanted | None") -> "Operand":
        """x in the basis of W, in bytes if they are wanted."""
        stages = self.inputs
        if wanted is None:
            return _through([stages], [x_NC], "input")[0]
        hadamard, tensors = stages[-1]
        transform_kernels = gpu.module(hadamard)
        assert transform_kernels is not None
        first = len(stages) - 1
        while first > 0 and isinstance(stages[first - 1][0], ScaleSpec):
            first -= 1
        [x_NC] = _through([stages[:first]], [x_NC], "input")
        return transform_kernels.quantize(x_NC, hadamard, tensors, stages[first:-1], wanted)

    def product(self, x_NC: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """y [N, rows] of x in the basis of W, by an implementation that takes one linear."""
        spec = self.spec
        # Look-ups decode nothing, and keep a copy of the codes that belongs to the whole.
        blocks = [(0, spec.rows)] if run is lookup.matmul else self.blocks
        parts = [
            run(x_NC, spec.block(self.own, start, stop), spec.format, stop - start, spec.cols)
            for start, stop in blocks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _products(x_NC: Tensor, every: list[_Loaded]) -> list[Tensor]:
    """y [N, rows] of each of several linears with equal transforms of the input, without bias.

    Kernels take at once those whose formats are equal, and transform at once the outputs of those
    whose transforms are of equal kinds and orders.
    """
    operands: dict[Wanted | None, Operand] = {}
    ys: dict[int, Tensor] = {}
    for alike in _alike([loaded.spec.format for loaded in every]):
        same = [every[i] for i in alike]
        wanted = same[0].wanted(x_NC)
        if wanted not in operands:
            operands[wanted] = same[0].operand(x_NC, wanted)
        ys.update(zip(alike, _multiplied(x_NC, operands[wanted], same)))
    for alike in _alike([[_kind(spec) for spec, _ in loaded.outputs] for loaded in every]):
        stages = [every[i].outputs for i in alike]
        ys.update(zip(alike, _through(stages, [ys[i] for i in alike], "output")))
    return [ys[i] for i in range(len(every))]


def _alike(keys: Sequence[object]) -> list[list[int]]:
    """The places of equal keys, in the order of the first of each."""
    first = [keys.index(key) for key in keys]
    return [[i for i, other in enumerate(first) if other == at] for at in dict.fromkeys(first)]


def _kind(spec: TransformSpec) -> tuple[str, int | None]:
    """What is equal for transforms of several outputs in one launch."""
    return spec.kind, spec.order if isinstance(spec, HadamardSpec) else None


def _multiplied(x_NC: Tensor, operand: "Operand", same: list[_Loaded]) -> list[Tensor]:
    """y [N, rows] of each of several linears of one format in the basis of W, of an operand that
    was made of x. The kernels, which keep no decoded weights, take every size in one piece."""
    spec = same[0].spec
    chosen = _chosen_matmul(x_NC, spec.format)
    if chosen is not _MATMULS["triton"]:
        assert isinstance(operand, Tensor)
        return [loaded.product(operand, chosen.run) for loaded in same]
    kernels = gpu.module(spec.format)
    assert kernels is not None
    own, rows = [loaded.own for loaded in same], [loaded.spec.rows for loaded in same]
    return kernels.matmuls(operand, own, spec.format, rows, spec.cols, x_NC.dtype)


def _through(every: Sequence[list[Staged]], vs: list[Tensor], direction: str) -> list[Tensor]:
    """Transforms of members one after the other, of equal kinds; scales that come right before a
    Hadamard transform of an input, or right after that of an output, together with it."""
    todo = [list(stage) for stage in zip(*every, strict=True)]

    def leading_scales() -> list[list[Staged]]:
        taken = []
        while todo and isinstance(todo[0][0][0], ScaleSpec):
            taken.append(todo.pop(0))
        return taken

    while todo:
        scales = leading_scales() if direction == "input" else []
        if not todo or not isinstance(todo[0][0][0], HadamardSpec):
            for stage in [*scales, *todo[:1]]:
                vs = [
                    spec.input(v, own) if direction == "input" else spec.output(v, own)
                    for v, (spec, own) in zip(vs, stage)
                ]
            todo = todo[1:]
            continue
        stage = todo.pop(0)
        if direction == "output":
            scales = leading_scales()
        vs = _transformed(vs, stage, direction, [[s[m] for s in scales] for m in range(len(vs))])
    return vs


def _transformed(
    vs: list[Tensor], stage: list[Staged], direction: str, scales: list[list[Staged]]
) -> list[Tensor]:
    """One Hadamard transform, and scales, of each member."""
    chosen = [_chosen_transform(v, spec) for v, (spec, _) in zip(vs, stage)]
    if any(one is not _TRANSFORMS["triton"] for one in chosen):
        return [
            one.run(v, spec, own, direction, of_member)
            for one, v, (spec, own), of_member in zip(chosen, vs, stage, scales)
        ]
    kernels = gpu.module(stage[0][0])
    assert kernels is not None
    specs, tensors = zip(*stage)
    return kernels.transforms(vs, specs, tensors, direction, scales)


def _chosen_transform(v: Tensor, spec: TransformSpec) -> Implementation:
    call = Call(operation="transform", spec=spec, device=v.device, dtype=v.dtype)
    return choose(call, _TRANSFORMS, _order(v.device, "transform"))


def _chosen_matmul(x_NC: Tensor, spec: FormatSpec) -> Implementation:
    batch = bucket(x_NC.shape[0])
    call = Call(operation="matmul", spec=spec, device=x_NC.device, dtype=x_NC.dtype, batch=batch)
    return choose(call, _MATMULS, _order(x_NC.device, "matmul"))


def _linear_fake(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, text: str, rows: int, cols: int
) -> Tensor:
    torch._check(x.shape[-1] == cols, lambda: f"x has {x.shape[-1]} features, W has {cols}")
    return x.new_empty(*x.shape[:-1], rows)


def _linear_context(ctx, inputs, output) -> None:
    _, packed, bias, ctx.text, ctx.rows, ctx.cols = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*packed)


def _linear_backward(ctx, grad):
    # y = P_n .. P_1 x for matrices P: the transforms of the input, W, those of the output.
    packed = list(ctx.saved_tensors)
    g = torch.ops.vqllm_kernels.linear_transpose(grad, packed, ctx.text, ctx.rows, ctx.cols)
    bias = grad.reshape(-1, ctx.rows).sum(0) if ctx.has_bias else None
    return g, [None] * len(packed), bias, None, None, None


def _linears_fake(
    x: Tensor, packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[Tensor]:
    torch._check(x.shape[-1] == cols, lambda: f"x has {x.shape[-1]} features, W has {cols}")
    return [x.new_empty(*x.shape[:-1], own) for own in rows]


def _linears_context(ctx, inputs, output) -> None:
    _, packed, ctx.texts, ctx.rows, ctx.cols = inputs
    ctx.num_tensors = [
        len(_linear(text, rows, ctx.cols)[1]) for text, rows in zip(ctx.texts, ctx.rows)
    ]
    ctx.save_for_backward(*packed)


def _linears_backward(ctx, grads):
    packed, g = list(ctx.saved_tensors), None
    start = 0
    for grad, text, rows, number in zip(grads, ctx.texts, ctx.rows, ctx.num_tensors):
        own, start = packed[start : start + number], start + number
        if grad is not None:
            part = torch.ops.vqllm_kernels.linear_transpose(grad, own, text, rows, ctx.cols)
            g = part if g is None else g + part
    return g, [None] * len(packed), None, None, None


def _linear_transpose_op(
    grad: Tensor, packed: list[Tensor], text: str, rows: int, cols: int
) -> Tensor:
    loaded = _Loaded.of(text, rows, cols, packed)
    spec, staged = loaded.spec, loaded.staged
    wide = torch.promote_types(grad.dtype, torch.float32)
    g = grad.reshape(-1, rows).to(wide)
    for transform, state in staged:
        if transform.side == "out":
            g = transform.apply_inverse_transpose(g, state)
    back = g.new_zeros(len(g), cols)
    for start, stop in loaded.blocks:
        W_RC = _decode_as(
            spec.block(loaded.own, start, stop), spec.format, stop - start, cols, wide
        )
        back += g[:, start:stop] @ W_RC
    for transform, state in reversed(staged):
        if transform.side == "in":
            back = transform.apply_transpose(back, state)
    return back.to(grad.dtype).view(*grad.shape[:-1], cols)


def _linear_transpose_fake(
    grad: Tensor, packed: list[Tensor], text: str, rows: int, cols: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


def _matmul_op(x: Tensor, packed: list[Tensor], text: str, rows: int, cols: int) -> Tensor:
    spec = _format(text)
    x_NC = x.reshape(-1, cols)
    y_NR = _chosen_matmul(x_NC, spec).run(x_NC, _named(spec, packed), spec, rows, cols)
    return y_NR.view(*x.shape[:-1], rows)


def _decode_op(packed: list[Tensor], text: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    spec = _format(text)
    return _decode_as(_named(spec, packed), spec, rows, cols, dtype)


def _decode_rows_op(packed: list[Tensor], text: str, index: Tensor, cols: int) -> Tensor:
    spec = _format(text)
    return spec.decode_rows(_named(spec, packed), index, cols)


def _transform_op(v: Tensor, packed: list[Tensor], text: str, size: int, direction: str) -> Tensor:
    spec = _transform(text, size)
    return _chosen_transform(v, spec).run(v, spec, _named(spec, packed), direction)


def _matmul_fake(x: Tensor, packed: list[Tensor], text: str, rows: int, cols: int) -> Tensor:
    torch._check(x.shape[-1] == cols, lambda: f"x has {x.shape[-1]} features, W has {cols}")
    return x.new_empty(*x.shape[:-1], rows)


def _decode_fake(
    packed: list[Tensor], text: str, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    return packed[0].new_empty(rows, cols, dtype=dtype)


def _decode_rows_fake(packed: list[Tensor], text: str, index: Tensor, cols: int) -> Tensor:
    return packed[0].new_empty(index.shape[0], cols, dtype=torch.float32)


def _transform_fake(
    v: Tensor, packed: list[Tensor], text: str, size: int, direction: str
) -> Tensor:
    torch._check(v.shape[-1] == size, lambda: f"v has {v.shape[-1]} features, not {size}")
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _matmul_context(ctx, inputs, output) -> None:
    _, packed, ctx.text, ctx.rows, ctx.cols = inputs
    ctx.save_for_backward(*packed)


def _matmul_backward(ctx, grad):
    packed = list(ctx.saved_tensors)
    W_RC = torch.ops.vqllm_kernels.decode(packed, ctx.text, ctx.rows, ctx.cols, grad.dtype)
    return grad @ W_RC, [None] * len(packed), None, None, None


def _transform_context(ctx, inputs, output) -> None:
    _, packed, ctx.text, ctx.size, ctx.direction = inputs
    ctx.save_for_backward(*packed)


def _transform_backward(ctx, grad):
    # The transform is orthogonal: its transpose is its inverse.
    packed = list(ctx.saved_tensors)
    back = "output" if ctx.direction == "input" else "input"
    v_grad = torch.ops.vqllm_kernels.transform(grad, packed, ctx.text, ctx.size, back)
    return v_grad, [None] * len(packed), None, None, None


# Library.define costs 7 us a call where torch.library.custom_op costs 28.
_LIBRARY = torch.library.Library("vqllm_kernels", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] packed, Tensor? bias, str spec, int rows, int cols) -> Tensor"
)
_LIBRARY.define("linears(Tensor x, Tensor[] packed, str[] specs, int[] rows, int cols) -> Tensor[]")
_LIBRARY.define(
    "linear_transpose(Tensor grad, Tensor[] packed, str spec, int rows, int cols) -> Tensor"
)
_LIBRARY.define("matmul(Tensor x, Tensor[] packed, str spec, int rows, int cols) -> Tensor")
_LIBRARY.define("decode(Tensor[] packed, str spec, int rows, int cols, ScalarType dtype) -> Tensor")
_LIBRARY.define("decode_rows(Tensor[] packed, str spec, Tensor index, int cols) -> Tensor")
_LIBRARY.define("transform(Tensor v, Tensor[] packed, str spec, int size, str direction) -> Tensor")
_LIBRARY.impl("linear", _linear_op, "CompositeExplicitAutograd")
_LIBRARY.impl("linears", _linears_op, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_transpose", _linear_transpose_op, "CompositeExplicitAutograd")
_LIBRARY.impl("matmul", _matmul_op, "CompositeExplicitAutograd")
_LIBRARY.impl("decode", _decode_op, "CompositeExplicitAutograd")
_LIBRARY.impl("decode_rows", _decode_rows_op, "CompositeExplicitAutograd")
_LIBRARY.impl("transform", _transform_op, "CompositeExplicitAutograd")
torch.library.register_fake("vqllm_kernels::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::linears", _linears_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::linear_transpose", _linear_transpose_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::matmul", _matmul_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::decode", _decode_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::decode_rows", _decode_rows_fake, lib=_LIBRARY)
torch.library.register_fake("vqllm_kernels::transform", _transform_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "vqllm_kernels::linear", _linear_backward, setup_context=_linear_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "vqllm_kernels::linears", _linears_backward, setup_context=_linears_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "vqllm_kernels::matmul", _matmul_backward, setup_context=_matmul_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "vqllm_kernels::transform", _transform_backward, setup_context=_transform_context, lib=_LIBRARY
)
