"""How far the model with quantized layers has drifted from the original one, around a linear.

The two models run side by side. For a linear with the input x⁰ in the original model and x in the
quantized one,

    D = E[(x⁰ − x) xᵀ]      drift of its input
    S = E[(r⁰ − r) xᵀ]      drift of the residual stream to which its output is added

are all that the best weights for the quantized model depend on, beside H = E[x xᵀ]
(`vqllm.quantization.target`).
S is known for a linear whose output is added to the stream as it is, or times a number. To find
out, the layer runs with the linear and without it, its output replaced by zeros. The stream before
the linear, r, is the layer's output when it and all linears after it return zeros.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqllm.core import threads

INPUT, RESIDUAL = "input", "residual"
"""Names of the two sums."""
ROUNDING_ERRORS = 8
"""Units of the last place by which a sum of the stream and an output may differ from the layer's
own, where some layers add in another order."""


@dataclass
class Drift:
    """Running sums over tokens, float32; E[..] is a sum over `mass`, the sum of the weights."""

    input_CC: Tensor
    """Σ w (x⁰ − x) xᵀ"""
    residual_RC: Tensor | None = None
    """Σ w (r⁰ − r) xᵀ, or None where the output is not added to the stream"""
    mass: float = 0.0
    parts: Collection[str] = (INPUT, RESIDUAL)
    """the sums that this process adds up"""

    @classmethod
    def empty(cls, linear: nn.Linear, residual: bool, device: torch.device) -> "Drift":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        rows, cols = linear.out_features, linear.in_features
        return cls(zeros(cols, cols), zeros(rows, cols) if residual else None)

    def add(self, x0_NC: Tensor, x_NC: Tensor, weight_N: Tensor | None) -> None:
        """Add the inputs of a batch of tokens in both models."""
        self.mass += len(x_NC) if weight_N is None else float(threads.total(weight_N))
        if INPUT in self.parts:
            x_NC = x_NC.float()
            gap_NC = _weighted(x0_NC.float() - x_NC, weight_N)
            self.input_CC.addmm_(gap_NC.T, x_NC)

    def add_residual(self, gap_NR: Tensor, x_NC: Tensor, weight_N: Tensor | None) -> None:
        """Add the drift r⁰ − r of the stream before the linear, for tokens that `add` was given."""
        assert self.residual_RC is not None, "asked for when the drift was begun"
        if RESIDUAL in self.parts:
            self.residual_RC.addmm_(_weighted(gap_NR.float(), weight_N).T, x_NC.float())

    def sums(self) -> dict[str, Tensor]:
        """The sums by name."""
        residual = {} if self.residual_RC is None else {RESIDUAL: self.residual_RC}
        return {INPUT: self.input_CC, **residual}


@dataclass(frozen=True)
class Writer:
    """A linear whose output y changes what the layer returns by gain · y."""

    gain: float
    later: tuple[nn.Linear, ...]
    """the linears that run after it in the layer"""


def writers(
    run: Callable[[], Tensor], linears: Mapping[str, nn.Linear], order: Iterable[tuple[str, ...]]
) -> dict[str, Writer]:
    """The linears of a layer that add to its residual stream, by full name.

    Args:
        run: the layer on a few tokens, whose output [S, L, D] it returns.
        linears: of the layer, by full name.
        order: names of the linears that read the same input, in the order in which they run. Those
            that share it with others are not tested.
    """
    by_name = {}
    order = list(order)
    width = run().shape[-1]
    for i, names in enumerate(order):
        linear = linears[names[0]]
        if len(names) == 1 and linear.out_features == width:
            later = tuple(linears[name] for group in order[i + 1 :] for name in group)
            gain = _gain(run, linear, later)
            if gain is not None:
                by_name[names[0]] = Writer(gain, later)
    return by_name


def _gain(run: Callable[[], Tensor], linear: nn.Linear, later: Iterable[nn.Linear]) -> float | None:
    """The factor with which an output is added to the layer's result, or None if it is not."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: object, y: Tensor) -> None:
        outputs.append(y)

    # The result with the linear and without it. All later linears return zeros, so that they do not
    # react to its output.
    with silenced(later):
        handle = linear.register_forward_hook(keep)
        try:
            with_it = run()
        finally:
            handle.remove()
        with silenced([linear]):
            without = run()
    if len(outputs) != 1 or outputs[0].numel() != with_it.numel():
        return None
    y = outputs[0].float().reshape(with_it.shape)  # some models join the axes of the tokens
    change = with_it.float() - without.float()
    # The least-squares fit change ≈ gain · y must be exact up to rounding.
    gain = float(threads.total(change * y) / threads.total(y.square()).clamp_min(1e-30))
    parts = without.float().abs() + (gain * y).abs() + with_it.float().abs()
    tolerance = ROUNDING_ERRORS * torch.finfo(with_it.dtype).eps * parts
    added = bool(((change - gain * y).abs() <= tolerance).all())
    return gain if added and gain != 0 else None


@contextmanager
def silenced(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Within, these linears return zeros."""
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(_silent(linear))
        yield


@contextmanager
def _silent(linear: nn.Linear) -> Iterator[None]:
    own = linear.__dict__.get("forward")

    def zeros(input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], linear.out_features)

    linear.forward = zeros
    try:
        yield
    finally:
        del linear.forward
        if own is not None:
            linear.forward = own


def _weighted(x_NC: Tensor, weight_N: Tensor | None) -> Tensor:
    return x_NC if weight_N is None else x_NC * weight_N[:, None]
