"""VQLinear: what it computes, what it keeps in memory, what moving and casting do to it."""

import copy
import logging
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.fake_checkpoint import FORMATS, linear_spec, random_packed, rows_spec
from vqllm.errors import CheckpointError
from vqllm.runtime import VQEmbedding, VQLinear, describe, replace_modules, set_weight_cache
from vqllm.runtime import cache as weight_cache
from vqllm.runtime import embedding as embedding_module
from vqllm_kernels import linear as linear_module

ROWS, COLS = 20, 37


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    set_weight_cache("auto")
    yield
    set_weight_cache("auto")


def vq_linear(
    format: str = "residual", dtype: torch.dtype = torch.float32, bias: bool = True
) -> VQLinear:
    spec = linear_spec(FORMATS[format], ROWS, COLS)
    b = torch.randn(ROWS, generator=torch.Generator().manual_seed(1)).to(dtype) if bias else None
    return VQLinear.from_tensors(spec, random_packed(spec), b, dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, COLS, generator=torch.Generator().manual_seed(2)).to(dtype)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_packed_product_equals_dense(format: str, bias: bool, shape: tuple[int, ...]) -> None:
    linear, x = vq_linear(format, bias=bias), inputs(*shape)
    W = linear.spec.dequantize(linear.packed)
    want = F.linear(x, W, linear.bias)
    set_weight_cache("on")
    assert torch.equal(linear(x), want)
    set_weight_cache("off")
    y = linear(x)
    assert (y.shape, y.dtype) == ((*shape, ROWS), x.dtype)
    assert y.numel() == 0 or relative_error(y, want) < 1e-6


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_exact_as_dense_ones(mode: str, dtype: torch.dtype) -> None:
    linear = vq_linear(dtype=dtype)
    x = inputs(64, dtype=dtype)
    W = linear.spec.dequantize(linear.packed)
    exact = F.linear(x.double(), W.double(), linear.bias.double())
    dense = F.linear(x, W.to(dtype), linear.bias)
    set_weight_cache(mode)
    y = linear(x)
    assert y.dtype == dtype
    # The packed product rounds x' and y' on the way through two transforms each.
    assert relative_error(y, exact) < 4 * relative_error(dense, exact)


def test_activations_may_have_another_dtype_than_the_model() -> None:
    linear, x = vq_linear(dtype=torch.bfloat16), inputs(3)
    for mode in ("on", "off"):
        set_weight_cache(mode)
        assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("mode", ["on", "off"])
def test_gradient_reaches_the_activations(mode: str) -> None:
    set_weight_cache(mode)
    linear, x = vq_linear("e8p"), inputs(4).requires_grad_()
    linear(x).square().sum().backward()
    W = linear.spec.dequantize(linear.packed)
    want = 2 * F.linear(x, W, linear.bias).detach() @ W
    assert relative_error(x.grad, want) < 1e-5
    assert all(parameter.grad is None for parameter in linear.parameters())


def test_auto_keeps_weights_on_the_cpu_and_off_does_not() -> None:
    linear, x = vq_linear(), inputs(2)
    assert weight_cache.keeps_weights(torch.device("cpu"))
    assert not weight_cache.keeps_weights(torch.device("cuda"))
    linear(x)
    kept = linear._dense
    assert kept is not None
    linear(x)
    assert linear._dense is kept
    set_weight_cache("off")
    linear(x)
    assert linear._dense is None
    set_weight_cache("on")
    assert weight_cache.keeps_weights(torch.device("cuda"))
    with pytest.raises(ValueError, match="weight cache 'never'; allowed are auto, on, off"):
        set_weight_cache("never")  # type: ignore[arg-type]


def test_kept_weights_follow_the_packed_ones() -> None:
    linear, x = vq_linear("e8p", bias=False), inputs(2)
    before = linear(x)
    linear.scale *= 2
    assert relative_error(linear(x), 2 * before) < 1e-6
    linear.load_state_dict({**linear.state_dict(), "scale": linear.scale / 2})
    assert torch.equal(linear(x), before)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(linear(x), before)


