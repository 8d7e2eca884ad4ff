"""What hypothesis draws: FeedbackConfigs, sensible and not, the heads they are for, and damage to files."""

import math
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_heads import HEADS

from feedback_transformers import PRESETS, FeedbackConfig
from feedback_transformers.models.feedback_names import BACKBONE_TYPES, CHOICES

__all__ = ["SafetensorError", "StrictDataclassError", "cases", "damage", "run"]

# Slower than this is a hang; no example takes a tenth of it on a machine with nothing else to do.
reproducible = partial(
    settings, database=None, deadline=20_000, print_blob=False, suppress_health_check=list(HealthCheck)
)


def run(check: Any, number: int, examples: int) -> None:
    """`check`, a test with @given, over `examples` that the seed `number` decides."""
    seed(number)(reproducible(max_examples=examples)(check))()


# Values that a field may have, few and small, so that an example takes milliseconds.
SENSIBLE: dict[str, list[Any]] = {
    "vocab_size": [2, 7, 11],
    "hidden_size": [4, 8, 12, 16],
    "intermediate_size": [None, 1, 6],
    "num_attention_heads": [1, 2, 4],
    "num_key_value_heads": [None, 1, 2],
    "max_position_embeddings": [16, 64],
    "hidden_act": ["silu", "gelu", "relu", "tanh", "rrelu", "prelu", "sigmoid", "xielu"],
    "backbone_config": [
        None,
        *BACKBONE_TYPES,
        {"model_type": "gpt2", "n_inner": 6},
        {"model_type": "qwen3", "head_dim": 6},
        {"model_type": "mistral", "sliding_window": 2},
        {"model_type": "llama", "attention_bias": True, "num_hidden_layers": 9},
        {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1},
    ],
    "is_causal": [True, False],
    "input_config": [
        "tokens",
        {"type": "images", "patch_size": 2, "num_channels": 1},
        {"type": "images", "patch_size": 4, "positions": "none"},
        {"type": "videos", "patch_size": 3, "tubelet_size": 2},
        {"type": "values", "num_channels": 3},
    ],
    "source_config": [None, {"type": "images", "num_channels": 1}],
    "prediction_length": [1, 3],
    "upscale": [1, 2],
    "num_encoder_layers": [0, 1, 2],
    "num_feedback_layers": [1, 2],
    "num_decoder_layers": [0, 1, 2],
    "conv_kernel_size": [1, 2, 3, 5],
    "feedback_interval": [1, 2, 3],
    "num_feedback_steps": [1, 2, 4],
    "plugins": [None],
    "trained_feedback_steps": [None, [1, 4], [2, 2]],
    "feedback_noise": [0, 0.1],
    "relaxation": [1, 0.7],
    "state_noise": [0, 0.1],
    "initial_state_cut": [3, 0.5],
    "solver_steps": [1, 3],
    "solver_block_size": [1, 2, 3],
    "solver_tolerance": [None, 1e-4, 1],
    "gradient_steps": [None, 1, 2],
    "halting_threshold": [None, 0.01, 0.6],
    "halting_prior": [0.2, 0.9],
    "halting_weight": [0, 0.01],
    "tie_word_embeddings": [True, False],
    "share_encoder_decoder": [True, False],
    "shared_step_cache": [True, False],
    "dropout": [0, 0.5],
    "initializer_range": [0.02, 1.0],
    "use_cache": [True, False],
    "is_encoder_decoder": [True, False],
    "pad_token_id": [None, 0, 1],
    "bos_token_id": [None, 1],
    "eos_token_id": [None, 1, [0, 1]],
    "decoder_start_token_id": [None, 1],
    "num_labels": [1, 2, 3],
    "problem_type": [None, "regression", "single_label_classification", "multi_label_classification"],
    "output_hidden_states": [True, False],
    **{name: list(values) for name, values in CHOICES.items()},
}
# What no field can be, and what only some can.
NONSENSE: list[Any] = [
    *(0, -1, -7, 3, 2.5, True, None, 10**30, 1e300, -1e-3, math.nan, math.inf, -math.inf),
    *("", "nope", "8", "llama", b"8", [], [3], {}, {"a": 1}, (2, 2), object(), torch.tensor(2)),
]
NONSENSE_OF = {
    "backbone_config": [
        {"model_type": "bert"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"model_type": "llama", "hidden_size": "big"},
        {"model_type": "llama", "hidden_size": -4},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "llama", "num_key_value_heads": 3},
        {"model_type": "llama", "head_dim": 3},
        {"model_type": "llama", "head_dim": 0},
        {"model_type": "llama", "hidden_act": "nope"},
        {"model_type": "llama", "rms_norm_eps": "small"},
        {"model_type": "llama", "rope_parameters": {"rope_type": "nope"}},
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}},
        {"model_type": "llama", "rope_parameters": "nope"},
        {"model_type": "mistral", "sliding_window": -2},
        {"model_type": "mistral", "sliding_window": "wide"},
        {"model_type": "gpt2", "n_head": 3},
        {"model_type": "gpt2", "n_embd": [8]},
        {"model_type": "qwen2", "layer_types": ["nope"]},
        {"model_type": "qwen2", "max_window_layers": 1, "use_sliding_window": True, "num_hidden_layers": 2},
        {1: 2},
    ],
    "retrofitted_from": ["LlamaForCausalLM", "BertModel", "nope"],
    "format_version": [4, 0],
    "initializer_range": [0.0],
}
NAMES = sorted({field.name for field in fields(FeedbackConfig)} & set(SENSIBLE) | set(NONSENSE_OF))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, dict[str, Any], bool]:
    """A head; fields of a config: what the head needs, a preset perhaps, up to twelve with values of theirs, and
    in one case of three one or two with nonsense; and whether to train it."""
    head = draw(st.sampled_from(list(HEADS)))
    given: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11, "intermediate_size": 6}
    given |= {"max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.5, "num_feedback_steps": 2}
    if draw(st.integers(0, 3)) == 0:
        given |= PRESETS[draw(st.sampled_from(list(PRESETS)))]
        # Fewer layers and passes: random weights that no norm bounds leave float32's range after some hundred steps.
        given |= {"num_feedback_layers": 1, "num_feedback_steps": 2}
        given |= {"num_low_steps": 2} if "num_low_steps" in given else {}
    given |= HEADS[head]
    for name in draw(st.lists(st.sampled_from(list(SENSIBLE)), max_size=12, unique=True)):
        if name not in HEADS[head]:
            given[name] = draw(st.sampled_from(SENSIBLE[name]))
    if draw(st.integers(0, 2)) == 0:
        for name in draw(st.lists(st.sampled_from([*NAMES, "num_labels", "problem_type"]), min_size=1, max_size=2)):
            given[name] = draw(st.sampled_from([*NONSENSE, *NONSENSE_OF.get(name, [])]))
    return head, given, draw(st.integers(0, 2)) == 0


def damage() -> st.SearchStrategy[tuple[str, float, int]]:
    """Of a file: how, where between its beginning and its end, and the bits or the byte."""
    kinds = st.sampled_from(["flip", "flip", "cut", "insert"])
    return st.tuples(kinds, st.floats(0, 1), st.integers(1, 255))
