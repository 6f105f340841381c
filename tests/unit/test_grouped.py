"""Groups of rows: the scale that tells the group, what is learned, and the moves of codes."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.support.gaussian import generator
from vqllm.codecs import CODECS
from vqllm.codecs.grouped import Grouped
from vqllm.core import metrics, tiles
from vqllm.core.protocols import State
from vqllm.errors import NumericalError
from vqllm_kernels.grouped import reference
from vqllm_kernels.grouped.spec import GroupedSpec

ALL_SCALES = torch.arange(106 << 7, 137 << 7, dtype=torch.int16).view(torch.bfloat16)


def build(**options: object) -> Grouped:
    return Grouped.model_validate({"type": "grouped", **options})


def mixed_rows(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unit variance, and the distribution of each: 0 Gaussian, 1 Laplace, 2 uniform."""
    draw = generator(seed)
    uniform = torch.rand(rows, cols, generator=draw) - 0.5
    laplace = -uniform.sign() * torch.log1p(-1.999999 * uniform.abs()) / math.sqrt(2)
    kinds = torch.stack((torch.randn(rows, cols, generator=draw), laplace, uniform * 12**0.5))
    kind_R = torch.randint(3, (rows,), generator=draw)
    return kinds[kind_R, torch.arange(rows)], kind_R


def relative_error(codec: Grouped, W_RC: Tensor, state: State) -> float:
    """Mean over rows of the squared error over the energy of the row."""
    X_IJE = tiles.to_tiles(W_RC, codec.tile)
    gap_IJE = codec.decode(codec.encode(X_IJE, state), state) - X_IJE
    return float((gap_IJE.square().sum((1, 2)) / X_IJE.square().sum((1, 2))).mean())


def fitted_error(codec: Grouped, W_RC: Tensor) -> float:
    state = codec.fit(tiles.to_tiles(W_RC, codec.tile), None, generator())
    return relative_error(codec, W_RC, state)


class TestStoredScale:
    def test_every_scale_and_group_has_bits_of_its_own(self) -> None:
        assert float(ALL_SCALES[0]) == reference.SMALLEST_SCALE
        assert float(ALL_SCALES[-1]) == reference.LARGEST_SCALE
        seen = []
        for g in range(reference.MAX_GROUPS):
            group = torch.full((len(ALL_SCALES),), g, dtype=torch.uint8)
            stored = reference.join(ALL_SCALES, group)
            scale_again, group_again = reference.split(stored)
            assert torch.equal(scale_again, ALL_SCALES)
            assert torch.equal(group_again, group)
            assert group_again.dtype == torch.uint8
            # The definition in numbers: a threshold between bands, a power of two off.
            exponent = stored.double().log2()
            assert torch.equal(((exponent + 126) / 31).floor(), group.double())
            assert torch.equal(stored.double() * 2.0 ** (105 - 31 * g), ALL_SCALES.double())
            seen.append(stored.view(torch.int16))
        assert len(torch.cat(seen).unique()) == reference.MAX_GROUPS * len(ALL_SCALES)

    def test_decoding_is_what_the_format_says(self) -> None:
        spec = GroupedSpec(tile_cols=2, index_bits=3, groups=3)
        draw = generator(1)
        codebook = torch.randn(3, 8, 2, generator=draw).half()
        stored = torch.tensor([1.5 * 2.0**-105, 0.75 * 2.0**-74, 3.0 * 2.0**-43, 2.0**-105])
        codes = torch.tensor([[0b10_001_000, 0b0], [0b01_010_011, 0b1], [0xFF, 0xFF], [5, 0]])
        tensors = {
            "codes": codes.to(torch.uint8),
            "scale": stored.bfloat16(),
            "codebook": codebook,
        }
        index = [[0, 1, 2], [3, 2, 5], [7, 7, 7], [5, 0, 0]]
        rows = zip([1.5, 0.75, 3.0, 1.0], [0, 1, 2, 0], index)
        want = [[s * float(w) for k in ks for w in codebook[g, k]][:5] for s, g, ks in rows]
        assert torch.equal(spec.decode(tensors, 4, 5), torch.tensor(want))

    def test_rows_can_be_split_and_stacked(self) -> None:
        W_RC, _ = mixed_rows(24, 40)
        codec = build(tile_cols=2, index_bits=4, passes=1)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, None, generator())
        packed = codec.pack(codec.encode(X_IJE, state), state)
        whole_RC = codec.spec().decode(packed, 24, 40)
        order = torch.randperm(24, generator=generator(2))
        part = {k: t if k == "codebook" else t[order[:10]] for k, t in packed.items()}
        assert torch.equal(codec.spec().decode(part, 10, 40), whole_RC[order[:10]])

    def test_the_groups_cost_no_bits(self) -> None:
        for groups in (1, 4, 8):
            bits = build(tile_cols=4, index_bits=8, groups=groups).bits(128, 512)
            assert bits.codes == 128 * 512 * 2
            assert bits.side == 128 * 16
            assert bits.codebook == groups * 256 * 4 * 16

    @pytest.mark.parametrize(
        "fields",
        [
            {"tile_cols": 3, "index_bits": 4, "groups": 4},
            {"tile_cols": 4, "index_bits": 17, "groups": 4},
            {"tile_cols": 4, "index_bits": 4, "groups": 9},
        ],
    )
    def test_fields_out_of_range_are_refused(self, fields: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"allowed are 1, 2, 4, 8 columns, 1\.\.16 bits"):
            GroupedSpec(**fields)
        with pytest.raises(ValidationError):
            build(**fields)


