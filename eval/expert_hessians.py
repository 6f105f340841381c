"""What H an expert's linears should be rounded with, where few tokens reach the expert.

    python eval/expert_hessians.py MODEL TEXTS [--layers 1 3] [--tokens 512 ...] [--draws 1]
        [--only errors|models] [--tables-only]

MODEL is the folder that `train_tiny_moe.py` writes, TEXTS the folder that it was trained on; only
text that it has not seen is used, some to calibrate and some to judge. H is measured on the
original model: an expert's own H on the tokens routed to it, each with a weight (the router's
weight p of the token, its square, or 1), or several targets that own H can be shrunk to:

    (n · H_own + m · C · H_target) / (n + m · C)        n own tokens, C features

- identity: mean(diag H_own) · I
- pooled: gate and up: own H of all experts, summed as they were counted. down: the mean of own H
  over experts, though their features do not correspond
- all tokens: every token goes through this expert, with weight 1
- probability: every token goes through this expert, with its weight from the router's softmax over
  all experts in place of the chosen ones
- ... + 1/4: with a quarter of mean(diag H_target) · I in it

Errors are those of what an expert adds to the stream, on held-out tokens routed to it:
Σ p² |(Ŵ − W) x|² / Σ p² |W x|², of one linear quantized at a time, mean over experts. Models have
all linears of all experts quantized, and nothing else; KL is from the original's predictions. Rows
go to eval/results/expert_hessians.json, those that stand there are not measured again.
"""

import argparse
import copy
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from expert_layers import WEIGHTS, Hessians, Layer, capture, second_moment
from expert_report import error_table, model_table, summary, written
from markers import rewrite
from torch import Tensor, nn
from train_tiny_moe import LENGTH, parts, sequences

from vqllm import recipes
from vqllm.core.protocols import JSON
from vqllm.hf.loading import load_model, load_tokenizer
from vqllm.quantization.linear import Statistics, quantize_group

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "eval" / "results" / "expert_hessians.json", ROOT / "docs" / "log.md"
RECIPE = "e8p-2bit"
TOKENS = (512, 2048, 8192)
HELD_OUT = 131072
"""Tokens for errors; the first JUDGED of them for predictions."""
JUDGED = 24576
DRAWS = 1
"""Calibration sets of other sequences, for models."""
TARGETS = {
    "gate and up": (
        *("identity", "pooled", "pooled + 1/4", "pooled + 1/2"),
        *("probability", "probability + 1/4"),
    ),
    "down": (
        *("identity", "pooled", "all tokens", "all tokens + 1/4", "all tokens + 1/2"),
        *("probability", "probability + 1/4"),
    ),
}
SHARES = (0.1, 0.25, 0.5, 1.0, 2.0, None)
"""m; None is the target alone, as for an expert that no token reaches."""
LINEARS = ("gate and up", "down")
"""Kinds. Errors of the first are those of gate, which stands for both."""
FEW = 64
"""Held-out tokens that an expert must have to be judged."""

Variant = tuple[str, str, float | None]
"""Weights, target, m. The target "own" is without m."""


def quantized(weights: dict[str, Tensor], H_CC: Tensor, num: int) -> dict[str, Tensor]:
    recipe = recipes.load(RECIPE)
    done = quantize_group(weights, Statistics(H_CC, num), recipe)
    return {matrix.name: matrix.W_hat_RC for matrix in done}


def errors(calibration: Layer, held_out: Layer, kind: str, expert: int, variants: dict) -> JSON:
    """Held-out error of every variant, mean over the linears of this kind."""
    p = held_out.chosen_NE[:, expert]
    rows = p.nonzero().squeeze(1)
    H_true = second_moment(held_out.inputs(kind, expert, rows), p[rows] ** 2)
    weights, result = calibration.weights(expert)[kind], {}
    weights.pop("up", None)
    for name, (H_CC, num) in variants.items():
        W_hat, found = quantized(weights, H_CC, num), []
        for key, W_RC in weights.items():
            D_RC = W_hat[key] - W_RC
            found.append(float(((D_RC @ H_true) * D_RC).sum() / ((W_RC @ H_true) * W_RC).sum()))
        result[name] = round(sum(found) / len(found), 5)
    return result


def label(weights: str, target: str, m: float | None) -> str:
    return f"{weights} | {target} | {'' if m is None else m}"


def hessians_of(
    of: dict[str, Hessians], kind: str, expert: int
) -> Iterator[tuple[Variant, Tensor]]:
    """Every target and m with weights p², a few with others."""
    yield ("1", "identity", None), torch.eye(len(of["1"].own[expert]))
    for weights, hessians in of.items():
        everything = weights == "p²"
        yield (weights, "own", None), hessians.variant(expert, "own", None)
        for name in TARGETS[kind] if everything else ("identity",):
            target = hessians.target(expert, name)
            for m in SHARES if everything else (0.25, 0.5):
                yield (weights, name, m), hessians.shrunk(expert, target, m)


