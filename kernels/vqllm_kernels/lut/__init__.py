"""Tiles of weights as indices into one learned table: format lut-v1."""

from vqllm_kernels.lut import spec  # noqa: F401 - importing registers the format
