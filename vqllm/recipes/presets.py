"""Which shipped recipe is meant by a number of bits and a preset."""

import json

from vqllm.core.registry import unknown
from vqllm.errors import RecipeError
from vqllm.recipes.bases import read
from vqllm.recipes.shipped import QUANTIZE

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


LEAST, MOST = 1.1, 5.0
"""Numbers of bits that a budget can have."""


def for_rate(bits: float, preset: str = "balanced") -> tuple[str, tuple[str, ...]]:
    """Name of a shipped recipe for any number of bits from `LEAST` to `MOST`, and the changes of it
    (`key=value`) that give it this budget.

    Between the numbers of `BITS` it is the recipe of the next one with another budget: its codecs
    reach at least half a bit below and above.

    Raises:
        RecipeError: another number, an unknown preset, or `fast`, which has no budget, with a
            number that is not in `BITS`.
    """
    if preset not in PRESETS:
        raise RecipeError(unknown("preset", preset, list(PRESETS)))
    if bits in BITS:
        return best(bits, preset), ()
    if not LEAST <= bits <= MOST:
        raise RecipeError(
            f"--bits {bits:g}: numbers of bits from {LEAST:g} to {MOST:g} can be had. Name another "
            "recipe with --recipe (vqllm recipes lists them)."
        )
    if preset == "fast":
        raise RecipeError(
            f"--bits {bits:g} --preset fast: that preset codes all linears alike, and has recipes "
            f"for {', '.join(f'{b:g}' for b in BITS)} bits. Take one of these, or another preset."
        )
    return spread(min(BITS, key=lambda own: abs(own - bits)), bits, preset)


def spread(listed: float, bits: float, preset: str) -> tuple[str, tuple[str, ...]]:
    """The recipe of a number of `BITS` and a preset with another budget, as `for_rate` gives it."""
    name = best(listed, preset)
    words = f"{name} with {bits:.6g} bits a weight in all"
    changes = (
        f"allocation.bits={bits!r}",
        f"name={name.replace(f'-{listed:g}bit', f'-{bits:.4g}bit')}",
        f"description={words}",
    )
    codecs = read(QUANTIZE, name)["allocation"]["codecs"]
    first, last = codecs[0], codecs[-1]
    # Beyond the numbers that are listed some linears need fewer bits than its codecs, or more.
    fewer = [{**first, "bits": own} for own in (1, 1.125)] if bits < BITS[0] else []
    more = [{**last, "bits": own} for own in (5.5, 6)] if bits > BITS[-1] else []
    if fewer or more:
        changes = (*changes, f"allocation.codecs={json.dumps([*fewer, *codecs, *more])}")
    return name, changes


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
