"""FeedbackConfig: the names and numbers of a feedback network, validated.

    h_t = f( c(e_t, phi(y_{t-1})), h_{t-1} )        y_t = g(h_t)

`encoder_*` makes e, `feedback_*` describes f, c and phi, `decoder_*` makes g.
"""

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

EMBEDDING_TYPES = ("tokens", "patches", "values")
ENCODER_TYPES = ("transformer", "rnn", "cnn")
FEEDBACK_TYPES = ("mlp", "gru", "lstm", "diagonal_gru", "min_gru", "conv", "transformer")
RECURRENT_TYPES = ("gru", "lstm", "diagonal_gru", "min_gru")
DIAGONAL_TYPES = ("diagonal_gru", "min_gru")  # no channel reads another's state
DECODER_TYPES = ("mlp", "rnn", "transformer")
BACKBONE_TYPES = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "gpt2")
BIDIRECTIONAL_TYPES = ("bert", "roberta")
# A retrofit keeps all of a model, so that its layers need not be alike.
RETROFIT_TYPES = (*BACKBONE_TYPES, "gemma2", "gemma3_text", "phi3", "smollm3", "gpt_neox", *BIDIRECTIONAL_TYPES)
CHOICES = {
    "embedding_type": EMBEDDING_TYPES,
    "encoder_type": ENCODER_TYPES,
    "feedback_type": FEEDBACK_TYPES,
    "decoder_type": DECODER_TYPES,
    "feedback_axis": ("time", "depth"),
    "feedback_signal": ("state", "output", "none"),
    "feedback_connection": ("gate", "add", "concat", "memory"),
    "solver": ("sequential", "jacobi", "gauss_seidel", "newton"),
    "supervision": ("last", "all"),
    "halting": ("fixed", "converged", "learned", "act"),
    "halting_measure": ("state", "prediction"),
}

# What the backbones call the fields of FeedbackConfig; where a name is missing here, it is the same.
BACKBONE_NAMES: dict[str, dict[str, str | None]] = {
    "gpt2": {"intermediate_size": "n_inner", "hidden_act": "activation_function", "num_key_value_heads": None},
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
    **{name: {"num_key_value_heads": None} for name in ("gpt_neox", *BIDIRECTIONAL_TYPES)},
}
# What a backbone's config says that is not of one of its layers.
NOT_OF_LAYERS = ("model_type", "vocab_size", "pad_token_id", "num_hidden_layers", "n_layer", "layer_types")
SHARED_WITH_BACKBONE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
)


def model_type_of(backbone: dict, known: tuple[str, ...] = BACKBONE_TYPES) -> str:
    model_type = backbone.get("model_type", "llama")
    if model_type not in known:
        raise ValueError(f"Unknown backbone {model_type!r}; choose one of {', '.join(known)}.")
    return model_type


def shared_names(model_type: str) -> dict[str, str]:
    """Our name -> the backbone's, of the fields that both configs have."""
    names = BACKBONE_NAMES.get(model_type, {})
    both = {name: names.get(name, name) for name in SHARED_WITH_BACKBONE}
    return {ours: theirs for ours, theirs in both.items() if theirs is not None}


MODELING = {
    "AutoModel": "modeling_feedback.FeedbackModel",
    "AutoModelForCausalLM": "modeling_feedback_text.FeedbackForCausalLM",
    "AutoModelForMaskedLM": "modeling_feedback_text.FeedbackForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_feedback_text.FeedbackForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_feedback_text.FeedbackForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_feedback_text.FeedbackForQuestionAnswering",
    "AutoModelForSeq2SeqLM": "modeling_feedback_seq2seq.FeedbackForConditionalGeneration",
    "AutoModelForImageClassification": "modeling_feedback_image.FeedbackForImageClassification",
    "AutoModelForTimeSeriesPrediction": "modeling_feedback_series.FeedbackForTimeSeriesPrediction",
}
AUTO_MAP = {"AutoConfig": "configuration_feedback.FeedbackConfig", **MODELING}

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


