"""Fixed codebooks of eight weights on the E8 lattice: formats e8p-v1 and e81b-v1."""

from vqllm_kernels.e8p import spec  # noqa: F401 - importing registers the formats
