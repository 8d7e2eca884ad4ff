"""Retrofit: a pretrained feed-forward model becomes a feedback model, and back.

    model = retrofit("HuggingFaceTB/SmolLM2-135M", encoder_layers=8, decoder_layers=8, num_feedback_steps=4)

Its first layers are the encoder, its middle layers the cell, its last layers the decoder; the connection between
them begins closed, so that the model computes what it did before, for any number of steps, until it is trained
(McLeish et al. 2025, Teaching pretrained language models to think deeper with retrofitted recurrence).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, logging

from .models.configuration_feedback import FeedbackConfig
from .models.feedback_backbones import BACKBONES
from .models.feedback_layers import layer_kind
from .models.feedback_names import BIDIRECTIONAL_TYPES, RETROFIT_TYPES, SHARED_WITH_BACKBONE
from .models.modeling_feedback import FeedbackModel, FeedbackPreTrainedModel
from .models.modeling_feedback_text import FeedbackForCausalLM, FeedbackForSequenceClassification
from .quantized import beside_weights, keep_quantized

logger = logging.get_logger(__name__)

# The ending of the original's class -> the class it becomes.
HEADS: dict[str, type[FeedbackPreTrainedModel]] = {
    "ForCausalLM": FeedbackForCausalLM,
    "LMHeadModel": FeedbackForCausalLM,  # of GPT-2
    "ForSequenceClassification": FeedbackForSequenceClassification,
    "Model": FeedbackModel,
}
AUTOS = (transformers.AutoModel, transformers.AutoModelForCausalLM)  # where the config names none
KEPT = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type")


def retrofit(
    model: str | Path | PreTrainedModel,
    encoder_layers: int,
    decoder_layers: int = 0,
    num_feedback_steps: int = 4,
    axis: str = "depth",
    **fields: Any,
) -> FeedbackPreTrainedModel:
    """A feedback model out of `model`, whose weights the two share.

    They are the same tensors: what changes or freezes those of one does so in the other. Adapters leave them alone
    until they are merged; to merge them, to train all of the weights, or to resize the embeddings, give a copy
    (`copy.deepcopy(model)`) if the original is still to be used.

    Args:
        model: a name on the Hub, a folder, or a model in memory: of a language model, a sequence classifier, or a
            base model. It is left as it is.
        encoder_layers: how many of the first layers run once, before the loop.
        decoder_layers: how many of the last layers run once, after it.
        num_feedback_steps: passes of the layers between.
        axis: `depth`: every pass reads the state of the pass before, at its own position. `time`: that of the
            position before, in parallel passes (`solver="jacobi"`).
        fields: any other of FeedbackConfig; `feedback_connection` is `gate` by default.

    Raises:
        ValueError: for another family than RETROFIT_TYPES, another head, a model with adapters, or layers that leave
            none for the loop.
    """
    original = load(model) if isinstance(model, str | Path) else model
    check_shareable(original)
    config = feedback_config(original, encoder_layers, decoder_layers, num_feedback_steps, axis, fields)
    with torch.device("meta"):
        made: Any = head_of(original)(config)
    feedback = made if isinstance(made, FeedbackModel) else made.model
    base = share(original.base_model, {id(original.config): config.backbone_config})
    feedback.take_over(base)
    if isinstance(made, FeedbackForCausalLM):
        made.lm_head = share(original.get_output_embeddings())
    elif isinstance(made, FeedbackForSequenceClassification):
        take_classifier(made, original)
    materialise(made, original)
    feedback.loop.connection.close()
    keep_quantized(made, original)
    keep_checkpointing(made, original)
    if original.can_generate():
        made.generation_config = copy.deepcopy(original.generation_config)
    return made.train(original.training)


def unretrofit(model: FeedbackPreTrainedModel) -> PreTrainedModel:
    """The original class back, with the weights that the model has now; its feedback is left out.

    Bit-equal to the original as long as the model was not trained. Merge or unload adapters first.
    """
    check_shareable(model)
    config = model.config
    if not hasattr(transformers, str(getattr(config, "retrofitted_from", None))):
        raise ValueError(
            "This model was not made by retrofit of a class of transformers, so there is no other class to give back."
        )
    backbone = copy.deepcopy(config.backbone_config)
    kinds = {layer_kind(backbone, i) for i in range(backbone.num_hidden_layers)}
    if "sliding_attention" in kinds and not hasattr(type(backbone)(), "sliding_window"):
        raise ValueError(
            f"A {config.retrofitted_from} has no sliding attention: set sliding_window and layer_types of "
            "config.backbone_config to None first."
        )
    for name in ("vocab_size", *KEPT):
        setattr(backbone, name, getattr(config, name))
    with torch.device("meta"):
        original = getattr(transformers, str(config.retrofitted_from))(backbone)
    if not isinstance(model, head_of(original)):
        raise ValueError(
            f"This {type(model).__name__} was made of a {config.retrofitted_from}, which has another head: load it as "
            f"a {head_of(original).__name__} to give that back."
        )
    feedback: Any = model if isinstance(model, FeedbackModel) else model.model
    family, known = BACKBONES[backbone.model_type], {id(config.backbone_config): backbone}
    parts = {
        family.tokens: feedback.embeddings.embed_tokens,
        family.positions: feedback.positions,
        family.token_types: feedback.token_types,
        family.embedding_norm: feedback.embedding_norm,
        family.norm: feedback.norm,
        family.rotary: feedback.encoder.rotary,
        family.pooler: feedback.pooler,
        family.layers: nn.ModuleList([*feedback.encoder.layers, *feedback.loop.cell.layers, *feedback.decoder.layers]),
    }
    for path, part in parts.items():
        if path is not None and (path != family.pooler or getattr(original.base_model, path, None) is not None):
            original.base_model.set_submodule(path, share(part, known))
    if isinstance(model, FeedbackForCausalLM):
        original.set_output_embeddings(share(model.lm_head))
    elif isinstance(model, FeedbackForSequenceClassification):
        give_classifier(model, original)
    materialise(original, model)
    keep_quantized(original, model)
    keep_checkpointing(original, model)
    if original.can_generate():
        original.generation_config = copy.deepcopy(model.generation_config)
    return original.train(model.training)


def load(name: str | Path) -> PreTrainedModel:
    """The model `name`, as the class that its config names, from safetensors and without code of its own."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # without which it may ask, and wait
    check_family(config)
    default = "AutoModel" if config.model_type in BIDIRECTIONAL_TYPES else "AutoModelForCausalLM"
    names = config.architectures or [default]
    found = getattr(transformers, names[0], None)
    if config.model_type in BIDIRECTIONAL_TYPES and names[0].endswith(("ForMaskedLM", "ForPreTraining")):
        logger.warning("%s is saved as a %s: its body is retrofitted, without that head.", name, names[0])
        names, found = ["AutoModel"], AutoModel
    if len(names) > 1 or not (found in AUTOS or isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The config names {', '.join(names)}, which is not one class of a model of transformers: load the model "
            "yourself, and give it to retrofit."
        )
    return found.from_pretrained(name, use_safetensors=True)  # as a pickle could run code


