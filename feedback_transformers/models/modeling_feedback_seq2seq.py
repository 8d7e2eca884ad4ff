"""Sequence to sequence: the encoder reads a source, the loop writes the target and attends to it at every step.

Shapes: B batch, S source positions, T target positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .feedback_cache import FeedbackCache
from .modeling_feedback import FeedbackModel
from .modeling_feedback_heads import FeedbackGenerationMixin, FeedbackLMHead, FeedbackOutput, check_classes


class SourceEncoder:
    """What generate() calls as the model's encoder: source tokens -> BaseModelOutput."""

    main_input_name = "input_ids"

    def __init__(self, model: FeedbackModel) -> None:
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.model.encode_source(input_ids, attention_mask, inputs_embeds))

    __call__ = forward


class FeedbackForConditionalGeneration(FeedbackLMHead, FeedbackGenerationMixin):
    """Translation, summarization: p(target | source), with `config.is_encoder_decoder=True`."""

    needs = {"is_encoder_decoder": True}

    def get_encoder(self, modality: str | None = None) -> SourceEncoder:
        return SourceEncoder(self.model)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels [B, T] behind a start token, -100 turned to padding."""
        if self.config.decoder_start_token_id is None or self.config.pad_token_id is None:
            raise ValueError(
                "Set decoder_start_token_id and pad_token_id in the config to make decoder inputs of labels."
            )
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        labels: Tensor | None = None,
        num_feedback_steps: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """input_ids [B, S] or inputs_embeds [B, S, D]; decoder_input_ids [B, T] or decoder_inputs_embeds [B, T, D],
        made of labels [B, T] where both are left out; logits [B, T, V]."""
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, inputs_embeds)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("Give decoder_input_ids or labels: the target to score or to learn.")
            check_classes(labels, "vocab_size", self.config.vocab_size)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        target = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        rows, sources = target.shape[0], encoder_outputs[0].shape[0]
        if rows != sources:
            raise ValueError(f"The target has {rows} rows and the source {sources}: give a target for each source.")
        outputs = self.run(
            labels is not None,
            input_ids=decoder_input_ids,
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            num_feedback_steps=num_feedback_steps,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
        )
        # the labels stand beside their logits already: ForCausalLMLoss must not shift them again
        shifted = {} if labels is None else {"shift_labels": labels}
        return self.read(outputs, labels, logits_to_keep, **shifted, **kwargs)
