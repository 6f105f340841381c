"""Quantize the linears of one input group: transform, fit, round, pack, measure."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vqllm.calibration import saliency
from vqllm.calibration.drift import Drift
from vqllm.checkpoint.packed_matrix import LinearRecord, PackedMatrix, bit_fields
from vqllm.core import linalg, metrics, threads
from vqllm.core.distributed import Processes
from vqllm.core.protocols import JSON, Codec, OutputRounding
from vqllm.errors import NumericalError
from vqllm.plan.cuts import Cut, divided
from vqllm.plan.packed_spec import Transformed, linear_spec, transformed
from vqllm.quantization.encode import encode, fit, with_transforms
from vqllm.quantization.spreading import Spread
from vqllm.quantization.target import corrected
from vqllm.recipes import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What calibration found out about an input group."""

    H_CC: Tensor
    """E[x xᵀ] of the input, float32, not damped"""
    num_tokens: int
    drift: Drift | None = None
    """of the input from that in the original model; None where it is not known, which makes the
    weights themselves the target"""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """packed H_O by full name, for a rounding rule that asks for them"""


@dataclass(frozen=True)
class _Task:
    """A linear to be quantized: as it is, as it is to be, and the latter transformed."""

    name: str
    W_RC: Tensor
    target_RC: Tensor
    H_CC: Tensor
    """as measured"""
    linear: Transformed
    H_damped: Tensor
    """in the transformed basis"""
    output_RR: Tensor | None
    """H_O in that basis, if the rounding rule asks for it"""
    fields: JSON
    """of the record: what H was measured on, and what was aimed at"""
    rounders: Processes
    """those that round some of its rows each"""


def quantize_group(
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    recipe: Recipe,
    codecs: Mapping[str, Codec] | None = None,
    trained: Mapping[str, Tensor] | None = None,
    cuts: Mapping[str, Cut] | None = None,
    spread: Spread | None = None,
) -> list[PackedMatrix]:
    """Quantize linears that read the same input. A pure function of its arguments.

    Args:
        weights: W [R, C] of each linear by full name, float32, all of the same C.
        statistics: of their input, and of their outputs.
        recipe: which transforms, codec and rounding.
        codecs: of linears that have another than the recipe's, by full name.
        trained: W after training, of all of them, which is rounded in place of the weights.
        cuts: where processes that share the linears out cut them, by full name.
        spread: which processes quantize which; those of others are left out. All by default.

    Raises:
        NumericalError: weights that are not finite, or an H that cannot be factorized; names the
            linear.
    """
    codecs, spread = codecs or {}, spread or Spread()
    for name, W_RC in weights.items():
        _check_finite(name, W_RC)
    H_CC = statistics.H_CC
    # What is to be approximated: the weights, or weights that make up for earlier errors.
    targets = trained or _targets(weights, statistics, recipe)
    # The input side is transformed for the whole group, so that at run time it is done once.
    recipes = {name: divided(recipe, (cuts or {}).get(name)) for name in weights}
    linears, H_prime = transformed(targets, H_CC, recipe, recipes)
    H_damped = _damped(H_CC, H_prime, recipe, weights)
    del H_prime  # as large as H
    results = []
    for name, linear in linears.items():
        if not spread.is_here(name):
            continue
        own = recipes[name]
        task = _Task(
            name=name,
            W_RC=weights[name],
            target_RC=targets[name],
            H_CC=H_CC,
            linear=linear,
            H_damped=H_damped,
            output_RR=_output_hessian(name, linear, statistics, own),
            fields={
                "group": tuple(weights),
                "damping": recipe.hessian.damping,
                "num_tokens": statistics.num_tokens,
                **_target_fields(weights[name], targets[name], statistics, recipe, bool(trained)),
            },
            rounders=spread.rounders(name),
        )
        done = _quantize_linear(task, own.with_codec(codecs.get(name, recipe.codec)))
        if recipe.fragile is not None and done.record.proxy_loss > recipe.fragile.above:
            done = _quantize_again(task, own, done)
        results.append(done)
    return results


def _damped(H_CC: Tensor, H_prime: Tensor, recipe: Recipe, names: Iterable[str]) -> Tensor:
    """H in the transformed basis, made positive definite; the identity where no input was seen."""
    if not linalg.is_zero(H_CC):
        return linalg.damp(H_prime, recipe.hessian.damping, recipe.hessian.shrinkage)
    logger.warning(
        "the input of %s was zero on every calibration token: rounded to nearest", ", ".join(names)
    )
    return torch.eye(len(H_CC), device=H_CC.device)


