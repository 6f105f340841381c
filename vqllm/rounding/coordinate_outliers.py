"""Outliers as coordinates: which weights of a row are stored apart, and with which values.

With E = W − S − Ŵ, one more outlier in column j of a row would lower its loss by (E H)_j² / H_jj.
To be without one that is there costs H_jj e_j², where e is what its tile is off when it is coded
with the outlier put back. Each row takes the columns where these are largest. Tiles that lose an
outlier are coded again, and the values in the columns T of a row are those of least loss,

    S_T = (W − Ŵ) H_:T (H_TT)⁻¹

The exchanges are counted one by one and made all at once: a row of tiles whose loss does not fall
keeps its columns and codes, with the best values for them.

To code the tiles again is what lets outliers move. With codes as they are, an outlier is worth
H_jj S_j², because its tile is coded without it: in 1536 visits of a row, one exchange lowered the
loss. Proxy losses after LDLQ and 4 passes, q_proj and down_proj of layer 5 of the demo model, 192
rows, 0.5 % outliers:

                             uniform, 3 bits      kmeans 1x4, 2 bits
    outliers stay            0.00512  0.02215     0.01153  0.05760
    outliers exchanged       0.00496  0.02155     0.01135  0.05703

Source: Behdin et al., "QuantEase", arXiv 2309.01885, algorithm 2 (iterative hard thresholding of
gradient steps, codes as they are). Values solved on the chosen columns: Foucart, "Hard thresholding
pursuit", SIAM J. Numer. Anal. 49 (2011), 2543-2563.
"""

import torch
from torch import Tensor

from vqllm.core import linalg
from vqllm.rounding.columns import TileColumns

_MAX_NUMBERS = 1 << 24
"""Entries of H gathered at a time: 64 MB."""
_LARGEST = torch.finfo(torch.float16).max


def move(columns: TileColumns, E_RC: Tensor) -> None:
    """Choose outliers again; the loss of no row of tiles rises.

    Args:
        columns: all coded, with outliers; stores the new ones.
        E_RC: W − S − Ŵ, updated in place.
    """
    assert columns.outer is not None
    assert columns.outliers_RC is not None
    S_RC, H_CC = columns.outliers_RC, columns.H_CC
    num = columns.outer.num_outliers(len(columns))
    pull_RC = E_RC @ H_CC
    promising_RN, change_RC, codes = _exchange(columns, E_RC, pull_RC, num)
    # Candidate 1: the columns of outliers and all codes stay, only the values S_T are solved.
    rest_RC = E_RC + S_RC
    stay = _solved(_largest(S_RC.abs(), num), rest_RC, pull_RC + S_RC @ H_CC, H_CC)
    # Candidate 2: the new columns of outliers and the new codes, with values solved for them.
    rest_RC = rest_RC - change_RC
    exchanged = _solved(promising_RN, rest_RC, rest_RC @ H_CC, H_CC)
    # Each row of tiles takes what has the least loss; 0 is to change nothing.
    losses = [
        _by_tile_row((pull_RC * E_RC).sum(1), columns.codec.tile[0]),
        _by_tile_row(stay[1], columns.codec.tile[0]),
        _by_tile_row(exchanged[1], columns.codec.tile[0]),
    ]
    best_I = torch.stack(losses).argmin(0)
    best_R = best_I.repeat_interleave(columns.codec.tile[0])[: len(S_RC), None]
    new_RC = torch.where(best_R == 1, stay[0], torch.where(best_R == 2, exchanged[0], S_RC))
    # E = W − S − Ŵ follows the change of S, and that of Ŵ where the codes are new.
    E_RC += S_RC - new_RC - torch.where(best_R == 2, change_RC, 0)
    columns.replace_outliers(new_RC)
    for k, (codes_I1M, coded_I) in codes.items():
        columns.keep(codes_I1M, k, coded_I & (best_I == 2))


