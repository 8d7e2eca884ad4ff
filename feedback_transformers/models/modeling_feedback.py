"""FeedbackModel: embeddings, encoder, loop and decoder put together.

Shapes: B batch, T positions, P positions in the cache, C channels, D hidden size, K feedback steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, logging
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import BACKBONES, Family, attention_of, base_class, family_member
from .feedback_cache import Context, FeedbackCache
from .feedback_calls import ContextMixin, FeedbackModelOutput, check_positions, check_types, named_arguments
from .feedback_decoders import DECODERS
from .feedback_encoders import ENCODERS
from .feedback_inputs import Embedded
from .feedback_layers import TransformerStack, make_norm
from .feedback_loop import FeedbackLoop
from .feedback_modalities import make_input
from .feedback_padding import gather, scatter
from .feedback_pretrained import FeedbackPreTrainedModel
from .feedback_solvers import Readout, solver_of
from .feedback_states import FeedbackState

if TYPE_CHECKING:  # transformers fetches what such lines name, so that a checkpoint saved again keeps every head
    from .modeling_feedback_dense import FeedbackForObjectDetection  # noqa: F401
    from .modeling_feedback_image import FeedbackForImageClassification  # noqa: F401
    from .modeling_feedback_seq2seq import FeedbackForConditionalGeneration  # noqa: F401
    from .modeling_feedback_series import FeedbackForTimeSeriesPrediction  # noqa: F401
    from .modeling_feedback_text import FeedbackForCausalLM  # noqa: F401

logger = logging.get_logger(__name__)


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x [B, T, N] times `matrix` [N, M], the same for all rows, or [B, N, M], one for each. [B, T, M]"""
    return nn.functional.linear(x, matrix.t()) if matrix.ndim == 2 else x @ matrix


