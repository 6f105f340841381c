"""When no Triton kernel can run, and what a launch has to know about the device."""

import importlib.util
from functools import cache

import torch

MIN_CAPABILITY = (8, 0)
"""Oldest NVIDIA compute capability that the kernels are compiled for in the tests."""


@cache
def declines(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return None if interpreted() else f"the tensors are on {device.type}, not on a CUDA device"
    if torch.version.hip is not None:
        return "the kernels are compiled and tested for NVIDIA devices only"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors that a launch can spread over; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
