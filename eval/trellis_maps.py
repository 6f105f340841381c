"""Search for the masks of the trellis code gf2: which bits of a state make which bit of the index.

    python eval/trellis_maps.py --state-bits 12 --bits 2 [--table-bits 6] [--seed 0]

Masks of full rank are drawn at random, or made of those of shorter states by taps on the new bits
(`--shorter 0xef1,0x880,...`). Each gets a table by alternating paths of unit Gaussian weights and
the means of the weights of each entry (`vqllm.codecs.trellis_tables`). Three quarters are left out
again and again, with four times the weights, all on the same ones; then the best are changed in
a few bits for `--generations`, and a change that is better stays. What it prints last goes into
vqllm/codecs/trellis_maps.py: masks, and their mean squared error on other weights. Beside them
`--compare mul1,bytes4` has computed codes on these weights.
"""

import argparse
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vqllm.codecs import trellis_tables
from vqllm.codecs.search import viterbi
from vqllm.codecs.trellis import Trellis
from vqllm_kernels.trellis import reference, reference_v2

FIRST_TILES = 8
KEPT = 4
"""One of so many stays in a round of the halving."""
SURVIVORS = 4
ROUNDS = 3
"""Passes that train a table in each round of the halving; tables are kept from round to round."""
MUTANTS, MUTANT_TILES = 12, 192
"""Changes of each survivor in a generation, and what they are compared on."""
CHECK_TILES, SHOWN = 1024, 2
"""What the figures are measured on, and of how many maps they are."""


@dataclass
class Map:
    """Masks with their table for unit Gaussian weights, and the error that was measured last."""

    masks: tuple[int, ...]
    table_K: torch.Tensor
    mse: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state-bits", type=int, required=True)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--table-bits", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--shorter", help="masks of fewer state bits, comma-separated")
    parser.add_argument("--masks", help="masks to begin with beside the candidates")
    parser.add_argument("--compare", default="", help="computed codes to measure beside the map")
    args = parser.parse_args()
    torch.set_num_threads(1)
    search = Search(args.state_bits, args.bits, args.table_bits, args.seed)
    masks = [search.random_masks() for _ in range(args.candidates)]
    if args.shorter:
        masks = [search.longer(_parsed(args.shorter)) for _ in range(args.candidates)]
    if args.masks:
        masks.append(_parsed(args.masks))
    best = search.survivors(masks)
    for _ in range(args.generations):
        best = search.next_generation(best)
        print("best so far", _text(best[0].masks), f"{best[0].mse:.5f}", flush=True)
    for own in best[:SHOWN]:
        print(search.checked(own))
    for code in filter(None, args.compare.split(",")):
        print(f"{code}, 2^{args.state_bits} states, {args.bits:g} bits: {search.of_code(code):.5f}")


