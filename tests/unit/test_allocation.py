"""A budget of bits: the choice against all choices, the losses it is based on against real ones."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gaussian import gaussian
from tests.support.params import slow
from tests.support.tiny import save_tiny
from vqllm import recipes
from vqllm.allocation import Item, allocate, gaussian_mse
from vqllm.allocation import sensitivity as sensitivity_module
from vqllm.allocation.expected_loss import expected_losses
from vqllm.allocation.sensitivity import Sensitivity
from vqllm.errors import NumericalError, RecipeError
from vqllm.quantization.checks import check_model
from vqllm.quantization.linear import Statistics, quantize_group

RATES = (1, 1.5, 2, 3, 4)


def items(num: int, seed: int) -> list[Item]:
    """Items of different sizes and sensitivities, with losses as of codes at these rates."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (num,), generator=generator).tolist()
    scales = torch.randn(num, generator=generator).mul(2).exp().tolist()
    return [
        Item(
            tuple(round(2 * rate) * size for rate in RATES),
            tuple(scale * size * 4**-rate for rate in RATES),
        )
        for size, scale in zip(sizes, scales)
    ]


def totals(chosen: list[Item], picks: tuple[int, ...] | list[int]) -> tuple[int, float]:
    cost = sum(item.costs[pick] for item, pick in zip(chosen, picks))
    return cost, sum(item.losses[pick] for item, pick in zip(chosen, picks))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_the_same_cost_is_better_and_few_bits_are_left(seed: int) -> None:
    given = items(5, seed)
    cheapest = sum(item.costs[0] for item in given)
    for budget in range(cheapest, cheapest * 4, 3):
        cost, loss = totals(given, allocate(given, budget))
        assert cost <= budget
        best, best_within = float("inf"), float("inf")
        for picks in itertools.product(range(len(RATES)), repeat=len(given)):
            other_cost, other_loss = totals(given, picks)
            if other_cost <= cost:
                best = min(best, other_loss)
            if other_cost <= budget:
                best_within = min(best_within, other_loss)
        # Steps that are skipped because they do not fit let later ones in: at most one step is
        # lost to that, which with 5 items can be much; without a skip it is the optimum.
        assert best_within <= loss <= 2 * best_within + 1e-12, (budget, loss, best_within)
    every = sum(item.costs[-1] for item in given)
    assert allocate(given, every) == [len(RATES) - 1] * len(given)


def test_many_items_come_within_one_percent_of_the_bound() -> None:
    """The bound is the least total loss if options could be mixed: Lagrange's."""
    given = items(200, 1)
    budget = 3.9 * sum(item.costs[0] for item in given) / 2
    cost, loss = totals(given, allocate(given, budget))
    assert budget - cost < 8
    bound = max(
        sum(min(a + m * c for a, c in zip(item.losses, item.costs)) for item in given) - m * budget
        for m in torch.logspace(-6, 2, 400).tolist()
    )
    assert bound <= loss <= 1.01 * bound


def test_options_above_the_hull_are_never_chosen() -> None:
    item = Item((1, 2, 3, 4), (1.0, 0.9, 0.5, 0.5))
    assert [allocate([item], budget) for budget in (1, 2, 3, 9)] == [[0], [0], [2], [2]]
    with pytest.raises(ValueError, match=r"cost 1, more than the budget of 0\.5"):
        allocate([item], 0.5)


def test_order_of_equal_items_decides_ties() -> None:
    item = Item((1, 2), (1.0, 0.5))
    assert allocate([item] * 4, 6) == [1, 1, 0, 0]


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": {"type": "trellis", "bits": 2, "state_bits": 8},
        "rounding": {"type": "ldlq"},
        **changes,
    }


def budget_of(bits: float, *codecs: dict[str, Any]) -> dict[str, Any]:
    return {"allocation": {"bits": bits, "codecs": list(codecs)}}


def test_codecs_without_a_type_change_that_of_the_recipe() -> None:
    changed = recipes.from_dict(values(**budget_of(2, {"bits": 1}, {"type": "e8p"})), "test")
    first, second = changed.codecs
    assert first.model_dump() == {**changed.codec.model_dump(), "bits": 1}
    assert second.type == "e8p"
    again = recipes.from_dict(changed.to_dict(), "again")
    assert again == changed
    alike = changed.with_codec(first)
    assert alike.codec == first
    assert alike.allocation is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (budget_of(2, {"bits": 2}), "allocation.codecs: .* at least 2 items"),
        (budget_of(0, {"bits": 2}, {"bits": 3}), "allocation.bits: .* greater than 0"),
        (budget_of(2, {"bits": 2}, {"bits": 99}), "99"),
        (budget_of(2, {"bits": 2}, {"bit": 3}), "bit"),
        (budget_of(2, {"bits": 2}, {"type": "no"}), "no"),
        (
            {**budget_of(2, {"type": "e8p"}, {"bits": 3}), "rounding": {"type": "beam"}},
            "beam",
        ),
    ],
)
def test_what_cannot_be_allocated_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.from_dict(values(**changes), "test")


