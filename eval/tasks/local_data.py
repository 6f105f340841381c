"""The documents of the `vqllm_*` tasks, from files in a folder on this machine.

The folder is the argument `data` (`vqllm eval --data`) or else the environment variable
VQLLM_DATA; its layout is in eval/README.md.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks.wikitext.preprocess_wikitext import (
    process_results as wikitext_results,
)
from lm_eval.tasks.wikitext.preprocess_wikitext import (
    wikitext_detokenizer,
)

__all__ = ["rows", "wikitext", "wikitext_detokenizer", "wikitext_results"]

ARTICLE_TITLE = re.compile(r" = (?!= ).*(?<! =) = \n")


def rows(file: str, data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The JSON object of each line of `file`."""
    lines = _find(file, data).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines if line])}


def wikitext(file: str, data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The articles of the raw WikiText split: one document from each title to the next.

    62 documents, as in EleutherAI/wikitext_document_level; two of them begin at lines that only
    look like a title, and stay so that results can be compared.
    """
    articles: list[list[str]] = [[]]
    with _find(file, data).open(encoding="utf-8", newline="") as lines:
        for line in lines:
            if ARTICLE_TITLE.fullmatch(line) and any(seen.strip() for seen in articles[-1]):
                articles.append([])
            articles[-1].append(line)
    pages = ["".join(article) for article in articles]
    return {"test": datasets.Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def _find(file: str, data: str | None) -> Path:
    folder = data or os.environ.get("VQLLM_DATA")
    if not folder:
        raise FileNotFoundError(
            f"this task reads {file} from a local folder: name it with --data FOLDER or the "
            "environment variable VQLLM_DATA."
        )
    path = Path(folder).expanduser() / file
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: the task data folder must hold {file} (see eval/README.md)."
        )
    return path
