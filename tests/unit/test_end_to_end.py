"""The end-to-end stage on a model small enough to see what it does: one matrix of logits."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.errors import ModelError, RecipeError
from vqllm.recipes import available_tuning, load_tuning, tuning_from_dict
from vqllm.tuning.base import ModelTask, seconds_of
from vqllm.tuning.divergence import divergence
from vqllm.tuning.end_to_end import EndToEnd

VOCABULARY = 11


class Toy:
    """Logits of a token are a row of a table times scales; the teacher's scales are known."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.wanted = 0.5 + torch.rand(VOCABULARY, generator=generator)
        self.scales = nn.Parameter(torch.ones(VOCABULARY))
        self.num_calls = 0
        self.broken: set[int] = set()
        """calls of the student with gradients whose logits are NaN"""

    def teacher(self, tokens: Tensor) -> Tensor:
        return self.table[tokens] * self.wanted

    def student(self, tokens: Tensor) -> Tensor:
        y = self.table[tokens] * self.scales
        if torch.is_grad_enabled():
            self.num_calls += 1
            if self.num_calls in self.broken:
                y = y * math.nan
        return y


class MemoryStates:
    def __init__(self, stop_after: int | None = None) -> None:
        self.saved: tuple | None = None
        self.num, self.stop_after = 0, stop_after

    def load(self):
        return self.saved

    def save(self, record, tensors) -> None:
        self.saved = (record, {name: t.clone() for name, t in tensors.items()})
        self.num += 1
        if self.num == self.stop_after:
            raise KeyboardInterrupt


def task(toy: Toy, states: MemoryStates | None = None) -> ModelTask:
    tokens = torch.arange(30 * 8).reshape(30, 8) % VOCABULARY
    return ModelTask(
        student=toy.student,
        teacher=toy.teacher,
        parameters={"rows": {"m": toy.scales}},
        sequences=tokens[:24],
        held_out=tokens[24:],
        seed=0,
        device=torch.device("cpu"),
        states=states or MemoryStates(),
        report_progress=lambda done: None,
    )


def stage(**options) -> EndToEnd:
    return EndToEnd(**{"steps": 300, "rate": 0.02, **options})


def test_divergence_and_its_gradient_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(2, 300, 7, generator=generator, requires_grad=True)
    other = torch.randn(2, 300, 7, generator=generator)
    log_q, log_p = F.log_softmax(own, -1), F.log_softmax(other, -1)
    wanted = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (gradient,) = torch.autograd.grad(3 * wanted, own)
    got = divergence(own, other)
    torch.testing.assert_close(got, wanted)
    (own_gradient,) = torch.autograd.grad(3 * got, own)
    torch.testing.assert_close(own_gradient, gradient, atol=1e-5, rtol=1e-4)


def test_what_the_original_never_says_counts_for_nothing() -> None:
    other = torch.tensor([[0.0, -math.inf]])
    assert divergence(torch.tensor([[5.0, -5.0]]), other) < 1e-4
    assert math.isfinite(divergence(torch.tensor([[0.0, 0.0]]), other))


def test_it_finds_the_known_optimum() -> None:
    toy = Toy()
    told = stage()(task(toy))
    first, last = told["history"][0]["held_out_kl"], told["history"][-1]["held_out_kl"]
    assert last < 1e-3 * first
    assert torch.allclose(toy.scales, toy.wanted, atol=0.02)
    assert told["faults"] == 0


def test_the_same_again_and_after_an_interruption() -> None:
    straight = Toy()
    told = stage()(task(straight))
    again = Toy()
    assert stage()(task(again)) == told
    assert torch.equal(again.scales, straight.scales)
    for stop_after in (1, 5, 11):
        states = MemoryStates(stop_after)
        with pytest.raises(KeyboardInterrupt):
            stage()(task(Toy(), states))
        toy = Toy()  # a new process knows nothing but what was saved
        assert stage()(task(toy, states)) == told
        assert torch.equal(toy.scales, straight.scales)


def test_the_best_state_is_the_one_that_stays() -> None:
    toy = Toy()
    told = stage(rate=1.0, steps=20)(task(toy))  # far too large: it jumps about
    best = min(told["history"], key=lambda look: look["held_out_kl"])
    tokens = task(toy).held_out
    loss = divergence(toy.student(tokens), toy.teacher(tokens)) / tokens.numel()
    assert float(loss.detach()) == pytest.approx(best["held_out_kl"], rel=1e-5)
    assert told["best_step"] == best["step"]


def test_the_best_state_may_be_one_on_the_way() -> None:
    """Held-out sequences have another optimum than training, which passes it."""
    toy = Toy()
    near, far = toy.wanted, 3 * toy.wanted
    toy.teacher = lambda tokens: toy.table[tokens] * (near if len(tokens) == 6 else far)
    told = stage(batch=4)(task(toy))
    kl = {look["step"]: look["held_out_kl"] for look in told["history"]}
    assert kl[told["best_step"]] == min(kl.values()) < 0.6 * kl[0] < kl[0] < kl[300]
    tokens = task(toy).held_out
    loss = divergence(toy.student(tokens), toy.teacher(tokens)) / tokens.numel()
    assert float(loss.detach()) == pytest.approx(min(kl.values()), rel=1e-5)


