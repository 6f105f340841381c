"""Stages that move codes, on one matrix of logits whose codes of no loss are known."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from tests.support.params import slow_but
from tests.unit.test_end_to_end import MemoryStates
from vqllm.codecs import CODECS
from vqllm.core import rng
from vqllm.core.distributed import Processes
from vqllm.core.protocols import Codec
from vqllm.core.tiles import to_tiles
from vqllm.distillation.coded_weights import CodedWeights
from vqllm.tuning.base import ModelTask, ModelTuning
from vqllm.tuning.codes import CodeTuning
from vqllm.tuning.divergence import divergence
from vqllm.tuning.end_to_end import EndToEnd
from vqllm.tuning.pv import PV, PVLoop
from vqllm.tuning.straight_through import StraightThrough
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import HadamardSpec

R, C, NUM_TOKENS = 64, 32, 96
PAIRS = {"type": "kmeans", "index_bits": 4, "tile_cols": 4}
CODEC_OPTIONS = {
    "kmeans": {"type": "kmeans", "index_bits": 6, "tile_cols": 4},
    "additive": {"type": "additive", "codebooks": 2, "index_bits": 4},
    "e8p": {"type": "e8p"},
    "d4": {"type": "d4"},
    "residual": {"type": "residual", "stages": [{"type": "d4"}, {"type": "d4"}]},
    "pyramid": {"type": "pyramid", "dim": 8, "bits": 2},
    "learned_lattice": {"type": "learned_lattice"},
    "uniform": {"type": "uniform", "bits": 2, "group": 16},
    "convolutional": {"type": "convolutional"},
    "grouped_kmeans": {"type": "grouped_kmeans", "index_bits": 4},
    "residual_kmeans": {"type": "residual", "stages": 2 * [PAIRS]},
    "sparse": {"type": "sparse", "share": 0.04, "base": {"type": "d4"}},
    "split": {"type": "split", "share": 0.25, "first": {**PAIRS, "index_bits": 6}, "rest": PAIRS},
    "trellis": {"type": "trellis", "bits": 2, "state_bits": 8},
    "table": {"type": "trellis", "code": "table", "bits": 2, "state_bits": 8},
    "gf2": {"type": "trellis", "code": "gf2", "bits": 2, "state_bits": 8},
}


def codec_of(name: str) -> Codec:
    options = dict(CODEC_OPTIONS[name])
    return CODECS.get(options["type"]).model_validate(options)


class Toy:
    """logits = x Ŵᵀ of fixed random x; the teacher's W has known codes, the student's are others.

    They are those nearest to W and noise of `noise` times its size.
    """

    def __init__(self, codec: Codec, noise: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        hadamard = HadamardSpec(side="in", size=C)
        signs = {f"t0_{n}": t for n, t in hadamard.pack_signs(random(C).sign()).items()}
        spec = LinearSpec(rows=R, cols=C, format=codec.spec(), transforms=(hadamard,))
        X_IJE = to_tiles(random(R, C), codec.tile)
        state = codec.fit(X_IJE, None, rng.generator(0, "toy", "fit"))
        wanted = codec.encode(X_IJE, state)
        X_IJE = codec.decode(wanted, state)
        X_IJE = X_IJE + noise * X_IJE.square().mean().sqrt() * random(*X_IJE.shape)
        given = codec.encode(X_IJE, state)
        self.best, self.coded = (
            CodedWeights(spec, codec, codec.pack(codes, state) | signs, torch.float32)
            for codes in (wanted, given)
        )
        self.x = random(NUM_TOKENS, C) / 4
        self.scales = nn.Parameter(torch.zeros(R))
        self.num_calls = 0
        self.broken: set[int] = set()
        """calls of the student with gradients that are NaN in those of the weights alone"""

    def teacher(self, tokens: Tensor) -> Tensor:
        return self.x[tokens] @ self.best.decoded().T

    def student(self, tokens: Tensor) -> Tensor:
        W_RC = self.coded.with_recorded_gradient(self.coded.decoded())
        if torch.is_grad_enabled():
            self.num_calls += 1
            if self.num_calls in self.broken:
                W_RC = W_RC.view_as(W_RC)
                W_RC.register_hook(lambda gradient_RC: gradient_RC * math.nan)
        return self.x[tokens] @ W_RC.T * (1 + self.scales)

    def task(self, stage: ModelTuning, states: MemoryStates | None = None) -> ModelTask:
        learned = {name: own.delta for name, own in self.coded.learned.items()}
        parameters = {"rows": {"m": self.scales}, "codebooks": learned}
        parameters = {k: own for k, own in parameters.items() if k in stage.kinds and own}
        for own in parameters.values():
            for parameter in own.values():
                parameter.requires_grad_()
        tokens = torch.arange(NUM_TOKENS).reshape(12, 8)
        return ModelTask(
            student=self.student,
            teacher=self.teacher,
            parameters=parameters,
            codes={"m": self.coded},
            sequences=tokens,
            held_out=tokens,
            seed=0,
            device=torch.device("cpu"),
            states=states or MemoryStates(),
            report_progress=lambda done: None,
        )


def last_kl(told) -> float:
    return min(look["held_out_kl"] for look in told["history"])


@pytest.mark.parametrize("name", CODEC_OPTIONS)
def test_the_objective_falls_at_every_step(name: str) -> None:
    """With all tokens in every batch, the loss before and after each V step, and between two of
    them, where P moves."""
    toy = Toy(codec_of(name))
    stage = PV(steps=24, every=1, batch=12, rate=2e-4, codebook_rate=5e-5, share=0.5)
    told = stage(toy.task(stage))
    losses = [loss for told in told["rounds"] for loss in told["kl"]]
    v_steps = [(a, b) for a, b in zip(losses[::2], losses[1::2])]
    p_steps = [(a, b) for a, b in zip(losses[1::2], losses[2::2])]
    moved = [told["moved"] > 0 for told in told["rounds"]]
    assert all(b < a if did else b == a for (a, b), did in zip(v_steps, moved))
    assert sum(moved) > 2
    # Near the end, at some hundredths of the first loss, a step of Adam may be too long.
    assert [(a, b) for a, b in p_steps if b >= a > 0.03 * losses[0]] == []
    assert last_kl(told) < 0.6 * told["history"][0]["held_out_kl"]
    rounds = [of_round for of_round in told["rounds"] if of_round["step"] <= told["best_step"]]
    assert told["codes_moved"] == sum(of_round["moved"] for of_round in rounds)


@pytest.mark.parametrize("name", slow_but(["kmeans", "e8p"], CODEC_OPTIONS))
def test_it_beats_straight_through_and_scales_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    if name == "table":
        # With trained tables (of gf2 as well) PV ends some toys at 0.11 to 0.12 and others at 0.02
        # to 0.08, whether the search has costs of 16 or of 32 bits.
        reason = "PV ends at 0.123 on this toy, straight-through estimation at 0.101"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    ends = {}
    for stage in (
        PV(steps=60, every=1, batch=12, rate=3e-3, share=0.5),
        StraightThrough(steps=60, every=1, batch=12, rate=3e-3),
        EndToEnd(steps=60, batch=12, rate=3e-3, train=("rows", "codebooks")),
    ):
        toy = Toy(codec_of(name))
        ends[stage.type] = last_kl(stage(toy.task(stage)))
    print(name, ends)
    assert ends["pv"] < min(ends["straight_through"], ends["end_to_end"])


def test_codes_that_may_move_lie_downhill_the_steepest_first() -> None:
    toy, stage = Toy(codec_of("e8p")), PV(steps=8, every=1, share=1.0)
    run = PVLoop(stage, toy.task(stage))
    before_NE, generator = toy.coded.tiles().flatten(0, 1), torch.Generator().manual_seed(0)
    gradient_NE, noise_NE = (torch.randn(before_NE.shape, generator=generator) for _ in range(2))
    run._real["m"] += noise_NE  # as earlier gradients may have left them
    exchange = run._exchange("m", gradient_NE)
    assert 0 < len(exchange.where_K) < len(before_NE)  # the others would go uphill
    assert torch.equal(toy.coded.tiles().flatten(0, 1), before_NE)
    exchange.apply(1.0)
    change_KE = (toy.coded.tiles().flatten(0, 1) - before_NE)[exchange.where_K]
    slope_K = -(gradient_NE[exchange.where_K] * change_KE).sum(1) / change_KE.norm(dim=1)
    assert bool((slope_K > 0).all())
    assert torch.equal(slope_K.sort(descending=True).values, slope_K)
    num = exchange.apply(0.5)
    moved_N = (toy.coded.tiles().flatten(0, 1) != before_NE).any(1)
    assert sorted(exchange.where_K[:num].tolist()) == moved_N.nonzero().flatten().tolist()


STAGES = [PV, StraightThrough]


def rounds_of_two(stage: type[CodeTuning]) -> CodeTuning:
    return stage(steps=20, every=2, batch=12, rate=3e-3, train=("rows",))


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_of_the_weights_that_is_not_finite_goes_back(stage, caplog) -> None:
    toy, own = Toy(codec_of("e8p")), rounds_of_two(stage)
    toy.broken = {7, 20}  # one in the first half of a round, one in the second
    told = own(toy.task(own))
    assert told["faults"] == 2
    assert told["history"][-1]["step"] == 20
    assert "step 8: loss or gradient is not finite; back to step 6 with half the r" in caplog.text
    assert toy.coded.decoded().isfinite().all()
    assert last_kl(told) < told["history"][3]["held_out_kl"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_third_of_them_ends_it_at_the_best_state(stage) -> None:
    toy, own = Toy(codec_of("e8p")), rounds_of_two(stage)
    toy.broken = set(range(7, 100))
    told = own(toy.task(own))
    assert told["faults"] == 3
    assert told["history"][-1]["step"] == 6
    tokens = torch.arange(NUM_TOKENS).reshape(12, 8)
    with torch.no_grad():
        loss = divergence(toy.student(tokens), toy.teacher(tokens)) / tokens.numel()
    assert float(loss) == pytest.approx(last_kl(told), rel=1e-5)
    assert last_kl(told) < told["history"][0]["held_out_kl"]


def looks_every_two_rounds(stage: type[CodeTuning]) -> CodeTuning:
    train = ("rows", "codebooks")
    return stage(steps=40, every=2, batch=4, rate=3e-3, weight_rate=0.2, train=train)


def ended(stage: CodeTuning, states: MemoryStates | None = None, broken: set[int] | None = None):
    """What is told, and where everything is in the end."""
    toy = Toy(codec_of("kmeans"))
    toy.broken = broken or set()
    told = stage(toy.task(stage, states))
    codes = toy.coded.codes_at(torch.arange(math.prod(toy.coded.grid)))
    return told, toy.scales.tolist(), codes.tolist(), toy.coded.decoded().tolist()


def stopped(stage: CodeTuning) -> MemoryStates:
    """With what is saved at step 4, in the middle of the way between two evaluations."""
    states = MemoryStates(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        ended(stage, states)
    assert states.saved is not None
    assert states.saved[0]["step"] == 4
    return states


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_ends_as_a_straight_one(stage) -> None:
    own = looks_every_two_rounds(stage)
    assert ended(own, stopped(own)) == ended(own)


@pytest.mark.parametrize("stage", STAGES)
def test_going_back_is_going_on_from_what_was_saved(stage) -> None:
    """From the evaluation at step 4 to the fault in step 8 codes moved and gradients came in."""
    own = looks_every_two_rounds(stage)
    states = stopped(own)
    assert states.saved is not None
    states.saved[0].update(faults=1, factor=0.5)
    assert ended(own, states) == ended(own, broken={7})


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_state_has_its_own_codes(stage) -> None:
    """Held-out sequences for which the model is best as it is at first."""
    toy, own = Toy(codec_of("kmeans")), looks_every_two_rounds(stage)
    codes, W_RC = toy.coded.get_buffer("codes").clone(), toy.coded.decoded().detach()
    teacher = toy.teacher
    toy.teacher = lambda tokens: toy.x[tokens] @ W_RC.T if len(tokens) == 6 else teacher(tokens)
    task = toy.task(own)
    told = own(replace(task, held_out=task.held_out[:6]))
    assert told["best_step"] == 0
    assert told["history"][-1]["held_out_kl"] > 0.001
    assert torch.equal(toy.coded.get_buffer("codes"), codes)
    assert torch.equal(toy.coded.decoded(), W_RC)
    if stage is PV:
        assert sum(of_round["moved"] for of_round in told["rounds"]) > 0 == told["codes_moved"]


@dataclass(frozen=True)
class AnotherBreaks(Processes):
    """Another process adds a NaN to a gradient of the weights, the third time."""

    shapes: list[torch.Size] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        if values.ndim < 3:  # a loss
            return values
        self.shapes.append(values.shape)
        return values * math.nan if len(self.shapes) == 3 else values


@pytest.mark.parametrize("stage", STAGES)
def test_all_processes_go_back_where_one_has_to(stage) -> None:
    toy, own = Toy(codec_of("e8p")), rounds_of_two(stage)
    told = own(replace(toy.task(own), processes=AnotherBreaks()))
    assert (told["faults"], told["history"][-1]["step"]) == (1, 20)


@pytest.mark.parametrize("stage", STAGES)
def test_rounds_longer_than_the_stage_are_refused(stage: type[ModelTuning]) -> None:
    assert stage.model_validate({"steps": 8, "every": 8})
    with pytest.raises(ValueError, match="every 8 with 4 steps never moves a code; allowed is 1"):
        stage.model_validate({"steps": 4})
