"""Layers run one at a time see and give what they do inside the whole model."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.architectures import model_class, tiny_config
from tests.support.architectures import save_tiny as save_any
from tests.support.params import slow, slow_but
from tests.support.tiny import ARCHITECTURES, DIFFERENT, save_tiny
from vqllm.calibration import passes as passes_module
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.layers import Layers, check_states
from vqllm.calibration.passes import Model
from vqllm.errors import ModelError, NumericalError
from vqllm.hf.decoder_layers import layer_names, linears_of
from vqllm.hf.dtypes import tensors_of
from vqllm.hf.loading import skeleton

TOKENS = torch.randint(3, 384, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "CPU_BATCH_TOKENS", 48)


def stream_of(folder: Path) -> LayerStream:
    return LayerStream(folder, torch.device("cpu"))


def states_of(calibrator: LayerCalibrator, model: Model = "quantized") -> Tensor:
    store = calibrator._passes._stores[model]
    return store.read(slice(None), torch.device("cpu")).hidden.clone()


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["memory", "file"])
@pytest.mark.parametrize("arch", slow_but(DIFFERENT, ARCHITECTURES))
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
            calibrator.begin(linears)
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
            got = states_of(calibrator)
            torch.testing.assert_close(got, expected[index + 1], rtol=1e-4, atol=1e-4)
    calibrator.close()
    assert not list(tmp_path.glob("states*"))


def test_linears_of_one_input_are_one_group(tmp_path: Path) -> None:
    stream = stream_of(save_tiny(tmp_path / "source", "llama"))
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, tmp_path)
    with stream.layer(0) as layer:
        calibrator.begin(linears_of(layer, stream.names[0]))
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
            calibrator.begin(linears)
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
        results.append((hessians, states_of(calibrator)))
        calibrator.close()
    (plain, plain_states), (kept, kept_states) = results
    for a, b in zip(plain, kept):
        assert torch.equal(a.total_CC, b.total_CC)
    assert torch.equal(plain_states, kept_states)


def test_a_child_with_an_unfinished_linear_runs_again(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    found = []
    for settle in (False, True):
        stream = stream_of(source)
        calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, tmp_path)
        with stream.layer(0) as layer:
            linears = linears_of(layer, stream.names[0])
            calibrator.begin(linears)
            groups = calibrator.groups(0, linears)
            attention_last, late = groups[1], groups[2]
            o_proj = linears[attention_last.names[0]]
            if settle:
                calibrator.settle(layer, [o_proj, *(linears[name] for name in late.names)])
            calibrator.hessians(0, linears, [late])  # the attention runs, and its weights change
            o_proj.weight.data = o_proj.weight.data * 2
            found.append(calibrator.hessians(0, linears, [late])[0].total_CC)
        calibrator.close()
    assert torch.equal(*found)


@pytest.mark.parametrize(("budget", "passes"), [(1 << 30, 1), (0, 2)], ids=["kept", "no room"])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_each_part_of_a_layer_runs_once(
    arch: str, budget: int, passes: int, tmp_path: Path
) -> None:
    """Group by group, as rounding goes, with weights that change in between."""
    source = save_tiny(tmp_path / "source", arch)
    results = []
    for settle in (False, True):
        stream = stream_of(source)
        calibrator = LayerCalibrator(stream, TOKENS, budget, tmp_path)
        hessians = []
        calls: Counter[str] = Counter()

        def count(*_: object, name: str, calls: Counter[str] = calls) -> None:
            calls[name] += 1

        for index in range(2):
            with stream.layer(index) as layer:
                linears = linears_of(layer, stream.names[index])
                calibrator.begin(linears)
                groups = calibrator.groups(index, linears)
                unfinished = dict(linears)
                for name, linear in linears.items():
                    linear.register_forward_hook(partial(count, name=name))
                for group in groups:
                    hessians += calibrator.hessians(index, linears, [group])
                    for name in group.names:
                        weight = unfinished.pop(name).weight
                        weight.data = weight.data + 0.1
                    if settle and unfinished:
                        calibrator.settle(layer, unfinished.values())
                calibrator.advance(index)
        num_batches = 3
        if settle and arch == "llama":
            assert calls["model.layers.1.mlp.gate_proj"] == passes * num_batches
            assert calls["model.layers.1.self_attn.q_proj"] == (1 if budget else 4) * num_batches
        results.append((hessians, states_of(calibrator)))
        calibrator.close()
    (plain, plain_states), (kept, kept_states) = results
    for a, b in zip(plain, kept):
        assert torch.equal(a.total_CC, b.total_CC)
    assert torch.equal(plain_states, kept_states)


OTHER_ARCHITECTURES = {
    "rwkv": {"attention_hidden_size": 64},  # returns (states, state, attention)
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"alibi": False},
    "mamba": {"state_size": 8},
}


def run_all(stream: LayerStream) -> list[Tensor]:
    """The output of every layer for TOKENS, each from the one before."""
    states, outputs = None, []
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            layer.to(stream.compute_dtype)
            states = stream.run(index, TOKENS, states)
            assert states is not None
            outputs.append(states.hidden)
    return outputs


def outputs_in(model: nn.Module, names: list[str]) -> list[Tensor]:
    """The same, of the whole model."""
    outputs: list[Tensor] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    return outputs


@pytest.mark.parametrize("arch", slow_but(["bamba", "falcon"], OTHER_ARCHITECTURES))
def test_whatever_layers_return_beside_their_states(arch: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", arch, num_hidden_layers=3, **OTHER_ARCHITECTURES[arch])
    stream = stream_of(source)
    check_states(skeleton(source), stream.names)
    expected = outputs_in(AutoModelForCausalLM.from_pretrained(source).eval(), stream.names)
    for got, output in zip(run_all(stream), expected, strict=True):
        torch.testing.assert_close(got, output, rtol=1e-4, atol=1e-5)


STREAMS = {
    "gemma3n_text": 1,  # streams first; later layers use keys and values of earlier ones
    "hy_v4": 0,  # streams behind the tokens; later layers use tokens that earlier ones chose
    "deepseek_v4": 0,  # the first layers route by the tokens themselves
    "glm5_next": 0,
    "mistral_large4": 0,  # keys and values, without streams
}
"""The axis of the sequences in the states of layers that have several streams or hand on more."""


@pytest.mark.parametrize("budget", [1 << 30, slow(0)], ids=["memory", "file"])
@pytest.mark.parametrize("model_type", slow_but(["gemma3n_text", "hy_v4"], STREAMS))
def test_several_streams_and_what_layers_share(
    model_type: str, budget: int, tmp_path: Path
) -> None:
    """In batches, for the quantized model and for the original beside it."""
    source = save_any(model_type, tmp_path / "source")
    model: Any = model_class(model_type).from_pretrained(source).eval()
    stream = stream_of(source)
    check_states(stream.tensors.blueprint.model, stream.names)
    expected = outputs_in(model, stream.names)
    scratch = tmp_path / "scratch"
    calibrator = LayerCalibrator(stream, TOKENS, budget, scratch, target="outputs")
    for index, name in enumerate(stream.names):
        with stream.layer(index) as layer:
            linears = linears_of(layer, name, stream.shared)
            calibrator.begin(linears)
            groups = calibrator.groups(index, linears)
            # Attention is settled first, so that its output is replayed where it can be.
            calibrator.settle(layer, [m for n, m in linears.items() if ".mlp." in n])
            calibrator.hessians(index, linears, groups)
            calibrator.advance(index)
        for kind in ("quantized", "original"):
            wanted = expected[index].movedim(STREAMS[model_type], 0)
            torch.testing.assert_close(
                states_of(calibrator, kind), wanted, rtol=1e-4, atol=1e-4, msg=f"{name} {kind}"
            )
    calibrator.close()
    assert not list(scratch.glob("*"))


TOWERS = {
    "git": "git.encoder.layer",
    "chameleon": "model.layers",
    "phi4_multimodal": "model.layers",
}


@pytest.mark.parametrize("model_type", slow_but(["git"], TOWERS))
def test_a_tower_inside_the_decoder_is_not_taken_for_its_layers(model_type: str) -> None:
    """In models so small it has more parameters, or as many."""
    with torch.device("meta"):
        model = model_class(model_type)(tiny_config(model_type))
    assert layer_names(model)[0] == f"{TOWERS[model_type]}.0"


def test_a_model_that_does_not_run_in_its_dtype_is_told_another(tmp_path: Path) -> None:
    """Without a cache xLSTM's state is float32 in transformers."""
    source = save_any("xlstm", tmp_path / "source", dtype=torch.bfloat16)
    stream = stream_of(source)
    with stream.ready(0), pytest.raises(ModelError, match=r"bfloat16: .*--compute-dtype float32"):
        stream.run(0, TOKENS, None)
    stream = LayerStream(source, torch.device("cpu"), torch.float32)
    with stream.ready(0):
        assert stream.run(0, TOKENS, None) is not None


