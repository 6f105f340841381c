"""What every registered transform promises, on both sides, at odd and even sizes."""

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from vqllm.core import metrics, rng
from vqllm.core.bits import count
from vqllm.core.protocols import Transform
from vqllm.transforms import TRANSFORMS
from vqllm_kernels import transforms as specs
from vqllm_kernels.layout import check
from vqllm_kernels.transforms import HadamardSpec

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "hadamard": [{}, {"block": 16}],
    "scale": [
        {"by": "rms"},
        {"by": "rms", "alpha": 0.5},
        {"by": "rms", "alpha": 0.5, "bits": 3},
        {"by": "max"},
        {"by": "hessian"},
    ],
    "permutation": [{"by": "hessian"}, {"by": "norm"}, {"by": "random"}],
    "wush": [{}, {"block": 7, "gains": "balanced"}, {"moments": "feedback", "block": 8}],
}
SIZES = [(37, 43), (48, 96), (1, 5), (172, 64)]


def parts() -> list[Any]:
    cases = []
    for name in TRANSFORMS:
        for options, side in product(OPTIONS[name], ("in", "out")):
            if side == "out" and (name == "wush" or options.get("by") == "hessian"):
                continue
            part = TRANSFORMS.get(name).model_validate({"type": name, "side": side, **options})
            label = "-".join(str(value) for value in (name, side, *options.values()))
            cases.append(pytest.param(part, id=label))
    return cases


every_part = pytest.mark.parametrize("part", parts())
every_size = pytest.mark.parametrize(("rows", "cols"), SIZES)


def problem(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W and H with features of very different size, a dead feature, and tokens x; float64."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W_RC = randn(rows, cols) * torch.exp(randn(rows, 1)) * torch.exp(randn(cols))
    x_NC = randn(3 * cols, cols) * torch.exp(2 * randn(cols))
    if cols > 5:
        x_NC[:, 2] = 0
        W_RC[:, 3] = 0
    if rows > 5:
        W_RC[4] = 0
    H_CC = x_NC.T @ x_NC / len(x_NC)
    return W_RC, (H_CC + H_CC.T) / 2, x_NC[:11]


def draw() -> torch.Generator:
    return rng.generator(7, "linear", "transform")


@every_part
@every_size
def test_inverse_gives_back_the_weights(part: Transform, rows: int, cols: int) -> None:
    W_RC, H_CC, _ = problem(rows, cols)
    W_prime, _, state = part.forward(W_RC, H_CC, draw())
    assert W_prime.dtype == W_RC.dtype
    torch.testing.assert_close(part.inverse(W_prime, state), W_RC, atol=1e-11, rtol=1e-11)


@every_part
@every_size
def test_run_time_undoes_it(part: Transform, rows: int, cols: int) -> None:
    W_RC, H_CC, x_NC = problem(rows, cols)
    W_prime, _, state = part.forward(W_RC, H_CC, draw())
    y_NR = part.wrap_output(part.wrap_input(x_NC, state) @ W_prime.T, state)
    torch.testing.assert_close(y_NR, x_NC @ W_RC.T, atol=1e-9, rtol=1e-9)


@every_part
def test_run_time_undoes_it_in_the_dtype_of_the_model(part: Transform) -> None:
    W_RC, H_CC, x_NC = problem(48, 96)
    W_prime, _, state = part.forward(W_RC, H_CC, draw())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        # In units that float16 holds; only the transforms are done in `dtype`.
        unit = x_NC.abs().max() / 100
        x_prime = part.wrap_input((x_NC / unit).to(dtype), state)
        assert x_prime.dtype == dtype
        y_prime = x_prime.double() @ W_prime.T
        y_unit = y_prime.abs().max() / 100
        y = part.wrap_output((y_prime / y_unit).to(dtype), state)
        assert y.dtype == dtype
        expected = x_NC @ W_RC.T
        error = (y.double() * unit * y_unit - expected).norm() / expected.norm()
        assert error < tolerance


@every_part
@every_size
def test_proxy_loss_is_the_same_in_both_bases(part: Transform, rows: int, cols: int) -> None:
    W_RC, H_CC, _ = problem(rows, cols)
    W_prime, H_prime, state = part.forward(W_RC, H_CC, draw())
    energy = torch.trace(W_RC @ H_CC @ W_RC.T)
    noise = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)).double()
    W_hat = part.inverse(W_prime + noise, state)
    if part.side == "in" or isinstance(part.spec(rows), HadamardSpec | specs.PermutationSpec):
        # Side "out" scales change the weight of rows; the proxy loss there is that of the rows.
        torch.testing.assert_close(
            torch.trace(W_prime @ H_prime @ W_prime.T), energy, rtol=1e-9, atol=0
        )
        assert metrics.proxy_loss(W_prime, W_prime + noise, H_prime) == pytest.approx(
            metrics.proxy_loss(W_RC, W_hat, H_CC), rel=1e-9
        )
    else:
        spec = part.spec(rows)
        assert isinstance(spec, specs.ScaleSpec)
        d_R1 = spec.scale(state).double()[:, None]
        torch.testing.assert_close(W_hat - W_RC, d_R1 * noise, atol=1e-10, rtol=1e-9)


