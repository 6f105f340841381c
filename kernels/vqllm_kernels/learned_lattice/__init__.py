"""Points of a learned lattice, companded: format learned-lattice-v1."""

from vqllm_kernels.learned_lattice import spec  # noqa: F401 - importing registers the format
