"""Token weights and Hessians of outputs, from the gradients of the model's loss.

Token weights: the mean square of the gradients at each token. E[w x xᵀ] is then the block of the
Fisher information that belongs to a row of W, averaged over the rows (Kim et al., "GuidedQuant",
arXiv 2505.07004, with one group of rows).

H_O = E[g gᵀ]: with H = E[x xᵀ] it makes the Kronecker product H_O ⊗ H, the Fisher information of W
where inputs and gradients of a token are independent (Martens and Grosse, "K-FAC",
arXiv 1503.05671; for rounding, Tseng et al., "YAQA", arXiv 2505.22988). Of the matrix of a linear
with R outputs only the blocks on the diagonal are stored, each of at most `BLOCK` neighbouring
outputs; of each block the lower triangle, divided by the mean of the diagonal, in float16. That is
R · min(R, 4096) bytes: 0.17 GB for the demo model, 5 GB for 32 layers of 4096 and 14336, 27 GB for
80 layers of 8192 and 28672.

The squares have heavy tails (largest 100 to 1000 times the mean), so that a few tokens decide both
sums. A power below 1 of the squares lets more tokens count.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vqllm.calibration.gradients import WITHOUT
from vqllm.calibration.visitors import Findings, Visitor
from vqllm.core import linalg, threads
from vqllm.core.distributed import Processes
from vqllm.errors import NumericalError
from vqllm.hf.experts import roles_of

BLOCK = 4096
SHARED_BYTES = 2 << 30
"""What Hessians of the experts of a layer may take before they have one together."""


class TokenWeights(Visitor):
    """Collects the weight of each token of `tokens`, [S, L], in the Hessian of each linear: its
    mean square divided by the mean of all, to a power.

    Findings are float32 [S, L] with mean 1 (1 each where there is no gradient at all), and empty
    tensors for linears whose input has only some of the tokens.
    """

    is_local = True

    def __init__(self, tokens: Tensor, power: float, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        self._tokens = tokens
        self._power = power
        self._squares: dict[str, Tensor] = {}
        self._partial: set[str] = set()

    def visit(self, name: str, rows: slice, x: Tensor, g: Tensor) -> None:
        """Add the gradients of a batch in the outputs of a linear, [.., R]."""
        if g.shape[:-1] != self._tokens[rows].shape:
            self._partial.add(name)
            return
        total_SL = self._squares.setdefault(name, torch.zeros(self._tokens.shape))
        total_SL[rows] += g.float().square().mean(-1).cpu()

    def finish(self) -> Findings:
        """The weights of the layer's linears, in every process."""
        self._gather()
        findings = {name: torch.empty(0) for name in self._partial}
        for name in self._squares.keys() - self._partial:
            mean = threads.mean(self._squares[name])
            _check_mean(mean, name)
            if mean == 0:  # nothing tells tokens apart
                findings[name] = torch.ones_like(self._squares[name])
                continue
            powers_SL = (self._squares[name] / mean) ** self._power
            findings[name] = powers_SL / threads.mean(powers_SL)
        self._squares, self._partial = {}, set()
        return findings

    def _gather(self) -> None:
        """Let all processes have the squares of all tokens; each token was seen by one."""
        if self._processes.size == 1:
            return
        found = self._processes.exchange((self._squares, self._partial))
        self._squares, self._partial = {}, set()
        for squares, partial in found:
            self._partial |= partial
            for name, total_SL in squares.items():
                before = self._squares.get(name)
                self._squares[name] = total_SL if before is None else before + total_SL


