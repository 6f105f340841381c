"""Steps and offsets of groups: searched for weights whose squared errors have weights of their own,
then stored as a native type stores them.

Each search tries many steps, rounds the weights with each, and takes the step that is best for the
codes so found (least squares). What stores integers a group is then quantized for the least error
of the weights, and each integer is tried one up and one down.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vqllm.core.protocols import State
from vqllm.export import grids
from vqllm.export.native_types import NativeType

REACHES = tuple(0.6 + 0.05 * i for i in range(13))
"""Of the outermost value of a type, what the largest weight of a group is brought to in turn: up to
1.2, where it is clipped, and down to 0.6, where the steps are coarser and fall differently."""
VECTOR_REACHES = tuple(0.3 + 0.1 * i for i in range(14))
"""The same of the largest magnitude of a grid: few vectors have it in several places, as weights of
like magnitudes would need, and clipping costs less than a fit that is bad for all 8."""
SHRINKAGES = (0.0, 0.1, 0.2, 0.3)
"""Parts of a range that are clipped at either end, where there is an offset."""
D_FACTORS = tuple(0.8 + 0.025 * i for i in range(17))
"""Of the step with which the largest step of a block is the largest integer."""


def fit_state(native: NativeType, X_RC: Tensor, weight_RC: Tensor) -> State:
    """Steps and offsets for X, as the type stores them.

    Args:
        X_RC: weights, float32; blocks divide C.
        weight_RC: what squared errors cost.

    Returns:
        `d`, and for a type with offsets `dmin`, float16 [R, blocks]; `s` and `m` int32 [R, groups]
        where the type has them; `step` and `offset` float32 [R, groups], which follow from these.
    """
    x_RGn = X_RC.unflatten(1, (-1, native.group))
    weight_RGn = weight_RC.unflatten(1, (-1, native.group))
    if native.has_offset:
        step_RG, offset_RG = _step_and_offset(native, x_RGn, weight_RGn)
    else:
        step_RG, offset_RG = _step(native, x_RGn, weight_RGn), None
    if native.scales is None:
        state = {"d": half(step_RG)}
        if offset_RG is not None:
            state["dmin"] = half(offset_RG)
        return with_steps(native, state)
    values_RGn = rounded(native, x_RGn, weight_RGn, step_RG, offset_RG)
    cost_RG = (weight_RGn * values_RGn.square()).sum(2)
    state = {}
    state["d"], state["s"] = _integers(native, step_RG, cost_RG, native.scales, native.scaled_by)
    if offset_RG is not None:
        assert native.max_min is not None
        cost_RG = weight_RGn.sum(2)
        state["dmin"], state["m"] = _integers(
            native, -offset_RG, cost_RG, (0, native.max_min), (0.0, 1.0)
        )
    return _tried_again(native, x_RGn, weight_RGn, state)


def with_steps(native: NativeType, state: State) -> State:
    """The state with `step` and `offset` as they follow from what is stored."""
    d_RG = _a_group(native, state["d"].float())
    step_RG = d_RG if native.scales is None else d_RG * scaled(native, state["s"])
    offset_RG = torch.zeros_like(step_RG)
    if native.has_offset:
        dmin_RG = _a_group(native, state["dmin"].float())
        offset_RG = dmin_RG if native.max_min is None else -(dmin_RG * state["m"].float())
    return {**state, "step": step_RG, "offset": offset_RG}


def scaled(native: NativeType, s: Tensor) -> Tensor:
    """What integers of groups multiply d by, float32."""
    a, b = native.scaled_by
    return a + b * s.float()


def rounded(
    native: NativeType,
    x_RGn: Tensor,
    weight_RGn: Tensor,
    step_RG: Tensor,
    offset_RG: Tensor | None = None,
) -> Tensor:
    """The nearest values, float32 [R, G, n]. A step of zero gives the value next to 0."""
    if offset_RG is not None:
        x_RGn = x_RGn - offset_RG[..., None]
    inverse_RG = torch.where(step_RG == 0, 0.0, 1 / step_RG)
    ratio_RGn = x_RGn * inverse_RG[..., None]
    if native.grid is None:
        return reproduced(native, nearest(native, ratio_RGn))
    ratio_TE, weight_TE = (a.reshape(-1, native.tile_cols) for a in (ratio_RGn, weight_RGn))
    return grids.reproduced(native, grids.nearest(native, ratio_TE, weight_TE)).view_as(x_RGn)


def nearest(native: NativeType, ratio: Tensor) -> Tensor:
    """Numbers of the values nearest to weights over their steps, int32."""
    values = native.values
    if values[-1] - values[0] + 1 == len(values):
        return (ratio.round().clamp(values[0], values[-1]) - values[0]).to(torch.int32)
    table = torch.tensor(values, dtype=torch.float32, device=ratio.device)
    return torch.bucketize(ratio, (table[1:] + table[:-1]) / 2).to(torch.int32)


def reproduced(native: NativeType, codes: Tensor) -> Tensor:
    """The values of codes, float32."""
    values = native.values
    if values[-1] - values[0] + 1 == len(values):
        return codes.float() + values[0]
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.long()]


def half(values: Tensor) -> Tensor:
    """The nearest float16 that is finite."""
    return values.clamp(-65504, 65504).half()


def _a_group(native: NativeType, per_block_RB: Tensor) -> Tensor:
    return per_block_RB.repeat_interleave(native.block // native.group, 1)


def _error(x_RGn: Tensor, weight_RGn: Tensor, values_RGn: Tensor, step: Tensor) -> Tensor:
    return (weight_RGn * (x_RGn - step[..., None] * values_RGn).square()).sum(2)


def _step(native: NativeType, x_RGn: Tensor, weight_RGn: Tensor) -> Tensor:
    """The best step of each group without an offset, [R, G]; it may be negative."""
    farthest = x_RGn.abs().argmax(2, keepdim=True)
    largest_RG = x_RGn.gather(2, farthest)[..., 0]
    if native.grid is not None:  # signs are stored beside the vectors
        ends, reaches = (float(grids.vectors_of(native).max()),), VECTOR_REACHES
        largest_RG = largest_RG.abs()
    else:
        ends, reaches = (native.values[0], native.values[-1]), REACHES

    def tried() -> Iterator[Tensor]:
        for end in ends:
            for reach in reaches:
                yield largest_RG / (end * reach)

    def solve(values_RGn: Tensor) -> Tensor:
        weighted = weight_RGn * values_RGn
        return _ratio((weighted * x_RGn).sum(2), (weighted * values_RGn).sum(2))

    return _best(native, x_RGn, weight_RGn, tried(), solve)


def _best(
    native: NativeType,
    x_RGn: Tensor,
    weight_RGn: Tensor,
    tried: Iterator[Tensor],
    solve: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of the steps that are best for the codes of those that are tried, the one of least error."""
    best = torch.zeros_like(x_RGn[..., 0])
    least = (weight_RGn * x_RGn.square()).sum(2)
    for step in tried:
        values_RGn = rounded(native, x_RGn, weight_RGn, step)
        step = solve(values_RGn)
        error = _error(x_RGn, weight_RGn, values_RGn, step)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def _step_and_offset(
    native: NativeType, x_RGn: Tensor, weight_RGn: Tensor
) -> tuple[Tensor, Tensor]:
    """The best step of each group together with its offset; not above 0 where mins are stored."""
    low_RG, high_RG = x_RGn.amin(2), x_RGn.amax(2)
    if native.max_min is not None:
        low_RG, high_RG = low_RG.clamp(max=0), high_RG.clamp(min=0)
    best_step, best_offset = torch.zeros_like(low_RG), torch.zeros_like(low_RG)
    least = torch.full_like(low_RG, torch.inf)
    total = weight_RGn.sum(2)
    mean_x = (weight_RGn * x_RGn).sum(2)
    for below in SHRINKAGES:
        for above in SHRINKAGES:
            offset = low_RG - (low_RG - high_RG) * below * 0.5
            step = (high_RG - (high_RG - low_RG) * above * 0.5 - offset) / native.values[-1]
            v = rounded(native, x_RGn, weight_RGn, step, offset)
            # Two equations of least squares: for step and offset.
            weighted = weight_RGn * v
            sum_v, sum_vv, sum_vx = (
                weighted.sum(2),
                (weighted * v).sum(2),
                (weighted * x_RGn).sum(2),
            )
            step = _ratio(total * sum_vx - sum_v * mean_x, total * sum_vv - sum_v.square())
            offset = _ratio(mean_x - step * sum_v, total)
            if native.max_min is not None:
                alone = _ratio(sum_vx, sum_vv)
                step = torch.where(offset > 0, alone, step).clamp(min=0)
                offset = offset.clamp(max=0)
            error = _error(x_RGn - offset[..., None], weight_RGn, v, step)
            better = error < least
            best_step = torch.where(better, step, best_step)
            best_offset = torch.where(better, offset, best_offset)
            least = torch.minimum(error, least)
    return best_step, best_offset


