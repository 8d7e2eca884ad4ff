"""Rules that a FeedbackConfig has to keep; a broken one is an error that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .feedback_names import (
    BIDIRECTIONAL_TYPES,
    BOTH_SIDES,
    CHOICES,
    DIAGONAL_TYPES,
    RECURRENT_TYPES,
    SPLIT_NORMS,
    shared_names,
)
from .feedback_unread import unread

logger = logging.get_logger(__name__)

FORMAT = 3  # of checkpoints; FeedbackConfig.from_dict migrates older ones
LARGEST = 2**31  # sizes and numbers of steps stay far below
MOST_LAYERS = 10_000  # configs of transformers hold a list with an entry for each layer
ATTENTIONS = ("full_attention", "sliding_attention")
LAYERS = ("num_encoder_layers", "num_feedback_layers", "num_decoder_layers")
AT_LEAST = {
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_prefix_tokens", "initial_state_seed"), 0),
    **dict.fromkeys(("num_low_steps", "supervision_interval", "num_prefixes"), 1),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_feedback_layers", "conv_kernel_size"), 1),
    **dict.fromkeys(("feedback_interval", "num_feedback_steps", "solver_steps", "solver_block_size"), 1),
    **dict.fromkeys(("prediction_length", "upscale"), 1),
}
LARGEST_WEIGHT = 1000  # for factors and deviations; far above it, float32 overflows
WEIGHTS = (
    *("feedback_noise", "state_noise", "initializer_range", "halting_weight"),
    *("initial_state_scale", "embedding_scale"),
)


def check(config: Any) -> None:
    """Raise ValueError for the first rule that a FeedbackConfig breaks, and warn of fields that nothing reads."""
    for rule in (
        numbers,
        labels,
        backbones,
        windows,
        combinations,
        solvers,
        haltings,
        recursions,
        norms,
        prefixes,
        memories,
        retrofits,
    ):
        refuse(rule(config))
    for sentence in unread(config):
        logger.warning_once(sentence)


def check_sizes(config: Any, model_type: str) -> None:
    """Check the sizes that the backbone's config is made of, before that is made."""
    refuse(sizes(config, model_type))


def check_windows(config: Any) -> None:
    """Check sliding windows, which may be changed on a live model, so that each call checks them."""
    refuse(windows(config))


def check_given(config: Any, others: dict[str, Any]) -> None:
    """Check what transformers would stumble over; `others` are arguments that are not fields."""
    refuse(given(config, others))


def came_along(config: Any) -> str:
    """Return what to do about a part that is not known here, if a checkpoint brought code."""
    if not config.plugins:
        return ""
    return (
        f" Its code came along in {', '.join(config.plugins)}: import that file, or load the model with "
        "trust_remote_code=True and from_pretrained of a FeedbackFor... class."
    )


def refuse(sentences: Iterator[str]) -> None:
    """Raise ValueError with the first sentence, if there is one."""
    for sentence in sentences:
        raise ValueError(sentence)


def needs(config: Any, what: str, **allowed: tuple) -> Iterator[str]:
    """Yield a sentence that names the fields which are not as `what` needs them, and no others."""
    wrong = [
        f"{name.replace('input_type', 'input_config')}={' or '.join(map(repr, values))}"
        for name, values in allowed.items()
        if getattr(config, name) not in values
    ]
    if wrong:
        yield f"{what} needs {' and '.join(wrong)}."


def whole(name: str, value: Any, least: int = 1) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool):
        yield f"{name} is {value!r}; it must be a whole number."
    elif value < least:
        yield f"{name} is {value}; it must be " + ("0 or more." if least == 0 else f"at least {least}.")
    elif value >= LARGEST:
        yield f"{name} is {value}; it must be below {LARGEST}."