def test_too_small_a_budget_is_refused_before_the_run(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    small = recipes.from_dict(values(**budget_of(1.4, {"bits": 1.5}, {"bits": 3})), "test")
    with pytest.raises(RecipeError, match=r"is 1\.4, but the cheapest .* takes 1\.5 bits a weight"):
        check_model(source, "tiny", small)


@pytest.mark.parametrize(
    ("options", "mse"),
    [({"type": "e8p"}, 0.0925), ({"type": "trellis", "bits": 3, "state_bits": 8}, 0.0237)],
)
def test_gaussian_mse_is_that_of_the_tables(options: dict[str, Any], mse: float) -> None:
    codec = recipes.from_dict(values(codec=options), "test").codec
    assert gaussian_mse(codec) == pytest.approx(mse, rel=0.02)
    assert gaussian_mse(codec) == gaussian_mse(codec)


def hessian(cols: int, seed: int) -> torch.Tensor:
    x = gaussian(2000, 20, seed=seed) @ gaussian(20, cols, seed=seed + 1)
    x += gaussian(2000, cols, seed=seed + 2)
    return x.T @ x / 2000


@pytest.mark.parametrize("rounding", ["ldlq", "nearest"])
@pytest.mark.parametrize(("bits", "off"), [(1, 0.45), (2, 0.15), (4, 0.08)])
@pytest.mark.parametrize("other", [False, True], ids=["same H", "other H"])
@pytest.mark.parametrize("cols", [slow(256), 100])
def test_expected_losses_are_what_rounding_leaves(
    rounding: str, bits: int, off: float, other: bool, cols: int
) -> None:
    codec = {"type": "trellis", "bits": bits, "state_bits": 8}
    chosen = recipes.from_dict(values(rounding={"type": rounding}, codec=codec), "test")
    W = 0.3 * gaussian(192, cols)
    H = hessian(cols, 1)
    H_F = hessian(cols, 7) if other else H
    (done,) = quantize_group({"a": W}, Statistics(H, 2000), chosen)
    E = done.W_hat_RC - W
    measured = float((E @ H_F * E).sum()) / 2
    (expected,) = expected_losses("a", W, (H, H_F), chosen, [gaussian_mse(chosen.codec)])
    assert expected == pytest.approx(measured, rel=off)


def test_expected_losses_of_an_input_that_is_zero_or_not_finite() -> None:
    chosen = recipes.from_dict(values(), "test")
    W, zero, bad = gaussian(32, 32), torch.zeros(32, 32), torch.full((32, 32), torch.nan)
    assert expected_losses("a", W, (zero, zero), chosen, [0.1, 0.2]) == [0, 0]
    for hessians in ((bad, torch.eye(32)), (torch.eye(32), bad)):
        with pytest.raises(NumericalError, match="a, gradients in its outputs"):
            expected_losses("a", W, hessians, chosen, [0.1])


class Judged:
    """A judge that keeps what it was given."""

    def __init__(self) -> None:
        self.hessians: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, name: str, W: torch.Tensor, hessians: tuple[torch.Tensor, torch.Tensor]
    ) -> list[float]:
        self.hessians[name] = hessians
        return [7.0]


def visited(
    x: torch.Tensor, g: torch.Tensor, power: float, batch: int
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """After sequences of inputs and gradients of a linear "a"; "b" is not reached."""
    judge = Judged()
    sensitivity = Sensitivity(judge, x.shape[0] * x.shape[1], power)
    linear = torch.nn.Linear(x.shape[-1], g.shape[-1])
    sensitivity.begin({"a": linear, "b": linear})
    for start in range(0, len(x), batch):
        rows = slice(start, min(start + batch, len(x)))
        sensitivity.visit("a", rows, x[rows], g[rows])
    found = sensitivity.finish()
    return found, judge.hessians["a"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_sensitivity_is_that_of_whole_sequences(power: float) -> None:
    x, g = gaussian(4, 6, 8), gaussian(4, 6, 5, seed=1)
    found, (H, H_F) = visited(x, g, power, 3)
    weights = g.square().mean(-1) ** power
    torch.testing.assert_close(H, torch.einsum("sl,slc,sld->cd", weights, x, x))
    gradient_SRC = torch.einsum("slr,slc->src", g, x)
    expected = torch.einsum("src,srd->cd", gradient_SRC, gradient_SRC) / 5 / 24
    torch.testing.assert_close(H_F, expected)
    assert {name: losses.tolist() for name, losses in found.items()} == {"a": [7], "b": []}
    # ½ E[(Σ gᵀ E x)²] a token for errors with independent entries of variance 1, drawn.
    E_KRC = gaussian(4000, 5, 8, seed=2)
    drawn = torch.einsum("src,krc->sk", gradient_SRC, E_KRC).square().mean(1).sum() / 24 / 2
    assert float(torch.trace(H_F)) * 5 / 2 == pytest.approx(float(drawn), rel=0.05)


def test_tokens_of_experts_count_as_independent() -> None:
    x, g = gaussian(7, 8), gaussian(7, 5, seed=1)
    judge = Judged()
    sensitivity = Sensitivity(judge, 24, 1.0)
    sensitivity.begin({"a": torch.nn.Linear(8, 5)})
    sensitivity.visit("a", slice(0, 4), x, g)
    sensitivity.finish()
    expected = torch.einsum("nr,nc,nd->cd", g.square(), x, x) / 5
    torch.testing.assert_close(judge.hessians["a"][0], expected)
    torch.testing.assert_close(judge.hessians["a"][1], expected / 24)


@pytest.mark.parametrize("batch", [4, 5, 40])
def test_of_many_tokens_some_sequences_count(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity_module, "FEWEST_TOKENS", 100)
    x, g = gaussian(40, 30, 8), gaussian(40, 30, 5, seed=1)
    _, (H, H_F) = visited(x, g, 0.0, batch)
    _, (H_few, H_F_few) = visited(x[::12], g[::12], 0.0, 1)
    torch.testing.assert_close(H, H_few)
    torch.testing.assert_close(H_F, H_F_few * 12 * 4 / 40)
