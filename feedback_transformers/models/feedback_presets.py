"""PRESETS: architectures as fields of FeedbackConfig, with small sizes to override.

Those of EXACT compute the function of the authors' code, whose weights `feedback_transformers.conversion` loads. The
others are in the spirit of a paper. They share the blocks of this package: Llama layers (RMS norms before attention
and MLP, SwiGLU, rotary positions), a norm of the fed-back signal, a first pass that reads zeros, and a norm before the
readout. Each comment names further differences.
"""

import warnings
from typing import Any

# The whole model is the loop, and what is fed back replaces the input.
LOOPED: dict[str, Any] = {
    "feedback_axis": "depth",
    "feedback_type": "transformer",
    "feedback_connection": "replace",
    "connection_norm": False,
    "initial_state": "input",
    "output_norm": "pass",
    "num_encoder_layers": 0,
    "num_feedback_layers": 2,
    "decoder_type": "mlp",
    "num_decoder_layers": 0,
}
# The prelude's output enters each pass beside the state.
RECURRENT_DEPTH: dict[str, Any] = {
    "feedback_axis": "depth",
    "feedback_type": "transformer",
    "feedback_connection": "concat",
    "connection_norm": False,
    "initial_state": "random",
    "num_feedback_steps": 8,
    "gradient_steps": 8,
    "num_encoder_layers": 1,
    "num_feedback_layers": 2,
    "num_decoder_layers": 1,
}
# Answers at all positions of a puzzle, again and again.
PUZZLE: dict[str, Any] = {
    "feedback_axis": "depth",
    "feedback_type": "transformer",
    "feedback_connection": "sum",
    "connection_norm": False,
    "is_causal": False,
    "initial_state": "learned",
    "norm_placement": "post",
    "norm_weights": False,
    "output_norm": "none",
    "feedback_recursion": "hierarchical",
    "supervision": "all",
    "halting": "select",
    "halting_scope": "sequence",
    "halting_weight": 0.5,
    "num_encoder_layers": 0,
    "num_feedback_layers": 2,
    "decoder_type": "mlp",
    "num_decoder_layers": 0,
    "tie_word_embeddings": False,
}
TRM: dict[str, Any] = {**PUZZLE, "num_low_steps": 6, "supervision_interval": 3, "num_feedback_steps": 48}
# A normal distribution of this standard deviation has one of 1 once it is cut at twice this.
EQR_SCALE = 1.1368472343385565

EXACT: dict[str, dict[str, Any]] = {
    # Nanbeige4.2 (2026).
    "nanbeige": {**LOOPED, "num_feedback_steps": 2},
    # Ouro (arXiv:2510.25741), which learns where to exit.
    "ouro": {**LOOPED, "norm_placement": "sandwich", "halting": "select", "halting_prior": None},
    # Huginn (Geiping et al. 2025, arXiv:2502.05171).
    "huginn": {**RECURRENT_DEPTH, "norm_placement": "residual_sandwich", "output_norm": "around_decoder"},
    # A pretrained model made recurrent by the authors of Huginn (McLeish et al. 2025).
    "retrofitted-recurrence": RECURRENT_DEPTH,
    # HRM-Text (Sapient), as in transformers.
    "hrm-text": {
        **LOOPED,
        "backbone_config": "hrm_text",
        "norm_weights": False,
        "feedback_recursion": "hierarchical",
        "num_feedback_steps": 2,
        "num_low_steps": 3,
        "prefix_lm": True,
        "tie_word_embeddings": False,
    },
    # ALBERT (Lan et al. 2020, arXiv:1909.11942): a BERT of one layer, twelve times.
    "albert": {
        **LOOPED,
        "backbone_config": "albert",
        "is_causal": False,
        "output_norm": "none",
        "num_feedback_layers": 1,
        "num_feedback_steps": 12,
    },
    # The Hierarchical Reasoning Model (Wang et al. 2025, arXiv:2506.21734).
    "hrm": {
        **PUZZLE,
        "num_feedback_layers": 4,
        "num_low_steps": 2,
        "supervision_interval": 2,
        "num_feedback_steps": 32,
    },
    # The Tiny Recursive Model (Jolicoeur-Martineau 2025, arXiv:2510.04871), and its form with a single latent.
    "trm": {**TRM, "share_levels": True},
    "trm-singlez": {**TRM, "feedback_recursion": "refinement"},
    # The Equilibrium Reasoner (Huang et al. 2026, arXiv:2605.21488): a TRM that begins at random latents of standard
    # deviation 1, and goes a part of the way to each new latent. Its code adds the noise in evaluation too.
    "eqr": {
        **TRM,
        "share_levels": True,
        "relaxation": 0.95,
        "state_noise": 0.01,
        "initial_state": "random",
        "initial_state_scale": EQR_SCALE,
        "initial_state_cut": 2.0,
    },
}

