"""Layers run one at a time see and give what they do inside the whole model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import ARCHITECTURES, save_tiny
from vqllm.calibration import layer as layer_module
from vqllm.calibration.layer import LayerCalibrator
from vqllm.calibration.stream import LayerStream, linears_of
from vqllm.errors import NumericalError

TOKENS = torch.randint(3, 384, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "CPU_BATCH_TOKENS", 48)


def stream_of(folder: Path) -> LayerStream:
    return LayerStream(folder, torch.device("cpu"), folder.parent / "offload")


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["memory", "file"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_states_and_hessians_equal_the_whole_model(arch: str, budget: int, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", arch, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(source)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].detach())
            )
    with torch.no_grad():
        expected = model(TOKENS, output_hidden_states=True).hidden_states
    stream = stream_of(source)
    calibrator = LayerCalibrator(stream, TOKENS, budget, tmp_path)
    for index, layer_name in enumerate(stream.names):
        with stream.layer(index) as layer:
            linears = linears_of(layer, layer_name)
            groups = calibrator.groups(index, linears)
            hessians = calibrator.hessians(index, linears, groups)
            calibrator.advance(index)
        assert sorted(n for group in groups for n in group.names) == sorted(linears)
        for group, hessian in zip(groups, hessians):
            for name in group.names:
                x = inputs[name].reshape(-1, inputs[name].shape[-1])
                H = hessian.matrix(name)
                assert hessian.num_tokens == TOKENS.numel()
                torch.testing.assert_close(H, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        if index + 1 < len(stream):  # the last one's state comes with the final norm
            states = calibrator._store
            assert states is not None
            got = states.read(slice(None), torch.device("cpu"))
            torch.testing.assert_close(got, expected[index + 1], rtol=1e-4, atol=1e-4)
    calibrator.close()
    assert not (tmp_path / "states.bin").exists()


def test_linears_of_one_input_are_one_group(tmp_path: Path) -> None:
    stream = stream_of(save_tiny(tmp_path / "source", "llama"))
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, tmp_path)
    with stream.layer(0) as layer:
        groups = calibrator.groups(0, linears_of(layer, stream.names[0]))
    kinds = [[name.rsplit(".", 1)[-1] for name in group.names] for group in groups]
    assert kinds == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_weights_are_in_memory_only_inside_the_layer(tmp_path: Path) -> None:
    stream = stream_of(save_tiny(tmp_path / "source", "qwen2"))
    assert all(p.is_meta for layer in stream.layers for p in layer.parameters())
    with stream.layer(0) as layer:
        assert not any(p.is_meta for p in layer.parameters())
        assert all(p.is_meta for p in stream.layers[1].parameters())
    assert all(p.is_meta for layer in stream.layers for p in layer.parameters())


def test_overflow_names_the_layer(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e4)
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(source)
    stream = stream_of(source)
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, tmp_path)
    with stream.layer(0), pytest.raises(NumericalError, match=r"model\.layers\.0 is not finite"):
        calibrator.advance(0)


@pytest.mark.parametrize(("arch", "attention"), [("llama", "self_attn"), ("gpt_neox", "attention")])
@pytest.mark.parametrize(("budget", "passes"), [(1 << 30, 1), (0, 3)], ids=["kept", "no room"])
def test_settled_children_run_once_and_change_nothing(
    arch: str, attention: str, budget: int, passes: int, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", arch)
    num_batches = 3
    results = []
    for settle in (False, True):
        stream = stream_of(source)
        calibrator = LayerCalibrator(stream, TOKENS, budget, tmp_path)
        with stream.layer(0) as layer:
            linears = linears_of(layer, stream.names[0])
            groups = calibrator.groups(0, linears)
            late = [group for group in groups if f".{attention}." not in group.names[0]]
            if settle:
                calibrator.settle(layer, [linears[n] for g in late for n in g.names])
            calls: list[None] = []
            inner = next(m for n, m in linears.items() if f".{attention}." in n)
            inner.register_forward_hook(lambda *_, calls=calls: calls.append(None))
            hessians = [calibrator.hessians(0, linears, [group])[0] for group in late]
            calibrator.advance(0)
            assert len(calls) == num_batches * (passes if settle else 1 + len(late))
        assert len(late) == 2
        assert calibrator._store is not None
        results.append((hessians, calibrator._store.read(slice(None), torch.device("cpu"))))
        calibrator.close()
    (plain, plain_states), (kept, kept_states) = results
    for a, b in zip(plain, kept):
        assert torch.equal(a.total_CC, b.total_CC)
    assert torch.equal(plain_states, kept_states)