def measure_errors(layer_index: int, calibration: Layer, held_out: Layer, num: int) -> list[JSON]:
    """A row for each expert and kind of linears."""
    rows = []
    reached = (held_out.chosen_NE > 0).sum(0).tolist()
    for kind in LINEARS:
        of = {weights: Hessians(calibration, kind, weights) for weights in WEIGHTS}
        for expert, own_tokens in enumerate(of["1"].num_E):
            if reached[expert] < FEW:
                continue
            variants = {}
            for (weights, target, m), H_CC in hessians_of(of, kind, expert):
                variants[label(weights, target, m)] = (H_CC, own_tokens)
            found = errors(calibration, held_out, kind, expert, variants)
            rows.append(
                {
                    "layer": layer_index,
                    "tokens": num,
                    "linears": kind,
                    "expert": expert,
                    "own_tokens": own_tokens,
                    "errors": found,
                }
            )
    return rows


PLANS: dict[str, tuple[Variant, Variant]] = {
    # of gate and up, of down
    "identity": (("1", "identity", None), ("1", "identity", None)),
    **{f"{w} | own": ((w, "own", None), (w, "own", None)) for w in WEIGHTS},
    **{
        f"{w} | {gate}; {down} | {'' if m is None else m}": ((w, gate, m), (w, down, m))
        for w, gate, down, m in (
            ("p²", "pooled", "pooled", None),
            ("p²", "pooled", "all tokens", None),
            ("p²", "pooled", "pooled", 0.5),
            ("p²", "pooled", "all tokens", 0.5),
            ("p²", "identity", "identity", 0.25),
            ("p²", "identity", "identity", 0.5),
            ("p²", "pooled + 1/4", "identity", 0.5),
            ("p²", "pooled + 1/2", "identity", 0.5),
            ("p²", "pooled + 1/4", "all tokens + 1/4", 0.5),
            ("p²", "pooled + 1/4", "all tokens + 1/4", 1.0),
            ("p²", "pooled + 1/2", "all tokens + 1/2", 0.5),
            ("p²", "probability + 1/4", "probability + 1/4", 0.5),
            ("p", "pooled + 1/4", "identity", 0.5),
            ("1", "pooled + 1/4", "identity", 0.5),
        )
    },
}
"""Of models."""


def measure_model(
    model: nn.Module, layers: list[Layer], plan: str, judged: Tensor, original: list[Tensor]
) -> JSON:
    """KL and perplexity of the model with all experts quantized."""
    changed = copy.deepcopy(model)
    for index, layer in enumerate(layers):
        into = changed.model.layers[index].mlp.experts
        for kind, (weights, target, m) in zip(LINEARS, PLANS[plan]):
            hessians = Hessians(layer, kind, weights)
            for expert, num in enumerate(hessians.num_E):
                H_CC = hessians.variant(expert, target, m)
                W_hat = quantized(layer.weights(expert)[kind], H_CC, num)
                decoded = torch.cat(list(W_hat.values()))
                (into.down_proj if kind == "down" else into.gate_up_proj).data[expert] = decoded
    divergence, loss, count = 0.0, 0.0, 0
    for ids, log_p in zip(judged.split(32), original):
        log_q = predictions(changed, ids)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        loss -= float(log_q[:, :-1].gather(2, ids[:, 1:, None]).sum())
        count += ids[:, 1:].numel()
    perplexity = float(torch.tensor(loss / count).exp())
    return {"kl": round(divergence / judged.numel(), 5), "perplexity": round(perplexity, 3)}


def predictions(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", choices=("errors", "models"))
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"errors": [], "models": []}
    if not arguments.tables_only:
        if arguments.texts is None:
            parser.error("pass MODEL and TEXTS, or --tables-only")
        measure(arguments, found)
    rewrite(
        PAGE, "expert hessians", error_table(found["errors"]) + "\n" + model_table(found["models"])
    )


@torch.no_grad()
def measure(arguments: argparse.Namespace, found: JSON) -> None:
    model = load_model(arguments.model, dtype=torch.float32)
    unseen = sequences(load_tokenizer(arguments.model), parts(arguments.texts)[1])
    unseen = unseen[torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))]
    pool, rest = unseen[HELD_OUT // LENGTH :], unseen[: HELD_OUT // LENGTH]
    if arguments.only != "models":
        held_out, calibration = capture(model, rest), capture(model, pool[: max(TOKENS) // LENGTH])
        for num in arguments.tokens:
            if any(row["tokens"] == num for row in found["errors"]):
                continue
            rows = []
            for i in arguments.layers:
                rows += measure_errors(i, calibration[i].first(num), held_out[i], num)
                print(num, "tokens, layer", i, flush=True)
            found["errors"] += summary(rows)
            RESULTS.write_text(written(found))
    if arguments.only != "errors":
        judged = rest[: JUDGED // LENGTH]
        original = [predictions(model, ids) for ids in judged.split(32)]
        for draw, num, plan in itertools.product(range(arguments.draws), arguments.tokens, PLANS):
            about = {"draw": draw, "tokens": num, "plan": plan}
            if any(row | about == row for row in found["models"]):
                continue
            generator = torch.Generator().manual_seed(draw + 1)
            order = torch.randperm(len(pool), generator=generator)[: num // LENGTH]
            layers = capture(model, pool[order])
            found["models"].append(about | measure_model(model, layers, plan, judged, original))
            print(found["models"][-1], flush=True)
            RESULTS.write_text(written(found))


if __name__ == "__main__":
    main()