@every_part
@every_size
def test_hessian_stays_symmetric_and_positive(part: Transform, rows: int, cols: int) -> None:
    W_RC, H_CC, _ = problem(rows, cols)
    _, H_prime, _ = part.forward(W_RC, H_CC, draw())
    assert torch.equal(H_prime, H_prime.T)
    eigenvalues = torch.linalg.eigvalsh(H_prime)
    assert eigenvalues.min() >= -1e-12 * eigenvalues.max()
    if part.side == "out":
        assert torch.equal(H_prime, H_CC)


@every_part
@every_size
def test_state_is_what_the_spec_stores(part: Transform, rows: int, cols: int) -> None:
    W_RC, H_CC, _ = problem(rows, cols)
    _, _, state = part.forward(W_RC, H_CC, draw())
    spec = part.spec(cols if part.side == "in" else rows)
    check(state, spec.layout(), part.type)
    assert count(spec.layout()).total == 8 * sum(t.nbytes for t in state.values())
    assert count(spec.layout()).total == count(spec.layout()).side


@every_part
def test_same_input_same_result_and_input_left_alone(part: Transform) -> None:
    W_RC, H_CC, _ = problem(37, 43)
    before = W_RC.clone(), H_CC.clone()
    first = part.forward(W_RC, H_CC, draw())
    second = part.forward(W_RC, H_CC, draw())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert torch.equal(W_RC, before[0])
    assert torch.equal(H_CC, before[1])


@every_part
@every_size
def test_spec_survives_json(part: Transform, rows: int, cols: int) -> None:
    spec = part.spec(cols if part.side == "in" else rows)
    values = spec.to_dict()
    assert "size" not in values
    assert specs.from_dict(values, spec.size) == spec
    assert TRANSFORMS.get(part.type).model_validate(part.model_dump()) == part


@every_part
def test_apply_and_its_inverses_are_consistent(part: Transform) -> None:
    W_RC, H_CC, _ = problem(37, 43)
    _, _, state = part.forward(W_RC, H_CC, draw())
    size = 43 if part.side == "in" else 37
    spec = part.spec(size)
    eye = torch.eye(size, dtype=torch.float64)
    A = spec.apply(eye, state).T  # rows of the result are A e_i
    torch.testing.assert_close(spec.apply_inverse(eye, state).T, A.inverse())
    torch.testing.assert_close(spec.apply_transpose(eye, state).T, A.T)
    torch.testing.assert_close(spec.apply_inverse_transpose(eye, state).T, A.inverse().T)


