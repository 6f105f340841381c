"""Decoded weights follow the packed tensors, whatever way these change."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.fake_checkpoint import FORMATS, fake_checkpoint, linear_spec, random_packed
from tests.unit.test_joined_linears import COLS, SIZES, Attention, inputs
from vqllm import api
from vqllm.runtime import PackedModule, VQLinear, set_weight_cache
from vqllm.runtime.packed import own_tensors
from vqllm.runtime.parameter import PackedParameter, Parameters
from vqllm.runtime.replace import group_inputs


@pytest.fixture(autouse=True)
def kept_weights() -> Iterator[None]:
    set_weight_cache("on")
    yield
    set_weight_cache("auto")


def twice(p: Tensor) -> Tensor:
    return p.detach().clone() * 2


def parameter(p: Tensor) -> nn.Parameter:
    return nn.Parameter(twice(p), requires_grad=False)


def in_inference_mode(change: Callable[[VQLinear], object]) -> Callable[[VQLinear], None]:
    def changed(linear: VQLinear) -> None:
        with torch.inference_mode():
            change(linear)

    return changed


def assign(linear: VQLinear) -> None:
    state = {name: t.clone() for name, t in linear.state_dict().items()}
    linear.load_state_dict({**state, "scale": twice(linear.scale)}, assign=True)


def swap_on_load(linear: VQLinear) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        linear.load_state_dict({**linear.state_dict(), "scale": twice(linear.scale)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def exchange(linear: VQLinear) -> None:
    linear.scale.data = twice(linear.scale)


def moved_by_a_library(linear: VQLinear) -> None:
    set_module_tensor_to_device(linear, "scale", "cpu", value=twice(linear.scale))


CHANGES: dict[str, Callable[[VQLinear], object]] = {
    "in place": lambda m: m.scale.mul_(2),
    "in inference mode": in_inference_mode(lambda m: m.scale.mul_(2)),
    "of an alias": lambda m: m.scale.detach().mul_(2),
    "of an item": lambda m: m.scale.__setitem__(0, 3.0),
    "set_": lambda m: m.scale.set_(twice(m.scale)),
    "data": exchange,
    "data in inference mode": in_inference_mode(exchange),
    "swap_tensors": lambda m: torch.utils.swap_tensors(m.scale, parameter(m.scale)),
    "register_parameter": lambda m: m.register_parameter("scale", parameter(m.scale)),
    "setattr": lambda m: setattr(m, "scale", parameter(m.scale)),
    "load_state_dict": lambda m: m.load_state_dict({**m.state_dict(), "scale": twice(m.scale)}),
    "load_state_dict, assigned": assign,
    "load_state_dict, swapped": swap_on_load,
    "_parameters": lambda m: m._parameters.__setitem__("scale", parameter(m.scale)),
    "_parameters, updated": lambda m: m._parameters.update(scale=parameter(m.scale)),
    "_parameters, joined": lambda m: m._parameters.__ior__({"scale": parameter(m.scale)}),
    "deleted and set": lambda m: m._parameters.setdefault(
        "scale", parameter(m._parameters.pop("scale"))
    ),
    "wrapped": lambda m: m.register_parameter("scale", nn.Parameter(m.scale, False).mul_(2)),
    "moved by a library": moved_by_a_library,
    "fill": lambda m: m.fill({**m.packed, "scale": twice(m.scale)}),
    "tie": lambda m: m.tie(copy.deepcopy(m).fill({**m.packed, "scale": twice(m.scale)})),
}


def own(model: Attention) -> None:
    own_tensors([[model.q, model.k, model.v], [model.o]])


@pytest.fixture(params=["given", "loaded"])
def model(request: pytest.FixtureRequest) -> Attention:
    """With tensors as they are given to modules, or as a loader leaves them."""
    made = Attention()
    group_inputs(made)
    if request.param == "loaded":
        own(made)
    return made


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(model: Attention, change: str, inference: bool) -> None:
    x = inputs(2)
    with torch.inference_mode(inference):
        before = [*model(x), model.o(x)]
        for name in ("k", "o"):
            for _ in range(2):  # what was exchanged can be changed again
                CHANGES[change](getattr(model, name))
                check(model, x)
        after = [*model(x), model.o(x)]
    changed = [not torch.equal(old, new) for old, new in zip(before, after)]
    assert changed == [False, True, False, True]


def check(model: Attention, x: Tensor) -> None:
    for y, linear in zip([*model(x), model.o(x)], (model.q, model.k, model.v, model.o)):
        assert linear._dense is not None
        wanted = F.linear(x, linear.spec.dequantize(linear.packed), linear.bias)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_every_packed_tensor_is_watched(model: Attention) -> None:
    x = inputs(2)
    for name in model.k.packed:
        kept = model(x) and model.k._dense
        model.k.packed[name].add_(0)
        model(x)
        assert model.k._dense is not kept
        assert model(x)[1].shape[-1] == SIZES["k"]


def test_nothing_is_decoded_again_without_a_change(model: Attention) -> None:
    x = inputs(2)
    model(x), model.o(x)
    kept = [linear._dense for linear in (model.q, model.k, model.v, model.o)]
    model(x.clone()), model.o(x)
    model.state_dict(), copy.deepcopy(model), list(model.parameters()), model.requires_grad_(False)
    model(x), model.o(x)
    for linear, dense in zip((model.q, model.k, model.v, model.o), kept):
        assert linear._dense is dense


@pytest.mark.parametrize("bias", [None, 1.0])
def test_a_bias_that_comes_or_goes_is_seen(model: Attention, bias: float | None) -> None:
    x = inputs(2)
    model(x)
    for linear in (model.q, model.k, model.o):
        new = torch.full((linear.out_features,), bias) if bias else None
        linear.bias = None if new is None else nn.Parameter(new, requires_grad=False)
    check(model, x)


def test_data_changed_through_a_loaded_parameter_is_seen() -> None:
    model, x = Attention(), inputs(2)
    own(model)
    before = model.o(x)
    model.o.scale.data.mul_(2)
    assert not torch.equal(model.o(x), before)
    check(model, x)


@pytest.mark.parametrize("name", ["scale", "codes"])
def test_a_parameter_of_a_loaded_parameter(name: str) -> None:
    model, x = Attention(), inputs(2)
    own(model)
    model.o(x)
    old, kept = getattr(model.o, name), model.o._dense
    new = nn.Parameter(old, requires_grad=old.is_floating_point())
    assert isinstance(new, nn.Parameter)
    assert new.is_leaf
    assert (new.requires_grad, old.requires_grad) == (old.is_floating_point(), False)
    assert new.data_ptr() == old.data_ptr()
    assert type(new)(old.clone(), requires_grad=False).clock is not old.clock
    model.o(x)
    assert model.o._dense is kept  # to make it changes nothing
    with torch.no_grad():
        new.zero_()
    check(model, x)
    assert model.o._dense is not kept


def test_what_is_detached_from_a_loaded_parameter_is_no_parameter() -> None:
    model = Attention()
    own(model)
    holder = nn.Module()
    holder.seen = model.o.scale.detach()
    assert not dict(holder.named_parameters())
    assert type(model.o.scale + 0) is type(model.o.scale.data) is Tensor
    again = pickle.loads(pickle.dumps(model.o.scale))
    assert type(again) is nn.Parameter
    assert torch.equal(again, model.o.scale)


def test_modules_get_new_parameters_when_they_are_moved(model: Attention) -> None:
    x = inputs(2)
    wanted = model.o(x)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to("cpu", torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert torch.equal(model.o(x), wanted)
    for change in CHANGES.values():
        change(model.o)
        assert not torch.equal(model.o(x), wanted)
        wanted = model.o(x)


def test_copies_go_their_own_ways(model: Attention) -> None:
    x = inputs(2)
    wanted = model(x)
    twin = copy.deepcopy(model)
    group_inputs(twin)
    for name in SIZES:
        a, b = getattr(model, name), getattr(twin, name)
        assert [type(t) for t in b.packed.values()] == [type(t) for t in a.packed.values()]
        assert type(b._parameters) is type(a._parameters)
    twin(x)
    for change in CHANGES.values():
        change(twin.k)
        check(twin, x)
    assert all(torch.equal(y, w) for y, w in zip(model(x), wanted))


def test_copies_share_clocks_as_the_originals_do() -> None:
    model = Attention()
    own(model)
    twin = copy.deepcopy(model)
    q, k, o = ({id(t.clock) for t in m.packed.values()} for m in (twin.q, twin.k, twin.o))
    assert q == k == {id(twin.q._parameters.clock)} == {id(twin.k._parameters.clock)}
    assert len(o) == 1
    assert not q & o
    assert twin.q.scale.clock is not model.q.scale.clock


def test_pickled_modules(model: Attention) -> None:
    x = inputs(2)
    wanted = model(x)
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(y, w) for y, w in zip(again(x), wanted))
    for change in CHANGES.values():
        change(again.k)
        check(again, x)
    assert all(torch.equal(y, w) for y, w in zip(model(x), wanted))


def test_state_dicts_hold_ordinary_tensors(model: Attention) -> None:
    state = model.state_dict()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    assert state["q.codes"].data_ptr() == model.q.codes.data_ptr()
    stored = io.BytesIO()
    torch.save(model.state_dict(keep_vars=True), stored)
    stored.seek(0)
    read = torch.load(stored, weights_only=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_modules_move_and_change_their_dtype(model: Attention) -> None:
    x = inputs(2)
    wanted = model(x)
    model.to(torch.bfloat16).float()
    torch.testing.assert_close(model(x)[0], wanted[0])
    assert {t.device.type for t in copy.deepcopy(model).to("meta").parameters()} == {"meta"}
    model.k.scale.mul_(2)
    check(model, x)


def test_changes_elsewhere_do_not_spoil_gradients() -> None:
    model, x = Attention(), inputs(2).requires_grad_()
    own(model)
    set_weight_cache("off")
    y = model.o(x)
    model.k.scale.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, model.o.dequantize().sum(0).expand_as(x))
    y = model.o(x)
    model.o.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", ["on", "off"])
def test_loaded_modules_are_one_graph(mode: str) -> None:
    set_weight_cache(mode)
    model, x = Attention(), inputs(2)
    group_inputs(model)
    own(model)
    wanted = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for y, w in zip(compiled(x), wanted):
        torch.testing.assert_close(y, w)


def test_tied_tensors_stay_tied() -> None:
    spec = linear_spec(FORMATS["e8p"], 8, COLS)
    first, second = (
        VQLinear.from_tensors(spec, random_packed(spec), None, torch.float32) for _ in range(2)
    )
    second.tie(first)
    own_tensors([[first], [second]])
    x = inputs(2)
    assert torch.equal(first(x), second(x))
    for pair in ((first, second), copy.deepcopy((first, second))):
        assert all(a is b for a, b in zip(pair[0].packed.values(), pair[1].packed.values()))
        before = pair[1](x)
        pair[0].scale.mul_(2)
        assert torch.equal(pair[0](x), pair[1](x))
        assert not torch.equal(pair[1](x), before)
        pair[1].scale = parameter(pair[0].scale)
        torch.testing.assert_close(pair[1](x), 2 * pair[0](x))


def test_tensors_of_inference_mode_become_ordinary_ones() -> None:
    with torch.inference_mode():
        made = PackedParameter(torch.ones(3))
        assert not made.is_inference()
        before = made._version
        made.add_(1)
        made.data = torch.zeros(3)
    assert not made.is_inference()
    assert made._version == before + 2
    assert made._version == made.clock._version


def test_a_loaded_checkpoint_has_its_clocks(tmp_path) -> None:
    loaded, _ = api.load(fake_checkpoint(tmp_path).folder)
    packed = [module for module in loaded.modules() if isinstance(module, PackedModule)]
    assert packed
    clocks = set()
    for module in packed:
        assert isinstance(module._parameters, Parameters)
        assert {id(t.clock) for t in module.packed.values()} == {id(module._parameters.clock)}
        assert not any(t.requires_grad for t in module.packed.values())
        clocks.add(id(module._parameters.clock))
    assert len(clocks) == len(packed)  # random checkpoints have no groups
