"""`hessian.shrinkage`: where it is written down, and that all that rounds with an H has it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.gaussian import gaussian
from vqllm.allocation.expected_loss import expected_losses
from vqllm.checkpoint.packed_matrix import PackedMatrix
from vqllm.core import metrics
from vqllm.plan.packed_spec import linear_spec
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.quantization.row_blocks import Matrix, quantize_rows
from vqllm.recipes import Recipe, from_dict

UNIFORM = {"type": "uniform", "bits": 3, "group": 16}
KMEANS = {"type": "kmeans", "tile_rows": 1, "tile_cols": 4, "index_bits": 6}
ADDITIVE = {"type": "additive", "codebooks": 2, "index_bits": 4, "tile_rows": 1, "tile_cols": 8}
RULES: dict[str, dict[str, Any]] = {
    "ldlq": {"rounding": {"type": "ldlq"}},
    "ldlq, passes": {"rounding": {"type": "ldlq", "order": "hessian", "passes": 1}},
    "ldlq, fitted while it codes": {
        "rounding": {"type": "ldlq"},
        "codec": {
            "type": "grouped_kmeans",
            "tile_cols": 2,
            "index_bits": 3,
            "group_rows": 8,
            "group_cols": 32,
            "fit": "per_group",
        },
    },
    "coordinate": {"rounding": {"type": "coordinate", "start": "weights"}},
    "coordinate, solved": {
        "rounding": {"type": "coordinate", "state": "solved"},
        "codec": {**UNIFORM, "group": None},
    },
    "beam": {"rounding": {"type": "beam"}, "codec": ADDITIVE},
    "two_sided": {"rounding": {"type": "two_sided", "rows": 8}, "codec": KMEANS},
    "nearest, tuned": {
        "rounding": {"type": "nearest"},
        "codec": KMEANS,
        "tuning": [{"type": "codebook", "steps": 5}],
    },
}


def recipe(shrinkage: float | None = None, **changes: Any) -> Recipe:
    values = {
        "name": "test",
        "calibration": {"source": ["self"], "sequences": 2, "length": 16},
        "codec": UNIFORM,
        "rounding": {"type": "ldlq"},
    }
    if shrinkage is not None:
        values["hessian"] = {"shrinkage": shrinkage}
    return from_dict({**values, **changes}, "test recipe")


def hessian(cols: int) -> Tensor:
    x_NC = gaussian(200, cols, seed=1) @ gaussian(cols, cols, seed=2)
    return x_NC.T @ x_NC / 200


def shrunken(H_CC: Tensor, shrinkage: float) -> Tensor:
    return torch.where(torch.eye(len(H_CC)) == 1, H_CC, shrinkage * H_CC)


def made(H_CC: Tensor, chosen: Recipe) -> PackedMatrix:
    W_RC = gaussian(24, len(H_CC))
    (done,) = quantize_group({"a": W_RC}, Statistics(H_CC, 200), chosen)
    assert done.record.proxy_loss == metrics.proxy_loss(W_RC, done.W_hat_RC, H_CC)
    return done


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_shrunken_hessian(rule: str) -> None:
    """Codes are those for an H that came shrunken; without the key they are others."""
    H_CC, changes = hessian(64), RULES[rule]
    found = made(H_CC, recipe(0.5, **changes)).tensors
    wanted = made(shrunken(H_CC, 0.5), recipe(**changes)).tensors
    whole = made(H_CC, recipe(**changes)).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not all(torch.equal(found[key], whole[key]) for key in whole)


def test_it_is_the_basis_of_the_codes_that_counts() -> None:
    """A transform may bring entries off the diagonal along; shrinking comes after it."""
    H_CC = torch.diag(torch.arange(1.0, 65.0))
    turned: dict[str, Any] = {"transforms": [{"type": "hadamard", "side": "in"}]}
    assert made(H_CC, recipe(0.0)).W_hat_RC.equal(made(H_CC, recipe()).W_hat_RC)
    assert not made(H_CC, recipe(0.0, **turned)).W_hat_RC.equal(
        made(H_CC, recipe(**turned)).W_hat_RC
    )


def test_a_head_has_it_as_well() -> None:
    W_RC, H_CC = gaussian(40, 32), hessian(32)
    part: dict[str, Any] = {"head": {"codec": UNIFORM, "rounding": {"type": "ldlq"}}}

    def reader(start: int, stop: int) -> Tensor:
        return W_RC[start:stop]

    def head(H_CC: Tensor, shrinkage: float | None) -> Tensor:
        whole = recipe(shrinkage, **part)
        assert whole.head is not None
        own = whole.of(whole.head)
        spec = linear_spec(40, 32, own)
        matrix = Matrix(names=("head",), recipe=own, spec=spec, is_head=True)
        made = quantize_rows(matrix, reader, W_RC.device, H_CC, 9)
        return spec.dequantize(made.tensors)

    assert torch.equal(head(H_CC, 0.5), head(shrunken(H_CC, 0.5), None))
    assert not torch.equal(head(H_CC, 0.5), head(H_CC, None))


def test_losses_are_expected_for_the_hessian_that_is_rounded_with() -> None:
    W_RC, H_CC = gaussian(24, 64), hessian(64)
    found = expected_losses("a", W_RC, (H_CC, H_CC), recipe(0.5), [0.1])
    assert found == expected_losses("a", W_RC, (shrunken(H_CC, 0.5), H_CC), recipe(), [0.1])
    assert found != expected_losses("a", W_RC, (H_CC, H_CC), recipe(), [0.1])


def test_the_default_is_not_written_down() -> None:
    assert "shrinkage" not in recipe().to_dict()["hessian"]
    assert recipe(1.0).to_dict() == recipe().to_dict()
    changed = recipe(0.8)
    assert changed.to_dict()["hessian"]["shrinkage"] == 0.8
    assert from_dict(changed.to_dict(), "test") == changed
    assert "  shrinkage: 1.0\n" in recipe().to_yaml()