class TestLearning:
    def test_rows_of_different_distributions_get_codebooks_of_their_own(self) -> None:
        W_RC, kind_R = mixed_rows(96, 512)
        W_RC = W_RC * torch.exp(2 * torch.randn(96, 1, generator=generator(3)))
        codec = build(tile_cols=2, index_bits=4, groups=3)
        group_R = codec.fit(tiles.to_tiles(W_RC, codec.tile), None, generator())["group"]
        shared = 0
        for g in range(3):
            count = torch.bincount(kind_R[group_R == g], minlength=3)
            shared += int(count.sum() - count.max())
        assert shared <= 3

    def test_mixed_rows_are_coded_better_than_with_one_codebook(self) -> None:
        """At 2 x 2 bits 12 % better than k-means of rows that a transform has scaled, and 4
        codebooks of 16 pairs take 0.016 bits a weight of this matrix."""
        W_RC, _ = mixed_rows(128, 1024)
        kmeans = CODECS.get("kmeans").model_validate(
            {"type": "kmeans", "tile_cols": 2, "index_bits": 4}
        )
        scaled_RC = W_RC / W_RC.square().mean(1, keepdim=True).sqrt()
        X_IJE = tiles.to_tiles(scaled_RC, kmeans.tile)
        state = kmeans.fit(X_IJE, None, generator())
        plain = float((kmeans.decode(kmeans.encode(X_IJE, state), state) - X_IJE).square().mean())
        one, four = (
            fitted_error(build(tile_cols=2, index_bits=4, groups=groups), W_RC) for groups in (1, 4)
        )
        assert one == pytest.approx(plain, rel=0.03)
        assert four < 0.91 * one
        assert four * 4**0.016 < 0.92 * plain

    def test_size_of_rows_does_not_matter(self) -> None:
        W_RC, _ = mixed_rows(64, 256)
        codec = build(tile_cols=2, index_bits=4)
        even = fitted_error(codec, W_RC)
        size_R1 = 2.0 ** torch.randint(-15, 6, (64, 1), generator=generator(4))
        assert fitted_error(codec, W_RC * size_R1) == pytest.approx(even, rel=0.01)

    def test_learning_longer_is_never_worse(self) -> None:
        W_RC, _ = mixed_rows(96, 256)
        errors = [
            fitted_error(build(tile_cols=2, index_bits=4, rounds=rounds), W_RC)
            for rounds in (0, 1, 3, 6)
        ]
        assert all(b <= a * 1.001 for a, b in itertools.pairwise(errors))
        assert errors[-1] < 0.98 * errors[0]

    def test_moves_to_neighbours_lose_little(self) -> None:
        W_RC, _ = mixed_rows(64, 512)
        every, some, few = (
            fitted_error(build(tile_cols=4, index_bits=6, neighbours=num), W_RC)
            for num in (64, 16, 1)
        )
        assert every <= some * 1.01 < 1.03 * every
        assert few > 1.01 * some, "without moves only the means are learned"

    def test_errors_are_moved_to_where_they_weigh_less(self) -> None:
        W_RC, _ = mixed_rows(64, 256)
        codec = build(tile_cols=2, index_bits=4)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        weight_11E = torch.tensor([9.0, 1.0]).reshape(1, 1, 2)

        def error(weight_IJE: Tensor | None) -> float:
            state = codec.fit(X_IJE, weight_IJE, generator())
            codes = codec.encode(X_IJE, state, weight_E=weight_11E[0, 0])
            return float((weight_11E * (codec.decode(codes, state) - X_IJE) ** 2).mean())

        assert error(weight_11E) < 0.95 * error(None)

    def test_tiles_of_no_weight_are_ignored(self) -> None:
        W_RC, _ = mixed_rows(32, 64)
        W_RC[:, 32:] = 100.0
        weight_1J1 = (torch.arange(32) < 16).float().reshape(1, 32, 1)
        codec = build(tile_cols=2, index_bits=3, groups=2)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, weight_1J1, generator())
        assert float(state["scale"].float().max()) < 2
        gap_IJE = codec.decode(codec.encode(X_IJE, state), state) - X_IJE
        assert float(gap_IJE[:, :16].square().mean()) < 0.25

    def test_same_bytes_with_any_number_of_threads_on_a_sample(self) -> None:
        X_IJE = tiles.to_tiles(mixed_rows(128, 512)[0], (1, 4))
        weight_IJE = torch.rand(1, 128, 4, generator=generator(5))
        codec = build(index_bits=6, sample=1024)
        threads = torch.get_num_threads()
        states = []
        try:
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                states.append(codec.fit(X_IJE, weight_IJE, generator()))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(s[name], states[0][name]) for s in states for name in s)
        other = codec.fit(X_IJE, weight_IJE, generator(1))
        assert not torch.equal(other["codebook"], states[0]["codebook"]), "another sample"


