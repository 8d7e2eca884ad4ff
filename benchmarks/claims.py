"""Test the claims that are usually made for feedback networks, smaller, cheaper and more robust, against controls.

    python -m benchmarks.claims               # every missing run, then the tables and the plot
    python -m benchmarks.claims --report

- Language: the loss on characters of Shakespeare at four widths. A feedback model is compared with a feed-forward
  control that has the same parameters and reads the same sequences, and with the same control on so many more
  sequences that both compute equally much.
- Noise: the accuracy of the same models on held-out characters, where a growing share is replaced by random ones.
- Learning curve: the accuracy of feedback and control on film reviews, with 100 to 8,000 training examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import BatchEncoding, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from benchmarks.small_beats_large import FEEDBACK, SAMPLED
from benchmarks.timing import append
from benchmarks.training import build, evaluate, held_out, train
from feedback_transformers import FeedbackConfig, FeedbackForSequenceClassification, data

RESULTS = Path(__file__).parent / "results" / "claims.jsonl"
LENGTH, STEPS = 128, 1000
WIDTHS = (32, 64, 96, 128)
PASSES = (SAMPLED[0] + SAMPLED[1]) // 2
NOISE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
EXAMPLES = (100, 300, 1000, 3000, 8000)
STEPS_OF_A_CURVE = 200  # the fewest; or three rounds of the examples, 32 in a step
CLASSIFIER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_encoder_layers": 1,
    "num_feedback_layers": 1,
    "num_decoder_layers": 0,
    "feedback_axis": "depth",
    "num_feedback_steps": 3,
    "supervision": "all",
    "is_causal": False,
    "dropout": 0.1,
}


def layer_calls(passes: int, layers: dict[str, Any] = FEEDBACK) -> int:
    """Count the layer calls of one training step.

    A backward costs two forwards, and reaches the last `gradient_steps` passes.
    """
    encoder, cell = layers["num_encoder_layers"], layers["num_feedback_layers"]
    with_gradient = min(passes, layers["gradient_steps"])
    return encoder + passes * cell + 2 * (encoder + with_gradient * cell)


EQUAL_COMPUTE = layer_calls(PASSES) / layer_calls(1)


@torch.no_grad()
def noisy_accuracy(model: nn.Module, rows: Tensor, share: float, **arguments: Any) -> float:
    """Return the share of right next characters of rows [N, T + 1], where a share of those read are random."""
    generator = torch.Generator().manual_seed(0)
    read, right = rows[:, :-1], 0
    vocab_size = model.get_input_embeddings().weight.shape[0]
    replaced = torch.rand(read.shape, generator=generator) < share
    read = torch.where(replaced, torch.randint(vocab_size, read.shape, generator=generator), read)
    for part, answers in zip(read.split(16), rows[:, 1:].split(16), strict=True):
        right += (model(part, use_cache=False, **arguments).logits.argmax(-1) == answers).sum().item()
    return right / read.numel()


def language(name: str, width: int, seed: int) -> dict[str, Any]:
    fields = {"hidden_size": width, "intermediate_size": 8 * width // 3 // 4 * 4, "max_position_embeddings": LENGTH}
    model = build(seed, **FEEDBACK, **fields, feedback_signal="state" if name == "feedback" else "none")
    steps = round(STEPS * EQUAL_COMPUTE) if name == "equal compute" else STEPS
    train(model, steps, LENGTH, sampled=SAMPLED if name == "feedback" else None, seed=seed)
    arguments = {"num_feedback_steps": PASSES} if name == "feedback" else {}
    rows = held_out(LENGTH, 512)
    return {
        "parameters": model.num_parameters(),
        "loss": evaluate(model, rows, **arguments)[0],
        "accuracy by noise": [noisy_accuracy(model, rows, share, **arguments) for share in NOISE],
    }


@cache
def sentiment() -> tuple[PreTrainedTokenizerBase, dict[str, BatchEncoding], dict[str, Tensor]]:
    splits = data.load("movie-sentiment")
    tokenizer = data.subwords(splits["train"]["text"], 4096)
    texts = {name: tokenizer(list(part["text"]), truncation=True, max_length=128) for name, part in splits.items()}
    return tokenizer, texts, {name: torch.tensor(part["label"]) for name, part in splits.items()}


def sentences(split: str, rows: Tensor) -> dict[str, Tensor]:
    tokenizer, texts, labels = sentiment()
    padded = tokenizer.pad({"input_ids": [texts[split]["input_ids"][i] for i in rows.tolist()]}, return_tensors="pt")
    return {**padded, "labels": labels[split][rows]}


@torch.no_grad()
def accuracy(model: nn.Module, split: str) -> float:
    model.eval()
    labels = sentiment()[2][split]
    right = 0
    for rows in torch.arange(len(labels)).split(64):
        batch = sentences(split, rows)
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(labels)


def classification(name: str, examples: int, seed: int) -> dict[str, Any]:
    """Train a classifier and return its test accuracy at the best of ten looks at the validation split."""
    torch.manual_seed(seed)
    tokenizer = sentiment()[0]
    config = FeedbackConfig(
        **CLASSIFIER,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        feedback_signal="state" if name == "feedback" else "none",
    )
    model = FeedbackForSequenceClassification(config)
    chosen = torch.randperm(len(sentiment()[2]["train"]), generator=torch.Generator().manual_seed(seed))[:examples]
    steps = max(STEPS_OF_A_CURVE, 3 * examples // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    best, test = 0.0, 0.0
    for step in trange(1, steps + 1, desc=f"{name}, {examples} examples, seed {seed}", mininterval=10):
        model.train()
        model(**sentences("train", chosen[torch.randint(examples, (32,))])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0 and (validation := accuracy(model, "validation")) > best:
            best, test = validation, accuracy(model, "test")
    return {"parameters": model.num_parameters(), "validation accuracy": best, "test accuracy": test}


RUNS = {
    **{("language", name, width): language for width in WIDTHS for name in ("feedback", "control", "equal compute")},
    **{("classification", name, size): classification for size in EXAMPLES for name in ("feedback", "control")},
}


def finished() -> dict[tuple[str, str, int], dict[int, dict[str, Any]]]:
    """Return the recorded line of every seed, by claim, model, and width or number of examples."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    runs: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in map(json.loads, lines):
        runs[line["claim"], line["model"], line["size"]][line["seed"]] = line
    return runs


