"""Which shipped recipe is meant by a number of bits and a preset."""

from vqllm.core.registry import unknown
from vqllm.errors import RecipeError

_NAMES = {
    "fast": "trellis-{}bit-fast",
    "balanced": "spread-{}bit",
    "best": "spread-{}bit-best",
    "tuned": "tuned-{}bit",
}
PRESETS = tuple(_NAMES)
"""`fast` has one rate and LDLQ; the others spread bits by what errors do and round two-sided, for
which a pass with gradients comes first. `best` has trellises of 2^16 states in place of 2^12 or
2^14; `tuned` trains layers while they are rounded, and in the end scales on the predictions of the
whole model."""
BITS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Numbers of bits that have a recipe of each preset."""


def best(bits: float, preset: str = "balanced") -> str:
    """Name of the shipped recipe of lowest KL for a number of bits and a preset; the table in
    docs/codecs.md says which were compared. RecipeError for other numbers and presets."""
    if bits not in BITS:
        raise RecipeError(
            f"--bits {bits:g}: there is a best recipe for {', '.join(f'{b:g}' for b in BITS)} "
            "bits. Name another one with --recipe (vqllm recipes lists them)."
        )
    if preset not in PRESETS:
        raise RecipeError(unknown("preset", preset, list(PRESETS)))
    return _NAMES[preset].format(f"{bits:g}")
