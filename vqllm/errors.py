"""Errors that a user can act on. Each message says what came, what is allowed and what to do."""

MAX_MESSAGE = 6000
"""Characters of a message. What it quotes may come from a file of any size."""


class VqllmError(Exception):
    """Base of every error caused by input, environment or data. The command line prints its message
    without a traceback and exits with code 2."""

    def __init__(self, message: str = "", *others: object) -> None:
        if len(message) > MAX_MESSAGE:
            # What to do stands at the end.
            half = MAX_MESSAGE // 2
            left_out = len(message) - 2 * half
            shown = f" [... {left_out} characters ...] "
            message = message[:half] + shown + message[-half:]
        super().__init__(message, *others)


class RecipeError(VqllmError):
    """A recipe that cannot be read, has an unknown key, or whose parts do not fit together."""


class ModelError(VqllmError):
    """A model that cannot be found, read or quantized."""


class CalibrationError(VqllmError):
    """A calibration source that cannot be read or yields too little text."""


class CheckpointError(VqllmError):
    """A checkpoint that is missing, damaged, of a newer format, or belongs to another run."""


class PackedWeightError(VqllmError):
    """Packed weights used as if they were dense ones in memory: written into, given a gradient, or
    read while they are offloaded."""


class NumericalError(VqllmError):
    """Non-finite weights, activations or Hessians, or a Hessian that stays singular."""


class EvaluationError(VqllmError):
    """An evaluation that cannot be run: unknown task, missing extra, text too short."""


class ProcessError(VqllmError):
    """Processes that share a run and were started with different arguments, or one that ended."""


class OutOfSpaceError(VqllmError):
    """The disk is full. What was finished stays and the run can be resumed."""
