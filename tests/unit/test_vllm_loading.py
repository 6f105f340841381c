"""Names of modules in vLLM, what its loader brings, and what is refused. No vLLM is needed."""

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.fake_checkpoint import FORMATS, random_packed
from vqllm.checkpoint.format import FORMAT_VERSION, QuantizationConfig
from vqllm.errors import CheckpointError, ModelError
from vqllm.integrations.vllm import METHOD, mode, refusals, register
from vqllm.integrations.vllm.names import Modules
from vqllm.integrations.vllm.packed import PackedLinears
from vqllm.integrations.vllm.stored import Stored, loader_into, part_of, place_holders
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import HadamardSpec

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


def linear(rows: int = 32, cols: int = 64, format: str = "e8p") -> LinearSpec:
    hadamard = HadamardSpec(side="in", size=cols)
    return LinearSpec(rows=rows, cols=cols, format=FORMATS[format], transforms=(hadamard,))


def modules(**changes: Any) -> Modules:
    specs = {
        f"{ATTENTION}.q_proj": linear(),
        f"{ATTENTION}.v_proj": linear(16, format="uniform"),
        "model.embed_tokens": linear(384),
    }
    built = QuantizationConfig.build(
        specs, outside_layers=["model.embed_tokens"], tied={"lm_head": "model.embed_tokens"}
    )
    return Modules.parse({**built.to_dict(), **changes})


def test_a_newer_format_is_refused_before_anything_else() -> None:
    with pytest.raises(CheckpointError, match=f"reads versions up to {FORMAT_VERSION}. Upgrade"):
        modules(format_version=FORMAT_VERSION + 1, specs="whatever comes then")


