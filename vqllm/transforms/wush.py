"""WUSH: the block transform that is best for rounding to nearest, in closed form from W and H.

Features are taken in blocks. For the second moments of a block, M_W = WᵀW / R of the weights and
M_X of the inputs,

    M_W = B_W B_Wᵀ    M_X = B_X B_Xᵀ    B_Wᵀ B_X = U S Vᵀ    T = Q S^(-1/2) Uᵀ B_Wᵀ

with a Hadamard matrix Q. In the new basis W' and x' have the same second moments, Q S Qᵀ: neither
is the larger in any direction, and the diagonal is constant, so that a scale of the block suits
each of its features.

Why it is the best: rounding to nearest with a scale for each block loses c ‖W'‖² tr H' there. For
any T, ‖B_Wᵀ T⁻¹‖ ‖T B_X‖ is at least the nuclear norm of B_Wᵀ B_X, which is tr S, and T reaches it.
A Hadamard transform does not change tr M_W tr M_X. With blocks of one feature this is the scale
transform with `by: hessian`.

`moments: feedback` is for LDLQ. Feedback compensates a part of the errors of an input; what remains
is the block of D in H = L D Lᵀ, which takes the place of M_X.

The loss above does not change when a block of T is multiplied by a number: the scale of the block
absorbs it. A code with one scale for the whole matrix has no such scale. `gains: balanced` leaves T
as above. It makes the sum of the losses of all blocks least if the code's error is proportional to
the mean square of all that it codes, which holds where a Hadamard transform of all features
follows. `gains: even` gives all blocks of W' the same mean square. It is for codes whose one scale
must serve all blocks, and for feedback, where (see `scale`) only the determinants matter.

Source: Chen et al., "WUSH", arXiv 2512.00956; the moments of feedback as in its code for GPTQ.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqllm.core import linalg, threads
from vqllm.core.hadamard import matrix
from vqllm.core.protocols import State, Transform
from vqllm.transforms.base import TRANSFORMS
from vqllm_kernels.transforms import BlockDiagonalSpec

DAMPING = 0.01
"""Added to the diagonal of M_W and M_X, relative to its mean in the block. The largest singular
value of T is then at most (1 + 100 · block)^(1/2) times the smallest: 40 for blocks of 16, 113 for
blocks of 128."""

LARGEST_GAIN = 64.0
"""|det T|^(1/block) stays within [1/64, 64] around its geometric mean 1. With the bound above, no
number of T comes near the limits of float16."""


@TRANSFORMS.register("wush")
class Wush(Transform):
    """Whiten blocks of W and H against each other, then spread them by a Hadamard transform."""

    type: Literal["wush"] = "wush"
    block: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="features of a block, which takes 16 · block / rows bits a weight",
    )
    moments: Literal["hessian", "feedback"] = Field(
        default="hessian",
        description="what an input counts: hessian, for rounding to nearest; feedback, what "
        "rounding with ldlq leaves of it",
    )
    gains: Literal["even", "balanced"] = Field(
        default="even",
        description="even: all blocks of W' have the same mean square; balanced: that of their "
        "inputs, for rounding to nearest where a Hadamard transform of all features follows",
    )

    @model_validator(mode="after")
    def _is_of_the_input(self) -> "Wush":
        if self.side != "in":
            raise ValueError(
                "`wush` balances the weights against the Hessian of their input: it needs "
                "`side: in`. For the output side use hadamard or scale"
            )
        return self

    def spec(self, size: int) -> BlockDiagonalSpec:
        return BlockDiagonalSpec(side=self.side, size=size, block=min(self.block, size))

    def forward(
        self, W_RC: Tensor, H_CC: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, State]:
        spec = self.spec(self._size(W_RC))
        M_X = self._input_moments(H_CC, spec)
        T = {
            name: _wush(M_W, M_X[name], self.gains == "even")
            for name, M_W in _weight_moments(W_RC, spec).items()
        }
        # Rounded before they are used, so that run time undoes exactly what was done.
        state = {
            name: blocks.to(W_RC.device, torch.float16).contiguous()
            for name, blocks in _normalised(T).items()
        }
        state |= {name: T[0] for name, T in state.items() if name == "last"}
        return spec.forward(W_RC, state), spec.forward_hessian(H_CC, state), state

    def _input_moments(self, H_CC: Tensor, spec: BlockDiagonalSpec) -> dict[str, Tensor]:
        """M_X of each block, [K, G, G] by stored name."""
        # Where H is zero all inputs count alike.
        if not bool((torch.diagonal(H_CC) > 0).any()):
            return _named_blocks(torch.eye(spec.size), spec)
        H_CC = linalg.damp(H_CC, DAMPING)
        if self.moments == "hessian":
            return _named_blocks(H_CC, spec)
        # H = L D Lᵀ needs whole blocks: features that are coupled to nothing fill up the last one.
        missing = -spec.size % spec.block
        padded_CC = torch.nn.functional.pad(H_CC, (0, missing, 0, missing))
        torch.diagonal(padded_CC)[spec.size :] = 1
        D_KGG = linalg.block_ldl(padded_CC, spec.block)[1].cpu().double()
        left = spec.size % spec.block
        return {"blocks": D_KGG[: spec.size // spec.block], "last": D_KGG[-1:, :left, :left]}


def _named_blocks(A_CC: Tensor, spec: BlockDiagonalSpec) -> dict[str, Tensor]:
    """The blocks on the diagonal of a matrix, [K, G, G] by stored name, float64 on the CPU."""
    whole = spec.size - spec.size % spec.block
    blocks = {
        "blocks": linalg.diagonal_blocks(A_CC[:whole, :whole], spec.block),
        "last": A_CC[None, whole:, whole:],
    }
    return {name: A.cpu().double() for name, A in blocks.items()}


@threads.one_thread()
def _weight_moments(W_RC: Tensor, spec: BlockDiagonalSpec) -> dict[str, Tensor]:
    """WᵀW / R of the columns of each block, [K, G, G] by stored name, float64 on the CPU.

    A block of zeros gets the mean square of all weights times the identity.
    """
    whole = spec.size - spec.size % spec.block
    W_KRG = W_RC[:, :whole].unflatten(1, (-1, spec.block)).transpose(0, 1)
    energy = float(torch.linalg.vector_norm(W_RC, dtype=torch.float64)) ** 2
    mean = energy / W_RC.numel() or 1.0
    moments = {}
    for name in spec.layout():
        X_KRG = W_KRG if name == "blocks" else W_RC[None, :, whole:]
        M_KGG = (X_KRG.mT @ X_KRG).cpu().double() / len(W_RC)
        is_zero = _mean_diagonal(M_KGG) == 0
        moments[name] = M_KGG + is_zero * mean * torch.eye(M_KGG.shape[-1])
    return moments


@threads.one_thread()
def _wush(M_W: Tensor, M_X: Tensor, even: bool) -> Tensor:
    """T of each block, [K, G, G]; `even` makes 1 the mean square of W' in each."""
    eye = torch.eye(M_W.shape[-1], dtype=torch.float64)
    # M = B Bᵀ of both, B_Wᵀ B_X = U S Vᵀ, T = Q S^(-1/2) Uᵀ B_Wᵀ.
    B_W, B_X = (torch.linalg.cholesky(M + DAMPING * _mean_diagonal(M) * eye) for M in (M_W, M_X))
    U, S, _ = torch.linalg.svd(B_W.mT @ B_X)
    gain = (S.mean(-1, keepdim=True) / S if even else 1 / S).sqrt()
    return matrix(M_W.shape[-1]).double() @ (gain[..., None] * (U.mT @ B_W.mT))


@threads.one_thread()
def _normalised(T: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each block times a number, so that the gains have geometric mean 1 and stay in the range."""
    # The gain of a block is |det T|^(1/block); the mean counts each feature once.
    log_det = {name: torch.linalg.slogdet(blocks).logabsdet for name, blocks in T.items()}
    size = sum(blocks.shape[0] * blocks.shape[1] for blocks in T.values())
    mean = sum(float(x.sum()) for x in log_det.values()) / size
    limit = math.log(LARGEST_GAIN)
    normalised = {}
    for name, blocks in T.items():
        log_gain = log_det[name] / blocks.shape[1]
        change = (log_gain - mean).clamp(-limit, limit) - log_gain
        normalised[name] = blocks * change.exp()[:, None, None]
    return normalised


def _mean_diagonal(M_KGG: Tensor) -> Tensor:
    """[K, 1, 1]."""
    return torch.diagonal(M_KGG, dim1=-2, dim2=-1).mean(-1)[:, None, None]
