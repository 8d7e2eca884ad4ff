"""What the heads share: a readout of y, the way back of its prediction, and the loss over the supervised steps.

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
from transformers.utils import ModelOutput, logging

from .configuration_feedback import FeedbackConfig
from .feedback_cache import FeedbackCache
from .feedback_layers import dropout
from .modeling_feedback import FeedbackModel, FeedbackModelOutput, FeedbackPreTrainedModel, refuse_arguments

logger = logging.get_logger(__name__)


@dataclass
class FeedbackOutput(ModelOutput):
    """Of a head: loss [], logits (their shape is the head's), and what FeedbackModelOutput carries."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: FeedbackCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None

    @property
    def decoder_hidden_states(self) -> tuple[Tensor, ...] | None:
        """What generate() collects of a sequence-to-sequence model."""
        return self.hidden_states


class FeedbackHead(FeedbackPreTrainedModel):
    """A FeedbackModel, and the check that its config suits the head; a subclass adds the readout."""

    embedding_type = "tokens"
    needs: dict[str, Any] = {}  # fields that the config must have
    learns_to_halt = True  # whether its loss can weigh passes
    embed_output: Callable[[Tensor], Tensor] | None = None  # y [B, T, D] -> its prediction, fed back; None for tokens

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        needs = {"embedding_type": self.embedding_type, "is_encoder_decoder": False, **self.needs}
        for name, value in needs.items():
            given = getattr(config, name)
            if given != value:
                head = type(self).__name__
                raise ValueError(f"{head} needs {name}={value!r}, not {given!r}: set it in the config.")
        if config.halting == "learned" and not self.learns_to_halt:
            raise ValueError(
                f"halting='learned' weighs a loss over classes, which a {type(self).__name__} of this config has not: "
                "use 'act'."
            )
        self.model = FeedbackModel(config)

    def feedback_projection(self, size: int) -> nn.Linear | None:
        """The linear map [..., size] -> [..., D] of a prediction, where the real output is fed back."""
        if self.config.feedback_signal != "output":
            return None
        return nn.Linear(size, self.config.hidden_size, bias=False)

    def predict(self, y: Tensor) -> Tensor:
        """y [B, T, D] -> logits [B, T, V]"""
        raise NotImplementedError

    def run(self, supervised: bool, **inputs: Any) -> FeedbackModelOutput:
        """The model on `inputs`, feeding back this head's prediction where the config says so; `supervised` where a
        loss will be taken, which may be at every step."""
        config = self.config
        if supervised and self.training and config.supervision == "all":
            inputs["output_feedback_states"] = True
        if not supervised and self.training and (config.supervision == "all" or config.halting in ("learned", "act")):
            logger.warning_once(
                "No labels in training, as under Trainer's label smoothing: a loss that is taken outside of the model "
                "reads its last pass alone, and teaches neither halting nor earlier passes."
            )
        return self.model(**inputs, embed_output=self.embed_output, predict=self.predict, return_dict=True)

    def mean_loss(
        self,
        loss: Callable[[Tensor], Tensor],
        outputs: FeedbackModelOutput,
        losses: Callable[[Tensor, Tensor], Tensor] | None = None,
        mean: Callable[[Tensor], Tensor] = torch.mean,
    ) -> Tensor:
        """The mean of loss(y) over the supervised steps: the last one, as always in evaluation, or all that carry a
        gradient.

        With learned halting in training, the sum over the steps of losses(y, p), which weighs what it sums by the
        probability p [B, T] to stop there. `mean`: of what halting adds, [B, T] -> [].
        """
        if outputs.halting_probabilities is not None and losses is not None:
            states = outputs.feedback_states or (outputs.last_hidden_state,)
            steps = zip(states, outputs.halting_probabilities, strict=True)
            total = torch.stack([losses(y, p) for y, p in steps]).sum()
        else:
            supervised: tuple[Tensor, ...] = (outputs.last_hidden_state,)
            if self.training and self.config.supervision == "all" and outputs.feedback_states is not None:
                supervised = outputs.feedback_states[-(self.config.gradient_steps or 0) :]
            total = torch.stack([loss(y) for y in supervised]).mean()
        feedback_projection = getattr(self, "feedback", None)
        if (
            feedback_projection is not None and self.training
        ):  # a single pass doesn't read it, and DDP waits for its gradient
            total = total + 0 * sum(p.sum() for p in feedback_projection.parameters() if p.requires_grad)
        if outputs.halting_loss is not None:
            total = total + self.config.halting_weight * mean(outputs.halting_loss)
        return total


class FeedbackGenerationMixin(GenerationMixin):
    """generate() with a FeedbackCache, which the model makes itself at the first step."""

    model: FeedbackModel
    config: FeedbackConfig
    training: bool

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As in transformers; `num_feedback_steps` of a GenerationConfig is an argument of the model."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if self.training and self.model.loop.gradient_checkpointing:  # no cache is made, so each step has to read all
            config.use_cache = False
        if (steps := getattr(config, "num_feedback_steps", None)) is not None:
            model_kwargs.setdefault("num_feedback_steps", steps)
        return config, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, also for Phi-3's `longrope`: a text that outgrows the short factors is read anew."""
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
    """A readout over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self, *args: Any, **kwargs: Any) -> FeedbackModel:
        """All but the readout, as transformers means it; the decoder g is `model.decoder`."""
        return self.model

    def predict(self, y: Tensor) -> Tensor:
        logits, config = self.lm_head(y), self.config
        cap = getattr(config.backbone_config, "final_logit_softcapping", None) if config.retrofitted_from else None
        return logits if cap is None else cap * torch.tanh(logits / cap)  # of Gemma

    def read(
        self, outputs: FeedbackModelOutput, labels: Tensor | None, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> FeedbackOutput:
        """Logits [B, T, V] of the last step, and the loss; kwargs go to transformers' loss function."""
        refuse_arguments(kwargs)
        kwargs.pop("output_attentions", None)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.predict(outputs.last_hidden_state[:, keep]), None
        if labels is not None:
            size = self.config.vocab_size
            if kwargs.get("shift_labels", labels) is labels:  # others may be of a part of the sequence
                check_shape(labels, logits)
            check_classes(labels, "vocab_size", size, kwargs.get("ignore_index", -100))

            def predict(y: Tensor) -> Tensor:
                return logits if y is outputs.last_hidden_state else self.predict(y[:, keep])

            def step_loss(y: Tensor) -> Tensor:
                return self.loss_function(logits=predict(y), labels=labels, vocab_size=size, **kwargs)

            def weighted(y: Tensor, p: Tensor) -> Tensor:
                return token_loss(predict(y), p[:, keep], labels, **kwargs)

            def mean(x: Tensor) -> Tensor:
                return token_mean(x[:, keep], labels, **kwargs)

            loss = self.mean_loss(step_loss, outputs, weighted, mean)
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        )