class BlocksConfig(PreTrainedConfig):
    model_type = "vqllm_test_blocks"
    share: bool = False
    keyword: bool = False


class Block(nn.Module):
    def __init__(self, common: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(40, 40)
        self.common = common

    def forward(self, z: Tensor) -> Tensor:
        return z + self.common(torch.relu(self.own(z).cumsum(1) / 8))


class BlocksForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BlocksConfig

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(384, 40)
        common = nn.Linear(40, 40, bias=False)
        self.blocks = nn.ModuleList(
            Block(common if config.share else nn.Linear(40, 40)) for _ in range(3)
        )
        self.head = nn.Linear(40, 384)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: object) -> CausalLMOutputWithPast:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(z=states) if self.config.keyword else block(states)
        return CausalLMOutputWithPast(logits=self.head(states))


AutoConfig.register(BlocksConfig.model_type, BlocksConfig)
AutoModelForCausalLM.register(BlocksConfig, BlocksForCausalLM)


# Accelerate notes that a shared child has no second place.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_layers_of_any_code(share: bool, keyword: bool, tmp_path: Path) -> None:
    """Called with a keyword of any name; with a linear that all of them have in common."""
    torch.manual_seed(0)
    model = BlocksForCausalLM(BlocksConfig(share=share, keyword=keyword)).eval()
    model.config.save_pretrained(tmp_path / "source")
    save_file(dict(model.named_parameters()), tmp_path / "source" / "model.safetensors")
    stream = stream_of(tmp_path / "source")
    expected = outputs_in(model, stream.names)
    for got, output in zip(run_all(stream), expected, strict=True):
        torch.testing.assert_close(got, output)
    for name, layer in zip(stream.names, stream.layers):
        found = {n.rpartition(".")[2] for n in linears_of(layer, name, stream.shared)}
        assert found == ({"own"} if share else {"own", "common"})
        assert layer.own.weight.is_meta
        assert layer.common.weight.is_meta != share


