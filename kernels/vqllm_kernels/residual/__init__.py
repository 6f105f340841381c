"""Sums of other formats: format residual-v1."""

from vqllm_kernels.residual import spec  # noqa: F401 - importing registers the format
