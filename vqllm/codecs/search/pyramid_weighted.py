"""Pulse vectors near tiles whose errors are weighted by a matrix.

With the best length, the error of direction y in the norm of Q is xᵀQx − (bᵀy)² / (yᵀQy), b = Qx.
The search starts with the vector that is nearest without weights. One pulse after another is
removed and put where it makes (bᵀy)² / (yᵀQy) largest.

Measured with the weights of LDLQ on a model's layers (16 or 32 weights a tile, rotated): the error
falls by 2 to 13 % where the weights are even (condition numbers 1.8 to 9), by half where they are
not (54, 143). The best of 30 more starts is 0.1 to 0.7 %, and 6 to 7 %, better than that.
"""

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Weights that are searched at a time."""

_PASSES = 2
"""Passes over all coordinates. Two more lower the error by less than 0.1 %."""
_LEAST_GAIN = 1e-5
"""Relative gain for which a pulse moves; less may be rounding."""


def nearest(x_EN: Tensor, y_EN: Tensor, Q_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Pulse vectors with small weighted errors.

    Args:
        x_EN: tiles, float32.
        y_EN: pulse vectors to begin with, float32 integers [E, N].
        Q_EE: symmetric, positive definite.

    Returns:
        y, float32 [E, N], and the length [N] of its direction that makes the error least.
    """
    Q_EE = Q_EE / Q_EE.diagonal().mean()
    num_tiles = max(CHUNK // len(x_EN), 1)
    chunks = [
        _nearest(x, y, Q_EE) for x, y in zip(x_EN.split(num_tiles, 1), y_EN.split(num_tiles, 1))
    ]
    return torch.cat([y for y, _ in chunks], 1), torch.cat([length for _, length in chunks])


def _nearest(x_EN: Tensor, y_EN: Tensor, Q_EE: Tensor) -> tuple[Tensor, Tensor]:
    largest_N = x_EN.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    b_EN = Q_EE @ (x_EN / largest_N)
    for _ in range(_PASSES):
        search = _Search(b_EN, y_EN, Q_EE)
        for j in range(len(y_EN)):
            search.move_pulse(j)
        y_EN = search.y_EN
    product_N, square_N = (b_EN * y_EN).sum(0), (Q_EE @ y_EN * y_EN).sum(0)
    return y_EN, largest_N * product_N / square_N * y_EN.square().sum(0).sqrt()


class _Search:
    """y of a number of tiles, with Qy, bᵀy and yᵀQy, which are updated when pulses move."""

    def __init__(self, b_EN: Tensor, y_EN: Tensor, Q_EE: Tensor) -> None:
        self.Q_EE, self.b_EN = Q_EE, b_EN
        self.y_EN = y_EN.clone()
        self.Qy_EN = Q_EE @ y_EN
        self.product_N = (b_EN * y_EN).sum(0)
        self.square_N = (self.Qy_EN * y_EN).sum(0)
        # Of several best places for a pulse the first is taken: it has the largest number here.
        self.order_E1 = torch.arange(len(y_EN), 0, -1, device=y_EN.device)[:, None]
        self.one = y_EN.new_ones(())

    def move_pulse(self, j: int) -> None:
        """Remove one pulse of coordinate j, where it has one, and put it where it is best."""
        # y without the pulse: bᵀy, yᵀQy and Qy follow from those before.
        sign_N = self.y_EN[j].sign()
        product_N = self.product_N - sign_N * self.b_EN[j]
        square_N = self.square_N + sign_N * (sign_N * self.Q_EE[j, j] - 2 * self.Qy_EN[j])
        Qy_EN = self.Qy_EN - self.Q_EE[:, j : j + 1] * sign_N
        sign_EN = self.y_EN.sign()
        sign_EN[j] = (self.y_EN[j] - sign_N).sign()
        # A coordinate without pulses gets one of the sign in which the score rises.
        slope_EN = self.b_EN * square_N - Qy_EN * product_N
        sign_EN += (sign_EN == 0) * torch.copysign(self.one, slope_EN)
        # The score of y with the pulse on each coordinate; its sign is that of bᵀy, so that the
        # opposite direction does not count as good.
        product_EN = self.b_EN * sign_EN + product_N
        square_EN = 2 * Qy_EN * sign_EN + (square_N + self.Q_EE.diagonal()[:, None])
        score_EN = product_EN * product_EN.abs() / square_EN
        best_N = score_EN.amax(0)
        score_N = self.product_N * self.product_N.abs() / self.square_N
        moves = ((sign_N != 0) & (best_N > score_N * (1 + _LEAST_GAIN))).nonzero()[:, 0]
        # Where the best place gains enough, the pulse moves there.
        if len(moves):
            equal_EN = (score_EN[:, moves] == best_N[moves]) * self.order_E1
            put_1N = len(self.y_EN) - equal_EN.amax(0, keepdim=True)
            put_sign_1N = sign_EN[:, moves].gather(0, put_1N)
            self.y_EN[j, moves] -= sign_N[moves]
            self.y_EN[:, moves] = self.y_EN[:, moves].scatter_add(0, put_1N, put_sign_1N)
            self.Qy_EN[:, moves] = Qy_EN[:, moves] + self.Q_EE[:, put_1N[0]] * put_sign_1N
            self.product_N[moves] = product_EN[:, moves].gather(0, put_1N)[0]
            self.square_N[moves] = square_EN[:, moves].gather(0, put_1N)[0]
