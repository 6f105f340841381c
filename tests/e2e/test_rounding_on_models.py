"""LDLQ on Hessians of activations: every linear of models that run, not of matrices made up."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.params import slow
from tests.support.tiny import save_tiny
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.hf.decoder_layers import linears_of
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.recipes import from_dict

CODECS: dict[str, dict[str, Any]] = {
    "uniform": {"type": "uniform", "bits": 3, "group": None},
    "kmeans": {"type": "kmeans", "tile_rows": 1, "tile_cols": 2, "index_bits": 6},
    "e8p": {"type": "e8p"},
}


def losses(
    source: Path, tokens: torch.Tensor, codec: dict[str, Any], rounding: str, scratch: Path
) -> dict[str, float]:
    """Proxy loss of every linear of the first two layers; all inputs are the original model's."""
    recipe = from_dict(
        {
            "name": "test",
            "transforms": [{"type": "hadamard", "side": "both"}],
            "codec": codec,
            "rounding": {"type": rounding},
        },
        "test recipe",
    )
    stream = LayerStream(source, torch.device("cpu"))
    calibrator = LayerCalibrator(stream, tokens, 1 << 30, scratch)
    found = {}
    for index, layer_name in enumerate(stream.names[:2]):
        with stream.layer(index) as layer:
            linears = linears_of(layer, layer_name)
            weights = {name: linear.weight.data.float() for name, linear in linears.items()}
            layer.to(stream.compute_dtype)
            calibrator.begin(linears)
            groups = calibrator.groups(index, linears)
            for group, hessian in zip(groups, calibrator.hessians(index, linears, groups)):
                W = {name: weights[name] for name in group.names}
                H = hessian.matrix(group.names[0])
                for done in quantize_group(W, Statistics(H, hessian.num_tokens), recipe):
                    found[done.name] = done.record.proxy_loss
            calibrator.advance(index)
    calibrator.close()
    return found


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("arch", ["llama", slow("opt"), slow("phi3")])
def test_ldlq_is_never_worse_than_nearest(arch: str, codec: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", arch)
    tokens = torch.randint(3, 384, (8, 64), generator=torch.Generator().manual_seed(0))
    nearest = losses(source, tokens, CODECS[codec], "nearest", tmp_path)
    ldlq = losses(source, tokens, CODECS[codec], "ldlq", tmp_path)
    assert len(ldlq) >= 8
    assert {name: loss for name, loss in ldlq.items() if loss > nearest[name]} == {}


@pytest.mark.slow
@pytest.mark.skipif("VQLLM_MODEL" not in os.environ, reason="VQLLM_MODEL names no model folder")
@pytest.mark.parametrize("codec", CODECS)
def test_ldlq_is_never_worse_than_nearest_on_a_trained_model(codec: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = Path(os.environ["VQLLM_MODEL"])
    text = (Path(__file__).parents[2] / "docs" / "log.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    nearest = losses(source, tokens, CODECS[codec], "nearest", tmp_path)
    ldlq = losses(source, tokens, CODECS[codec], "ldlq", tmp_path)
    assert {name: loss for name, loss in ldlq.items() if loss > nearest[name]} == {}
