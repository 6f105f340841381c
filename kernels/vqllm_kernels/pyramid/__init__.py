"""Directions with a given number of pulses, and amplitudes: format pyramid-v1."""

from vqllm_kernels.pyramid import spec  # noqa: F401 - importing registers the format
