"""Columns of a matrix in two parts of different formats: format split-v1."""

from vqllm_kernels.split import spec  # noqa: F401 - importing registers the format
