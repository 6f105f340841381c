"""Gradients of layers run one at a time are those of the whole model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.support.architectures import save_tiny as save_any
from tests.support.params import slow, slow_but
from tests.support.tiny import ARCHITECTURES, DIFFERENT, save_tiny
from vqllm.calibration import passes as passes_module
from vqllm.calibration import saliency as saliency_module
from vqllm.calibration.gradients import Choice, GradientPass, draw
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.saliency import OutputHessians, TokenWeights, unpack
from vqllm.calibration.visitors import Findings, Visitor
from vqllm.core import rng
from vqllm.errors import ModelError, NumericalError
from vqllm.hf.decoder_layers import linears_of

TOKENS = torch.randint(3, 384, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "CPU_BATCH_TOKENS", 48)


def gradient_pass(folder: Path, budget: int = 1 << 30) -> GradientPass:
    def open_stream() -> LayerStream:
        return LayerStream(folder, torch.device("cpu"))

    return GradientPass(open_stream, TOKENS, 3, budget, folder.parent / "stored")


class Recorded:
    """A record in memory."""

    def __init__(self) -> None:
        self.finished: list[tuple[int, States | None]] = []
        self.found: dict[str, Findings] = {}

    def last(self) -> tuple[int, States | None] | None:
        return self.finished[-1] if self.finished else None

    def finish(self, index: int, found: Mapping[str, Findings], gradient: States | None) -> None:
        copied = None if gradient is None else gradient.each(torch.Tensor.clone)
        self.finished.append((index, copied))
        for kind, findings in found.items():
            self.found[kind] = self.found.get(kind, {}) | findings


def run_all(gradients: GradientPass, visitor: Visitor) -> Findings:
    """What a visitor finds, of all layers."""
    record = Recorded()
    gradients.run(lambda linears: linears, {"it": visitor}, record, lambda _: None)
    return record.found["it"]


def collected(gradients: GradientPass) -> dict[str, torch.Tensor]:
    """The gradients in the outputs of all linears, [S, L, R] by name."""
    found: dict[str, dict[int, torch.Tensor]] = {}

    class Collect(Visitor):
        def visit(self, name: str, rows: slice, x: torch.Tensor, g: torch.Tensor) -> None:
            found.setdefault(name, {})[rows.start] = g

    shares: list[float] = []
    gradients.run(lambda linears: linears, {"collect": Collect()}, Recorded(), shares.append)
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1
    return {
        name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()
    }


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["memory", "file"])
@pytest.mark.parametrize("arch", slow_but(DIFFERENT, ARCHITECTURES))
def test_gradients_equal_those_of_the_whole_model(arch: str, budget: int, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", arch, num_hidden_layers=3)
    wanted = gradients_of_the_whole_model(source)
    found = collected(gradient_pass(source, budget))
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert not list((tmp_path / "stored").glob("*"))


@pytest.mark.parametrize("budget", [1 << 30, slow(0)], ids=["memory", "file"])
@pytest.mark.parametrize("model_type", ["gemma3n_text", slow("hy_v4")])
def test_gradients_through_streams_and_what_layers_share(
    model_type: str, budget: int, tmp_path: Path
) -> None:
    """Later layers use keys and values of earlier ones, which get gradients of all of them."""
    source = save_any(model_type, tmp_path / "source")
    wanted = gradients_of_the_whole_model(source)
    assert any("k_proj" in name for name in wanted) or model_type != "gemma3n_text"
    found = collected(gradient_pass(source, budget))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert not list((tmp_path / "stored").glob("*"))


def gradients_of_the_whole_model(source: Path) -> dict[str, torch.Tensor]:
    """In the outputs of the linears in its layers that run once, by full name."""
    model = AutoModelForCausalLM.from_pretrained(source)
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and ".layers." in f".{name}":
            module.register_forward_hook(
                lambda _, args, y, name=name: (
                    y.retain_grad() if y.requires_grad else None,
                    outputs.setdefault(name, []).append(y),
                )[0]
            )
    log_p = F.log_softmax(model(TOKENS).logits, -1)
    loss = torch.zeros(())
    for start in (0, 2, 4):
        log_p_NV = log_p[start : start + 2].flatten(0, 1)
        labels = draw(log_p_NV.detach(), rng.generator(3, f"sequence {start}", "labels"))
        loss = loss + F.nll_loss(log_p_NV, labels, reduction="sum")
    loss.backward()
    return {
        name: several[0].grad
        for name, several in outputs.items()
        if len(several) == 1 and several[0].grad is not None
    }


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    once, again = (collected(gradient_pass(source)) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["memory", "file"])
@pytest.mark.parametrize("stop", [2, 1, 0])
def test_a_stopped_pass_goes_on_after_its_last_layer(
    stop: int, budget: int, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", num_hidden_layers=3)
    seen: list[str] = []

    class Seen(TokenWeights):
        def begin(self, linears: Mapping[str, torch.nn.Linear]) -> None:
            seen.append(min(linears).split(".")[2])

    class Stopping(Recorded):
        def finish(self, index: int, *others: Any) -> None:
            super().finish(index, *others)
            if index == stop:
                raise KeyboardInterrupt

    whole = run_all(gradient_pass(source), TokenWeights(TOKENS, 1.0))
    record = Stopping()
    with pytest.raises(KeyboardInterrupt):
        gradient_pass(source).run(
            lambda linears: linears, {"it": Seen(TOKENS, 1.0)}, record, lambda _: None
        )
    assert seen == [f"{index}" for index in range(2, stop - 1, -1)]
    seen.clear()
    again = Recorded()
    again.finished, again.found = record.finished, record.found
    gradient_pass(source, budget).run(
        lambda linears: linears, {"it": Seen(TOKENS, 1.0)}, again, lambda _: None
    )
    assert seen == [f"{index}" for index in range(stop - 1, -1, -1)]
    assert again.finished[-1] == (0, None)
    found = again.found["it"]
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_labels_follow_their_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    labels = draw(p.log().expand(20000, 4), torch.Generator().manual_seed(0))
    counts = torch.bincount(labels, minlength=4) / 20000
    torch.testing.assert_close(counts, p, rtol=0, atol=0.01)
    assert counts[1] == 0


def token_weights(gradients: GradientPass, power: float = 1.0) -> dict[str, torch.Tensor]:
    return run_all(gradients, TokenWeights(TOKENS, power))


def test_weights_are_the_squared_gradients_over_their_mean(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    expected = collected(gradient_pass(source))
    weights = token_weights(gradient_pass(source))
    assert set(weights) == set(expected)
    for name, g_SLR in expected.items():
        square_SL = g_SLR.square().mean(-1)
        torch.testing.assert_close(weights[name], square_SL / square_SL.mean())
    roots = token_weights(gradient_pass(source), power=0.5)
    for name, weight_SL in weights.items():
        root_SL = weight_SL.sqrt()
        torch.testing.assert_close(roots[name], root_SL / root_SL.mean())


def test_layers_without_gradients_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    run = LayerStream.run

    def detached(*args: Any, **options: Any) -> Any:
        output = run(*args, **options)
        return None if output is None else output.each(torch.Tensor.detach)

    monkeypatch.setattr(LayerStream, "run", detached)
    with pytest.raises(ModelError, match=r"layers\.0 has no gradient.* hessian\.weights=none"):
        collected(gradient_pass(source))


def change_gradients(
    gradients: GradientPass, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Let the pass show its visitors other gradients than it found."""

    class Changed(Visitor):
        def __init__(self, visitor: Visitor) -> None:
            self._visitor = visitor

        def visit(self, name: str, rows: slice, x: torch.Tensor, g: torch.Tensor) -> None:
            self._visitor.visit(name, rows, x, change(name, g))

        def finish(self) -> Findings:
            return self._visitor.finish()

    run = gradients.run

    def changed(chosen: Choice, visitors: Mapping[str, Visitor], *others: Any) -> None:
        run(chosen, {kind: Changed(visitor) for kind, visitor in visitors.items()}, *others)

    gradients.run = changed  # type: ignore[method-assign]


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    gradients = gradient_pass(save_tiny(tmp_path / "source", "llama"))
    change_gradients(gradients, lambda name, g: g * torch.nan)
    with pytest.raises(NumericalError, match=r"the loss has a NaN.* hessian\.weights=none"):
        token_weights(gradients)