def sizes(config: Any, model_type: str) -> Iterator[str]:
    heads = ("num_attention_heads", "num_key_value_heads")
    for name in ("hidden_size", "intermediate_size", *heads, "max_position_embeddings"):
        yield from whole(name, getattr(config, name))
    for name in LAYERS:
        yield from whole(name, getattr(config, name), AT_LEAST[name])
        if getattr(config, name) > MOST_LAYERS:
            yield f"{name} is {getattr(config, name)}; it must be at most {MOST_LAYERS}."
    hidden, number, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if hidden % number:
        yield f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({number})."
    elif (hidden // number) % 2 and model_type != "gpt2":
        yield (
            f"hidden_size / num_attention_heads is {hidden // number}; rotary positions need an even number: "
            "change either."
        )
    if number % groups:
        yield f"num_attention_heads ({number}) must be a multiple of num_key_value_heads ({groups})."


def numbers(config: Any) -> Iterator[str]:
    yield from whole("format_version", config.format_version)
    if config.format_version > FORMAT:
        yield (
            f"This checkpoint has format_version {config.format_version} and this feedback_transformers reads up to "
            f"{FORMAT}: upgrade feedback_transformers."
        )
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            advice = came_along(config)
            yield f"Unknown {name} {getattr(config, name)!r}; choose one of {', '.join(known)}.{advice}"
    if config.hidden_act != "rrelu" and config.hidden_act not in ACT2FN:
        yield f"Unknown hidden_act {config.hidden_act!r}; choose rrelu or one of {', '.join(ACT2FN)}."
    for name, least in AT_LEAST.items():
        yield from whole(name, getattr(config, name), least)
    if config.gradient_steps is not None:
        yield from whole("gradient_steps", config.gradient_steps)
    trained = config.trained_feedback_steps
    if trained is not None:
        for steps in trained:
            yield from whole("trained_feedback_steps", steps)
        if len(trained) != 2 or trained[0] > trained[1]:
            yield f"trained_feedback_steps is {trained}; it must be [fewest, most]."
    # Comparisons in this direction refuse nan too.
    for name in WEIGHTS:
        value = getattr(config, name)
        if not 0 <= value <= LARGEST_WEIGHT:
            yield f"{name} is {value}; it must be 0 or more, and at most {LARGEST_WEIGHT}."
    if not 0 < config.relaxation <= 1:
        yield f"relaxation is {config.relaxation}; it must be above 0 and at most 1."
    if not 0 < config.initial_state_cut <= LARGEST_WEIGHT:
        yield f"initial_state_cut is {config.initial_state_cut}; it must be above 0 and at most {LARGEST_WEIGHT}."
    for name in ("solver_tolerance", "halting_threshold"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= LARGEST_WEIGHT:
            yield f"{name} is {value}; it must be above 0 and at most {LARGEST_WEIGHT}, or None."
    if config.halting_prior is not None and not 0 < config.halting_prior < 1:
        yield f"halting_prior is {config.halting_prior}; it must be above 0 and below 1, or None."
    if not 0 < config.norm_eps <= 1:
        yield f"norm_eps is {config.norm_eps}; it must be above 0 and at most 1."
    for name in ("mixer_size", "prefix_size"):
        if getattr(config, name) is not None:
            yield from whole(name, getattr(config, name))
    if not 0 <= config.dropout < 1:
        yield f"dropout is {config.dropout}; it must be at least 0 and below 1."


def labels(config: Any) -> Iterator[str]:
    names = config.id2label
    if names is not None and sorted(names) != list(range(len(names))):
        yield f"id2label names the classes {list(names)[:5]}; it must name 0 to {len(names) - 1}."
    for name in ("pad_token_id", "decoder_start_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            yield f"{name} is {token}; it must be at least 0 and below vocab_size, {config.vocab_size}."
    for name in ("bos_token_id", "eos_token_id"):  # a smaller vocabulary may not have those of the original
        tokens = getattr(config, name)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None:
                yield from whole(name, token, -1)


def backbones(config: Any) -> Iterator[str]:
    """Check what the configs of transformers do not."""
    backbone = config.backbone_config
    head_dim = getattr(backbone, "head_dim", None)
    if head_dim is not None:
        yield from whole("head_dim of backbone_config", head_dim)
        if head_dim % 2:
            yield f"head_dim of backbone_config is {head_dim}; rotary positions need an even number."
    rope = getattr(backbone, "rope_parameters", None) or {}
    by_kind = (each for each in rope.values() if isinstance(each, dict))  # Gemma 3 has one for each kind of layer
    for parameters in (rope, *by_kind):
        kind = parameters.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            yield f"Unknown rope_type {kind!r} in backbone_config; choose default or {', '.join(ROPE_INIT_FUNCTIONS)}."


def windows(config: Any) -> Iterator[str]:
    backbone = config.backbone_config
    window, kinds = getattr(backbone, "sliding_window", None), getattr(backbone, "layer_types", None) or []
    if window is not None:
        yield from whole("sliding_window of backbone_config", window)
    elif "sliding_attention" in kinds:
        yield "layer_types of backbone_config has sliding_attention: set its sliding_window too."
    if set(kinds) - set(ATTENTIONS):
        given = ", ".join(map(str, set(kinds)))
        yield f"layer_types of backbone_config has {given}; choose out of {', '.join(ATTENTIONS)}."
    # A retrofitted Qwen may have a window that begins at layers deeper than it has.
    own = config.retrofitted_from is not None and getattr(backbone, "use_sliding_window", False)
    if window is not None and kinds and not own and "sliding_attention" not in kinds:
        yield (
            f"sliding_window of backbone_config is {window} and its layer_types has no sliding_attention: name the "
            "layers there that it is for."
        )
    if kinds and config.retrofitted_from is not None and len(kinds) != backbone.num_hidden_layers:
        yield (
            f"layer_types of backbone_config names {len(kinds)} layers out of "
            f"{backbone.num_hidden_layers}: name each of them."
        )


def combinations(config: Any) -> Iterator[str]:
    for ours, theirs in shared_names(config.backbone_config.model_type).items():
        here, there = getattr(config, ours), getattr(config.backbone_config, theirs, None)
        if there is not None and here != there:
            named = "" if ours == theirs else f"{theirs}="
            yield f"{ours} is {here!r} here and {named}{there!r} in backbone_config: set both to the same."
    if config.shared_step_cache:
        yield from needs(
            config,
            "shared_step_cache, which is for keys and values of passes,",
            feedback_axis=("depth",),
            feedback_type=("transformer",),
        )
    if config.feedback_interval > 1 and config.feedback_axis == "depth":
        yield "feedback_interval counts positions, so it needs feedback_axis='time'; set it to 1."
    if (
        config.feedback_signal == "output"
        and config.feedback_axis == "time"
        and config.decoder_type != "mlp"
        and not config.is_causal
    ):
        yield (
            "feedback_signal='output' along the positions needs a prediction that reads no later ones: set "
            "is_causal=True, feedback_axis='depth' or decoder_type='mlp'."
        )
    both = (config.encoder_type, config.num_encoder_layers) == (config.decoder_type, config.num_decoder_layers)
    if config.share_encoder_decoder and not both:
        yield "share_encoder_decoder needs encoder_type = decoder_type and num_encoder_layers = num_decoder_layers."
    if config.share_encoder_decoder and config.is_encoder_decoder:
        yield (
            "share_encoder_decoder does not go with is_encoder_decoder, whose encoder reads another text: "
            "set one of them to False."
        )
    if config.input_type == "pretrained":
        yield from needs(config, "A pretrained encoder, which reads both sides,", is_causal=(False,))
    if config.source_config is not None and not config.is_encoder_decoder:
        yield "source_config is what the encoder of is_encoder_decoder=True reads: set that, or leave it out."
    if config.is_encoder_decoder and not config.is_causal:
        yield "is_encoder_decoder writes its target from left to right; set is_causal=True."


def solvers(config: Any) -> Iterator[str]:
    if config.solver != "sequential" and config.feedback_axis == "depth":
        yield f"solver={config.solver!r} is for feedback_axis='time'; in depth use 'sequential', pass by pass."
    if config.solver_tolerance is not None and config.feedback_axis == "depth":
        yield "solver_tolerance is for the solvers of feedback_axis='time'; in depth use halting='converged'."
    if config.solver == "newton":
        yield from needs(
            config,
            "solver='newton', which solves recurrences of single channels,",
            feedback_signal=("none",),
            feedback_type=DIAGONAL_TYPES,
        )


def haltings(config: Any) -> Iterator[str]:
    halting = config.halting
    if halting == "fixed":
        return
    learned = halting in ("learned", "act", "select")
    if learned and (config.halting_threshold or 0) > 1:
        yield (
            f"halting_threshold is {config.halting_threshold}; halting={halting!r} compares it with a "
            "probability: give at most 1."
        )
    what = f"halting={halting!r}, which stops passes,"
    yield from needs(config, what, feedback_signal=("state", "output"))
    if not config.in_passes:
        yield f"{what} needs feedback_axis='depth' or solver='jacobi'."
    if config.solver == "gauss_seidel":
        yield f"{what} does not go with solver='gauss_seidel': set solver='jacobi'."
    if config.feedback_axis == "time" and config.feedback_type in RECURRENT_TYPES:
        yield (
            f"halting={halting!r} can't stop a position that a recurrence along time goes through: use "
            "feedback_axis='depth' or another feedback_type."
        )
    if config.is_causal and config.feedback_type == "conv":
        yield (
            f"halting={halting!r} does not go with causal convolutions in the loop: use "
            "feedback_type='transformer', or 'mlp'."
        )
    in_loop = config.feedback_signal == "output" or config.halting_measure == "prediction"
    if config.is_causal and config.decoder_type == "rnn" and in_loop:
        yield f"halting={halting!r} with a decoder in the loop needs decoder_type='mlp' or 'transformer'."
    if learned and config.halting_measure != "state":
        yield f"halting={halting!r} reads the state; halting_measure='prediction' is for 'converged'."
    if halting == "select" and config.halting_scope == "sequence":
        what = "halting_scope='sequence', where the first position speaks for all,"
        yield from needs(config, what, is_causal=(False,), feedback_axis=("depth",))
        return  # its exits are trained by what they answer, and not by the weights of passes
    if learned and (config.gradient_steps is not None or config.supervision != "last"):
        why = {"act": "reads the mean of all passes"}.get(halting, "weighs the loss of every pass itself")
        yield f"halting={halting!r} {why}: use gradient_steps=None and supervision='last'."


def recursions(config: Any) -> Iterator[str]:
    kind, state = config.feedback_recursion, config.initial_state
    if kind == "layerwise":
        yield from needs(
            config,
            "feedback_recursion='layerwise'",
            feedback_interval=(1,),
            solver=("sequential",),
            feedback_connection=("gate", "add", "concat", "sum", "decay"),
            retrofitted_from=(None,),
        )
    if kind in ("hierarchical", "refinement"):
        yield from needs(
            config,
            f"feedback_recursion={kind!r}",
            feedback_axis=("depth",),
            feedback_signal=("state",),
            feedback_type=("transformer", "mlp"),
            feedback_connection=("sum", "replace", "add", "gate", "concat", "decay"),
        )
    if kind == "refinement" and state == "zeros":
        yield "feedback_recursion='refinement' thinks over a latent that is there: set initial_state='learned'."
    if state != "zeros":
        yield from needs(
            config, f"initial_state={state!r}", feedback_axis=("depth",), feedback_signal=("state", "none")
        )
    if config.feedback_connection == "replace" and config.feedback_signal != "none" and not config.is_encoder_decoder:
        what = "feedback_connection='replace', by which the input enters as the first state alone,"
        yield from needs(
            config, what, initial_state=("input",), feedback_axis=("depth",), feedback_signal=("state", "none")
        )
    if config.supervision_interval > 1:
        yield from needs(config, "supervision_interval, which counts passes,", feedback_axis=("depth",))
        if config.num_feedback_steps % config.supervision_interval:
            yield (
                f"num_feedback_steps ({config.num_feedback_steps}) must be a multiple of supervision_interval "
                f"({config.supervision_interval}): the last pass gives an answer."
            )


def norms(config: Any) -> Iterator[str]:
    family = config.backbone_config.model_type
    if config.norm_placement != "family" and family not in SPLIT_NORMS:
        yield (
            f"norm_placement={config.norm_placement!r} puts attention and MLP of a family together anew: use a "
            f"backbone_config of {', '.join(SPLIT_NORMS)} instead of {family}."
        )
    if family in BOTH_SIDES:
        what = f"A backbone_config of {family}, whose layers read both sides,"
        yield from needs(config, what, is_causal=(False,), feedback_axis=("depth",), input_type=("tokens",))
        if config.backbone_config.embedding_size != config.hidden_size:
            what = "An embedding_size other than hidden_size"
            yield from needs(config, what, feedback_signal=("state", "none"), num_prefix_tokens=(0,))
    if config.token_mixer == "mlp":
        yield from needs(
            config, "token_mixer='mlp', which sees all positions,", is_causal=(False,), feedback_axis=("depth",)
        )
        yield from needs(config, "token_mixer='mlp', whose norm follows it,", norm_placement=("post",))
    if config.retrofitted_from is not None:
        yield from needs(
            config,
            "A retrofitted model, which keeps its layers,",
            norm_placement=("family",),
            output_norm=("decoder",),
            feedback_recursion=("single",),
        )


def prefixes(config: Any) -> Iterator[str]:
    if config.prefix_lm:
        what = "prefix_lm, by which a prompt sees itself on both sides,"
        yield from needs(config, what, is_causal=(True,), feedback_axis=("depth",))
        if getattr(config.backbone_config, "sliding_window", None) is not None:
            yield "prefix_lm does not go with a sliding_window in backbone_config: leave one of them out."
    if not config.num_prefix_tokens:
        return
    whole_prefix = config.num_prefix_tokens * config.hidden_size
    if config.prefix_size is not None and config.prefix_size > whole_prefix:
        yield f"prefix_size is {config.prefix_size}; {config.num_prefix_tokens} positions hold {whole_prefix} at most."
    yield from needs(
        config, "num_prefix_tokens", is_causal=(False,), input_type=("tokens",), is_encoder_decoder=(False,)
    )


def memories(config: Any) -> Iterator[str]:
    if config.feedback_connection != "memory":
        return
    yield from needs(
        config,
        "feedback_connection='memory'",
        feedback_type=("transformer",),
        feedback_axis=("time",),
        solver=("sequential", "jacobi"),
        halting=("fixed",),
    )
    if config.backbone_config.model_type == "gpt2":
        yield (
            "feedback_connection='memory' needs a backbone with separate key and value projections: "
            "use a Llama-shaped backbone_config instead of gpt2."
        )
    if config.feedback_interval > 1:
        yield "feedback_connection='memory' is written at every position; set feedback_interval=1."
    if config.feedback_signal == "output":
        yield "feedback_connection='memory' feeds back layer states; use feedback_signal='state'."


def retrofits(config: Any) -> Iterator[str]:
    if config.retrofitted_from is None:
        return
    family, there = config.backbone_config.model_type, config.backbone_config.num_hidden_layers
    layers = (config.num_encoder_layers, config.num_feedback_layers, config.num_decoder_layers)
    if sum(layers) != there:
        yield (
            f"{' + '.join(map(str, layers))} layers are not the {there} of the retrofitted model: change "
            "num_encoder_layers, num_feedback_layers or num_decoder_layers."
        )
    yield from needs(
        config,
        "A retrofitted model, which is made of the original's layers,",
        encoder_type=("transformer",),
        feedback_type=("transformer",),
        decoder_type=("transformer",),
        feedback_connection=("gate", "add", "concat"),
        share_encoder_decoder=(False,),
        is_encoder_decoder=(False,),
    )
    if config.is_causal != (family not in BIDIRECTIONAL_TYPES):
        yield f"A retrofitted {family} can't have is_causal={config.is_causal}."
    if not config.is_causal and config.feedback_axis == "time":
        yield (
            f"A retrofitted {family} reads both sides, and feedback from the position before only one: use "
            "feedback_axis='depth'."
        )


def given(config: Any, others: dict[str, Any]) -> Iterator[str]:
    dtype, names = config.dtype, config.id2label
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        yield f"Unknown dtype {dtype!r}; give the name of one of torch, such as float32."
    if "num_labels" in others:
        yield from whole("num_labels", others["num_labels"])
    if names is not None and not (names and all(str(key).isdigit() for key in names)):
        yield "id2label must name each class by its number, and at least one."
