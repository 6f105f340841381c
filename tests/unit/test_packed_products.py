"""Modules whose products are made from packed weights on a CPU, in bfloat16."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.parity.test_cpu_products import EVERY, whole
from vqllm import set_weight_cache
from vqllm.runtime import VQLinear, describe, kept_bytes
from vqllm.runtime.replace import group_inputs
from vqllm_kernels.cpu import instructions

pytestmark = pytest.mark.skipif(
    instructions.instructions() == "portable", reason="decoded weights are faster here"
)

COLS = 130


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    yield
    set_weight_cache("auto")


def linear(rows: int = 70, name: str = "bytes2 2", bias: bool = False) -> VQLinear:
    spec, tensors = whole(rows, COLS, EVERY[name])
    b = torch.randn(rows).bfloat16() if bias else None
    return VQLinear.from_tensors(spec, tensors, b, torch.bfloat16)


class Three(nn.Module):
    """Linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = linear(70, bias=True), linear(33, "bytes4 2.5")
        for name in ("t0_scale", "t2_signs"):
            setattr(self.k, name, getattr(self.q, name))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x)), -1)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, COLS, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert y.dtype == expected.dtype
    assert (y.float() - expected.float()).norm() < 0.01 * expected.float().norm()


@pytest.mark.parametrize("shape", [(1,), (2, 3), (40,)])
def test_equals_dense_weights_and_keeps_none(shape: tuple[int, ...]) -> None:
    module, x = linear(bias=True), activations(*shape)
    with torch.no_grad():
        y = module(x)
    assert y.shape == (*shape, 70)
    assert_close(y, torch.nn.functional.linear(x, module.dequantize(), module.bias))
    assert module._dense is None
    assert 0 < kept_bytes(module) < 4 * 4 * (70 + COLS) + 1
    [choice] = describe(module, (1,))
    assert choice.implementation == "packed"


def test_no_rows() -> None:
    with torch.no_grad():
        assert linear()(activations(0)).shape == (0, 70)


def test_changes_of_packed_tensors_are_seen() -> None:
    module, x = linear(), activations(1)
    with torch.no_grad():
        before = module(x)
        module.codes.copy_(module.codes.flip(0).flip(1).flip(2))
        after = module(x)
        assert not torch.equal(before, after)
        assert_close(after, x @ module.dequantize().T)
        module.t1_scale.mul_(2)  # of the output
        assert_close(module(x), 2 * after)
        module.bias = nn.Parameter(torch.ones(70).bfloat16(), requires_grad=False)
        assert_close(module(x), 2 * after + 1)


def test_gradients_are_those_of_dense_weights() -> None:
    module, x = linear(), activations(2).requires_grad_()
    y = module(x)
    y.float().sum().backward()
    assert module._dense is not None
    assert x.grad is not None
    assert_close(x.grad, module.dequantize(torch.float32).sum(0).bfloat16().expand(2, -1))


def test_the_weight_cache_decides() -> None:
    module, x = linear(), activations(1)
    with torch.no_grad():
        packed = module(x)
        set_weight_cache("on")
        dense = module(x)
        assert module._dense is not None
        set_weight_cache("off")
        assert torch.equal(module(x), packed)
    assert_close(dense, packed)


def test_float32_keeps_decoded_weights() -> None:
    module = linear()
    with torch.no_grad():
        module(activations(1).float())
    assert module._dense is not None


def test_linears_of_one_input_are_one_call_with_the_same_results() -> None:
    model, x = Three(), activations(1, 1)
    with torch.no_grad():
        alone = model(x)
        [group] = group_inputs(model)
        for _ in range(3):
            assert torch.equal(model(x.clone()), alone)
        assert group.products.nbytes > 0
        assert model.q.products.nbytes > 0  # from before they were joined
        assert torch.equal(model(activations(2, 4))[:1, :1], model(activations(2, 4)[:1, :1]))


def test_copies_have_calls_of_their_own() -> None:
    model, x = Three(), activations(1)
    group_inputs(model)
    with torch.no_grad():
        expected = model(x)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(same(x), expected)
            same.q.t1_scale.mul_(2)
            assert not torch.equal(same(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_compiled_graph_has_the_same_results(rows: int) -> None:
    model, x = Three(), activations(rows)
    group_inputs(model)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
