"""Scales and codebooks of least loss: the solutions of torch.linalg.lstsq, after few steps."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.support.unstored import Unstored
from tests.unit.test_rounding import hessian, rule, weights
from vqllm.codecs import CODECS
from vqllm.core.least_squares import StateProblem
from vqllm.core.protocols import Codec, State
from vqllm.core.tiles import to_tiles


class Scaled(Unstored):
    """Integers from -2 to 1, and a scale for every row of tiles of 3 x 2."""

    type: Literal["scaled"] = "scaled"

    @property
    def tile(self) -> tuple[int, int]:
        return 3, 2

    @property
    def num_symbols(self) -> int:
        return 6

    @property
    def row_state(self) -> frozenset[str]:
        return frozenset({"scale"})

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        return {"scale": X_IJE.std((1, 2))}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        return (X_IJE / state["scale"][:, None, None]).round().clamp(-2, 1).to(torch.int32)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return state["scale"][:, None, None] * codes_IJM

    def project(self, state: State) -> State:
        return state


def problem(
    codec: Codec, rows: int = 24, cols: int = 40, rounding: str = "ldlq"
) -> tuple[StateProblem, State]:
    """Rows of very different size, so that common step lengths would suit none."""
    size_R1 = torch.logspace(-1, 1, rows)[:, None]
    W_RC, H_CC = size_R1 * weights(rows, cols).float(), hessian("mixed", cols).float()
    state = codec.fit(to_tiles(W_RC, codec.tile), None, torch.Generator().manual_seed(0))
    codes_IJM, state = rule(rounding)(W_RC, H_CC, codec, state)
    return StateProblem(W_RC, H_CC, codec, codes_IJM), state


def solved(found: StateProblem, state: State, steps: int) -> State:
    learned = {name: t.float() for name, t in state.items() if t.is_floating_point()}
    move = found.least_squares(state, learned, steps)
    return {**state, **{name: t + move[name] for name, t in learned.items()}}


def lstsq(found: StateProblem, state: State, name: str) -> Tensor:
    """The tensor `name` of least loss, from the reproductions of unit vectors, float64."""
    M_CC = torch.linalg.cholesky(found.H_CC.double())
    zeros = torch.zeros_like(state[name], dtype=torch.float32)
    base_RC = found.W_hat({**state, name: zeros}).double()
    units = torch.eye(zeros.numel()).unflatten(1, zeros.shape)
    columns = [((found.W_hat({**state, name: unit}) - base_RC) @ M_CC).flatten() for unit in units]
    target = ((found.W_RC.double() - base_RC) @ M_CC).flatten()
    solution = torch.linalg.lstsq(torch.stack(columns, 1), target[:, None]).solution
    return solution.reshape(zeros.shape)


def build(**values: Any) -> Codec:
    return CODECS.get(values["type"]).model_validate(values)


UNIFORM = {"type": "uniform", "bits": 3, "group": None}
CASES: dict[str, tuple[Codec, str, int]] = {
    "a scale for the matrix": (build(type="e8p"), "scale", 1),
    "a scale a row": (build(**UNIFORM), "scale", 1),
    "three scales a row": (build(**{**UNIFORM, "group": 16}), "scale", 3),
    "a scale a row of tiles": (Scaled(), "scale", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_as_many_steps_as_a_row_has_scales_solve_it_exactly(name: str) -> None:
    codec, tensor, steps = CASES[name]
    found, state = problem(codec)
    best = lstsq(found, state, tensor)
    exact = solved(found, state, steps)[tensor]
    torch.testing.assert_close(exact.double(), best, rtol=2e-4, atol=1e-6)
    assert found.loss({**state, tensor: exact}) < 0.999 * found.loss(state)
    more = solved(found, state, 10 * steps)[tensor]
    torch.testing.assert_close(more.double(), best, rtol=2e-4, atol=1e-6)


def test_a_row_of_zeros_keeps_its_scale() -> None:
    codec = build(**UNIFORM)
    found, state = problem(codec)
    codes_IJM = found.codes_IJM.clone()
    codes_IJM[3, :, 0] = int(state["zero"][3])
    found = StateProblem(found.W_RC, found.H_CC, codec, codes_IJM)
    scale = solved(found, state, 3)["scale"]
    assert bool(scale.isfinite().all())
    assert float(scale[3]) == float(state["scale"][3])
    assert float(scale[4]) != float(state["scale"][4])


def test_rows_are_solved_as_if_they_were_alone() -> None:
    codec = build(**{**UNIFORM, "group": 16})
    found, state = problem(codec)
    together = solved(found, state, 2)["scale"]
    for row in (0, 7, 23):
        own = slice(row, row + 1)
        alone = StateProblem(found.W_RC[own], found.H_CC, codec, found.codes_IJM[own])
        scale = solved(alone, {name: t[own] for name, t in state.items()}, 2)["scale"]
        torch.testing.assert_close(scale[0], together[row], rtol=1e-5, atol=0)


def test_rows_below_whole_tiles_do_not_count() -> None:
    found, state = problem(Scaled(), rows=25, rounding="nearest")
    best = lstsq(found, state, "scale")
    exact = solved(found, state, 1)["scale"]
    torch.testing.assert_close(exact.double(), best, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_stored_is_never_worse(name: str) -> None:
    codec, _, steps = CASES[name]
    found, state = problem(codec)
    improved, loss = found.improved(state, steps)
    assert loss == found.loss(improved) < found.loss(state)
    again, loss_again = found.improved(improved, steps)
    assert loss_again <= loss
    assert {n: t.dtype for n, t in again.items()} == {n: t.dtype for n, t in state.items()}
