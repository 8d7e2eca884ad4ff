"""Parts that the heads share: the readout of y, the projection that feeds a prediction back, the loss over steps.

Shapes: B batch, T positions, D hidden size, V vocabulary, L labels, K feedback steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.utils import logging

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import BACKBONES, family_member
from .feedback_cache import FeedbackCache
from .feedback_calls import FeedbackModelOutput, StatefulOutput
from .feedback_layers import dropout
from .feedback_modalities import INPUTS
from .feedback_objectives import (
    Losses,
    check_classes,
    check_shape,
    losses_of_units,
    row_means,
    rows_right,
    token_loss,
    token_mean,
    total_loss,
)
from .feedback_pretrained import FeedbackPreTrainedModel
from .modeling_feedback import FeedbackModel

logger = logging.get_logger(__name__)


@dataclass
class FeedbackOutput(StatefulOutput):
    """
    Args:
        loss: [], where labels were given.
        logits: their shape is told by the head.
        past_key_values, hidden_states, feedback_states, num_feedback_steps, halting_logits: as in
            FeedbackModelOutput.
        pooling_mask: [B, T], 1 where a classifier of texts pools, with `output_feedback_states=True`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FeedbackCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None
    pooling_mask: Tensor | None = None
    halting_logits: tuple[Tensor, ...] | None = None


class FeedbackHead(FeedbackPreTrainedModel):
    """Hold a FeedbackModel, and check that its config suits the head; a subclass adds the readout."""

    accepts_loss_kwargs = True  # Trainer gives the number of targets of a batch, `num_items_in_batch`
    needs: dict[str, Any] = {}  # fields that the config must have
    reads = "input_ids"  # what its input takes
    axes = 1  # of the grid of its input
    takes_encoders = True  # whether its input may be a pretrained encoder, which has no grid and no table of tokens
    can_be_right = True  # whether a prediction is right or wrong, which halting of whole sequences learns
    embed_output: Callable[[Tensor], Tensor] | None = None  # y [B, T, D] -> its prediction, fed back; None for tokens

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        needs = {"is_encoder_decoder": False, **self.needs}
        for name, value in needs.items():
            given = getattr(config, name)
            if given != value:
                head = type(self).__name__
                raise ValueError(f"{head} needs {name}={value!r}, not {given!r}: set it in the config.")
        self.check_input(config.input_config)
        if config.halting_scope == "sequence" and not self.can_be_right:
            raise ValueError(
                f"halting_scope='sequence' learns whether an answer is right, and a {type(self).__name__} predicts "
                "numbers, which are never quite right: use halting_scope='position'."
            )
        self.model = FeedbackModel(config)

    def check_input(self, fields: Any) -> None:
        """Reject an input that does not take what this head is given."""
        part = INPUTS[fields.type]
        grid = part.axes == self.axes or (part.axes == 0 and self.takes_encoders)
        if part.takes_of(fields)[0] != self.reads or not grid:
            asked = self.reads, self.axes
            fit = " or ".join(repr(each) for each, part in INPUTS.items() if (part.takes[0], part.axes) == asked)
            raise ValueError(f"{type(self).__name__} reads {self.reads}: set input_config={fit}, not {fields.type!r}.")

    def feedback_projection(self, size: int) -> nn.Linear | None:
        """The linear map [..., size] -> [..., D] of a prediction, where the real output is fed back."""
        if self.config.feedback_signal != "output":
            return None
        return nn.Linear(size, self.config.hidden_size, bias=False)

    def predict(self, y: Tensor) -> Tensor:
        """Return the logits [B, T, V] at each position of y [B, T, D]."""
        raise NotImplementedError

    def step_logits(self, outputs: Any) -> list[Tensor]:
        """Return the logits after each feedback step, K tensors of the shape of the head's logits.

        Args:
            outputs: what the head returned with `output_feedback_states=True`.
        """
        if outputs.feedback_states is None:
            raise ValueError("These outputs hold one step only: call the model with output_feedback_states=True.")
        return [self.step_logit(y, outputs) for y in outputs.feedback_states]

    def step_logit(self, y: Tensor, outputs: Any) -> Tensor:
        """Return the logits of y [B, T, D], one of `outputs.feedback_states`."""
        return self.predict(y)

    def run(self, supervised: bool, **inputs: Any) -> FeedbackModelOutput:
        """Run the model on `inputs`, and feed this head's prediction back where the config says so.

        Args:
            supervised: whether a loss will be taken, which may read every step.
        """
        config = self.config
        if supervised and self.training and config.supervision == "all":
            inputs["output_feedback_states"] = True
        if (
            not supervised
            and self.training
            and (config.supervision == "all" or config.halting in ("learned", "act", "select"))
        ):
            logger.warning_once(
                "No labels in training, as under Trainer's label smoothing: a loss that is taken outside of the model "
                "reads its last pass alone, and teaches neither halting nor earlier passes."
            )
        return self.model(**inputs, embed_output=self.embed_output, predict=self.predict, return_dict=True)

    def total_loss(self, losses: Losses, outputs: FeedbackModelOutput) -> Tensor:
        """Return the loss of a call, of the config's objective."""
        total = total_loss(self.config, losses, outputs, self.training)
        feedback = getattr(self, "feedback", None)
        if feedback is not None and self.training:  # a single pass doesn't read it, and DDP waits for its gradient
            total = total + 0 * sum(p.sum() for p in feedback.parameters() if p.requires_grad)
        return total


