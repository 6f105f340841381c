"""Train a tiny mixture-of-experts language model on text files, for measurements on experts.

    python eval/train_tiny_moe.py TEXTS OUTPUT [--minutes 5] [--seed 0] [--dense]

A model of random weights says nothing about quantization: what its experts get has no structure,
and its routers choose at random. This one has learned something, and is small: a Qwen3-MoE of 4
layers with 16 experts of 128 x 128 in each, of which a token goes to 2. The balancing loss is weak,
so that every expert is used, some several times as often as others. With --dense the model is a
Qwen3 of the same size without experts.

TEXTS is a folder of .txt files. The last 15 % of each are held out: perplexity is measured on them,
and scripts that load the model may calibrate and judge on them (`parts`). The number of steps
follows from --minutes and not from the clock, so that a result can be repeated.
OUTPUT becomes an ordinary folder of transformers, in bfloat16, with training.json beside it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HELD_OUT = 0.15
VOCABULARY = 2048
LENGTH = 128
BATCH = 8
STEPS_A_MINUTE = 300
"""On two free cores."""
BALANCE = 0.001
"""Weight of the balancing loss of each layer. transformers' own is of all layers together, which
leaves experts of single layers unused."""
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 8e-3, 50, 0.1
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 128,
    "router_aux_loss_coef": 0.0,
    "initializer_range": 0.06,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 0,
}

DENSE = CONFIG.keys() - {
    *("num_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("moe_intermediate_size", "router_aux_loss_coef"),
}
"""Those keys that a model without experts has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="a model without experts")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(parts(arguments.texts)[0])
    learned, held_out = (sequences(tokenizer, part) for part in parts(arguments.texts))
    print(f"{learned.numel()} tokens to learn from, {held_out.numel()} held out", flush=True)
    steps = round(arguments.minutes * STEPS_A_MINUTE)
    model = train(learned, steps, arguments.seed, arguments.dense).bfloat16()
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    if arguments.dense:
        return
    measured = evaluate(model.float(), held_out)  # of the rounded weights
    (arguments.output / "training.json").write_text(json.dumps(measured | {"steps": steps}) + "\n")
    print(f"perplexity {measured['perplexity']}; share of tokens of each expert:")
    for row in measured["expert_shares"]:
        print(*(f"{share:.3f}" for share in sorted(row)))


def parts(folder: Path) -> tuple[list[str], list[str]]:
    """The text of every file to learn from, and the text held out."""
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise SystemExit(f"no .txt files in {folder}")
    cuts = [round(len(text) * (1 - HELD_OUT)) for text in texts]
    return [t[:cut] for t, cut in zip(texts, cuts)], [t[cut:] for t, cut in zip(texts, cuts)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sequences(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids [sequences, LENGTH] of all texts, each cut from its beginning."""
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return torch.cat([t[: len(t) // LENGTH * LENGTH].view(-1, LENGTH) for t in ids])


def train(learned: Tensor, steps: int, seed: int, dense: bool = False) -> Any:
    torch.manual_seed(seed)
    if dense:
        own = {key: value for key, value in CONFIG.items() if key in DENSE}
        config = Qwen3Config(**own, intermediate_size=384)
        model = Qwen3ForCausalLM(config)
    else:
        config = Qwen3MoeConfig(**CONFIG)
        model = Qwen3MoeForCausalLM(config)
        model.set_experts_implementation("grouped_mm")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - WARM_UP, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    order = torch.cat(
        [torch.randperm(len(learned)) for _ in range(steps * BATCH // len(learned) + 1)]
    )
    start = time.time()
    for step in range(steps):
        batch = learned[order[step * BATCH : (step + 1) * BATCH]]
        out = model(batch, labels=batch, **({} if dense else {"output_router_logits": True}))
        loss = out.loss + BALANCE * sum(
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            for logits in (() if dense else out.router_logits)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(
                f"step {step} of {steps}, loss {out.loss:.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
    return model


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, held_out: Tensor) -> dict:
    """Perplexity, and of each layer the share of tokens that each expert gets."""
    losses, counts = [], 0
    for batch in held_out.split(64):
        out = model(batch, labels=batch, output_router_logits=True)
        losses.append(out.loss.float() * len(batch))
        chosen = torch.stack(out.router_logits).topk(CONFIG["num_experts_per_tok"], dim=-1).indices
        counts = counts + torch.stack([c.flatten().bincount(minlength=16) for c in chosen])
    shares = (counts / held_out.numel()).tolist()
    perplexity = float((torch.stack(losses).sum() / len(held_out)).exp())
    rounded = [[round(share, 4) for share in row] for row in shares]
    return {"perplexity": round(perplexity, 3), "expert_shares": rounded}


if __name__ == "__main__":
    main()
