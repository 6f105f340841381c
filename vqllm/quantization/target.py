"""The weights that the rounding rule is to come near to.

    weights    Ŵ ≈ W
    outputs    Ŵ x ≈ W x⁰             x⁰ what the linear read in the original model
    residual   r + Ŵ x ≈ r⁰ + W x⁰    r the residual stream that the output is added to

The last two are least-squares problems in Ŵ. With D = E[(x⁰ − x) xᵀ] and S = E[(r⁰ − r) xᵀ],

    E‖T − Ŵ x‖² = tr((W* − Ŵ) H (W* − Ŵ)ᵀ) + constant        W* = W + (W D + S) H⁻¹

so that any rule that minimises the proxy loss serves, with W* in place of W. The inverse is damped:
W* stays nearer to W in directions that calibration saw little of.

Source: Li et al., "GPTAQ", arXiv 2504.02692, and Zhang et al., "Qronos", arXiv 2505.11695 (outputs;
both put the term into GPTQ's loop, whose result is that of GPTQ for W* with the original order).
Arai and Ichikawa, "Quantization Error Propagation", arXiv 2504.09629 (W* in closed form).
"""

import torch
from torch import Tensor

from vqllm.calibration.drift import Drift
from vqllm.core import linalg


def corrected(W_RC: Tensor, H_CC: Tensor, drift: Drift, damping: float) -> Tensor:
    """W*, float32 [R, C].

    Args:
        W_RC: the original weights, float32.
        H_CC: E[x xᵀ] in the model with quantized layers, not damped.
        drift: of the linear's input, and of the stream where its output is added to that.
        damping: added to the diagonal of H, relative to its mean.
    """
    gap_RC = W_RC @ drift.input_CC
    if drift.residual_RC is not None:
        gap_RC = gap_RC + drift.residual_RC
    M_CC = linalg.cholesky(linalg.damp(H_CC, damping))
    return W_RC + torch.cholesky_solve((gap_RC / drift.mass).T, M_CC).T