@strict
class FeedbackConfig(PreTrainedConfig):
    r"""Configuration of a feedback network.

    Args:
        embedding_type: what goes in: `tokens` (input_ids), `patches` (pixel_values) or `values` (past_values).
        backbone_config: the family that the transformer layers are borrowed from, as a config, a dictionary or
            a name; a LlamaConfig by default. Sizes that it names win over the fields here.
        is_causal: whether a position sees only itself and earlier ones. Masked language models need `False`.
        feedback_axis: `time`, feedback from the previous position, or `depth`, from the previous pass.
        feedback_interval: time axis: positions per update of the feedback, counted from the first real token.
        num_feedback_steps: depth axis: passes over the same positions.
        feedback_signal: `state` feeds back the cell's latent, `output` the real prediction, embedded, and `none` is
            the feed-forward control of the same size, whose connection reads the present input instead of the past
            (a little smaller where feedback has weights of its own: the memory's, or those of a head's way back).
        feedback_connection: how it enters: `gate`, `add`, `concat`, or `memory`, the single shared memory of the
            Feedback Transformer that all layers attend to.
        feedback_noise: standard deviation of the Gaussian noise added to the fed-back signal in training.
        solver: of the time axis. `sequential` is exact; `jacobi` makes `solver_steps` passes over all positions in
            parallel, and `gauss_seidel` over blocks of `solver_block_size` positions in turn, each reading what the
            blocks before it made in the same pass; `newton` is for recurrences of single channels (`diagonal_gru`,
            `min_gru`) without other feedback.
        solver_tolerance: make no further pass once no position's signal changes by more than this, relative to the
            largest signal (`None`: make all `solver_steps`); for `newton`, the residual to be reached.
        gradient_steps: back-propagate through the last so many steps only (`None`: all of them).
        supervision: loss on the `last` pass or on `all` of them.
        halting: `fixed`, all passes; `converged`, a position makes no further pass once the last one changed it by
            less than `halting_threshold` (in evaluation); `learned`, it stops with a probability that is learned
            (PonderNet, Banino et al. 2021, arXiv:2107.05407; in evaluation once it would rather have stopped than
            not); `act`, it stops when its learned halting values sum up to 1, and reads the mean of its states
            (Graves 2016, arXiv:1603.08983).
        halting_measure: of `converged`: change of the `state`, relative to its length, or of the `prediction`, as the
            Kullback-Leibler divergence between those of two passes, in nats.
        halting_threshold: by default .05 of change for `converged`, .5 of probability for `learned`, .99 for `act`.
        halting_prior: of `learned`: the probability to stop at each pass of the geometric prior.
        halting_weight: how much the divergence from that prior (`learned`) or a pass (`act`) adds to the loss.
        share_encoder_decoder: the encoder's layers decode too.
        shared_step_cache: depth axis: later positions read the keys and values of the last pass alone, so that a cache
            is no larger than that of one pass. What a call sees of its own positions stays that of the present pass.
        retrofitted_from: the class of transformers that `retrofit` made this model of. Its base model, described by
            `backbone_config`, is all here: embeddings, final norm, and all layers in their places, the first
            `num_encoder_layers` of them the encoder, the last `num_decoder_layers` the decoder.
    """

    model_type: ClassVar[str] = "feedback"
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "feedback_states",
        "num_feedback_steps",
    ]
    attribute_map: ClassVar[dict] = {"num_hidden_layers": "num_feedback_layers"}

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: Any = None  # int; 4 * hidden_size where left out
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    backbone_config: Any = None  # dict or PreTrainedConfig; always a PreTrainedConfig once built
    is_causal: bool = True

    embedding_type: str = "tokens"
    image_size: int = 28
    patch_size: int = 4
    num_channels: int = 1
    prediction_length: int = 24

    encoder_type: str = "transformer"
    num_encoder_layers: int = 1
    feedback_type: str = "transformer"
    num_feedback_layers: int = 1
    decoder_type: str = "transformer"
    num_decoder_layers: int = 1
    conv_kernel_size: int = 3

    feedback_axis: str = "depth"
    feedback_interval: int = 1
    num_feedback_steps: int = 4
    feedback_signal: str = "state"
    feedback_connection: str = "gate"
    feedback_noise: float | int = 0.0
    solver: str = "sequential"
    solver_steps: int = 4
    solver_block_size: int = 16
    solver_tolerance: float | int | None = None
    gradient_steps: int | None = None
    supervision: str = "last"
    halting: str = "fixed"
    halting_measure: str = "state"
    halting_threshold: float | int | None = None
    halting_prior: float = 0.2
    halting_weight: float | int = 0.01

    tie_word_embeddings: bool = True
    share_encoder_decoder: bool = False
    shared_step_cache: bool = False
    retrofitted_from: str | None = None
    dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    is_encoder_decoder: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    format_version: int = 1

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "FeedbackConfig":
        """The published architecture `name` (see PRESETS), with `fields` overriding its own."""
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **fields})

    def __post_init__(self, **kwargs: Any) -> None:
        self.auto_map = dict(AUTO_MAP)
        kwargs.pop("auto_map", None)
        whole = self.retrofitted_from is not None
        self.backbone_config = (self._whole_backbone if whole else self._backbone)(self.backbone_config)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the model code goes along, so that a checkpoint loads where this package is not."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in Path(__file__).parent.glob("*.py"):
            if file.name != "__init__.py" and file.parent != Path(save_directory).resolve():
                shutil.copyfile(file, Path(save_directory) / file.name)

    def _backbone(self, given: str | dict | PreTrainedConfig | None) -> PreTrainedConfig:
        """The config of the borrowed layers; what `given` names is copied here, the rest comes from here."""
        if given is None or isinstance(given, str):
            given = {"model_type": given or "llama"}
        elif isinstance(given, PreTrainedConfig):
            given = given.to_dict()
        model_type = model_type_of(given)
        aliases = type(AutoConfig.for_model(model_type)).attribute_map  # hidden_size: n_embd
        theirs_to_ours = {aliases.get(theirs, theirs): ours for ours, theirs in shared_names(model_type).items()}
        named = {aliases.get(name, name): value for name, value in given.items() if name not in NOT_OF_LAYERS}
        for theirs, ours in theirs_to_ours.items():
            if named.get(theirs) is not None:
                setattr(self, ours, named[theirs])
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes(model_type)
        own = {theirs: getattr(self, ours) for theirs, ours in theirs_to_ours.items()}
        if model_type == "gpt2":
            own.update(attn_pdrop=self.dropout, resid_pdrop=self.dropout)
        else:  # Qwen3's own default of head_dim is 128, whatever the hidden size
            own.update(attention_dropout=self.dropout, head_dim=self.hidden_size // self.num_attention_heads)
        layers = max(1, self.num_encoder_layers, self.num_feedback_layers, self.num_decoder_layers)
        own["n_layer" if model_type == "gpt2" else "num_hidden_layers"] = layers
        backbone = AutoConfig.for_model(model_type, **{**own, **named, "pad_token_id": None})
        if len(set(getattr(backbone, "layer_types", None) or [])) > 1:
            raise ValueError(f"All layers must be of one type, and this {model_type} has {backbone.layer_types}.")
        return backbone

    def _whole_backbone(self, given: dict | PreTrainedConfig) -> PreTrainedConfig:
        """The config of the model that was retrofitted; its sizes are copied here."""
        given = given if isinstance(given, dict) else given.to_dict()
        model_type = model_type_of(given, RETROFIT_TYPES)
        backbone = AutoConfig.for_model(model_type, **{k: v for k, v in given.items() if k != "model_type"})
        for ours, theirs in shared_names(model_type).items():
            if getattr(backbone, theirs) is not None:
                setattr(self, ours, getattr(backbone, theirs))
        if self.intermediate_size is None:  # of GPT-2
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        return backbone

    def _check_sizes(self, model_type: str) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if (self.hidden_size // self.num_attention_heads) % 2 and model_type != "gpt2":
            raise ValueError(
                f"hidden_size / num_attention_heads is {self.hidden_size // self.num_attention_heads}; "
                "rotary positions need an even number: change either."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )

    def validate_architecture(self) -> None:
        """Refuses, with a sentence that says what to change, what cannot be built."""
        if self.format_version > 1:
            raise ValueError(
                f"This checkpoint has format_version {self.format_version} and this feedback_transformers reads 1: "
                "upgrade feedback_transformers."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        if self.hidden_act != "rrelu" and self.hidden_act not in ACT2FN:
            raise ValueError(f"Unknown hidden_act {self.hidden_act!r}; choose rrelu or one of {', '.join(ACT2FN)}.")
        for name in ("num_encoder_layers", "num_decoder_layers", "feedback_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in (
            "vocab_size",
            "intermediate_size",
            "num_feedback_layers",
            "feedback_interval",
            "num_feedback_steps",
            "solver_steps",
            "solver_block_size",
            "conv_kernel_size",
            "patch_size",
            "image_size",
            "num_channels",
            "prediction_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.gradient_steps is not None and self.gradient_steps < 1:
            raise ValueError(f"gradient_steps is {self.gradient_steps}; give at least 1, or None for all steps.")
        for name in ("solver_tolerance", "halting_threshold"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0, or None.")
        if self.halting in ("learned", "act") and (self.halting_threshold or 0) > 1:
            raise ValueError(
                f"halting_threshold is {self.halting_threshold}; halting={self.halting!r} compares it with a "
                "probability: give at most 1."
            )
        if not 0 < self.halting_prior < 1:
            raise ValueError(f"halting_prior is {self.halting_prior}; it must be above 0 and below 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")
        self._check_combination()

    def _check_combination(self) -> None:
        for ours, theirs in shared_names(self.backbone_config.model_type).items():
            here, there = getattr(self, ours), getattr(self.backbone_config, theirs, None)
            if there is not None and here != there:
                raise ValueError(f"{ours} is {here!r} here and {there!r} in backbone_config: set both to the same.")
        layers = (self.num_encoder_layers, self.num_feedback_layers, self.num_decoder_layers)
        rules = [
            (
                self.retrofitted_from is not None and sum(layers) != self.backbone_config.num_hidden_layers,
                f"{' + '.join(map(str, layers))} layers are not the {self.backbone_config.num_hidden_layers} of the "
                "retrofitted model: change num_encoder_layers, num_feedback_layers or num_decoder_layers.",
            ),
            (
                self.retrofitted_from is not None
                and (
                    {self.encoder_type, self.feedback_type, self.decoder_type} != {"transformer"}
                    or self.feedback_connection == "memory"
                    or self.share_encoder_decoder
                    or self.is_encoder_decoder
                ),
                "A retrofitted model is made of its own layers: it needs encoder_type, feedback_type and decoder_type "
                "'transformer', another feedback_connection than 'memory', no shared or separate encoder.",
            ),
            (
                self.retrofitted_from is not None
                and self.is_causal != (self.backbone_config.model_type not in BIDIRECTIONAL_TYPES),
                f"A retrofitted {self.backbone_config.model_type} can't have is_causal={self.is_causal}.",
            ),
            (
                self.retrofitted_from is not None and not self.is_causal and self.feedback_axis == "time",
                f"A retrofitted {self.backbone_config.model_type} reads both sides, and feedback from the position "
                "before only one: use feedback_axis='depth'.",
            ),
            (
                self.shared_step_cache and (self.feedback_axis, self.feedback_type) != ("depth", "transformer"),
                "shared_step_cache is for the keys and values of passes: it needs feedback_axis='depth' and "
                "feedback_type='transformer'.",
            ),
            (
                self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size,
                f"pad_token_id is {self.pad_token_id}; it must be at least 0 and below vocab_size, {self.vocab_size}.",
            ),
            (
                self.solver != "sequential" and self.feedback_axis == "depth",
                f"solver={self.solver!r} is for feedback_axis='time'; in depth use 'sequential', pass by pass.",
            ),
            (
                self.solver_tolerance is not None and self.feedback_axis == "depth",
                "solver_tolerance is for the solvers of feedback_axis='time'; in depth use halting='converged'.",
            ),
            (
                self.solver == "newton"
                and (self.feedback_type not in DIAGONAL_TYPES or self.feedback_signal != "none"),
                "solver='newton' solves recurrences of single channels: it needs feedback_signal='none' and a "
                f"feedback_type out of {', '.join(DIAGONAL_TYPES)}.",
            ),
            (
                self.halting != "fixed"
                and (self.feedback_signal == "none" or not self.in_passes or self.solver == "gauss_seidel"),
                f"halting={self.halting!r} stops passes: it needs feedback to them, on feedback_axis='depth' or with "
                "solver='jacobi'.",
            ),
            (
                self.halting != "fixed" and self.feedback_axis == "time" and self.feedback_type in RECURRENT_TYPES,
                f"halting={self.halting!r} can't stop a position that a recurrence along time goes through: use "
                "feedback_axis='depth' or another feedback_type.",
            ),
            (
                self.halting != "fixed" and self.is_causal and self.feedback_type == "conv",
                f"halting={self.halting!r} does not go with causal convolutions in the loop: use "
                "feedback_type='transformer', or 'mlp'.",
            ),
            (
                self.halting != "fixed"
                and self.is_causal
                and self.decoder_type == "rnn"
                and (self.feedback_signal == "output" or self.halting_measure == "prediction"),
                f"halting={self.halting!r} with a decoder in the loop needs decoder_type='mlp' or 'transformer'.",
            ),
            (
                self.halting in ("learned", "act") and self.halting_measure != "state",
                f"halting={self.halting!r} reads the state; halting_measure='prediction' is for 'converged'.",
            ),
            (
                self.halting == "learned" and (self.gradient_steps is not None or self.supervision != "last"),
                "halting='learned' weighs the loss of every pass itself: use gradient_steps=None, supervision='last'.",
            ),
            (
                self.halting == "act" and (self.gradient_steps is not None or self.supervision != "last"),
                "halting='act' reads the mean of all passes: use gradient_steps=None and supervision='last'.",
            ),
            (
                self.feedback_interval > 1 and self.feedback_axis == "depth",
                "feedback_interval counts positions, so it needs feedback_axis='time'; set it to 1.",
            ),
            (
                self.feedback_connection == "memory"
                and (
                    (self.feedback_type, self.feedback_axis) != ("transformer", "time")
                    or self.solver not in ("sequential", "jacobi")
                    or self.halting != "fixed"
                ),
                "feedback_connection='memory' needs feedback_type='transformer', feedback_axis='time', "
                "solver='sequential' or 'jacobi', and halting='fixed'.",
            ),
            (
                self.feedback_connection == "memory" and self.backbone_config.model_type == "gpt2",
                "feedback_connection='memory' needs a backbone with separate key and value projections: "
                "use a Llama-shaped backbone_config instead of gpt2.",
            ),
            (
                self.feedback_connection == "memory" and self.feedback_interval > 1,
                "feedback_connection='memory' is written at every position; set feedback_interval=1.",
            ),
            (
                self.feedback_connection == "memory" and self.feedback_signal == "output",
                "feedback_connection='memory' feeds back layer states; use feedback_signal='state'.",
            ),
            (
                self.feedback_signal == "output"
                and self.feedback_axis == "time"
                and self.decoder_type != "mlp"
                and not self.is_causal,
                "feedback_signal='output' along the positions needs a prediction that reads no later ones: set "
                "is_causal=True, feedback_axis='depth' or decoder_type='mlp'.",
            ),
            (
                self.share_encoder_decoder
                and (self.encoder_type, self.num_encoder_layers) != (self.decoder_type, self.num_decoder_layers),
                "share_encoder_decoder needs encoder_type = decoder_type and num_encoder_layers = num_decoder_layers.",
            ),
            (
                self.share_encoder_decoder and self.is_encoder_decoder,
                "share_encoder_decoder does not go with is_encoder_decoder, whose encoder reads another text: "
                "set one of them to False.",
            ),
            (
                self.is_encoder_decoder and not self.is_causal,
                "is_encoder_decoder writes its target from left to right; set is_causal=True.",
            ),
            (
                self.embedding_type == "patches" and self.image_size % self.patch_size != 0,
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}).",
            ),
            (
                self.embedding_type == "patches" and self.num_patches > self.max_position_embeddings,
                f"{self.num_patches} patches need max_position_embeddings >= {self.num_patches}.",
            ),
        ]
        for broken, sentence in rules:
            if broken:
                raise ValueError(sentence)

    @property
    def in_passes(self) -> bool:
        """Whether the loop makes passes over all positions, rather than going position by position."""
        return self.feedback_axis == "depth" or self.solver in ("jacobi", "gauss_seidel")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_attention(self) -> bool:
        """Whether any part attends to earlier positions, so that its cache grows with the text."""
        return self.is_encoder_decoder or any(
            kind == "transformer" and layers > 0
            for kind, layers in (
                (self.encoder_type, self.num_encoder_layers),
                (self.feedback_type, self.num_feedback_layers),
                (self.decoder_type, self.num_decoder_layers),
            )
        )
