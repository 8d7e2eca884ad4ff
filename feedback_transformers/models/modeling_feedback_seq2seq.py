"""Sequence to sequence: the encoder reads a source; the loop writes the target and attends to it at every step.

Shapes: B batch, S source positions, T target positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from .configuration_feedback import FeedbackConfig
from .feedback_cache import FeedbackCache
from .feedback_calls import StatefulOutput, check_positions, named_arguments
from .feedback_objectives import check_classes
from .feedback_states import FeedbackState
from .modeling_feedback import FeedbackModel
from .modeling_feedback_heads import FeedbackGenerationMixin, FeedbackLMHead


@dataclass
class FeedbackSeq2SeqOutput(StatefulOutput):
    """
    Args:
        loss: [], where labels were given.
        logits: [B, T, V].
        past_key_values, feedback_states, num_feedback_steps: as in FeedbackModelOutput, of the target.
        decoder_hidden_states: as `hidden_states` of FeedbackModelOutput, of the target.
        encoder_last_hidden_state: [B, S, D], what the target attends to.
        encoder_hidden_states: the embeddings of the source and the encoder's output, each [B, S, D], with
            `output_hidden_states=True`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FeedbackCache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None

    @property
    def hidden_states(self) -> tuple[Tensor, ...] | None:
        """Return `decoder_hidden_states` by its name in 0.1.0."""
        warnings.warn("Read decoder_hidden_states instead of hidden_states.", FutureWarning, stacklevel=2)
        return self.decoder_hidden_states


@dataclass
class SourceOutput(BaseModelOutput):
    """A source's states [B, S, D], and which of its positions are real, [B, S], where its input knows it."""

    positions_mask: Tensor | None = None


