"""Hessians of experts: shrunk, measured in pieces, weighed as the router does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.architectures import save_tiny
from vqllm.calibration import passes as passes_module
from vqllm.calibration.expert_hessians import merged, shrunk
from vqllm.calibration.hessian import InputHessian
from vqllm.calibration.layer_calibrator import InputGroup, LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.hf.decoder_layers import linears_of
from vqllm.hf.experts import LinearExperts

C = 6
TOKENS = torch.randint(3, 384, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "CPU_BATCH_TOKENS", 48)


def hessian_of(x_NC: Tensor, weight_N: Tensor | None = None) -> InputHessian:
    hessian = InputHessian.empty(x_NC.shape[-1], torch.device("cpu"))
    hessian.add(x_NC, weight_N)
    return hessian


def mean(x_NC: Tensor, weight_N: Tensor | None = None) -> Tensor:
    weight_N = torch.ones(len(x_NC)) if weight_N is None else weight_N
    return (x_NC.T * weight_N) @ x_NC / weight_N.sum()


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0, 8.0])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_the_first_linears_are_shrunk_towards_all_experts(
    shrinkage: float, num_tokens: int
) -> None:
    x, every, p2 = torch.randn(num_tokens, C), torch.randn(90, C) + 1, torch.rand(num_tokens)
    all_CC = mean(every)
    target = 0.75 * all_CC + 0.25 * all_CC.trace() / C * torch.eye(C)
    wanted = num_tokens * mean(x, p2) + shrinkage * C * target
    got = shrunk(hessian_of(x, p2), hessian_of(every), shrinkage)
    torch.testing.assert_close(got.matrix("x"), wanted / (num_tokens + shrinkage * C))
    assert got.num_tokens == num_tokens


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 4.0])
def test_the_last_linears_are_shrunk_towards_their_own_diagonal(shrinkage: float) -> None:
    x, p2 = torch.randn(9, C), torch.rand(9)
    own = mean(x, p2)
    wanted = 9 * own + shrinkage / 2 * C * own.trace() / C * torch.eye(C)
    got = shrunk(hessian_of(x, p2), None, shrinkage)
    torch.testing.assert_close(got.matrix("x"), wanted / (9 + shrinkage / 2 * C))


def test_without_tokens_the_target_is_left() -> None:
    every = torch.randn(90, C)
    empty = InputHessian.empty(C, torch.device("cpu"))
    all_CC = mean(every)
    got = shrunk(empty, hessian_of(every), 1.0)
    wanted = 0.75 * all_CC + 0.25 * all_CC.trace() / C * torch.eye(C)
    torch.testing.assert_close(got.matrix("x"), wanted)
    assert got.num_tokens == 0
    assert torch.equal(shrunk(empty, None, 1.0).matrix("x"), torch.eye(C))
    got = shrunk(empty, hessian_of(every), 0.0)  # nothing to divide by
    torch.testing.assert_close(got.matrix("x"), wanted)


def test_where_no_expert_has_tokens_nothing_is_known() -> None:
    empty = InputHessian.empty(C, torch.device("cpu"))
    assert not shrunk(empty, InputHessian.empty(C, torch.device("cpu")), 1.0).is_known


def test_shrinking_does_not_change_the_shared_hessian() -> None:
    every = hessian_of(torch.randn(90, C))
    before = every.total_CC.clone()
    shrunk(hessian_of(torch.randn(9, C)), every, 1.0)
    assert torch.equal(every.total_CC, before)


def test_merged_is_the_hessian_of_all_tokens() -> None:
    x, p2 = torch.randn(30, C), torch.rand(30)
    parts = [hessian_of(x[:7], p2[:7]), hessian_of(x[7:], p2[7:])]
    got = merged(parts, InputHessian.empty(C, torch.device("cpu")))
    torch.testing.assert_close(got.matrix("x"), mean(x, p2))
    assert got.num_tokens == 30


@contextmanager
def calibrated(
    source: Path, index: int, folder: Path, **options: Any
) -> Iterator[tuple[LayerCalibrator, dict[str, nn.Linear], list[InputGroup], LayerStream]]:
    """A calibrator with its states at the input of loaded layer `index`."""
    stream = LayerStream(source, torch.device("cpu"))
    calibrator = LayerCalibrator(stream, TOKENS, 1 << 30, folder, **options)
    try:
        for i, name in enumerate(stream.names):
            with stream.layer(i) as layer:
                linears = linears_of(layer, name)
                calibrator.begin(linears)
                if i == index:
                    yield calibrator, linears, calibrator.groups(i, linears), stream
                    return
                calibrator.advance(i)
    finally:
        calibrator.close()


def routed_inputs(
    stream: LayerStream, index: int, linears: dict[str, nn.Linear], calibrator: LayerCalibrator
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What the linears of experts get over all tokens, [N, C], and what the router multiplies
    their outputs by: the experts are called with what the router said, seen from outside."""
    layer = stream.layers[index]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
    said: list[Tensor] = []
    experts = next(m for m in layer.modules() if isinstance(m, LinearExperts))

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        said[:] = args[1:]

    handles = [experts.register_forward_pre_hook(keep)]
    for name, linear in linears.items():
        if ".experts." not in name:
            continue
        number = int(name.split(".experts.")[1].split(".")[0])

        def visit(_: nn.Module, args: tuple[Tensor], name: str = name, e: int = number) -> None:
            choice_TK, weight_TK = said
            weight_T = (weight_TK * (choice_TK == e)).sum(1)
            # Tokens come by their place among the choices, then by their number.
            order = [t for k in range(choice_TK.shape[1]) for t in (choice_TK[:, k] == e).nonzero()]
            found[name].append((args[0].detach(), weight_T[torch.cat(order)]))

        handles.append(linear.register_forward_pre_hook(visit))
    for rows in calibrator._passes.batches():
        calibrator._passes.run(index, rows, {}, lambda name, x: None)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_the_hessian_of_an_expert_is_that_of_its_tokens_by_the_routers_weights(
    model_type: str, tmp_path: Path
) -> None:
    source = save_tiny(model_type, tmp_path / "source")
    layer = 1
    with calibrated(source, layer, tmp_path, shrinkage=0.0) as found:
        calibrator, linears, groups, stream = found
        inputs = routed_inputs(stream, layer, linears, calibrator)
        hessians = calibrator.hessians(layer, linears, groups)
        seen = 0
        for group, hessian in zip(groups, hessians, strict=True):
            if group.side is None or not inputs[group.names[0]]:
                continue
            seen += 1
            x_NC = torch.cat([x for x, _ in inputs[group.names[0]]]).float()
            p_N = torch.cat([p for _, p in inputs[group.names[0]]]).float()
            assert hessian.num_tokens == len(x_NC)
            got = hessian.matrix(group.names[0])
            torch.testing.assert_close(got, mean(x_NC, p_N**2), rtol=1e-4, atol=1e-5)
        assert seen >= 4


