"""Single weights on an integer grid with scales and zero points: format uniform-v1."""

from vqllm_kernels.uniform import spec  # noqa: F401 - importing registers the format
