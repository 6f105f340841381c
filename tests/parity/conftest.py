"""Kernels run twice: in the interpreter on the CPU, and compiled where there is a CUDA device."""

import pytest
import torch


@pytest.fixture(params=["interpreter", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a parity test."""
    pytest.importorskip("triton")
    has_cuda = torch.cuda.is_available()
    if request.param == "cuda" and not has_cuda:
        pytest.skip("no CUDA device")
    if request.param == "interpreter" and has_cuda:
        pytest.skip("the interpreter is off where there is a CUDA device")
    return "cuda" if has_cuda else "cpu"


@pytest.fixture(params=["float16", "bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    """Dtype of the activations."""
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    return getattr(torch, request.param)