class TestCodes:
    @pytest.mark.parametrize("weight", ["none", "elements", "dense"])
    def test_codes_are_the_best_of_all(self, weight: str) -> None:
        W_RC, _ = mixed_rows(24, 64)
        codec = build(tile_cols=4, index_bits=5)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, None, generator())
        factor_EE = torch.randn(4, 4, generator=generator(6))
        weight_E = {
            "none": None,
            "elements": torch.tensor([1.0, 4.0, 0.2, 2.0]),
            "dense": factor_EE @ factor_EE.T + 0.1 * torch.eye(4),
        }[weight]
        metric_EE = torch.eye(4) if weight_E is None else weight_E
        metric_EE = torch.diag(metric_EE) if metric_EE.dim() == 1 else metric_EE
        every = torch.arange(32, dtype=torch.int32).expand(*X_IJE.shape[:2], 32)
        all_IJKE = torch.stack(
            [codec.decode(every[..., k : k + 1], state) for k in range(32)], dim=2
        )
        gap = (all_IJKE - X_IJE[:, :, None]).double()
        error_IJK = ((gap @ metric_EE.double()) * gap).sum(-1)
        for num in (1, 5):
            codes = codec.candidates(X_IJE, state, num, weight_E)
            got = error_IJK.gather(2, codes.to(torch.int64))
            best = error_IJK.topk(num, largest=False).values
            torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)

    def test_moves_are_the_nearest_entries_of_the_codebook_of_the_row(self) -> None:
        W_RC, _ = mixed_rows(24, 64)
        codec = build(tile_cols=2, index_bits=4)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, None, generator())
        codes = codec.encode(X_IJE, state)
        moves = codec.moves(codes, state, 5)
        assert moves.dtype == torch.int32
        assert torch.equal(moves[..., :1], codes)
        books = state["codebook"].double()
        for i, j in ((0, 0), (7, 3), (23, 31)):
            book = books[int(state["group"][i])]
            distance = (book - book[int(codes[i, j])]).norm(dim=1)
            got = distance[moves[i, j].to(torch.int64)]
            torch.testing.assert_close(got, distance.sort().values[:5], rtol=1e-4, atol=1e-4)

    def test_a_rule_can_lower_the_loss_by_moves_alone(self) -> None:
        """Coordinate descent that looks at 4 neighbours of each code, starting from nearest."""
        W_RC, _ = mixed_rows(32, 64)
        factor = torch.randn(64, 128, generator=generator(7))
        H_CC = factor @ factor.T / 128 + 0.01 * torch.eye(64)
        codec = build(tile_cols=2, index_bits=4)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, None, generator())
        codes = codec.encode(X_IJE, state)

        def loss() -> float:
            return metrics.proxy_loss(W_RC, codec.decode(codes, state).flatten(1), H_CC)

        nearest = loss()
        for j in range(32):
            own = slice(2 * j, 2 * j + 2)
            E_RC = W_RC - codec.decode(codes, state).flatten(1)
            moves_I1V = codec.moves(codes[:, j : j + 1], state, 4)
            words_IVE = torch.cat(
                [codec.decode(moves_I1V[..., v : v + 1], state) for v in range(4)], dim=1
            )
            step_IVE = words_IVE[:, :1] - words_IVE
            gain_IV = 2 * (step_IVE * (E_RC @ H_CC[:, own])[:, None]).sum(2) + (
                (step_IVE @ H_CC[own, own]) * step_IVE
            ).sum(2)
            best_I = gain_IV.argmin(1, keepdim=True)
            codes[:, j] = moves_I1V[:, 0].gather(1, best_I)
        assert loss() < 0.92 * nearest


