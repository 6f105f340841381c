"""The operators of `torch.library` for packed linears, and the functions that call them.

Each operation is one operator, so that `torch.compile` sees a single call and the choice of an
implementation happens inside it. An operator takes tensors and a text in place of a spec; it has a
shape function (`.._fake`) and, where x can need one, a derivative with respect to x (and the bias).
The packed tensors are constants.

    function                 operator           what runs inside
    linear, linears          the same           `forward.products`
    dense                    the same           the definition of format and transforms
    matmul, decode           the same           the kernels that `select` takes
    decode_rows, transform   the same           the format's definition; the kernels of `select`
    backward of a linear     linear_transpose   `forward.product_transpose`
"""

import json
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vqllm_kernels import formats, select, transforms
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.forward import product_transpose, products
from vqllm_kernels.linear import BoundLinear, LinearSpec
from vqllm_kernels.transforms import HadamardSpec, TransformSpec


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
    return torch.ops.vqllm_kernels.linear(x, packed, bias, text_of(spec), spec.rows, spec.cols)


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
    texts, rows = [text_of(spec) for spec in specs], [spec.rows for spec in specs]
    ys = torch.ops.vqllm_kernels.linears(x, packed, texts, rows, specs[0].cols)
    return [y if bias is None else y + bias for y, bias in zip(ys, biases)]


