"""A whole linear through the kernels: scales, Hadamard transforms, product, bias."""

from importlib import import_module

import pytest
import torch

from tests.support.kernels import assert_no_worse, plain_product, random_activations, random_tensors
from tests.support.params import slow_but
from vqllm_kernels import dispatch, formats, gpu
from vqllm_kernels import linear as linear_module
from vqllm_kernels.hadamard import kernels as hadamard
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, PermutationSpec, ScaleSpec

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

TRELLIS = {
    "format": "trellis-v1",
    "tile_rows": 64,
    "code": "bytes2",
    "tile_bits": 512,
    "state_bits": 14,
    "step_weights": 2,
    "table_bits": 0,
}
E8P = {"format": "e8p-v1"}
ROWS, COLS = 72, 96


def linear(values: dict, device: str, block: int | None = None, rows: int = ROWS):
    """A spec with coded scales and Hadamard transforms, and its stored tensors."""
    transforms = [
        CodedScaleSpec(side="in", size=COLS, bits=2),
        CodedScaleSpec(side="out", size=rows, bits=2),
        HadamardSpec(side="in", size=COLS, block=block),
        HadamardSpec(side="out", size=rows, block=block if rows != ROWS else None),
    ]
    spec = LinearSpec(
        rows=rows, cols=COLS, format=formats.from_dict(values), transforms=tuple(transforms)
    )
    tensors = random_tensors(spec.format, rows, COLS, device)
    for i, transform in enumerate(transforms):
        # Equal on the input's side, whatever the rows are.
        generator = torch.Generator().manual_seed(i)
        for name, layout in transform.layout().items():
            value = torch.rand(layout.shape, generator=generator) + 0.5
            if layout.dtype == torch.uint8:
                value = torch.randint(0, 256, layout.shape, generator=generator)
            tensors[f"t{i}_{name}"] = value.to(layout.dtype).to(device)
    return spec, tensors


@pytest.mark.parametrize("values", [TRELLIS, E8P], ids=lambda v: v["format"])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("num_tokens", [1, 5, 17])
def test_a_linear_is_as_exact_as_torch_step_by_step(values, block, num_tokens, device):
    spec, tensors = linear(values, device, block)
    x = random_activations(num_tokens, COLS, torch.float16, device)
    bias = random_activations(1, ROWS, torch.float16, device)[0]
    with dispatch.force("reference"):
        exact = dispatch.linear(x.double(), tensors, spec, bias.double())
    own, states = spec.split(tensors)
    naive = x
    for i in (0, 2):
        naive = spec.transforms[i].input(naive, states[i]).half()
    naive = plain_product(naive, spec.format.decode(own, ROWS, COLS))
    for i in (3, 1):
        naive = spec.transforms[i].output(naive, states[i]).half()
    with dispatch.force("triton"):
        y = dispatch.linear(x, tensors, spec, bias)
    assert_no_worse(y, naive + bias, exact)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(device, monkeypatch) -> list[str]:
    """The names of the kernels that run, in order."""
    names: list[str] = []
    activations = pytest.importorskip("vqllm_kernels.activations")
    compiled = [import_module(f"vqllm_kernels.{n}.triton") for n in ("trellis", "e8p", "hadamard")]
    for module in [activations, *compiled]:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(kernel, name, names))
    return names


TO_BYTES, PRODUCT, SUM = "quantized_pass_kernel", "matmul_kernel", "finish_kernel"
GROUPS = {
    "gate, up": ([(TRELLIS, ROWS)] * 2, [TO_BYTES, PRODUCT, SUM, "dense_kernel"]),
    "q, k, v": (
        [(TRELLIS, 160), (TRELLIS, 32), (TRELLIS, 32)],
        [TO_BYTES, PRODUCT, SUM, "dense_kernel"],
    ),
    "q, k, v, of whose outputs one transform is of another order": (
        [(TRELLIS, ROWS), (TRELLIS, 32), (TRELLIS, 32)],
        [TO_BYTES, PRODUCT, SUM, "dense_kernel", "dense_kernel"],
    ),
    # Each format takes x in its own kind of columns.
    "v in another format": (
        [(TRELLIS, 32), (E8P, 32), (TRELLIS, 32)],
        [TO_BYTES, PRODUCT, SUM, TO_BYTES, "bytes_matmul_kernel", "dense_kernel"],
    ),
}


