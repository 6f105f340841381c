"""Exported GGUF files in stock llama.cpp, against transformers with the decoded weights.

`VQLLM_LLAMA_CPP` names the folder of llama-perplexity, `VQLLM_CONVERTER` llama.cpp's
convert_hf_to_gguf.py; its packages sentencepiece and protobuf have to be importable. The converter
tells byte-level tokenizers by a hash, which only those of released models have; here it is told.
"""

import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tests.support.tiny import TEXT, tiny_model
from vqllm import api
from vqllm.models.load import load

pytestmark = pytest.mark.slow

CONTEXT, WINDOWS = 128, 3
SPLIT = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},  # llama.cpp takes it for granted
}
STACKED = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


@pytest.fixture(scope="module")
def program() -> Path:
    folder = os.environ.get("VQLLM_LLAMA_CPP")
    if not folder or not os.environ.get("VQLLM_CONVERTER"):
        pytest.skip("VQLLM_LLAMA_CPP and VQLLM_CONVERTER do not name llama.cpp and its converter")
    pytest.importorskip("sentencepiece")
    return Path(folder) / "llama-perplexity"


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    file = tmp_path / "convert_hf_to_gguf.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {os.path.dirname(os.environ['VQLLM_CONVERTER'])!r})\n"
        f"sys.path.remove({str(tmp_path)!r})\n"
        "import conversion.base\n"
        "conversion.base.TextModel.get_vocab_base_pre = lambda *given: 'qwen2'\n"
        "import convert_hf_to_gguf\nconvert_hf_to_gguf.main()\n"
    )
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng, words, lines = random.Random(0), TEXT.split(), []
    for i in range(600):
        rng.shuffle(words)
        lines.append(f"{i}. " + " ".join(words[: rng.randint(5, 30)]))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path / "text.txt"


def save_byte_level(folder: Path, text: Path) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=478, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.read_text().split("\n"), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return {"pad_token_id": 478, "eos_token_id": 479, "bos_token_id": None}


def save_sentencepiece(folder: Path, text: Path, gemma: bool) -> dict[str, Any]:
    import sentencepiece  # pyright: ignore[reportMissingImports]

    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    if not gemma:
        ids, names = {"pad_id": -1, "eos_id": 2, "bos_id": 1, "unk_id": 0}, {}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **ids,
        **names,
    )
    kind = transformers.GemmaTokenizer if gemma else transformers.LlamaTokenizer
    kind.from_pretrained(folder).save_pretrained(folder)
    pad = ids["pad_id"] if gemma else None
    return {"pad_token_id": pad, "eos_token_id": ids["eos_id"], "bos_token_id": ids["bos_id"]}


def log_probabilities(program: Path, file: Path, text: Path) -> tuple[Tensor, Tensor]:
    """The tokens [W, L], and llama.cpp's log probabilities behind those of each window's second
    half [W, L/2 - 1, V], which it stores in 16 bits."""
    base = file.with_suffix(".base")
    options = ["-c", CONTEXT, "-b", CONTEXT, "--chunks", WINDOWS, "-t", 1, "--no-repack"]
    command = [program, "-m", file, "-f", text, *options, "--kl-divergence-base", base]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    data = base.read_bytes()
    assert data[:8] == b"_logits_"
    length, num_tokens, windows = struct.unpack("<3i", data[8:20])
    tokens_WL = np.frombuffer(data, np.int32, windows * length, 20).reshape(windows, length)
    rows, cols = length - 1 - length // 2, 2 * ((num_tokens + 1) // 2) + 4
    stored = np.frombuffer(data, np.uint16, windows * rows * cols, 20 + tokens_WL.nbytes)
    stored = stored.reshape(windows, rows, cols)
    scale_least = np.ascontiguousarray(stored[..., :4]).view(np.float32)
    values = scale_least[..., :1] * stored[..., 4 : 4 + num_tokens] + scale_least[..., 1:]
    return torch.from_numpy(tokens_WL.copy()).long(), torch.from_numpy(values)


def with_weights_of(model: Any, file: Path, llama_order: bool) -> Any:
    """The model with the linears, experts and embedding of a file."""
    reader: Any = gguf.GGUFReader(file)
    tensors = {own.name: own for own in reader.tensors}

    def decoded(name: str) -> Tensor:
        own = tensors[f"{name}.weight"]
        return torch.from_numpy(np.array(gguf.dequantize(own.data, own.tensor_type)))

    for i, layer in enumerate(model.model.layers):
        for ours, theirs in LINEARS.items():
            if f"blk.{i}.{theirs}.weight" not in tensors:
                continue
            W_RC = decoded(f"blk.{i}.{theirs}")
            if llama_order and theirs in ("attn_q", "attn_k"):
                W_RC = W_RC.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
            layer.get_submodule(ours).weight.data = W_RC
        for ours, theirs in STACKED.items() if hasattr(layer.mlp, "experts") else ():
            parts = [decoded(f"blk.{i}.{name}") for name in theirs]
            layer.mlp.experts.get_parameter(ours).data = torch.cat(parts, 1)
    E_VC = decoded("token_embd")
    model.get_input_embeddings().weight.data[: len(E_VC)] = E_VC
    if "output.weight" in tensors:
        model.lm_head.weight.data = decoded("output")
    else:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def divergence(p: Tensor, q: Tensor) -> float:
    """Median over tokens: a router that decides otherwise changes all of a token's predictions."""
    return float((p.exp() * (p - q)).sum(-1).median())


@pytest.mark.parametrize("arch", FAMILIES)
def test_llama_cpp_predicts_what_the_decoded_model_does(
    arch: str, program: Path, converter: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if arch.startswith("qwen"):
        ids = save_byte_level(folder, text)
    else:
        ids = save_sentencepiece(folder, text, arch.startswith("gemma"))
    sizes = {"vocab_size": 480, "intermediate_size": 256, "max_position_embeddings": 512}
    sizes |= ids | FAMILIES[arch]
    tiny_model(arch, dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    dense, _ = load(folder, dtype=torch.float32)

    def predicted(model: Any, tokens_WL: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model.eval()(tokens_WL).logits[:, CONTEXT // 2 : -1]
        return logits.log_softmax(-1)

    for wanted in ("Q8_0", "Q4_0"):
        output = tmp_path / f"{wanted}.gguf"
        options = {"type": wanted, "calibration": text, "sequences": 16, "converter": converter}
        api.export_gguf(folder, output, **options)
        tokens_WL, theirs = log_probabilities(program, output, text)
        if ids["bos_token_id"] is not None:  # llama-perplexity begins each window with it
            tokens_WL[:, 0] = ids["bos_token_id"]
        reference = predicted(dense, tokens_WL)
        model, _ = load(folder, dtype=torch.float32)
        ours = predicted(with_weights_of(model, output, arch in ("llama", "mixtral")), tokens_WL)
        # llama.cpp rounds activations to 8 bits.
        assert divergence(ours, theirs) < 3e-4
        lost = divergence(reference, ours)
        assert lost < 3e-4 if wanted == "Q8_0" else 5e-4 < lost < 0.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    first = 0 if ids["bos_token_id"] is None else 1
    assert tokens_WL[0, first:].tolist() == encoded[: CONTEXT - first]
