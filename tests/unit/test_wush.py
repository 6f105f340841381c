"""The WUSH transform: optimal as it claims, safe for any W and H, of use to codes."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vqllm.core import linalg, metrics, rng
from vqllm.core.hadamard import matrix
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.recipes import from_dict
from vqllm.runtime import VQLinear, set_weight_cache
from vqllm.transforms.wush import DAMPING, LARGEST_GAIN, Wush
from vqllm_kernels.transforms import BlockDiagonalSpec

BLOCK = 16
SIZE = 64


def correlated(rows: int, cols: int, seed: int, decay: float = 1.5) -> Tensor:
    """Rows of a Gaussian vector with eigenvalues i^(-2 decay) in random directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    directions_CC = torch.linalg.qr(randn(cols, cols)).Q
    return (randn(rows, cols) * torch.arange(1, cols + 1) ** -decay) @ directions_CC


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """W [256, 64] and H of inputs with other directions."""
    x_NC = correlated(4096, SIZE, 1)
    return correlated(256, SIZE, 0, decay=0.5), x_NC.T @ x_NC / len(x_NC)


def wush(**options: Any) -> Wush:
    return Wush.model_validate({"side": "in", "block": BLOCK, **options})


def fitted(part: Wush, W_RC: Tensor, H_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W', H' and A as a dense matrix."""
    W_prime, H_prime, state = part.forward(W_RC, H_CC, rng.generator(0, "linear", "transform0"))
    size = len(H_CC)
    A = part.spec(size).apply(torch.eye(size, dtype=torch.float64), state).T
    return W_prime, H_prime, A


def blocks(A_CC: Tensor) -> Tensor:
    return linalg.diagonal_blocks(A_CC, BLOCK)


def damped(M_KGG: Tensor) -> Tensor:
    mean = torch.diagonal(M_KGG, dim1=-2, dim2=-1).mean(-1)
    return M_KGG + DAMPING * mean[:, None, None] * torch.eye(BLOCK)


@dataclass
class Moments:
    """What the paper's loss of each block depends on, for any T: tr(T⁻ᵀ M_W T⁻¹) tr(T M_X Tᵀ)."""

    M_W: Tensor
    M_X: Tensor

    @classmethod
    def of(cls, W_RC: Tensor, H_CC: Tensor) -> "Moments":
        M_W = blocks(W_RC.T @ W_RC / len(W_RC))
        return cls(damped(M_W), damped(blocks(linalg.damp(H_CC, DAMPING))))

    def loss(self, T: Tensor) -> Tensor:
        inverse = torch.linalg.inv(T)
        in_weights = (inverse.mT @ self.M_W @ inverse).diagonal(dim1=-2, dim2=-1).sum(-1)
        in_inputs = (T @ self.M_X @ T.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        return in_weights * in_inputs

    def bound(self) -> Tensor:
        """The squared nuclear norm of B_Wᵀ B_X, whatever roots B are taken: here symmetric ones."""
        return torch.linalg.svdvals(_root(self.M_W) @ _root(self.M_X)).sum(-1) ** 2


def _root(M: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return vectors * values.sqrt()[..., None, :] @ vectors.mT


def test_no_other_transform_has_a_smaller_loss(data: tuple[Tensor, Tensor]) -> None:
    moments = Moments.of(*data)
    _, _, A = fitted(wush(), *data)
    T = blocks(A)
    loss, bound = moments.loss(T), moments.bound()
    # float16 leaves it 3e-7 to 6e-7 above the bound.
    torch.testing.assert_close(loss, bound, rtol=2e-6, atol=0)
    hadamard = matrix(BLOCK).double().expand_as(T)
    identity = torch.eye(BLOCK).double().expand_as(T)
    torch.testing.assert_close(moments.loss(hadamard), moments.loss(identity))
    assert bool((loss < 0.8 * moments.loss(hadamard)).all())
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 0.1, 0.01, 0.001):
        for _ in range(20):
            noise = torch.randn(T.shape, generator=generator, dtype=torch.float64)
            assert bool((moments.loss(T + size * noise * T.norm() / noise.norm()) > bound).all())
            rotation = torch.linalg.qr(noise).Q
            torch.testing.assert_close(moments.loss(rotation), moments.loss(hadamard))
            torch.testing.assert_close(moments.loss(rotation @ T), loss)


def test_weights_and_inputs_get_the_same_moments(data: tuple[Tensor, Tensor]) -> None:
    """W' and x' of a block differ by a number only, and no feature is larger than another."""
    moments = Moments.of(*data)
    _, _, A = fitted(wush(), *data)
    T = blocks(A)
    in_inputs = T @ moments.M_X @ T.mT
    in_weights = torch.linalg.inv(T).mT @ moments.M_W @ torch.linalg.inv(T)
    ratio = in_inputs.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ratio = ratio / in_weights.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    assert (in_inputs - ratio * in_weights).norm() < 2e-3 * in_inputs.norm()
    diagonal = in_inputs.diagonal(dim1=-2, dim2=-1)
    assert (diagonal.std(1) / diagonal.mean(1)).max() < 2e-3


def test_gains_of_blocks(data: tuple[Tensor, Tensor]) -> None:
    W_RC, H_CC = data
    W_RC = W_RC * torch.linspace(1, 30, SIZE)
    even, _, A = fitted(wush(), W_RC, H_CC)
    energy_K = even.unflatten(1, (-1, BLOCK)).square().mean((0, 2))
    assert energy_K.std() / energy_K.mean() < 0.02
    assert torch.linalg.slogdet(A).logabsdet.abs() < 0.01
    W_prime, H_prime, A = fitted(wush(gains="balanced"), W_RC, H_CC)
    assert torch.linalg.slogdet(A).logabsdet.abs() < 0.01

    def loss(W_prime: Tensor, H_prime: Tensor, gain_K: Tensor) -> float:
        """‖W'‖² tr H' of all blocks, which a code with one scale loses."""
        gain_C = gain_K.repeat_interleave(BLOCK)
        energy = (W_prime / gain_C).square().sum()
        return float(energy * (gain_C.square() * H_prime.diagonal()).sum())

    least = loss(W_prime, H_prime, torch.ones(SIZE // BLOCK))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        change = torch.randn(SIZE // BLOCK, generator=generator, dtype=torch.float64)
        assert loss(W_prime, H_prime, (0.2 * change).exp()) > 0.9999 * least
    assert least < loss(*fitted(wush(), W_RC, H_CC)[:2], torch.ones(SIZE // BLOCK))


def test_blocks_of_one_feature_are_the_scale_by_the_hessian(data: tuple[Tensor, Tensor]) -> None:
    W_RC, H_CC = data
    _, _, A = fitted(wush(block=1, gains="balanced"), W_RC, H_CC)
    scale = (W_RC.square().mean(0) / H_CC.diagonal()) ** 0.25
    relative = A.diagonal() / (scale / scale.log().mean().exp())
    assert (relative.max() / relative.min() - 1) < 0.06  # the damping of H
    assert torch.equal(A, A.diag().diag())


def test_feedback_balances_what_is_left_of_the_input(data: tuple[Tensor, Tensor]) -> None:
    W_RC, H_CC = data
    size = SIZE - 7  # the last block is one of 9
    W_RC, H_CC = W_RC[:, :size], H_CC[:size, :size]
    H_damped = linalg.damp(H_CC, DAMPING)
    _, _, A = fitted(wush(moments="feedback"), W_RC, H_CC)
    D_prime = _conditional(A @ H_damped @ A.T)
    inverse = torch.linalg.inv(A)
    moments = inverse.T @ (W_RC.T @ W_RC / len(W_RC)) @ inverse
    for k, D in enumerate(D_prime):
        own = slice(k * BLOCK, k * BLOCK + len(D))
        M_W = moments[own, own]
        # Equal but for the damping of both, 1 % of the mean in all directions.
        difference = D / D.trace() - M_W / M_W.trace()
        assert difference.norm() < 0.1 * (M_W / M_W.trace()).norm()


def _conditional(H_CC: Tensor) -> list[Tensor]:
    """The covariance of each block given the features before it."""
    found = []
    for start in range(0, len(H_CC), BLOCK):
        own, before = slice(start, start + BLOCK), slice(0, start)
        B = torch.linalg.solve(H_CC[before, before], H_CC[before, own])
        found.append(H_CC[own, own] - H_CC[own, before] @ B)
    return found


def extreme(name: str) -> tuple[Tensor, Tensor]:
    W_RC, x_NC = correlated(32, 40, 2), correlated(400, 40, 3)
    if name == "dead inputs":
        x_NC[:, 3], x_NC[:, 16:32] = 0, 0
    elif name == "dead weights":
        W_RC[:, 3], W_RC[:, 16:32] = 0, 0
    elif name == "one token, one row":
        W_RC, x_NC = W_RC[:1], x_NC[:1]
    elif name == "all zero":
        W_RC, x_NC = 0 * W_RC, 0 * x_NC
    elif name == "spikes":
        W_RC[:, 5] *= 1e6
        x_NC[:, 6] *= 1e6
    elif name == "far apart":
        W_RC[:, :16] *= 1e8
        x_NC[:, :16] *= 1e-8
    elif name == "tiny":
        W_RC, x_NC = 1e-12 * W_RC, 1e-12 * x_NC
    return W_RC, x_NC.T @ x_NC / len(x_NC)


EXTREMES = (
    "dead inputs",
    "dead weights",
    "one token, one row",
    "all zero",
    "spikes",
    "far apart",
    "tiny",
)


@pytest.mark.parametrize("moments", ["hessian", "feedback"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_and_inputs_are_safe(name: str, moments: str) -> None:
    W_RC, H_CC = extreme(name)
    part = wush(moments=moments)
    W_prime, H_prime, state = part.forward(W_RC.float(), H_CC.float(), torch.Generator())
    spec = part.spec(40)
    assert spec.problem(state) is None
    assert bool(torch.isfinite(W_prime).all() and torch.isfinite(H_prime).all())
    for T in (*state["blocks"].double(), state["last"].double()):
        values = torch.linalg.svdvals(T)
        assert values.max() < 1.02 * (1 + len(T) / DAMPING) ** 0.5 * values.min()
        gain = torch.linalg.slogdet(T).logabsdet / len(T)
        assert gain.abs() < 1.01 * torch.tensor(LARGEST_GAIN).log()
    back = part.inverse(W_prime, state)
    assert (back - W_RC).norm() <= 2e-6 * W_RC.norm()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 37, 40])
@pytest.mark.parametrize("side", ["in", "out"])
def test_spec_serves_every_size_on_both_sides(side: Literal["in", "out"], size: int) -> None:
    spec = BlockDiagonalSpec(side=side, size=size, block=min(BLOCK, size))
    generator = torch.Generator().manual_seed(size)
    state = {
        name: (torch.eye(t.shape[-1]) + 0.1 * torch.randn(t.shape, generator=generator)).half()
        for name, t in spec.layout().items()
    }
    assert sum(T.shape[-1] * len(T) if T.dim() == 3 else len(T) for T in state.values()) == size
    W_RC = torch.randn(5, size) if side == "in" else torch.randn(size, 5)
    x_NC = torch.randn(3, W_RC.shape[1])
    W_prime = spec.forward(W_RC, state)
    y = spec.input(x_NC, state) @ W_prime.T if side == "in" else x_NC @ W_prime.T
    y = y if side == "in" else spec.output(y, state)
    torch.testing.assert_close(y, x_NC @ W_RC.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spec.inverse(W_prime, state), W_RC, rtol=1e-4, atol=1e-4)
    assert spec.apply(torch.zeros(0, size), state).shape == (0, size)


def test_blocks_that_cannot_be_undone_are_refused() -> None:
    spec = BlockDiagonalSpec(side="in", size=7, block=3)
    state = {"blocks": torch.eye(3).repeat(2, 1, 1).half(), "last": torch.ones(1, 1).half()}
    assert spec.problem(state) is None
    state["blocks"][1, 2] = 0
    assert spec.problem(state) == "1 of the matrices of blocks have no inverse"
    state["blocks"][1, 2, 2] = torch.nan
    assert spec.problem(state) == "1 of the 18 numbers of blocks are NaN or infinite"


def test_the_output_side_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="needs `side: in`"):
        Wush.model_validate({"side": "out"})


def recipe(transforms: list[dict[str, Any]], rounding: str, codec: dict[str, Any]) -> Any:
    values = {"name": "x", "transforms": transforms, "codec": codec}
    return from_dict({**values, "rounding": {"type": rounding}}, "here")


UNIFORM = {"type": "uniform", "bits": 4, "group": 64}
HADAMARD = {"type": "hadamard", "side": "in"}


def proxy_loss(data: tuple[Tensor, Tensor], rounding: str, *transforms: dict[str, Any]) -> float:
    W_RC, H_CC = data[0].float(), data[1].float()
    made = quantize_group(
        {"w": W_RC}, Statistics(H_CC, 1), recipe(list(transforms), rounding, UNIFORM)
    )[0]
    return metrics.proxy_loss(W_RC, made.W_hat_RC, H_CC)


def test_rounding_to_nearest_loses_less_than_after_a_hadamard_transform(
    data: tuple[Tensor, Tensor],
) -> None:
    W_RC, H_CC = data
    W_prime, H_prime, _ = fitted(wush(), W_RC, H_CC)
    expected = W_prime.square().sum() * H_prime.trace() / (W_RC.square().sum() * H_CC.trace())
    loss = proxy_loss(data, "nearest", {"type": "wush", "side": "in", "block": BLOCK})
    hadamard = proxy_loss(data, "nearest", HADAMARD)
    assert 0.7 * expected < loss / hadamard < 1.05 * expected < 0.25


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_linear_runs_as_it_decodes(
    cache: Literal["on", "off"], data: tuple[Tensor, Tensor]
) -> None:
    """19 outputs and 57 inputs: a last block of 9."""
    W_RC, H_CC = data[0][:19, :57].float(), data[1][:57, :57].float()
    transforms = [{"type": "wush", "side": "in"}, HADAMARD]
    made = quantize_group(
        {"w": W_RC}, Statistics(H_CC, 1), recipe(transforms, "ldlq", {"type": "e8p"})
    )[0]
    assert made.record.bits_side == 8 * (64 // 8) + 16 * (3 * 16 * 16 + 9 * 9) + 32
    linear = VQLinear.from_tensors(made.spec, made.tensors, None, torch.float32)
    x_NC = torch.randn(5, 57, generator=torch.Generator().manual_seed(1))
    set_weight_cache(cache)
    try:
        y = linear(x_NC)
    finally:
        set_weight_cache("auto")
    torch.testing.assert_close(y, x_NC @ made.W_hat_RC.T, rtol=1e-4, atol=1e-5)