def make(name: str, **options: Any) -> Transform:
    return TRANSFORMS.get(name).model_validate({"type": name, **options})


def test_every_registered_transform_is_in_the_battery() -> None:
    assert set(TRANSFORMS) == set(OPTIONS)


def test_hadamard_spreads_a_spike() -> None:
    W_RC = torch.zeros(64, 96)
    W_RC[5, 7] = 1
    for side, size in (("in", 96), ("out", 64)):
        W_prime, _, _ = make("hadamard", side=side).forward(W_RC, torch.eye(96), draw())
        assert W_prime.abs().max() == pytest.approx(size**-0.5, rel=1e-5)


def test_hadamard_signs_come_from_the_generator() -> None:
    W_RC, H_CC, _ = problem(48, 96)
    part = make("hadamard", side="in")
    one = part.forward(W_RC, H_CC, rng.generator(1, "a", "transform0"))[2]["signs"]
    other = part.forward(W_RC, H_CC, rng.generator(1, "b", "transform0"))[2]["signs"]
    assert not torch.equal(one, other)


def test_rms_scales_even_out_columns_and_rows() -> None:
    W_RC, H_CC, _ = problem(48, 96)
    for side, axis in (("in", 0), ("out", 1)):
        W_prime, _, state = make("scale", side=side, by="rms").forward(W_RC, H_CC, draw())
        rms = W_prime.square().mean(axis).sqrt()
        used = rms > 0
        assert int((~used).sum()) == 1
        assert rms[used].std() / rms[used].mean() < 1e-3
        d = state["scale"].double()
        assert d[~used] == 1
        assert d[used].log().mean().abs() < 1e-3


def test_rms_scale_minimises_what_it_says() -> None:
    """|W/d|² det(d H d)^(1/C) over all d: no random change of d makes it smaller."""
    W_RC, H_CC, _ = problem(48, 30)
    W_RC[:, 3] = 1
    W_RC = W_RC / 10
    _, _, state = make("scale", side="in", by="rms").forward(W_RC, H_CC, draw())
    log_d = state["scale"].double().log()

    def bound(log_d: torch.Tensor) -> float:
        return float((W_RC / log_d.exp()).square().sum() * torch.exp(2 * log_d.mean()))

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
        assert bound(log_d) < bound(log_d + step)


