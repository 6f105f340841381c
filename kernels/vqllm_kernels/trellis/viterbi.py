"""The Viterbi search of a bitshift trellis as a Triton kernel: one program a tile.

Only the least cost of every group of states is kept from one step to the next, best[g], because
the cost of a state is best[s >> k] plus its own error. With 2^16 states and 2 new bits that is 64
KB a step, which stays in the first-level cache; the costs themselves would not fit there. Programs
are persistent, so that what is kept to trace the path back, a byte a group and step (4 MB a tile),
is needed once for each program and not for each tile. At 7 instructions a state (counted in the
compiled code) an H100 has issue slots for 50 million weights a second with 2^16 states, the guess
of the context included; that is computed, it has not been measured on a GPU.

The values of the states are looked up as float16, 128 KB for 2^16 states. That rounds them, for the
search only, by 2^-11 of their size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqllm_kernels import gpu

BLOCK = 2048
"""Groups of states at a time."""
NUM_WARPS = 16


@triton.jit
def _cost(values_ptr, before_ptr, s, group, x_ptr, V: tl.constexpr):
    """Costs of states: the least of their group before the step, and their own squared error.

    Args:
        s: states [WIDTH, REPEAT].
        group: the group that each belongs to, [WIDTH, REPEAT], or [WIDTH, 1] if a row is one group.
        x_ptr: the V weights of the step.
    """
    gap = tl.load(values_ptr + s * V).to(tl.float32) - tl.load(x_ptr)
    error = gap * gap
    if V == 2:
        gap = tl.load(values_ptr + s * V + 1).to(tl.float32) - tl.load(x_ptr + 1)
        error += gap * gap
    return tl.load(before_ptr + group) + error


@triton.jit
def _step(
    values_ptr,
    x_ptr,
    before_ptr,
    after_ptr,
    from_ptr,
    shift_before,
    STATES: tl.constexpr,
    SHIFT: tl.constexpr,
    REPEAT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Least costs of the groups after a step of SHIFT new bits, from those before it.

    `x_ptr` and `shift_before` belong to the step before: the states that are compared are its.
    REPEAT is 2^shift_before where that is known when compiling, so that a group's cost is loaded
    once for all its states (7 instructions a state with 2^16 states and 2 bits, in place of 12); 1
    where it is not.
    """
    GROUPS: tl.constexpr = STATES >> SHIFT
    WIDTH: tl.constexpr = (BLOCK if BLOCK < GROUPS else GROUPS) // REPEAT
    place = tl.arange(0, WIDTH)[:, None] * REPEAT + tl.arange(0, REPEAT)[None, :]
    row = tl.arange(0, WIDTH)[:, None]
    for start in range(0, GROUPS, WIDTH * REPEAT):
        g = start + place
        if REPEAT == 1:
            group = g >> shift_before
        else:
            group = start // REPEAT + row
        least = _cost(values_ptr, before_ptr, g, group, x_ptr, V)
        came_from = tl.zeros_like(g)
        for f in tl.static_range(1, 1 << SHIFT):
            s = f * GROUPS + g
            if REPEAT == 1:
                group = s >> shift_before
            else:
                group = (f * GROUPS + start) // REPEAT + row
            cost = _cost(values_ptr, before_ptr, s, group, x_ptr, V)
            less = cost < least
            least = tl.where(less, cost, least)
            came_from = tl.where(less, f, came_from)
        tl.store(after_ptr + g, least)
        tl.store(from_ptr + g, came_from.to(tl.uint8))


