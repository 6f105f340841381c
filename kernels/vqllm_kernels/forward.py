"""y from x: the algorithm of a packed linear, and of several linears of one input.

    x  ── transforms of the input ──▶  x'  ── W ──▶  y'  ── transforms of the output ──▶  y

What linears of one input share is done once: x' where their kernels take the same, one product for
those of one format, one transform of the outputs for those whose transforms are alike. The bias is
left to the caller. `select` chooses the kernels; everything here works with any of them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vqllm_kernels import select
from vqllm_kernels.kernels import Kernels, Operand, Tensors, Wanted
from vqllm_kernels.linear import BoundLinear, Stage
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec, TransformSpec


def products(x_NC: Tensor, every: Sequence[BoundLinear]) -> list[Tensor]:
    """y [N, rows] of each of several linears with equal transforms of the input, without bias.

    Raises:
        ValueError: the transforms of the input differ.
    """
    check_inputs(every)
    operands: dict[Wanted | None, Operand] = {}
    ys: dict[int, Tensor] = {}
    for alike in _alike([linear.spec.format for linear in every]):
        same = [every[i] for i in alike]
        kernels = select.matmul(x_NC, same[0].spec.format)
        # x', made once for all formats whose kernels take the same.
        wanted = _written_by_a_transform(x_NC, same[0], kernels)
        if wanted not in operands:
            operands[wanted] = _operand(x_NC, same[0], wanted)
        # y' of all linears of one format.
        ys.update(zip(alike, _multiplied(operands[wanted], same, kernels, x_NC.dtype)))
    # y, at once for all linears whose outputs are transformed alike.
    for alike in _alike([[_kind(spec) for spec, _ in linear.outputs] for linear in every]):
        stages = [every[i].outputs for i in alike]
        ys.update(zip(alike, _through(stages, [ys[i] for i in alike], "output")))
    return [ys[i] for i in range(len(every))]


def product_transpose(grad_NR: Tensor, linear: BoundLinear) -> Tensor:
    """The gradient of x [N, cols] from that of y [N, rows], both float32 or float64."""
    spec = linear.spec
    # y = P_n .. P_1 x for matrices P: the transforms of the input, W, those of the output. Their
    # transposes follow in the opposite order, which for transforms is that of W.
    for transform, own in linear.stages:
        if transform.side == "out":
            grad_NR = transform.apply_inverse_transpose(grad_NR, own)
    grad_NC = grad_NR.new_zeros(len(grad_NR), spec.cols)
    for start, stop in linear.blocks:
        own = spec.block(linear.own, start, stop)
        kernels = select.decode(own, spec.format, grad_NR.dtype)
        W_RC = kernels.decode(own, stop - start, spec.cols, grad_NR.dtype)
        grad_NC += grad_NR[:, start:stop] @ W_RC
    for transform, own in reversed(linear.stages):
        if transform.side == "in":
            grad_NC = transform.apply_transpose(grad_NC, own)
    return grad_NC


def check_inputs(every: Sequence[BoundLinear]) -> None:
    """ValueError if the transforms of the input differ."""
    first = every[0]
    for other in every[1:]:
        if other.spec.inputs != first.spec.inputs:
            raise ValueError(
                f"linears of one input with different transforms of it: {first.spec.inputs} and "
                f"{other.spec.inputs}"
            )


def _alike(keys: Sequence[object]) -> list[list[int]]:
    """The places of equal keys, in the order of the first of each."""
    first = [keys.index(key) for key in keys]
    return [[i for i, other in enumerate(first) if other == at] for at in dict.fromkeys(first)]


def _kind(spec: TransformSpec) -> tuple[str, int | None]:
    """What is equal for transforms of several outputs in one launch."""
    return spec.kind, spec.order if isinstance(spec, HadamardSpec) else None


def _written_by_a_transform(x_NC: Tensor, linear: BoundLinear, kernels: Kernels) -> Wanted | None:
    """The bytes that the product takes in place of x, if the last transform of x, with the scales
    before it, can write them; None if it writes x' itself."""
    stages = linear.inputs
    if not stages:
        return None
    last, _ = stages[-1]
    if not isinstance(last, HadamardSpec):
        return None
    wanted = kernels.wanted(x_NC)
    if wanted is None or not select.transform(x_NC, last).quantizes(last, x_NC.dtype):
        return None
    return wanted


