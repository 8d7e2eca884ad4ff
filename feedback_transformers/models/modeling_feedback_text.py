"""Text heads. Shapes: B batch, T positions, V vocabulary, L labels.

All take what FeedbackModel reads of a text: see there for `position_ids`, `token_type_ids`, `num_feedback_steps` and
the rest. Trainer gives `num_items_in_batch`, the number of targets in a batch that may come in parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_feedback import FeedbackConfig
from .feedback_cache import FeedbackCache
from .feedback_calls import StatefulOutput, named_arguments
from .feedback_objectives import (
    Losses,
    check_classes,
    check_shape,
    losses_of_units,
    row_means,
    rows_right,
    shift,
    targets_of_texts,
    token_loss,
    token_mean,
    warn_of_padding,
)
from .feedback_states import FeedbackState
from .modeling_feedback_heads import FeedbackClassifier, FeedbackGenerationMixin, FeedbackLMHead, FeedbackOutput

# Trainer's label smoothing looks here for the models whose labels it has to shift. This file travels with checkpoints.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["feedback"] = "FeedbackForCausalLM"


class FeedbackForCausalLM(FeedbackLMHead, FeedbackGenerationMixin):
    """Predict the next token."""

    needs = {"is_causal": True}

    @named_arguments
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
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """Return logits [B, T, V], or those of the last `logits_to_keep` positions, and the loss.

        labels [B, T] are shifted here, and -100 is left out. So is the first token of a text, wherever padding stands:
        the loss does not depend on the side. For a batch in several parts, and for Trainer's label smoothing, which
        takes its loss outside of the model, pad on the right or use training.DataCollatorForLeftPadding.

        Args:
            kwargs: `shift_labels` [B, T], labels that are shifted already, and `ignore_index`, -100 where left out.
        """
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_feedback_steps=num_feedback_steps,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            prefix_ids=prefix_ids,
            feedback_state=feedback_state,
        )
        targets, ignored = kwargs.pop("shift_labels", None), kwargs.get("ignore_index", -100)
        if targets is None and labels is not None:
            targets = shift(labels, ignored)
        if attention_mask is not None and isinstance(logits_to_keep, int):
            mask = attention_mask if targets is None else attention_mask[:, -targets.shape[1] :]
            if targets is None and num_items_in_batch is not None:
                warn_of_padding(mask)
            if targets is not None and mask.shape == targets.shape:
                targets, num_items_in_batch = targets_of_texts(targets, mask, num_items_in_batch, ignored)
        return self.read(outputs, labels, targets, logits_to_keep, num_items_in_batch=num_items_in_batch, **kwargs)


class FeedbackForMaskedLM(FeedbackLMHead):
    """Predict masked tokens from both sides."""

    needs = {"is_causal": False}

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """Return logits [B, T, V], and the loss over labels [B, T], -100 where nothing is to be predicted.

        Args:
            kwargs: `ignore_index`, -100 where left out.
        """
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_feedback_steps=num_feedback_steps,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            prefix_ids=prefix_ids,
            feedback_state=feedback_state,
        )
        return self.read(outputs, labels, labels, num_items_in_batch=num_items_in_batch, **kwargs)


class FeedbackForSequenceClassification(FeedbackClassifier):
    """Classify texts (one label or several, the latter by BCE), or predict numbers (MSE), by `config.problem_type`."""

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        token_type_ids: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FeedbackOutput:
        """Return logits [B, L], and the loss over labels, [B] classes or numbers, or [B, L] numbers.

        Without a mask, `pad_token_id` tells the padding. A retrofitted decoder does as its original: it reads at the
        last token that is not `pad_token_id`, whatever the mask says, and masks nothing where there is no mask.
        """
        self.set_problem_type(labels, input_ids if inputs_embeds is None else inputs_embeds)
        mask = attention_mask
        pad, as_original = self.config.pad_token_id, self.config.retrofitted_from and self.config.is_causal
        if input_ids is not None and pad is not None and (mask is None or as_original):
            mask = (input_ids != pad).long()
            if attention_mask is None and not self.config.retrofitted_from:
                attention_mask = mask
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            prefix_ids=prefix_ids,
            feedback_state=feedback_state,
        )
        return self.classify(outputs, labels, mask, num_items_in_batch)


class FeedbackForTokenClassification(FeedbackClassifier):
    """Predict a class for every token."""

    pools = False

    def __init__(self, config: FeedbackConfig) -> None:
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"A token has one class here, and problem_type is {config.problem_type!r}: set it to None in the "
                "config."
            )
        super().__init__(config)

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FeedbackCache | None = None,
        token_type_ids: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FeedbackOutput:
        """Return logits [B, T, L], and the loss over labels [B, T], -100 where left out."""
        if labels is not None:
            check_classes(labels, "num_labels", self.num_labels)
        outputs = self.run(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            prefix_ids=prefix_ids,
            feedback_state=feedback_state,
        )
        logits, loss = self.predict(outputs.last_hidden_state), None
        if labels is not None:
            check_shape(labels, logits)
            losses = Losses(
                lambda y: self.loss_function(
                    self.predict(y), labels, self.config, num_items_in_batch=num_items_in_batch
                ),
                lambda y, p: token_loss(self.predict(y), p, labels, num_items_in_batch=num_items_in_batch),
                lambda x: token_mean(x, labels, num_items_in_batch),
                lambda y: rows_right(self.predict(y), labels),
            )
            loss = self.total_loss(losses, outputs)
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
            halting_logits=outputs.halting_logits,
        ).with_state(outputs.feedback_state)


@dataclass
class FeedbackQuestionAnsweringOutput(StatefulOutput):
    """
    Args:
        loss: [], where both positions were given.
        start_logits, end_logits: [B, T].
        hidden_states, feedback_states, num_feedback_steps, halting_logits: as in FeedbackModelOutput.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None
    halting_logits: tuple[Tensor, ...] | None = None