@pytest.mark.parametrize("group", slow_but(list(GROUPS)[2:], GROUPS))
def test_linears_of_one_input_go_together(group, launched, device, monkeypatch):
    # As many pieces alone as together, so that the sums are rounded at the same places.
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 1000)
    members, kernels = GROUPS[group]
    specs, tensors = zip(*(linear(values, device, 32, rows) for values, rows in members))
    x = random_activations(3, COLS, torch.float16, device)
    biases = [random_activations(1, spec.rows, torch.float16, device)[0] for spec in specs]
    biases[1] = None
    with dispatch.force("triton"):
        alone = [dispatch.linear(x, *every) for every in zip(tensors, specs, biases)]
        launched.clear()
        together = dispatch.linears(x, tensors, specs, biases)
    assert launched == kernels
    for y, y_alone in zip(together, alone, strict=True):
        assert torch.equal(y, y_alone)


def test_launches_of_a_linear(launched, device):
    spec, tensors = linear(TRELLIS, device)
    x = random_activations(1, COLS, torch.float16, device)
    with dispatch.force("triton"):
        dispatch.linear(x, tensors, spec)
        taken = [TO_BYTES, PRODUCT, SUM, "dense_kernel"]
        assert launched == taken
        launched.clear()
        dispatch.linear(x.float(), tensors, spec)
        taken = ["dense_kernel", "quantize_kernel", *taken[1:]]
        assert launched == taken


@pytest.mark.parametrize("values", [TRELLIS, E8P], ids=lambda v: v["format"])
def test_no_tokens_give_no_outputs(values, device):
    spec, tensors = linear(values, device)
    x = torch.zeros(2, 0, COLS, dtype=torch.float16, device=device)
    with dispatch.force("triton"):
        assert dispatch.linear(x, tensors, spec).shape == (2, 0, ROWS)


def test_equal_stages_share_their_activations(launched, device):
    spec, tensors = linear({"format": "residual-v1", "stages": [E8P, E8P]}, device)
    x = random_activations(1, COLS, torch.float16, device)
    with dispatch.force("triton"):
        dispatch.linear(x, tensors, spec)
        stage = "bytes_matmul_kernel"
        assert launched == [TO_BYTES, stage, stage, "dense_kernel"]
        launched.clear()
        own, _ = spec.split(tensors)
        dispatch.matmul(x, own, spec.format, ROWS, COLS)
    assert launched == ["quantize_kernel", stage, stage]


def test_a_large_matrix_is_one_launch(launched, device, monkeypatch):
    monkeypatch.setattr(linear_module, "BLOCK_WEIGHTS", 128 * 96)
    hadamard_spec = HadamardSpec(side="in", size=COLS)
    moved = PermutationSpec(side="in", size=COLS)
    spec = LinearSpec(
        rows=200, cols=COLS, format=formats.from_dict(TRELLIS), transforms=(moved, hadamard_spec)
    )
    tensors = random_tensors(spec.format, 200, COLS, device)
    tensors["t0_permutation"] = torch.arange(COLS, device=device, dtype=torch.int32).flip(0)
    signs = hadamard_spec.pack_signs(torch.arange(COLS) % 3 - 0.5)["signs"]
    tensors["t1_signs"] = signs.to(device)
    x = random_activations(2, COLS, torch.float16, device)
    with dispatch.force("reference"):
        exact, naive = (dispatch.linear(v, tensors, spec) for v in (x.double(), x))
    with dispatch.force("triton"):
        y = dispatch.linear(x, tensors, spec)
    assert len(spec.row_blocks()) == 2
    assert launched == [TO_BYTES, PRODUCT, SUM]
    assert_no_worse(y, naive, exact)


def test_scales_that_change_are_seen(device):
    spec, tensors = linear(TRELLIS, device)
    x = random_activations(1, COLS, torch.float16, device)
    with dispatch.force("triton"):
        before = dispatch.linear(x, tensors, spec)
        tensors["t1_levels"].mul_(2)
        after = dispatch.linear(x, tensors, spec)
    torch.testing.assert_close(after, 2 * before, rtol=2e-3, atol=1e-3)


def test_factors_go_with_the_signs(device):
    spec = HadamardSpec(side="in", size=32)
    signs = spec.pack_signs(torch.ones(32))["signs"].to(device)
    scale = ScaleSpec(side="in", size=32)
    own = {"scale": torch.full((32,), 3.0, dtype=torch.float16, device=device)}
    before = len(hadamard._factors)
    assert torch.equal(hadamard.factors(spec, signs, [(scale, own)]).cpu(), torch.full((32,), 3.0))
    assert torch.equal(hadamard.factors(spec, signs).cpu(), torch.ones(32))
    assert len(hadamard._factors) == before + 1
    del signs
    assert len(hadamard._factors) == before