class TestOddInput:
    def test_zeros(self) -> None:
        codec = build(tile_cols=2, index_bits=3)
        X_IJE = torch.zeros(5, 7, 2)
        state = codec.fit(X_IJE, None, generator())
        assert torch.equal(codec.decode(codec.encode(X_IJE, state), state), X_IJE)

    def test_a_row_of_zeros_among_others(self) -> None:
        W_RC, _ = mixed_rows(16, 64)
        W_RC[3] = 0
        codec = build(tile_cols=2, index_bits=4)
        X_IJE = tiles.to_tiles(W_RC, codec.tile)
        state = codec.fit(X_IJE, None, generator())
        decoded = codec.decode(codec.encode(X_IJE, state), state)
        assert bool(decoded.isfinite().all())
        assert float(decoded[3].abs().max()) < 1e-6

    @pytest.mark.parametrize("shape", [(1, 1, 2), (1, 40, 2), (3, 1, 2), (3, 40, 2)])
    def test_fewer_rows_or_tiles_than_groups_or_entries(self, shape: tuple[int, ...]) -> None:
        codec = build(tile_cols=2, index_bits=6, groups=8)
        X_IJE = torch.randn(shape, generator=generator())
        state = codec.fit(X_IJE, None, generator())
        decoded = codec.decode(codec.encode(X_IJE, state), state)
        torch.testing.assert_close(decoded, X_IJE, rtol=2e-3, atol=2e-3)

    def test_rows_of_one_value(self) -> None:
        X_IJE = torch.tensor([0.25, -3.0, 40.0, 1e-3])[:, None, None].expand(4, 8, 2).clone()
        codec = build(tile_cols=2, index_bits=2)
        state = codec.fit(X_IJE, None, generator())
        decoded = codec.decode(codec.encode(X_IJE, state), state)
        torch.testing.assert_close(decoded, X_IJE, rtol=4e-3, atol=0)

    def test_weights_too_large_are_refused(self) -> None:
        X_IJE = tiles.to_tiles(1e4 * mixed_rows(8, 64)[0], (1, 2))
        with pytest.raises(NumericalError, match="beyond the largest scale, 1020"):
            build(tile_cols=2, index_bits=3).fit(X_IJE, None, generator())

    def test_a_tuned_state_is_projected_to_what_can_be_stored(self) -> None:
        codec = build(tile_cols=2, index_bits=3)
        X_IJE = tiles.to_tiles(mixed_rows(8, 64)[0], (1, 2))
        state = codec.fit(X_IJE, None, generator())
        again = codec.project(state)
        assert all(torch.equal(again[name], state[name]) for name in state)
        scale_I = state["scale"].float() * 1.234
        scale_I[0], scale_I[1] = 1e9, 0.0
        tuned = codec.project(
            {**state, "scale": scale_I, "codebook": state["codebook"].float() * 1.01}
        )
        codes = codec.encode(X_IJE, tuned)
        _, stored = codec.unpack(codec.pack(codes, tuned), 8, 64)
        assert all(torch.equal(stored[name], tuned[name]) for name in tuned)
        assert float(stored["scale"][0]) == reference.LARGEST_SCALE
        assert float(stored["scale"][1]) == reference.SMALLEST_SCALE
        assert torch.equal(stored["group"], state["group"])
