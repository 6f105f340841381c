"""How much of a model is quantized, and why the rest is not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

SHOWN_KINDS = 5
HALF = 0.5
"""Of the parameters of the decoder layers. Below it a run says so before it begins: its bits a
weight are then those of the smaller part."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a model; those that several modules have in common count once."""

    layers: int
    """in the decoder layers, whatever holds them"""
    layers_quantized: int
    model: int
    """all of them"""
    model_quantized: int

    @property
    def of_layers(self) -> float:
        """Share of the parameters of the decoder layers that is quantized."""
        return self.layers_quantized / max(self.layers, 1)

    @property
    def of_model(self) -> float:
        """Share of all parameters that is quantized."""
        return self.model_quantized / max(self.model, 1)


def kinds_of(reasons: Mapping[str, str]) -> str:
    """Reasons by module in a line: the most frequent kinds, without what stands in parentheses."""
    kinds = Counter(reason.partition(" (")[0] for reason in reasons.values())
    ranked = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{number} x {kind}" for kind, number in ranked[:SHOWN_KINDS]]
    rest = sum(number for _, number in ranked[SHOWN_KINDS:])
    return "; ".join([*shown, f"{rest} x other reasons"] if rest else shown)