class Search:
    """Maps of one size at one rate; everything random follows from the seed."""

    def __init__(self, state_bits: int, rate: float, table_bits: int, seed: int) -> None:
        self.state_bits, self.rate, self.table_bits = state_bits, rate, table_bits
        self.shift_T = trellis_tables.shifts(round(rate * reference.WEIGHTS), 1)
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.states = torch.arange(1 << state_bits)
        # The scale of mul1 is near enough for a table that is trained.
        codec = Trellis(bits=rate, state_bits=state_bits)
        self.first_K = codec.gaussian_scale * trellis_tables.quantiles(1 << table_bits)

    def random_masks(self) -> tuple[int, ...]:
        while True:
            bits = [self.random.randrange(1, 1 << self.state_bits) for _ in range(self.table_bits)]
            if full_rank(bits):
                return tuple(bits)

    def longer(self, masks: tuple[int, ...]) -> tuple[int, ...]:
        """Masks of the state's length that equal shorter ones in the newest bits."""
        length = max(masks).bit_length()
        new = self.state_bits - length
        return tuple(mask | self.random.randrange(1 << new) << length for mask in masks)

    def changed(self, masks: tuple[int, ...]) -> tuple[int, ...]:
        """One to three bits of the masks flipped."""
        while True:
            bits = list(masks)
            for _ in range(self.random.choice((1, 1, 2, 3))):
                bits[self.random.randrange(len(bits))] ^= 1 << self.random.randrange(
                    self.state_bits
                )
            if full_rank(bits):
                return tuple(bits)

    def survivors(self, masks: Iterable[tuple[int, ...]]) -> list[Map]:
        """The best of many by successive halving."""
        maps = [Map(own, self.first_K) for own in masks]
        num_tiles = FIRST_TILES
        while True:
            self.trained(maps, num_tiles, ROUNDS)
            if len(maps) <= SURVIVORS:
                return maps
            maps = maps[: max(SURVIVORS, len(maps) // KEPT)]
            num_tiles *= KEPT

    def next_generation(self, parents: list[Map]) -> list[Map]:
        """The best of maps and of changes of them."""
        maps = {own.masks: own for own in parents}
        for own in parents:
            for _ in range(MUTANTS):
                masks = self.changed(own.masks)
                maps.setdefault(masks, Map(masks, own.table_K))
        every = list(maps.values())
        self.trained(every, MUTANT_TILES // KEPT, 2)
        every = every[: len(every) // KEPT]
        self.trained(every, MUTANT_TILES, 2)
        return every[:SURVIVORS]

    def trained(self, maps: list[Map], num_tiles: int, rounds: int) -> None:
        """Train all tables on the same weights, and sort the maps by their error on others."""
        x_RNT = torch.randn(rounds, num_tiles, reference.WEIGHTS, generator=self.generator)
        for own in maps:
            index_S = reference_v2.indices(own.masks, self.states)
            for x_NT in x_RNT:
                own.table_K, own.mse = self._pass(x_NT, index_S, own.table_K)
        maps.sort(key=lambda own: own.mse)

    def _pass(
        self, x_NT: torch.Tensor, index_S: torch.Tensor, table_K: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The means of the weights of each entry, and the error of the table before."""
        table_K = trellis_tables.storable(table_K)
        path_NT = viterbi.tail_biting(x_NT[..., None], table_K[index_S][:, None], self.shift_T)
        entry_N, x_N = index_S[path_NT.flatten().long()], x_NT.flatten().double()
        mse = float((table_K[entry_N] - x_N).square().mean())
        # A prior of a few weights keeps entries that few weights take near where they were.
        prior = 4
        sums_K = torch.bincount(entry_N, x_N, len(table_K)) + prior * table_K
        counts_K = torch.bincount(entry_N, minlength=len(table_K)) + prior
        return (sums_K / counts_K).float(), mse

    def checked(self, own: Map) -> str:
        """A line with the error on weights that no search has seen, the table trained as the codec
        does it."""
        index_S = reference_v2.indices(own.masks, self.states)
        generator = torch.Generator().manual_seed(1)
        table_K = trellis_tables.train_parity_table(
            index_S, own.table_K, self.shift_T, 12, 96, generator
        )
        mse = self._pass(self._check_tiles(), index_S, table_K)[1]
        return (
            f"2^{self.state_bits} states, {self.rate:g} bits, {1 << self.table_bits} entries: "
            f"{mse:.5f}  {_text(own.masks)}"
        )

    def of_code(self, code: str) -> float:
        """The error of a computed code on the weights of `checked`."""
        codec = Trellis.model_validate(
            {"code": code, "bits": self.rate, "state_bits": self.state_bits}
        )
        X_IJE = self._check_tiles()[None]
        state = codec.fit(X_IJE, None, self.generator)
        return float((codec.decode(codec.encode(X_IJE, state), state) - X_IJE).square().mean())

    def _check_tiles(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1 << 20)
        num_tiles = CHECK_TILES >> max(0, self.state_bits - 14)
        return torch.randn(num_tiles, reference.WEIGHTS, generator=generator)


def full_rank(masks: Iterable[int]) -> bool:
    """Whether no sum of some of the masks over GF(2) is 0."""
    basis: list[int] = []
    for mask in masks:
        for own in basis:
            mask = min(mask, mask ^ own)
        if mask == 0:
            return False
        basis.append(mask)
    return True


def _parsed(text: str) -> tuple[int, ...]:
    return tuple(int(mask, 16) for mask in text.split(","))


def _text(masks: tuple[int, ...]) -> str:
    return ",".join(f"{mask:#x}" for mask in masks)


if __name__ == "__main__":
    main()
