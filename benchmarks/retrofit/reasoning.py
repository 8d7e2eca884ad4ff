"""Test reasoning in several steps: a retrofitted SmolLM2 against plain LoRA with equal trained parameters and time.

The models are trained on 1 to 6 steps of a family (families.py) and tested on twice and three times as many, with 1 to
8 passes. All models see the same examples in the same order, with the states on the way as labels where a family has
them.

With attention to the whole prompt, feedback along time is hardly used: the model first learns to look back, which
fails beyond the trained lengths. So where the state is local, `time` learns with a sliding window of two steps behind
the encoder, on the tasks alone. `control` is the same model without feedback, and tells what the window does by
itself.

Every fourth step of all models reads ordinary text instead. There the model is held to what the original says of the
text, by the Kullback-Leibler divergence, in each way in which it may be run, so that nothing is forgotten. The
perplexities at the end are of other plays of Shakespeare and other pages of Python's manual.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tasks.runner import IGNORED, TEST_SEED
from feedback_transformers import data
from feedback_transformers.retrofit import share

from .families import FAMILIES, accuracy, encode
from .pretrained import smollm2
from .training import adapted, draws, to_bfloat16, train, trained_parameters

TRAINED, TESTED = (1, 6), (6, 12, 18)  # steps of reasoning
BATCH, ORDINARY = 16, 4  # examples in a step; one step in so many reads ordinary text
KEEPING = 10.0  # the weight of its loss: its gradients are small beside those of the tasks, which set Adam's scale
KEEPS = "cups"  # after this family, models are tested on ordinary texts
LENGTH, CHARACTERS = 128, 100_000  # of ordinary text: tokens in a row, characters of the test
TEXTS = {"python-docs": "train", "shakespeare": "test"}  # the splits whose first characters are the test
ORDINARY_TEXTS = {
    "aws-docs": slice(CHARACTERS),
    "shakespeare": slice(CHARACTERS),
    "python-docs": slice(CHARACTERS, None),
}
TRAINING = 600.0  # seconds of one thread
LONGER = {"cups": 1200.0}  # where some model had not learned the trained lengths by then
SPLIT = {"encoder_layers": 8, "decoder_layers": 2}
MODELS: dict[str, tuple[int, dict[str, Any] | None]] = {  # rank of the adapters, and what is retrofitted
    "plain": (16, None),
    # In chunks of tokens, about one step of reasoning each. One pass is exact, and nearly as fast as no feedback.
    "time": (17, {**SPLIT, "axis": "time", "solver": "sequential", "feedback_interval": 6}),
    "control": (17, {**SPLIT, "axis": "depth", "feedback_signal": "none"}),
    "depth": (31, {"encoder_layers": 18, "decoder_layers": 6, "axis": "depth"}),
}
WINDOWED = ("time", "control")
AS_TRAINED = {"plain": "1", "time": "in order", "control": "1", "depth": "4"}
EVERYTHING = "all seen"  # as trained, with attention to the whole prompt
PROMPTS = 192  # of each length, for a model as it was trained; a third as many for others
DRAWN = (1, 4)  # drawn in training, in depth


def run(family: str, name: str, seed: int) -> dict[str, Any]:
    """Make one run; return its line of the results."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    original, tokenizer = smollm2()
    rank, feedback = MODELS[name]
    chunk, window = FAMILIES[family].chunk, window_of(family, name)
    if name == "time":
        feedback = {**(feedback or {}), "feedback_interval": chunk}
    teacher = to_bfloat16(share(original)).requires_grad_(False)
    model = adapted(original, rank, feedback)
    batches, loss = examples(family, name, model, seed, tokenizer), partial(loss_of, model, teacher)
    steps, losses = train(model, batches, loss, LONGER.get(family, TRAINING))
    model.eval()
    right: dict[str, dict[str, float]] = {}
    lost: dict[str, dict[str, float]] = {}
    with torch.autocast("cpu", torch.bfloat16):
        for k in [*modes(name), *([EVERYTHING] if window else [])]:
            look_back(model, None if k == EVERYTHING else window)
            arguments, number = passes(model, k), PROMPTS if k == AS_TRAINED[name] else PROMPTS // 3
            right[k] = {
                str(n): accuracy(model, FAMILIES[family].examples(n, number, TEST_SEED), tokenizer, 32, **arguments)
                for n in TESTED
            }
            look_back(model, None)
            if family == KEEPS and k in ("1", "4"):
                lost[k] = perplexities(model, tokenizer, **arguments)
        cached = {}
        if family == KEEPS and name == "depth":
            ids = tokens("python-docs", "train", tokenizer)
            cached = {shared: cached_perplexity(model, ids, shared) for shared in ("own", "shared")}
    return {
        "recipe": recipe(family, name),
        "prompts": PROMPTS,
        "parameters": trained_parameters(model),
        "steps": steps,
        "loss": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy": right,
        "perplexity": lost,
        "perplexity of 4 passes, by slots of the cache": cached,
    }