def test_weights_kept_in_inference_mode_serve_gradients_later() -> None:
    linear, x = vq_linear(), inputs(2)
    with torch.inference_mode():
        linear(x)
    linear(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_cost_of_keeping_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    set_weight_cache("on")
    with caplog.at_level(logging.INFO, logger="vqllm"):
        for _ in range(2):
            vq_linear()(inputs(2))
    lines = [r.message for r in caplog.records if "decoded on first use and kept" in r.message]
    assert len(lines) == 1
    assert "4 bytes each in torch.float32" in lines[0]


def test_kept_weights_are_neither_saved_nor_copied() -> None:
    linear = vq_linear()
    linear(inputs(2))
    assert set(linear.state_dict()) == {*linear.spec.layout(), "bias"}
    assert copy.deepcopy(linear)._dense is None
    assert linear._dense is not None
    assert torch.equal(copy.deepcopy(linear)(inputs(2)), linear(inputs(2)))


@pytest.mark.parametrize("mode", ["on", "off"])
def test_compiles_to_one_graph(mode: str) -> None:
    linear, x = vq_linear("e8p"), inputs(3)
    set_weight_cache(mode)
    want = linear(x)
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), want)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.float16).float(),
    ],
)
@pytest.mark.parametrize("format", ["lut_row", "uniform", "e8p"])
def test_casting_changes_the_bias_only(format: str, cast) -> None:
    linear = vq_linear(format)
    before = {name: tensor.clone() for name, tensor in linear.packed.items()}
    linear(inputs(2))
    outer = cast(nn.Sequential(linear))
    assert outer[0] is linear
    for name, tensor in linear.packed.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
        assert isinstance(tensor, nn.Parameter)
    assert linear.bias.dtype == linear.weight.dtype == cast(nn.Linear(2, 2)).weight.dtype
    x = inputs(2, dtype=linear.bias.dtype)
    assert linear(x).dtype == x.dtype


def test_a_dtype_that_changed_is_known_without_a_bias() -> None:
    assert vq_linear(bias=False).to(torch.float16).weight.dtype == torch.float16


def test_moving_to_another_device_moves_everything() -> None:
    linear = vq_linear().to("meta")
    assert {tensor.device.type for tensor in linear.parameters()} == {"meta"}
    restored = linear.to_empty(device="cpu")
    assert {tensor.device.type for tensor in restored.parameters()} == {"cpu"}
    assert {n: t.dtype for n, t in restored.packed.items()} == {
        n: t.dtype for n, t in linear.spec.layout().items()
    }


def test_weight_is_no_parameter() -> None:
    linear = vq_linear(dtype=torch.bfloat16)
    weight = linear.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((ROWS, COLS), torch.bfloat16, "cpu")
    assert "weight" not in dict(linear.named_parameters())
    assert linear.dequantize().dtype == torch.bfloat16
    assert linear.dequantize(torch.float32).dtype == torch.float32
    assert "format=residual-v1" in repr(linear)


def test_new_linears_are_on_meta_and_need_no_gradient() -> None:
    linear = VQLinear(linear_spec(FORMATS["lut_row"], ROWS, COLS), True, torch.bfloat16)
    assert all(p.is_meta and not p.requires_grad for p in linear.parameters())
    assert not list(linear.buffers())


def test_tensors_that_are_not_those_of_the_spec() -> None:
    spec = linear_spec(FORMATS["e8p"], ROWS, COLS)
    with pytest.raises(ValueError, match="found tensors"):
        VQLinear.from_tensors(spec, {}, None, torch.float32)


TOKENS = torch.tensor([[3, 0, 19], [7, 7, 12]])


def vq_embedding(format: str = "residual", dtype: torch.dtype = torch.float32) -> VQEmbedding:
    spec = rows_spec(FORMATS[format], ROWS, COLS)
    return VQEmbedding(spec, dtype).fill(random_packed(spec))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_those_of_the_dense_matrix(
    format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = vq_embedding(format, dtype)
    dense = embedding.dequantize()
    assert (dense.shape, dense.dtype) == ((ROWS, COLS), dtype)
    wanted = F.embedding(TOKENS, dense)
    close = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-5}
    assert torch.allclose(embedding(TOKENS), wanted, **close)
    whole = embedding(TOKENS)
    monkeypatch.setattr(embedding_module, "CHUNK_WEIGHTS", 2 * COLS)  # two tokens at a time, or one
    assert torch.allclose(embedding(TOKENS.int()), whole, **close)
    assert embedding(TOKENS[0, 1]).shape == (COLS,)
    assert embedding(TOKENS[:, :0]).shape == (2, 0, COLS)
    with pytest.raises(IndexError):
        embedding(torch.tensor([ROWS * 8]))


def test_an_embedding_keeps_dense_weights_only_when_told_to() -> None:
    embedding = vq_embedding()
    wanted = embedding(TOKENS)
    assert embedding._dense is None
    assert describe(embedding, (1,))[0].implementation == "reference"
    set_weight_cache("on")
    assert torch.allclose(embedding(TOKENS), wanted, atol=1e-6)
    assert embedding._dense is not None
    assert describe(embedding, (1,))[0].implementation == "dense weights, kept"


