"""How far a quantized matrix is from the original: figures for reports and tests."""

import math

import torch
from torch import Tensor

from vqllm.core import threads


def proxy_loss(W_RC: Tensor, W_hat_RC: Tensor, H_CC: Tensor) -> float:
    """tr((W−Ŵ) H (W−Ŵ)ᵀ) / tr(W H Wᵀ): the relative error of the linear's output.

    0 for equal matrices, whatever H is; inf if only W H Wᵀ vanishes.
    """
    return _ratio(_weighted_energy(W_RC - W_hat_RC, H_CC), _weighted_energy(W_RC, H_CC))


@threads.one_thread()
def sqnr_db(W_RC: Tensor, W_hat_RC: Tensor) -> float:
    """10 log10(‖W‖² / ‖W−Ŵ‖²), decibels; inf for equal matrices."""
    # In place: a float64 copy of an expert of 4096 x 14336 takes 0.5 GB.
    signal = float(W_RC.to(torch.float64, copy=True).square_().sum())
    noise = float(W_RC.to(torch.float64, copy=True).sub_(W_hat_RC).square_().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def gaussian_efficiency(mse: float, bits: float) -> float:
    """The share of the rate that a code uses: −½ log2(mse) / bits.

    1 is the rate-distortion limit of a Gaussian source; E8P on Gaussian weights is at 0.86.

    Args:
        mse: mean squared error relative to the variance of what was coded.
        bits: bits a weight that were spent.
    """
    if bits <= 0:
        raise ValueError(f"the efficiency of a code of {bits} bits a weight is undefined")
    return -0.5 * math.log2(mse) / bits if mse > 0 else math.inf


def code_entropy(codes_IJM: Tensor) -> float:
    """Bits that an ideal lossless coder without memory would still need for all the symbols.

    The empirical entropy of each of the M symbols of a tile, summed over tiles, in bits. The size
    of the tables of frequencies is not counted, so a table must be small beside the symbols. With
    fewer than 16 symbols for each of its entries, as with symbols of 16 bits in most matrices, the
    frequencies are mostly chance. Such a symbol is cut into bytes, and the entropies of these are
    added up: a coder of single bytes needs no more.

    Args:
        codes_IJM: non-negative integers.
    """
    total = 0.0
    for symbols_N in codes_IJM.flatten(0, 1).unbind(1):
        # 16 symbols for each entry of a table, or bytes, whose table is small in any case.
        if symbols_N.numel() and int(symbols_N.max()) < max(symbols_N.numel() // 16, 256):
            total += _entropy(symbols_N)
            continue
        while symbols_N.numel() and bool(symbols_N.any()):
            total += _entropy(symbols_N & 0xFF)
            symbols_N = symbols_N >> 8
    return total


@threads.one_thread()
def _entropy(symbols_N: Tensor) -> float:
    """The empirical entropy of symbols, times their number, in bits."""
    counts = torch.bincount(symbols_N).double().cpu()
    counts = counts[counts > 0]
    return -float((counts * (counts / counts.sum()).log2()).sum())


def _weighted_energy(A_RC: Tensor, H_CC: Tensor) -> float:
    """tr(A H Aᵀ)."""
    return float(threads.total((A_RC @ H_CC).double().mul_(A_RC)))


def _ratio(error: float, signal: float) -> float:
    if error == 0:
        return 0.0
    return error / signal if signal > 0 else math.inf


def output_error(own: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of outputs [.., D] relative to the power of the wanted ones, mean over tokens.

    The ratio is taken token by token: a few tokens have states a thousand times as large as those
    of all others, and would otherwise decide the mean.
    """
    wanted = wanted.float()
    error = (own.float() - wanted).square().sum(-1)
    return threads.mean(error / wanted.square().sum(-1).clamp_min(1e-30))
