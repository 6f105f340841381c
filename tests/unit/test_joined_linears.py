"""Linears of one input: what is computed together, for whom, and when they go alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.fake_checkpoint import FORMATS, fake_checkpoint, linear_spec, random_packed
from vqllm import api
from vqllm.runtime import VQLinear, describe, set_weight_cache
from vqllm.runtime.replace import group_inputs
from vqllm_kernels import dispatch

COLS = 37
SIZES = {"q": 20, "k": 8, "v": 8}


@pytest.fixture(params=["on", "off"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    set_weight_cache(request.param)
    yield request.param
    set_weight_cache("auto")


class Attention(nn.Module):
    """Three linears with equal transforms of the input, and one of the same size with its own."""

    def __init__(self, format: str = "e8p", biases: tuple[str, ...] = ("k",)) -> None:
        super().__init__()
        shared: dict[str, Tensor] = {}
        for i, (name, rows) in enumerate({**SIZES, "o": 12}.items()):
            spec = linear_spec(FORMATS[format], rows, COLS)
            tensors = random_packed(spec, i)
            if name != "o":
                shared |= {
                    n: t for n, t in tensors.items() if n not in shared and is_input(spec, n)
                }
                tensors |= {n: t.clone() for n, t in shared.items()}
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(i))
            own = bias if name in biases else None
            self.add_module(name, VQLinear.from_tensors(spec, tensors, own, torch.float32))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]


def is_input(spec, name: str) -> bool:
    prefixes = tuple(f"t{i}_" for i, t in enumerate(spec.transforms) if t.side == "in")
    return name.startswith(prefixes)


def alone(model: Attention, x: Tensor) -> list[Tensor]:
    return [getattr(model, name).multiply(x) for name in SIZES]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, COLS, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the results of all products of groups and of linears alone."""
    found: list[tuple[int, ...]] = []

    def seen(run, size):
        def wrapped(*args):
            result = run(*args)
            found.append(size(result))
            return result

        return wrapped

    monkeypatch.setattr(F, "linear", seen(F.linear, lambda y: (y.shape[-1],)))
    together = seen(dispatch.linears, lambda ys: tuple(y.shape[-1] for y in ys))
    monkeypatch.setattr(dispatch, "linears", together)
    monkeypatch.setattr(dispatch, "linear", seen(dispatch.linear, lambda y: (y.shape[-1],)))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
