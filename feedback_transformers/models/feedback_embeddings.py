"""Map a raw input to embeddings [B, T, D]. A new modality is a class here and a head of its own.

Shapes: B batch, T positions, D hidden size, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_feedback import FeedbackConfig


class TokenEmbeddings(nn.Module):
    """Map token ids [B, T] to [B, T, D]."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        # No padding_idx: the token that ends a text often pads too, and an embedding of zero stays so in a stack of
        # norms without biases, where the gradient of each norm is a thousand times what comes in.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
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
        return self.embed_tokens(input_ids)


BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, as ITU-R BT.601 and Pillow's grey have it


class PatchEmbeddings(nn.Module):
    """Map images [B, C, H, W] to [B, T, D], a position per patch, row by row.

    A grey model (one channel) reads the brightness of colours [B, 3, H, W]: transformers' pipelines open every image
    file in colour.
    """

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.shape = (config.num_channels, config.image_size, config.image_size)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.projection.weight.dtype)
        if self.shape[0] == 1 and pixels.ndim == 4 and pixels.shape[1] == 3:
            pixels = (pixels.new_tensor(BRIGHTNESS).view(3, 1, 1) * pixels).sum(dim=1, keepdim=True)
        if pixels.shape[1:] != self.shape:
            raise ValueError(f"pixel_values are {tuple(pixels.shape[1:])}; this model takes {self.shape}.")
        return self.projection(pixels).flatten(2).transpose(1, 2)


class ValueEmbeddings(nn.Module):
    """Map series [B, T, C] to [B, T, D], a position per time step."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.num_channels, config.hidden_size)

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"past_values have {values.shape[-1]} channels and this model {self.projection.in_features}: set "
                "num_channels in the config."
            )
        return self.projection(values.to(self.projection.weight.dtype))


EMBEDDINGS: dict[str, type[nn.Module]] = {
    "tokens": TokenEmbeddings,
    "patches": PatchEmbeddings,
    "values": ValueEmbeddings,
}