def check_shareable(model: Any) -> None:
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise ValueError(f"Give a model of transformers, not this {type(model).__name__}.")
    if not isinstance(model, PreTrainedModel) or any(hasattr(part, "base_layer") for part in model.modules()):
        raise ValueError(
            f"Give a model of transformers without adapters, not this {type(model).__name__}: merge or unload them "
            "first."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Weights of this model are offloaded, so that no other can share them: load it whole.")


def check_family(config: PreTrainedConfig) -> None:
    if config.model_type not in RETROFIT_TYPES or getattr(config, "is_decoder", False):
        raise ValueError(
            f"Models of type {config.model_type} can't be retrofitted; these can: {', '.join(RETROFIT_TYPES)} "
            "(BERT and RoBERTa as encoders)."
        )
    both_sides = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    if both_sides and config.model_type not in BIDIRECTIONAL_TYPES:
        raise ValueError(
            f"This {config.model_type} reads both sides, as its family does not: it can't be retrofitted."
        )


def head_of(original: PreTrainedModel) -> type[FeedbackPreTrainedModel]:
    name, is_base = type(original).__name__, original.base_model is original
    for ending, head in HEADS.items():
        if name.endswith(ending) and (head is FeedbackModel) == is_base:
            return head
    raise ValueError(f"A {name} can't be retrofitted; classes that end with {', '.join(HEADS)} can.")


def feedback_config(
    original: PreTrainedModel, encoder_layers: int, decoder_layers: int, steps: int, axis: str, fields: dict[str, Any]
) -> FeedbackConfig:
    given = original.config
    check_family(given)
    for name, number in (("encoder_layers", encoder_layers), ("decoder_layers", decoder_layers)):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} is {number!r}; it must be a whole number of 0 or more.")
    between = given.num_hidden_layers - encoder_layers - decoder_layers
    if between < 1:
        raise ValueError(
            f"{encoder_layers} encoder and {decoder_layers} decoder layers leave {between} of "
            f"{given.num_hidden_layers} for the loop: leave at least 1."
        )
    passes = {"solver": "jacobi", "solver_steps": steps} if axis == "time" else {"num_feedback_steps": steps}
    kept = {name: getattr(given, name) for name in KEPT if getattr(given, name, None) is not None}
    if kept.get("pad_token_id", 0) < 0:  # as the first Llamas say that they have none
        del kept["pad_token_id"]
    own = {
        "backbone_config": given,
        "retrofitted_from": type(original).__name__,
        "vocab_size": given.vocab_size,
        "is_causal": given.model_type not in BIDIRECTIONAL_TYPES,
        "num_encoder_layers": encoder_layers,
        "num_feedback_layers": between,
        "num_decoder_layers": decoder_layers,
        "feedback_axis": axis,
    }
    taken = [name for name in fields if name in (*own, *SHARED_WITH_BACKBONE, "tie_word_embeddings")]
    if taken:
        raise ValueError(
            f"Leave out {', '.join(taken)}: retrofit takes that from the model, or from its other arguments."
        )
    config = FeedbackConfig(**{**kept, **own, **passes, **fields})
    known = {each.name for each in dataclasses.fields(FeedbackConfig)} - {"dtype"}
    unknown = sorted(name for name in fields if name not in known)
    if unknown:  # an argument of from_pretrained, perhaps a token, which a config would keep and publish
        raise ValueError(
            f"{', '.join(unknown)}: no field of FeedbackConfig. What from_pretrained takes, give to it, and its model "
            "to retrofit."
        )
    config._attn_implementation = given._attn_implementation
    config.backbone_config.__dict__.pop("quantization_config", None)  # keep_quantized writes it anew
    return config


