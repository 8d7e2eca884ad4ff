"""Measure what a retrofit costs before it is trained: parameters, memory, and the time of one pass."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from benchmarks.timing import ratio
from feedback_transformers import retrofit

from .pretrained import smollm2

AXES = ("depth", "time")
PROMPT, WRITTEN = 128, 32  # tokens


def costs(name: str, seed: int) -> dict[str, Any]:
    """Return what the axis `name` adds to the original's parameters and memory, as shares, and the times of one pass
    relative to the original's."""
    torch.set_num_threads(1)
    original, tokenizer = smollm2()
    ids = torch.randint(len(tokenizer), (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    before = psutil.Process().memory_info().rss
    model = retrofit(original, encoder_layers=10, decoder_layers=8, axis=name)
    memory = psutil.Process().memory_info().rss - before
    options = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}

    def read(reader: Any, **arguments: Any) -> Any:
        with torch.no_grad():
            return reader(ids, **arguments).logits

    def write(writer: Any, **arguments: Any) -> Any:
        return writer.generate(ids, attention_mask=torch.ones_like(ids), **options, **arguments)

    expected, text = read(original), write(original)
    reading, details = ratio(lambda: read(model, num_feedback_steps=1), lambda: read(original))
    writing, more = ratio(lambda: write(model, num_feedback_steps=1), lambda: write(original), rounds=5)
    return {
        "parameters": model.num_parameters() / original.num_parameters() - 1,
        "memory": memory / sum(parameter.nbytes for parameter in original.parameters()),
        "logits": {k: (read(model, num_feedback_steps=k) - expected).abs().max().item() for k in (1, 2, 4, 8)},
        "same text": {k: bool(torch.equal(write(model, num_feedback_steps=k), text)) for k in (1, 4)},
        "reading": 1 / reading,
        "writing": 1 / writing,
        "details": [details, more],
    }


def report(lines: dict[str, list[dict[str, Any]]]) -> None:
    print("| axis | parameters added | memory added | one pass, reading | writing | logits apart, 1 to 8 passes |")
    print("|---|---|---|---|---|---|")
    for name, runs in lines.items():
        for line in runs:
            apart = max(line["logits"].values())
            print(
                f"| {name} | {line['parameters']:.2%} | {line['memory']:.1%} | {line['reading']:.2f} of its time "
                f"| {line['writing']:.2f} | {apart:.1e} |"
            )


def checks(lines: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    runs = [line for axis in lines.values() for line in axis]
    if not runs:
        return {}
    return {
        "less than 3 % more parameters, less than 5 % more memory": all(
            line["parameters"] < 0.03 and line["memory"] < 0.05 for line in runs
        ),
        "logits within 1e-4 of the original's, and the same text": all(
            max(line["logits"].values()) <= 1e-4 and all(line["same text"].values()) for line in runs
        ),
        "one pass at most 5 % slower than the original": all(
            max(line["reading"], line["writing"]) <= 1.05 for line in runs
        ),
    }