class FeedbackForQuestionAnswering(FeedbackClassifier):
    """Predict the start and the end of an answer in the text."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides itself
    needs = {"halting_measure": "state"}  # classes are positions here, and no position has a prediction of its own
    readout_name = "qa_outputs"
    pools = False
    renamed = {r"^classifier\.": "qa_outputs.", r"^feedback\.": "feedback_qa_outputs."}

    def num_outputs(self, config: FeedbackConfig) -> int:
        return 2

    def embed_output(self, y: Tensor) -> Tensor:
        """Return a map of the two scores of each position, as start and end are chosen among positions."""
        return self.feedback(self.predict(y).sigmoid())

    @named_arguments
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        prefix_ids: Tensor | None = None,
        feedback_state: FeedbackState | None = None,
    ) -> FeedbackQuestionAnsweringOutput:
        """Return start_logits and end_logits [B, T], and the loss over start_positions and end_positions [B]."""
        if (start_positions is None) != (end_positions is None):
            raise ValueError("An answer has two ends: give start_positions and end_positions, or neither.")
        outputs = self.run(
            start_positions is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            prefix_ids=prefix_ids,
            feedback_state=feedback_state,
        )
        start, end = self.predict(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            for name, given in (("start_positions", start_positions), ("end_positions", end_positions)):
                if [*given.shape] not in ([len(start)], [len(start), 1]):
                    raise ValueError(
                        f"{name} have the shape {[*given.shape]} and the input {[*start.shape]}: give a position for "
                        "each row."
                    )

            beyond = start.shape[1]  # such a place has no target
            ends = torch.stack([start_positions.flatten(), end_positions.flatten()], dim=1).clamp(0, beyond)  # type: ignore[union-attr]
            known = ends < beyond
            counted = known / known.sum(0).clamp(min=1)  # starts and ends weigh the same

            def units(y: Tensor) -> Tensor:
                """Return the losses of start and end, [B, 2]."""
                return F.cross_entropy(self.predict(y), ends, reduction="none", ignore_index=beyond)

            def right(y: Tensor) -> Tensor:
                return ((self.predict(y).argmax(1) == ends) | ~known).all(1)

            read = partial(row_means, mask=attention_mask)
            losses = losses_of_units(units, counted, lambda x: read(x)[:, None], right=right)
            loss = self.total_loss(losses, outputs)
        return FeedbackQuestionAnsweringOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
            halting_logits=outputs.halting_logits,
        ).with_state(outputs.feedback_state)