def recipe(family: str, name: str) -> dict[str, Any]:
    """Return what a run depends on beside the code and the seed; runs with another recipe do not count."""
    chunk = FAMILIES[family].chunk if name == "time" else None
    fields = {"rank": MODELS[name][0], "retrofit": MODELS[name][1], "chunk": chunk, "window": window_of(family, name)}
    return {
        **fields,
        "seconds": LONGER.get(family, TRAINING),
        "batch": BATCH,
        "ordinary": ORDINARY,
        "keeping": KEEPING,
    }


def models(family: str) -> tuple[str, ...]:
    """Return the models that learn the family: the control only with a window, as it is plain LoRA otherwise."""
    return tuple(name for name in MODELS if name != "control" or window_of(family, name))


def modes(name: str) -> list[str]:
    """Return how a model is run in the test: with so many passes, or as it was trained."""
    in_passes = ["1", "2", "4", "8"]
    return {"plain": ["1"], "time": [*in_passes, "in order"], "control": ["1"], "depth": in_passes}[name]


def window_of(family: str, name: str) -> int | None:
    """Return how many tokens attention sees where the family is learned; None for all."""
    return 2 * FAMILIES[family].chunk if name in WINDOWED and FAMILIES[family].local else None


def look_back(model: Any, window: int | None) -> None:
    """Let each layer behind the encoder see the last `window` tokens; None for all."""
    backbone = getattr(model.config, "backbone_config", None)
    if backbone is not None:
        first = model.config.num_encoder_layers
        sliding = ["sliding_attention"] * (backbone.num_hidden_layers - first)
        backbone.sliding_window = window
        backbone.layer_types = None if window is None else ["full_attention"] * first + sliding


def passes(model: Any, mode: str) -> dict[str, Any]:
    """Return the arguments of a call; along time, passes are those of Jacobi's iteration."""
    config = model.config
    if getattr(config, "feedback_axis", None) == "time":
        config.solver = "jacobi" if mode.isdigit() else "sequential"
    elif config.model_type != "feedback":
        return {}
    return {"num_feedback_steps": int(mode)} if mode.isdigit() else {}


