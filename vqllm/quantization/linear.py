"""Quantize the linears of one input group: transform, fit, round, pack, measure."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqllm.calibration import saliency
from vqllm.calibration.drift import Drift
from vqllm.core import linalg, metrics, rng
from vqllm.core.bits import count
from vqllm.core.protocols import JSON, Codec, OutputRounding
from vqllm.core.tiles import to_tiles
from vqllm.errors import NumericalError
from vqllm.plan.packed_spec import Transformed, bit_fields, linear_spec, transformed
from vqllm.quantization.target import corrected
from vqllm.recipes import Recipe
from vqllm_kernels.linear import LinearSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedLinear:
    """One packed linear.

    `tensors` are the stored tensors of `spec`; `W_hat_RC` is what a reader decodes from them, in
    the model's own basis, float32; `record` is its line of the report.
    """

    name: str
    spec: LinearSpec
    tensors: dict[str, Tensor]
    W_hat_RC: Tensor
    record: JSON


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
    """A linear to be quantized: as it is, as it is to be, and both transformed."""

    name: str
    W_RC: Tensor
    target_RC: Tensor
    H_CC: Tensor
    linear: Transformed
    H_damped: Tensor
    output_RR: Tensor | None


def quantize_group(
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    recipe: Recipe,
    codecs: Mapping[str, Codec] | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> list[QuantizedLinear]:
    """Quantize linears that read the same input. A pure function of its arguments.

    Args:
        weights: W [R, C] of each linear by full name, float32, all of the same C.
        statistics: of their input, and of their outputs.
        recipe: which transforms, codec and rounding.
        codecs: of linears that have another than the recipe's, by full name.
        trained: W after training, of all of them, which is rounded in place of the weights.
    """
    codecs = codecs or {}
    for name, W_RC in weights.items():
        _check_finite(name, W_RC)
    H_CC = statistics.H_CC
    targets = trained or _targets(weights, statistics, recipe)
    linears, H_prime = transformed(targets, H_CC, recipe)
    if not linalg.is_zero(H_CC):
        H_damped = linalg.damp(H_prime, recipe.hessian.damping)
    else:
        logger.warning(
            "the input of %s was zero on every calibration token: rounded to nearest",
            ", ".join(weights),
        )
        H_damped = torch.eye(len(H_CC), device=H_CC.device)
    results = []
    for name, linear in linears.items():
        output_RR = _output_hessian(name, linear, statistics, recipe)
        task = _Task(name, weights[name], targets[name], H_CC, linear, H_damped, output_RR)
        done = _quantize_linear(task, recipe.with_codec(codecs.get(name, recipe.codec)))
        if recipe.fragile is not None and done.record["proxy_loss"] > recipe.fragile.above:
            done = _quantize_again(task, recipe, done)
        done.record.update(
            group=list(weights),
            damping=recipe.hessian.damping,
            num_tokens=statistics.num_tokens,
            **_target_fields(weights[name], targets[name], statistics, recipe, bool(trained)),
        )
        results.append(done)
    return results


def _quantize_again(task: _Task, recipe: Recipe, first: QuantizedLinear) -> QuantizedLinear:
    """A linear that the recipe's codec loses too much of, by the codec for such."""
    assert recipe.fragile is not None, "asked for"
    done = _quantize_linear(task, recipe.for_fragile())
    before, after = first.record["proxy_loss"], done.record["proxy_loss"]
    if after >= before:  # of no use, and larger
        return first
    done.record["fragile"] = {"codec": first.record["codec"], "proxy_loss": before}
    logger.info(
        "%s is fragile: proxy loss %.3g at %.2f bits, %.3g at %.2f",
        *(task.name, before, first.record["bits_per_weight"]),
        *(after, done.record["bits_per_weight"]),
    )
    return done


def _quantize_linear(task: _Task, recipe: Recipe) -> QuantizedLinear:
    name, (R, C) = task.name, task.W_RC.shape
    try:
        tensors, mse, entropy = _encode(task, recipe)
    except NumericalError as error:
        raise NumericalError(f"{name}, damping {recipe.hessian.damping}: {error}") from error
    for i, state in enumerate(task.linear.states):
        tensors |= {f"t{i}_{key}": value for key, value in state.items()}
    # Copies: the input side's state is shared by the group, a fixed table by all linears, and
    # a file takes no tensors that share memory.
    tensors = {key: value.clone() for key, value in tensors.items()}
    spec = linear_spec(R, C, recipe)
    W_hat_RC = spec.dequantize(tensors)
    bits = count(spec.layout())
    record = {
        "name": name,
        "rows": R,
        "cols": C,
        "codec": recipe.codec.format_id,
        **bit_fields(bits, R * C),
        "code_entropy": round(entropy / (R * C), 4),
        "proxy_loss": metrics.proxy_loss(task.target_RC, W_hat_RC, task.H_CC),
        "sqnr_db": metrics.sqnr_db(task.W_RC, W_hat_RC),
        "gaussian_efficiency": metrics.gaussian_efficiency(mse, bits.codes / (R * C)),
    }
    return QuantizedLinear(name, spec, tensors, W_hat_RC, record)


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


def _encode(task: _Task, recipe: Recipe) -> tuple[dict[str, Tensor], float, float]:
    """Packed tensors of a transformed linear, its mean squared error at unit variance, and the
    entropy of its codes in bits."""
    name, W_RC, H_CC = task.name, task.linear.W_RC, task.H_damped
    rounding = recipe.rounding
    if isinstance(rounding, OutputRounding):
        assert task.output_RR is not None, "made for such rules"
        rounding = rounding.with_outputs(task.output_RR)
    codec = recipe.codec
    tile = codec.tile
    X_IJE = to_tiles(W_RC, tile)
    importance_CC = torch.diagonal(H_CC).expand(W_RC.shape)
    state = codec.fit(
        X_IJE, to_tiles(importance_CC, tile), rng.generator(recipe.seed, name, "codec")
    )
    codes_IJM, state = rounding(W_RC, H_CC, codec, state)
    for tuning in recipe.tuning:
        codes_IJM, state = tuning(W_RC, H_CC, codec, codes_IJM, state, rounding)
    tensors = codec.pack(codes_IJM, state)
    W_hat_RC = codec.spec().decode(tensors, *W_RC.shape)
    mse = float((W_hat_RC - W_RC).square().mean() / W_RC.square().mean().clamp_min(1e-30))
    return tensors, mse, sum(map(metrics.code_entropy, codec.streams(codes_IJM)))


def _check_finite(name: str, W_RC: Tensor) -> None:
    bad = int((~torch.isfinite(W_RC)).sum())
    if bad:
        raise NumericalError(
            f"{name}: {bad} of {W_RC.numel()} weights are NaN or infinite in the source model. "
            "Get an undamaged copy of it, or leave this linear out with a `skip` pattern."
        )