def _integers(
    native: NativeType,
    wanted_RG: Tensor,
    cost_RG: Tensor,
    limits: tuple[int, int],
    scaled_by: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """d of each block, float16 [R, B], and the integers [R, G] whose products with it come nearest
    to what is wanted.

    Args:
        wanted_RG: steps, or offsets without their sign.
        cost_RG: what their squared errors cost.
        limits: the least and the largest integer.
        scaled_by: a and b; an integer s stands for d · (a + b s).
    """
    a, b = scaled_by
    groups = native.block // native.group
    wanted_RBg, cost_RBg = (a.unflatten(1, (-1, groups)) for a in (wanted_RG, cost_RG))
    farthest = wanted_RBg.abs().argmax(2, keepdim=True)
    largest_RB = wanted_RBg.gather(2, farthest)[..., 0]
    best = torch.zeros_like(largest_RB)
    least = torch.full_like(largest_RB, torch.inf)
    for end in limits if limits[0] < 0 else limits[1:]:
        for factor in D_FACTORS:
            d_RB = largest_RB / (a + b * end) * factor
            factor_RBg = a + b * _divided(wanted_RBg, d_RB, limits, scaled_by)
            weighted = cost_RBg * factor_RBg
            d_RB = _ratio((weighted * wanted_RBg).sum(2), (weighted * factor_RBg).sum(2))
            d_RB = half(d_RB).float()
            factor_RBg = a + b * _divided(wanted_RBg, d_RB, limits, scaled_by)
            error = (cost_RBg * (wanted_RBg - d_RB[..., None] * factor_RBg).square()).sum(2)
            best = torch.where(error < least, d_RB, best)
            least = torch.minimum(error, least)
    integers_RBg = _divided(wanted_RBg, best, limits, scaled_by)
    return half(best), integers_RBg.flatten(1).to(torch.int32)


def _divided(
    wanted_RBg: Tensor, d_RB: Tensor, limits: tuple[int, int], scaled_by: tuple[float, float]
) -> Tensor:
    a, b = scaled_by
    return ((_ratio(wanted_RBg, d_RB[..., None]) - a) / b).round().clamp(*limits)


def _tried_again(native: NativeType, x_RGn: Tensor, weight_RGn: Tensor, state: State) -> State:
    """The state with the integers of each group that give the least error, among those near."""
    assert native.scales is not None
    moves = [(s, 0) for s in (0, -1, 1)]
    if native.max_min is not None:
        moves = [(s, m) for s in (0, -1, 1) for m in (0, -1, 1)]
    best = dict(state)
    least = None
    for up, up_min in moves:
        own = {**state, "s": (state["s"] + up).clamp(*native.scales)}
        if native.max_min is not None:
            own["m"] = (state["m"] + up_min).clamp(0, native.max_min)
        full = with_steps(native, own)
        v = rounded(native, x_RGn, weight_RGn, full["step"], full["offset"])
        error = _error(x_RGn - full["offset"][..., None], weight_RGn, v, full["step"])
        if least is None:
            least = error
            continue
        for key in ("s", "m"):
            if key in own:
                best[key] = torch.where(error < least, own[key], best[key])
        least = torch.minimum(error, least)
    return with_steps(native, best)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)
