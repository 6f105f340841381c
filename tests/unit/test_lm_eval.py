"""Our lm-eval tasks on a tiny model and a few documents, against numbers computed by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.params import slow
from tests.support.tiny import tiny_model, tiny_tokenizer
from vqllm import api
from vqllm.errors import EvaluationError
from vqllm.integrations import lm_eval

TOKENIZER = tiny_tokenizer()
PIQA = [
    {"goal": f"mix {i} jars", "sol1": f"read the text {i}", "sol2": "walk over", "label": i % 2}
    for i in range(6)
]
ARC = [
    {
        "question": f"which of {i} words?",
        "choices": {"text": ["the fox", "ice", "a mill at night"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(5)
]
LAMBADA = [
    {"context": f"the {word} jumps over the", "continuation": "dog"} for word in ("a", "fox")
]
ARTICLES = (
    " = The mill = \n\n The river froze .\n = = Ice = = \n it is wrong \n = Ink = \n\n Two jars .\n"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (
        ("piqa/piqa_validation.jsonl", PIQA),
        ("arc/arc_easy_validation.jsonl", ARC),
        ("lambada/lambada_openai_test.jsonl", LAMBADA),
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext-2-raw").mkdir()
    (folder / "wikitext-2-raw" / "wiki.test.raw").write_text(ARTICLES)
    return folder


def log_likelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Sum of the log-probabilities of the continuation, and whether each is the greatest."""
    context_ids = TOKENIZER(context).input_ids
    all_ids = TOKENIZER(context + continuation).input_ids
    with torch.inference_mode():
        log_p = torch.log_softmax(model(torch.tensor([all_ids])).logits[0, :-1], -1)
    begin = len(context_ids)
    positions = range(begin - 1, len(all_ids) - 1)
    total = sum(log_p[t, all_ids[t + 1]].item() for t in positions)
    return total, all(int(log_p[t].argmax()) == all_ids[t + 1] for t in positions)


def accuracy(model: Any, items: list[tuple[str, list[str], int]]) -> tuple[float, float]:
    """acc and acc_norm: the most likely choice, as a whole and per character."""
    hits = norm_hits = 0
    for context, choices, gold in items:
        scores = [log_likelihood(model, context, f" {choice}")[0] for choice in choices]
        hits += max(range(len(choices)), key=lambda i: scores[i]) == gold
        norm_hits += max(range(len(choices)), key=lambda i: scores[i] / len(choices[i])) == gold
    return hits / len(items), norm_hits / len(items)


def test_multiple_choice(model: Any, data: Path) -> None:
    results = lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa", "vqllm_arc_easy"], data=data)
    piqa = [(f"Question: {p['goal']}\nAnswer:", [p["sol1"], p["sol2"]], p["label"]) for p in PIQA]
    arc = [
        (f"Question: {a['question']}\nAnswer:", a["choices"]["text"], "ABC".index(a["answerKey"]))
        for a in ARC
    ]
    for name, items in (("vqllm_piqa", piqa), ("vqllm_arc_easy", arc)):
        found = results[name]
        assert (found["acc"], found["acc_norm"]) == pytest.approx(accuracy(model, items)), name
        p, n = found["acc"], len(items)
        assert found["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert found["num_documents"] == n
    assert json.loads(json.dumps(results)) == results


def test_lambada(model: Any, data: Path) -> None:
    found = lm_eval.run_tasks(model, TOKENIZER, ["vqllm_lambada"], data=data)["vqllm_lambada"]
    scores = [log_likelihood(model, row["context"], " dog") for row in LAMBADA]
    mean = sum(score for score, _ in scores) / len(scores)
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["acc"] == sum(greedy for _, greedy in scores) / len(scores)


def test_wikitext(model: Any, data: Path) -> None:
    """Two articles (a section's title begins none); words are counted before detokenizing."""
    found = lm_eval.run_tasks(model, TOKENIZER, ["vqllm_wikitext"], data=data)["vqllm_wikitext"]
    assert found["num_documents"] == 2
    begin = ARTICLES.index(" = Ink")
    pages = [ARTICLES[:begin], ARTICLES[begin:]]
    detokenized = [
        " = The mill =\n\nThe river froze .\n== Ice ==\nit is wrong\n",
        " = Ink =\n\nTwo jars .\n",
    ]
    total = sum(whole_log_likelihood(model, text) for text in detokenized)
    num_words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)
    bits = -total / math.log(2) / len(ARTICLES.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(2**bits, rel=1e-4)


def whole_log_likelihood(model: Any, text: str) -> float:
    ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER(text).input_ids]])
    with torch.inference_mode():
        log_p = torch.log_softmax(model(ids).logits[0, :-1], -1)
    return log_p.gather(-1, ids[0, 1:, None]).sum().item()


def test_limit_and_environment(model: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQLLM_DATA", str(data))
    found = lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa"], limit=3)["vqllm_piqa"]
    assert found["num_documents"] == 3
    with pytest.raises(EvaluationError, match="limit 0"):
        lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa"], limit=0)


def test_our_tasks_are_listed() -> None:
    expected = ["vqllm_arc_easy", "vqllm_lambada", "vqllm_piqa", "vqllm_wikitext"]
    assert lm_eval.own_tasks() == expected


@pytest.mark.parametrize(("wrong", "right"), [("vqllm_piqua", "vqllm_piqa"), slow("piqaa", "piqa")])
def test_an_unknown_task_gets_near_names(model: Any, wrong: str, right: str) -> None:
    with pytest.raises(EvaluationError, match=rf"'{wrong}'.*Did you mean {right}"):
        lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa", wrong])


def test_mistakes_are_found_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_to_run", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(EvaluationError, match="unknown task 'vqllm_piqua'"):
        api.evaluate("model", tasks=["vqllm_piqua"])
    with pytest.raises(EvaluationError, match="limit 0"):
        api.evaluate("model", tasks=["vqllm_piqa"], limit=0)
    with pytest.raises(EvaluationError, match="0 windows"):
        api.evaluate("model", text="text.txt", num_windows=0)


def test_missing_data_says_where_it_is_looked_for(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VQLLM_DATA", raising=False)
    with pytest.raises(EvaluationError, match="VQLLM_DATA"):
        lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa"])
    with pytest.raises(EvaluationError, match=r"piqa/piqa_validation\.jsonl"):
        lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa"], data=tmp_path)


def test_missing_lm_eval_names_the_extra(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'vqllm\[eval\]'"):
        lm_eval.run_tasks(model, TOKENIZER, ["vqllm_piqa"])