def _operand(x_NC: Tensor, linear: BoundLinear, wanted: Wanted | None) -> Operand:
    """x', in bytes if they are wanted."""
    stages = linear.inputs
    if wanted is None:
        return _through([stages], [x_NC], "input")[0]
    # The last run of transforms is that of the Hadamard transform that writes the bytes.
    *_, run = _runs([spec for spec, _ in stages], "input")
    hadamards, scales = _parts([stages[place] for place in run])
    [x_NC] = _through([stages[: len(stages) - len(run)]], [x_NC], "input")
    [(hadamard, signs)] = hadamards
    return select.transform(x_NC, hadamard).quantize(x_NC, hadamard, signs, scales, wanted)


def _multiplied(
    operand: Operand, same: Sequence[BoundLinear], kernels: Kernels, dtype: torch.dtype
) -> list[Tensor]:
    """y' [N, rows] of each of several linears of one format."""
    cols = same[0].spec.cols
    if not kernels.takes_blocks or all(len(linear.blocks) == 1 for linear in same):
        own, rows = [linear.own for linear in same], [linear.spec.rows for linear in same]
        return kernels.matmuls(operand, own, rows, cols, dtype)
    return [
        torch.cat(
            [
                y_NR
                for start, stop in linear.blocks
                for y_NR in kernels.matmuls(
                    operand,
                    [linear.spec.block(linear.own, start, stop)],
                    [stop - start],
                    cols,
                    dtype,
                )
            ],
            -1,
        )
        for linear in same
    ]


def _through(every: Sequence[list[Stage]], vs: list[Tensor], direction: str) -> list[Tensor]:
    """Transforms of members one after the other; the members have equal kinds of transforms."""
    for run in _runs([spec for spec, _ in every[0]], direction):
        parts = [_parts([stages[place] for place in run]) for stages in every]
        if all(hadamards for hadamards, _ in parts):
            vs = _transformed(vs, parts, direction)
            continue
        # A product or an index, left to torch: a run of one.
        [place] = run
        vs = [_alone(v, stages[place], direction) for v, stages in zip(vs, every, strict=True)]
    return vs


def _runs(specs: Sequence[TransformSpec], direction: str) -> Iterator[range]:
    """Places of transforms that are applied together: a Hadamard transform with the scales right
    before it (of an input) or right after it (of an output), and any other alone."""
    at = 0
    while at < len(specs):
        end = at
        if direction == "input":
            end = _after_scales(specs, at)
        if end < len(specs) and isinstance(specs[end], HadamardSpec):
            end = end + 1 if direction == "input" else _after_scales(specs, end + 1)
        else:
            end = at + 1
        yield range(at, end)
        at = end


def _after_scales(specs: Sequence[TransformSpec], at: int) -> int:
    """The first place from `at` on that is not of scales."""
    while at < len(specs) and isinstance(specs[at], ScaleSpec):
        at += 1
    return at


HadamardStage = tuple[HadamardSpec, Tensors]
ScaleStage = tuple[ScaleSpec, Tensors]


def _parts(run: Sequence[Stage]) -> tuple[list[HadamardStage], list[ScaleStage]]:
    """The Hadamard transform of a run, if it has one, and its scales."""
    return (
        [(spec, own) for spec, own in run if isinstance(spec, HadamardSpec)],
        [(spec, own) for spec, own in run if isinstance(spec, ScaleSpec)],
    )


def _transformed(
    vs: list[Tensor],
    parts: Sequence[tuple[list[HadamardStage], list[ScaleStage]]],
    direction: str,
) -> list[Tensor]:
    """One Hadamard transform, and scales, of each member."""
    specs = [hadamard for [(hadamard, _)], _ in parts]
    signs = [own for [(_, own)], _ in parts]
    scales = [of_member for _, of_member in parts]
    chosen = [select.transform(v, spec) for v, spec in zip(vs, specs, strict=True)]
    if all(kernels == chosen[0] for kernels in chosen):
        return chosen[0].transforms(vs, specs, signs, direction, scales)
    members = zip(chosen, vs, specs, signs, scales)
    return [
        v_out
        for kernels, v, spec, own, of_member in members
        for v_out in kernels.transforms([v], [spec], [own], direction, [of_member])
    ]


def _alone(v: Tensor, stage: Stage, direction: str) -> Tensor:
    """A transform by its definition."""
    spec, own = stage
    return spec.input(v, own) if direction == "input" else spec.output(v, own)
