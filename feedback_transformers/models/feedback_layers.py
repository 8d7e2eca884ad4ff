"""Stacks of layers [B, T, D] -> [B, T, D], which encoders, cells and decoders are made of.

Shapes: B batch, T positions, D hidden size, P earlier positions in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import BACKBONES, family_member
from .feedback_cache import Context, KeyValueSlots, MaskSizes
from .feedback_modalities import INPUTS
from .feedback_padding import gather, scatter

ACT2FN.setdefault("rrelu", nn.RReLU)


def layer_kind(backbone: Any, index: int) -> str:
    """Return the kind of a layer, `full_attention` or `sliding_attention`."""
    kinds = getattr(backbone, "layer_types", None)
    if kinds:
        return kinds[min(index, len(kinds) - 1)]
    return "full_attention" if getattr(backbone, "sliding_window", None) is None else "sliding_attention"


class TransformerStack(nn.Module):
    """Layers of the family in `config.backbone_config`, borrowed from transformers with all of their attention.

    In a retrofitted model the layers come from the original (`take_over`), each with its own number there. Masks and
    rotary tables are made once a call, and not once a pass.
    """

    same_in_passes = True  # whether the mask is

    def __init__(self, config: FeedbackConfig, num_layers: int, causal: bool = True) -> None:
        super().__init__()
        self.backbone = backbone = config.backbone_config
        self.causal, self.first = causal, 0
        self.family = family = BACKBONES[backbone.model_type]
        self.layers, self.rotary, self.mixes = nn.ModuleList(), None, config.token_mixer == "mlp"
        self.turns_by_kind = (
            backbone.model_type == "gemma3_text"
        )  # sliding and full attention have tables of their own
        if config.retrofitted_from is not None:
            return
        if config.norm_placement == "family":
            layer = family_member(backbone.model_type, family.prefix + family.layer)
            numbers = [{"layer_idx": i} if family.numbered else {} for i in range(num_layers)]
            self.layers.extend(layer(backbone, **number) for number in numbers)
        else:
            self.layers.extend(Block(config, i) for i in range(num_layers))
        if family.rotary is not None:
            self.rotary = family_member(backbone.model_type, f"{family.prefix}RotaryEmbedding")(backbone)
        for module in self.modules():
            if hasattr(module, "is_causal"):  # sdpa is causal wherever the mask is None and this is True
                setattr(module, "is_causal", causal)  # noqa: B010  (mypy takes every attribute of a Module for a Tensor)

    def take_over(self, layers: nn.ModuleList, rotary: nn.Module | None, first: int) -> None:
        """Take over layers of a base model, beginning with its layer `first`."""
        self.layers, self.rotary, self.first = layers, rotary, first

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.states(x, context, KeyValueSlots.of(context))[-1]

    def states(self, x: Tensor, context: Context, cache: KeyValueSlots | None) -> list[Tensor]:
        """Return the input and the output of every layer, each [B, T, D]."""
        key = (self.causal, self.first, len(self.layers), x.dtype)
        memo = context.memo if self.same_in_passes else {}
        given = memo[key] = memo.get(key) or self.prepare(x, context, memo)
        states, cached = [x], {self.family.cache: cache}
        for layer, arguments in zip(self.layers, given, strict=True):
            x = layer(x, **arguments, **cached)
            states.append(x)
        return states

    def prepare(self, x: Tensor, context: Context, memo: dict[Any, Any]) -> list[dict[str, Any]]:
        """Return the arguments of each layer, besides input and cache; those of layers of one kind are the same."""
        kinds = [layer_kind(self.backbone, self.first + i) for i in range(len(self.layers))]
        made: dict[str, dict[str, Any]] = {}
        for kind in set(kinds):
            key = (self.causal, kind, x.dtype)
            made[kind] = memo[key] = memo.get(key) or self.arguments(x, context, kind)
        return [made[kind] for kind in kinds]

    def arguments(self, x: Tensor, context: Context, kind: str) -> dict[str, Any]:
        """Return the arguments of the layers of a kind, besides input and cache."""
        if self.mixes:
            return {"mask": context.mask}
        arguments = {"attention_mask": self.attention_mask(x, context, kind)}
        if self.rotary is not None:
            by_kind = (kind,) if self.turns_by_kind else ()
            arguments["position_ids"] = context.position_ids
            arguments["position_embeddings"] = self.rotary(x, context.position_ids, *by_kind)
        return arguments

    def attention_mask(self, x: Tensor, context: Context, kind: str) -> Any:
        """Return the mask of a kind of layers, as the attention implementation takes it; None sees all."""
        sliding = kind == "sliding_attention"
        if not self.causal:
            create = create_bidirectional_sliding_window_mask if sliding else create_bidirectional_mask
            return create(self.backbone, x, context.mask)
        if not sliding and context.key_mask is None and x.shape[1] == 1:
            return None  # one query sees every key
        sizes: Any = MaskSizes(context.offset)
        if not sliding:
            blocks: dict[str, Any] = {} if context.blocks is None else {"block_sequence_ids": context.blocks}
            return create_causal_mask(self.backbone, x, context.key_mask, sizes, **blocks)
        if context.key_mask is None:
            return create_sliding_window_causal_mask(self.backbone, x, None, sizes)
        window = self.window(context.key_mask)
        return create_causal_mask(self.backbone, x, context.key_mask, sizes, and_mask_function=window)

    def window(self, key_mask: Tensor) -> Callable[..., Tensor]:
        """Return the rule for which keys a query sees in a sliding window that counts real positions only."""
        places, size = key_mask.cumsum(dim=1), self.backbone.sliding_window
        return lambda batch, head, query, key: places[batch, query] - places[batch, key] < size


def make_norm(config: FeedbackConfig) -> nn.Module:
    """Return an RMS norm with the family's eps, and with weights or, by norm_weights=False, without."""
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_weights)