def _quantize_again(task: _Task, recipe: Recipe, first: PackedMatrix) -> PackedMatrix:
    """A linear that the recipe's codec loses too much of, by the codec for such."""
    done = _quantize_linear(task, recipe.for_fragile())
    before, after = first.record, done.record
    if after.proxy_loss >= before.proxy_loss:  # of no use, and larger
        return first
    logger.info(
        "%s is fragile: proxy loss %.3g at %.2f bits, %.3g at %.2f",
        *(task.name, before.proxy_loss, before.bits_per_weight),
        *(after.proxy_loss, after.bits_per_weight),
    )
    fragile = {"codec": before.codec, "proxy_loss": before.proxy_loss}
    return replace(done, record=replace(after, fragile=fragile))


def _quantize_linear(task: _Task, recipe: Recipe) -> PackedMatrix:
    """Fit, round, pack and measure."""
    name, W_RC, (R, C) = task.name, task.linear.W_RC, task.W_RC.shape
    try:
        state = fit(name, recipe, W_RC, task.H_damped)
        encoded = encode(recipe, W_RC, task.H_damped, state, task.output_RR, task.rounders)
    except NumericalError as error:
        raise NumericalError(f"{name}, damping {recipe.hessian.damping}: {error}") from error
    # The error of the code alone, in the basis where it codes.
    coded_RC = recipe.codec.spec().decode(encoded.tensors, R, C)
    error, energy = (threads.mean(A_RC.square()) for A_RC in (coded_RC - W_RC, W_RC))
    mse = float(error / energy.clamp_min(1e-30))
    del coded_RC  # as large as the weights
    # Copies: the input side's state is shared by the group, a fixed table by all linears, and
    # a file takes no tensors that share memory.
    tensors = {
        key: value.clone()
        for key, value in with_transforms(encoded.tensors, task.linear.states).items()
    }
    spec = linear_spec(R, C, recipe)
    W_hat_RC = spec.dequantize(tensors)
    bits = bit_fields(spec)
    record = LinearRecord(
        name=name,
        rows=R,
        cols=C,
        codec=recipe.codec.format_id,
        **bits,
        code_entropy=round(encoded.entropy / (R * C), 4),
        proxy_loss=metrics.proxy_loss(task.target_RC, W_hat_RC, task.H_CC),
        sqnr_db=metrics.sqnr_db(task.W_RC, W_hat_RC),
        gaussian_efficiency=metrics.gaussian_efficiency(mse, bits["bits_codes"] / (R * C)),
        **task.fields,
    )
    return PackedMatrix(name, spec, tensors, record, W_hat_RC)


def _targets(
    weights: Mapping[str, Tensor], statistics: Statistics, recipe: Recipe
) -> Mapping[str, Tensor]:
    """What each linear's quantized weights are to come near to."""
    H_CC, drift = statistics.H_CC, statistics.drift
    if drift is None or linalg.is_zero(H_CC):
        return weights
    damping = recipe.target.damping
    try:
        return {name: corrected(W_RC, H_CC, drift, damping) for name, W_RC in weights.items()}
    except NumericalError as error:
        names = ", ".join(weights)
        raise NumericalError(f"{names}, damping {damping} of the target: {error}") from error


def _target_fields(
    W_RC: Tensor, target_RC: Tensor, statistics: Statistics, recipe: Recipe, trained: bool
) -> JSON:
    """Of a report line: what was aimed at, and how far that is from the weights themselves."""
    drift = statistics.drift
    if trained:
        target = "trained"
    elif recipe.target.of == "weights":
        return {}
    elif drift is None:
        return {"target": "weights", "target_change": 0.0}
    else:
        target = "outputs" if drift.residual_RC is None else "residual"
    return {
        "target": target,
        "target_change": metrics.proxy_loss(W_RC, target_RC, statistics.H_CC),
    }


def _output_hessian(
    name: str, linear: Transformed, statistics: Statistics, recipe: Recipe
) -> Tensor | None:
    """H_O in the basis of the transformed weights, if the rounding rule asks for it."""
    if not isinstance(recipe.rounding, OutputRounding):
        return None
    R = len(linear.W_RC)
    H_RR = saliency.unpack(statistics.outputs, name, R)
    if H_RR is None:
        logger.warning("%s: no gradient reached it, so its outputs count as uncoupled", name)
        H_RR = torch.eye(R)
    H_RR = H_RR.to(linear.W_RC.device)
    for transform, state in zip(recipe.transforms, linear.states):
        if transform.side == "out":
            spec = transform.spec(R)
            half_RR = spec.apply_inverse_transpose(H_RR, state)
            H_RR = spec.apply_inverse_transpose(half_RR.T, state)
    return (H_RR + H_RR.T) / 2


def _check_finite(name: str, W_RC: Tensor) -> None:
    bad = int((~torch.isfinite(W_RC)).sum())
    if bad:
        raise NumericalError(
            f"{name}: {bad} of {W_RC.numel()} weights are NaN or infinite in the source model. "
            "Get an undamaged copy of it, or leave this linear out with a `skip` pattern."
        )
