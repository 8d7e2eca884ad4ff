"""Tell the whole story in ten minutes on two CPU cores: `make demo`.

A language model that feeds its own state back is trained beside its feed-forward control, adapted to another text,
exported, loaded again and asked to write. Every chapter that trains is one of the other examples; its command is
printed, so that you can go on from there.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import finetune_lora
import run_classification
import run_clm
from feedback_transformers import data, hub, visualize
from feedback_transformers.training import scripts

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

THINKING = (1, 2, 3, 4, 6, 8, 12)  # feedback steps to evaluate at
CONTROL = "feedback_signal=none"
SMOKE = {"output_dir": "runs/smoke/demo", "threads": 1}


@dataclass
class DemoArguments:
    output_dir: str = field(default="runs/demo", metadata={"help": "For everything that is written."})
    train_steps: int = field(default=350, metadata={"help": "Training steps of each language model."})
    lora_steps: int = field(default=80, metadata={"help": "Training steps of the adapter."})
    epochs: float = field(default=1, metadata={"help": "Epochs of the classifier."})
    threads: int | None = field(default=None, metadata={"help": "Threads of PyTorch; it decides by default."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})
    smoke: bool = field(default=False, metadata={"help": "A run of seconds, to see that everything works."})


START = time.time()


def chapter(title: str, text: str) -> None:
    """Print the heading of a chapter, and how long the demo has run by now."""
    print(f"\n\n=== {title} === ({(time.time() - START) / 60:.1f} minutes so far)\n{text}\n", flush=True)


def run(script: Any, smoke: bool, **flags: Any) -> dict[str, Any]:
    """Run an example with these flags, and return all that it measured."""
    arguments = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    arguments += ["--smoke"] if smoke else []
    print("$", shlex.join(["python", f"examples/{script.__name__}.py", *arguments]), flush=True)
    script.main(arguments)
    return json.loads((Path(flags["output_dir"]) / "all_results.json").read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@torch.no_grad()
def loss_by_steps(model: torch.nn.Module, blocks: torch.Tensor) -> dict[int, float]:
    """Return the loss on `blocks` [N, T] by the number of feedback steps."""
    return {
        steps: model(blocks, labels=blocks, num_feedback_steps=steps, use_cache=False).loss.item()
        for steps in THINKING
    }


def table(rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)))


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    (args,) = scripts.parse((DemoArguments,), arguments, smoke=SMOKE)
    output = Path(args.output_dir)
    names = ("feedback", "control", "lora", "sentiment", "model", "tokenizer")
    folders = {name: output / name for name in names}
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)

    def example(script: Any, name: str, **flags: Any) -> dict[str, Any]:
        return run(script, args.smoke, output_dir=folders[name], seed=args.seed, **flags)

    tiny = f",{scripts.recipes.TINY['config_overrides']}" if args.smoke else ""

    def unless_smoke(value: Any) -> Any:
        return None if args.smoke else value

    chapter("1. The text", "Shakespeare's plays, character by character; and for later Python's manual.")
    plays, manual = data.load("shakespeare"), data.load("python-docs")
    for name, texts in {"shakespeare": plays, "python-docs": manual}.items():
        print(f"{name:<12} {sum(map(len, texts['train']['text'])):>10,} characters to train on")
    tokenizer = data.characters([*plays["train"]["text"], *manual["train"]["text"]])
    tokenizer.save_pretrained(folders["tokenizer"])
    print(f"{len(tokenizer)} different characters and special tokens")

    chapter(
        "2. Two language models",
        "One feeds its state back to the next position, three to six times as drawn anew at every training step.\n"
        "The other has the same parameters, and its connection reads the present position instead of the past.",
    )
    training = {
        "tokenizer": folders["tokenizer"],
        "max_steps": unless_smoke(args.train_steps),
        "eval_steps": unless_smoke(max(1, args.train_steps // 6)),
        "max_eval_samples": unless_smoke(256),
        "save_strategy": "no",
        "learning_rate": 2e-3,
        "muon_learning_rate": 0,  # AdamW alone: Muon's bfloat16 products are slow on CPUs without such instructions
    }
    models = {
        "feedback": example(run_clm, "feedback", **training),
        "feed-forward": example(run_clm, "control", config_overrides=CONTROL + tiny, **training),
    }
    histories = {"feedback": history(folders["feedback"]), "feed-forward": history(folders["control"])}
    visualize.loss_curves(histories, output / "loss_curves.png")

    chapter("3. What feedback brings", "On 256 blocks of plays that neither has seen:")
    model = AutoModelForCausalLM.from_pretrained(folders["feedback"])
    parameters = {
        "feedback": model.num_parameters(),
        "feed-forward": AutoModelForCausalLM.from_pretrained(folders["control"]).num_parameters(),
    }
    rows: list[Sequence[Any]] = [("model", "parameters", "validation loss", "perplexity", "training time")]
    for name, result in models.items():
        loss, perplexity, seconds = (result[key] for key in ("eval_loss", "perplexity", "train_runtime"))
        rows.append((name, f"{parameters[name]:,}", f"{loss:.4f}", f"{perplexity:.3f}", f"{seconds:.0f} s"))
    table(rows)
    unseen = data.blocks(plays["validation"], tokenizer, 128)[: 16 if args.smoke else 256]["input_ids"]
    losses = loss_by_steps(model, torch.tensor(unseen))
    print("\nThe same weights, with more or less thinking:")
    table([("feedback steps", *losses), ("validation loss", *(f"{loss:.4f}" for loss in losses.values()))])
    lines = plays["validation"]["text"][0].splitlines()
    verse = "\n".join(lines[len(lines) // 2 :][:5]) + "\n"
    visualize.predictions_over_steps(model, tokenizer, verse, 6, path=output / "predictions_over_steps.png")

    chapter("4. Another text, with LoRA", "Adapters on the projections of the model learn Python's manual:")
    lora = example(
        finetune_lora,
        "lora",
        model_name_or_path=folders["feedback"],
        max_steps=unless_smoke(args.lora_steps),
        max_eval_samples=unless_smoke(256),
    )

    chapter("5. Is a sentence about a film positive?", "A small classifier that reads it three times, from nothing:")
    sentiment = example(run_classification, "sentiment", num_train_epochs=unless_smoke(args.epochs))

    chapter("6. Sharing", "Weights, tokenizer, code and a card of what was measured, in one folder; and back:")
    results = {
        "shakespeare": {
            "eval_loss": models["feedback"]["eval_loss"],
            "eval_perplexity": models["feedback"]["perplexity"],
            "eval_perplexity of the feed-forward control": models["feed-forward"]["perplexity"],
            **{f"eval_loss_step_{steps}": loss for steps, loss in losses.items()},
        },
        "python-docs": {
            "eval_perplexity": lora["perplexity_before_python-docs"],
            "eval_perplexity with a LoRA adapter trained on it": lora["perplexity_after_python-docs"],
        },
    }
    hub.export(
        model,
        folders["model"],
        processor=tokenizer,
        results=results,
        name="Feedback language model of Shakespeare's plays",
        dataset="shakespeare",
        license="apache-2.0",
        language="en",
        description="This model writes Shakespeare character by character. `make demo` made it.",
        good_at="text in the style of the plays, of which it has read most.",
        limits="it spells words without understanding them, and knows no other text.",
        training={"steps": args.train_steps, "passes in training": "3 to 6, drawn anew at every step"},
        command=scripts.command(__file__, arguments),
    )
    again = AutoModelForCausalLM.from_pretrained(folders["model"])
    reader = AutoTokenizer.from_pretrained(folders["model"])
    prompt = reader("HAMLET. ", return_tensors="pt", return_token_type_ids=False)
    written = again.generate(
        **prompt, max_new_tokens=8 if args.smoke else 300, do_sample=True, temperature=0.8, pad_token_id=0
    )
    print(reader.decode(written[0], skip_special_tokens=True))

    chapter("7. What is left", f"All files are in {output}:")
    files = {
        output / "loss_curves.png": "both models in training",
        output / "predictions_over_steps.png": "how a prediction changes over the feedback steps",
        folders["model"] / "README.md": "the model card",
        folders["model"] / "model.safetensors": "the model; its folder loads with AutoModelForCausalLM",
        folders["lora"] / "adapter" / "adapter_model.safetensors": "the adapter to Python's manual",
        folders["sentiment"] / "README.md": f"the classifier, accuracy {sentiment['test_accuracy']:.1%}",
    }
    for file, what in files.items():
        print(f"{file}  ({what})")
    return list(files)


if __name__ == "__main__":
    main()