class Mixer(nn.Module):
    """An MLP over the positions in place of attention, n(x + mlp(x)) for each channel (TRM's mlp_t).

    It is made for texts of `max_position_embeddings`; shorter ones are filled up with zeros. The norm n is over the
    positions, as in the authors' code.
    """

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.length = config.max_position_embeddings
        self.norm = family_member("hrm_text", "HrmTextRMSNorm")(config.norm_eps)
        sizes = copy.copy(config.backbone_config)
        sizes.hidden_size, sizes.intermediate_size = self.length, config.mixer_size or config.intermediate_size
        self.mlp = family_member(sizes.model_type, f"{BACKBONES[sizes.model_type].prefix}MLP")(sizes)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix x [B, T, D], of which mask [B, T] tells the real positions."""
        length = x.shape[1]
        x = x if mask is None else x * mask[..., None]
        x = x.transpose(1, 2)
        x = x if length == self.length else F.pad(x, (0, self.length - length))
        return self.norm(x + self.mlp(x)).transpose(1, 2)[:, :length]


class Block(GradientCheckpointingLayer):
    """A transformer layer of borrowed attention and MLP, with its norms where `norm_placement` says:

    pre: x + f(n(x))    sandwich: x + n'(f(n(x)))    residual_sandwich: n'(x + f(n(x)))    post: n(x + f(x))
    """

    def __init__(self, config: FeedbackConfig, index: int) -> None:
        super().__init__()
        backbone = config.backbone_config
        prefix = BACKBONES[backbone.model_type].prefix
        self.placement = config.norm_placement
        mixes = config.token_mixer == "mlp"
        self.self_attn = None if mixes else family_member(backbone.model_type, f"{prefix}Attention")(backbone, index)
        self.mixer = Mixer(config) if mixes else None
        self.mlp = family_member(backbone.model_type, f"{prefix}MLP")(backbone)
        before, after = self.placement != "post", self.placement != "pre"
        self.input_layernorm = make_norm(config) if before else None
        self.attention_norm = make_norm(config) if after and not mixes else None
        self.post_attention_layernorm = make_norm(config) if before else None
        self.mlp_norm = make_norm(config) if after else None

    def forward(self, x: Tensor, mask: Tensor | None = None, **arguments: Any) -> Tensor:
        if self.mixer is not None:
            x = self.mixer(x, mask)
        else:
            x = self.add(x, lambda x: self.self_attn(x, **arguments)[0], self.input_layernorm, self.attention_norm)
        return self.add(x, self.mlp, self.post_attention_layernorm, self.mlp_norm)

    def add(
        self, x: Tensor, branch: Callable[[Tensor], Tensor], before: nn.Module | None, after: nn.Module | None
    ) -> Tensor:
        """Return x plus a branch of it, with norms before and after."""
        made = branch(x if before is None else before(x))
        if after is None:
            return x + made
        return x + after(made) if self.placement == "sandwich" else after(x + made)


class MLPStack(nn.Module):
    """Residual layers x + W_2 act(W_1 norm(x)) at each position."""

    def __init__(self, config: FeedbackConfig, num_layers: int, causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLPLayer(config) for _ in range(num_layers))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MLPLayer(nn.Module):
    """One layer of an MLPStack."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act(self.up_proj(self.norm(x))))