def report() -> bool:
    """Print the tables: the mean over the seeds, and how many there are. No figure has a target."""
    runs = finished()

    def mean(key: tuple[str, str, int], figure: str) -> str:
        lines = runs.get(key, {}).values()
        return f"{statistics.mean(line[figure] for line in lines):.4f} ({len(lines)})" if lines else ""

    names = ("feedback", "control", "equal compute")
    print(f"Loss, nats (seeds); equal compute: the control on {EQUAL_COMPUTE:.2f} times the sequences\n")
    print("| parameters |", " | ".join(names), "|\n|---|---|---|---|")
    for width in WIDTHS:
        lines = list(runs.get(("language", "feedback", width), {}).values())
        parameters = f"{lines[0]['parameters']:,}" if lines else ""
        print("|", parameters, "|", " | ".join(mean(("language", name, width), "loss") for name in names), "|")
    print(f"\nAccuracy by share of random characters, width {WIDTHS[-1]}\n")
    print("| noise |", " | ".join(names), "|\n|---|---|---|---|")
    for i, share in enumerate(NOISE):
        shown = []
        for name in names:
            lines = list(runs.get(("language", name, WIDTHS[-1]), {}).values())
            accuracies = [line["accuracy by noise"][i] for line in lines]
            shown.append(f"{statistics.mean(accuracies):.4f} ({len(lines)})" if lines else "")
        print(f"| {share:.0%} |", " | ".join(shown), "|")
    print("\nTest accuracy by number of examples (seeds)\n")
    print("| examples | feedback | control |\n|---|---|---|")
    for size in EXAMPLES:
        shown = [mean(("classification", name, size), "test accuracy") for name in ("feedback", "control")]
        print(f"| {size:,} |", " | ".join(shown), "|")
    plot(runs)
    return all(key in runs for key in RUNS)


def plot(runs: dict[tuple[str, str, int], dict[int, dict[str, Any]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    language, noise, curve = figure.subplots(1, 3)
    for name, color in (("feedback", "C0"), ("control", "C1"), ("equal compute", "C2")):
        for seed in range(3):
            widths = [lines[seed] for width in WIDTHS if seed in (lines := runs.get(("language", name, width), {}))]
            label = name if seed == 0 else None
            if widths:
                points = [[line["parameters"] for line in widths], [line["loss"] for line in widths]]
                language.plot(*points, color=color, marker="o", label=label)
                noise.plot(NOISE, widths[-1]["accuracy by noise"], color=color, marker="o", label=label)
            sizes = [size for size in EXAMPLES if seed in runs.get(("classification", name, size), {})]
            accuracies = [runs["classification", name, size][seed]["test accuracy"] for size in sizes]
            if sizes:
                curve.plot(sizes, accuracies, color=color, marker="o", label=label)
    language.set(xlabel="parameters", ylabel="validation loss, nats", xscale="log", title="Smaller, cheaper?")
    noise.set(xlabel="share of random characters", ylabel="accuracy", title="More robust?")
    curve.set(xlabel="examples", ylabel="test accuracy", xscale="log", title="From fewer examples?")
    for axes in (language, noise, curve):
        axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", default=["language", "classification"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if arguments.report else arguments.seeds:
        for (claim, name, size), function in RUNS.items():
            if claim in arguments.claims and seed not in finished().get((claim, name, size), {}):
                line = {"claim": claim, "model": name, "size": size, "seed": seed}
                append(RESULTS, {**line, **function(name, size, seed)})
    raise SystemExit(0 if report() else 1)


if __name__ == "__main__":
    main()
