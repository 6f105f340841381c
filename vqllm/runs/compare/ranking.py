"""Who is better: ranks among members of about equal size, and Pareto fronts over all of them.

One figure cannot order recipes of different sizes without saying what a bit is worth. So a rank is
given only among members that cost about the same, and a front names those that nothing beats in
size and quality at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vqllm.core.pareto import pareto_front

EQUAL_BITS = 0.1
"""Bits per weight of the linears that are about equal: such a difference alone is worth up to 13 %
(1 − 4^−0.1) of a codec's mean squared error."""
EQUAL_BYTES = 0.05
"""How much larger a file of about equal size is, relative to the smaller one."""

RULE = (
    f"Members whose linears differ by at most {EQUAL_BITS:g} bits per weight, and whose files by "
    f"at most {100 * EQUAL_BYTES:g} %, are about equal in size and ranked among themselves by KL "
    "divergence, which looks at all that is predicted where perplexity looks at one token. On a "
    "front is a member that no other one beats in both size and KL."
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a member stands."""

    size_class: int
    """members of one number are about equally large; larger numbers, larger members"""
    rank: int
    """among them, by KL; the best has 1, equal ones share a rank"""
    num_ranked: int
    """members in the class"""
    front_bits: bool
    """whether it is on the front of KL against bits per weight of the linears"""
    front_file: bool
    """the same against the size of the file"""


def standings(
    bits: Sequence[float], num_bytes: Sequence[int], kl: Sequence[float]
) -> list[Standing]:
    """The standing of each member.

    Args:
        bits: per weight, all of the quantized linears.
        num_bytes: of the whole file.
        kl: nats per token against the original.
    """
    pairs = list(
        zip(
            size_classes(bits, absolute=EQUAL_BITS),
            size_classes(num_bytes, relative=EQUAL_BYTES),
        )
    )
    numbers = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
    on_bits, on_bytes = pareto_front(bits, kl), pareto_front(num_bytes, kl)
    found = []
    for i, pair in enumerate(pairs):
        rivals = [kl[j] for j, other in enumerate(pairs) if other == pair]
        found.append(
            Standing(
                size_class=numbers[pair],
                rank=1 + sum(rival < kl[i] for rival in rivals),
                num_ranked=len(rivals),
                front_bits=on_bits[i],
                front_file=on_bytes[i],
            )
        )
    return found


def size_classes(
    sizes: Sequence[float], *, absolute: float = 0.0, relative: float = 0.0
) -> list[int]:
    """For each size the number of its class. A class reaches from its smallest size s to
    s · (1 + relative) + absolute, so that none of its members are further apart."""
    classes: dict[float, int] = {}
    end, number = float("-inf"), -1
    for size in sorted(set(sizes)):
        if size > end:
            end, number = size * (1 + relative) + absolute, number + 1
        classes[size] = number
    return [classes[size] for size in sizes]
