"""FeedbackConfig: the names and numbers of a feedback network, validated.

    h_t = f( c(e_t, phi(y_{t-1})), h_{t-1} )        y_t = g(h_t)

`encoder_*` makes e, `feedback_*` describes f, c and phi, `decoder_*` makes g.
"""

import copy
import os
import shutil
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .feedback_names import NOT_OF_LAYERS, RETROFIT_TYPES, model_type_of, shared_names
from .feedback_presets import PRESETS
from .feedback_rules import check, check_given, check_sizes

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

# What other configs, and people, call them.
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
    "halting_type": "halting",
    "solver_iterations": "solver_steps",
    "tie_embeddings": "tie_word_embeddings",
    **{name: f"feedback_{name}" for name in ("axis", "signal", "connection", "interval", "noise")},
}

# What the borrowed layers have, whether or not those of this family do.
OF_LAYERS = ("sliding_window", "layer_types", "rope_theta", "rope_scaling")


def with_window(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """A window that is named is for all layers; Qwen forgets it unless it is told twice."""
    told = values.get("layer_types") or "use_sliding_window" in values
    if not values.get("sliding_window") or told or model_type not in CONFIG_MAPPING:
        return values
    if not hasattr(CONFIG_MAPPING[model_type], "use_sliding_window"):
        return values
    return {**values, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}


def make_backbone(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    values = with_window(model_type, values)
    try:
        backbone = AutoConfig.for_model(model_type, **values)
    except KeyError as error:  # of parameters of rotary positions
        raise ValueError(f"backbone_config can't be a {model_type}: {error.args[0]}.") from error
    if "sliding_attention" in (values.get("layer_types") or ()):
        backbone.sliding_window = values.get("sliding_window")  # which Qwen drops where use_sliding_window is False
    return backbone


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
        trained_feedback_steps: the fewest and the most passes that the model was trained with, written by training. A
            call with another number warns.
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
        supervision: in training, loss on the `last` pass or on `all` of them.
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
        "pooling_mask",
        "decoder_hidden_states",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
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
    trained_feedback_steps: list[int] | None = None
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

    # Of PreTrainedConfig, where their types are not checked.
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    id2label: dict | None = None
    label2id: dict | None = None

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
        self._refuse_misspelled(kwargs)
        check_given(self, kwargs)
        whole = self.retrofitted_from is not None
        self.backbone_config = (self._whole_backbone if whole else self._backbone)(self.backbone_config)
        self._refuse_misplaced(kwargs)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field as in transformers; refuse, as the constructor does, names that no part would read."""
        known = (
            name in vars(self) or name in self.attribute_map or isinstance(getattr(type(self), name, None), property)
        )
        if vars(self).get("_post_init_done") and not known and not name.startswith("_"):
            self._refuse_misspelled({name: value})
            self._refuse_misplaced({name: value})
        super().__setattr__(name, value)

    def get_text_config(self, *args: Any, **kwargs: Any) -> "FeedbackConfig":
        """Return this config, as encoder and decoder share it; transformers would set decoder_type as `type`."""
        return self

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; `backbone_config` may change fields of the saved layers, not their family."""
        given, saved = kwargs.get("backbone_config"), config_dict.get("backbone_config")
        if given is not None and isinstance(saved, dict):
            family = saved.get("model_type", "llama")
            other = given.get("model_type", family) if isinstance(given, dict) else getattr(given, "model_type", given)
            if isinstance(given, str) or other != family:
                raise ValueError(
                    f"The layers of this checkpoint are {family} and backbone_config asks for {other}: leave it out, "
                    "or give a dictionary of the fields to change."
                )
            if isinstance(given, dict):
                kwargs["backbone_config"] = with_window(family, given)
        return super().from_dict(config_dict, **kwargs)

    def _refuse_misspelled(self, names: dict[str, Any]) -> None:
        """Transformers keeps what it does not know, so that a field with a letter wrong would have no effect."""
        if "preset" in names:
            raise ValueError("preset is no field: use FeedbackConfig.preset('gru', hidden_size=64).")
        if names.get("model_type", self.model_type) != self.model_type:
            return  # PEFT reads the config of a base model as one of these, for its vocabulary
        known = [field.name for field in fields(self)]
        for name in set(names) - set(self.attribute_map):
            meant = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, known, n=1, cutoff=0.855)), None)
            if meant:
                raise ValueError(f"Unknown field {name!r}: did you mean {meant}?")

    def _refuse_misplaced(self, names: dict[str, Any]) -> None:
        """Fields of the borrowed layers' config, which those read there alone."""
        if names.get("model_type", self.model_type) != self.model_type:
            return
        for name in sorted(set(names) & {*OF_LAYERS, *(field.name for field in fields(type(self.backbone_config)))}):
            where = f"backbone_config={{'model_type': {self.backbone_config.model_type!r}, {name!r}: ...}}"
            if self.retrofitted_from is not None:
                where = "the config of the model, and retrofit that"
            raise ValueError(f"{name} is a field of the transformer layers: set it in {where}.")

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the model code goes along, so that a checkpoint loads where this package is not."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in Path(__file__).parent.glob("*.py"):
            if file.name != "__init__.py" and file.parent != Path(save_directory).resolve():
                shutil.copyfile(file, Path(save_directory) / file.name)

    def _backbone(self, given: str | dict | PreTrainedConfig | None) -> PreTrainedConfig:
        """The config of the borrowed layers; what `given` names is copied here, the rest comes from here."""
        if given is None or isinstance(given, str):
            given = {"model_type": "llama" if given is None else given}
        elif isinstance(given, PreTrainedConfig):
            given = given.to_dict()
        model_type, given = model_type_of(given), copy.deepcopy(given)
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
        check_sizes(self, model_type)
        own = {theirs: getattr(self, ours) for theirs, ours in theirs_to_ours.items()}
        if model_type == "gpt2":
            own.update(attn_pdrop=self.dropout, resid_pdrop=self.dropout)
        else:  # Qwen3's own default of head_dim is 128, whatever the hidden size
            own.update(attention_dropout=self.dropout, head_dim=self.hidden_size // self.num_attention_heads)
        layers = max(1, self.num_encoder_layers, self.num_feedback_layers, self.num_decoder_layers)
        own["n_layer" if model_type == "gpt2" else "num_hidden_layers"] = layers
        kinds = given.get("layer_types")
        if kinds and len(set(kinds)) == 1:
            own["layer_types"] = [kinds[0]] * layers
        backbone = make_backbone(model_type, {**own, **named, "pad_token_id": None})
        if len(set(getattr(backbone, "layer_types", None) or [])) > 1:
            raise ValueError(f"All layers must be of one type, and this {model_type} has {backbone.layer_types}.")
        return backbone

    def _whole_backbone(self, given: dict | PreTrainedConfig) -> PreTrainedConfig:
        """The config of the model that was retrofitted; its sizes are copied here."""
        given = given.to_dict() if isinstance(given, PreTrainedConfig) else given
        model_type = model_type_of(given, RETROFIT_TYPES)
        backbone = make_backbone(model_type, {k: v for k, v in given.items() if k != "model_type"})
        for ours, theirs in shared_names(model_type).items():
            if getattr(backbone, theirs) is not None:
                setattr(self, ours, getattr(backbone, theirs))
        if self.intermediate_size is None:  # of GPT-2
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        return backbone

    def validate_architecture(self) -> None:
        """Refuses, with a sentence that says what to change, what cannot be built."""
        types = getattr(self.backbone_config, "layer_types", None)
        layers = max(self.num_encoder_layers, self.num_feedback_layers, self.num_decoder_layers)
        if types and len(types) < layers and self.retrofitted_from is None:  # set to more since it was made
            self.backbone_config.layer_types = [types[0]] * layers
        check(self)

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
