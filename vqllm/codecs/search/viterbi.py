"""The best closed path of a tile through a bitshift trellis, exact up to where the ring closes.

The Viterbi algorithm finds the best path for given bits before the first step. A ring has no first
step, so these bits are guessed: the steps around the place where the ring closes are searched with
both ends free, and the bits in the middle are taken (QTIP, arXiv 2406.11235, algorithm 4, does the
same with a whole turn). More than 8 · L / k steps on each side gain nothing, measured at 1 to 4
bits. A test compares the guess with a search of all paths of small tiles.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqllm.codecs.search.compiled import has_numba
from vqllm_kernels import gpu

if TYPE_CHECKING:
    from vqllm.codecs.search import viterbi_numba

MAX_STATES = 1 << 24
"""States of all tiles together that the search in torch has in memory: 64 MB of costs."""


def tail_biting(x_NTV: Tensor, values_SV: Tensor, shifts: list[int], around: int = 8) -> Tensor:
    """Closed paths of small squared error.

    Args:
        x_NTV: the values to code, float32 [N, steps, V].
        values_SV: the values of every state, float32 [2^L, V].
        shifts: new bits of every step, 1 to 8.
        around: length of the guess, on each side, in windows of L bits.

    Returns:
        the state of every step, int32 [N, steps].
    """
    state_bits = len(values_SV).bit_length() - 1
    num_around = min(-(-around * state_bits // min(shifts)), len(shifts) // 2)
    # Compiled by numba on a CPU, a Triton kernel on a GPU, torch where there is neither.
    if x_NTV.device.type == "cpu" and has_numba():
        compiled = _compiled(Same(values_SV), tuple(shifts), num_around)
        path_NT = compiled.paths(x_NTV.contiguous().numpy(), torch.get_num_threads())
        return torch.from_numpy(path_NT)
    if x_NTV.device.type == "cuda" and gpu.declines(x_NTV.device) is None:
        from vqllm_kernels.trellis import viterbi as kernel

        return _tail_biting(kernel.search, x_NTV, values_SV, shifts, num_around)
    chunks = x_NTV.split(max(1, MAX_STATES // len(values_SV)))
    return torch.cat([_tail_biting(search, x, values_SV, shifts, num_around) for x in chunks])


class Same:
    """A tensor as a key: equal to the same one, unless it was written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version

    def __hash__(self) -> int:
        return id(self.tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self.tensor is not other.tensor:
            return False
        return self._version == other._version


@lru_cache(maxsize=4)
def _compiled(values: Same, shifts: tuple[int, ...], num_around: int) -> "viterbi_numba.Search":
    """The search on the CPU. Rounding codes a matrix column by column, each with the same."""
    from vqllm.codecs.search import viterbi_numba

    return viterbi_numba.Search(values.tensor.contiguous().numpy(), shifts, num_around)


Search = Callable[[Tensor, Tensor, list[int], Tensor | None], Tensor]


def _tail_biting(
    search: Search, x_NTV: Tensor, values_SV: Tensor, shifts: list[int], num_around: int
) -> Tensor:
    num_steps = len(shifts)
    order = [(num_steps - num_around + i) % num_steps for i in range(2 * num_around)]
    path_NT = search(x_NTV[:, order], values_SV, [shifts[t] for t in order], None)
    return search(x_NTV, values_SV, shifts, path_NT[:, num_around] >> shifts[0])


def search(x_NTV: Tensor, values_SV: Tensor, shifts: list[int], context_N: Tensor | None) -> Tensor:
    """The path of least squared error, in torch: states, int32 [N, T].

    Args:
        context_N: the L - k bits before the first step, which are to be the last of the path too;
            None leaves both ends free.
    """
    num_states = len(values_SV)
    norm_S = values_SV.square().sum(1)

    def errors_NS(t: int) -> Tensor:
        return torch.addmm(norm_S, x_NTV[:, t], values_SV.T, alpha=-2)

    # A path may begin in the states whose upper L − k bits are the context.
    allowed_NS = None
    state_S = torch.arange(num_states, device=x_NTV.device)
    cost_NS = errors_NS(0)
    if context_N is not None:
        allowed_NS = (state_S >> shifts[0]) == context_N[:, None]
        cost_NS = torch.where(allowed_NS, cost_NS, torch.inf)
    # All states g·2^k + b of group g have the same 2^k predecessors f·G + g, of which the cheapest
    # counts; `before` notes its f.
    before_NG = []
    for t in range(1, len(shifts)):
        cost_NFG = cost_NS.unflatten(1, (1 << shifts[t], -1))
        best = cost_NFG.min(1)
        before_NG.append(best.indices.to(torch.uint8))
        cost_NS = best.values.repeat_interleave(1 << shifts[t], 1) + errors_NS(t)
    # The ring closes if the last L − k bits are the context. Then back from the best last state.
    if context_N is not None:
        num_contexts = num_states >> shifts[0]
        closes_NS = (state_S & (num_contexts - 1)) == context_N[:, None]
        cost_NS = torch.where(closes_NS, cost_NS, torch.inf)
    state_N = cost_NS.argmin(1)
    path = [state_N]
    for t in range(len(shifts) - 1, 0, -1):
        group_N = state_N >> shifts[t]
        before_N = before_NG[t - 1].gather(1, group_N[:, None])[:, 0].to(torch.int64)
        state_N = before_N * (num_states >> shifts[t]) + group_N
        path.append(state_N)
    return torch.stack(path[::-1], 1).to(torch.int32)
