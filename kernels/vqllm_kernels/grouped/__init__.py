"""Tiles of weights as indices into the table of their row's group: format grouped-v1."""

from vqllm_kernels.grouped import spec  # noqa: F401 - importing registers the format