def test_without_a_gradient_all_tokens_weigh_the_same(tmp_path: Path) -> None:
    gradients = gradient_pass(save_tiny(tmp_path / "source", "llama"))
    change_gradients(gradients, lambda name, g: g * ("up_proj" not in name))
    for name, weight_SL in token_weights(gradients).items():
        assert bool((weight_SL == 1).all()) == ("up_proj" in name)


def test_linears_that_see_some_tokens_only_have_no_weights(tmp_path: Path) -> None:
    gradients = gradient_pass(save_tiny(tmp_path / "source", "llama"))
    change_gradients(gradients, lambda name, g: g.flatten(0, 1)[:7] if "up_proj" in name else g)
    weights = token_weights(gradients)
    assert len(weights) == 14
    for name, weight_SL in weights.items():
        assert weight_SL.shape == (torch.Size([0]) if "up_proj" in name else TOKENS.shape)


def test_hessians_weigh_tokens(tmp_path: Path) -> None:
    stream = LayerStream(save_tiny(tmp_path / "source", "llama"), torch.device("cpu"))
    weights = {
        f"model.layers.0.self_attn.{kind}_proj": torch.rand(TOKENS.shape) for kind in ("q", "k")
    }
    inputs: list[torch.Tensor] = []
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, tmp_path, weights)
    with stream.layer(0) as layer:
        linears = linears_of(layer, "model.layers.0")
        calibrator.begin(linears)
        groups = calibrator.groups(0, linears)
        linears[groups[0].names[0]].register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, 1).float())
        )
        hessians = calibrator.hessians(0, linears, groups)
    assert {"q_proj", "k_proj", "v_proj"} == {name.split(".")[-1] for name in groups[0].names}
    x_NC, w_N = torch.cat(inputs), sum(weights.values()).flatten() / 2
    expected = (x_NC * w_N[:, None]).T @ x_NC / w_N.sum()
    torch.testing.assert_close(hessians[0].matrix("q"), expected)


