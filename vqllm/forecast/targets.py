"""The recipe that hits a target: a size of the whole file, or a KL divergence.

A target becomes a recipe with numbers before the run, which then is a run like any other. For a
size, embedding and head are items of the same allocation as the linears: what their errors cost
against what their bits save.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vqllm import recipes
from vqllm.allocation.budget import Item, allocate, allocate_or_least
from vqllm.allocation.choose_codecs import linear_items
from vqllm.core.bits import count
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError, RecipeError
from vqllm.forecast.divergence import kappa_of, unit_loss
from vqllm.forecast.gradients import PassMeasured
from vqllm.forecast.quality import error_of
from vqllm.forecast.sizes import sizes
from vqllm.plan.job import Job
from vqllm.plan.specs import tuned_specs
from vqllm.quantization import embeddings as outside
from vqllm.quantization.checks import Checked
from vqllm.quantization.row_blocks import Matrix
from vqllm.recipes import Recipe

END_RATES = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
"""Bits of the codecs that an embedding or a head may get, besides staying as it is."""
HEADER_SLACK = 16
"""Bytes of the header that a linear may take more with another codec than it was planned with."""

TYPICAL = 3
"""How much smaller what is outside of the linears becomes, for the first guess of their rate."""
NEAREST = 3
"""Listed recipes that are tried for a size."""
WIDE = {recipes.BITS[0]: recipes.BITS[0] - 0.1, recipes.BITS[-1]: recipes.BITS[-1] + 0.1}
"""Rates at which the outermost of them have more codecs."""

RecipeOf = Callable[[str, tuple[str, ...]], Recipe]
"""A shipped recipe by name, with changes; those of the user come after."""


@dataclass(frozen=True)
class Offer:
    """A budget of bits for the linears, and what is expected of it."""

    recipe: Recipe
    loss: float
    """Σ of expected losses, nats a token, of linears and of what is quantized outside"""
    file_bytes: int
    """at most"""


@dataclass(frozen=True)
class Targets:
    """What recipes of a preset can reach on a model."""

    job: Job
    checked: Checked
    found: PassMeasured | None
    """None counts errors of all weights alike"""
    preset: str
    recipe_of: RecipeOf

    def for_size(self, target: int) -> Recipe:
        """The recipe of least expected loss whose files have at most `target` bytes.

        Raises:
            RecipeError: more than that is needed, or less is the most that can be used.
        """
        # Those whose rates are nearest to what is left beside the rest of the model.
        numel = sum(rows * cols for rows, cols in self.checked.selection.shapes.values())
        tensors = self.checked.tensors
        linears = tensors.num_bytes(f"{name}.weight" for name in self.checked.selection.shapes)
        near = 8 * (target - (tensors.num_bytes() - linears) / TYPICAL) / numel
        listed = sorted(recipes.BITS, key=lambda own: abs(own - near))[:NEAREST]
        offers = [self._within(own, target) for own in listed]
        possible = [offer for offer in offers if isinstance(offer, Offer)]
        if possible:
            best = min(possible, key=lambda offer: offer.loss)
            if best.file_bytes < 0.99 * target:
                most = max(offer.file_bytes for offer in possible)
                raise RecipeError(
                    f"--size {_mb(target)}: with the codecs of the preset {self.preset} the "
                    f"largest files of {self.job.model} below that have {_mb(most)}. Ask for that "
                    "or less."
                )
            return best.recipe
        least = min(offer for offer in offers if not isinstance(offer, Offer))
        raise RecipeError(
            f"--size {_mb(target)}: {self.job.model} takes at least {_mb(least)} with the codecs "
            f"of the preset {self.preset}, embedding and head included. Ask for that or more."
        )

    def for_kl(self, target: float, correction: float = 1.0) -> Recipe:
        """The recipe of fewest bits that is expected to have a divergence of `target`.

        Args:
            correction: measured over expected divergence of an earlier run.

        Raises:
            RecipeError: it is beyond what 1.1 to 5 bits can have.
        """

        def expected(bits: float) -> float:
            recipe = self._budget(bits)
            return correction * kappa_of(recipe) * self._allocated(recipe, None)[1]

        low, high = recipes.LEAST, recipes.MOST
        most, least = expected(low), expected(high)
        if not least <= target <= most:
            raise RecipeError(
                f"--kl {target:g}: {self.job.model} is expected to have {least:.3g} at {high:g} "
                f"bits a weight and {most:.3g} at {low:g} with the preset {self.preset}. Ask for "
                "something between."
            )
        while high - low > 1 / 256:
            middle = (low + high) / 2
            low, high = (low, middle) if expected(middle) <= target else (middle, high)
        return self._budget(high)

    def _budget(self, bits: float) -> Recipe:
        listed = min(recipes.BITS, key=lambda own: abs(own - bits))
        return self.recipe_of(*recipes.spread(listed, bits, self.preset))

    def _within(self, listed: float, target: int) -> "Offer | int":
        """The best budget for a whole file with the codecs of a listed recipe; the least bytes
        that are possible where the target is below."""
        wide = recipes.spread(listed, WIDE.get(listed, listed), self.preset)
        recipe = self.recipe_of(*wide)
        ends = self._ends(recipe)
        # What no choice changes: the files with everything at its first option, without that.
        first = _with_ends(recipe, [(matrix, options[0]) for matrix, options in ends])
        picked, _, spent = self._allocated(first, 0)
        codecs = {own: first.codecs[number] for own, number in picked.items()}
        files = sizes(self.checked, first, codecs).files.files
        fixed = files - (spent + sum(options[0].bits for _, options in ends)) / 8
        fixed += HEADER_SLACK * len(self.checked.selection.shapes)
        budget = 8 * (target - fixed)
        items, _ = self._items(recipe)
        own = [
            Item(tuple(o.bits for o in options), tuple(o.loss for o in options))
            for _, options in ends
        ]
        every = [*items, *own]
        least = sum(min(item.costs) for item in every)
        if least > budget:
            return int(fixed + least / 8) + 1
        picks = allocate(every, budget)
        chosen = [
            (matrix, options[pick]) for (matrix, options), pick in zip(ends, picks[len(items) :])
        ]
        bits = sum(item.costs[pick] for item, pick in zip(items, picks))
        numel = sum(rows * cols for rows, cols in self.checked.selection.shapes.values())
        outside_bits = sum(option.bits for _, option in chosen)
        left = budget - outside_bits
        loss = sum(item.losses[pick] for item, pick in zip(every, picks))
        # All that is left, so that a run with other sensitivities can use it too.
        rate = min(left, sum(max(item.costs) for item in items)) / numel
        rate = int(rate * 1e6) / 1e6
        final = _with_ends(self.recipe_of(*recipes.spread(listed, rate, self.preset)), chosen)
        used = fixed + (bits + outside_bits) / 8
        return Offer(final, loss, int(used))

    def _items(self, recipe: Recipe) -> tuple[list[Item], list[tuple[int, ...]]]:
        """The linears as `linear_items` has them."""
        selection = self.checked.selection
        if self.found is not None:
            table = self.found.losses.table(selection, recipe.codecs)
            return linear_items(selection, recipe, lambda name, n, _: float(table[name][n]))
        errors = [error_of(codec) for codec in recipe.codecs]
        numels = {name: rows * cols for name, (rows, cols) in selection.shapes.items()}
        return linear_items(selection, recipe, lambda name, n, _: numels[name] * errors[n])

    def _allocated(self, recipe: Recipe, budget: float | None) -> tuple[dict[str, int], float, int]:
        """The codecs of linears by number within a budget of bits (None: the recipe's; raised to
        the least that is possible), their loss, and the bits that they take."""
        assert recipe.allocation is not None, "of a spread recipe"
        items, numbers = self._items(recipe)
        shapes = self.checked.selection.shapes
        numel = sum(rows * cols for rows, cols in shapes.values())
        picks = allocate_or_least(
            items, recipe.allocation.bits * numel if budget is None else budget
        )
        return (
            {name: own[pick] for name, own, pick in zip(shapes, numbers, picks)},
            sum(item.losses[pick] for item, pick in zip(items, picks)),
            sum(item.costs[pick] for item, pick in zip(items, picks)),
        )

    def _ends(self, recipe: Recipe) -> list[tuple[Matrix, list["_Option"]]]:
        """Embedding and head with their options, the fewest bits first; none where the model's
        cannot be stored so."""
        found: dict[tuple[str, ...], tuple[Matrix, list[_Option]]] = {}
        units: dict[tuple[str, ...], float] = {}
        for rate in END_RATES:
            part = _end_part(rate)
            own = recipe_with(recipe, {"embeddings": part, "head": part})
            try:
                matrices = outside.plan(self.checked.tensors.blueprint.model, own)
            except ModelError:
                return []
            for matrix in matrices:
                spec = tuned_specs({"": matrix.spec}, own)[""]
                if matrix.names not in units:
                    units[matrix.names] = self._unit(matrix)
                loss = units[matrix.names] * error_of(matrix.recipe.codec)
                bits = count(spec.layout()).total
                found.setdefault(matrix.names, (matrix, []))[1].append(_Option(part, bits, loss))
        for matrix, known in found.values():
            stored = self.checked.tensors.num_bytes(f"{name}.weight" for name in matrix.names)
            known.append(_Option(None, 8 * stored, 0.0))
        return list(found.values())

    def _unit(self, matrix: Matrix) -> float:
        if self.found is None:
            return matrix.spec.rows * matrix.spec.cols
        return unit_loss(self.checked, matrix, self.found)


@dataclass(frozen=True)
class _Option:
    """A way to store an embedding or a head."""

    part: JSON | None
    """the recipe's key; None leaves it as it is"""
    bits: int
    loss: float


def _with_ends(recipe: Recipe, chosen: Sequence[tuple[Matrix, _Option]]) -> Recipe:
    return recipe_with(recipe, {key: own.part for matrix, own in chosen for key in matrix.keys})


def recipe_with(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """A recipe with other values of some keys."""
    return recipes.from_dict({**recipe.to_dict(), **values}, recipe.name)


def _end_part(rate: float) -> JSON:
    codec = {"type": "trellis", "bits": rate, "code": "gf2", "state_bits": 12, "tile_rows": 16}
    return {"transforms": [{"type": "hadamard", "side": "in"}], "codec": codec}


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.2f} MB"
