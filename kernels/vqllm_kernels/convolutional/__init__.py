"""Overlapping bit windows of a linear function of the code: format convolutional-v1."""

from vqllm_kernels.convolutional import spec  # noqa: F401 - importing registers the format
