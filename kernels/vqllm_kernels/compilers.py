"""Whether numba is there, which compiles what runs on a CPU."""

from functools import cache
from importlib.util import find_spec

from vqllm_kernels import machine_code


@cache
def why_no_numba() -> str | None:
    """Why numba cannot be imported, or None: it is missing, or refuses the numpy that is there."""
    if machine_code.facts() and find_spec("numba") is not None:
        return None  # it has compiled here before; imported it takes 20 MB
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None
