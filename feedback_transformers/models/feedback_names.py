"""Values that fields of FeedbackConfig may take, and names that transformers has for the fields."""

from typing import Any

INPUT_TYPES = ("tokens", "images", "videos", "values", "pretrained")
ENCODER_TYPES = ("transformer", "rnn", "cnn")
RECURRENT_TYPES = ["gru", "lstm", "diagonal_gru", "min_gru"]  # those of RECURRENCES; `register` adds to them
FEEDBACK_TYPES = ("mlp", *RECURRENT_TYPES, "conv", "transformer")
DIAGONAL_TYPES = ("diagonal_gru", "min_gru")  # no channel reads another's state
DECODER_TYPES = ("mlp", "rnn", "transformer")
BACKBONE_TYPES = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "hrm_text", "gpt2")
BOTH_SIDES = ("albert",)  # layers of models that are not causal
SPLIT_NORMS = ("llama", "qwen2", "qwen3", "mistral", "hrm_text")  # families whose attention and MLP stand alone
BIDIRECTIONAL_TYPES = ("bert", "roberta")
# A retrofit keeps the whole model, so its layers may differ from each other.
RETROFIT_TYPES = (
    *(name for name in BACKBONE_TYPES if name != "hrm_text"),
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "gpt_neox",
    *BIDIRECTIONAL_TYPES,
)
SOLVERS_IN_PASSES = ["jacobi", "gauss_seidel"]  # over all positions; `register` adds to them
CHOICES: dict[str, tuple[str, ...]] = {
    "input_type": INPUT_TYPES,  # of input_config and source_config
    "encoder_type": ENCODER_TYPES,
    "feedback_type": FEEDBACK_TYPES,
    "decoder_type": DECODER_TYPES,
    "feedback_axis": ("time", "depth"),
    "feedback_signal": ("state", "output", "none"),
    "feedback_connection": ("gate", "add", "concat", "replace", "sum", "decay", "memory"),
    "feedback_recursion": ("single", "layerwise", "hierarchical", "refinement"),
    "initial_state": ("zeros", "input", "learned", "random"),
    "norm_placement": ("family", "pre", "sandwich", "residual_sandwich", "post"),
    "output_norm": ("decoder", "around_decoder", "pass", "none"),
    "solver": ("sequential", "jacobi", "gauss_seidel", "newton"),
    "token_mixer": ("attention", "mlp"),
    "halting_scope": ("position", "sequence"),
    "supervision": ("last", "all"),
    "halting": ("fixed", "converged", "learned", "act", "select"),
    "halting_measure": ("state", "prediction"),
}
# The source of registered parts, which goes along with checkpoints: field and name -> file name and text.
REGISTERED: dict[tuple[str, str], tuple[str, str]] = {}

# Names that backbones have for fields of FeedbackConfig, where they differ; None where a backbone has no such field.
BACKBONE_NAMES: dict[str, dict[str, str | None]] = {
    "gpt2": {"intermediate_size": "n_inner", "hidden_act": "activation_function", "num_key_value_heads": None},
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
    **{name: {"num_key_value_heads": None} for name in ("gpt_neox", "hrm_text", "albert", *BIDIRECTIONAL_TYPES)},
}
# Fields of a backbone's config that do not describe its layers.
NOT_OF_LAYERS = (
    "model_type",
    "vocab_size",
    "pad_token_id",
    "num_hidden_layers",
    "num_layers_per_stack",
    "n_layer",
    "layer_types",
)
SHARED_WITH_BACKBONE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
)


# Names of other configs for the same fields; an error tells ours.
OTHER_NAMES = {
    **dict.fromkeys(("num_layers", "n_layer", "n_layers"), "num_feedback_layers"),
    **dict.fromkeys(("steps", "n_steps", "num_steps", "num_loops"), "num_feedback_steps"),
    **dict.fromkeys(("num_heads", "n_head", "n_heads"), "num_attention_heads"),
    **dict.fromkeys(("d_model", "n_embd", "dim"), "hidden_size"),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads"), "num_key_value_heads"),
    **dict.fromkeys(("cell", "cell_type"), "feedback_type"),
    **dict.fromkeys(("causal", "bidirectional"), "is_causal"),
    "n_positions": "max_position_embeddings",
    "vocabulary_size": "vocab_size",
    "hidden_dropout_prob": "dropout",
    "encoder": "encoder_type",
    "decoder": "decoder_type",
    **dict.fromkeys(("input_type", "inputs"), "input_config"),
    "source_type": "source_config",
    "halting_type": "halting",
    "solver_iterations": "solver_steps",
    "tie_embeddings": "tie_word_embeddings",
    **{name: f"feedback_{name}" for name in ("axis", "signal", "connection", "interval", "noise")},
}

# Fields of transformer layers, even of families that lack them.
OF_LAYERS = ("sliding_window", "layer_types", "rope_theta", "rope_scaling")


def model_type_of(backbone: Any, known: tuple[str, ...] = (*BACKBONE_TYPES, *BOTH_SIDES)) -> str:
    """Return the family that a backbone_config, as a dictionary, names; raise ValueError for unknown ones."""
    if not isinstance(backbone, dict) or not all(isinstance(name, str) for name in backbone):
        raise ValueError(
            f"backbone_config is {backbone!r}; give the name of a family, a dictionary or a config of transformers."
        )
    model_type = backbone.get("model_type", "llama")
    if model_type not in known:
        raise ValueError(f"Unknown backbone {model_type!r}; choose one of {', '.join(known)}.")
    return model_type


def shared_names(model_type: str) -> dict[str, str]:
    """Return {our name: the backbone's name} of the fields that both configs have."""
    names = BACKBONE_NAMES.get(model_type, {})
    both = {name: names.get(name, name) for name in SHARED_WITH_BACKBONE}
    return {ours: theirs for ours, theirs in both.items() if theirs is not None}
