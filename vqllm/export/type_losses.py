"""What each linear costs in each type, before anything is coded: nats a token that its errors alone
add to the KL divergence of the predictions.

    ½ tr(E H_F Eᵀ)      H_F of a pass with gradients (`allocation/sensitivity.py`),
                        E the errors of some rows that are really rounded to the type
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vqllm.allocation.sensitivity import Sensitivity
from vqllm.calibration.gradients import GradientPass
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.visitors import KeptFindings
from vqllm.core import linalg, threads
from vqllm.core.progress import Progress
from vqllm.errors import NumericalError
from vqllm.export.native_rounding import round_matrix
from vqllm.export.native_types import NativeType

ROWS = 64
"""Of a linear, that are rounded to learn its errors."""

Types = Sequence[NativeType]


@dataclass(frozen=True)
class Pass:
    """A pass with gradients through the unquantized model."""

    seed: int
    """of the labels of the loss"""
    scratch: Path
    """a folder for inputs of layers that do not fit the budget"""
    budget_bytes: int

    def losses(
        self,
        open_stream: Callable[[], LayerStream],
        tokens_SL: Tensor,
        offered: Mapping[str, Types],
        progress: Progress,
    ) -> dict[str, list[float]]:
        """Losses of linears, by full name, in the types that each is offered.

        Args:
            tokens_SL: calibration sequences, int64.

        Raises:
            ModelError, NumericalError: the loss has no gradient, or one that is not finite.
        """
        passed = GradientPass(open_stream, tokens_SL, self.seed, self.budget_bytes, self.scratch)
        visitor = Sensitivity(
            lambda name, W_RC, hessians: _losses(name, W_RC, hessians, offered[name]),
            tokens_SL.numel(),
            0.0,
        )
        record = KeptFindings()
        progress.phase("gradients of the predictions")
        passed.run(
            lambda linears: {name: linear for name, linear in linears.items() if name in offered},
            {"loss": visitor},
            record,
            progress.share,
        )
        # A linear that no token reached costs nothing in any type.
        found = {name: own.tolist() for name, own in record.found.get("loss", {}).items()}
        return {name: found.get(name) or [0.0] * len(offered[name]) for name in offered}


def _losses(name: str, W_RC: Tensor, hessians: tuple[Tensor, Tensor], types: Types) -> list[float]:
    """½ tr(E H_F Eᵀ) of a linear in each type. Every k-th row is rounded as it will be, but for the
    passes after the feedback, which lower the loss of all types alike."""
    H_CC, H_F = hessians
    if linalg.is_zero(H_CC):
        return [0.0] * len(types)
    W_rC = W_RC[:: max(1, len(W_RC) // ROWS)].to(H_CC)
    losses = []
    for native in types:
        try:
            E_rC = W_rC - round_matrix(native, W_rC, H_CC, passes=0).W_hat_RC
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        loss = float(threads.total(((E_rC @ H_F) * E_rC).double())) / 2
        losses.append(loss * len(W_RC) / len(W_rC))
    return losses
