"""Whether numba is there, which compiles what runs on a CPU."""

from functools import cache


@cache
def why_no_numba() -> str | None:
    """Why numba cannot be imported, or None: it is missing, or refuses the numpy that is there."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None
