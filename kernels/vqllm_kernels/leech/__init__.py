"""Points of the Leech lattice, numbered without a table of them: format leech-v1."""

from vqllm_kernels.leech import spec  # noqa: F401 - importing registers the format
