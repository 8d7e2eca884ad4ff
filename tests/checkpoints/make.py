"""Writes tests/checkpoints/<version>/: tiny models of this version of the package, with what they computed.

    python tests/checkpoints/make.py  # once per release, before it is tagged; commit what it writes

test_hub_versions.py loads them with every later version. The code that travels in a checkpoint is left out: what is
tested is that the package reads the weights and the config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import feedback_transformers as ft

TINY: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # so that every weight counts
    "pad_token_id": 0,
}
TOKENS = {"input_ids": torch.arange(1, 13).view(2, 6)}
SERIES = {"past_values": torch.linspace(-1, 1, 24).view(2, 12, 1)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}


def models() -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Each head and part whose weights have names of their own, by the name of its folder."""

    def build(head: Any, **fields: Any) -> Any:
        return head(ft.FeedbackConfig(**TINY | fields))

    small = LlamaConfig(**TINY, num_hidden_layers=3, num_key_value_heads=2)
    image = {"embedding_type": "patches", "image_size": 8, "patch_size": 4, "num_channels": 3, "is_causal": False}
    target = TOKENS | {"decoder_input_ids": torch.arange(3, 11).view(2, 4)}
    return {
        "depth": (build(ft.FeedbackForCausalLM), TOKENS),
        "memory": (
            build(ft.FeedbackForCausalLM, **ft.PRESETS["feedback-transformer"] | {"num_feedback_layers": 2}),
            TOKENS,
        ),
        "gru": (build(ft.FeedbackForCausalLM, **ft.PRESETS["gru"]), TOKENS),
        "output": (
            build(
                ft.FeedbackForSequenceClassification,
                num_labels=3,
                feedback_type="conv",
                feedback_signal="output",
                encoder_type="cnn",
                decoder_type="rnn",
            ),
            TOKENS,
        ),
        "learned": (
            build(ft.FeedbackForCausalLM, halting="learned", feedback_type="mlp", feedback_connection="concat"),
            TOKENS,
        ),
        "seq2seq": (
            build(ft.FeedbackForConditionalGeneration, is_encoder_decoder=True, decoder_start_token_id=1),
            target,
        ),
        "image": (build(ft.FeedbackForImageClassification, **image), PIXELS),
        "series": (build(ft.FeedbackForTimeSeriesPrediction, embedding_type="values", prediction_length=4), SERIES),
        "retrofit": (ft.retrofit(LlamaForCausalLM(small), 1, 1), TOKENS),
    }


def main() -> None:
    folder = Path(__file__).parent / ft.__version__
    if folder.exists():
        raise SystemExit(f"{folder} exists, and what a version wrote is not written again: raise the version first.")
    torch.manual_seed(0)
    for name, (model, inputs) in models().items():
        with torch.no_grad():
            for parameter in model.parameters():  # nothing is at zero or one, where it would not be missed
                parameter += 0.1 * torch.randn_like(parameter)
            output = model.eval()(**inputs)[0]
        model.save_pretrained(folder / name)
        for code in (folder / name).glob("*.py"):
            code.unlink()
        save_file(inputs | {"expected": output.contiguous()}, folder / name / "case.safetensors")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()):,} bytes")


if __name__ == "__main__":
    main()
