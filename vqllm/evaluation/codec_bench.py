"""Every codec on the same Gaussian weights: distortion against Shannon's limit, and throughput."""

import math
import time
from collections.abc import Iterator, Sequence

import torch

from vqllm.codecs import CODECS
from vqllm.core import tiles
from vqllm.core.protocols import JSON, Codec, Point
from vqllm.core.registry import unknown
from vqllm.errors import RecipeError

COLS = 4096
SEED = 0


def bench(names: Sequence[str] = (), device: torch.device | str = "cpu") -> Iterator[JSON]:
    """A row for every point of the named codecs, or of all.

    Raises:
        RecipeError: a name that no codec has.
    """
    for name in names:
        if name not in CODECS:
            raise RecipeError(unknown("codec", name, CODECS))
    for name in names or CODECS:
        for point in CODECS.get(name).points:
            yield measure(build(name, point), point, torch.device(device))


def build(name: str, point: Point) -> Codec:
    """The codec that a point describes."""
    return CODECS.get(name).model_validate({"type": name, **point.options})


def gaussian(point: Point, device: torch.device | str = "cpu") -> torch.Tensor:
    """The weights that a point is measured on, float32 [rows, COLS], the same for all codecs."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(max(point.num_weights // COLS, 1), COLS, generator=generator).to(device)


def measure(codec: Codec, point: Point, device: torch.device) -> JSON:
    """One row: rate, distortion, and the speeds of fitting, encoding and decoding.

    `bits` counts the codes only; `gap_db` is 10 log10(mse / 4^-bits), the distance to the limit
    of a Gaussian source. Throughputs are millions of weights a second of one call each, after a
    call with few weights that compiles what is compiled on first use.
    """
    W_RC = gaussian(point, device)
    X_IJE = tiles.to_tiles(W_RC, codec.tile)
    fit_clock = _seconds(device)
    state = codec.fit(X_IJE, None, torch.Generator().manual_seed(SEED + 1))
    fit_seconds = next(fit_clock)
    # The first call, with few weights, compiles what is compiled on first use.
    codec.decode(codec.encode(X_IJE[:, :2], state), state)
    encode_clock = _seconds(device)
    codes_IJM = codec.encode(X_IJE, state)
    encode_seconds = next(encode_clock)
    decode_clock = _seconds(device)
    X_hat_IJE = codec.decode(codes_IJM, state)
    decode_seconds = next(decode_clock)
    # Relative to the mean square of these weights, which is 1 only up to chance (0.4 % for 2^17).
    mse = float((X_hat_IJE - X_IJE).double().square().sum() / X_IJE.double().square().sum())
    bits = codec.bits(*W_RC.shape).codes / W_RC.numel()
    return {
        "codec": codec.type,
        "label": point.label,
        "options": point.options,
        "bits": bits,
        "mse": mse,
        "shannon_mse": 4**-bits,
        "gap_db": 10 * math.log10(mse * 4**bits),
        "effective_bits": -0.5 * math.log2(mse),
        "expected_mse": point.mse,
        "source": point.source,
        "num_weights": W_RC.numel(),
        "fit_seconds": fit_seconds,
        "encode_mweights_per_s": W_RC.numel() / encode_seconds / 1e6,
        "decode_mweights_per_s": W_RC.numel() / decode_seconds / 1e6,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _seconds(device: torch.device) -> Iterator[float]:
    """A clock that starts now; `next` reads it, at least a nanosecond."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def clock(start: float) -> Iterator[float]:
        while True:
            yield max(now() - start, 1e-9)

    return clock(now())
