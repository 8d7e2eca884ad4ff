"""Compare a feedback model with feed-forward ones, all tuned alike, on the characters of Shakespeare.

    python -m benchmarks.small_beats_large              # every missing run, then the table and the plot
    python -m benchmarks.small_beats_large --report     # the table of the runs that are there

All models train on the first 90 % of the First Folio, 24,000 sequences of 128 characters, at width 128. Each run is
one process on one thread, and is appended to results/small_beats_large.jsonl when it has finished.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import feedback_transformers
from benchmarks import training
from benchmarks.training import RECIPE
from feedback_transformers import FeedbackConfig, FeedbackForCausalLM

RESULTS = Path(__file__).parent / "results" / "small_beats_large.jsonl"
LENGTH, SEQUENCES, WIDTH = 128, 24_000, 128
SEEDS = (0, 1, 2)
STEPS = range(1, 13)  # the numbers of feedback steps at which a feedback model is evaluated
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 248,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
FEEDBACK: dict[str, Any] = {
    "num_encoder_layers": 1,
    "num_feedback_layers": 3,
    "num_decoder_layers": 0,
    "feedback_axis": "time",
    "solver": "jacobi",
    "gradient_steps": 3,
    "supervision": "all",
}
SAMPLED = (3, 5)  # feedback steps in training, uniform


def build(name: str, vocab_size: int) -> nn.Module:
    """Return `feedback`, `control` (feed-forward, the same parameters) or `large` (8 Llama layers, 1.85 times)."""
    if name == "large":
        shape = {**SHAPE, "intermediate_size": 252, "num_hidden_layers": 8, "max_position_embeddings": LENGTH}
        return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocab_size))
    signal = {"feedback": "state", "control": "none"}[name]
    config = FeedbackConfig(
        **SHAPE, **FEEDBACK, feedback_signal=signal, vocab_size=vocab_size, max_position_embeddings=LENGTH
    )
    return FeedbackForCausalLM(config)


def validation_losses(model: Any, steps: range | None, sequences: int = 512) -> list[float]:
    """Return the mean nats per character at each number of steps, on sequences spread over the held-out tenth."""
    rows = training.held_out(LENGTH, sequences)
    arguments: list[dict[str, Any]] = [{"num_feedback_steps": number} for number in steps] if steps else [{}]
    return [training.evaluate(model, rows, **each)[0] for each in arguments]


def run(name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one model; return its line of the results."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: Any = build(name, training.characters()[2])
    nn.init.normal_(model.get_input_embeddings().weight, std=RECIPE["embedding_std"])
    batch, sampled = int(RECIPE["batch"]), SAMPLED if name == "feedback" else None
    seconds = training.train(model, SEQUENCES // batch, LENGTH, batch, sampled, seed)
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": validation_losses(model, STEPS if name == "feedback" else None),
        "seconds": round(seconds),
        "load": os.getloadavg()[0],
        "threads": 1,
        "machine": platform.machine(),
        "versions": {p.__name__: p.__version__ for p in (torch, transformers, feedback_transformers)},
        "recipe": {**RECIPE, "sampled": SAMPLED, **SHAPE, **FEEDBACK},
        "command": f"python -m benchmarks.small_beats_large --models {name} --seeds {seed}",
    }


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> bool:
    """Print the table (feedback: the best of 3 to 12 steps) and the targets; return whether all were reached."""
    runs = sorted(finished(), key=lambda r: r["seed"])
    names = ("feedback", "control", "large")
    best = {name: [min(r["losses"][2:] or r["losses"]) for r in runs if r["model"] == name] for name in names}
    if not all(best.values()):
        print("Some models have no finished run yet.")
        return False
    print("| model | parameters | validation loss, nats, by seed | mean | seconds |\n|---|---|---|---|---|")
    mean = {}
    for name, losses in best.items():
        lines = [r for r in runs if r["model"] == name]
        mean[name] = sum(losses) / len(losses)
        seconds = ", ".join(str(r["seconds"]) for r in lines)
        by_seed = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {lines[0]['parameters']:,} | {by_seed} | {mean[name]:.4f} | {seconds} |")
    feedback = [r for r in runs if r["model"] == "feedback"]
    spread = max(max(r["losses"][2:]) - min(r["losses"][2:]) for r in feedback)
    checks = {
        "at most 0.72M parameters": feedback[0]["parameters"] <= 720_000,
        "loss <= 1.53": mean["feedback"] <= 1.53,
        "0.02 below the control of its size": mean["feedback"] <= mean["control"] - 0.02,
        "no worse than the large model": mean["feedback"] <= mean["large"],
        f"within 0.01 of its best from 3 to 12 steps (largest gap {spread:.4f})": spread <= 0.01,
    }
    for sentence, reached in checks.items():
        print(f"{'pass' if reached else 'FAIL'}  {sentence}")
    return all(checks.values())


def plot() -> None:
    """Draw the loss by number of feedback steps, with the feed-forward models as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for r in finished():
        if r["model"] == "feedback":
            axes.plot(STEPS[2:], r["losses"][2:], marker="o", color="C0", alpha=0.7)
        else:
            axes.axhline(r["losses"][0], color="C1" if r["model"] == "control" else "C2", alpha=0.7)
    for color, label in (("C0", "feedback"), ("C1", "control, same parameters"), ("C2", "feed-forward, 8 layers")):
        axes.plot([], [], color=color, label=f"{label} (a line a seed)")
    axes.set(
        xlabel="feedback steps at evaluation", ylabel="validation loss, nats", title="Character-level Shakespeare"
    )
    axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["feedback", "control", "large"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for seed in [] if arguments.report else arguments.seeds:
        for name in arguments.models:
            if not any(r["model"] == name and r["seed"] == seed for r in finished()):
                line = run(name, seed)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    reached = report()
    plot()
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