@pytest.mark.parametrize(("power", "block"), [(1.0, 4096), (0.5, 4096), (1.0, 20)])
def test_hessians_of_outputs(
    power: float, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saliency_module, "BLOCK", block)
    source = save_tiny(tmp_path / "source", "llama")
    packed = run_all(gradient_pass(source), OutputHessians(power))
    for name, g in collected(gradient_pass(source)).items():
        g_NR = g.flatten(0, 1)
        g_NR = g_NR * g_NR.norm(dim=1, keepdim=True) ** (power - 1)
        expected = g_NR.T @ g_NR
        expected /= torch.diagonal(expected).mean()
        size = -(-len(expected) // -(-len(expected) // block))
        place = torch.arange(len(expected)) // size
        expected[place[:, None] != place] = 0
        got = unpack(packed, name, len(expected))
        assert got is not None
        error = (got - expected).norm() / expected.norm()
        assert error < 0.0005, name  # float16
        assert torch.equal(got, got.T)
        lower = size * (size + 1) // 2
        assert packed[name].nbytes == 2 * lower * -(-len(expected) // size)
    assert unpack(packed, "model.layers.0.expert", 4) is None


def test_outputs_with_gradients_that_are_not_finite_are_refused() -> None:
    outputs = OutputHessians(1.0)
    outputs.visit("q", slice(0, 2), torch.zeros(2, 3, 4), torch.full((2, 3, 5), torch.nan))
    with pytest.raises(NumericalError, match=r"has a NaN.* outputs of q\..* two_sided"):
        outputs.finish()


def test_outputs_without_gradients_have_no_hessian() -> None:
    outputs = OutputHessians(1.0)
    outputs.visit("q", slice(0, 2), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    assert unpack(outputs.finish(), "q", 5) is None
