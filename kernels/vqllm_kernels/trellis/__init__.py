"""Tiles of weights as tail-biting paths through a bitshift trellis: format trellis-v1."""

from vqllm_kernels.trellis import spec  # noqa: F401 - importing registers the format
