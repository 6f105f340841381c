"""A whole linear through the kernels: scales, Hadamard transforms, product, bias."""

import pytest
import torch

from tests.parity.kernels import assert_no_worse, random_activations, random_tensors
from vqllm_kernels import dispatch, formats
from vqllm_kernels.hadamard import triton as hadamard
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, ScaleSpec

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
ROWS, COLS = 72, 96


def linear(values: dict, device: str, block: int | None = None):
    """A spec with coded scales and Hadamard transforms, and its stored tensors."""
    transforms = [
        CodedScaleSpec(side="in", size=COLS, bits=2),
        CodedScaleSpec(side="out", size=ROWS, bits=2),
        HadamardSpec(side="in", size=COLS, block=block),
        HadamardSpec(side="out", size=ROWS),
    ]
    spec = LinearSpec(
        rows=ROWS, cols=COLS, format=formats.from_dict(values), transforms=tuple(transforms)
    )
    tensors = random_tensors(spec.format, ROWS, COLS, device)
    generator = torch.Generator().manual_seed(3)
    for i, transform in enumerate(transforms):
        for name, layout in transform.layout().items():
            value = torch.rand(layout.shape, generator=generator) + 0.5
            if layout.dtype == torch.uint8:
                value = torch.randint(0, 256, layout.shape, generator=generator)
            tensors[f"t{i}_{name}"] = value.to(layout.dtype).to(device)
    return spec, tensors


@pytest.mark.parametrize("values", [TRELLIS, {"format": "e8p-v1"}], ids=lambda v: v["format"])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("num_tokens", [1, 5])
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
    naive = naive @ spec.format.decode(own, ROWS, COLS).half().T
    for i in (3, 1):
        naive = spec.transforms[i].output(naive, states[i]).half()
    with dispatch.force("triton"):
        y = dispatch.linear(x, tensors, spec, bias)
    assert_no_worse(y, naive + bias, exact)


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
