"""A fixed codebook of four weights on the D4 lattice: format d4-v1."""

from vqllm_kernels.d4 import spec  # noqa: F401 - importing registers the format