def dense(
    tensors: dict[str, Tensor], spec: LinearSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [rows, cols] in the model's own basis, as `spec.dequantize` gives them, for code
    that may become part of a graph."""
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.dense(packed, text_of(spec), spec.rows, spec.cols, dtype)


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
    return torch.ops.vqllm_kernels.matmul(x_NC, packed, text_of(spec), rows, cols)


def decode(
    tensors: dict[str, Tensor],
    spec: FormatSpec,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights [rows, cols] in the transformed basis, rounded once to `dtype`."""
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.decode(packed, text_of(spec), rows, cols, dtype)


def decode_rows(tensors: dict[str, Tensor], spec: FormatSpec, index_N: Tensor, cols: int) -> Tensor:
    """Some rows of the weights in the transformed basis, float32 [N, cols]."""
    packed = [tensors[name] for name in sorted(tensors)]
    return torch.ops.vqllm_kernels.decode_rows(packed, text_of(spec), index_N, cols)


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
    text = text_of(spec)
    return torch.ops.vqllm_kernels.transform(v, packed, text, spec.size, direction)


# An operator takes a list of tensors, here in the order of their names, and a text in place of a
# spec. All conversions are cached, because they stand in the path of every call.


@torch.compiler.assume_constant_result
def text_of(spec: FormatSpec | TransformSpec | LinearSpec) -> str:
    """The text that stands for a spec."""
    return _text_cached(spec)


@cache
def _text_cached(spec: FormatSpec | TransformSpec | LinearSpec) -> str:
    return json.dumps(spec.to_dict())


@cache
def linear_of(
    text: str, rows: int, cols: int
) -> tuple[LinearSpec, list[str], list[tuple[int, int]]]:
    """The spec, the names of its tensors in order, and the blocks of rows of a large one."""
    spec = LinearSpec.from_dict(json.loads(text), rows, cols)
    return spec, sorted(spec.layout()), spec.row_blocks()


@cache
def _format_of(text: str) -> FormatSpec:
    return formats.from_dict(json.loads(text))


@cache
def _transform_of(text: str, size: int) -> TransformSpec:
    return transforms.from_dict(json.loads(text), size)


@cache
def _names(spec: FormatSpec | TransformSpec) -> list[str]:
    return sorted(spec.layout(1, 1) if isinstance(spec, FormatSpec) else spec.layout())


def _named(spec: FormatSpec | TransformSpec, packed: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of a format or transform by name."""
    names = _names(spec)
    if len(packed) != len(names):
        raise ValueError(f"{spec}: {len(packed)} tensors, expected {names}")
    return dict(zip(names, packed))


def _bound(text: str, rows: int, cols: int, packed: list[Tensor]) -> BoundLinear:
    """A linear with its tensors."""
    spec, names, blocks = linear_of(text, rows, cols)
    return BoundLinear.of(spec, dict(zip(names, packed)), blocks)


def _each_bound(
    packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[BoundLinear]:
    """The linears whose tensors stand one after the other in `packed`."""
    every, start = [], 0
    for text, own_rows in zip(texts, rows):
        stop = start + len(linear_of(text, own_rows, cols)[1])
        every.append(_bound(text, own_rows, cols, packed[start:stop]))
        start = stop
    return every


def _check_features(x: Tensor, cols: int) -> None:
    torch._check(x.shape[-1] == cols, lambda: f"x has {x.shape[-1]} features, W has {cols}")


def _products(
    x: Tensor, packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[Tensor]:
    """y [N, rows] of linears of one input: one call of compiled code where there is one."""
    x_NC = x.reshape(-1, cols)
    if x.device.type == "cpu" and len(x_NC):
        specs = [linear_of(text, own, cols)[0] for text, own in zip(texts, rows)]
        if all(select.multiplied_packed(spec.format, x.dtype) for spec in specs):
            from vqllm_kernels.cpu import bound

            def every() -> list[BoundLinear]:
                for spec in specs:
                    select.choose(x_NC, spec.format)
                return _each_bound(packed, texts, rows, cols)

            linears = bound.kept(packed, (*texts, *rows), every)
            ys = None if linears is None else linears(x_NC)
            if ys is not None:
                return ys
    return products(x_NC, _each_bound(packed, texts, rows, cols))


def _linear_op(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, text: str, rows: int, cols: int
) -> Tensor:
    [y_NR] = _products(x, packed, [text], [rows], cols)
    if bias is not None:
        y_NR = y_NR + bias
    return y_NR.view(*x.shape[:-1], rows)


def _linear_fake(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, text: str, rows: int, cols: int
) -> Tensor:
    _check_features(x, cols)
    return x.new_empty(*x.shape[:-1], rows)


def _linear_context(ctx, inputs, output) -> None:
    _, packed, bias, ctx.text, ctx.rows, ctx.cols = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*packed)


def _linear_backward(ctx, grad):
    packed = list(ctx.saved_tensors)
    g = torch.ops.vqllm_kernels.linear_transpose(grad, packed, ctx.text, ctx.rows, ctx.cols)
    bias = grad.reshape(-1, ctx.rows).sum(0) if ctx.has_bias else None
    return g, [None] * len(packed), bias, None, None, None


def _linears_op(
    x: Tensor, packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[Tensor]:
    ys = _products(x, packed, texts, rows, cols)
    return [y_NR.view(*x.shape[:-1], own) for y_NR, own in zip(ys, rows)]


def _linears_fake(
    x: Tensor, packed: list[Tensor], texts: list[str], rows: list[int], cols: int
) -> list[Tensor]:
    _check_features(x, cols)
    return [x.new_empty(*x.shape[:-1], own) for own in rows]


def _linears_context(ctx, inputs, output) -> None:
    _, packed, ctx.texts, ctx.rows, ctx.cols = inputs
    ctx.num_tensors = [
        len(linear_of(text, rows, ctx.cols)[1]) for text, rows in zip(ctx.texts, ctx.rows)
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
    wide = torch.promote_types(grad.dtype, torch.float32)
    linear = _bound(text, rows, cols, packed)
    back = product_transpose(grad.reshape(-1, rows).to(wide), linear)
    return back.to(grad.dtype).view(*grad.shape[:-1], cols)


def _linear_transpose_fake(
    grad: Tensor, packed: list[Tensor], text: str, rows: int, cols: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


def _dense_op(packed: list[Tensor], text: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    spec, names, _ = linear_of(text, rows, cols)
    return spec.dequantize(dict(zip(names, packed)), dtype).contiguous()


def _matmul_op(x: Tensor, packed: list[Tensor], text: str, rows: int, cols: int) -> Tensor:
    spec = _format_of(text)
    x_NC = x.reshape(-1, cols)
    kernels = select.matmul(x_NC, spec)
    [y_NR] = kernels.matmuls(x_NC, [_named(spec, packed)], [rows], cols, x.dtype)
    return y_NR.view(*x.shape[:-1], rows)


def _matmul_fake(x: Tensor, packed: list[Tensor], text: str, rows: int, cols: int) -> Tensor:
    _check_features(x, cols)
    return x.new_empty(*x.shape[:-1], rows)


def _matmul_context(ctx, inputs, output) -> None:
    _, packed, ctx.text, ctx.rows, ctx.cols = inputs
    ctx.save_for_backward(*packed)


def _matmul_backward(ctx, grad):
    packed = list(ctx.saved_tensors)
    W_RC = torch.ops.vqllm_kernels.decode(packed, ctx.text, ctx.rows, ctx.cols, grad.dtype)
    return grad @ W_RC, [None] * len(packed), None, None, None


def _decode_op(packed: list[Tensor], text: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    spec = _format_of(text)
    tensors = _named(spec, packed)
    return select.decode(tensors, spec, dtype).decode(tensors, rows, cols, dtype)


def _decode_fake(
    packed: list[Tensor], text: str, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    return packed[0].new_empty(rows, cols, dtype=dtype)


def _decode_rows_op(packed: list[Tensor], text: str, index: Tensor, cols: int) -> Tensor:
    spec = _format_of(text)
    return spec.decode_rows(_named(spec, packed), index, cols)


def _decode_rows_fake(packed: list[Tensor], text: str, index: Tensor, cols: int) -> Tensor:
    return packed[0].new_empty(index.shape[0], cols, dtype=torch.float32)


def _transform_op(v: Tensor, packed: list[Tensor], text: str, size: int, direction: str) -> Tensor:
    spec = _transform_of(text, size)
    if not isinstance(spec, HadamardSpec):
        raise ValueError(f"the operator takes a Hadamard transform, not {spec.kind}")
    kernels = select.transform(v, spec)
    [out] = kernels.transforms([v], [spec], [_named(spec, packed)], direction, [()])
    return out


def _transform_fake(
    v: Tensor, packed: list[Tensor], text: str, size: int, direction: str
) -> Tensor:
    torch._check(v.shape[-1] == size, lambda: f"v has {v.shape[-1]} features, not {size}")
    return torch.empty_like(v, memory_format=torch.contiguous_format)


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
for _signature, _op, _fake in (
    (
        "linear(Tensor x, Tensor[] packed, Tensor? bias, str spec, int rows, int cols) -> Tensor",
        _linear_op,
        _linear_fake,
    ),
    (
        "linears(Tensor x, Tensor[] packed, str[] specs, int[] rows, int cols) -> Tensor[]",
        _linears_op,
        _linears_fake,
    ),
    (
        "linear_transpose(Tensor grad, Tensor[] packed, str spec, int rows, int cols) -> Tensor",
        _linear_transpose_op,
        _linear_transpose_fake,
    ),
    (
        "dense(Tensor[] packed, str spec, int rows, int cols, ScalarType dtype) -> Tensor",
        _dense_op,
        _decode_fake,
    ),
    (
        "matmul(Tensor x, Tensor[] packed, str spec, int rows, int cols) -> Tensor",
        _matmul_op,
        _matmul_fake,
    ),
    (
        "decode(Tensor[] packed, str spec, int rows, int cols, ScalarType dtype) -> Tensor",
        _decode_op,
        _decode_fake,
    ),
    (
        "decode_rows(Tensor[] packed, str spec, Tensor index, int cols) -> Tensor",
        _decode_rows_op,
        _decode_rows_fake,
    ),
    (
        "transform(Tensor v, Tensor[] packed, str spec, int size, str direction) -> Tensor",
        _transform_op,
        _transform_fake,
    ),
):
    _name = _LIBRARY.define(_signature)
    _LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqllm_kernels::{_name}", _fake, lib=_LIBRARY)
for _name, _backward, _context in (
    ("linear", _linear_backward, _linear_context),
    ("linears", _linears_backward, _linears_context),
    ("matmul", _matmul_backward, _matmul_context),
    ("transform", _transform_backward, _transform_context),
):
    torch.library.register_autograd(
        f"vqllm_kernels::{_name}", _backward, setup_context=_context, lib=_LIBRARY
    )
