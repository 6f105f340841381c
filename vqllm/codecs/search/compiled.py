"""Whether numba is installed: it compiles the searches of several codecs on the CPU."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def has_numba() -> bool:
    """Whether numba can be imported; if not, that is logged once."""
    try:
        import numba  # noqa: F401
    except ImportError as error:  # missing, or refusing the numpy that is installed
        logger.warning(
            "numba cannot be imported (%s): the search for codes runs in torch, which takes 5 to "
            "20 times as long. pip install numba",
            error,
        )
        return False
    return True
