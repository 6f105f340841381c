"""Coordinate descent: each tile column is coded again, with all others as they are.

With E = W − Ŵ, the proxy loss as a function of Ŵ_k alone is smallest at

    X_k = Ŵ_k + E H_:k (H_kk)⁻¹

and grows by tr((X_k − Ŵ_k) H_kk (X_k − Ŵ_k)ᵀ) away from it. For tiles wider than one column the
code nearest to X_k need not be better in this norm than the code it replaces. So each tile keeps
its old code unless the new one is better: a pass never raises the proxy loss.

A column without a code counts as exact, E = 0, and takes the code of its X_k. A first pass from
such a start is feedback with rows of H in place of those of L: the rule does not take into account
that later columns can compensate for an error.

Source: Behdin et al., "QuantEase", arXiv 2309.01885, lemma 1 (single weights, from W itself); after
LDLQ and in blocks: Tseng et al., "QuIP#", arXiv 2402.04396 (accepts every new code).
"""

import torch
from torch import Tensor

from vqllm.core import linalg
from vqllm.rounding.columns import TileColumns


def descend(columns: TileColumns, E_RC: Tensor, stripe: int) -> None:
    """One pass over all tile columns, from last to first.

    Args:
        columns: stores the new codes.
        E_RC: W − Ŵ, zero in columns without a code; updated in place.
        stripe: columns of W between two products with the whole of H.
    """
    W_RC, H_CC, width = columns.W_RC, columns.H_CC, columns.width
    H_KTT = linalg.diagonal_blocks(H_CC, width)
    H_inverse_KTT = torch.cholesky_inverse(torch.linalg.cholesky(H_KTT))
    tiles_per_stripe = max(stripe // width, 1)
    for end_tile in range(len(columns), 0, -tiles_per_stripe):
        start_tile = max(end_tile - tiles_per_stripe, 0)
        start, end = start_tile * width, end_tile * width
        # E H in the stripe; the changes of its own columns are added below, one after another.
        gradient_RS = E_RC @ H_CC[:, start:end]
        for k in reversed(range(start_tile, end_tile)):
            own = slice(k * width, (k + 1) * width)
            # X_k = Ŵ_k + E H_:k (H_kk)⁻¹, with the old Ŵ_k = W_k − E_k.
            old_gap_RT = gradient_RS[:, own.start - start : own.stop - start] @ H_inverse_KTT[k]
            X_RT = W_RC[:, own] - E_RC[:, own] + old_gap_RT
            codes_I1M, W_hat_RT = columns.code(X_RT, k, H_KTT[k])
            change_RT = W_RC[:, own] - W_hat_RT - E_RC[:, own]
            # Rows of tiles whose new code is no better keep the old one: their change is zero.
            better_I = None
            if columns.order[k] in columns.codes:
                better_I = _better(X_RT - W_hat_RT, old_gap_RT, H_KTT[k], columns.codec.tile[0])
                better_R1 = better_I.repeat_interleave(columns.codec.tile[0])[: len(X_RT), None]
                change_RT = torch.where(better_R1, change_RT, 0)
            columns.keep(codes_I1M, k, better_I)
            E_RC[:, own] += change_RT
            gradient_RS += change_RT @ H_CC[own, start:end]


def _better(new_gap_RT: Tensor, old_gap_RT: Tensor, H_TT: Tensor, tile_rows: int) -> Tensor:
    """For each row of tiles, whether the new code is strictly nearer in the norm of H_kk: [I]."""
    gain_R = ((old_gap_RT @ H_TT) * old_gap_RT - (new_gap_RT @ H_TT) * new_gap_RT).sum(1)
    padding = -len(gain_R) % tile_rows
    return torch.nn.functional.pad(gain_R, (0, padding)).unflatten(0, (-1, tile_rows)).sum(1) > 0
