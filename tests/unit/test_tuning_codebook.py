"""Codebook tuning: the least squares that it solves, that nothing gets worse, the alternation."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from tests.support.unstored import Unstored
from tests.unit import test_rounding
from tests.unit.test_beam import hessian, loss, reproduced, rule, weights
from vqllm import recipes
from vqllm.codecs import CODECS
from vqllm.core import metrics
from vqllm.core.least_squares import StateProblem
from vqllm.core.protocols import Codec, State
from vqllm.core.tiles import to_tiles
from vqllm.errors import RecipeError
from vqllm.quantization import linear as group
from vqllm.rounding.nearest import Nearest
from vqllm.tuning import TUNINGS
from vqllm.tuning.codebook import Codebook

KMEANS = {"type": "kmeans", "tile_cols": 4, "index_bits": 4, "iterations": 4}
ADDITIVE = {"type": "additive", "tile_cols": 4, "index_bits": 4, "iterations": 4, "rounds": 2}
CODECS_BY_NAME: dict[str, dict[str, Any]] = {
    "kmeans": KMEANS,
    "kmeans-2x2": {**KMEANS, "tile_rows": 2, "tile_cols": 2},
    "additive": ADDITIVE,
    "residual": {"type": "residual", "stages": [KMEANS, KMEANS]},
    "e8p": {"type": "e8p"},
    "e81b+e8p": {"type": "residual", "stages": [{"type": "e81b"}, {"type": "e8p"}]},
    "uniform": {"type": "uniform", "bits": 3, "group": 16},
}
each_codec = pytest.mark.parametrize("name", CODECS_BY_NAME)


def tuning(**options: Any) -> Codebook:
    return Codebook.model_validate({"type": "codebook", **options})


def rounded(
    name: str, W_RC: Tensor, H_CC: Tensor, rounding: str = "ldlq"
) -> tuple[Codec, Tensor, State]:
    values = (CODECS_BY_NAME | test_rounding.CODECS_BY_NAME)[name]
    codec = CODECS.get(values["type"]).model_validate(values)
    state = codec.fit(to_tiles(W_RC, codec.tile), None, torch.Generator().manual_seed(1))
    codes_IJM, state = rule(rounding)(W_RC, H_CC, codec, state)
    return codec, codes_IJM, state


class Exponential(Unstored):
    """exp(rate · code), which is not linear in what is learned; `rate` is stored in steps."""

    type: Literal["exponential"] = "exponential"
    step: ClassVar[float] = 2**-10

    @property
    def tile(self) -> tuple[int, int]:
        return (1, 1)

    def fit(self, X_IJE: Tensor, weight_IJE: Tensor | None, generator: torch.Generator) -> State:
        return {"rate": torch.ones(1)}

    def encode(
        self, X_IJE: Tensor, state: State, col: int = 0, weight_E: Tensor | None = None
    ) -> Tensor:
        return (X_IJE.log() / state["rate"]).round().to(torch.int32)

    def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
        return torch.exp(state["rate"] * codes_IJM)

    @property
    def row_state(self) -> frozenset[str]:
        return frozenset()

    def project(self, state: State) -> State:
        return {"rate": (state["rate"] / self.step).round() * self.step}


class Scripted(Nearest):
    """Chooses the codes it is given, or those of other rows, and counts how often."""

    worse: int = 0
    calls: ClassVar[list[float]] = []

    def refine(
        self, W_RC: Tensor, H_CC: Tensor, codec: Codec, codes_IJM: Tensor, state: State
    ) -> tuple[Tensor, State]:
        self.calls.append(loss(codes_IJM, W_RC, H_CC, codec, state))
        return codes_IJM.flip(0) if self.worse else codes_IJM, state


class TestSteps:
    def test_they_lead_to_the_solution_of_the_normal_equations(self) -> None:
        W, H = weights(24, 32), hessian(32)
        codec, codes, state = rounded("kmeans", W, H)
        problem = StateProblem(W, H, codec, codes)
        move = problem.least_squares(state, {"codebook": state["codebook"].float()}, 60)
        found = {"codebook": state["codebook"].float() + move["codebook"]}
        # Column (entry, element) of J is 1 where that entry's element stands.
        one_hot_IJK = torch.nn.functional.one_hot(codes[..., 0].long(), 16).double()
        J = torch.einsum("ijk,ef->ijekf", one_hot_IJK, torch.eye(4).double())
        J_RCS = J.flatten(3).flatten(1, 2)
        HJ_RCS = torch.einsum("cd,rds->rcs", H.double(), J_RCS)
        A = torch.einsum("rcs,rct->st", J_RCS, HJ_RCS)
        b = torch.einsum("rcs,rc->s", HJ_RCS, W.double())
        best = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution.reshape(16, 4)
        assert problem.loss(found) == pytest.approx(
            problem.loss({"codebook": best.float()}), rel=1e-4
        )

    @each_codec
    def test_each_lowers_the_loss(self, name: str) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded(name, W, H, "nearest")
        problem = StateProblem(W, H, codec, codes)
        learned = {k: v.float() for k, v in state.items() if v.is_floating_point()}
        losses = []
        for steps in range(9):
            move = problem.least_squares(state, learned, steps)
            moved = {k: v + move[k] for k, v in learned.items()}
            losses.append(problem.loss({**state, **moved}))
        assert losses[0] == pytest.approx(problem.loss(state), rel=1e-6)
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
        assert losses[-1] < losses[0]

    def test_one_scale_has_a_closed_form(self) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded("e8p", W, H)
        points = reproduced(codes, codec, {"scale": torch.ones(1)}, W)
        best = float(((W @ H) * points).sum() / ((points @ H) * points).sum())
        _, tuned = tuning()(W, H, codec, codes, state, rule("ldlq"))
        assert float(tuned["scale"]) == pytest.approx(best, rel=1e-4)
        assert float(state["scale"]) != pytest.approx(best, rel=1e-3)

    def test_a_decoder_that_is_not_linear(self) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-3, 3, (8, 16, 1), generator=generator)
        W, H, codec = torch.exp(0.5 * codes[..., 0]), hessian(16), Exponential()
        for rate in (0.2, 0.4, 0.6, 1.0, 1.5):
            state, before = {"rate": torch.tensor([rate])}, float("inf")
            for _ in range(12):
                _, state = tuning()(W, H, codec, codes, state, Nearest())
                after = loss(codes, W, H, codec, state)
                assert after <= before
                before = after
            assert float(state["rate"]) == 0.5


class TestResult:
    @each_codec
    @pytest.mark.parametrize("rounding", ["nearest", "ldlq"])
    def test_the_loss_does_not_rise_and_the_state_can_be_stored(
        self, name: str, rounding: str
    ) -> None:
        W, H = weights(25, 43), hessian(43)
        codec, codes, state = rounded(name, W, H, rounding)
        before = {k: v.clone() for k, v in state.items()}
        same_codes, tuned = tuning()(W, H, codec, codes, state, rule(rounding))
        assert torch.equal(same_codes, codes)
        assert loss(codes, W, H, codec, tuned) < loss(codes, W, H, codec, state)
        _, unpacked = codec.unpack(codec.pack(codes, tuned), *W.shape)
        for key, value in before.items():
            assert torch.equal(state[key], value), "the state that was given is left alone"
            assert torch.equal(unpacked[key], tuned[key])
            assert tuned[key].dtype == value.dtype

    @each_codec
    def test_the_best_state_stays(self, name: str) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded(name, W, H)
        losses = [loss(codes, W, H, codec, state)]
        for _ in range(4):
            _, state = tuning(steps=60)(W, H, codec, codes, state, rule("ldlq"))
            losses.append(loss(codes, W, H, codec, state))
        assert all(after <= before for before, after in pairwise(losses))
        assert losses[-1] > 0.99 * losses[-2]

    @pytest.mark.parametrize("name", test_rounding.CODECS_BY_NAME)
    def test_every_codec_can_be_tuned(self, name: str) -> None:
        W, H = weights(37, 43), hessian(43)
        codec, codes, state = rounded(name, W, H)
        _, tuned = tuning()(W, H, codec, codes, state, rule("ldlq"))
        assert loss(codes, W, H, codec, tuned) <= loss(codes, W, H, codec, state)
        _, unpacked = codec.unpack(codec.pack(codes, tuned), *W.shape)
        assert all(torch.equal(unpacked[k], v) for k, v in tuned.items())

    def test_nothing_learned_is_nothing_tuned(self) -> None:
        class Fixed(Exponential):
            def decode(self, codes_IJM: Tensor, state: State, col: int = 0) -> Tensor:
                return codes_IJM.float()

        W, H = weights(4, 8), hessian(8)
        codes = W.round()[..., None]
        assert tuning()(W, H, Fixed(), codes, {}, Nearest()) == (codes, {})

    def test_it_works_without_gradients_around_it(self) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded("additive", W, H)
        _, expected = tuning()(W, H, codec, codes, state, rule("ldlq"))
        with torch.no_grad():
            _, tuned = tuning()(W, H, codec, codes, state, rule("ldlq"))
        assert all(torch.equal(tuned[k], v) for k, v in expected.items())


class TestRounds:
    @pytest.mark.parametrize("name", ["kmeans", "additive", "residual"])
    @pytest.mark.parametrize("rounding", ["ldlq", "beam"])
    def test_they_lower_the_loss_further(self, name: str, rounding: str) -> None:
        W, H = weights(32, 48), hessian(48)
        codec, codes, state = rounded(name, W, H, rounding)
        losses = [loss(codes, W, H, codec, state)]
        for rounds in range(3):
            new_codes, tuned = tuning(rounds=rounds, tolerance=0)(
                W, H, codec, codes, state, rule(rounding)
            )
            losses.append(loss(new_codes, W, H, codec, tuned))
        assert all(after <= before for before, after in pairwise(losses))
        assert losses[-1] < 0.99 * losses[1]

    def test_codes_that_are_worse_are_not_taken(self) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded("kmeans", W, H)
        _, only = tuning()(W, H, codec, codes, state, rule("ldlq"))
        worse = Scripted(worse=1)
        kept, tuned = tuning(rounds=3, tolerance=0)(W, H, codec, codes, state, worse)
        assert torch.equal(kept, codes)
        assert torch.equal(tuned["codebook"], only["codebook"])

    @pytest.mark.parametrize(("tolerance", "calls"), [(0.5, 1), (0.0, 1)])
    def test_they_end_when_they_gain_little(self, tolerance: float, calls: int) -> None:
        W, H = weights(24, 40), hessian(40)
        codec, codes, state = rounded("kmeans", W, H)
        for _ in range(5):
            _, state = tuning(steps=60)(W, H, codec, codes, state, Nearest())
        Scripted.calls.clear()
        tuning(rounds=6, tolerance=tolerance)(W, H, codec, codes, state, Scripted())
        assert len(Scripted.calls) == calls


class TestRecipe:
    VALUES: ClassVar[dict[str, Any]] = {
        "name": "x",
        "codec": ADDITIVE,
        "rounding": {"type": "beam", "passes": 1},
    }

    def test_default_is_none(self) -> None:
        assert recipes.from_dict(self.VALUES, "test").tuning == ()
        assert recipes.from_dict(self.VALUES, "test").to_dict()["tuning"] == []

    def test_steps_follow_the_rounding(self) -> None:
        W, H = weights(32, 64), hessian(64)
        losses = []
        for steps in ([], [{"type": "codebook"}], [{"type": "codebook", "rounds": 2}]):
            tuned = recipes.from_dict({**self.VALUES, "tuning": steps}, "test")
            assert recipes.from_dict(tuned.to_dict(), "test") == tuned
            (linear,) = group.quantize_group({"a": W}, group.Statistics(H, 1000), tuned)
            losses.append(linear.record.proxy_loss)
            assert metrics.proxy_loss(W, linear.W_hat_RC, H) == losses[-1]
        assert losses[2] < losses[1] < losses[0]

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([{"type": "codebok"}], "unknown tuning 'codebok'. Did you mean 'codebook'"),
            ([{"steps": 3}], "a tuning needs a `type`"),
            ([{"type": "codebook", "step": 3}], "step: unknown key"),
            ([{"type": "codebook", "steps": 0}], "steps"),
            ([{"type": "codebook", "tolerance": 1}], "tolerance"),
        ],
    )
    def test_mistakes_are_refused(self, steps: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            recipes.from_dict({**self.VALUES, "tuning": steps}, "test")

    def test_the_registry_lists_it(self) -> None:
        assert "codebook" in TUNINGS
