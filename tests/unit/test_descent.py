"""Adam with looks, on a parabola whose lowest point is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from vqllm.errors import ModelError, NumericalError
from vqllm.tuning.descent import batch, descend

GOAL = torch.tensor([0.3, -0.2])


class Parabola:
    """Its loss is NaN in some calls with gradients, and offset in looks."""

    def __init__(self, broken: set[int] | None = None) -> None:
        self.point = nn.Parameter(torch.zeros(2))
        self.unused = nn.Parameter(torch.ones(1))
        self.broken = broken or set()
        self.num_calls = self.num_looks = 0

    def loss(self, step: int) -> list[Tensor]:
        self.num_calls += 1
        parts = [(self.point[i] - GOAL[i]).square() for i in range(2)]
        return [part * math.nan for part in parts] if self.num_calls in self.broken else parts

    def look(self) -> float:
        self.num_looks += 1
        return float((self.point.detach() - GOAL).square().sum())

    def run(self, steps: int = 80, rate: float = 0.02) -> dict:
        parameters = [(self.point, rate), (self.unused, rate)]
        return descend(parameters, steps, self.loss, self.look, "parabola")


def test_it_arrives() -> None:
    parabola = Parabola()
    told = parabola.run()
    assert told["before"] == pytest.approx(0.13)
    assert told["after"] < 1e-4
    assert told["after"] == parabola.look()
    assert torch.equal(parabola.unused, torch.ones(1))
    assert parabola.point.grad is None


def test_the_same_again() -> None:
    one, other = Parabola(), Parabola()
    assert one.run() == other.run()
    assert torch.equal(one.point, other.point)


def test_the_best_state_stays_and_looks_that_find_none_end_it() -> None:
    parabola = Parabola()
    begin = GOAL + 0.001
    with torch.no_grad():
        parabola.point.copy_(begin)
    told = parabola.run(rate=0.5)
    assert (told["best_step"], told["faults"]) == (0, 0)
    assert 0 < told["after"] == told["before"] < 1e-5
    assert torch.equal(parabola.point, begin)
    assert parabola.num_looks == 4  # one before, three that found nothing better
    assert parabola.num_calls == 30


def test_fewer_steps_than_looks() -> None:
    parabola = Parabola()
    told = parabola.run(steps=2)
    assert parabola.num_calls == 2
    assert told["best_step"] == 2


def test_a_loss_that_is_not_finite_goes_back_with_half_the_rates(caplog) -> None:
    parabola = Parabola(broken={25, 60})
    told = parabola.run()
    assert told["faults"] == 2
    assert told["after"] < 1e-3
    assert (
        "parabola: step 24: loss or gradient is not finite; back to step 20 with half"
        in caplog.text
    )


def test_each_fault_halves_the_steps() -> None:
    moved = []
    for broken in (set(), {1}, {1, 2}):
        parabola = Parabola(broken)
        parabola.run(steps=1, rate=1.0)
        moved.append(parabola.point.detach().abs())  # of Adam's first step, its length
    torch.testing.assert_close(moved[1], moved[0] / 2)
    torch.testing.assert_close(moved[2], moved[0] / 4)
    assert bool((moved[0] > 0).all())


def test_after_a_fault_the_moments_begin_anew() -> None:
    before, after = Parabola(), Parabola(broken={2})
    before.run(steps=1, rate=0.2 * 500)  # one step of 0.1, as the first of two at rate 0.2
    after.run(steps=2, rate=0.2)
    # The first step of Adam is as long as its rate, whatever the gradient; here half of 0.0002.
    length = (after.point - before.point).detach().abs()
    torch.testing.assert_close(length, torch.full((2,), 1e-4), rtol=5e-3, atol=0)


def test_the_third_fault_ends_it_at_the_best_state(caplog) -> None:
    parabola = Parabola(broken=set(range(45, 1000)))
    told = parabola.run()
    assert (told["faults"], told["best_step"], parabola.num_calls) == (3, 40, 4 + 43)
    assert parabola.look() == told["after"] < told["before"]
    assert "and stopped there" in caplog.text


def test_a_look_that_is_not_finite_counts_as_a_fault() -> None:
    parabola = Parabola()
    look = parabola.look

    def sometimes() -> float:
        value = look()
        return math.nan if parabola.num_looks == 3 else value

    parabola.look = sometimes
    told = parabola.run()
    assert told["faults"] == 1
    assert told["after"] < 1e-3


def test_looks_before_a_fault_are_forgotten() -> None:
    """Three that found nothing better before it, and three after it, from the best state on."""
    parabola = Parabola(broken={25})
    with torch.no_grad():
        parabola.point.copy_(GOAL)
    told = parabola.run(rate=0.5)
    assert (told["best_step"], told["faults"]) == (0, 1)
    assert (parabola.num_looks, parabola.num_calls) == (1 + 2 + 3, 25 + 30)


def test_what_is_never_finite_is_an_error() -> None:
    parabola = Parabola()
    parabola.look = lambda: math.nan
    with pytest.raises(NumericalError, match="parabola: its output is not finite before the first"):
        parabola.run()


def test_batches_take_all_in_rounds_of_their_own_order() -> None:
    rows = torch.stack([batch(step, 3, 12, 0, "m") for step in range(8)])
    first, second = rows[:4].flatten(), rows[4:].flatten()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    assert batch(5, 9, 4, 0, "m").sort().values.tolist() == [0, 1, 2, 3]


def test_a_loss_without_gradients_is_an_error() -> None:
    parabola = Parabola()
    with pytest.raises(ModelError, match=r"parabola cannot be trained: .* without gradients"):
        descend([(parabola.point, 0.1)], 4, lambda _: [torch.ones(())], parabola.look, "parabola")
