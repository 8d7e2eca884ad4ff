"""What it costs to be prepared for a crash; the figures of docs/guides/crashes.md.

python tests/crash_overhead.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, data
from feedback_transformers.training import StopOnNonFinite, checkpoints

STEPS, ROUNDS = 20, 7


def main() -> None:
    plays = data.load("shakespeare")["validation"].select(range(3))
    tokenizer = data.characters(plays["text"])
    blocks = data.blocks(plays, tokenizer, block_size=128)
    sizes = {"hidden_size": 128, "intermediate_size": 248, "num_attention_heads": 4}
    model = FeedbackForCausalLM(FeedbackConfig(vocab_size=len(tokenizer), num_feedback_layers=2, **sizes))

    def seconds(folder: str, *callbacks: StopOnNonFinite) -> float:
        """Of the processor, as the machine may be busy."""
        options = {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        trainer = Trainer(model, TrainingArguments(folder, **options), train_dataset=blocks, callbacks=[*callbacks])
        start = time.process_time()
        trainer.train()
        return (time.process_time() - start) / STEPS

    with tempfile.TemporaryDirectory() as folder:
        seconds(folder)
        rounds = [(seconds(folder), seconds(folder, StopOnNonFinite())) for _ in range(ROUNDS)]
        plain, watched = map(statistics.median, zip(*rounds, strict=True))
        ratio = statistics.median(watched / plain for plain, watched in rounds)
        print(f"{model.num_parameters():,} parameters, {1e3 * plain:.1f} ms a step, {1e3 * watched:.1f} ms with")
        print(f"StopOnNonFinite: {100 * (ratio - 1):+.1f} % in the median of {ROUNDS} pairs of runs")

        checkpoint = Path(folder, "checkpoint-1")
        model.save_pretrained(checkpoint)
        torch.save([torch.randn(10_000_000) for _ in range(3)], checkpoint / "optimizer.pt")
        for name, function in (("write", checkpoints._write_manifest), ("check", checkpoints._is_complete)):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                function(checkpoint)
                times.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6
            first, later = times[0], statistics.median(times)
            print(f"{name} the manifest of {size:.0f} MB: {first:.2f} s at first, then {later:.2f} s")


if __name__ == "__main__":
    main()
