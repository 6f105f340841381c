"""Stored values that no code of a format leads to are found before anything is decoded."""

import pytest
import torch

from vqllm_kernels.bitpack import count_beyond, pack_wide
from vqllm_kernels.convolutional.spec import ConvolutionalSpec
from vqllm_kernels.e8p.spec import E8PSpec
from vqllm_kernels.grouped.spec import GroupedSpec
from vqllm_kernels.leech.reference import origin
from vqllm_kernels.leech.spec import LeechSpec
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.pyramid.reference import num_directions
from vqllm_kernels.pyramid.spec import PyramidSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.transforms import PermutationSpec, ScaleSpec
from vqllm_kernels.uniform.spec import UniformSpec


def empty(spec, rows, cols):
    """Tensors of a layout whose numbers are 0 and whose floating numbers are 1."""
    return {
        name: torch.full(tensor.shape, int(tensor.dtype.is_floating_point), dtype=tensor.dtype)
        for name, tensor in spec.layout(rows, cols).items()
    }


def wide(number, width, places):
    """A row of `places` packed symbols, all 0 but the last, which is `number`."""
    limbs = torch.zeros(1, places, -(-width // 16), dtype=torch.int64)
    limbs[0, -1] = torch.tensor([number >> 16 * m & 0xFFFF for m in range(limbs.shape[2])])
    return pack_wide(limbs, width)


@pytest.mark.parametrize(("width", "limit"), [(5, 19), (16, 4097), (37, (5 << 32) + (7 << 16))])
def test_symbols_beyond_a_limit_are_counted(width, limit):
    numbers = [0, limit - 1, limit, limit + 1, (1 << width) - 1, limit % 65536]
    packed = torch.cat([wide(number, width, 3) for number in numbers])
    expected = sum(number >= limit for number in numbers)
    assert count_beyond(packed, width, 3, limit) == expected
    assert count_beyond(packed, width, 3, 1 << width) == 0


def test_pyramid_codes_end_with_the_last_codeword():
    spec = PyramidSpec(dim=16, pulses=9, levels=5)
    last = num_directions(16, 9) * 5 - 1
    tensors = empty(spec, 1, 48)
    assert spec.problem(tensors | {"codes": wide(last, spec.tile_bits, 3)}, 1, 48) is None
    problem = spec.problem(tensors | {"codes": wide(last + 1, spec.tile_bits, 3)}, 1, 48)
    assert problem == f"1 codes are not below {last + 1}, the number of codewords"


def test_leech_codes_end_with_the_origin():
    spec = LeechSpec(index_bits=24, shells=(3,))
    last = origin((3,))
    tensors = empty(spec, 1, 72)
    assert spec.problem(tensors | {"codes": wide(last, 24, 3)}, 1, 72) is None
    problem = spec.problem(tensors | {"codes": wide(last + 1, 24, 3)}, 1, 72)
    assert problem == f"1 codes are above {last}, the last that stands for a point"


def test_zero_points_are_integers_of_the_codes():
    spec = UniformSpec(bits=3, group=4)
    tensors = empty(spec, 2, 8)
    tensors["zero"][1, 1] = 7
    assert spec.problem(tensors, 2, 8) is None
    tensors["zero"][1, 1] = 8
    assert spec.problem(tensors, 2, 8) == "a zero point is 8; allowed are 0..7"


@pytest.mark.parametrize("stored", [0.0, -1.0, 2.0**-127, 2.0 ** (2 * 31 - 126)])
def test_scales_outside_the_bands_of_the_groups(stored):
    spec = GroupedSpec(tile_cols=2, index_bits=4, groups=2)
    tensors = empty(spec, 3, 8)
    tensors["codebook"][:] = torch.arange(64).view(2, 16, 2)
    tensors["scale"][:] = torch.tensor([2.0**-126, 2.0**-96, 2.0 ** (2 * 31 - 127)])
    assert spec.problem(tensors, 3, 8) is None
    tensors["scale"][1] = stored
    problem = spec.problem(tensors, 3, 8)
    assert problem is not None
    assert problem.startswith("1 of the 3 stored scales are outside")


@pytest.mark.parametrize("pair", [(-1, 0), (0, -1), (1 << 16, 1 << 15), (0, 1 << 24)])
def test_maps_of_codes_stay_inside_exact_numbers(pair):
    spec = ConvolutionalSpec(
        index_bits=8, tile_cols=4, window=6, shift=3, levels="linear", group=None
    )
    tensors = empty(spec, 2, 8)
    assert spec.problem(tensors, 2, 8) is None
    tensors["code_map"][1] = torch.tensor(pair)
    problem = spec.problem(tensors, 2, 8)
    if pair == (1 << 16, 1 << 15):
        assert problem is None  # 255 · 2^16 + 2^15 is below 2^24
    else:
        assert problem is not None
        assert problem.startswith("1 of the 2 rows of code_map")


def test_stages_and_transforms_are_named():
    stage = UniformSpec(bits=2, group=None)
    spec = LinearSpec(
        rows=2,
        cols=4,
        format=ResidualSpec(stages=(stage, stage)),
        transforms=(PermutationSpec(side="in", size=4), ScaleSpec(side="out", size=2)),
    )
    tensors = {
        name: torch.full(t.shape, int(t.dtype.is_floating_point), dtype=t.dtype)
        for name, t in spec.layout().items()
    }
    assert spec.problem(tensors) == (
        "permutation transform: permutation does not have every index of 0..3 once"
    )
    tensors["t0_permutation"] = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    assert spec.problem(tensors) is None
    tensors["s1_zero"][0, 0] = 4
    assert spec.problem(tensors) == "stage 1: a zero point is 4; allowed are 0..3"
    tensors["t1_scale"][1] = 0
    assert spec.problem(tensors) == "scale transform: 1 entries of scale are 0"


def test_codes_of_full_formats_always_mean_something():
    spec = E8PSpec()
    tensors = empty(spec, 2, 16)
    tensors["codes"] = torch.tensor([[-32768, 32767], [-1, 0]], dtype=torch.int16)
    assert spec.problem(tensors, 2, 16) is None
