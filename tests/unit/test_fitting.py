"""Least squares of codebooks and scales of one linear."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tests.unit.test_pv import CODEC_OPTIONS, Toy, codec_of
from vqllm.distillation.coded_weights import CodedWeights
from vqllm.distillation.fit_scales import fit

R, C = 24, 16


def still(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size), requires_grad=False)


@dataclass
class Dense:
    """A linear of given weights."""

    W_hat_RC: Tensor
    coded: CodedWeights | None = None
    rows: nn.Parameter = field(default_factory=lambda: still(R))
    columns: nn.Parameter = field(default_factory=lambda: still(C))

    def decoded(self) -> Tensor:
        return self.W_hat_RC

    def weights(self) -> Tensor:
        return (1 + self.rows)[:, None] * self.W_hat_RC * (1 + self.columns)


def problem() -> tuple[Tensor, Tensor, Dense]:
    """W, H of inputs that depend on each other, and a linear that is W and noise."""
    generator = torch.Generator().manual_seed(0)
    W_RC = torch.randn(R, C, generator=generator)
    x_NC = torch.randn(64, C, generator=generator) @ torch.randn(C, C, generator=generator)
    noisy_RC = W_RC + 0.3 * torch.randn(R, C, generator=generator)
    return W_RC, x_NC.T @ x_NC / 64, Dense(noisy_RC)


def loss(W_RC: Tensor, H_CC: Tensor, weights_RC: Tensor) -> Tensor:
    E_RC = W_RC - weights_RC
    return ((E_RC @ H_CC) * E_RC).sum() / ((W_RC @ H_CC) * W_RC).sum()


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_scales_end_where_the_loss_has_no_slope(kind: str) -> None:
    W_RC, H_CC, linear = problem()
    own = getattr(linear, kind)
    own.requires_grad_(True)

    def slope() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(W_RC, H_CC, linear.weights()), own)
        return gradient.abs().max()

    first = slope()
    before, after = fit(linear, W_RC, H_CC, [kind], 1)
    assert slope() < 0.01 * first
    assert after < 0.99 * before
    assert after == pytest.approx(float(loss(W_RC, H_CC, linear.weights().detach())), rel=1e-4)
    other = "columns" if kind == "rows" else "rows"
    assert not getattr(linear, other).any()


def test_what_cannot_be_fitted_stays() -> None:
    W_RC, H_CC, linear = problem()
    linear.W_hat_RC[3] = 0  # a row without a size
    linear.W_hat_RC[5] = -W_RC[5]  # one that a positive scale cannot mend
    H_CC[:, 2] = H_CC[2] = 0  # an input that is always 0
    before, after = fit(linear, W_RC, H_CC, ["columns", "rows"], 1)
    assert after < before
    assert linear.rows[3] == 0
    assert (linear.rows > -1).all()
    assert abs(float(linear.columns[2])) < 1e-3
    assert fit(linear, torch.zeros(R, C), H_CC, ["rows"], 1) == (0, 0)


def test_what_is_best_already_stays() -> None:
    W_RC, H_CC, _ = problem()
    linear = Dense(W_RC.clone())
    before, after = fit(linear, W_RC, H_CC, ["columns", "rows"], 1)
    assert before == after == 0
    assert not linear.rows.any()
    assert not linear.columns.any()


@pytest.mark.parametrize(
    "name", [name for name in CODEC_OPTIONS if name not in ("e8p", "d4", "trellis")]
)
def test_codebooks_of_every_codec_move_downhill(name: str) -> None:
    """Behind a Hadamard transform, with the codes of other weights; what is stored has the loss
    that is told."""
    toy = Toy(codec_of(name))
    coded = toy.coded
    W_RC, H_CC = toy.best.decoded(), toy.x.T @ toy.x + 0.01 * torch.eye(toy.x.shape[1])
    linear = Coded(coded)
    before, after = fit(linear, W_RC, H_CC, ["codebooks"], 20)
    assert after < before
    assert after == pytest.approx(float(loss(W_RC, H_CC, coded.decoded().detach())), rel=1e-3)
    stored = CodedWeights(coded.spec, coded.codec, coded.packed() | transforms(toy), torch.float32)
    assert after == pytest.approx(float(loss(W_RC, H_CC, stored.decoded().detach())), rel=0.01)


class Coded:
    def __init__(self, coded: CodedWeights) -> None:
        self.coded = coded
        self.rows, self.columns = still(coded.spec.rows), still(coded.spec.cols)

    def decoded(self) -> Tensor:
        return self.coded.weights_of(self.coded.state())


def transforms(toy: Toy) -> dict[str, Tensor]:
    return {f"t0_{key}": tensor for key, tensor in toy.coded._transforms[0].items()}