def test_looks_are_spread_over_all_held_out_sequences() -> None:
    """Which follow each other by their source."""
    toy = Toy()
    looked: list[list[int]] = []
    toy.student = lambda tokens: looked.append(tokens[:, 0].tolist()) or toy.table[tokens]
    held_out = torch.arange(40)[:, None].expand(40, 512) % VOCABULARY
    changed = replace(task(toy), held_out=held_out)
    with pytest.raises(ModelError, match="without gradients"):  # after the first evaluation
        stage(together=9)(changed)
    assert looked[0] == [row % VOCABULARY for row in (0, 10, 20, 30)]


def test_a_last_look_that_is_not_finite_goes_back_and_on() -> None:
    toy = Toy()
    student, looks = toy.student, []

    def sometimes(tokens: Tensor) -> Tensor:
        y = student(tokens)
        if not torch.is_grad_enabled():
            looks.append(toy.num_calls)
            y = y * math.nan if len(looks) == 11 else y
        return y

    toy.student = sometimes
    told = stage()(task(toy))
    assert looks[9:] == [270, 300, 330]
    assert (told["faults"], told["history"][-1]["step"]) == (1, 300)


def test_a_loss_that_is_not_finite_goes_back_with_half_the_rates(caplog) -> None:
    toy = Toy()
    toy.broken = {50, 120}
    told = stage()(task(toy))
    assert told["faults"] == 2
    assert told["history"][-1]["step"] == 300
    assert torch.allclose(toy.scales, toy.wanted, atol=0.05)
    assert "back to step 30 with half the rates" in caplog.text


def test_each_fault_halves_the_steps() -> None:
    moved = []
    for broken in (set(), {1}, {1, 2}):
        toy = Toy()
        toy.broken = broken
        stage(steps=1, rate=1.0)(task(toy))
        moved.append((toy.scales.detach() - 1).abs())  # of Adam's first step, its length
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[2], moved[0] / 4, rtol=1e-3, atol=0)
    assert bool((moved[0] > 0).all())


def test_the_third_fault_ends_it_at_the_best_state() -> None:
    toy = Toy()
    toy.broken = set(range(100, 200))
    told = stage()(task(toy))
    assert told["faults"] == 3
    assert told["history"][-1]["step"] == 90
    assert bool(toy.scales.isfinite().all())
    assert told["history"][-1]["held_out_kl"] < told["history"][0]["held_out_kl"]


def test_logits_that_are_never_finite_are_an_error() -> None:
    toy = Toy()
    toy.table = toy.table * math.nan
    with pytest.raises(ModelError, match="not finite before the first step"):
        stage()(task(toy))


def test_time_ends_it(monkeypatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("vqllm.tuning.end_to_end.time.monotonic", lambda: float(next(clock)))
    told = stage(time="300s")(task(Toy()))
    steps = [look["step"] for look in told["history"]]
    assert 20 < steps[-1] < 300
    assert len(steps) == 11  # ten parts of the way, however short
    assert steps == sorted(set(steps))


def test_another_vocabulary_is_refused() -> None:
    toy = Toy()
    toy.teacher = lambda tokens: torch.zeros(*tokens.shape, 5)
    with pytest.raises(ModelError, match="predicts 5 tokens, the quantized model 11"):
        stage()(task(toy))


def test_nothing_to_tune_is_refused() -> None:
    with pytest.raises(ModelError, match="has none of head"):
        stage(train=("head",))(task(Toy()))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("", None), ("20", None)]
)
def test_durations(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "soon"}, "'soon' is no duration; write 90s, 20m or 1h30m"),
        ({"time": 90}, "stages.0: time: 90 is no duration; write 90s, 20m or 1h30m"),
        ({"train": ["codes"]}, "train.0"),
        ({"train": []}, "train"),
        ({"steps": 0}, "steps"),
        ({"speed": 3}, "speed: unknown key"),
        ({"checkpointing": 1}, "checkpointing: 1 is neither true nor false"),
        ({"steps": True}, "steps: true is neither a number nor a text"),
    ],
)
def test_stages_that_are_wrong(change, message: str) -> None:
    values = {"name": "x", "stages": [{"type": "end_to_end", **change}]}
    with pytest.raises(RecipeError, match=message):
        tuning_from_dict(values, "x.yaml")


def test_a_list_whose_items_are_wrong_is_not_called_empty() -> None:
    values = {"name": "x", "stages": [{"type": "end_to_end", "train": ["rowz"]}]}
    with pytest.raises(RecipeError) as error:
        tuning_from_dict(values, "x")
    assert "Input should be 'rows'" in str(error.value)
    assert "at least 1 item" not in str(error.value)


def test_a_kind_that_is_named_twice_moves_once() -> None:
    one, twice = Toy(), Toy()
    told = stage(steps=20)(task(one))
    assert stage(steps=20, train=("rows", "rows", "vectors"))(task(twice)) == told
    assert torch.equal(one.scales, twice.scales)


def test_recipes_of_tuning_that_are_wrong() -> None:
    with pytest.raises(RecipeError, match="unknown tuning stage 'end_to_and'"):
        tuning_from_dict({"name": "x", "stages": [{"type": "end_to_and"}]}, "x.yaml")
    with pytest.raises(RecipeError, match="stages"):
        tuning_from_dict({"name": "x", "stages": []}, "x.yaml")
    with pytest.raises(RecipeError, match="unknown tuning recipe 'end-to-ent'"):
        load_tuning("end-to-ent")


@pytest.mark.parametrize("name", available_tuning())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_tuning(name)
    assert recipe.name == name
    assert tuning_from_dict(recipe.to_dict(), name) == recipe
