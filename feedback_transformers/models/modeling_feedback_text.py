"""Text heads. Shapes: B batch, T positions, V vocabulary, L labels.

All take `num_feedback_steps`, `output_hidden_states` and `output_feedback_states`, as FeedbackModel does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_feedback import FeedbackConfig
from .feedback_cache import FeedbackCache
from .feedback_padding import behind_padding
from .modeling_feedback_heads import (
    FeedbackClassifier,
    FeedbackGenerationMixin,
    FeedbackLMHead,
    FeedbackOutput,
    check_classes,
    check_shape,
    row_means,
    token_loss,
    token_mean,
)

# Trainer's label smoothing looks here for the models whose labels it has to shift. This file travels with checkpoints.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["feedback"] = "FeedbackForCausalLM"


class FeedbackForCausalLM(FeedbackLMHead, FeedbackGenerationMixin):
    """Next-token prediction."""

    needs = {"is_causal": True}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_feedback_steps: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """labels [B, T] are shifted here, -100 is left out; logits are [B, T, V], or of the last `logits_to_keep`."""
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_feedback_steps=num_feedback_steps,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
        )
        if attention_mask is not None and isinstance(logits_to_keep, int):
            hidden = behind_padding(attention_mask)
            if labels is not None:
                labels = labels.masked_fill(hidden[:, -labels.shape[1] :].to(labels.device), -100)
            if (shifted := kwargs.get("shift_labels")) is not None:
                hidden = F.pad(hidden, (0, 1))[:, 1:]
                kwargs["shift_labels"] = shifted.masked_fill(hidden[:, -shifted.shape[1] :].to(shifted.device), -100)
        return self.read(outputs, labels, logits_to_keep, **kwargs)


class FeedbackForMaskedLM(FeedbackLMHead):
    """Prediction of masked tokens, from both sides."""

    needs = {"is_causal": False}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """labels [B, T], -100 where not predicted; logits [B, T, V]."""
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self.read(outputs, labels, **kwargs, shift_labels=labels)  # they stand beside their logits


class FeedbackForSequenceClassification(FeedbackClassifier):
    """Single-label, multi-label (BCE) or regression (MSE), by `config.problem_type`."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """labels: [B] classes or numbers, or [B, L]; logits [B, L]. Without a mask, pad_token_id tells the padding. A
        retrofitted decoder does as its original: it reads at the last token that is not pad_token_id, whatever the
        mask says, and masks nothing where there is none."""
        self.set_problem_type(labels)
        mask = attention_mask
        pad, as_original = self.config.pad_token_id, self.config.retrofitted_from and self.config.is_causal
        if input_ids is not None and pad is not None and (mask is None or as_original):
            mask = (input_ids != pad).long()
            if attention_mask is None and not self.config.retrofitted_from:
                attention_mask = mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        outputs = self.run(labels is not None, **{**kwargs, **inputs, "use_cache": False})
        return self.classify(outputs, labels, mask, kwargs.get("num_items_in_batch"))


class FeedbackForTokenClassification(FeedbackClassifier):
    """A class for every token."""

    def __init__(self, config: FeedbackConfig) -> None:
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"A token has one class here, and problem_type is {config.problem_type!r}: set it to None in the "
                "config."
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """labels [B, T], -100 where left out; logits [B, T, L]."""
        if labels is not None:
            check_classes(labels, "num_labels", self.num_labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        outputs = self.run(labels is not None, **{**kwargs, **inputs, "use_cache": False})
        logits, loss = self.classifier(outputs.last_hidden_state), None
        if labels is not None:
            check_shape(labels, logits)
            loss = self.mean_loss(
                lambda y: self.loss_function(self.classifier(y), labels, self.config, **kwargs),
                outputs,
                lambda y, p: token_loss(self.classifier(y), p, labels, shift_labels=labels, **kwargs),
                lambda x: token_mean(x, labels, shift_labels=labels, **kwargs),
            )
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        )


@dataclass
class FeedbackQuestionAnsweringOutput(ModelOutput):
    """loss [], start_logits and end_logits [B, T], and what FeedbackModelOutput carries."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None


class FeedbackForQuestionAnswering(FeedbackClassifier):
    """The start and the end of an answer in the text."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides itself
    needs = {"halting_measure": "state"}  # classes are positions here, and no position has a prediction of its own
    learns_to_halt = False
    readout_name = "qa_outputs"
    renamed = {r"^classifier\.": "qa_outputs.", r"^feedback\.": "feedback_qa_outputs."}

    def num_outputs(self, config: FeedbackConfig) -> int:
        return 2

    def embed_output(self, y: Tensor) -> Tensor:
        """Start and end are chosen among positions, so each position feeds back its two scores."""
        return self.feedback(self.predict(y).sigmoid())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> FeedbackQuestionAnsweringOutput:
        """start_positions and end_positions [B]"""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        given = start_positions is not None and end_positions is not None
        outputs = self.run(given, **{**kwargs, **inputs, "use_cache": False})

        def step_loss(y: Tensor) -> Tensor:
            start, end = self.predict(y).unbind(-1)
            return self.loss_function(start, end, start_positions, end_positions)

        start, end = self.predict(outputs.last_hidden_state).unbind(-1)
        return FeedbackQuestionAnsweringOutput(
            loss=self.mean_loss(step_loss, outputs, mean=lambda x: row_means(x, attention_mask).mean())
            if given
            else None,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        )
