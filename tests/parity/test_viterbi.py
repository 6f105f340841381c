"""The compiled Viterbi search against the one in torch."""

import pytest
import torch

from tests.support.params import each_with_one_of
from vqllm.codecs.search import viterbi

STEPS = {
    "1 bit": ([1] * 10, 1),
    "2 bits": ([2] * 12, 1),
    "3 bits": ([3] * 6, 1),
    "4 bits": ([4] * 4, 1),
    "5 bits": ([5] * 4, 1),
    "pairs, 3.5 bits": ([5, 5, 4], 2),
    "1.67 bits": ([1, 2, 2, 1, 2, 2], 1),
    "pairs, 1.5 bits": ([3] * 8, 2),
    "pairs, 1.25 bits": ([2, 3, 2, 3], 2),
}


@pytest.mark.parametrize(("name", "context"), each_with_one_of(STEPS, [None, (1, 2, 3, 0, 5)]))
def test_the_same_paths(name, context, device):
    """Free paths, and those that are closed at given states."""
    from vqllm_kernels.trellis import viterbi as kernel

    shift_T, num_weights = STEPS[name]
    generator = torch.Generator().manual_seed(0)
    # The kernel looks values up as float16.
    values_SV = torch.randn(64, num_weights, generator=generator).half().float().to(device)
    x_NTV = torch.randn(5, len(shift_T), num_weights, generator=generator).to(device)
    context_N = None if context is None else torch.tensor(context, device=device)
    plain = viterbi.search(x_NTV, values_SV, shift_T, context_N)
    compiled = kernel.search(x_NTV, values_SV, shift_T, context_N)
    assert compiled.dtype == torch.int32
    assert torch.equal(compiled, plain)


def test_more_groups_than_one_block(device, monkeypatch):
    from vqllm_kernels.trellis import viterbi as kernel

    monkeypatch.setattr(kernel, "BLOCK", 64)
    generator = torch.Generator().manual_seed(1)
    values_SV = torch.randn(1024, 1, generator=generator).half().float().to(device)
    x_NTV = torch.randn(2, 5, 1, generator=generator).to(device)
    plain = viterbi.search(x_NTV, values_SV, [2] * 5, None)
    assert torch.equal(kernel.search(x_NTV, values_SV, [2] * 5, None), plain)


def test_steps_that_differ_by_more_than_one_bit_are_refused(device):
    from vqllm_kernels.trellis import viterbi as kernel

    with pytest.raises(ValueError, match="steps of 1 to 3 new bits"):
        kernel.search(torch.zeros(1, 2, 1), torch.zeros(16, 1), [1, 3], None)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [1, 2, 2.5])
def test_tiles_on_a_gpu_are_coded_like_those_on_the_cpu(rate):
    from vqllm.codecs import CODECS

    codec = CODECS.get("trellis").model_validate({"type": "trellis", "bits": rate})
    X_IJE = torch.randn(8, 8, 256, generator=torch.Generator().manual_seed(2))
    errors = []
    for where in ("cpu", "cuda"):
        x = X_IJE.to(where)
        state = codec.fit(x, None, torch.Generator())
        errors.append(float((codec.decode(codec.encode(x, state), state) - x).square().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)
