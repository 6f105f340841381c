"""The original model beside the quantized one, and the weights that make up for the difference."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.support.params import slow_but
from tests.support.tiny import ARCHITECTURES, DIFFERENT, save_tiny
from vqllm import recipes
from vqllm.calibration import passes as passes_module
from vqllm.calibration.drift import Drift, silenced
from vqllm.calibration.hessian import InputHessian
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.hf.decoder_layers import linears_of
from vqllm.quantization import linear as group
from vqllm.quantization.target import corrected

TOKENS = torch.randint(3, 384, (5, 24), generator=torch.Generator().manual_seed(0))
ADDING = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma2": set(),  # a norm follows each
    "gemma3_text": set(),
    "phi3": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},  # both read the layer's input
    "opt": {"self_attn.out_proj", "fc2"},
}


@pytest.fixture(autouse=True)
def _batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "CPU_BATCH_TOKENS", 48)


def calibrate(
    folder: Path, scratch: Path, damage: float, weights: dict[str, Tensor] | None = None
) -> dict[str, InputHessian]:
    """The Hessians of the second layer, when the first has weights that are wrong by `damage`."""
    stream = LayerStream(folder, torch.device("cpu"))
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, scratch, weights, "residual")
    found = {}
    for index, name in enumerate(stream.names):
        with stream.layer(index) as layer:
            linears = linears_of(layer, name)
            calibrator.begin(linears)
            groups = calibrator.groups(index, linears)
            for read in groups:
                (hessian,) = calibrator.hessians(index, linears, [read])
                if index == 1:
                    found |= dict.fromkeys(read.names, hessian)
                for linear in read.names:
                    linears[linear].weight.data = linears[linear].weight.data * (1 + damage)
            calibrator.advance(index)
    calibrator.close()
    return found


def whole_model(folder: Path, damaged: dict[str, float]) -> dict[str, Tensor]:
    """Inputs of all linears [N, C] by name, outputs of layers and of attention blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in damaged:
            module.weight.data *= 1 + damaged[name]
        if isinstance(module, nn.Linear) or name.endswith("layernorm"):

            def keep(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                seen[name] = args[0].flatten(0, 1)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(TOKENS)
    return seen


def test_drift_equals_the_difference_of_two_whole_models(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", num_hidden_layers=2)
    stream = LayerStream(source, torch.device("cpu"))
    first = dict.fromkeys(linears_of_layer(stream, 0), 0.1)
    weight_SL = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1))
    found = calibrate(source, tmp_path, 0.1, dict.fromkeys(linears_of_layer(stream, 1), weight_SL))
    before = whole_model(source, {})
    w_N1 = weight_SL.flatten()[:, None]
    layer = "model.layers.1."
    # A linear is measured when those that run before it in the layer are damaged too.
    earlier = {
        "self_attn.q_proj": [],
        "self_attn.o_proj": ["q", "k", "v"],
        "mlp.up_proj": ["q", "k", "v", "o"],
        "mlp.down_proj": ["q", "k", "v", "o", "gate", "up"],
    }
    streams = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for name, done in earlier.items():
        wrong = {n: 0.1 for n in linears_of_layer(stream, 1) if n.split(".")[-1][:-5] in done}
        after = whole_model(source, first | wrong)
        x = after[layer + name]
        drift = found[layer + name].drift
        assert drift is not None
        expected = (w_N1 * (before[layer + name] - x)).T @ x
        torch.testing.assert_close(drift.input_CC, expected, rtol=1e-3, atol=1e-4)
        assert drift.mass == pytest.approx(float(weight_SL.sum()))
        if name not in streams:
            assert drift.residual_RC is None
            continue
        gap = before[layer + streams[name]] - after[layer + streams[name]]
        assert drift.residual_RC is not None
        expected = (w_N1 * gap).T @ x
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(drift.residual_RC, expected, rtol=1e-3, atol=1e-4)


def linears_of_layer(stream: LayerStream, index: int) -> dict[str, nn.Linear]:
    return linears_of(stream.layers[index], stream.names[index])


@pytest.mark.parametrize("arch", slow_but(DIFFERENT, ARCHITECTURES))
def test_what_adds_to_the_residual_stream_is_found(arch: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", arch, num_hidden_layers=2)
    found = calibrate(source, tmp_path, 0.0)
    adding = {
        name.split("layers.1.")[-1]
        for name, h in found.items()
        if h.drift and h.drift.residual_RC is not None
    }
    assert adding == ADDING[arch]


def test_a_model_without_errors_has_no_drift(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", num_hidden_layers=2)
    for name, hessian in calibrate(source, tmp_path, 0.0).items():
        assert hessian.drift is not None, name
        assert not hessian.drift.input_CC.any()
        assert hessian.drift.residual_RC is None or not hessian.drift.residual_RC.any()


def test_experts_have_no_drift(tmp_path: Path) -> None:
    """What they see depends on the routing, which is another one in the two models."""
    hessian = InputHessian.empty(4, torch.device("cpu"))
    assert hessian.drift is None
    W = {"expert": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    wanted = recipes.from_dict(
        {"name": "x", "codec": {"type": "uniform", "bits": 3}, "rounding": {"type": "nearest"}}
        | {"target": {"of": "outputs"}},
        "x",
    )
    (done,) = group.quantize_group(W, group.Statistics(torch.eye(4), 10), wanted)
    assert done.record.target == "weights"


def test_the_target_solves_the_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 8, generator=generator)
    x0 = torch.randn(500, 8, generator=generator)
    x = x0 + 0.3 * torch.randn(500, 8, generator=generator)
    gap = torch.randn(500, 6, generator=generator) + x @ torch.randn(8, 6, generator=generator)
    linear = nn.Linear(8, 6)
    drift = Drift.empty(linear, True, torch.device("cpu"))
    for rows in (slice(0, 200), slice(200, 500)):
        drift.add(x0[rows], x[rows], None)
        drift.add_residual(gap[rows], x[rows], None)
    W_star = corrected(W, x.T @ x / 500, drift, 1e-7)
    best = torch.linalg.lstsq(x, x0 @ W.T + gap).solution.T
    torch.testing.assert_close(W_star, best, rtol=1e-3, atol=1e-3)


def test_silenced_linears_get_their_forward_back() -> None:
    linear = nn.Linear(3, 2)
    x = torch.ones(4, 3)
    with silenced([linear]):
        assert torch.equal(linear(x), torch.zeros(4, 2))
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert "forward" not in vars(linear)