def test_experts_are_groups_of_their_own_side_by_side(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    with calibrated(source, 1, tmp_path) as (_, linears, groups, _):
        assert sorted(n for group in groups for n in group.names) == sorted(linears)
        inside = [group for group in groups if group.side]
        first = "model.layers.1.mlp.experts"
        assert inside == [
            *(
                InputGroup((f"{first}.{e}.gate_proj", f"{first}.{e}.up_proj"), f"{first} input")
                for e in range(4)
            ),
            *(InputGroup((f"{first}.{e}.down_proj",), f"{first} output") for e in range(4)),
        ]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
@pytest.mark.parametrize("each", [0, 3])
def test_hessians_in_pieces_equal_those_of_all_at_once(
    model_type: str, each: int, tmp_path: Path
) -> None:
    """Also the shared one, which the first piece needs the other experts for."""
    source = save_tiny(model_type, tmp_path / "source")
    with calibrated(source, 1, tmp_path, shrinkage=2.0) as (calibrator, linears, groups, _):
        whole = calibrator.hessians(1, linears, groups)
    with calibrated(source, 1, tmp_path, shrinkage=2.0) as (calibrator, linears, groups, _):
        pieces = list(calibrator.chunks(linears, groups, each * 4 * 64**2))
        assert [group for piece in pieces for group in piece] == groups
        assert len(pieces) == len(groups) if each == 0 else len(pieces) < len(groups)
        apart = [own for piece in pieces for own in calibrator.hessians(1, linears, piece)]
    for group, wanted, got in zip(groups, whole, apart, strict=True):
        assert got.num_tokens == wanted.num_tokens
        assert got.is_known == wanted.is_known
        if wanted.is_known:
            name = group.names[0]
            torch.testing.assert_close(
                got.matrix(name), wanted.matrix(name), rtol=1e-4, atol=1e-5, msg=name
            )


def test_the_budget_of_a_piece_counts_one_hessian_for_a_group(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    with calibrated(source, 1, tmp_path) as (calibrator, linears, groups, _):
        budget = 4 * (64**2 + 128**2)
        for piece in calibrator.chunks(linears, groups, budget):
            sizes = [4 * linears[group.names[0]].in_features ** 2 for group in piece]
            assert sum(sizes) <= budget or len(piece) == 1
        assert list(calibrator.chunks(linears, groups, 1 << 40)) == [groups]
        assert list(calibrator.chunks(linears, [], 1 << 40)) == []


@pytest.mark.parametrize("target", ["weights", "residual"])
def test_an_expert_without_tokens_gets_the_hessian_of_the_others(
    target: Any, tmp_path: Path
) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    with calibrated(source, 1, tmp_path, target=target) as (calibrator, linears, groups, stream):
        experts = next(m for m in stream.layers[1].modules() if isinstance(m, LinearExperts))

        def keep_away(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
            return args[0], args[1].where(args[1] != 2, 1), args[2]  # number 2 gets nothing

        experts.register_forward_pre_hook(keep_away)
        hessians = calibrator.hessians(1, linears, groups)
    by_name = {group.names[0]: own for group, own in zip(groups, hessians, strict=True)}
    first, last = (
        by_name[f"model.layers.1.mlp.experts.2.{key}"] for key in ("gate_proj", "down_proj")
    )
    assert first.num_tokens == last.num_tokens == 0
    H = first.matrix("first")
    assert bool((torch.linalg.eigvalsh(H) > 0).all())
    assert not torch.equal(H, H.diagonal().mean() * torch.eye(64))
    assert torch.equal(last.matrix("last"), torch.eye(len(last.total_CC)))
