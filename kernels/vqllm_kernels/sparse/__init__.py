"""A few weights of every row beside the codes of another format: format sparse-v1."""

from vqllm_kernels.sparse import spec  # noqa: F401 - importing registers the format