class SourceEncoder:
    """Encode the source for generate(), which calls this as the model's encoder."""

    def __init__(self, model: FeedbackModel) -> None:
        self.model = model

    @property
    def main_input_name(self) -> str:
        return self.model.source.takes[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SourceOutput:
        source, given = self.model.source, {"input_ids": input_ids, **kwargs}
        reads_mask = source.axes == 1 or "attention_mask" in source.takes or inputs_embeds is not None
        if not reads_mask:  # generate() makes one of whatever it is given
            attention_mask = None
        raw = {name: given.get(name) for name in source.takes if name != "attention_mask"}
        embedded, encoded, mask = self.model.encode_source(attention_mask, inputs_embeds, **raw)
        if output_hidden_states is None:
            output_hidden_states = self.model.config.output_hidden_states
        return SourceOutput(encoded, (embedded, encoded) if output_hidden_states else None, positions_mask=mask)

    __call__ = forward


class FeedbackForConditionalGeneration(FeedbackLMHead, FeedbackGenerationMixin):
    """Write a target given a source: translation, summarization, captions of images.

    The config has `is_encoder_decoder=True`, and `source_config` where the source is no text of the same vocabulary.
    """

    needs = {"is_encoder_decoder": True}

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.main_input_name = self.model.source.takes[0]
        if self.main_input_name not in ("input_ids", "pixel_values"):
            raise ValueError(
                f"A source of {config.source_type} takes {self.main_input_name}, which this class does not read yet: "
                "use tokens or images."
            )

    def get_encoder(self, modality: str | None = None) -> SourceEncoder:
        return SourceEncoder(self.model)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the labels [B, T] behind a start token, -100 turned to padding.

        The start token stands right before the first label, also where padding stands before that.
        """
        if self.config.decoder_start_token_id is None or self.config.pad_token_id is None:
            raise ValueError(
                "Set decoder_start_token_id and pad_token_id in the config to make decoder inputs of labels."
            )
        pad, start = self.config.pad_token_id, self.config.decoder_start_token_id
        shifted = torch.cat([labels.new_full((len(labels), 1), pad), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, pad).scatter(1, first_label(labels), start)

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin the target with a text that a processor gives beside images, behind a start token and padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id or 0
        text, read = model_kwargs.get("input_ids"), self.model.source.takes
        if text is not None and start is not None and not {"input_ids", "attention_mask"} & set(read):
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones_like(text) if mask is None or mask.shape != text.shape else mask
            rows = [text.new_tensor([start, *row[real.bool()]]).long() for row, real in zip(text, mask, strict=True)]
            model_kwargs["decoder_input_ids"] = pad_sequence(rows, True, pad, "left")
            del model_kwargs["input_ids"]
        return super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )

    def target_mask(self, decoder_input_ids: Tensor) -> Tensor | None:
        """Return the mask [B, T] of padding before the start token, where that token is another one than padding."""
        pad = self.config.pad_token_id
        if pad is None or self.config.decoder_start_token_id in (None, pad):
            return None
        return (decoder_input_ids != pad).cumsum(dim=1) > 0

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        labels: Tensor | None = None,
        num_feedback_steps: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        feedback_state: FeedbackState | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FeedbackSeq2SeqOutput:
        """Return logits [B, T, V] of the target, and the loss over labels [B, T], which stand beside their logits.

        Args:
            input_ids / inputs_embeds: the source, [B, S] or [B, S, D], or `encoder_outputs` of an earlier call.
            attention_mask: [B, S], of a source of tokens.
            pixel_values / pixel_mask: a source of images, [B, C, H, W], and its real pixels, [B, H, W].
            decoder_input_ids / decoder_inputs_embeds: the target behind a start token, [B, T] or [B, T, D]; made of
                labels where both are left out.
            decoder_attention_mask: [B, T] or [B, P + T]; where left out, padding before the start token is masked.
            kwargs: `ignore_index`, -100 where left out.
        """
        if encoder_outputs is None:
            raw = {"input_ids": input_ids, "pixel_values": pixel_values, "pixel_mask": pixel_mask}
            for name, value in raw.items():
                if value is not None and name not in self.model.source.takes:
                    raise ValueError(f"The source is {self.main_input_name}, so {name} is not read: leave it out.")
            encoder_outputs = self.get_encoder()(
                input_ids,
                attention_mask,
                inputs_embeds,
                output_hidden_states,
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
            )
        source = encoder_outputs[0]
        known = getattr(encoder_outputs, "positions_mask", None)
        if known is not None:
            attention_mask = known
        elif self.model.source.axes != 1 and attention_mask is not None and attention_mask.shape != source.shape[:2]:
            attention_mask = None  # generate() makes one of whatever it is given
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("Give decoder_input_ids or labels: the target to score or to learn.")
            check_classes(labels, "vocab_size", self.config.vocab_size)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None:
                columns = torch.arange(labels.shape[1], device=labels.device)
                decoder_attention_mask = columns >= first_label(labels)
        elif decoder_attention_mask is None and decoder_input_ids is not None and past_key_values is None:
            decoder_attention_mask = self.target_mask(decoder_input_ids)
        target = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        rows, length, sources = target.shape[0], target.shape[1], source.shape[0]
        if rows != sources:
            raise ValueError(f"The target has {rows} rows and the source {sources}: give a target for each source.")
        past = past_key_values.get_seq_length() if isinstance(past_key_values, FeedbackCache) else 0
        check_positions("attention_mask", attention_mask, sources, (source.shape[1],))
        check_positions("decoder_attention_mask", decoder_attention_mask, rows, (length, past + length))
        outputs = self.run(
            labels is not None,
            input_ids=decoder_input_ids,
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            encoder_hidden_states=source,
            encoder_attention_mask=attention_mask,
            num_feedback_steps=num_feedback_steps,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            feedback_state=feedback_state,
        )
        read = self.read(outputs, labels, labels, logits_to_keep, num_items_in_batch=num_items_in_batch, **kwargs)
        return FeedbackSeq2SeqOutput(
            loss=read.loss,
            logits=read.logits,
            past_key_values=read.past_key_values,
            decoder_hidden_states=read.hidden_states,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs[1] if len(encoder_outputs) > 1 else None,
            feedback_states=read.feedback_states,
            num_feedback_steps=read.num_feedback_steps,
        ).with_state(read.feedback_state)


def first_label(labels: Tensor) -> Tensor:
    """Return the column [B, 1] of the first label of each row of labels [B, T] that is not -100; 0 where none is."""
    return (labels != -100).long().argmax(dim=1, keepdim=True)