OWN: dict[str, dict[str, Any]] = {
    # In the spirit of the Feedback Transformer (Fan et al. 2020, arXiv:2002.09402): all layers attend to one memory of
    # merged past layer states. Its code has layer norms with biases, relative positions as in T5, GEGLU, one key and
    # value projection that reads the raw memory, and no attention at the first token. Here keys and values are made of
    # the normed memory by the first layer's projections, and each position also attends to itself.
    "shared-memory": {
        "feedback_axis": "time",
        "feedback_type": "transformer",
        "feedback_connection": "memory",
        "num_encoder_layers": 0,
        "num_feedback_layers": 4,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # In the spirit of the Recurrent Looped Transformer (Zhang 2026): the top state of a token enters the next token
    # through a gate. It was not compared with the authors' code.
    "token-loop": {
        "feedback_axis": "time",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "num_encoder_layers": 1,
        "num_feedback_layers": 3,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # In the spirit of Huginn (Geiping et al. 2025, arXiv:2502.05171): s_i = R(A[s_{i-1}; e]), with the gradient of the
    # last 8 passes. Huginn begins at a random state, feeds the state back without a norm, has norms on the residual
    # sums too, scales the embeddings by the root of the hidden size, has a norm before the coda, and draws the number
    # of passes in training.
    "recurrent-depth": {
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "concat",
        "num_feedback_steps": 8,
        "gradient_steps": 8,
        "num_encoder_layers": 1,
        "num_feedback_layers": 2,
        "num_decoder_layers": 1,
    },
    # In the spirit of the Tiny Recursive Model (Jolicoeur-Martineau 2025, arXiv:2510.04871) with a single latent: two
    # layers, the input added at every pass, an answer supervised after every pass. TRM begins at learned vectors,
    # feeds the latent back as it is, has norms without weights behind attention and MLP, refines the answer by steps
    # without input, scales the embeddings, cuts the gradient between supervised steps, and learns when to halt.
    "supervised-loop": {
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "add",
        "is_causal": False,
        "num_feedback_steps": 6,
        "supervision": "all",
        "num_encoder_layers": 0,
        "num_feedback_layers": 2,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # The GRU of Cho et al. 2014 (arXiv:1406.1078) in the form of torch.nn.GRU, behind the gated input layer and before
    # the norm that every model here has.
    "gru": {
        "feedback_axis": "time",
        "feedback_type": "gru",
        "feedback_signal": "none",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # The LSTM of Hochreiter & Schmidhuber 1997 with forget gates, in the form of torch.nn.LSTM, between the
    # same parts.
    "lstm": {
        "feedback_axis": "time",
        "feedback_type": "lstm",
        "feedback_signal": "none",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # In the spirit of Jordan 1986 (Serial order): the network's own output is the context of its next step. Jordan's
    # context units decay, where here the last prediction alone is embedded, normed and added.
    "output-loop": {
        "feedback_axis": "time",
        "feedback_type": "mlp",
        "feedback_signal": "output",
        "feedback_connection": "add",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
}

# Names that were those of papers whose function these do not compute.
RENAMED = {
    "feedback-transformer": "shared-memory",
    "jordan": "output-loop",
    "recurrent-looped": "token-loop",
    "tiny-recursive": "supervised-loop",
}


class Presets(dict[str, dict[str, Any]]):
    """Hold the presets by name; an old name gives what it was renamed to, with a warning."""

    def __missing__(self, name: str) -> dict[str, Any]:
        if name not in RENAMED:
            raise KeyError(name)
        sentence = f"The preset {name!r} is called {RENAMED[name]!r} now: use that name."
        warnings.warn(sentence, FutureWarning, stacklevel=3)
        return self[RENAMED[name]]

    def named(self, name: str) -> dict[str, Any]:
        """Return the fields of a preset; raise ValueError for an unknown name."""
        if name not in self and name not in RENAMED:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(self)}.")
        return self[name]


PRESETS = Presets(EXACT | OWN)
