"""A quantized model made trainable: it predicts the same, and its scales go back into storage."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.fake_checkpoint import FORMATS, fake_checkpoint, linear_spec, random_packed
from vqllm.checkpoint.reader import Checkpoint
from vqllm.distillation.student import Student
from vqllm.errors import NumericalError
from vqllm.plan.packed_spec import scaled
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, ScaleSpec

ALL = {"rows", "columns", "vectors", "head"}


@pytest.fixture(scope="module", params=["llama", "qwen2", "opt"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("student")
    return Checkpoint.open(fake_checkpoint(folder, request.param).folder)


def loaded(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).eval()


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untuned_it_predicts_the_same(checkpoint, dtype) -> None:
    model = loaded(checkpoint, dtype)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        got = Student(model, checkpoint, ALL).logits(TOKENS)
    assert got.dtype == dtype
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


def test_every_parameter_has_a_gradient_and_nothing_else(checkpoint) -> None:
    student = Student(loaded(checkpoint), checkpoint, ALL)
    student.logits(TOKENS).square().mean().backward()
    parameters = [p for own in student.parameters.values() for p in own.values()]
    assert len(student.parameters["rows"]) == len(checkpoint.linears)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in parameters)
    trained = {id(p) for p in parameters}
    assert {id(p) for p in student.model.parameters() if p.requires_grad} == trained
    assert not student.not_stored


def test_gradients_from_activations_that_are_computed_again(checkpoint) -> None:
    """OPT drops features where it is in training mode, and must not here."""
    student = Student(loaded(checkpoint, torch.bfloat16), checkpoint, ALL)
    parameters = [p for own in student.parameters.values() for p in own.values()]
    calls = []
    first = next(name for name in checkpoint.linears if "q_proj" in name)
    student.model.get_submodule(first).register_forward_pre_hook(lambda *_: calls.append(first))
    gradients = []
    for again in (False, True, False):
        student.recompute(again)
        calls.clear()
        gradients.append(torch.autograd.grad(student.logits(TOKENS).square().mean(), parameters))
        assert len(calls) == 1 + again
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_asked_for_is_trained(checkpoint, dtype) -> None:
    student = Student(loaded(checkpoint, dtype), checkpoint, {"vectors"})
    assert set(student.parameters) == {"vectors"}
    student.logits(TOKENS).sum().backward()
    changes = student.changes()
    assert changes.specs == checkpoint.linears
    for name, tensors in changes.packed.items():
        assert all(torch.equal(t, checkpoint.packed(name)[k]) for k, t in tensors.items())
    for name, tensor in changes.others.items():
        assert torch.equal(tensor, checkpoint.read(name))


def test_a_tied_head_is_one_parameter(tmp_path) -> None:
    tied = Checkpoint.open(fake_checkpoint(tmp_path, tie_word_embeddings=True).folder)
    student = Student(loaded(tied), tied, ALL)
    assert len(student.parameters["head"]) == 1
    student.logits(TOKENS).sum().backward()
    (parameter,) = student.parameters["head"].values()
    with torch.no_grad():
        before = student.model.get_input_embeddings().weight.clone()
        parameter += 1
    after = student.model.get_input_embeddings().weight
    torch.testing.assert_close(after, before + before.square().mean().sqrt())
    assert torch.equal(student.model.get_output_embeddings().weight, after)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_vocabulary_is_left_alone(tmp_path, tied) -> None:
    outside = fake_checkpoint(tmp_path, outside=FORMATS["e8p"], tie_word_embeddings=tied)
    both = Checkpoint.open(outside.folder)
    student = Student(loaded(both), both, ALL)
    assert "head" not in student.parameters
    student.logits(TOKENS).sum().backward()
    ends = both.quantization.outside_layers
    assert ends
    changes = student.changes()
    assert not any(name.startswith(tuple(ends)) for name in (*changes.packed, *changes.others))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("side", ["in", "out"])
def test_scales_multiply_the_weights(format, side) -> None:
    spec = linear_spec(FORMATS[format], 20, 37)
    tensors = random_packed(spec)
    size = 20 if side == "out" else 37
    factor = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(0))
    new_spec, new = scaled("m", spec, tensors, side, factor)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
        n: (torch.Size(t.shape), t.dtype) for n, t in new_spec.layout().items()
    }
    W = spec.dequantize(tensors)
    wanted = factor[:, None] * W if side == "out" else W * factor
    torch.testing.assert_close(new_spec.dequantize(new), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_scale_that_stands_first_takes_the_factor_in(side) -> None:
    size = 20 if side == "out" else 37
    base = linear_spec(FORMATS["e8p"], 20, 37)
    transforms = (
        CodedScaleSpec(side=side, size=size, bits=2),
        HadamardSpec(side=side, size=size),
    )
    spec = type(base)(rows=20, cols=37, format=base.format, transforms=transforms)
    tensors = random_packed(spec)
    factor = torch.linspace(0.5, 2, size)
    new_spec, new = scaled("m", spec, tensors, side, factor)
    assert new_spec.transforms == (ScaleSpec(side=side, size=size), transforms[1])
    again_spec, again = scaled("m", new_spec, new, side, 1 / factor)
    assert again_spec == new_spec
    torch.testing.assert_close(
        again_spec.dequantize(again), spec.dequantize(tensors), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("value", "message"), [(1e9, "does not hold"), (1e-12, "are 0 in float16")]
)
def test_values_that_cannot_be_stored(value, message) -> None:
    spec = linear_spec(FORMATS["e8p"], 20, 37)
    with pytest.raises(NumericalError, match=message):
        scaled("m", spec, random_packed(spec), "out", torch.full((20,), value))
