"""What a command may do with damaged input: a clear error, in little time. Never a traceback."""

import time
from collections.abc import Callable
from typing import Any

from vqllm.errors import MAX_MESSAGE, VqllmError

LONGEST = MAX_MESSAGE + 100
"""Characters of a message; a damaged file must not become one."""
SECONDS = 10
"""Of processor time to a refusal."""


def refused(run: Callable[[], Any]) -> tuple[str | None, Any]:
    """The message of the error that `run` raised, or None and what it returned.

    An exception that is no VqllmError passes through, and fails the test.
    """
    start = time.process_time()
    try:
        result = run()
    except VqllmError as error:
        message = str(error)
        assert message.strip()
        assert len(message) <= LONGEST, message[:300]
        assert time.process_time() - start <= SECONDS, message
        return message, None
    return None, result
