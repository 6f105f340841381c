"""What the parity tests share: random packed tensors, and how large an error may be."""

import torch
from torch import Tensor

from vqllm_kernels.formats import FormatSpec


def random_tensors(spec: FormatSpec, rows: int, cols: int, device: str) -> dict[str, Tensor]:
    """Stored tensors of a linear with random codes (padding included), the same at every call."""
    generator = torch.Generator().manual_seed(rows * 100_003 + cols)
    tensors = {}
    for name, layout in spec.layout(rows, cols).items():
        if layout.dtype.is_floating_point:
            values = torch.randn(layout.shape, generator=generator) * 0.3 + 0.1
        else:
            info = torch.iinfo(layout.dtype)
            values = torch.randint(info.min, info.max + 1, layout.shape, generator=generator)
        tensors[name] = values.to(layout.dtype).to(device)
    return tensors


def random_activations(num_tokens: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 7919 + size)
    return torch.randn(num_tokens, size, generator=generator).to(dtype).to(device)


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖; NaN if anything was not written."""
    return float((value.double() - exact).norm() / exact.norm())


def plain_product(x_NC: Tensor, W_RC: Tensor) -> Tensor:
    """x Wᵀ with weights in the dtype of x, summed over the columns one after another in float32.

    How large its errors are does not depend on the processor, as it does for a product by torch.
    """
    x_CN, W_CR = x_NC.cpu().T.float(), W_RC.cpu().to(x_NC.dtype).T.float()
    sum_NR = torch.zeros(len(x_NC), len(W_RC))
    for x_N, W_R in zip(x_CN, W_CR, strict=True):
        sum_NR += x_N[:, None] * W_R
    return sum_NR.to(x_NC.device, x_NC.dtype)


def assert_no_worse(value: Tensor, naive: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of `naive`, in the same dtype, against float64; and twice
    the unit roundoff is always allowed."""
    assert value.dtype == naive.dtype
    assert value.shape == naive.shape
    roundoff = torch.finfo(value.dtype).eps / 2
    error, allowed = relative_rms(value, exact), 2 * max(relative_rms(naive, exact), roundoff)
    assert error <= allowed, f"relative RMS error {error:.2e}, allowed {allowed:.2e}"