class OutputHessians(Visitor):
    """Sums g gᵀ of the linears of a layer; findings are packed blocks, for `unpack`.

    A token weighs |g|^(2 power − 2): with power 1 this is the Fisher information. Experts have one
    Hessian together where those of a layer would take more than `SHARED_BYTES`.
    """

    def __init__(self, power: float, num_tokens: int = 0) -> None:
        """Args:
        num_tokens: that will come, for `cost`.
        """
        self._power, self._num_tokens = power, num_tokens
        self._roles: Mapping[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_rows: dict[str, int] = {}

    def share(self, roles: Mapping[str, str]) -> None:
        """What linears of experts have in common, in the layer that comes next."""
        self._roles = roles

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer comes next."""
        sizes = [linears[name].out_features for name in self._roles]
        if sum(rows * min(rows, BLOCK) for rows in sizes) * 4 <= SHARED_BYTES:
            self._roles = {}

    def cost(self, linear: nn.Linear) -> float:
        """Of the sums."""
        return float(linear.out_features) * min(linear.out_features, BLOCK) * self._num_tokens

    def part_of(self, name: str, rows: slice, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """The gradients of a batch in the outputs of a linear, [.., R]."""
        return (g,)

    def add(self, name: str, part: tuple[Tensor, ...]) -> None:
        """Add what `part_of` gave."""
        (g,) = part
        name = self._roles.get(name, name)
        self._num_rows[name] = g.shape[-1]
        # g |g|^(power − 1), so that g gᵀ has the weight |g|^(2 power − 2).
        g_NR = g.flatten(0, -2)
        if self._power < 1:
            g_NR = g_NR.float()
            norm_N1 = g_NR.norm(dim=1, keepdim=True)
            g_NR = torch.where(norm_N1 > 0, g_NR * norm_N1.clamp_min(1e-30) ** (self._power - 1), 0)
        g_NKB = _blocks(g_NR)
        if name not in self._sums:
            num_blocks, size = g_NKB.shape[1:]
            self._sums[name] = torch.zeros(num_blocks, size, size, device=g.device)
        for H_BB, g_NB in zip(self._sums[name], g_NKB.unbind(1)):
            linalg.add_symmetric(H_BB, g_NB, g_NB)

    def finish(self) -> Findings:
        """The packed Hessians of the layer's linears."""
        packed = {}
        for name, H_KBB in self._sums.items():
            mean = threads.total(torch.diagonal(H_KBB, dim1=1, dim2=2)) / self._num_rows[name]
            _check_mean(mean, name)
            if mean == 0:  # as of one that no token reached
                continue
            packed[name] = _pack(H_KBB / mean)
        self._sums = {}
        return packed


def unpack(packed: Mapping[str, Tensor], name: str, num_rows: int) -> Tensor | None:
    """H_O of a linear, float32 [R, R], its mean diagonal 1; None for one that no token reached, or
    whose outputs have no gradient.

    Args:
        packed: the findings of `OutputHessians` for its layer.
        num_rows: R.
    """
    if name not in packed:
        shared = [key for key in roles_of(name) if key in packed]
        if not shared:
            return None
        name = shared[0]
    # The stored lower triangles, mirrored; entries between blocks are zero.
    num_blocks, size = _block_sizes(num_rows)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    H_KBB = torch.zeros(num_blocks, size, size)
    for H_BB, values in zip(H_KBB, packed[name]):
        H_BB[lower] = values.float()
    H_KBB = H_KBB + H_KBB.tril(-1).mT
    return torch.block_diag(*H_KBB)[:num_rows, :num_rows]


def _check_mean(mean: Tensor, name: str) -> None:
    if not bool(mean.isfinite()):
        raise NumericalError(
            f"the loss has a NaN or infinite gradient in the outputs of {name}. Run "
            f"with --compute-dtype float32, or without gradients: {WITHOUT}"
        )


def _pack(H_KBB: Tensor) -> Tensor:
    """The lower triangles, from the upper ones, in float16: with a mean diagonal of 1 no entry is
    above the number of rows. Rounding to bfloat16 moved eigenvalues of the demo model by more than
    a damping of 0.01.
    """
    lower = torch.ones(H_KBB.shape[1:], dtype=torch.bool, device=H_KBB.device).tril()
    return H_KBB.mT[:, lower].half().cpu()


def _blocks(g_NR: Tensor) -> Tensor:
    """[N, K, B], the last block filled up with zeros."""
    num_blocks, size = _block_sizes(g_NR.shape[1])
    missing = num_blocks * size - g_NR.shape[1]
    return torch.nn.functional.pad(g_NR, (0, missing)).unflatten(1, (num_blocks, size))


def _block_sizes(num_rows: int) -> tuple[int, int]:
    num_blocks = -(-num_rows // BLOCK)
    return num_blocks, -(-num_rows // num_blocks)