def test_fused_linears_have_their_parts_in_order_and_dense_ones_among_them() -> None:
    found = modules()
    names = found.parts(f"{ATTENTION}.qkv_proj", FUSED)
    assert names == [f"{ATTENTION}.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    specs = found.quantized(names)
    assert [spec and spec.rows for spec in specs] == [32, None, 16]
    assert found.parts("model.layers.0.mlp.down_proj", FUSED) == ["model.layers.0.mlp.down_proj"]
    assert found.parts("qkv_proj", FUSED) == ["q_proj", "k_proj", "v_proj"]


def test_a_linear_that_is_stored_as_one_stays_one() -> None:
    found = Modules({"layers.0.qkv_proj": linear()})
    assert found.parts("layers.0.qkv_proj", FUSED) == ["layers.0.qkv_proj"]


def test_embedding_and_head() -> None:
    found = modules()
    assert found.embedding("", 384, 64) == "model.embed_tokens"
    assert found.embedding("", 512, 64) is None, "another embedding"
    assert found.embedding("model.embed_tokens", 384, 64) == "model.embed_tokens"
    assert found.embedding("model.position", 384, 64) is None
    assert found.head("lm_head") == "model.embed_tokens"
    assert found.head("score") is None
    untied = {"embed_in": linear(384), "embed_out": linear(384)}
    both = Modules(untied, outside=tuple(untied))
    assert both.embedding("", 384, 64) == "embed_in"
    assert both.head("embed_out") == "embed_out"


def test_names_are_those_of_vllm() -> None:
    found = modules()
    found.rename(lambda name: name.replace("model.", "language_model.model.", 1))
    assert "language_model.model.layers.0.self_attn.q_proj" in found.specs
    assert found.outside == ("language_model.model.embed_tokens",)
    assert found.tied == {"lm_head": "language_model.model.embed_tokens"}
    # Rules for names of tensors may want the dot behind a module, or leave a name out.
    found.rename(lambda name: name.replace("lm_head.", "text.lm_head.") if "head" in name else None)
    assert found.tied == {"text.lm_head": "language_model.model.embed_tokens"}


def test_experts() -> None:
    found = Modules({"mlp.experts.0.up_proj": linear(), "mlp.experts.10.up_proj": linear(16)})
    assert {name: spec.rows for name, spec in found.experts("mlp.experts").items()} == {
        "0.up_proj": 32,
        "10.up_proj": 16,
    }
    assert found.experts("other.experts") == {}
    assert found.not_asked() == set()


def test_modules_without_a_place_are_told() -> None:
    found = modules()
    found.quantized(found.parts(f"{ATTENTION}.qkv_proj", FUSED))
    assert found.not_asked() == {"model.embed_tokens"}
    message = str(refusals.no_place(found.not_asked(), "FooForCausalLM"))
    assert "1 quantized modules that vLLM's FooForCausalLM does not ask for" in message
    assert "model.embed_tokens" in message
    assert "vqllm dequantize" in message


class Fused(nn.Module):
    """A fused linear as vLLM loads it: q packed, k dense, v packed in another codec."""

    def __init__(self) -> None:
        super().__init__()
        self.specs = [linear(), None, linear(16, format="uniform")]
        self.stored = Stored(dict(enumerate(self.specs)))
        self.checks = 0
        names = self.stored.names(torch.bfloat16)
        self.names = place_holders(self, names, loader_into(self.stored, self.check))

    def check(self) -> None:
        self.checks += 1

    def parts(self) -> list[dict[str, Tensor]]:
        return [
            random_packed(self.specs[0]),  # type: ignore[arg-type]
            {"weight": torch.randn(16, 64)},
            random_packed(self.specs[2], seed=1),  # type: ignore[arg-type]
        ]


def load(layer: Fused, part: int, name: str, tensor: Tensor, newer: bool) -> None:
    """As vLLM does: the shard is an attribute of the tensor (0.32) or an argument (before)."""
    shard, parameter = "qkv"[part], getattr(layer, name)
    if newer:
        tensor.shard_id = shard  # type: ignore[attr-defined]
        parameter.weight_loader(parameter, tensor)
    else:
        parameter.weight_loader(parameter, tensor, shard)


@pytest.mark.parametrize("newer", [False, True])
def test_both_interfaces_of_the_loader(newer: bool) -> None:
    layer = Fused()
    for part, own in enumerate(layer.parts()):
        for name, tensor in own.items():
            load(layer, part, name, tensor.clone(), newer)
    names = {0: "q", 1: "k", 2: "v"}
    for want, got in zip(layer.parts()[::2], layer.stored.complete(names)[::2]):
        assert set(want) == set(got)
        assert all(torch.equal(want[name], got[name]) for name in want)
    assert layer.checks
    assert layer.weight.dtype == torch.bfloat16
    assert layer.codes.dtype == torch.int16, "its stored dtype: vLLM warns of others"


def test_missing_and_damaged_tensors_are_named() -> None:
    names = {0: "layers.0.q_proj", 1: "k", 2: "v"}
    with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj: found tensors"):
        Fused().stored.complete(names)
    layer = Fused()
    for part, own in enumerate(layer.parts()):
        for name, tensor in own.items():
            load(layer, part, name, tensor, True)
    layer.stored.tensors[0]["scale"] = torch.full((1,), torch.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj: 1 of the 1 numbers of scale"):
        layer.stored.complete(names)
    with pytest.raises(CheckpointError, match="part 7 of"):
        layer.stored.keep(7, "codes", torch.zeros(1))


def test_names_of_shards() -> None:
    assert [part_of(shard, [0, 1, 2]) for shard in (None, "v", 1, (2,), ("k",))] == [0, 2, 1, 2, 1]


def test_products_of_parts_that_share_an_input_and_of_dense_ones() -> None:
    q, v = linear(), linear(16)
    own = random_packed(q)
    parts: list[Any] = [(q, own), (None, {"weight": torch.randn(8, 64)})]
    parts.append((v, {**random_packed(v, 3), "t0_signs": own["t0_signs"]}))
    parts.append((v, random_packed(v, 4)))  # other signs: not with q
    layer = nn.Module()
    held = PackedLinears.of(layer, parts, torch.float32)
    assert [group.parts for group in held.together] == [[0, 2], [3]]
    x = torch.randn(5, 64)
    for (spec, tensors), y in zip(parts, held(layer, x)):
        W_RC = tensors["weight"] if spec is None else spec.dequantize(tensors)
        torch.testing.assert_close(y, x @ W_RC.T, rtol=1e-4, atol=1e-4)


def test_modes() -> None:
    assert mode.requested(None) == "auto"
    assert mode.requested({"vqllm_weights": "packed"}) == "packed"
    with pytest.raises(ModelError, match="'dense'; allowed are auto, packed, decoded"):
        mode.requested({"vqllm_weights": "dense"})
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert mode.is_packed("packed", [linear()], cpu, torch.float32)
    assert not mode.is_packed("auto", [linear()], cpu, torch.float32), "16 bits are too few"
    assert not mode.is_packed("decoded", [linear()], gpu, torch.bfloat16)
    assert mode.is_packed("auto", [linear()], gpu, torch.bfloat16)


def test_messages() -> None:
    assert "--enable-lora" in str(refusals.lora())
    assert "vqllm dequantize DIR OUT" in str(refusals.lora())
    unfit = str(refusals.unfit_vllm("no name LinearBase"))
    assert "no name LinearBase" in unfit
    assert f"tested with vLLM {refusals.TESTED}" in unfit
    size = str(refusals.wrong_size("a.b", linear(), 64, 64))
    assert "a.b is quantized as 32 x 64, but vLLM's module is 64 x 64" in size
    parts = str(refusals.wrong_parts("a.qkv", ["a.q", "a.k"], [64, 32, 32]))
    assert "of 3 parts with 64, 32, 32 rows" in parts
    assert refusals.sizes_that_divide(192, 64) == [1, 3]
    assert refusals.sizes_that_divide(100, 64) == [1]


def test_the_entry_point_is_the_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "vllm" in project["optional-dependencies"]
    [(name, value)] = project["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load() is register


def test_a_vllm_with_another_interface_is_refused_when_a_quantized_folder_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: dict[str, Any] = {}
    quantization: Any = ModuleType("vllm.model_executor.layers.quantization")
    base: Any = ModuleType(f"{quantization.__name__}.base_config")

    def taker(name: str) -> Any:
        return lambda config: registered.setdefault(name, config)

    quantization.register_quantization_config = taker
    base.QuantizationConfig = object
    for module in (ModuleType("vllm"), quantization, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    register()
    register()
    assert "cannot be served by this vLLM" in caplog.text
    with pytest.raises(ModelError, match="has another interface"):
        registered[METHOD].from_config({})


def test_a_vllm_without_other_methods_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "takes no other methods of quantization" in caplog.text
