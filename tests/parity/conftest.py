"""Kernels run in the interpreter where there is no CUDA device, and compiled where there is one."""

from importlib.util import find_spec

import pytest
import torch

DTYPES = {
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "half": (torch.float16, torch.bfloat16),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is where a parity test runs; `dtype`, or `half` of 16 bits, that of activations."""
    if "device" not in metafunc.fixturenames:
        return
    places = [pytest.param("cuda", marks=pytest.mark.gpu)]
    if not torch.cuda.is_available():
        no_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
        places.insert(0, pytest.param("cpu", marks=no_triton))
    name = next((name for name in DTYPES if name in metafunc.fixturenames), None)
    if name is None:
        metafunc.parametrize("device", places)
        return
    cases = [
        pytest.param(*place.values, dtype, id=f"{place.values[0]}-{dtype}", marks=place.marks)
        for place in places
        for dtype in DTYPES[name]
        # The interpreter computes bfloat16 wrongly.
        if (place.values[0], dtype) != ("cpu", torch.bfloat16)
    ]
    metafunc.parametrize(("device", name), cases)
