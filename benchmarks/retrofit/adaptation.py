"""Adapt a pretrained model to a text (SmolLM2 to Python's manual) and to a task (MiniLM to movie sentiment)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from feedback_transformers import data

from .pretrained import minilm_classifier, smollm2
from .reasoning import DRAWN, LENGTH, MODELS, modes, passes, perplexity, tokens
from .training import adapted, draws, train, trained_parameters

LAYERS = {"encoder_layers": 2, "decoder_layers": 1, "num_feedback_steps": 4}
CLASSIFIERS: dict[str, tuple[int, dict[str, Any] | None]] = {"plain": (16, None), "depth": (7, LAYERS)}
PROBE = 0.798  # of logistic regression on the frozen model's mean states


def domain(name: str, seed: int, seconds: float = 300.0) -> dict[str, Any]:
    """Return the perplexity of held-out pages of Python's manual and of Shakespeare, before and after training on the
    manual."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    original, tokenizer = smollm2()
    rank, feedback = MODELS[name]
    model = adapted(original, rank, feedback)
    steps, losses = train(model, pages(name, seed, tokenizer), partial(text_loss, model), seconds)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        after = {mode: texts(model, tokenizer, **passes(model, mode)) for mode in modes(name) if mode != "8"}
        with model.disable_adapter():
            before = texts(model, tokenizer) if name == "plain" else None
    return {
        "parameters": trained_parameters(model),
        "steps": steps,
        "loss": sum(losses[-20:]) / len(losses[-20:]),
        "before": before,
        "perplexity": after,
    }


def texts(model: Any, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> dict[str, float]:
    return {
        text: perplexity(model, tokens(text, "test", tokenizer), **arguments)
        for text in ("python-docs", "shakespeare")
    }


def pages(name: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    text = tokens("python-docs", "train", tokenizer, slice(None))
    for drawn in draws(seed):
        starts = [drawn.randrange(len(text) - LENGTH) for _ in range(4)]
        batch: dict[str, Any] = {"input_ids": torch.stack([text[start : start + LENGTH] for start in starts])}
        yield {**batch, "num_feedback_steps": drawn.randint(*DRAWN)} if name == "depth" else batch


def text_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def sentiment(name: str, seed: int, seconds: float = 120.0) -> dict[str, Any]:
    """Return the test accuracy of MiniLM with a classifier on its pooled first state, trained on all of train."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    original, tokenizer = minilm_classifier()
    rank, feedback = CLASSIFIERS[name]
    model = adapted(original, rank, feedback, task="SEQ_CLS")
    steps, losses = train(model, sentences(name, seed, tokenizer), lambda batch: model(**batch).loss, seconds)
    model.eval()
    return {
        "parameters": trained_parameters(model),
        "steps": steps,
        "loss": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy": {mode: accuracy(model, tokenizer, **passes(model, mode)) for mode in modes(name)},
    }


def sentences(name: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    split = data.load("movie-sentiment")["train"]
    texts, labels = list(split["text"]), torch.tensor(split["label"])
    for drawn in draws(seed):
        rows = [drawn.randrange(len(texts)) for _ in range(32)]
        batch = {**read(tokenizer, [texts[row] for row in rows]), "labels": labels[rows]}
        yield {**batch, "num_feedback_steps": drawn.randint(*DRAWN)} if name == "depth" else batch


def read(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> float:
    split, right = data.load("movie-sentiment")["test"], 0
    for start in range(0, len(split), 64):
        part = split[start : start + 64]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**read(tokenizer, part["text"]), **arguments).logits
        right += (logits.argmax(-1) == torch.tensor(part["label"])).sum().item()
    return right / len(split)


def report_domain(lines: dict[str, list[dict[str, Any]]]) -> None:
    print("| model | seed | trained parameters | steps trained | passes | python-docs | shakespeare |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in lines.items():
        for line in runs:
            if line["before"]:
                print("| original | | 0 | 0 | |", " | ".join(f"{value:.2f}" for value in line["before"].values()), "|")
            for mode, values in line["perplexity"].items():
                shown = " | ".join(f"{value:.2f}" for value in values.values())
                print(f"| {name} | {line['seed']} | {line['parameters']:,} | {line['steps']} | {mode} | {shown} |")


def report_sentiment(lines: dict[str, list[dict[str, Any]]]) -> None:
    print("| model | seed | trained parameters | steps trained | passes | test accuracy |\n|---|---|---|---|---|---|")
    print(f"| frozen, logistic regression | | | | | {PROBE:.3f} |")
    for name, runs in lines.items():
        for line in runs:
            for mode, value in line["accuracy"].items():
                print(f"| {name} | {line['seed']} | {line['parameters']:,} | {line['steps']} | {mode} | {value:.3f} |")
