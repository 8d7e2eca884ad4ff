"""The input of tokens. Shapes: B batch, T positions, D hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .feedback_inputs import Embedded, Fields, Input


@dataclass(kw_only=True)
class TokenFields(Fields):
    """Fields of an input of tokens; the vocabulary is that of the model, `vocab_size`."""

    type: str = "tokens"


class TokenInput(Input):
    """Map token ids [B, T] to [B, T, D]."""

    Fields = TokenFields
    takes = ("input_ids",)
    layer = "embed_tokens"

    def __init__(self, config: Any, fields: Any) -> None:
        super().__init__(config, fields)
        # No padding_idx: the token that ends a text often pads too, and an embedding of zero stays so in a stack of
        # norms without biases, where the gradient of each norm is a thousand times what comes in.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Embedded:
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            kind = str(input_ids.dtype) if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
            raise ValueError(f"input_ids are {kind}: give a tensor of whole numbers, as return_tensors='pt' makes it.")
        if not torch.compiler.is_compiling() and input_ids.device.type == "cpu" and input_ids.numel():
            low, high, size = input_ids.min().item(), input_ids.max().item(), len(self.embed_tokens.weight)
            if low < 0 or high >= size:
                raise ValueError(
                    f"input_ids go from {low} to {high} and the vocabulary has {size} tokens: "
                    "use the checkpoint's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
                )
        return Embedded(self.embed_tokens(input_ids))