def _exchange(
    columns: TileColumns, E_RC: Tensor, pull_RC: Tensor, num: int
) -> tuple[Tensor, Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """What the exchange of outliers would be, before their values are solved.

    Returns:
        the new columns of outliers [R, N], the change of Ŵ [R, C], and for each tile column of the
        order in which some tile loses an outlier: codes [I, 1, M], and which tiles these are [I].
    """
    assert columns.outliers_RC is not None
    S_RC, W_RC, width = columns.outliers_RC, columns.W_RC, columns.width
    H_KTT = linalg.diagonal_blocks(columns.H_CC, width)
    inverse_KTT = torch.cholesky_inverse(torch.linalg.cholesky(H_KTT))
    h_C = torch.diagonal(columns.H_CC)
    # How much a row's loss grows without an outlier in a column: (E H)_j² / H_jj where there is
    # none, H_jj e_j² where there is one.
    worth_RC = pull_RC**2 / h_C
    whole_RC = torch.empty_like(S_RC)  # target of each tile column plus its outliers
    for k in range(len(columns)):
        own = slice(k * width, (k + 1) * width)
        X_RT = W_RC[:, own] - E_RC[:, own] + pull_RC[:, own] @ inverse_KTT[k]
        whole_RC[:, own] = X_RT + S_RC[:, own]
        if bool(S_RC[:, own].any()):
            _, W_hat_RT = columns.code(whole_RC[:, own], k, H_KTT[k])
            off_RT = h_C[own] * (whole_RC[:, own] - W_hat_RT) ** 2
            worth_RC[:, own] = torch.where(S_RC[:, own] != 0, off_RT, worth_RC[:, own])
    # The `num` columns of most worth get the outliers. Tiles that lose one are coded again, with
    # the lost value back in the target.
    columns_RN = _largest(worth_RC, num)
    stays_RC = torch.zeros_like(S_RC, dtype=torch.bool).scatter(1, columns_RN, True)
    change_RC, codes = torch.zeros_like(S_RC), {}
    for k in range(len(columns)):
        own = slice(k * width, (k + 1) * width)
        lost_RT = (S_RC[:, own] != 0) & ~stays_RC[:, own]
        if not bool(lost_RT.any()):
            continue
        remaining_RT = torch.where(stays_RC[:, own], S_RC[:, own], 0)
        codes_I1M, W_hat_RT = columns.code(whole_RC[:, own] - remaining_RT, k, H_KTT[k])
        coded_I = _by_tile_row(lost_RT.sum(1), columns.codec.tile[0]) > 0
        coded_R1 = coded_I.repeat_interleave(columns.codec.tile[0])[: len(S_RC), None]
        old_RT = W_RC[:, own] - E_RC[:, own]
        change_RC[:, own] = torch.where(coded_R1, W_hat_RT - old_RT, 0)
        codes[k] = codes_I1M, coded_I
    return columns_RN, change_RC, codes


def _solved(
    columns_RN: Tensor, rest_RC: Tensor, pull_RC: Tensor, H_CC: Tensor
) -> tuple[Tensor, Tensor]:
    """The outliers of least loss in given columns of each row, as float16 has them, and the loss
    of each row with them: [R, C] and [R].

    Args:
        rest_RC: W − Ŵ, what outliers are taken from.
        pull_RC: the product of that with H.
    """
    S_RC, loss_R = torch.zeros_like(rest_RC), (rest_RC * pull_RC).sum(1)
    for start in range(0, len(S_RC), size := max(1, _MAX_NUMBERS // columns_RN.shape[1] ** 2)):
        own = slice(start, start + size)
        # S_T = (W − Ŵ) H_:T (H_TT)⁻¹: one small system for each row, over its own columns T.
        place_RN = columns_RN[own]
        H_RNN = H_CC[place_RN[:, :, None], place_RN[:, None]]
        pull_RN1 = pull_RC[own].gather(1, place_RN)[..., None]
        values_RN1 = torch.cholesky_solve(pull_RN1, torch.linalg.cholesky(H_RNN))
        values_RN1 = values_RN1.clamp(-_LARGEST, _LARGEST).half().to(H_CC)
        # Exact for any S, so that float16 rounding counts: 2 S·((W − Ŵ) H)_T − S H_TT Sᵀ.
        loss_R[own] -= ((2 * pull_RN1 - H_RNN @ values_RN1) * values_RN1).sum((1, 2))
        S_RC[own] = S_RC[own].scatter(1, place_RN, values_RN1[..., 0])
    return S_RC, loss_R


def _by_tile_row(values_R: Tensor, tile_rows: int) -> Tensor:
    """Sums over the rows of each row of tiles, [I]."""
    padding = -len(values_R) % tile_rows
    return torch.nn.functional.pad(values_R, (0, padding)).unflatten(0, (-1, tile_rows)).sum(1)


def _largest(size_RC: Tensor, num: int) -> Tensor:
    """Columns of the `num` largest of each row; of equal ones the first."""
    return size_RC.argsort(dim=1, descending=True, stable=True)[:, :num]
