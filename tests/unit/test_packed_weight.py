"""`layer.weight` of packed modules: right in every use as numbers, or an error."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.fake_checkpoint import FORMATS, linear_spec, random_packed, rows_spec
from vqllm.errors import PackedWeightError
from vqllm.runtime import PackedModule, VQEmbedding, VQLinear, set_weight_cache

ROWS, COLS = 20, 37


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    yield
    set_weight_cache("auto")


def vq_linear(format: str = "e8p", dtype: torch.dtype = torch.float32) -> VQLinear:
    spec = linear_spec(FORMATS[format], ROWS, COLS)
    return VQLinear.from_tensors(spec, random_packed(spec), None, dtype)


def vq_embedding(dtype: torch.dtype = torch.float32) -> VQEmbedding:
    spec = rows_spec(FORMATS["e8p"], ROWS, COLS)
    return VQEmbedding(spec, dtype).fill(random_packed(spec))


def inputs() -> Tensor:
    return torch.randn(5, COLS, generator=torch.Generator().manual_seed(2))


def assigned(W: Tensor) -> Tensor:
    linear = nn.Linear(COLS, ROWS, bias=False)
    linear.load_state_dict({"weight": W})
    return linear.weight


def copied(W: Tensor) -> Tensor:
    linear = nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data.copy_(W)
    return linear.weight


def input_gradient(W: Tensor) -> Tensor:
    x = inputs().requires_grad_()
    checkpoint(lambda x: F.linear(x, W).square().sum(), x, use_reentrant=False).backward()
    return x.grad


READS: dict[str, Callable[[Tensor], Any]] = {
    "F.linear": lambda W: F.linear(inputs(), W, torch.ones(ROWS)),
    "F.linear of 3 axes": lambda W: F.linear(inputs()[None], W),
    "x @ W.T": lambda W: inputs() @ W.T,
    "einsum": lambda W: torch.einsum("bc,rc->br", inputs(), W),
    "gradient of x": input_gradient,
    "gradient by torch.func": (
        lambda W: torch.func.grad(lambda x: F.linear(x, W).square().sum())(inputs())
    ),
    "vmap": lambda W: torch.func.vmap(lambda x: F.linear(x, W))(inputs()),
    "autocast": lambda W: torch.autocast("cpu")(lambda: F.linear(inputs(), W))(),
    "cross entropy": lambda W: F.cross_entropy(inputs() @ W.T, torch.arange(5)),
    "F.embedding": lambda W: F.embedding(torch.tensor([[3, 0], [19, 3]]), W),
    "norm": lambda W: W.norm(dim=1),
    "norm of detached": lambda W: W.detach().float().norm().item(),
    "data": lambda W: W.data * 2,
    "sum of a row": lambda W: W.data[3].sum(),
    "rows": lambda W: torch.stack(list(W)),
    "chunks": lambda W: torch.cat([inputs() @ part.T for part in W.chunk(3)], -1),
    "split and strided": lambda W: W.split(7)[1][::2, 3:] + 0,
    "as_strided": lambda W: W.as_strided((3, 4), (COLS, 1), 5) * 1,
    "view": lambda W: W.view(-1).sum(),
    "reshape": lambda W: W.reshape(COLS, ROWS) + 0,
    "contiguous transpose": lambda W: W.t().contiguous(),
    "clone": lambda W: W.clone(),
    "to another dtype": lambda W: W.to(torch.float64),
    "half": lambda W: W.half(),
    "where": lambda W: torch.where(W > 0, W, 0),
    "index": lambda W: W[torch.tensor([1, 2])],
    "cat": lambda W: torch.cat([W, W]),
    "svd": lambda W: torch.linalg.svdvals(W.float()).round(decimals=4),
    "mean and std": lambda W: torch.stack([W.mean(), W.std(), W.max(), W.abs().min()]),
    "numpy": lambda W: torch.tensor(W.numpy()),
    "np.asarray": lambda W: torch.tensor(np.asarray(W)),
    "tolist": lambda W: torch.tensor(W.tolist()),
    "torch.tensor": lambda W: W.clone().detach(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda W: pickle.loads(pickle.dumps(W)),
    "dlpack": lambda W: torch.from_dlpack(W),
    "load_state_dict": assigned,
    "copy_": copied,
    "out": lambda W: torch.add(W, 1, out=torch.empty(ROWS, COLS)),
    "added in place to another": lambda W: torch.ones(ROWS, COLS).add_(W, alpha=0.5),
    "zeros_like": torch.zeros_like,
    "ones like": lambda W: torch.ones_like(W, dtype=torch.float64),
    "new_full": lambda W: W.new_full((3,), 2.0),
    "equal": lambda W: torch.equal(W, W.clone()),
    "compiled": lambda W: torch.compile(F.linear, backend="eager")(inputs(), W),
}


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("read", READS)
def test_reading_gives_what_the_dense_weights_give(read: str, mode: str) -> None:
    set_weight_cache(mode)
    module = vq_linear()
    module(inputs())  # keeps the decoded weights where the setting says so
    dense = module.dequantize()
    got, want = READS[read](module.weight), READS[read](dense.clone())
    assert type(got) is type(want)
    if isinstance(got, Tensor):
        assert (got.dtype, got.device, got.shape) == (want.dtype, want.device, want.shape)
        got, want = got.detach(), want.detach()
        assert torch.equal(got, want)
        got.mul_(0)  # what was read is a copy
    else:
        assert got == want
    assert torch.equal(module.dequantize(), dense)
    assert torch.equal(module(inputs()), F.linear(inputs(), dense)) or mode == "off"


@pytest.mark.parametrize("make", [vq_linear, vq_embedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_tells_what_the_layer_is(make: Callable[..., PackedModule], dtype: torch.dtype) -> None:
    module = make(dtype=dtype)
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert weight.shape == (ROWS, COLS)
    assert len(weight) == weight.size(0) == ROWS
    assert weight.dtype == dtype
    assert weight.device == module.device == torch.device("cpu")
    assert weight.is_cpu
    assert not weight.is_meta
    assert not weight.requires_grad
    assert weight.stride() == (COLS, 1)
    assert weight.is_contiguous()
    assert (weight.numel(), weight.nbytes) == (ROWS * COLS, ROWS * COLS * dtype.itemsize)
    assert weight.is_floating_point()
    assert repr(weight) == f"PackedWeight(({ROWS}, {COLS}), dtype={dtype}, device='cpu')"
    assert torch.equal(weight, module.dequantize())
    assert "weight" not in module.state_dict()
    assert "weight" not in dict(module.named_parameters())
    assert torch.empty(2, device=weight.device, dtype=weight.dtype).dtype == dtype


def test_a_cast_is_told_and_followed() -> None:
    module = vq_linear()
    before = module.weight
    module.bfloat16()
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight, module.dequantize(torch.bfloat16))
    assert torch.equal(before, module.dequantize(torch.float32))


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "+=": lambda layer: layer.weight.__iadd__(1),
    "data in place": lambda layer: layer.weight.data.add_(1),
    "data +=": lambda layer: exec("layer.weight.data += 1"),
    "a row": lambda layer: layer.weight.__setitem__(0, 0.0),
    "a row of data": lambda layer: layer.weight.data[0].zero_(),
    "a transposed view": lambda layer: layer.weight.t().zero_(),
    "a chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(ROWS, COLS)),
    "set data": lambda layer: setattr(layer.weight, "data", torch.zeros(ROWS, COLS)),
    "set grad": lambda layer: setattr(layer.weight, "grad", torch.zeros(ROWS, COLS)),
    "set_": lambda layer: layer.weight.set_(torch.zeros(ROWS, COLS)),
    "out": lambda layer: torch.zeros(ROWS, COLS, out=layer.weight),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "the module's weight": lambda layer: setattr(layer, "weight", torch.zeros(ROWS, COLS)),
    "the module's parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.zeros(ROWS, COLS))
    ),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", True),
    "Parameter": lambda layer: nn.Parameter(layer.weight),
    "frozen Parameter": lambda layer: nn.Parameter(layer.weight, requires_grad=False),
    "data_ptr": lambda layer: layer.weight.data_ptr(),
    "storage": lambda layer: layer.weight.storage(),
}


@pytest.mark.parametrize("make", [vq_linear, vq_embedding])
@pytest.mark.parametrize("write", WRITES)
def test_what_would_be_lost_is_refused(make: Callable[[], PackedModule], write: str) -> None:
    module = make()
    before, tensors = module.dequantize(), module.state_dict()
    with pytest.raises(PackedWeightError, match=r"dequantize\(\)"):
        WRITES[write](module)
    assert torch.equal(module.dequantize(), before)
    assert module.state_dict().keys() == tensors.keys()


def test_its_memory_cannot_become_that_of_another() -> None:
    linear, before = nn.Linear(COLS, ROWS), vq_linear()
    for value in (before.weight, before.weight.data):
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            linear.weight.data = value
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        before.weight.untyped_storage().data_ptr()
    with pytest.raises((RuntimeError, PackedWeightError)):
        save_safetensors({"weight": before.weight})
    linear.weight.data = before.dequantize()
    assert torch.equal(linear.weight, before.weight)


def test_nothing_dense_is_kept_for_it() -> None:
    set_weight_cache("off")
    module, x = vq_linear(), inputs().requires_grad_()
    weight = module.weight
    y = F.linear(x, weight)
    decoded = []
    module.dequantize = lambda dtype=None, own=module.dequantize: decoded.append(1) or own(dtype)
    weight.norm()
    y.sum().backward()
    assert len(decoded) == 2  # for the norm, and again for the backward pass
    assert module._dense is None


def test_kept_weights_are_what_is_read() -> None:
    set_weight_cache("on")
    module = vq_linear()
    module(inputs())
    module.dequantize = None  # type: ignore[assignment]
    assert torch.equal(F.linear(inputs(), module.weight), module(inputs()))
    array = module.weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_changed_tensors_are_followed() -> None:
    module = vq_linear()
    module(inputs())
    weight, before = module.weight, module.dequantize()
    module.scale *= 2
    assert torch.allclose(weight + 0, 2 * before)


def test_values_that_are_not_there_are_refused() -> None:
    module = vq_linear().to("meta")
    weight = module.weight
    assert weight.is_meta
    for use in (
        lambda: F.linear(inputs(), weight),
        lambda: inputs() @ weight.T,
        lambda: weight.norm(),
        lambda: weight.float() * 2,
        lambda: weight.to(torch.float64),
        lambda: weight.numpy(),
        lambda: torch.empty(ROWS, COLS).copy_(weight),
    ):
        with pytest.raises(PackedWeightError, match="offloaded, or not loaded yet"):
            use()
    assert F.linear(inputs().to("meta"), weight).shape == (5, ROWS)
    assert torch.zeros_like(weight, device="cpu").sum() == 0


def test_it_lives_no_longer_than_it_is_used() -> None:
    module = vq_linear()
    weight = weakref.ref(module.weight)
    gc.collect()
    assert weight() is None


class ByHand(nn.Module):
    """Low rank beside a layer, its parameters made where the layer's weight is."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(torch.randn(4, base.weight.shape[1], **like))
        self.B = nn.Parameter(torch.zeros(base.weight.shape[0], 4, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.T) @ self.B.T


def test_an_adapter_by_hand_changes_nothing_at_first(poisoned: None) -> None:
    module = vq_linear()
    adapter = ByHand(module)
    assert torch.equal(adapter(inputs()), module(inputs()))
    adapter(inputs()).sum().backward()
    assert adapter.B.grad.isfinite().all()


class Typed(nn.Module):
    """Casts its input to the dtype of a weight, as models of transformers do, and regularizes."""

    def __init__(self, layer: VQLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.layer.weight.dtype)
        return self.layer(x), F.linear(x, self.layer.weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["on", "off"])
def test_graphs_read_it(format: str, mode: str) -> None:
    set_weight_cache(mode)
    model, x = Typed(vq_linear(format)), inputs()
    want = model(x)
    torch._dynamo.reset()
    graphs = [torch.compile(model, backend="eager", fullgraph=True)]
    if mode == "off":
        graphs.append(torch.export.export(model, (x,)).module())
    for graph in graphs:
        for got, wanted in zip(graph(x), want):
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_state_dicts_and_copies_of_modules(tmp_path: Path) -> None:
    module = vq_linear()
    before = module.weight.clone()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = VQLinear(module.spec, False, torch.float32, "cpu")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same.weight, before)
        same.scale.data.mul_(2)
        assert torch.equal(module.weight, before)
    torch.save(module.weight, tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt", weights_only=True), before)