@pytest.mark.parametrize("format", ["lut_col", "uniform"])
def test_an_embedding_keeps_its_packed_dtypes(format: str) -> None:
    embedding = vq_embedding(format)
    before = {name: tensor.clone() for name, tensor in embedding.packed.items()}
    embedding.to(torch.bfloat16)
    assert all(torch.equal(t, before[n]) for n, t in embedding.packed.items())
    assert embedding(TOKENS).dtype == embedding.weight.dtype == torch.bfloat16
    assert embedding.weight.is_cpu
    assert set(embedding.state_dict()) == set(embedding.spec.layout())


def test_an_embedding_compiles_to_one_graph() -> None:
    embedding = vq_embedding("e8p")
    torch._dynamo.reset()
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), embedding(TOKENS))


def test_rows_that_hang_together_are_no_embedding() -> None:
    with pytest.raises(ValueError, match="cannot be decoded one by one"):
        VQEmbedding(linear_spec(FORMATS["e8p"], ROWS, COLS), torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_head_is_decoded_in_blocks(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "BLOCK_ROWS", 1)
    set_weight_cache("off")
    spec = rows_spec(FORMATS[format], ROWS, COLS)
    tensors, x = random_packed(spec), inputs(4)
    whole = VQLinear.from_tensors(spec, tensors, None, torch.float32)
    y, W_RC = whole(x), whole.dequantize()
    monkeypatch.setattr(linear_module, "BLOCK_WEIGHTS", 7 * COLS)
    assert len(spec.row_blocks()) > 2
    blocks = VQLinear.from_tensors(spec, tensors, None, torch.float32)
    assert relative_error(blocks(x), y) < 1e-6
    assert relative_error(blocks.dequantize(), W_RC) < 1e-6
    # A transform that mixes rows leaves no blocks.
    assert len(linear_spec(FORMATS[format], ROWS, COLS).row_blocks()) == 1


def test_tied_modules_have_one_set_of_tensors() -> None:
    linked = nn.ModuleDict({"emb": nn.Embedding(ROWS, COLS), "head": nn.Linear(COLS, ROWS)})
    spec = rows_spec(FORMATS["uniform"], ROWS, COLS)
    replace_modules(linked, {"emb": spec}, {"head": "emb"})
    emb, head = linked["emb"], linked["head"]
    assert isinstance(emb, VQEmbedding)
    assert isinstance(head, VQLinear)
    assert all(head.packed[name] is tensor for name, tensor in emb.packed.items())
    assert head.bias is not None
    moved = linked.to_empty(device="cpu").to(torch.float64)
    assert moved["head"].codes.dtype == torch.uint8


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(COLS, ROWS), nn.ReLU(), nn.Linear(ROWS, 3, bias=False))


def test_replacement_by_name() -> None:
    changed = model().eval()
    replace_modules(changed, {"0": linear_spec(FORMATS["e8p"], ROWS, COLS)})
    assert isinstance(changed[0], VQLinear)
    assert type(changed[2]) is nn.Linear
    assert changed[0].bias is not None
    assert not changed[0].training


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("0", 99, "0 is quantized, 99 x 37, but Sequential has 20 x 37 there"),
        ("1", ROWS, "but it is a ReLU in Sequential"),
        ("5.up", ROWS, "but Sequential has no module of that name"),
    ],
)
def test_replacement_that_does_not_fit_changes_nothing(name: str, rows: int, message: str) -> None:
    unchanged = model()
    linears = {
        "2": linear_spec(FORMATS["e8p"], 3, ROWS),
        name: linear_spec(FORMATS["e8p"], rows, COLS),
    }
    with pytest.raises(CheckpointError, match=re.escape(message)):
        replace_modules(unchanged, linears)
    assert [type(module) for module in unchanged] == [nn.Linear, nn.ReLU, nn.Linear]
    with pytest.raises(CheckpointError, match="names no quantized module"):
        replace_modules(unchanged, {})


def test_describe() -> None:
    changed = nn.Sequential(vq_linear("e8p"), nn.ReLU())
    (run,) = describe(changed, num_rows=(1,))
    assert (run.name, run.implementation) == ("0", "dense weights, kept")
    assert run.reason == "weight cache 'auto' on cpu"
    set_weight_cache("off")
    few, many = describe(changed)
    assert (few.num_rows, many.num_rows) == (1, 2048)
    assert few.implementation == many.implementation == "reference"
    assert describe(changed.to("meta"))[0].reason == "its tensors are offloaded"


def test_data_exchanged_under_a_parameter_is_seen() -> None:
    linear, x = vq_linear("e81b"), inputs(3)
    set_weight_cache("on")
    before = linear(x)
    linear.scale.data = linear.scale.data * 2
    assert torch.equal(linear(x), F.linear(x, linear.dequantize(), linear.bias))
    assert not torch.equal(linear(x), before)
