"""Build the models that the tasks compare, all of one shape: token ids [B, T] in, logits [B, T, L] out.

Shapes: B batch, T positions, D hidden size, L labels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForTokenClassification
from transformers.modeling_outputs import TokenClassifierOutput

from feedback_transformers import FeedbackConfig, FeedbackForTokenClassification

Settings = dict[str, Any]  # as JSON has them, since they are written beside every result

# Attention sees the last 4 tokens only, so what came before them has to come through the feedback.
WINDOW: Settings = {"backbone_config": {"model_type": "mistral", "sliding_window": 4}}


class Recurrent(nn.Module):
    """Run torch's nn.GRU or nn.LSTM between an embedding and a linear readout."""

    def __init__(self, kind: str, fields: Settings, tokens: int, labels: int) -> None:
        super().__init__()
        size, both = fields["hidden_size"], fields.get("bidirectional", False)
        self.embedding = nn.Embedding(tokens, size)
        cell = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.rnn = cell(size, size, fields["num_layers"], batch_first=True, bidirectional=both)
        self.classifier = nn.Linear(2 * size if both else size, labels)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> TokenClassifierOutput:
        logits = self.classifier(self.rnn(self.embedding(input_ids))[0])
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


def build(kind: str, fields: Settings, tokens: int, labels: int, positions: int) -> nn.Module:
    """Return `feedback` (by fields of FeedbackConfig, or a preset), `llama` (of LlamaConfig), `gru` or `lstm`."""
    if kind in ("gru", "lstm"):
        return Recurrent(kind, fields, tokens, labels)
    sizes: Settings = {
        "vocab_size": tokens,
        "num_labels": labels,
        "max_position_embeddings": positions,
        "use_cache": False,
    }
    if kind == "llama":
        return LlamaForTokenClassification(LlamaConfig(**sizes, **fields, bos_token_id=None, eos_token_id=None))
    if kind != "feedback":
        raise ValueError(f"Unknown kind of model {kind!r}; choose feedback, llama, gru or lstm.")
    fields = dict(fields)
    preset = fields.pop("preset", None)
    config = FeedbackConfig.preset(preset, **sizes, **fields) if preset else FeedbackConfig(**sizes, **fields)
    return FeedbackForTokenClassification(config)
