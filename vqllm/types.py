"""Another name of `vqllm.core.protocols`, for codecs that import from here; see `vqllm.extend`."""

from vqllm.core.protocols import *  # noqa: F403