@triton.jit
def search_kernel(
    x_ptr,  # float32 [num_tiles, NUM_STEPS, V]
    values_ptr,  # float16 [STATES, V]
    shifts_ptr,  # int32 [NUM_STEPS], each LOW or LOW + 1
    context_ptr,  # int32 [num_tiles], or unused
    path_ptr,  # int32 [num_tiles, NUM_STEPS]
    best_ptr,  # float32 [programs, 2, STATES >> LOW]
    from_ptr,  # uint8 [programs, NUM_STEPS, STATES >> LOW]
    num_tiles,
    NUM_STEPS: tl.constexpr,
    STATES: tl.constexpr,
    LOW: tl.constexpr,
    MIXED: tl.constexpr,
    CLOSED: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = STATES >> LOW
    REPEAT: tl.constexpr = 1 if MIXED or GROUPS >> LOW == 0 else 1 << LOW
    WIDTH: tl.constexpr = BLOCK if BLOCK < GROUPS else GROUPS
    program = tl.program_id(0)
    best_ptr += program * (2 * GROUPS)
    from_ptr += program.to(tl.int64) * (NUM_STEPS * GROUPS)
    first_shift = tl.load(shifts_ptr)
    for tile in range(program, num_tiles, tl.num_programs(0)):
        row_ptr = x_ptr + tile * (NUM_STEPS * V)
        context = 0
        if CLOSED:
            context = tl.load(context_ptr + tile)
        for start in range(0, GROUPS, WIDTH):
            g = start + tl.arange(0, WIDTH)
            cost = tl.zeros([WIDTH], tl.float32)
            if CLOSED:
                cost = tl.where(g == context, 0.0, 1e30)
            tl.store(best_ptr + g, cost)
        tl.debug_barrier()
        shift_before = first_shift
        for t in range(1, NUM_STEPS):
            shift = tl.load(shifts_ptr + t)
            before_ptr = best_ptr + ((t - 1) % 2) * GROUPS
            after_ptr = best_ptr + (t % 2) * GROUPS
            x_step_ptr = row_ptr + (t - 1) * V
            step_ptr = from_ptr + t * GROUPS
            if MIXED:
                if shift == LOW:
                    _step(
                        values_ptr, x_step_ptr, before_ptr, after_ptr, step_ptr, shift_before,
                        STATES, LOW, REPEAT, V, BLOCK,
                    )  # fmt: skip
                else:
                    _step(
                        values_ptr, x_step_ptr, before_ptr, after_ptr, step_ptr, shift_before,
                        STATES, LOW + 1, REPEAT, V, BLOCK,
                    )  # fmt: skip
            else:
                _step(
                    values_ptr, x_step_ptr, before_ptr, after_ptr, step_ptr, shift_before,
                    STATES, LOW, REPEAT, V, BLOCK,
                )  # fmt: skip
            shift_before = shift
            # What one thread has stored, others load in the next step.
            tl.debug_barrier()
        before_ptr = best_ptr + ((NUM_STEPS - 1) % 2) * GROUPS
        x_step_ptr = row_ptr + (NUM_STEPS - 1) * V
        least = 3.0e38
        state = 0
        for start in range(0, STATES, WIDTH):
            s = start + tl.arange(0, WIDTH)
            cost = _cost(values_ptr, before_ptr, s, s >> shift_before, x_step_ptr, V)
            if CLOSED:
                ends = s & ((STATES >> first_shift) - 1)
                cost = tl.where(ends == context, cost, 3.0e38)
            least_here = tl.min(cost, axis=0)
            state_here = tl.min(tl.where(cost == least_here, s, STATES), axis=0)
            state = tl.where(least_here < least, state_here, state)
            least = tl.minimum(least, least_here)
        for back in range(1, NUM_STEPS):
            t = NUM_STEPS - back
            tl.store(path_ptr + tile * NUM_STEPS + t, state)
            shift = tl.load(shifts_ptr + t)
            group = state >> shift
            came_from = tl.load(from_ptr + t * GROUPS + group).to(tl.int32)
            state = came_from * (STATES >> shift) + group
        tl.store(path_ptr + tile * NUM_STEPS, state)
        tl.debug_barrier()


def search(x_NTV: Tensor, values_SV: Tensor, shifts: list[int], context_N: Tensor | None) -> Tensor:
    """The path of least squared error of every tile: states, int32 [N, T].

    Args:
        x_NTV: float32 [N, T, V], on a CUDA device (or any, interpreted); V is 1 or 2.
        values_SV: the values of the states, float32 [2^L, V].
        shifts: new bits of every step; at most two different numbers, which follow each other.
        context_N: the L - k bits before the first step, which are to be the last of the path too;
            None leaves both ends free.
    """
    low, high = min(shifts), max(shifts)
    if high - low > 1:
        raise ValueError(f"steps of {low} to {high} new bits; at most two neighbouring numbers")
    num_tiles, num_steps, num_weights = x_NTV.shape
    device = x_NTV.device
    groups = len(values_SV) >> low
    num_programs = max(1, min(num_tiles, 2 * gpu.num_multiprocessors(device)))
    path_NT = torch.empty(num_tiles, num_steps, dtype=torch.int32, device=device)
    if num_tiles == 0:
        return path_NT
    shifts_T = torch.tensor(shifts, dtype=torch.int32, device=device)
    search_kernel[(num_programs,)](
        x_NTV.contiguous(),
        values_SV.to(torch.float16).contiguous(),
        shifts_T,
        shifts_T if context_N is None else context_N.to(torch.int32).contiguous(),
        path_NT,
        torch.empty(num_programs, 2, groups, dtype=torch.float32, device=device),
        torch.empty(num_programs, num_steps, groups, dtype=torch.uint8, device=device),
        num_tiles,
        NUM_STEPS=num_steps,
        STATES=len(values_SV),
        LOW=low,
        MIXED=high > low,
        CLOSED=context_N is not None,
        V=num_weights,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return path_NT