def test_hessian_scale_minimises_what_it_says() -> None:
    """|W/d|² tr(d H d) over all d."""
    W_RC, H_CC, _ = problem(48, 30)
    W_RC[:, 3], H_CC[2, 2] = 1, 1
    _, _, state = make("scale", side="in", by="hessian").forward(W_RC, H_CC, draw())
    log_d = state["scale"].double().log()

    def loss(log_d: torch.Tensor) -> float:
        weight = torch.exp(2 * log_d) * torch.diagonal(H_CC)
        return float((W_RC / log_d.exp()).square().sum() * weight.sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
        assert loss(log_d) < loss(log_d + step)


def test_alpha_softens_the_scale() -> None:
    W_RC, H_CC, _ = problem(48, 96)
    whole, half, none = (
        make("scale", side="in", alpha=alpha).forward(W_RC, H_CC, draw())[2]["scale"].double()
        for alpha in (1, 0.5, 0)
    )
    torch.testing.assert_close(half.square(), whole, rtol=3e-3, atol=0)
    assert bool((none == 1).all())


def test_scale_stays_in_range_for_extreme_weights() -> None:
    W_RC = torch.ones(4, 6)
    W_RC[:, 0], W_RC[:, 1] = 1e8, 1e-8
    W_prime, H_prime, state = make("scale", side="in").forward(W_RC, torch.eye(6), draw())
    assert state["scale"].max() == 256
    assert state["scale"].min() == 1 / 256
    assert bool(torch.isfinite(W_prime).all() and torch.isfinite(H_prime).all())


@pytest.mark.parametrize("side", ["in", "out"])
def test_scales_of_few_bits_are_near_those_of_many(side: str) -> None:
    W_RC, H_CC, _ = problem(300, 400)
    part = make("scale", side=side)
    exact = part.forward(W_RC, H_CC, draw())[2]["scale"].double().log()
    size, before = len(exact), torch.inf
    for bits in range(1, 9):
        part = make("scale", side=side, bits=bits)
        _, _, state = part.forward(W_RC, H_CC, draw())
        spec = part.spec(size)
        assert isinstance(spec, specs.CodedScaleSpec)
        assert count(spec.layout()).total == 16 * 2**bits + 8 * -(-size * bits // 8)
        error = (spec.scale(state).double().log() - exact).square().mean()
        assert error < 0.7 * before
        before = error
        levels = state["levels"].double().log()
        assert bool((levels.diff() >= 0).all())
        if bits == 3:
            # The least error of 8 levels for a Gaussian is 0.0345 (Max, 1960).
            assert 0.02 < error / exact.var() < 0.045


def test_scales_of_few_bits_serve_equal_and_single_features() -> None:
    for W_RC in (torch.ones(3, 5), torch.ones(3, 1), torch.zeros(3, 5)):
        for bits in (1, 4):
            part = make("scale", side="in", bits=bits)
            size = W_RC.shape[1]
            W_prime, _, state = part.forward(W_RC, torch.eye(size), draw())
            assert torch.equal(W_prime, W_RC)
            assert part.spec(size).problem(state) is None
            state["levels"][1] = 0
            assert part.spec(size).problem(state) == "1 entries of levels are 0"


def test_permutation_orders() -> None:
    W_RC, H_CC, _ = problem(48, 96)
    _, H_prime, _ = make("permutation", side="in", by="hessian").forward(W_RC, H_CC, draw())
    assert bool((torch.diagonal(H_prime).diff() <= 0).all())
    for side, axis in (("in", 0), ("out", 1)):
        W_prime, _, _ = make("permutation", side=side, by="norm").forward(W_RC, H_CC, draw())
        assert bool((W_prime.norm(dim=axis).diff() <= 1e-12).all())


@pytest.mark.parametrize(
    "values",
    [
        {"type": "scale", "side": "out", "by": "hessian"},
        {"type": "permutation", "side": "out", "by": "hessian"},
        {"type": "wush", "side": "out"},
        {"type": "wush", "side": "in", "block": 0},
        {"type": "scale", "side": "in", "alpha": 1.5},
        {"type": "scale", "side": "in", "bits": 0},
        {"type": "scale", "side": "in", "bits": 9},
        {"type": "hadamard", "side": "up"},
        {"type": "hadamard", "side": "in", "block": 0},
        {"type": "hadamard", "side": "in", "blocks": 64},
    ],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TRANSFORMS.get(values["type"]).model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fourier", "side": "in"}, "unknown transform 'fourier'"),
        ({"side": "in"}, "unknown transform None"),
        ({"kind": "hadamard", "side": "in"}, r"fields \['side'\], expected \['block', 'side'\]"),
        ({"kind": "scale", "side": "in", "by": 1}, "fields"),
        ({"kind": "scale", "side": "up"}, "neither 'in' nor 'out'"),
        ({"kind": "coded_scale", "side": "in", "bits": 9}, "codes of 9 bits; allowed are 1 to 8"),
        ({"kind": "hadamard", "side": "in", "block": 5}, "block of 5 does not divide 12"),
        ({"kind": "block_diagonal", "side": "in", "block": 0}, "blocks of 0 features, of 12"),
        ({"kind": "block_diagonal", "side": "in", "block": 13}, "blocks of 13 features, of 12"),
    ],
)
def test_specs_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs.from_dict(values, 12)


def test_a_transform_of_no_features_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 feature"):
        specs.from_dict({"kind": "scale", "side": "in"}, 0)
