"""A process with a model in vLLM, which does what is asked of it line by line.

It runs in the environment that `vllm_check.py` makes. A line is a JSON object, an answer too:

    {"open": DIR, "options": {...}}        a model, in place of the one before it, or why not
    {"logits": FILE}                       logits of the prompt of `TOKENS`, saved
    {"batch": B, "prompt": P, "new": N}    seconds for B prompts of P tokens and N new ones each
"""

import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Bound threads leave the machine's other work one core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
TOKENS = [(7 * i * i + 3 * i + 5) % 380 for i in range(96)]
"""All of them are in the smallest vocabulary that is tested."""


def resident_mb() -> int:
    """Memory of this process and of those that it started."""
    own = os.getpid()
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if own in (int(folder.name), parent):
                status = (folder / "status").read_text()
                total += int(status.partition("VmRSS:")[2].split()[0])
        except (OSError, IndexError, ValueError):
            continue  # it has ended
    return total // 1024


def save_logits(llm: Any, file: str) -> int:
    """Logits of all positions of the prompt, float32 [positions, vocabulary]. The last come from a
    second call, for which the cache of prefixes has what is before, where it is on.

    Returns how many tokens it had.
    """
    import torch
    from vllm import SamplingParams

    prompt = [{"prompt_token_ids": TOKENS}]
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    [answer] = llm.generate(prompt, wanted, use_tqdm=False)
    rows = answer.prompt_logprobs[1:]
    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    [again] = llm.generate(prompt, wanted, use_tqdm=False)
    rows.append(again.outputs[0].logprobs[0])
    logits = torch.empty(len(rows), len(rows[0]))
    for i, row in enumerate(rows):
        for token, own in row.items():
            logits[i, token] = own.logprob
    torch.save(logits, file)
    return again.num_cached_tokens


def seconds(llm: Any, batch: int, prompt: int, new: int) -> float:
    """Of one call. Prompts differ, so that no cache of prefixes serves them."""
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    prompts = [
        {"prompt_token_ids": [random.randrange(3, 380) for _ in range(prompt)]}
        for _ in range(batch)
    ]
    start = time.perf_counter()
    llm.generate(prompts, wanted, use_tqdm=False)
    return time.perf_counter() - start


def opened(model: str, options: dict[str, Any]) -> Any:
    """A model in vLLM."""
    from vllm import LLM

    defaults = {"max_num_seqs": 8, "max_model_len": 1024, "seed": 0, "enforce_eager": True}
    logits = {"max_logprobs": -1, "logprobs_mode": "raw_logits"}
    return LLM(model=model, **logits, **{**defaults, **options})


def close() -> None:
    """Make room for another model."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def main() -> None:
    os.environ.update(SETTINGS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    llm = None

    def say(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    for line in sys.stdin:
        asked = json.loads(line)
        if "open" in asked:
            if llm is not None:
                del llm
                close()
            llm, start = None, time.perf_counter()
            try:
                llm = opened(asked["open"], asked["options"])
            except Exception as error:  # it is what refusals are checked for
                close()
                traceback.print_exc()
                say(refused=f"{type(error).__name__}: {error}")
                continue
            say(start_s=round(time.perf_counter() - start, 1), resident_mb=resident_mb())
        elif "logits" in asked:
            say(cached=save_logits(llm, asked["logits"]))
        else:
            say(seconds=seconds(llm, asked["batch"], asked["prompt"], asked["new"]))


if __name__ == "__main__":
    main()