class ConvStack(nn.Module):
    """Residual layers x + W act(conv(norm(x))) along the positions, or over the grid of an image or a video.

    A causal convolution pads on the left only and keeps its last inputs for the next call.
    """

    def __init__(self, config: FeedbackConfig, num_layers: int, causal: bool = True) -> None:
        super().__init__()
        kind = config.source_type if config.is_encoder_decoder else config.input_type  # the target is causal
        axes = 1 if causal else max(1, INPUTS[kind].axes)
        self.layers = nn.ModuleList(ConvLayer(config, causal, axes) for _ in range(num_layers))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, context.within(i))
        return x


class ConvLayer(nn.Module):
    """One layer of a ConvStack."""

    def __init__(self, config: FeedbackConfig, causal: bool, axes: int) -> None:
        super().__init__()
        self.causal, self.axes, self.kernel_size = causal, axes, config.conv_kernel_size
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        padding: str | int = 0 if causal else "same"
        self.conv = conv(config.hidden_size, config.hidden_size, config.conv_kernel_size, padding=padding)
        self.act = ACT2FN[config.hidden_act]
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        inputs = self.norm(x)
        if context.mask is not None:
            inputs = inputs * context.mask[..., None]
        if self.causal:
            inputs = self.with_past(inputs, context)
        elif self.axes > 1 and not context.grid:
            raise ValueError(
                "Convolutions read the grid of an image, which inputs_embeds do not have: give pixel_values."
            )
        elif self.axes > 1:  # padding cells lie between those of a smaller image
            inputs = scatter(inputs, context.order).unflatten(1, context.grid)
        convolved = self.conv(inputs.movedim(-1, 1)).flatten(2).movedim(1, -1)
        if self.axes > 1:
            convolved = gather(convolved, context.order)
        return x + self.out_proj(self.act(convolved))

    def with_past(self, inputs: Tensor, context: Context) -> Tensor:
        """Prepend the real inputs just before, or zeros at the start: [B, T, D] -> [B, T + kernel - 1, D]."""
        size, state = self.kernel_size - 1, context.state()
        if size == 0:
            return inputs
        past = inputs.new_zeros(inputs.shape[0], size, inputs.shape[2]) if state is None else state[0].to(inputs.dtype)
        inputs = torch.cat([past, inputs], dim=1)
        if context.lengths is None:
            context.keep((inputs[:, -size:],))
        else:  # the last inputs before the padding
            last = context.lengths[:, None] + torch.arange(size, device=inputs.device)
            context.keep((inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[2])),))
        return inputs


class CrossAttention(nn.Module):
    """x + attention(norm(x), source): a step reads the source by the attention of BART."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.backbone = config.backbone_config
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = family_member("bart", "BartAttention")(
            config.hidden_size, config.num_attention_heads, is_decoder=True, config=self.backbone, layer_idx=0
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        mask = create_bidirectional_mask(self.backbone, x, context.source_mask, encoder_hidden_states=context.source)
        arguments = {
            "key_value_states": context.source,
            "attention_mask": mask,
            "past_key_values": context.cross_attention,
        }
        return x + self.attention(self.norm(x), **arguments)[0]


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Apply dropout where p is above zero, which draws no random numbers otherwise."""
    return F.dropout(x, p, training) if p else x
