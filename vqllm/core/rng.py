"""The only source of randomness: a generator named by seed, place and purpose."""

import hashlib

import torch


def generator(seed: int, name: str, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    Args:
        seed: the recipe's seed.
        name: what the numbers are for, usually a module's full name.
        purpose: why they are drawn ("signs", "kmeans", ...), so that two uses in one place are
            independent of each other and of the order in which they are drawn.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