def check_shape(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have the shape {[*labels.shape]} and the logits {[*logits.shape]}: give a label for each "
            "position that has logits, -100 where there is none."
        )


def check_classes(labels: Tensor, name: str, size: int, ignored: int = -100) -> None:
    """On a CPU, where it costs nothing, in words of the config; elsewhere the loss stops in its own way."""
    if (
        torch.compiler.is_compiling()
        or labels.device.type != "cpu"
        or labels.is_floating_point()
        or not labels.numel()
    ):
        return
    low, high = int(labels.masked_fill(labels == ignored, 0).min()), int(labels.max())
    if high >= size:
        raise ValueError(f"labels go up to {high} and {name} is {size}: set {name} in the config.")
    if low < 0:
        raise ValueError(f"labels go down to {low}: number them from 0, and give {ignored} where there is none.")


def token_mean(
    x: Tensor,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mean of x [B, T] over the positions with a target, as transformers' ForCausalLMLoss takes it."""
    targets = shift_labels if shift_labels is not None else F.pad(labels, (0, 1), value=-100)[:, 1:]
    here = targets.to(x.device) != -100
    return (x * here).sum() / (here.sum() if num_items_in_batch is None else num_items_in_batch)


def token_loss(
    logits: Tensor, weight: Tensor, labels: Tensor, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """transformers' ForCausalLMLoss of logits [B, T, V], each position weighted by weight [B, T]."""
    targets = shift_labels if shift_labels is not None else F.pad(labels, (0, 1), value=-100)[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return token_mean(losses * weight, labels, targets, **kwargs)


def row_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T] -> [B]: over the real positions."""
    real = torch.ones_like(x) if mask is None else mask[:, -x.shape[1] :].to(x)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)


class FeedbackClassifier(FeedbackHead):
    """A linear readout of `num_labels`; a subclass says what it reads and pools."""

    accepts_loss_kwargs = True
    # PEFT trains and saves beside adapters what ends with this name: the readout, and the way back of its prediction.
    readout_name = "classifier"
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
        """Whether a prediction is a choice among classes, as far as the config says."""
        return self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1

    @property
    def learns_to_halt(self) -> bool:  # type: ignore[override]
        return self.config.problem_type in (None, "single_label_classification")

    def num_outputs(self, config: FeedbackConfig) -> int:
        return len(cast(dict, config.id2label))

    def predict(self, y: Tensor) -> Tensor:
        return getattr(self, self.readout_name)(y)

    def embed_output(self, y: Tensor) -> Tensor:
        """A linear map of the prediction at every position: of its probabilities, or of the numbers predicted."""
        logits = self.predict(y)
        if self.config.problem_type == "multi_label_classification":
            return self.feedback(logits.sigmoid())
        numbers = self.num_labels == 1 or self.config.problem_type == "regression"
        return self.feedback(logits if numbers else logits.softmax(-1))

    def set_problem_type(self, labels: Tensor | None) -> None:
        """Sets the problem_type that transformers' loss would set of the labels, before a prediction is fed back."""
        if labels is None:
            return
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.is_floating_point():
                self.config.problem_type = "multi_label_classification"
            else:
                self.config.problem_type = "single_label_classification"
        if self.single_label:
            check_classes(labels, "num_labels", self.num_labels)

    def check_rows(self, labels: Tensor, logits: Tensor) -> None:
        """One class for each row of logits [B, L], or one number for each of its outputs."""
        if self.config.problem_type == "multi_label_classification" and not labels.is_floating_point():
            raise ValueError("Labels of a multi-label problem are numbers, 0. or 1.: give labels.float().")
        one_class = self.single_label and not labels.is_floating_point()
        if labels.numel() != (len(logits) if one_class else logits.numel()):
            raise ValueError(
                f"labels have the shape {[*labels.shape]} and the logits {[*logits.shape]}: give one "
                + ("class for each row." if one_class else "number for each output of each row.")
            )

    def pool(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, D]: the last real position where causal, the mean of the real ones otherwise."""
        if mask is None:
            return y[:, -1] if self.config.is_causal else y.mean(dim=1)
        mask = mask[:, -y.shape[1] :].to(y.device)
        if self.config.is_causal:
            last = (mask * torch.arange(1, y.shape[1] + 1, device=y.device)).argmax(dim=1)
            return y[torch.arange(y.shape[0], device=y.device), last]
        return (y * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def first(self, y: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]: the first position, as a retrofitted BERT or RoBERTa reads it."""
        backbone, pooler = self.config.backbone_config, cast(nn.Module, self.model.pooler)
        p = backbone.hidden_dropout_prob if backbone.classifier_dropout is None else backbone.classifier_dropout
        y = y[:, :1]
        if backbone.model_type == "roberta":  # whose classifier drops out on both sides of what stands for a pooler
            y = dropout(y, p, self.training)
        return dropout(pooler(y), p, self.training)

    def classify(
        self,
        outputs: FeedbackModelOutput,
        labels: Tensor | None,
        mask: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FeedbackOutput:
        """One prediction for each row: logits [B, L] and the loss of `config.problem_type`.

        A batch that comes in parts, to several processes or one after the other, has `num_items_in_batch` labels; the
        losses of its parts add up to the mean over all of it, also where they have unequal numbers of rows.
        """

        def pooled_logits(y: Tensor) -> Tensor:
            return self.predict(self.pool(y, mask) if self.model.pooler is None else self.first(y))

        logits, loss = pooled_logits(outputs.last_hidden_state), None
        if labels is not None:
            self.check_rows(labels, logits)

            def weighted(y: Tensor, p: Tensor) -> Tensor:
                if not self.single_label or labels.is_floating_point():
                    raise ValueError("halting='learned' needs a single-label problem: use 'act'.")
                losses = F.cross_entropy(pooled_logits(y).float(), labels, reduction="none")
                weight = self.pool(p[..., None], mask).squeeze(-1)
                return (losses * weight).sum() / (labels != -100).sum()

            def mean(x: Tensor) -> Tensor:
                """Over the positions of each row, then over the rows with a label."""
                rows = row_means(x, mask)
                known = (labels != -100).flatten(1).any(1) if labels.ndim > 1 else labels != -100
                return (rows * known).sum() / known.sum()

            def step_loss(y: Tensor) -> Tensor:
                return self.loss_function(labels, pooled_logits(y).float(), self.config)

            loss = self.mean_loss(step_loss, outputs, weighted, mean)
            if num_items_in_batch is not None:
                loss = loss * (labels != -100).sum() / num_items_in_batch
        return FeedbackOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=outputs.num_feedback_steps,
        )
