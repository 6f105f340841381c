"""Tiles of weights as indices into learned tables: formats lut-v1 and lut-v2."""

from vqllm_kernels.lut import spec  # noqa: F401 - importing registers the formats
