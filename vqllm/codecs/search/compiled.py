"""Whether the searches of several codecs can be compiled on the CPU."""

import logging
from functools import cache

from vqllm_kernels.compilers import why_no_numba

logger = logging.getLogger(__name__)


@cache
def has_numba() -> bool:
    """Whether numba can be imported; if not, that is logged once."""
    problem = why_no_numba()
    if problem is not None:
        logger.warning(
            "%s. The search for codes runs in torch, which takes 5 to 20 times as long. "
            "pip install numba",
            problem,
        )
    return problem is None