def test_products_equal_those_of_the_linears_alone(mode, format, shape) -> None:
    model, x = Attention(format), inputs(*shape)
    (group,) = group_inputs(model)
    assert group.members == [model.q, model.k, model.v]
    got, wanted = model(x), alone(model, x)
    for y, y_alone in zip(got, wanted, strict=True):
        assert y.is_contiguous()
        torch.testing.assert_close(y, y_alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_keep_their_dtype(mode, dtype) -> None:
    model, x = Attention(biases=("q", "v")), inputs(3, dtype=dtype)
    group_inputs(model)
    for y, y_alone in zip(model(x), alone(model, x)):
        assert y.dtype == dtype
        torch.testing.assert_close(y, y_alone, rtol=2e-2, atol=2e-2)


def test_one_product_serves_all(mode, products) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    for _ in range(3):
        model(x.clone())
    assert products == [(36,) if mode == "on" else (20, 8, 8)] * 3


@pytest.mark.parametrize("asked", [("q",), ("q", "q"), ("q", "k", "q"), ("v", "q", "k", "v")])
def test_products_nobody_takes_are_computed_once(mode, products, asked) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    wanted = dict(zip(SIZES, alone(model, x)))
    for name in asked:
        assert torch.allclose(getattr(model, name)(x), wanted[name], atol=1e-5)
    other = inputs(5)
    model(other)
    del products[:]
    model(inputs(4))
    model(other)
    together = (36,) if mode == "on" else (20, 8, 8)
    # A second look at all three of them makes one group of them again.
    assert products[-1] == together
    assert len(products) <= 4


def test_an_input_that_was_written_into_is_another_one(mode) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    model.q(x)
    x *= 2
    torch.testing.assert_close(model.k(x), model.k.multiply(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.v(x), model.v.multiply(x))


def test_gradients_are_those_of_the_call_that_asks(mode) -> None:
    model, x = Attention(), inputs(4).requires_grad_()
    group_inputs(model)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model.q(x)
        assert model.k(x).requires_grad
        assert model.v(x).requires_grad


@pytest.mark.parametrize("rows", [1, 3])
def test_results_may_be_written_into(mode, rows) -> None:
    model, x = Attention(), inputs(rows).requires_grad_()
    group_inputs(model)
    first = model.q(x).mul_(2)
    torch.testing.assert_close(first, 2 * model.q.multiply(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.k(x), model.k.multiply(x), rtol=1e-5, atol=1e-5)


def test_changed_weights_are_seen(mode) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    before = model(x)
    model.k.scale *= 2
    torch.testing.assert_close(model(x), alone(model, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x)[1], before[1])
    model.v.load_state_dict({**model.v.state_dict(), "codes": model.v.codes.flip(0)})
    torch.testing.assert_close(model(x), alone(model, x), rtol=1e-5, atol=1e-5)


def test_a_transform_that_differs_ends_the_group(mode) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    model(x)
    name = next(name for name in model.k.packed if name.endswith("_signs"))
    getattr(model.k, name).bitwise_xor_(1)
    torch.testing.assert_close(model(x), alone(model, x), rtol=1e-5, atol=1e-5)


def test_gradients(mode) -> None:
    model = Attention()
    group_inputs(model)
    got, wanted = inputs(4).requires_grad_(), inputs(4).requires_grad_()
    sum(y.square().sum() for y in model(got)).backward()
    sum(y.square().sum() for y in alone(model, wanted)).backward()
    torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    only = inputs(4).requires_grad_()
    model(only)[1].sum().backward()  # two of three outputs have no gradient
    wanted = inputs(4).requires_grad_()
    model.k.multiply(wanted).sum().backward()
    torch.testing.assert_close(only.grad, wanted.grad, rtol=1e-4, atol=1e-4)


def test_copies_and_members_that_left(mode, products) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    twin = copy.deepcopy(model)
    assert twin.q.group is None
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    wanted = alone(model, x)
    model.k = nn.Linear(COLS, 8)
    del products[:]
    assert torch.allclose(model(x)[2], wanted[2], atol=1e-5)
    assert products == [(20,), (8,), (8,)]


def test_weights_are_let_go() -> None:
    model, x = Attention(), inputs(4)
    (group,) = group_inputs(model)
    set_weight_cache("on")
    model(x)
    assert group._stacked is not None
    assert model.q._dense.data_ptr() == group._stacked.data_ptr()
    set_weight_cache("off")
    model(x)
    assert group._stacked is model.q._dense is None
    set_weight_cache("auto")
    model(x)
    model.to(torch.float64)
    assert group._stacked is model.q._dense is None


def test_forward_is_one_graph(mode) -> None:
    model, x = Attention(), inputs(4)
    group_inputs(model)
    wanted = model(x)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(compiled(x), wanted)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("linear" in target for target in targets) == 1


def test_siblings_without_random_transforms_stay_alone() -> None:
    spec = linear_spec(FORMATS["uniform"], 8, COLS)
    plain = type(spec)(rows=8, cols=COLS, format=spec.format, transforms=())
    model = nn.Module()
    for name in ("gate", "up"):
        linear = VQLinear.from_tensors(plain, random_packed(plain), None, torch.float32)
        model.add_module(name, linear)
    assert group_inputs(model) == []


def test_differing_transforms_are_refused() -> None:
    a, o = Attention().q, Attention().o
    hadamard = next(t for t in a.spec.transforms if t.kind == "hadamard")
    other = type(o.spec)(rows=12, cols=COLS, format=o.spec.format, transforms=(hadamard,))
    with pytest.raises(ValueError, match="different transforms"):
        dispatch.linears(inputs(2), [a.packed, random_packed(other)], [a.spec, other], [None, None])


def test_a_loaded_checkpoint_has_its_groups(tmp_path) -> None:
    # Random checkpoints have signs of their own in every linear.
    checkpoint = fake_checkpoint(tmp_path)
    model, _ = api.load(checkpoint.folder)
    assert all(not run.group for run in describe(model))