class FeedbackGenerationMixin(GenerationMixin):
    """Make generate() work with a FeedbackCache, which the model makes itself at the first step."""

    model: FeedbackModel
    config: FeedbackConfig
    training: bool

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Read `num_feedback_steps` of a GenerationConfig as an argument of the model; else as in transformers."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if self.training and self.model.loop.gradient_checkpointing:  # no cache is made, so each step has to read all
            config.use_cache = False
        if (steps := getattr(config, "num_feedback_steps", None)) is not None:
            model_kwargs.setdefault("num_feedback_steps", steps)
        return config, model_kwargs

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Leave the positions to the model: it counts the real ones, also where a text goes on behind padding."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Give a written token the type 0 where 1 is of the prompt; transformers repeats the last type."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if self.config.prefix_lm and (types := model_kwargs.get("token_type_ids")) is not None:
            model_kwargs["token_type_ids"] = torch.cat([types[:, :-1], torch.zeros_like(types[:, -1:])], dim=1)
        return model_kwargs

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        """Reject a cache that has read the whole prompt: nothing would be left to predict from."""
        cache, given = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        mask = model_kwargs.get("decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask")
        prompt = max(x.shape[1] for x in (input_ids, given, mask) if x is not None)
        if cache is not None and 0 < prompt <= (read := cache.get_seq_length()):
            raise ValueError(
                f"The cache holds {read} positions and the prompt has no more, {prompt}: give at least one token that "
                "it has not read, or leave past_key_values out."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Read a text anew that outgrows the short factors of Phi-3's `longrope`; else as in transformers."""
        rope = getattr(self.config.backbone_config, "rope_parameters", None) or {}
        short = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        if short and past_key_values is not None and past_key_values.get_seq_length() <= short < input_ids.shape[1]:
            past_key_values = next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, **kwargs
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which generate_batch and cache_implementation='paged' end in."""
        raise ValueError(
            "Continuous batching pages keys and values, and a feedback model keeps states too: use generate() on a "
            "padded batch instead."
        )


class FeedbackLMHead(FeedbackHead):
    """Read logits over the vocabulary."""

    takes_encoders = False
    more_arguments = ("num_items_in_batch", "shift_labels", "ignore_index")
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        family = BACKBONES[config.backbone_config.model_type]
        if family.lm_head is None or config.retrofitted_from is not None:
            self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            head = family_member(config.backbone_config.model_type, family.prefix + family.lm_head)
            self.lm_head = head(config.backbone_config)
            self._tied_weights_keys = {
                "lm_head.decoder.weight": "model.embeddings.embed_tokens.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            }
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that has a row for each token."""
        return getattr(self.lm_head, "decoder", self.lm_head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace what `get_output_embeddings` returns."""
        if self.get_output_embeddings() is self.lm_head:
            self.lm_head = new_embeddings
        else:
            self.lm_head.decoder, self.lm_head.bias = new_embeddings, cast(Any, new_embeddings.bias)

    def predict(self, y: Tensor) -> Tensor:
        logits, config = self.lm_head(y), self.config
        cap = getattr(config.backbone_config, "final_logit_softcapping", None) if config.retrofitted_from else None
        return logits if cap is None else cap * torch.tanh(logits / cap)  # of Gemma

    def read(
        self,
        outputs: FeedbackModelOutput,
        labels: Tensor | None,
        targets: Tensor | None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """Return the logits [B, T, V] of the last step, and the loss.

        Args:
            targets: [B, T], the label that each position predicts.
            kwargs: num_items_in_batch and ignore_index, for transformers' loss function.
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.predict(outputs.last_hidden_state[:, keep]), None
        if targets is not None:
            size = self.config.vocab_size
            check_shape(targets, logits)
            check_classes(targets, "vocab_size", size, kwargs.get("ignore_index", -100))

            def predict(y: Tensor) -> Tensor:
                return logits if y is outputs.last_hidden_state else self.predict(y[:, keep])

            def step_loss(y: Tensor) -> Tensor:
                return self.loss_function(
                    logits=predict(y), labels=labels, vocab_size=size, shift_labels=targets, **kwargs
                )

            def weighted(y: Tensor, p: Tensor) -> Tensor:
                return token_loss(predict(y), p[:, keep], targets, **kwargs)

            def mean(x: Tensor) -> Tensor:
                return token_mean(x[:, keep], targets, **kwargs)

            def right(y: Tensor) -> Tensor:
                return rows_right(predict(y), targets, kwargs.get("ignore_index", -100))

            loss = self.total_loss(Losses(step_loss, weighted, mean, right), outputs)
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
            halting_logits=outputs.halting_logits,
        ).with_state(outputs.feedback_state)


class FeedbackClassifier(FeedbackHead):
    """Read `num_labels` numbers linearly; a subclass says what it reads and pools."""

    # PEFT trains and saves beside adapters what ends with this name: the readout, and what feeds its prediction back.
    readout_name = "classifier"
    pools = True  # whether it makes one prediction for a row
    class_weights: Tensor | None = None  # [L] factors of the losses of rows by their class
    renamed = {r"^feedback\.": "feedback_classifier."}

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.num_labels = self.num_outputs(config)
        if config.halting_measure == "prediction" and not self.single_label:
            raise ValueError("halting_measure='prediction' compares a choice among classes: use 'state'.")
        self.add_module(self.readout_name, nn.Linear(config.hidden_size, self.num_labels))
        self.add_module(f"feedback_{self.readout_name}", self.feedback_projection(self.num_labels))
        self.post_init()

    @property
    def feedback(self) -> Any:
        return getattr(self, f"feedback_{self.readout_name}")

    @property
    def single_label(self) -> bool:
        """Tell whether a prediction is a choice among classes, as far as the config says."""
        kind = self.config.problem_type
        return kind == "single_label_classification" or (kind is None and self.num_labels > 1)

    def num_outputs(self, config: FeedbackConfig) -> int:
        return len(cast(dict, config.id2label))

    def predict(self, y: Tensor) -> Tensor:
        return getattr(self, self.readout_name)(y)

    def step_logit(self, y: Tensor, outputs: Any) -> Tensor:
        return self.pooled_logits(y, outputs.pooling_mask) if self.pools else self.predict(y)

    def embed_output(self, y: Tensor) -> Tensor:
        """Return a linear map of the prediction at every position: of probabilities, or of the numbers predicted."""
        logits = self.predict(y)
        if self.config.problem_type == "multi_label_classification":
            return self.feedback(logits.sigmoid())
        numbers = self.num_labels == 1 or self.config.problem_type == "regression"
        return self.feedback(logits if numbers else logits.softmax(-1))

    def set_problem_type(self, labels: Tensor | None, given: Tensor | None) -> None:
        """Set the `problem_type` that the labels of a call tell, before a prediction is fed back.

        Args:
            labels: [B] classes or numbers, or [B, L] numbers.
            given: the input of the call, [B, ...].

        Raises:
            ValueError: the labels are not those of the problem, which then is not set.
        """
        if labels is None or given is None:
            return
        batch = given.shape[0]
        size, floats, told = self.num_labels, labels.is_floating_point(), self.config.problem_type
        multi, single = "multi_label_classification", "single_label_classification"
        problem = told or ("regression" if size == 1 else multi if floats else single)
        if problem == multi and not floats:
            raise ValueError("Labels of a multi-label problem are numbers, 0. or 1.: give labels.float().")
        one_class = problem == single and not floats
        one_number = one_class or size == 1
        shapes = [[batch], [batch, 1]] if one_number else [[batch, size]]
        if [*labels.shape] not in shapes:
            advice = "class for each row" if one_class else "number for each output of each row"
            if told is None and one_class:
                advice += ", or labels.float() for several classes at once"
            elif told is None and not one_number:
                advice += ", or labels.long() for classes; one number for each row needs num_labels=1"
            raise ValueError(
                f"labels have the shape {[*labels.shape]} and the logits {[batch, size]}: give one {advice}."
            )
        if one_class:
            check_classes(labels, "num_labels", size)
        self.config.problem_type = cast(Any, problem)

    def pool(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last real position of each row where causal, the mean of the real ones otherwise, [B, D]."""
        if mask is None:
            return y[:, -1] if self.config.is_causal else y.mean(dim=1)
        mask = mask[:, -y.shape[1] :].to(y.device)
        if self.config.is_causal:
            last = (mask * torch.arange(1, y.shape[1] + 1, device=y.device)).argmax(dim=1)
            return y[torch.arange(y.shape[0], device=y.device), last]
        return (y * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def first(self, y: Tensor) -> Tensor:
        """Return the first position of y [B, T, D] as a retrofitted BERT or RoBERTa reads it, [B, D]."""
        backbone, pooler = self.config.backbone_config, cast(nn.Module, self.model.pooler)
        p = backbone.hidden_dropout_prob if backbone.classifier_dropout is None else backbone.classifier_dropout
        y = y[:, :1]
        if backbone.model_type == "roberta":  # whose classifier drops out on both sides of what stands for a pooler
            y = dropout(y, p, self.training)
        return dropout(pooler(y), p, self.training)

    def pooled_logits(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits [B, L] of the rows of y [B, T, D]."""
        return self.predict(self.pool(y, mask) if self.model.pooler is None else self.first(y))

    def classify(
        self,
        outputs: FeedbackModelOutput,
        labels: Tensor | None,
        mask: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FeedbackOutput:
        """Return one prediction for each row, logits [B, L], and the loss of `config.problem_type`.

        A batch that comes in parts, to several processes or one after the other, has `num_items_in_batch` labels. The
        losses of its parts add up to the mean over all of it, also where they have unequal numbers of rows.
        """
        logits, loss = self.pooled_logits(outputs.last_hidden_state, mask), None
        if labels is not None:
            one_class = self.single_label and not labels.is_floating_point()
            targets = (labels.flatten() if one_class else labels.float()).to(logits.device)
            known = targets[:, None] != -100 if one_class else torch.ones_like(logits, dtype=torch.bool)

            def units(y: Tensor) -> Tensor:
                """Return the loss of each row, [B, 1], or of each of its numbers, [B, L]."""
                made = self.pooled_logits(y, mask).float()
                if one_class:
                    weights = None if self.class_weights is None else self.class_weights.to(made)
                    return F.cross_entropy(made, targets, weights, reduction="none")[:, None]
                error = F.mse_loss if self.config.problem_type == "regression" else F.binary_cross_entropy_with_logits
                return error(made, targets.view_as(made), reduction="none")

            def right(y: Tensor) -> Tensor:
                return (self.pooled_logits(y, mask).argmax(-1) == targets) | (targets == -100)

            if self.training and outputs.halting_logits is not None and not one_class:
                raise ValueError("halting_scope='sequence' learns whether a class is right: use halting='fixed'.")
            losses = losses_of_units(
                units,
                known,
                read=lambda x: self.pool(x[..., None], mask),
                over=lambda x: row_means(x, mask)[:, None],
                count=num_items_in_batch,
                right=right,
            )
            loss = self.total_loss(losses, outputs)
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
            halting_logits=outputs.halting_logits,
            pooling_mask=None if outputs.feedback_states is None else mask,
        ).with_state(outputs.feedback_state, positions_mask=outputs.positions_mask, grid=outputs.grid)
