"""PRESETS: published architectures, as fields of FeedbackConfig."""

from typing import Any

# Each built only from the fields of FeedbackConfig; the sizes are small defaults to override.
PRESETS: dict[str, dict[str, Any]] = {
    # Fan et al. 2020, arXiv:2002.09402: all layers attend to one memory of merged past layer states.
    "feedback-transformer": {
        "feedback_axis": "time",
        "feedback_type": "transformer",
        "feedback_connection": "memory",
        "num_encoder_layers": 0,
        "num_feedback_layers": 4,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # Zhang 2026, Recurrent Looped Transformer: the top state of a token enters the next token through a gate.
    "recurrent-looped": {
        "feedback_axis": "time",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "num_encoder_layers": 1,
        "num_feedback_layers": 3,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # Geiping et al. 2025, arXiv:2502.05171 (Huginn): s_i = R(A[s_{i-1}; e]), gradient through the last 8 passes.
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
    # Jolicoeur-Martineau 2025, arXiv:2510.04871 (TRM), its single-latent variant: two layers, the input added at
    # every pass, an answer supervised after every pass.
    "tiny-recursive": {
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
    # Cho et al. 2014, arXiv:1406.1078, behind the gated input layer that every model here has.
    "gru": {
        "feedback_axis": "time",
        "feedback_type": "gru",
        "feedback_signal": "none",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # Hochreiter & Schmidhuber 1997, behind the same input layer.
    "lstm": {
        "feedback_axis": "time",
        "feedback_type": "lstm",
        "feedback_signal": "none",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
    # Jordan 1986, Serial order: the network's own output is the context of its next step.
    "jordan": {
        "feedback_axis": "time",
        "feedback_type": "mlp",
        "feedback_signal": "output",
        "feedback_connection": "add",
        "num_encoder_layers": 0,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
}