def examples(
    family: str, name: str, model: Any, seed: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Yield batches of a family, and in their turn of ordinary text, with the number of passes."""
    ordinary = torch.cat([tokens(text, "train", tokenizer, part) for text, part in ORDINARY_TEXTS.items()])
    learned, kept = ("in order", ["1", "4", "in order"]) if name == "time" else (None, None)
    for step, drawn in enumerate(draws(seed)):
        steps, mode = drawn.randint(*TRAINED), str(drawn.randint(*DRAWN))
        if step % ORDINARY == ORDINARY - 1:
            starts = [drawn.randrange(len(ordinary) - LENGTH) for _ in range(BATCH // 4)]
            rows = torch.stack([ordinary[start : start + LENGTH] for start in starts])
            look_back(model, None)
            yield {"input_ids": rows, **passes(model, drawn.choice(kept) if kept else mode)}
        else:
            batch = encode(FAMILIES[family].examples(steps, BATCH, 1000 * seed + step), tokenizer, True)
            look_back(model, window_of(family, name))
            yield {**batch, **passes(model, learned or mode)}


def loss_of(model: Any, original: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the cross-entropy of what has labels; of ordinary text, the divergence from the original."""
    body, head = model.get_base_model().model, model.get_base_model().lm_head
    labels = batch.pop("labels", None)
    y = body(**batch, use_cache=False).last_hidden_state
    if labels is None:
        with torch.no_grad():
            expected = original(batch["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        said = head(y).float().log_softmax(-1)
        divergence = F.kl_div(said.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")
        return KEEPING * divergence
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    wanted = labels != IGNORED  # only these logits: 49,152 for each position
    return F.cross_entropy(head(y[wanted]).float(), labels[wanted])


def tokens(text: str, split: str, tokenizer: PreTrainedTokenizerBase, characters: slice = slice(CHARACTERS)) -> Tensor:
    """Return the tokens [N] of these characters of a text's split."""
    rows = data.load(text)[split]
    whole = "\n".join(rows["text" if "text" in rows.column_names else "source"])[characters]
    return torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])


def perplexities(model: Any, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> dict[str, float]:
    return {text: perplexity(model, tokens(text, split, tokenizer), **arguments) for text, split in TEXTS.items()}


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, **arguments: Any) -> float:
    """Return the perplexity of a text's tokens [N], in rows of 512."""
    rows, total = ids[: len(ids) // 512 * 512].view(-1, 512), 0.0
    for row in rows.split(4):
        logits = model(input_ids=row[:, :-1], use_cache=False, **arguments).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten()).item() * len(row)
    return math.exp(total / len(rows))


@torch.no_grad()
def cached_perplexity(model: Any, ids: Tensor, slots: str, part: int = 8) -> float:
    """Return the perplexity of 4 rows of 512 tokens read 8 at a time, with a cache slot per pass or one for all."""
    model.config.shared_step_cache = slots == "shared"
    rows = ids[: 4 * 512].view(4, 512)
    cache, logits = None, []
    for start in range(0, 512, part):
        given = rows[:, start : start + part]
        outputs = model(input_ids=given, past_key_values=cache, use_cache=True, num_feedback_steps=4)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return math.exp(F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()).item())


def untrained(name: str, seed: int) -> dict[str, Any]:
    """Return the perplexities of the original."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    with torch.autocast("cpu", torch.bfloat16):
        return {"perplexity": perplexities(to_bfloat16(model).eval(), tokenizer)}


def report(family: str, lines: dict[str, list[dict[str, Any]]]) -> None:
    """Print accuracies by number of steps of reasoning, a row for each model, number of passes and seed."""
    print(f"Trained on {TRAINED[0]} to {TRAINED[1]} steps; a guess is right in {FAMILIES[family].chance:.0%}.\n")
    columns = " | ".join(f"{n} steps" for n in TESTED)
    print(f"| model | seed | trained parameters | steps trained | passes | {columns} |")
    print("|---|---|---|---|---|", "---|" * len(TESTED), sep="")
    for name, runs in lines.items():
        for line in runs:
            for mode, right in line["accuracy"].items():
                shown = " | ".join(f"{right[str(n)]:.2f}" for n in TESTED)
                print(f"| {name} | {line['seed']} | {line['parameters']:,} | {line['steps']} | {mode} | {shown} |")


def report_original(lines: dict[str, list[dict[str, Any]]]) -> None:
    values = lines["original"][0]["perplexity"].items()
    print("Perplexity of the original:", ", ".join(f"{text} {value:.3f}" for text, value in values))


def reached(name: str, lines: list[dict[str, Any]], steps: int) -> float:
    """Return the accuracy at that many steps, the mean over the seeds, of a model run as it was trained."""
    return statistics.mean(line["accuracy"][AS_TRAINED[name]][str(steps)] for line in lines)


def checks(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, bool]:
    """Return the targets and whether they were reached, as far as their runs are there."""
    said, gains, twice = {}, {}, 2 * TRAINED[1]
    for family in FAMILIES:
        known = {name: reached(name, lines, twice) for name, lines in runs[family].items()}
        feedback = [known[name] for name in ("time", "depth") if name in known]
        if "plain" in known and feedback:
            gains[family] = max(feedback) - max(known[name] for name in ("plain", "control") if name in known)
    if gains:
        shown = ", ".join(f"{family} {gain:+.2f}" for family, gain in gains.items())
        said[f"20 points above plain LoRA and control at {twice} steps in a family ({shown})"] = (
            max(gains.values()) >= 0.2
        )
        said["no family below plain LoRA"] = min(gains.values()) >= 0
    original = runs["nothing-lost"].get("original")
    for name, lines in runs[KEEPS].items() if original else ():
        for mode, texts in lines[0]["perplexity"].items():
            change = {text: value / original[0]["perplexity"][text] - 1 for text, value in texts.items()}
            shown = ", ".join(f"{text} {value:+.1%}" for text, value in change.items())
            sentence = f"{name}, after {KEEPS}, passes {mode}: perplexity within 1 % of the original ({shown})"
            said[sentence] = max(change.values()) <= 0.01
    return said
