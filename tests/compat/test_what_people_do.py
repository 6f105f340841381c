"""What people do with a loaded model, plain or with embedding and head quantized too.

Each use must give what the dense model with the same weights gives.

`USES` is the table: one function, one use. What transformers or torch cannot do with it has its
reason in `UPSTREAM`, and fails.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.support.fake_checkpoint import FORMATS, fake_checkpoint
from tests.support.params import each_with_one_of
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.errors import VqllmError
from vqllm.integrations.transformers import VqllmConfig
from vqllm.runtime import VQLinear

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[5, 77, 300, 41, 200, 8]])
SHORT = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}


@dataclass
class Case:
    """A quantized folder, the same weights in a dense folder, and models from them."""

    folder: Path
    dense_folder: Path
    scratch: Path
    is_small: bool

    def model(self, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return cls.from_pretrained(self.folder, **{"dtype": torch.float32, **options})

    def dense(self, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return cls.from_pretrained(self.dense_folder, **{"dtype": torch.float32, **options})

    def both(self, use: Callable[[Any], Any], **options: Any) -> None:
        """The same use of both models gives the same."""
        same(use(self.model(**options)), use(self.dense(**options)))


USES: dict[str, Callable[[Case], None]] = {}

UPSTREAM: dict[str, str] = {
    "load_for_question_answering": "Llama's class calls the model `transformer`, so that "
    "transformers finds nothing of a causal checkpoint, dense or not, and fills it all at random",
    "cast_to_half": "transformers refuses to cast quantized models: load them with dtype=",
    "trainer_without_adapters": "transformers' Trainer takes quantized models with adapters only",
    "jit_trace": "transformers' masks are made by functions that torch.jit.trace cannot follow",
}
"""Why a use is not possible: what transformers, torch or another library lacks."""


def use(function: Callable[[Case], None]) -> Callable[[Case], None]:
    USES[function.__name__] = function
    return function


def same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Integers are equal, and floats up to a part of the length of the vector that they make."""
    if isinstance(a, Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, size = (a.detach() - b.detach()).float().norm(), b.detach().float().norm()
        assert error <= tolerance * size if a.is_floating_point() else error == 0
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for own, other in zip(a, b, strict=True):
            same(own, other, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    else:
        assert a == b


def logits(model: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    return model(tokens, **options).logits.float()


# Loading


@use
def load_in_every_dtype(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, "auto", "bfloat16"):
        model = case.model(dtype=dtype)
        assert logits(model).isfinite().all()
        assert dtype in ("auto", "bfloat16") or model.dtype == dtype
    assert case.model(dtype="bfloat16").dtype == torch.bfloat16


@use
def load_with_torch_dtype(case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.folder, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


@use
def load_with_device_maps(case: Case) -> None:
    for device_map in ("cpu", "auto", {"": "cpu"}):
        case.both(logits, device_map=device_map)


@use
def load_with_low_cpu_mem_usage(case: Case) -> None:
    case.both(logits, low_cpu_mem_usage=True)


@use
def load_with_attention_of_each_kind(case: Case) -> None:
    for kind in ("eager", "sdpa"):
        case.both(logits, attn_implementation=kind)


@use
def load_with_loading_info(case: Case) -> None:
    _, info = case.model(output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@use
def load_with_a_config(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder)
    config.use_cache = False
    model = case.model(config=config)
    assert model.config.use_cache is False
    same(logits(model), logits(case.dense()))


@use
def load_fewer_layers(case: Case) -> None:
    case.both(logits, num_hidden_layers=1)


@use
def load_from_a_subfolder(case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        case.folder.parent, subfolder=case.folder.name, dtype=torch.float32
    )
    same(logits(model), logits(case.dense()))


@use
def load_with_use_safetensors(case: Case) -> None:
    case.both(logits, use_safetensors=True, local_files_only=True)


@use
def load_dequantized(case: Case) -> None:
    model = case.model(quantization_config=VqllmConfig(dequantize=True))
    assert not any(isinstance(module, VQLinear) for module in model.modules())
    same(logits(model), logits(case.dense()))


@use
def load_without_a_head(case: Case) -> None:
    outputs = [
        model(TOKENS).last_hidden_state for model in (case.model(AutoModel), case.dense(AutoModel))
    ]
    same(*outputs)


@use
def load_classifiers(case: Case) -> None:
    for cls in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        same(case.model(cls).base_model(TOKENS)[0], case.dense(cls).base_model(TOKENS)[0])
    model = case.model(AutoModelForSequenceClassification, num_labels=3, pad_token_id=2)
    assert model(TOKENS).logits.shape == (1, 3)


@use
def load_for_question_answering(case: Case) -> None:
    case.model(AutoModelForQuestionAnswering)


@use
def pipelines(case: Case) -> None:
    made = [
        pipeline("text-generation", model=str(folder), dtype=torch.float32)("The river", **SHORT)
        for folder in (case.folder, case.dense_folder)
    ]
    same(*made)
    features = [
        torch.tensor(pipeline("feature-extraction", model=str(f), dtype=torch.float32)("The river"))
        for f in (case.folder, case.dense_folder)
    ]
    same(*features)


@use
def config_tokenizer_and_generation_config(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder)
    assert config.quantization_config["quant_method"] == "vqllm"
    assert AutoTokenizer.from_pretrained(case.folder)("The river").input_ids
    GenerationConfig.from_pretrained(case.folder)


# Running


@use
def loss(case: Case) -> None:
    case.both(lambda m: m(TOKENS, labels=TOKENS).loss)


@use
def hidden_states(case: Case) -> None:
    case.both(lambda m: m(TOKENS, output_hidden_states=True).hidden_states)


@use
def attentions(case: Case) -> None:
    case.both(lambda m: m(TOKENS, output_attentions=True).attentions, attn_implementation="eager")


@use
def tuples_for_outputs(case: Case) -> None:
    case.both(lambda m: m(TOKENS, return_dict=False, use_cache=False)[0])


@use
def embeddings_as_inputs(case: Case) -> None:
    case.both(lambda m: m(inputs_embeds=m.get_input_embeddings()(TOKENS)).logits)


@use
def positions(case: Case) -> None:
    case.both(lambda m: logits(m, position_ids=torch.arange(3, 9)[None]))


@use
def padded_batches(case: Case) -> None:
    batch = torch.cat([TOKENS, torch.cat([torch.full((1, 2), 2), TOKENS[:, :4]], 1)])
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    case.both(lambda m: logits(m, batch, attention_mask=mask)[mask.bool()])


@use
def token_by_token_with_a_cache(case: Case) -> None:
    def steps(model: Any) -> Tensor:
        cache, found = None, []
        for i in range(TOKENS.shape[1]):
            out = model(TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        return torch.cat(found, 1)

    case.both(steps)
    model = case.model()
    same(steps(model), logits(model), 1e-4)


@use
def last_logits_only(case: Case) -> None:
    case.both(lambda m: m(TOKENS, logits_to_keep=1).logits)


@use
def without_gradients(case: Case) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            case.both(lambda m: logits(m).clone())


@use
def autocast(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        a, b = logits(case.model()), logits(case.dense())
    same(a, b, 0.05)


@use
def long_batches(case: Case) -> None:
    tokens = torch.randint(3, 384, (5, 60), generator=torch.Generator().manual_seed(0))
    case.both(lambda m: logits(m, tokens))


@use
def an_empty_batch(case: Case) -> None:
    case.both(lambda m: m.get_input_embeddings()(TOKENS[:, :0]))


@use
def to_the_same_dtype(case: Case) -> None:
    model = case.model()
    before = logits(model)
    same(logits(model.to(torch.float32)), before)


@use
def cast_to_half(case: Case) -> None:
    case.model().half()


@use
def move_to_the_same_device(case: Case) -> None:
    case.both(lambda m: logits(m.to("cpu").to(torch.device("cpu"))))


@use
def train_and_eval_modes(case: Case) -> None:
    case.both(lambda m: logits(m.train().eval()))


# Generating


@use
def greedy(case: Case) -> None:
    case.both(lambda m: m.generate(TOKENS, **SHORT))


@use
def sampled(case: Case) -> None:
    def sample(model: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(TOKENS, **{**SHORT, "do_sample": True, "top_k": 20, "top_p": 0.9})

    case.both(sample)


@use
def beams(case: Case) -> None:
    case.both(lambda m: m.generate(TOKENS, num_beams=3, num_return_sequences=2, **SHORT))


@use
def assisted(case: Case) -> None:
    model, dense = case.model(), case.dense()
    whole = dense.generate(TOKENS, **SHORT)
    same(model.generate(TOKENS, assistant_model=dense, **SHORT), whole)
    same(dense.generate(TOKENS, assistant_model=model, **SHORT), whole)


@use
def prompt_lookup(case: Case) -> None:
    tokens = torch.cat([TOKENS, TOKENS], 1)
    case.both(lambda m: m.generate(tokens, prompt_lookup_num_tokens=2, **SHORT))


@use
def caches_of_each_kind(case: Case) -> None:
    for kind in (
        "dynamic",
        "static",
        "offloaded_static" if torch.cuda.is_available() else "static",
    ):
        case.both(lambda m, kind=kind: m.generate(TOKENS, cache_implementation=kind, **SHORT))


@use
def without_a_cache(case: Case) -> None:
    case.both(lambda m: m.generate(TOKENS, use_cache=False, **SHORT))


@use
def left_padded_generation(case: Case) -> None:
    batch = torch.cat([TOKENS, torch.cat([torch.full((1, 2), 2), TOKENS[:, :4]], 1)])
    mask = (batch != 2).long()
    case.both(lambda m: m.generate(batch, attention_mask=mask, **SHORT))


@use
def streamed(case: Case) -> None:
    model, tokenizer = case.model(), AutoTokenizer.from_pretrained(case.folder)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=lambda: model.generate(TOKENS, streamer=streamer, **SHORT))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(case.dense().generate(TOKENS, **SHORT)[0])


@use
def scores_of_generated_tokens(case: Case) -> None:
    def scores(model: Any) -> Tensor:
        out = model.generate(TOKENS, output_scores=True, return_dict_in_generate=True, **SHORT)
        return model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)

    case.both(scores)


@use
def constraints_on_generation(case: Case) -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[77], [5]]}
    case.both(lambda m: m.generate(TOKENS, **options, **SHORT))
    case.both(lambda m: m.generate(TOKENS, stopping_criteria=[], min_new_tokens=4, **SHORT))


@use
def generation_from_embeddings(case: Case) -> None:
    case.both(lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(TOKENS), **SHORT))


@use
def generation_in_threads(case: Case) -> None:
    model, found = case.model(), []
    wanted = case.dense().generate(TOKENS, **SHORT)
    threads = [
        threading.Thread(target=lambda: found.append(model.generate(TOKENS, **SHORT)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(found, [wanted] * 3)


# Copying and saving


@use
def deepcopy(case: Case) -> None:
    case.both(lambda m: logits(copy.deepcopy(m)))


@use
def pickled(case: Case) -> None:
    case.both(lambda m: logits(pickle.loads(pickle.dumps(m))))


@use
def saved_by_torch(case: Case) -> None:
    def again(model: Any) -> Tensor:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return logits(torch.load(buffer, weights_only=False))

    case.both(again)


@use
def state_dict(case: Case) -> None:
    model, other = case.model(), case.model()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point() and parameter.dim() == 1:
                parameter.mul_(2)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    same(logits(other), logits(model))


@use
def dense_state_dict_is_refused(case: Case) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        case.model().load_state_dict(case.dense().state_dict())


@use
def save_and_load(case: Case) -> None:
    case.model().save_pretrained(case.scratch / "saved")
    again = AutoModelForCausalLM.from_pretrained(case.scratch / "saved", dtype=torch.float32)
    same(logits(again), logits(case.dense()))


@use
def save_in_small_shards(case: Case) -> None:
    case.model().save_pretrained(case.scratch / "shards", max_shard_size="20KB")
    assert len(list((case.scratch / "shards").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(case.scratch / "shards", dtype=torch.float32)
    same(logits(again), logits(case.dense()))


@use
def save_twice(case: Case) -> None:
    for name in ("one", "two"):
        case.model().save_pretrained(case.scratch / name)
    one, two = ((case.scratch / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@use
def save_dequantized(case: Case) -> None:
    model = case.model(quantization_config=VqllmConfig(dequantize=True))
    model.save_pretrained(case.scratch / "dense")
    again = AutoModelForCausalLM.from_pretrained(case.scratch / "dense", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    same(logits(again), logits(case.dense()))


# Looking at it


@use
def count_parameters(case: Case) -> None:
    model = case.model()
    assert model.num_parameters() > 0
    assert 0 < model.get_memory_footprint() < case.dense().get_memory_footprint() * 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) >= 0


@use
def print_it(case: Case) -> None:
    model = case.model()
    assert "VQLinear" in repr(model)
    assert repr(model.model.layers[0].mlp.up_proj.weight)


@use
def read_weights(case: Case) -> None:
    def read(model: Any) -> list[Any]:
        linear = model.model.layers[0].mlp.up_proj
        weight = linear.weight
        x = torch.ones(2, linear.in_features)
        return [
            tuple(weight.shape),
            weight.dtype,
            weight.device,
            weight.norm().item(),
            nn.functional.linear(x, weight),
            x @ weight.T,
            weight[3].clone(),
            (linear.in_features, linear.out_features),
        ]

    case.both(read)


@use
def read_the_head(case: Case) -> None:
    def fused_loss(model: Any) -> Tensor:
        states = model.model(TOKENS).last_hidden_state
        return nn.functional.cross_entropy(
            (states @ model.lm_head.weight.T).flatten(0, 1), TOKENS.flatten()
        )

    case.both(fused_loss)
    case.both(lambda m: m.get_output_embeddings().weight.sum(0))
    case.both(lambda m: m.get_input_embeddings().weight[7].clone())


@use
def hooks(case: Case) -> None:
    def watched(model: Any) -> list[Tensor]:
        found = []
        linear = model.model.layers[1].self_attn.q_proj
        handles = [
            linear.register_forward_hook(lambda m, args, out: found.append(out)),
            linear.register_forward_pre_hook(lambda m, args: found.append(args[0])),
            model.model.norm.register_forward_hook(lambda m, args, out: out * 1.5),
        ]
        found.append(logits(model))
        for handle in handles:
            handle.remove()
        return [*found, logits(model)]

    case.both(watched)


@use
def find_linears(case: Case) -> None:
    def names(model: Any) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    case.both(names)


@use
def apply_and_freeze(case: Case) -> None:
    model = case.model()
    model.apply(lambda module: None)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    same(logits(model), logits(case.dense()))


@use
def initialize_again(case: Case) -> None:
    model = case.model()
    model.tie_weights()
    same(logits(model), logits(case.dense()))


@use
def embeddings_by_their_methods(case: Case) -> None:
    model = case.model()
    model.set_input_embeddings(model.get_input_embeddings())
    model.set_output_embeddings(model.get_output_embeddings())
    same(logits(model), logits(case.dense()))


@use
def resize_embeddings(case: Case) -> None:
    def resized(model: Any) -> Tensor:
        model.resize_token_embeddings(400, mean_resizing=False)
        return logits(model)[..., :384]

    if case.is_small:
        with pytest.raises(VqllmError, match="vocabulary"):
            resized(case.model())
    else:
        case.both(resized)


@use
def attention_changed_afterwards(case: Case) -> None:
    def changed(model: Any) -> Tensor:
        model.set_attn_implementation("eager")
        return logits(model)

    case.both(changed)


# Gradients and training


@use
def gradients_of_inputs(case: Case) -> None:
    def gradient(model: Any) -> Tensor:
        states = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        model(inputs_embeds=states, labels=TOKENS).loss.backward()
        return states.grad

    case.both(gradient)


@use
def gradients_of_norms(case: Case) -> None:
    def gradient(model: Any) -> Tensor:
        norm = model.model.layers[0].input_layernorm.weight.requires_grad_()
        model(TOKENS, labels=TOKENS).loss.backward()
        return norm.grad

    case.both(gradient)


@use
def gradient_checkpointing(case: Case) -> None:
    def gradient(model: Any) -> Tensor:
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
        norm = model.model.layers[0].input_layernorm.weight.requires_grad_()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return norm.grad

    case.both(gradient)


@use
def clip_and_zero_gradients(case: Case) -> None:
    def norm(model: Any) -> Tensor:
        weight = model.model.norm.weight.requires_grad_()
        model(TOKENS, labels=TOKENS).loss.backward()
        found = nn.utils.clip_grad_norm_([weight], 1e-3)
        model.zero_grad()
        assert weight.grad is None
        return found

    case.both(norm)


@use
def train_a_classifier_head(case: Case) -> None:
    model = case.model(AutoModelForSequenceClassification, num_labels=2, pad_token_id=2)
    model.base_model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        out = model(TOKENS, labels=torch.tensor([1]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] / 2


@use
def lora_by_hand(case: Case) -> None:
    def wrapped(model: Any) -> Tensor:
        base = model.model.layers[0].self_attn.q_proj

        class Lora(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base = base
                where, dtype = base.weight.device, base.weight.dtype
                self.a = nn.Parameter(torch.randn(4, base.in_features, device=where, dtype=dtype))
                self.b = nn.Parameter(torch.zeros(base.out_features, 4, device=where, dtype=dtype))

            def forward(self, x: Tensor) -> Tensor:
                return self.base(x) + x @ self.a.T @ self.b.T

        model.model.layers[0].self_attn.q_proj = Lora()
        return logits(model)

    case.both(wrapped)


@use
def trainer_without_adapters(case: Case) -> None:
    def evaluated(model: Any) -> float:
        options = TrainingArguments(
            str(case.scratch / "runs"), report_to="none", use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 2
        return Trainer(model, options, eval_dataset=rows).evaluate()["eval_loss"]

    case.both(evaluated)


# Other tools


@use
def functional_call(case: Case) -> None:
    def called(model: Any) -> Tensor:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return torch.func.functional_call(model, state, (TOKENS,)).logits

    case.both(called)


@use
def data_parallel(case: Case) -> None:
    case.both(lambda m: nn.DataParallel(m)(TOKENS).logits)


@use
def exported(case: Case) -> None:
    class Plain(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens, use_cache=False).logits

    def program(model: Any) -> Tensor:
        return torch.export.export(Plain(model), (TOKENS,), strict=False).module()(TOKENS)

    case.both(program)


@use
def jit_trace(case: Case) -> None:
    model = case.model()

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    traced: Any = torch.jit.trace(forward, TOKENS)
    same(traced(TOKENS), logits(case.dense()))


@use
def offloaded_to_disk(case: Case) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = case.model(device_map=device_map, offload_folder=str(case.scratch / "offload"))
    same(logits(model), logits(case.dense()))


@use
def offloaded_by_accelerate(case: Case) -> None:
    from accelerate import cpu_offload

    case.both(lambda m: logits(cpu_offload(m, execution_device=torch.device("cpu"))))


@use
def shared_memory(case: Case) -> None:
    case.both(lambda m: logits(m.share_memory()))


@use
def averaged_weights(case: Case) -> None:
    case.both(lambda m: logits(torch.optim.swa_utils.AveragedModel(m).module))


@use
def writing_into_packed_weights_is_refused(case: Case) -> None:
    linear = case.model().model.layers[0].mlp.up_proj
    with pytest.raises(VqllmError), torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(VqllmError):
        linear.weight.data = torch.zeros(1)
    with pytest.raises(VqllmError):
        nn.init.zeros_(linear.weight)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    small = request.param == "small"
    outside = FORMATS["uniform"] if small else None
    fake = fake_checkpoint(root, "llama", outside=outside, tie_word_embeddings=small)
    dequantize_checkpoint(fake.folder, root / "dense", dtype="float32")
    return fake.folder, root / "dense", small


@pytest.mark.parametrize(
    ("name", "made"), each_with_one_of(USES, ["plain", "small"]), indirect=["made"]
)
def test_use(name: str, made: Any, tmp_path: Path) -> None:
    folder, dense, small = made
    if name in UPSTREAM:
        with pytest.raises(Exception):  # noqa: B017, PT011
            USES[name](Case(folder, dense, tmp_path, small))
        return
    USES[name](Case(folder, dense, tmp_path, small))


def test_the_table_is_long() -> None:
    assert len(USES) >= 60
    assert UPSTREAM.keys() <= USES.keys()
