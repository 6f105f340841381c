"""Experts and Conv1D as linears compute what transformers' own modules do."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.architectures import model_class, tiny_config
from tests.support.mixtures import FORMS, MULTIMODAL, OTHERS, eager, logits
from tests.support.params import slow_but
from vqllm.hf.experts import LinearExperts, expert_linears, roles_of, takes_halves
from vqllm.hf.linear_form import (
    Part,
    from_linear_form,
    fuse,
    is_fused,
    linear_form,
    to_linear_form,
)

EVERY = (*FORMS, *OTHERS, *MULTIMODAL)
UNUSED = {"longcat_flash": 4}
"""Experts from this one on have a place in the tensor, but no matrices."""
REST = ("gpt_oss", "jetmoe", "dbrx")
"""Of the forms those that differ most, for what does not depend on the sums."""


def in_linear_form(model: Any) -> dict[str, nn.Module]:
    """Put a model in linear form with the values that it has, in place; its modules as they were,
    by name."""
    before = {name: module for name, module in model.named_modules() if linear_form(module)}
    for name, module in before.items():
        form = linear_form(module)
        assert form is not None
        for own, part in form.parts.items():
            owner, _, key = own.rpartition(".")
            value = part.of(module.get_parameter(part.tensor).data).clone()
            place = form.module.get_submodule(owner)
            assert place.get_parameter(key).shape == value.shape
            setattr(place, key, nn.Parameter(value, requires_grad=False))
        if isinstance(module, Conv1D):
            form.module.register_parameter("bias", module.bias)
        model.set_submodule(name, form.module)
    assert before, "no module has another form"
    return before


def forget_matrices(module: nn.Module) -> None:
    form = linear_form(module)
    assert form is not None
    for tensor in {part.tensor for part in form.parts.values()}:
        owner, _, key = tensor.rpartition(".")
        value = module.get_parameter(tensor).to("meta")
        setattr(module.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))


def experts_of(model: nn.Module) -> Iterator[tuple[str, LinearExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, LinearExperts):
            yield name, module


@pytest.mark.parametrize("model_type", slow_but(FORMS, EVERY))
def test_linear_form_computes_the_same_and_gives_back_every_bit(model_type: str) -> None:
    model = eager(model_type)
    wanted, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    fused = in_linear_form(model)
    assert not any(is_fused(module) or isinstance(module, Conv1D) for module in model.modules())
    got = logits(model)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))

    for module in fused.values():
        forget_matrices(module)
    from_linear_form(model, fused)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        experts = UNUSED.get(model_type) if name.endswith("gate_up_proj") else None
        assert torch.equal(after[name][:experts], value[:experts]), name
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("model_type", slow_but(FORMS, EVERY))
def test_every_part_covers_its_tensor_once(model_type: str) -> None:
    """No value is in two parts, and together they have all."""
    with torch.device("meta"):
        model = model_class(model_type)(tiny_config(model_type))
    shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    parts = to_linear_form(model)
    times: dict[str, Tensor] = {}
    for name, part in parts.items():
        assert model.get_parameter(name).is_meta
        whole = times.setdefault(part.tensor, torch.zeros(shapes[part.tensor]))
        part.of(whole).add_(1)
    for name, count in times.items():
        experts = UNUSED.get(model_type) if name.endswith("gate_up_proj") else None
        assert (count[:experts] == 1).all(), name


@pytest.mark.parametrize("model_type", REST)
def test_parts_are_views_and_fuse_undoes_them(model_type: str) -> None:
    model = eager(model_type)
    for module in model.modules():
        form = linear_form(module)
        if form is None:
            continue
        for tensor in {part.tensor for part in form.parts.values()}:
            whole = module.get_parameter(tensor).data
            parts = {own: part for own, part in form.parts.items() if part.tensor == tensor}
            values = {own: part.of(whole) for own, part in parts.items()}
            start, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
            assert all(start <= value.data_ptr() < end for value in values.values())
            assert torch.equal(fuse(parts, values, whole.shape), whole)


def test_what_no_part_covers_is_zero() -> None:
    part = Part("whole", expert=1, columns=(0, 2), transposed=True)
    whole = fuse({"a": part}, {"a": torch.ones(2, 3)}, torch.Size((2, 3, 4)))
    assert whole[1, :, :2].eq(1).all()
    assert whole.sum() == 6


def test_gates_that_take_halves_are_told_from_interleaved_ones() -> None:
    found = {
        name: {takes_halves(m) for m in eager(name).modules() if is_fused(m)}
        for name in ("qwen3_moe", "gpt_oss", "deepseek_v4")
    }
    assert found == {"qwen3_moe": {True}, "gpt_oss": {False}, "deepseek_v4": {True}}
    assert takes_halves(Experts())
    assert not takes_halves(Interleaved())
    assert not takes_halves(NeedsMore())


class Experts(nn.Module):
    """Experts as transformers writes them, but for what a test changes."""

    def __init__(self) -> None:
        super().__init__()
        self.has_gate = True
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 4))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class Interleaved(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


class NeedsMore(Experts):
    def _apply_gate(self, gate_up: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError


class WithScales(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(2, 4))


class Flat(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(8, 4))


class TakesMore(Experts):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, index: Tensor, weights: Tensor, more: Tensor
    ) -> Tensor:
        raise NotImplementedError


class Unmarked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [WithScales, Flat, TakesMore, Unmarked])
def test_experts_of_a_form_that_is_not_known_stay(kind: type[nn.Module]) -> None:
    assert is_fused(Experts())
    assert not is_fused(kind())
    assert linear_form(kind()) is None
    model = nn.Sequential(kind())
    assert to_linear_form(model) == {}
    assert type(model[0]) is kind


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "rwkv", "zamba"])
def test_other_parameters_of_three_dimensions_stay(model_type: str) -> None:
    model = eager(model_type)
    assert any(value.dim() == 3 for value in model.parameters())
    assert to_linear_form(model) == {}


def test_shared_experts_of_inkling_stay() -> None:
    model = eager("inkling_text")
    parts = to_linear_form(model)
    assert not any("shared" in part.tensor for part in parts.values())


def test_only_experts_leaves_conv1d() -> None:
    assert to_linear_form(eager("gpt2"), only_experts=True) == {}
    assert to_linear_form(eager("gpt2"))


@pytest.mark.parametrize("model_type", REST)
def test_a_copy_computes_the_same_and_is_apart(model_type: str) -> None:
    model = eager(model_type)
    in_linear_form(model)
    wanted = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted)
    for _, module in experts_of(twin):
        for value in module.parameters():
            value.zero_()
    assert not torch.equal(logits(twin), wanted)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("model_type", REST)
@pytest.mark.parametrize("training", [True, False])
def test_mode_of_training_is_kept(model_type: str, training: bool) -> None:
    model = eager(model_type).train(training)
    before = in_linear_form(model)
    assert all(module.training == training for module in model.modules())
    model.train(not training)
    from_linear_form(model, before)
    assert all(module.training != training for module in model.modules())


def test_gradients_reach_the_experts_and_the_states_as_in_transformers() -> None:
    model = eager("mixtral")
    embedding = model.get_input_embeddings().weight
    model(input_ids=torch.arange(3, 40)[None]).logits.square().sum().backward()
    wanted = embedding.grad.clone()
    embedding.grad = None
    fused = in_linear_form(model)
    for value in model.parameters():
        value.requires_grad_(True)
    model(input_ids=torch.arange(3, 40)[None]).logits.square().sum().backward()
    torch.testing.assert_close(embedding.grad, wanted, rtol=1e-4, atol=1e-4)
    for name, module in fused.items():
        form = linear_form(module)
        assert form is not None
        for own, part in form.parts.items():
            whole = module.get_parameter(part.tensor).grad
            assert whole is not None
            got = model.get_parameter(f"{name}.{own}").grad
            got = torch.zeros(part.of(whole).shape) if got is None else got
            torch.testing.assert_close(got, part.of(whole), rtol=1e-3, atol=1e-3)


def test_the_running_expert_knows_its_tokens_and_weights() -> None:
    model = eager("qwen3_moe")
    in_linear_form(model)
    name, experts = next(iter(experts_of(model)))
    seen = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert experts.routed is not None
        seen.append((args[0], experts.routed))

    for index in range(experts.num_experts):
        experts.expert(index).get_submodule("gate_proj").register_forward_pre_hook(watch)
    states, choice = torch.randn(6, 64), torch.tensor([[0, 1]] * 4 + [[2, 0]] * 2)
    weight = torch.rand(6, 2)
    experts(states, choice, weight)
    assert experts.routed is None, name
    assert len(seen) == 3  # nothing goes to the last one
    for index, (x, routed) in enumerate(seen):
        assert torch.equal(x, states[routed.token_N])
        took = choice == index
        assert sorted(routed.token_N.tolist()) == took.any(1).nonzero()[:, 0].tolist()
        assert torch.equal(routed.weight_N, (weight * took).sum(1)[routed.token_N])


def test_routed_is_forgotten_when_an_expert_fails() -> None:
    model = eager("qwen3_moe")
    in_linear_form(model)
    _, experts = next(iter(experts_of(model)))
    with pytest.raises(RuntimeError):
        experts(torch.randn(3, 5), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert experts.routed is None


def test_linears_of_experts_know_their_role_and_side() -> None:
    model = eager("mixtral")
    in_linear_form(model)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    found = expert_linears(model, "", names)
    inside = [name for name in names if ".experts." in name]
    assert sorted(found) == sorted(inside)
    own = found["model.layers.0.mlp.experts.2.up_proj"]
    assert own.expert == "model.layers.0.mlp.experts.2"
    assert own.role == "model.layers.0.mlp.experts.*.up_proj"
    assert own.role in roles_of("model.layers.0.mlp.experts.2.up_proj")
    assert own.reads_the_stream
    assert own.side == found["model.layers.0.mlp.experts.3.gate_proj"].side
    down = found["model.layers.0.mlp.experts.2.down_proj"]
    assert not down.reads_the_stream
    assert down.side != own.side