class FeedbackModel(ContextMixin, FeedbackPreTrainedModel):
    """Compute embeddings -> encoder -> loop (connection, cell) and decoder -> y [B, T, D]."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        config.validate_architecture()  # fields may have been set since it was made
        retrofitted = config.retrofitted_from is not None
        config.backbone_config._attn_implementation = attention_of(config, config._attn_implementation)
        self.embeddings: Any = make_input(config, config.input_config)
        self.source_embeddings: Any = None  # of another source than tokens of the target's vocabulary
        if config.source_config is not None:
            self.source_embeddings = make_input(config, config.source_config)
        family = BACKBONES[config.backbone_config.model_type]
        rotary = config.backbone_config.model_type != "gpt2" or not config.has_attention
        self.positions: nn.Module | None = None
        self.first_position = 0  # the row there of a text's first position; RoBERTa's come after that of padding
        if not rotary:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_types: nn.Module | None = None
        self.embedding_norm: nn.Module = nn.Identity()
        self.embedding_dropout: nn.Module = nn.Identity()
        self.embedding_proj: nn.Module | None = None
        self.embedding_size = config.hidden_size
        if family.embeddings is not None and not retrofitted:
            self.borrow_embeddings(family)
        encoder_causal = config.is_causal and not config.is_encoder_decoder
        self.encoder = ENCODERS[config.encoder_type](config, config.num_encoder_layers, encoder_causal)
        self.loop = FeedbackLoop(config)
        decoder = DECODERS[config.decoder_type]
        shared = config.share_encoder_decoder
        self.decoder = None if shared else decoder(config, config.num_decoder_layers, config.is_causal)
        self.norm: nn.Module = make_norm(config) if self.norms_output(config) else nn.Identity()
        self.prefixes: nn.Module | None = None
        if config.num_prefix_tokens:
            whole = config.num_prefix_tokens * config.hidden_size
            self.prefixes = nn.Embedding(config.num_prefixes, config.prefix_size or whole)
        self.pooler: nn.Module | None = None
        self.has_attention = config.has_attention
        if retrofitted:
            config.backbone_config.vocab_size = config.vocab_size  # the embeddings may have been resized
            self.take_over(base_class(config.backbone_config)(config.backbone_config))
        self.post_init()

    def borrow_embeddings(self, family: Family) -> None:
        """Build embeddings as a family has them: narrower than its layers, with positions and types, normed."""
        backbone = self.config.backbone_config
        backbone.vocab_size = self.config.vocab_size
        parts = family_member(backbone.model_type, family.prefix + family.embeddings)(backbone)
        self.embeddings.embed_tokens, self.positions = parts.word_embeddings, parts.position_embeddings
        self.token_types, self.embedding_norm = parts.token_type_embeddings, parts.LayerNorm
        self.embedding_dropout, self.embedding_size = parts.dropout, backbone.embedding_size
        self.embedding_proj = nn.Linear(backbone.embedding_size, backbone.hidden_size)

    @staticmethod
    def norms_output(config: FeedbackConfig) -> bool:
        """Return whether y is normed; a pass that ends with a norm needs no other where no layer follows."""
        return config.output_norm != "none" and (config.output_norm != "pass" or config.num_decoder_layers > 0)

    def take_over(self, base: PreTrainedModel) -> None:
        """Take over all parts of `base`, the base model that `config.backbone_config` describes."""
        config, family = self.config, BACKBONES[self.config.backbone_config.model_type]

        def part(path: str | None) -> Any:
            return None if path is None else reduce(getattr, path.split("."), base)

        self.embeddings.embed_tokens = part(family.tokens)
        self.positions = part(family.positions)
        padding = getattr(self.positions, "padding_idx", None)
        self.first_position = 0 if padding is None else padding + 1
        self.token_types = part(family.token_types)
        self.embedding_norm = part(family.embedding_norm) or nn.Identity()
        self.embedding_dropout = part(family.dropout) or nn.Identity()
        self.norm = part(family.norm) or nn.Identity()
        self.pooler = part(family.pooler) or self.pooler  # which some bases leave out
        first, layers = 0, part(family.layers)
        stacks = (self.encoder, self.loop.cell, self.decoder)
        sizes = (config.num_encoder_layers, config.num_feedback_layers, config.num_decoder_layers)
        for stack, size in zip(stacks, sizes, strict=True):
            cast(Any, stack).take_over(layers[first : first + size], part(family.rotary), first)
            first += size

    @property
    def more_arguments(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the raw data that the model's input takes."""
        return self.embeddings.takes

    @property
    def source(self) -> Any:
        """The input of the source of a sequence-to-sequence model."""
        return self.embeddings if self.source_embeddings is None else self.source_embeddings

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of tokens, or the projection of patches or values."""
        return cast(nn.Module, getattr(self.embeddings, self.embeddings.layer))

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what `get_input_embeddings` returns."""
        setattr(self.embeddings, self.embeddings.layer, value)

    @staticmethod
    def embed(part: Any, inputs_embeds: Tensor | None, raw: dict[str, Tensor | None]) -> Embedded:
        """Return what an input makes of its raw data, or inputs_embeds [B, T, D].

        Raises ValueError unless one of both is given, and all of the data is this input's.
        """
        first, instead = part.takes[0], ""
        given: dict[str, Tensor] = {}
        for name, value in raw.items():
            if value is not None:
                given[name] = value
                instead = instead if name in part.takes else f", not {name}"
        if instead or (first in given) == (inputs_embeds is not None) or (inputs_embeds is not None and given):
            raise ValueError(f"This model reads {first}{instead}: give exactly one of {first} and inputs_embeds.")
        return part(**given) if inputs_embeds is None else Embedded(inputs_embeds)

    def place(self, embedded: Tensor, context: Context, token_type_ids: Tensor | None) -> Tensor:
        """Scale the embeddings [B, T, D] of tokens, and add learned positions and types. [B, T, D]"""
        if self.config.embedding_scale != 1:
            embedded = embedded * self.config.embedding_scale
        if self.positions is not None:
            embedded = embedded + self.positions(context.position_ids + self.first_position)
        if self.token_types is not None:
            types = torch.zeros_like(context.position_ids) if token_type_ids is None else token_type_ids
            embedded = embedded + self.token_types(types)
        embedded = self.embedding_dropout(self.embedding_norm(embedded))
        return embedded if self.embedding_proj is None else self.embedding_proj(embedded)

    def encode(self, embedded: Tensor, context: Context) -> Tensor:
        """Return e [B, T, D], the encoded embeddings."""
        return self.run_stack(self.encoder, embedded, context.for_part("encoder"))

    def encode_source(
        self, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None, **raw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the embeddings and the states of the source of a sequence-to-sequence model, each [B, S, D].

        The source is `raw`, such as input_ids [B, S], or inputs_embeds [B, S, D]. The third result is the mask [B, S]
        of real positions, where the input itself knows it.
        """
        if "attention_mask" in self.source.takes and inputs_embeds is None:
            raw["attention_mask"] = attention_mask
        embedded, mask, grid = self.embed(self.source, inputs_embeds, raw)
        context, order = self.make_context(embedded, attention_mask if mask is None else mask, None, None, grid)
        embedded = self.place(gather(embedded, order), context, None)
        context.key_mask = context.mask
        return scatter(embedded, order), scatter(self.encode(embedded, context), order), mask

    def decode(self, h: Tensor, context: Context) -> Tensor:
        """Return y = g(h) [B, T, D]."""
        decoder = self.encoder if self.decoder is None else self.decoder
        if self.config.output_norm == "around_decoder":
            h = self.norm(h)
        in_loop = self.config.feedback_axis == "time" and self.config.feedback_signal == "output"
        return self.norm(decoder(h, context) if in_loop else self.run_stack(decoder, h, context))

    def run_stack(self, stack: nn.Module, x: Tensor, context: Context) -> Tensor:
        """Run a stack, and recompute it under gradient checkpointing, as transformer layers do themselves."""
        if isinstance(stack, TransformerStack):
            return stack(x, context)
        return self.loop.checkpoint(stack, context, x, context)

    def predict(self, y: Tensor) -> Tensor:
        """Return E y [B, T, V], the logits of a head with tied embeddings, where the model has no head."""
        if not self.config.tie_word_embeddings:
            raise ValueError(self.needs_a_head())
        return multiply(y, self.token_table(y).transpose(-1, -2))

    def needs_a_head(self) -> str:
        """Return the sentence that refuses a prediction which this model, without a head, does not make."""
        by_output = self.config.feedback_signal == "output"
        asks = "feedback_signal='output'" if by_output else "halting_measure='prediction'"
        return f"{asks} needs a head's prediction: use a FeedbackFor... class, or set tie_word_embeddings=True."

    def token_table(self, rows: Tensor) -> Tensor:
        """Return the embeddings of all tokens [V, D], or [B, V, D] where each row of the batch has its own adapter.

        The table is read through its module, so that adapters and hooks count. PEFT tells a module the adapters of
        the rows by a hook, which holds their names.
        """
        if self.embeddings.takes[0] != "input_ids":
            raise ValueError(self.needs_a_head())
        embed = self.get_input_embeddings()
        hooks = [hook for module in embed.modules() for hook in module._forward_pre_hooks.values()]
        by_row = any("adapter_names" in getattr(hook, "keywords", {}) for hook in hooks)
        ids = torch.arange(self.config.vocab_size, device=rows.device)[None]
        return embed(ids.expand(len(rows), -1)) if by_row else embed(ids)[0]

    def feed_tokens(self, predict: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map y -> softmax(logits) E, the prediction fed back; the table E is read once for all steps."""
        if self.config.feedback_signal != "output":
            return predict  # nothing will be fed back
        table = self.token_table(rows)
        if self.config.embedding_scale != 1:
            table = table * self.config.embedding_scale
        return lambda y: multiply(predict(y).softmax(-1), table)

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
        embed_output: Callable[..., Tensor] | None = None,
        predict: Callable[[Tensor], Tensor] | None = None,
        num_feedback_steps: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        **raw: Tensor,
    ) -> FeedbackModelOutput:
        """Compute y [B, T, D].

        Args:
            input_ids: [B, T], of an input of tokens.
            raw: what another input takes: pixel_values [B, C, H, W] or [B, F, C, H, W], past_values [B, T, C].
            inputs_embeds: [B, T, D], in place of raw data.
            attention_mask: [B, T] or [B, P + T], 1 where real. Padding may stand anywhere.
            position_ids: [B, T] or [1, T]; counted from the mask where left out.
            encoder_hidden_states: [B, S, D], the encoded source of a sequence-to-sequence model.
            encoder_attention_mask: [B, S].
            token_type_ids: [B, T], of a retrofitted model that has types of tokens; with prefix_lm, 1 for the tokens
                that see each other.
            prefix_ids: [B], which of the `num_prefixes` a row begins with; 0 where left out.
            feedback_state: the state to begin with, such as the `feedback_state` that a call returned: k passes and
                then K - k more are K passes. Without it, `initial_state` of the config. Position by position, the call
                goes on with more positions; a model with attention needs `past_key_values` for that.
            num_feedback_steps: passes of this call instead of the config's (depth axis, or solvers that make passes).
            predict: a head's map from y to its logits.
            embed_output: a head's map from y to its prediction, embedded; without it that of tokens.

        Raises:
            ValueError: an argument is unknown, or its shape does not fit the input.
        """
        if past_key_values is None and not torch.compiler.is_compiling():  # once a text
            self.check_windows()
        given: dict[str, Tensor | None] = {"input_ids": input_ids, **raw}
        if "attention_mask" in self.embeddings.takes and inputs_embeds is None:
            given["attention_mask"] = attention_mask
        embedded, mask, grid = self.embed(self.embeddings, inputs_embeds, given)
        attention_mask = attention_mask if mask is None else mask
        if self.config.is_encoder_decoder and encoder_hidden_states is None:
            raise ValueError("With is_encoder_decoder=True there is a source to read: give encoder_hidden_states.")
        returned = cache = self.make_cache(past_key_values, use_cache)
        by_position = not solver_of(self.config).makes_passes
        if by_position:
            cache, feedback_state = self.cache_after(feedback_state, cache), None
            returned = None if returned is None else cache
        text = embedded.shape[1]
        if self.prefixes is not None:
            embedded, attention_mask = self.with_prefix(embedded, attention_mask, prefix_ids)
            self.check_alone(position_ids=position_ids, token_type_ids=token_type_ids)
        elif prefix_ids is not None:
            raise ValueError("This model has no prefixes: leave prefix_ids out, or set num_prefix_tokens.")
        context, order = self.make_context(embedded, attention_mask, position_ids, cache, grid)
        if encoder_hidden_states is not None:
            source = encoder_hidden_states.shape[1]
            check_positions("encoder_attention_mask", encoder_attention_mask, len(encoder_hidden_states), (source,))
            context.source, context.source_mask = encoder_hidden_states, encoder_attention_mask
            context.cross_attention = EncoderDecoderCache(DynamicCache(), DynamicCache())
            if cache is not None:
                cache.cross_attention = context.cross_attention = cache.cross_attention or context.cross_attention
        prefix_lm = self.config.prefix_lm
        check_types(token_type_ids, embedded, self.token_types is not None or prefix_lm)
        kinds = token_type_ids if token_type_ids is None or order is None else token_type_ids.gather(1, order)
        if prefix_lm and kinds is not None:
            if cache is not None and cache.length > 0 and not torch.compiler.is_compiling() and (kinds == 1).any():
                raise ValueError(
                    "token_type_ids of 1 are of a prompt, which is read in one call: give 0 behind past_key_values."
                )
            prompt = kinds == 1 if context.mask is None else (kinds == 1) & context.mask
            context.blocks = torch.where(prompt, 0, -1)
        embedded = self.place(embedded if order is None else gather(embedded, order), context, kinds)
        e = embedded if self.config.is_encoder_decoder else self.encode(embedded, context)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        every_step = bool(output_feedback_states or output_hidden_states)
        self.check_steps(cache, num_feedback_steps, every_step)
        predict = predict or self.predict
        readout = Readout(self.decode, embed_output or self.feed_tokens(predict, embedded), predict)
        start = self.start_of(feedback_state, e, order, cache)
        looped = self.loop(e, context, readout, num_feedback_steps, every_step, start)
        if cache is not None:
            cache.advance(context, keep_mask=self.has_attention)

        if by_position:
            keeps = cache is not None and not self.has_attention
            kept = (
                FeedbackState(looped.states[-1], None, cast(FeedbackCache, cache).position_state()) if keeps else None
            )
            looped = looped._replace(state=kept)

        def put_back(state: FeedbackState) -> FeedbackState:
            if by_position:
                return state._replace(h=scatter(state.h, order))
            return state.map(lambda x: scatter(x, order))

        def back(x: Tensor) -> Tensor:
            return (x if order is None else scatter(x, order))[:, -text:]

        outputs = tuple(back(y) for y in looped.outputs)
        hidden = None
        if output_hidden_states:
            hidden = (*(back(x) for x in (embedded, e, *looped.states)), outputs[-1])
        return FeedbackModelOutput(
            last_hidden_state=outputs[-1],
            past_key_values=returned,
            hidden_states=hidden,
            feedback_states=outputs if len(outputs) > 1 or every_step else None,
            num_feedback_steps=None if looped.num_steps is None else back(looped.num_steps),
            halting_probabilities=looped.probabilities and tuple(back(p) for p in looped.probabilities),
            halting_loss=None if looped.halting_loss is None else back(looped.halting_loss),
            halting_logits=looped.halting_logits,
        ).with_state(
            looped.state if order is None or looped.state is None else put_back(looped.state),
            positions_mask=mask,
            grid=grid,
        )

    def with_prefix(
        self, embedded: Tensor, attention_mask: Tensor | None, prefix_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return a prefix and the embeddings, [B, P + T, D], and their mask."""
        batch, number = len(embedded), self.config.num_prefix_tokens
        ids = embedded.new_zeros(batch, dtype=torch.long) if prefix_ids is None else prefix_ids
        if ids.shape != (batch,):
            raise ValueError(f"prefix_ids have the shape {[*ids.shape]}: give a number for each row, [{batch}].")
        prefix = cast(nn.Embedding, self.prefixes)(ids)
        prefix = nn.functional.pad(prefix, (0, number * self.config.hidden_size - prefix.shape[1]))
        embedded = torch.cat([prefix.unflatten(1, (number, -1)).to(embedded.dtype), embedded], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(batch, number), attention_mask], dim=1)
        return embedded, attention_mask
