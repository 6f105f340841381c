"""The linear maps from codes to bits that a row of a convolutional code may choose from.

For each set of constants the maps were found for unit Gaussian weights at the best scale: 2^16 to
2^18 random a and c on 2^10 tiles, the best 2.5 % of them again on 2^13, then random steps from the
best 48 for half a minute, four times over. Of the 120 best the first map is the best one on 2^17
tiles; each further one lowers the mean over 96 rows of 4096 weights of the least error of a row the
most. Different starts end at distortions within 0.5 % of each other: there is little to gain.

Distortion of the first map, and of the best of 2, 4 and 8 maps for each row of 4096 weights:

    bits   window, shift, levels     1         2         4         8
    2      6, 3, linear              0.1087    0.1081    0.1075    0.1072
    2.25                             0.0845    0.0839    0.0836    0.0832
    2.5                              0.0629    0.0624    0.0622    0.0620
    2.75                             0.0462    0.0459    0.0457    0.0457
    2      6, 4, cubic               0.1034    0.1028    0.1024    0.1021
    2.25                             0.0741    0.0735    0.0731    0.0728
    2.5                              0.0546    0.0540    0.0538    0.0536
    2.75                             0.0403    0.0400    0.0397    0.0395

Other windows do not help linear levels at 2 bits: 0.1101 with window 5, 0.1093 with 7, 0.1087 with
shift 4, against 0.1091 on the same weights. Nor do scales so large that v runs through all its bits
several times (0.1092), or through them without overlap (0.1100). Cubic levels with shift 3 reach
0.1053, and at 2.5 bits 0.0587; with shift 5 0.0541 there; without overlap 0.1028 at 2 bits.
"""

from typing import NamedTuple


class Constants(NamedTuple):
    """The constants of a format, which its decoder has without reading them from a tensor."""

    index_bits: int
    tile_cols: int
    window: int
    shift: int
    levels: str

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items())


class Maps(NamedTuple):
    """Maps for one set of constants, the best first."""

    unit: float
    """Best scale of w for Gaussian weights of unit variance."""
    maps: tuple[tuple[int, int], ...]
    """a and c of `vqllm_kernels.convolutional.reference`."""


_IDENTITY = ((16, 0),)


def _places(a: int, *offsets: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, c) for c in offsets)


KNOWN: dict[Constants, Maps] = {
    Constants(8, 4, 6, 3, "linear"): Maps(
        1.969 / 32, _places(1935, 20084, 17881, 19047, 19999, 18333, 18785, 20133, 17906)
    ),
    Constants(9, 4, 6, 3, "linear"): Maps(
        2.051 / 32,
        (
            *_places(859, 147204, 145055, 147095),
            (866, 142524),
            *_places(859, 146020, 144994, 146958),
            (866, 142838),
        ),
    ),
    Constants(10, 4, 6, 3, "linear"): Maps(
        2.162 / 32,
        (
            *_places(441, 136003, 133890),
            *_places(444, 132437, 133627, 134583),
            *_places(441, 134616, 135136, 134381),
        ),
    ),
    Constants(11, 4, 6, 3, "linear"): Maps(
        2.304 / 32, _places(237, 20836, 19992, 19377, 19689, 26454, 20192, 25433, 19392)
    ),
    Constants(8, 4, 6, 4, "cubic"): Maps(
        1.430 / 32,
        (
            *_places(14930, 292220, 310096, 199010),
            *_places(14931, 308557, 301805),
            (15990, 71280),
            *_places(14931, 309526, 295185),
        ),
    ),
    Constants(9, 4, 6, 4, "cubic"): Maps(
        1.477 / 32,
        (
            *_places(7833, 96503, 137851, 134802, 140039, 106396, 95714),
            *_places(8043, 72007, 52366),
        ),
    ),
    Constants(10, 4, 6, 4, "cubic"): Maps(
        1.526 / 32,
        (
            *_places(3892, 450838, 110281),
            (3984, 75136),
            (3998, 18135),
            (3793, 578762),
            *_places(3892, 558043, 110264),
            (3998, 65243),
        ),
    ),
    Constants(11, 4, 6, 4, "cubic"): Maps(
        1.577 / 32,
        (
            *_places(1861, 315414, 307286),
            (1952, 4032243),
            *_places(1861, 317767, 318697),
            (1952, 3967728),
            *_places(1861, 3986841, 249651),
        ),
    ),
    # As many codes as v has values: 8 bits for 3 weights are the unit of the paper's 2.75 bits (the
    # 64th weight of a group and its scale share a byte), 7 bits for 3 and 9 for 4 that of its 2.5.
    Constants(8, 3, 4, 2, "linear"): Maps(0.2653, _IDENTITY),
    Constants(7, 3, 3, 2, "linear"): Maps(0.5246, _IDENTITY),
    Constants(9, 4, 3, 2, "linear"): Maps(0.5202, _IDENTITY),
}