def take_classifier(made: FeedbackForSequenceClassification, original: Any) -> None:
    """The readout of a classifier: of decoders a matrix, of BERT a layer behind its pooler, RoBERTa both in one."""
    head = getattr(original, "score", None) or original.classifier
    if hasattr(head, "out_proj"):
        cast(Any, made.model.pooler).dense = share(head.dense)
        head = head.out_proj
    readout = share(head)
    if readout.bias is None:
        weight: Any = original.get_input_embeddings().weight
        readout.bias = nn.Parameter(torch.zeros(readout.out_features, dtype=weight.dtype, device=weight.device))
    made.classifier = readout


def give_classifier(model: FeedbackForSequenceClassification, original: Any) -> None:
    if hasattr(original, "score"):
        if model.classifier.bias.any():
            raise ValueError(
                f"The readout has learned a bias, for which a {type(original).__name__} has no place: set "
                "model.classifier.bias to zero to give that class back without it."
            )
        original.score.weight = model.classifier.weight
    elif hasattr(original.classifier, "out_proj"):
        original.classifier.dense = share(cast(Any, model.model.pooler).dense)
        original.classifier.out_proj = share(model.classifier)
    else:
        original.classifier = share(model.classifier)


def share(module: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of the module with the same parameters and buffers; `known`: id of a part -> what takes its place."""
    kept = [*module.parameters(), *module.buffers(), *beside_weights(module)]
    return copy.deepcopy(module, {**{id(each): each for each in kept}, **(known or {})})


def keep_checkpointing(made: PreTrainedModel, like: PreTrainedModel) -> None:
    """Checkpoints what `like` does, but in the way of `made`: whole passes of a loop, not its layers."""
    if any(getattr(module, "gradient_checkpointing", False) for module in like.modules()):
        made.activation_checkpointing_enable()


def materialise(made: PreTrainedModel, like: PreTrainedModel) -> None:
    """Initialises what has no weights yet, on the device and in the type of `like`."""
    weight: Any = like.get_input_embeddings().weight
    for module in made.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device=weight.device, recurse=False)
            module.to(weight.dtype)
            made._init_weights(module)
