"""The choice of an implementation, and the operators that the run-time layer calls."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from vqllm_kernels import dispatch, formats, gpu, kernels, ops, select
from vqllm_kernels.dispatch import Call
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.ops import text_of
from vqllm_kernels.reference import ReferenceKernels
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, PermutationSpec, ScaleSpec

E8P = {"format": "e8p-v1"}
E81B = {"format": "e81b-v1"}
LUT = {"format": "lut-v1", "tile_rows": 1, "tile_cols": 4, "index_bits": 6}
UNIFORM = {"format": "uniform-v1", "bits": 3, "group": 8}
FORMATS = [
    E8P,
    LUT,
    UNIFORM,
    {"format": "residual-v1", "stages": [E8P, E81B]},
]
ROWS, COLS = 37, 40


@pytest.fixture(autouse=True)
def fresh_choices():
    dispatch.forget()
    yield
    dispatch.forget()


def random_tensors(spec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, layout in spec.layout(ROWS, COLS).items():
        if layout.dtype.is_floating_point:
            values = torch.rand(layout.shape, generator=generator) + 0.1
        else:
            info = torch.iinfo(layout.dtype)
            values = torch.randint(info.min, info.max + 1, layout.shape, generator=generator)
        tensors[name] = values.to(layout.dtype)
    return tensors


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


class PackedLinear(nn.Module):
    """A packed matmul between two transforms, as a model holds it."""

    def __init__(self, values: dict) -> None:
        super().__init__()
        self.spec = formats.from_dict(values)
        self.into = HadamardSpec(side="in", size=COLS)
        self.out = HadamardSpec(side="out", size=ROWS)
        self.packed = nn.ParameterDict(
            {n: nn.Parameter(t, requires_grad=False) for n, t in random_tensors(self.spec).items()}
        )
        self.register_buffer("in_signs", self.into.pack_signs(random_input(COLS))["signs"])
        self.register_buffer("out_signs", self.out.pack_signs(random_input(ROWS))["signs"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = dispatch.transform(x, self.into, {"signs": self.in_signs}, "input")
        y = dispatch.matmul(x, dict(self.packed.items()), self.spec, ROWS, COLS)
        return dispatch.transform(y, self.out, {"signs": self.out_signs}, "output")


@pytest.mark.parametrize("values", FORMATS, ids=lambda v: v["format"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_are_those_of_the_reference(values, dtype):
    spec = formats.from_dict(values)
    tensors = random_tensors(spec)
    W_RC = spec.decode(tensors, ROWS, COLS)
    x = random_input(2, 3, COLS, dtype=dtype)
    with dispatch.force("reference"):
        y = dispatch.matmul(x, tensors, spec, ROWS, COLS)
    assert y.dtype == dtype
    assert torch.equal(y, (x.float() @ W_RC.T).to(dtype))
    assert torch.equal(dispatch.decode(tensors, spec, ROWS, COLS, dtype), W_RC.to(dtype))


def test_transform_rounds_narrow_types_once():
    spec = HadamardSpec(side="in", size=COLS)
    tensors = spec.pack_signs(random_input(COLS))
    x = random_input(3, COLS, dtype=torch.bfloat16)
    for direction, run in (("input", spec.input), ("output", spec.output)):
        out = dispatch.transform(x, spec, tensors, direction)
        assert torch.equal(out, run(x.float(), tensors).bfloat16())
    with pytest.raises(ValueError, match="allowed are 'input' and 'output'"):
        dispatch.transform(x, spec, tensors, "in")


def test_other_transforms_are_left_to_torch():
    spec = ScaleSpec(side="in", size=COLS)
    tensors = {"scale": torch.full((COLS,), 2.0, dtype=torch.float16)}
    x = random_input(3, COLS)
    assert torch.equal(dispatch.transform(x, spec, tensors, "input"), x * 2)
    assert dispatch.choices() == []


@pytest.mark.parametrize("values", FORMATS, ids=lambda v: v["format"])
def test_compiles_into_one_graph(values):
    model = PackedLinear(values)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for num_tokens in (1, 2, 30):
        x = random_input(num_tokens, COLS)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("values", FORMATS, ids=lambda v: v["format"])
def test_derivative_is_that_of_the_dense_product(values):
    model = PackedLinear(values)
    x = random_input(3, COLS).requires_grad_()
    model(x).square().sum().backward()
    spec = model.spec
    dense = x.detach().requires_grad_()
    W_RC = spec.decode(dict(model.packed.items()), ROWS, COLS)
    y = model.into.input(dense, {"signs": model.in_signs}) @ W_RC.T
    model.out.output(y, {"signs": model.out_signs}).square().sum().backward()
    assert torch.allclose(x.grad, dense.grad, rtol=1e-4, atol=1e-4 * float(dense.grad.abs().max()))


def whole_linear():
    """A spec with every transform, its stored tensors, and a bias."""
    transforms = []
    for side, size in (("in", COLS), ("out", ROWS)):
        transforms += [
            CodedScaleSpec(side=side, size=size, bits=2),
            HadamardSpec(side=side, size=size),
            ScaleSpec(side=side, size=size),
            PermutationSpec(side=side, size=size),
        ]
    spec = LinearSpec(
        rows=ROWS, cols=COLS, format=formats.from_dict(E8P), transforms=tuple(transforms)
    )
    tensors = random_tensors(spec.format)
    for i, transform in enumerate(transforms):
        for name, layout in transform.layout().items():
            value = torch.rand(layout.shape) + 0.5
            if name == "permutation":
                value = torch.randperm(transform.size)
            elif layout.dtype == torch.uint8:
                value = torch.randint(0, 256, layout.shape)
            tensors[f"t{i}_{name}"] = value.to(layout.dtype)
    return spec, tensors, torch.randn(ROWS)


def test_a_linear_is_its_dense_weights():
    spec, tensors, bias = whole_linear()
    W_RC = spec.dequantize(tensors)
    x = random_input(2, 3, COLS).requires_grad_()
    y = dispatch.linear(x, tensors, spec, bias)
    torch.testing.assert_close(y, x @ W_RC.T + bias, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(found, g @ W_RC, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        narrow = dispatch.linear(x.bfloat16(), tensors, spec, bias.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), y.detach(), rtol=0.05, atol=0.3)


def test_a_bias_has_a_gradient():
    spec, tensors, bias = whole_linear()
    bias.requires_grad_()
    dispatch.linear(random_input(3, COLS), tensors, spec, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((ROWS,), 3.0))


def test_a_linear_is_one_operator_in_a_graph():
    spec, tensors, bias = whole_linear()
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(
        lambda x: dispatch.linear(x, tensors, spec, bias), fullgraph=True, backend=backend
    )
    x = random_input(3, COLS)
    torch.testing.assert_close(compiled(x), dispatch.linear(x, tensors, spec, bias))
    assert names == ["vqllm_kernels.linear"]


def test_a_large_linear_is_multiplied_in_blocks_of_rows(monkeypatch):
    spec, tensors, _ = whole_linear()
    spec = replace(spec, transforms=tuple(t for t in spec.transforms if t.side == "in"))
    whole = dispatch.linear(random_input(3, COLS), tensors, spec)
    monkeypatch.setattr(LinearSpec, "row_blocks", lambda self: [(0, 16), (16, ROWS)])
    ops.linear_of.cache_clear()
    x = random_input(3, COLS).requires_grad_()
    y = dispatch.linear(x, tensors, spec)
    torch.testing.assert_close(y, whole)
    y.sum().backward()
    torch.testing.assert_close(
        x.grad, spec.dequantize(tensors).sum(0).expand(3, -1), rtol=1e-4, atol=1e-3
    )
    ops.linear_of.cache_clear()


def test_operators_pass_opcheck():
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec)
    packed = [tensors[name] for name in sorted(tensors)]
    x = random_input(3, COLS).requires_grad_()
    ops = torch.ops.vqllm_kernels
    torch.library.opcheck(ops.matmul.default, (x, packed, text_of(spec), ROWS, COLS))
    args = (packed, text_of(spec), ROWS, COLS, torch.float16)
    torch.library.opcheck(ops.decode.default, args)
    hadamard = HadamardSpec(side="in", size=COLS)
    signs = [hadamard.pack_signs(random_input(COLS))["signs"]]
    args = (x, signs, text_of(hadamard), COLS, "input")
    torch.library.opcheck(ops.transform.default, args)
    whole, tensors, bias = whole_linear()
    packed, text = [tensors[name] for name in sorted(tensors)], text_of(whole)
    torch.library.opcheck(ops.linear.default, (x, packed, bias, text, ROWS, COLS))
    grad = random_input(3, ROWS)
    torch.library.opcheck(ops.dense.default, (packed, text, ROWS, COLS, torch.bfloat16))
    torch.library.opcheck(ops.linear_transpose.default, (grad, packed, text, ROWS, COLS))
    args = (x, packed * 2, [text] * 2, [ROWS] * 2, COLS)
    torch.library.opcheck(ops.linears.default, args)


def test_a_choice_is_made_once_and_logged_once(caplog):
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec)
    with caplog.at_level(logging.INFO, logger="vqllm_kernels"):
        for num_tokens in (1, 3, 8, 9):
            dispatch.matmul(random_input(num_tokens, COLS), tensors, spec, ROWS, COLS)
    assert [c.call.batch for c in dispatch.choices()] == [8, 16]
    assert {c.implementation for c in dispatch.choices()} == {"reference"}
    assert len(caplog.records) == 2
    assert "matmul of e8p-v1 on cpu in torch.float32, up to 8 rows: reference" in caplog.text


@pytest.mark.parametrize(
    ("num_rows", "bucket"), [(0, 8), (1, 8), (8, 8), (9, 16), (64, 64), (65, 65), (4096, 65)]
)
def test_buckets(num_rows, bucket):
    assert kernels.bucket(num_rows) == bucket


def call(values: dict, **changes) -> Call:
    device = torch.device("cuda", 0)
    spec = formats.from_dict(values)
    known = {"operation": "matmul", "device": device, "dtype": torch.float16, "batch": 8}
    return Call(spec=spec, **(known | changes))


@pytest.mark.parametrize(
    ("asked", "implementation", "reason"),
    [
        (call(E8P), "triton", "first choice"),
        (call(E8P, batch=65), "dense", "more than 64 rows"),
        (call(E8P, dtype=torch.float64), "dense", "torch.float64 is none of"),
        (call(UNIFORM), "dense", "has no kernel"),
        (call(LUT | {"tile_cols": 6}), "dense", "6 columns wide"),
        (call(LUT | {"tile_rows": 32}), "dense", "more than 16 weights"),
        (call({"format": "residual-v1", "stages": [E8P, E81B]}), "triton", "first choice"),
        (
            call({"format": "residual-v1", "stages": [UNIFORM, UNIFORM]}),
            "dense",
            "stage 0: uniform-v1 has no kernel",
        ),
        (call(UNIFORM, operation="decode", batch=0), "reference", "has no kernel"),
        (call(LUT | {"tile_cols": 6}, operation="decode", batch=0), "triton", "first choice"),
    ],
    ids=str,
)
def test_choice_on_a_cuda_device(asked, implementation, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "declines", lambda device: None)
    selection = select.MATMUL if asked.operation == "matmul" else select.DECODE
    chosen = selection.take(asked, asked.spec)
    assert type(chosen) is type(selection.implementations[implementation](asked.spec))
    assert selection.take(asked, asked.spec) is chosen
    assert dispatch.choices()[-1].implementation == implementation
    assert reason in dispatch.choices()[-1].reason


def test_old_devices_and_missing_triton_are_declined(monkeypatch):
    device = torch.device("cuda", 0)
    gpu.declines.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5) is below (8, 0)" in gpu.declines(device)
    gpu.declines.cache_clear()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.declines(device) == "triton is not installed"
    gpu.declines.cache_clear()


def test_force_takes_an_implementation_or_says_why_not():
    spec = formats.from_dict(UNIFORM)
    tensors = random_tensors(spec)
    x = random_input(2, COLS)
    expected = dispatch.matmul(x, tensors, spec, ROWS, COLS)
    with dispatch.force("dense"):
        assert torch.allclose(dispatch.matmul(x, tensors, spec, ROWS, COLS), expected, rtol=1e-5)
    with dispatch.force("triton"), pytest.raises(ValueError, match="'triton' is forced, but"):
        dispatch.matmul(x, tensors, spec, ROWS, COLS)
    assert torch.equal(dispatch.matmul(x, tensors, spec, ROWS, COLS), expected)


def test_wrong_tensors_are_refused():
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec)
    with pytest.raises(ValueError, match=r"1 tensors, expected \['codes', 'scale'\]"):
        dispatch.matmul(random_input(1, COLS), {"codes": tensors["codes"]}, spec, ROWS, COLS)


@pytest.mark.parametrize("name", ["reference", "dense"])
def test_members_and_what_is_added_to_them(name):
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec)
    x = random_input(3, COLS)
    taken = select.MATMUL.implementations[name](spec)
    add = random_input(3, ROWS)
    plain = taken.matmuls(x, [tensors] * 2, [ROWS] * 2, COLS, torch.float32)
    added = taken.matmuls(x, [tensors] * 2, [ROWS] * 2, COLS, torch.bfloat16, [add, -add])
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(added[0], (plain[0] + add).bfloat16())
    assert torch.equal(added[1], (plain[1] - add).bfloat16())
    W_RC = taken.decode(tensors, ROWS, COLS, torch.float16, torch.ones(ROWS, COLS))
    assert torch.equal(W_RC, (spec.decode(tensors, ROWS, COLS) + 1).half())


def test_bytes_are_for_kernels_that_want_them():
    empty = torch.empty(1, 2, COLS // 4, dtype=torch.int32)
    x = kernels.Quantized(words=empty, step=torch.empty(1, 2), dtype=torch.float16)
    spec = formats.from_dict(UNIFORM)
    with pytest.raises(TypeError, match="these kernels take it as a tensor"):
        select.MATMUL.implementations["reference"](spec).matmuls(x, [{}], [1], COLS, torch.float16)


def test_a_format_without_kernels_says_so():
    spec = formats.from_dict(UNIFORM)
    for kind, reason in (
        ("triton", "uniform-v1 has no kernel"),
        ("lookup", "uniform-v1 is no table of at most 256 entries"),
    ):
        none = spec.kernels(kind)
        assert none.declines(call(UNIFORM)) == reason
        assert none.wanted(random_input(1, COLS)) is None
        with pytest.raises(NotImplementedError, match=reason):
            none.matmuls(random_input(1, COLS), [{}], [ROWS], COLS, torch.float32)


def test_the_kernels_that_a_spec_names_are_taken():
    spec = formats.from_dict(UNIFORM)

    class Own(ReferenceKernels):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Named(type(spec)):
        def kernels(self, kind):
            return Own(spec=self) if kind == "lookup" else super().kernels(kind)

    named = Named(bits=3, group=8)
    assert type(select.matmul(random_input(1, COLS), named)) is Own
    assert dispatch.choices()[-1].implementation == "lookup"
    assert type(select.matmul(random_input(9, COLS), named)) is ReferenceKernels
    assert "lookup declines: more than 8 rows" in dispatch.choices()[-1].reason