class FlatBlock(Block):
    """Whose states have no axis of sequences."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).flatten(0, 1)


def test_states_of_another_form_are_refused_at_the_beginning(tmp_path: Path) -> None:
    model = BlocksForCausalLM(BlocksConfig())
    model.blocks[0] = FlatBlock(nn.Linear(40, 40))
    stream = Layers(model, layer_names(model), torch.device("cpu"))
    with pytest.raises(ModelError, match=r"returns Tensor \(120, 40\) for 5 sequences of 24"):
        stream.run(0, TOKENS, None)
    with pytest.raises(ModelError, match=r"blocks\.0 returns Tensor \(8, 40\)"):
        check_states(model.to("meta"), layer_names(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["inkling_text", slow("hy_v4"), slow("deepseek_v4")])
def test_layers_run_in_the_dtypes_of_the_loaded_model(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Parts that transformers keeps in float32 stay so, whatever dtype the files have."""
    source = save_any(model_type, tmp_path / "source", dtype=dtype)
    model: Any = model_class(model_type).from_pretrained(source, dtype=torch.bfloat16)
    wanted = {name: tensor.dtype for name, tensor in tensors_of(model)}
    assert torch.float32 in {wanted[name] for name in dict(model.named_parameters())}
    stream = LayerStream(source, torch.device("cpu"), torch.bfloat16)
    origin = stream.tensors.blueprint.origin
    for _ in range(2):  # the gradients' pass loads each layer twice
        for index in range(len(stream)):
            with stream.ready(index):
                for name, tensor in tensors_of(stream.model):
                    if not tensor.is_meta:
                        assert tensor.dtype == wanted[origin(name)], name
