"""lm-eval tasks on a model that is already loaded, packed or not."""

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqllm.core.protocols import JSON
from vqllm.core.resources import tasks_dir
from vqllm.errors import EvaluationError

OWN_PREFIX = "vqllm_"
BATCH_SIZE = 8
# lm-eval's default is the longest that the model takes, whose logits at 8192 tokens are 13 GB.
MAX_LENGTH = 2048
# Draws of the standard errors that have no formula; lm-eval takes 100000, which is minutes.
BOOTSTRAP_DRAWS = 100


def own_tasks() -> list[str]:
    """The names of the tasks that come with this package and read local files."""
    return sorted(path.stem for path in tasks_dir().glob(f"{OWN_PREFIX}*.yaml"))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int = MAX_LENGTH,
    manager: Any = None,
) -> dict[str, JSON]:
    """Run tasks in this process.

    Args:
        model: a loaded transformers model.
        tasks: names of lm-eval tasks or groups, or of our own (`own_tasks`).
        data: folder of the files of our own tasks; None takes `$VQLLM_DATA`.
        limit: use the first documents of each task only.
        batch_size: requests at once; whole-document tasks go one at a time.
        max_length: longer requests lose their beginning.
        manager: the result of `task_manager` for the same tasks; None makes it.

    Returns:
        For each task (and each part of a group): its metrics by name, `NAME_stderr` where there is
        a standard error, and `num_documents`.

    Raises:
        EvaluationError: lm-eval is not installed, an unknown task, or data that cannot be found.
    """
    # Tasks are checked before the model is wrapped. An OSError below is about their data.
    manager = manager or task_manager(tasks, data=data, limit=limit)
    try:
        results = _module("lm_eval").simple_evaluate(
            model=_language_model(model, tokenizer, batch_size, max_length),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
        )
    except OSError as error:
        raise EvaluationError(
            f"the data of {', '.join(tasks)} cannot be read: {error} lm-eval's own tasks fetch "
            f"theirs from the hub; {', '.join(own_tasks())} read local files."
        ) from error
    return {
        name: _plain(metrics, results["n-samples"].get(name))
        for name, metrics in results["results"].items()
    }


def _module(name: str) -> Any:
    """A module of lm-eval: the extra need not be installed, and its types are not relied on."""
    return importlib.import_module(name)


def task_manager(
    tasks: Sequence[str], *, data: str | Path | None = None, limit: int | None = None
) -> Any:
    """lm-eval's index of these tasks; finds mistakes in their names before a model is loaded.

    Arguments and errors as `run_tasks`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed: pip install 'vqllm[eval]'")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit {limit} leaves no document; it must be 1 or more")
    own = own_tasks()
    # Finding lm-eval's own 14683 names takes 6 s, so it waits until one of them is asked for. None
    # begins like ours.
    others = [task for task in tasks if not task.startswith(OWN_PREFIX)]
    manager = _module("lm_eval.tasks").TaskManager(
        include_path=str(tasks_dir()),
        include_defaults=bool(others),
        metadata={} if data is None else {"data": str(data)},
    )
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, sorted(known), n=5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise EvaluationError(
                f"unknown task {task!r}.{hint} Tasks with local data: {', '.join(own)}; all others "
                "are listed by `lm-eval ls tasks`."
            )
    return manager


def _language_model(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    base: Any = _module("lm_eval.models.huggingface").HFLM

    class LanguageModel(base):
        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            # Every window has full length: 8 of them with a vocabulary of 128 k are 8 GB of logits.
            self.batch_size_per_gpu = 1
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.batch_size_per_gpu = batch_size

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
    return LanguageModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=min(max_length, longest),
    )


def _plain(metrics: dict[str, Any], num_documents: dict[str, int] | None) -> JSON:
    """lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; numbers only."""
    values: JSON = {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float)
    }
    if num_documents is not None:
        values["num_documents"] = num_documents["effective"]
    return values
