"""FeedbackConfig: the choices and sizes of a feedback network, checked when they are set.

    h_t = f( c(e_t, phi(y_{t-1})), h_{t-1} )        y_t = g(h_t)

The `encoder_*` fields describe e, the `feedback_*` fields f, c and phi, the `decoder_*` fields g.
"""

import os
import shutil
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, logging

from .feedback_backbone_config import eps_of, layers_config, original_config, with_window
from .feedback_inputs import Fields
from .feedback_modalities import FLAT_FIELDS, fields_of, from_flat
from .feedback_names import (
    CHOICES,
    OF_LAYERS,
    OTHER_NAMES,
    REGISTERED,
    SOLVERS_IN_PASSES,
)
from .feedback_presets import PRESETS
from .feedback_rules import came_along, check, check_given

logger = logging.get_logger(__name__)

MODELING = {
    "AutoModel": "modeling_feedback.FeedbackModel",
    "AutoModelForCausalLM": "modeling_feedback_text.FeedbackForCausalLM",
    "AutoModelForMaskedLM": "modeling_feedback_text.FeedbackForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_feedback_text.FeedbackForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_feedback_text.FeedbackForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_feedback_text.FeedbackForQuestionAnswering",
    "AutoModelForSeq2SeqLM": "modeling_feedback_seq2seq.FeedbackForConditionalGeneration",
    "AutoModelForImageClassification": "modeling_feedback_image.FeedbackForImageClassification",
    "AutoModelForObjectDetection": "modeling_feedback_dense.FeedbackForObjectDetection",
    "AutoModelForImageToImage": "modeling_feedback_dense.FeedbackForImageToImage",
    "AutoModelForVideoClassification": "modeling_feedback_image.FeedbackForVideoClassification",
    "AutoModelForImageTextToText": "modeling_feedback_seq2seq.FeedbackForConditionalGeneration",
    "AutoModelForTimeSeriesPrediction": "modeling_feedback_series.FeedbackForTimeSeriesPrediction",
}
AUTO_MAP = {"AutoConfig": "configuration_feedback.FeedbackConfig", **MODELING}


def import_plugins() -> None:
    """Import the registered parts that came with this checkpoint; they import this module, so not while it loads."""
    from .feedback_plugins import PLUGINS  # noqa: F401


def write_plugins(folder: Path, parts: dict[str, str]) -> None:
    """Write the files of registered parts, text by file name, and what imports them."""
    for name, text in parts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if parts:
        imports = "".join(f"from .{name.removesuffix('.py')} import *  # noqa: F403\n" for name in sorted(parts))
        manifest = f"{imports}\nPLUGINS = {tuple(sorted(parts))}\n"
        (folder / "feedback_plugins.py").write_text(manifest, encoding="utf-8")


@strict
class FeedbackConfig(PreTrainedConfig):
    r"""Configuration of a feedback network.

    The defaults make a causal language model that thinks in passes over its text (`feedback_axis="depth"`). Begin with
    `FeedbackConfig.preset(name)` or the defaults, and change the fields of the first groups before those of the last.

    Args:
        vocab_size: number of tokens.
        hidden_size: width D of all states.
        intermediate_size: width of the MLPs; `None` makes it 4 times `hidden_size`.
        num_attention_heads: attention heads of transformer layers.
        num_key_value_heads: heads of keys and values, fewer for grouped-query attention; `None` makes it
            `num_attention_heads`.
        max_position_embeddings: longest text in positions. Rotary positions go on beyond it with a warning.
        hidden_act: activation of the MLPs, a name that transformers knows.
        backbone_config: family of the transformer layers, as a name (`"llama"`, `"qwen3"`, ...), a dictionary or a
            config of transformers. Set fields of the layers here, such as `{"model_type": "llama", "rms_norm_eps":
            1e-5}`; sizes that it names win over the fields above.
        norm_placement: norms of the transformer layers: `"family"`, the family's own layer; or borrowed attention and
            MLP f with norms n before or after: `"pre"`, x + n f; `"sandwich"`, x + n(f(n(x))), as in Ouro;
            `"residual_sandwich"`, n(x + f(n(x))), as in Huginn; `"post"`, n(x + f(x)), as in TRM and HRM.
        norm_weights: whether norms have weights: those around the layers, and those that `norm_placement` places.
        norm_eps: epsilon of all norms that are not the family's; `None` takes the family's.
        token_mixer: what mixes positions in such layers: `"attention"`, or `"mlp"`, an MLP over
            `max_position_embeddings` positions (TRM's mlp_t).
        mixer_size: width of that MLP; `None` makes it `intermediate_size`.
        is_causal: whether a position sees only itself and earlier ones. Use `False` for masked language models and
            for classifiers that read both sides.
        input_config: what the model reads, as a type or as a dictionary of the type and its fields: `"tokens"`
            (input_ids), `"images"` or `"videos"` (pixel_values), `"values"` (past_values), or `"pretrained"`, an
            encoder of transformers. `{"type": "images", "patch_size": 8}` has the fields of ImageFields.
        source_config: what the encoder of a sequence-to-sequence model reads, in the same way; `None` takes tokens of
            the target's vocabulary.
        embedding_scale: factor of the embeddings.
        num_prefix_tokens: positions before the text that hold learned vectors: registers, or a puzzle's embedding.
        num_prefixes: number of prefixes to choose from by `prefix_ids`.
        prefix_size: learned numbers of a prefix, filled up with zeros; `None` makes it all, `num_prefix_tokens` times
            `hidden_size`.
        prediction_length: number of future values that a time series model predicts.
        upscale: how many times as large as its input an image-to-image model's image is, on each side.
        encoder_type: layers before the loop: `"transformer"`, `"rnn"` (GRU) or `"cnn"`.
        num_encoder_layers: number of encoder layers; 0 feeds the embeddings into the loop.
        feedback_type: layers inside the loop, the cell. Use `"transformer"` or `"mlp"` for passes in depth, `"gru"` or
            `"lstm"` for recurrence along time, `"diagonal_gru"` or `"min_gru"` where long texts must be fast, `"conv"`
            for images and local patterns.
        num_feedback_layers: number of layers inside the loop; also called `num_hidden_layers`.
        decoder_type: layers after the loop: `"mlp"`, `"rnn"` (GRU) or `"transformer"`.
        num_decoder_layers: number of decoder layers; 0 reads the loop's state.
        conv_kernel_size: kernel width of `"cnn"` encoders and `"conv"` cells.
        feedback_axis: where the past comes from: `"time"`, the previous position, as in an RNN; or `"depth"`, the
            previous pass over the same positions, which trains in parallel over positions.
        feedback_interval: positions per update of the feedback on the time axis. A larger interval is faster and feeds
            back less often.
        num_feedback_steps: passes over the same positions on the depth axis. More passes take longer and can be asked
            for at each call.
        trained_feedback_steps: fewest and most passes that the model was trained with; written by training. A call
            with another number of passes warns.
        feedback_signal: what is fed back: `"state"`, the cell's state (the usual choice); `"output"`, the prediction,
            embedded again; or `"none"`, for a feed-forward control whose connection reads the input in place of the
            past. The control has the same size, but for weights that only feedback has.
        feedback_connection: how feedback enters: `"gate"`, a gated sum (the usual choice); `"add"`, a plain sum;
            `"concat"`, a projection of both; `"replace"`, the signal alone; `"sum"`, both without weights;
            `"decay"`, a learned share of the signal below 1 and a projection of the input (Parcae); or `"memory"`, one
            memory that all layers attend to, for transformers along time.
        feedback_recursion: what a step makes of the state: `"single"`, one latent; `"layerwise"`, every layer reads
            what the layer above it made one step ago; `"hierarchical"`, a slow and a fast latent (HRM, TRM);
            `"refinement"`, one latent, with the input and then once without (TRM with a single z).
        num_low_steps: steps of the fast latent within a step of the slow one (L_cycles).
        share_levels: whether the slow and the fast latent have one stack of layers, as in TRM.
        relaxation: λ of the recursions `"hierarchical"` and `"refinement"`, above 0 and at most 1: each application of
            a stack f to a latent z gives (1 - λ) z + λ f. A smaller λ takes smaller steps (EqR).
        state_noise: standard deviation of Gaussian noise on each latent after each application of a stack, for these
            recursions; 0 for none. It is added in training only, and in EqR's own code in evaluation too.
        initial_state: state before the first pass in depth: `"zeros"`, `"input"` (the encoded input), `"learned"` (a
            vector) or `"random"` (Huginn), by which both latents of `"hierarchical"` are drawn (EqR); otherwise the
            fast one begins at a learned vector. `feedback_state` of a call replaces it.
        initial_state_scale: standard deviation of the random state, before it is cut.
        initial_state_cut: largest random state, in standard deviations.
        initial_state_seed: seed of the random state in evaluation.
        connection_norm: whether the fed-back signal is normed before it enters.
        output_norm: where the norm of the state stands: `"decoder"`, behind the decoder; `"around_decoder"`, before
            and behind it, the same one; `"pass"`, at the end of each pass, and so fed back; or `"none"`.
        feedback_noise: standard deviation of Gaussian noise on the fed-back signal in training; 0 for none.
        solver: how the time axis is computed: `"sequential"`, position by position, exact; `"jacobi"`, `solver_steps`
            parallel passes over all positions, faster and approximate; `"gauss_seidel"`, such passes over blocks of
            `solver_block_size` positions in turn, between both; `"newton"`, exact and parallel, for `"diagonal_gru"`
            and `"min_gru"` without other feedback. The depth axis has only `"sequential"`.
        solver_steps: passes of `"jacobi"` and `"gauss_seidel"`.
        solver_block_size: positions per block of `"gauss_seidel"`.
        solver_tolerance: stop all passes once no signal changes by more than this, relative to the largest signal;
            `None` makes all `solver_steps`. For `"newton"`, the residual to reach.
        gradient_steps: number of last steps that gradients go back through; `None` goes through all. A small number
            saves memory.
        supervision: passes whose loss is trained: `"last"`, or `"all"`, which teaches the model to answer early.
        supervision_interval: passes from one answer to the next; the passes between have no loss and no exit. HRM and
            TRM call it H_cycles.
        halting: when a position stops before the last pass: `"fixed"`, never; `"converged"`, in evaluation, once a
            pass changes it by less than `halting_threshold`; `"learned"`, with a learned probability (PonderNet,
            Banino et al. 2021, arXiv:2107.05407), in evaluation at its median; `"act"`, once its learned halting
            values sum up to the threshold, and it reads the mean of its states (Graves 2016, arXiv:1603.08983);
            `"select"`, never, but each reads the state of the pass at which `"learned"` would stop it (Ouro).
        halting_scope: what stops: each `"position"`; or, for `"select"`, the whole `"sequence"`, as its first position
            says (TRM, HRM).
        halting_measure: change that `"converged"` compares: of the `"state"`, relative to its length, or of the
            `"prediction"`, as the Kullback-Leibler divergence between two passes in nats.
        halting_threshold: change, or probability, at which a position stops; `None` takes 0.05 for `"converged"`, 0.5
            for `"learned"`, 0.99 for `"act"` and 1 for `"select"`, and lets no whole sequence stop.
        halting_prior: prior probability to stop at each pass, for `"learned"` and `"select"`; 0.2 expects about 5
            passes, and `None` takes all passes for equally likely, which rewards the entropy of the exits (Ouro).
        halting_weight: weight in the loss of the divergence from the prior (`"learned"`, `"select"`), of a pass
            (`"act"`), or of the prediction whether a whole sequence is right.
        tie_word_embeddings: whether the readout shares the weights of the token embeddings.
        share_encoder_decoder: whether the encoder's layers are the decoder's too.
        shared_step_cache: whether all passes in depth share one cache of keys and values, which holds those of the
            last pass. It makes generation take no more memory than one pass, with other results.
        plugins: files of registered parts (`register`) that come along with a checkpoint; the config sets it.
        retrofitted_from: class of transformers that `feedback_transformers.retrofit` made this model from; set by it.
            `backbone_config` then describes all of the original, whose first `num_encoder_layers` layers are the
            encoder and whose last `num_decoder_layers` are the decoder.
        dropout: dropout probability in all parts.
        initializer_range: standard deviation of initial weights.
        use_cache: whether calls in evaluation return a cache, so that generation reads each token once.
        prefix_lm: whether tokens with `token_type_ids` 1, such as a prompt, see each other on both sides, in a causal
            model.
        is_encoder_decoder: whether the encoder reads another text, as in translation; for
            FeedbackForConditionalGeneration.
        pad_token_id: token that pads batches.
        bos_token_id: token that begins a text.
        eos_token_id: token, or tokens, that end a text.
        decoder_start_token_id: token that begins the target of a sequence-to-sequence model.
        output_hidden_states: whether calls return the states of all parts.
        return_dict: whether calls return an output object rather than a tuple.
        problem_type: loss of a sequence classifier: `"regression"`, `"single_label_classification"` or
            `"multi_label_classification"`; `None` tells it from the labels.
        id2label: names of the classes by their numbers, 0 to `num_labels - 1`.
        label2id: numbers of the classes by their names.
        format_version: version of the checkpoint's format; leave it out.

    Raises ValueError for unknown names and combinations that can't be built, with a sentence that says what to change.
    """

    model_type: ClassVar[str] = "feedback"
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "feedback_states",
        "num_feedback_steps",
        "halting_logits",
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
    norm_placement: str = "family"
    norm_weights: bool = True
    norm_eps: float | None = None
    token_mixer: str = "attention"
    mixer_size: int | None = None
    is_causal: bool = True

    input_config: Any = "tokens"  # str, dict or Fields; always Fields once built
    source_config: Any = None  # likewise, or None
    embedding_scale: float | int = 1.0
    num_prefix_tokens: int = 0
    num_prefixes: int = 1
    prefix_size: int | None = None
    prediction_length: int = 24
    upscale: int = 1

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
    feedback_recursion: str = "single"
    num_low_steps: int = 3
    share_levels: bool = False
    relaxation: float | int = 1.0
    state_noise: float | int = 0.0
    initial_state: str = "zeros"
    initial_state_scale: float | int = 1.0
    initial_state_cut: float | int = 3.0
    initial_state_seed: int = 0
    connection_norm: bool = True
    output_norm: str = "decoder"
    feedback_noise: float | int = 0.0
    solver: str = "sequential"
    solver_steps: int = 4
    solver_block_size: int = 16
    solver_tolerance: float | int | None = None
    gradient_steps: int | None = None
    supervision: str = "last"
    supervision_interval: int = 1
    halting: str = "fixed"
    halting_scope: str = "position"
    halting_measure: str = "state"
    halting_threshold: float | int | None = None
    halting_prior: float | None = 0.2
    halting_weight: float | int = 0.01

    # Fields of PreTrainedConfig, which doesn't check their types.
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
    prefix_lm: bool = False
    is_encoder_decoder: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    plugins: list[str] | None = None
    format_version: int = 3

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "FeedbackConfig":
        """Return the config of a preset, a small architecture that computes a published one or is in its spirit.

        `fields` override its own. Raises ValueError for an unknown name.
        """
        return cls(**{**PRESETS.named(name), **fields})

    def __post_init__(self, **kwargs: Any) -> None:
        self.auto_map = dict(AUTO_MAP)
        kwargs.pop("auto_map", None)
        import_plugins()
        if {*FLAT_FIELDS} & kwargs.keys():
            kwargs = self._read_flat(kwargs)
        for name in ("input_config", "source_config"):
            if (given := getattr(self, name)) is not None or name == "input_config":
                setattr(self, name, fields_of(given, name, came_along(self)))
        files = {name for name, _ in self.registered_parts()}
        self.plugins = sorted(files) if files else self.plugins
        self._refuse_misspelled(kwargs)
        check_given(self, kwargs)
        whole = self.retrofitted_from is not None
        self.backbone_config = (original_config if whole else layers_config)(self, self.backbone_config)
        self._refuse_misplaced(kwargs)
        if self.norm_eps is None:
            self.norm_eps = eps_of(self.backbone_config)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    # transformers looks for each name in attribute_map first; a generated token would wait for that a hundred times.
    __getattribute__ = object.__getattribute__

    def __getattr__(self, name: str) -> Any:
        """Return the field that a name of `attribute_map` means."""
        if name not in type(self).attribute_map:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self, type(self).attribute_map[name])

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field as in transformers; refuse, as the constructor does, names that no part would read."""
        known = (
            name in vars(self) or name in self.attribute_map or isinstance(getattr(type(self), name, None), property)
        )
        if vars(self).get("_post_init_done") and not known and not name.startswith("_"):
            self._refuse_misspelled({name: value})
            self._refuse_misplaced({name: value})
        if vars(self).get("_post_init_done") and name in ("input_config", "source_config") and value is not None:
            before = getattr(self, name)
            if isinstance(value, dict) and "type" not in value and before is not None:
                value = {**before.to_dict(), **value}
            value = fields_of(value, name)
        super().__setattr__(name, value)

    def _read_flat(self, others: dict[str, Any]) -> dict[str, Any]:
        """Set input_config from the fields of 0.1.0; return the other arguments."""
        if "embedding_type" not in others or self.input_config != "tokens":
            name = next(name for name in FLAT_FIELDS if name in others)
            raise ValueError(
                f"{name} is a field of input_config: give "
                f"input_config={{'type': 'images', {name!r}: {others[name]!r}}}, or source_config in the same way."
            )
        logger.warning_once(
            "embedding_type, image_size, patch_size and num_channels are fields of input_config now, such as "
            'input_config={"type": "images", "patch_size": 4, "num_channels": 3}.'
        )
        moved = from_flat(others)
        self.input_config = moved.pop("input_config")
        return moved

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as what JSON can hold."""
        values = super().to_dict()
        for name in ("input_config", "source_config"):
            if isinstance(values[name], Fields):
                values[name] = values[name].to_dict()
        return values

    def get_text_config(self, *args: Any, **kwargs: Any) -> "FeedbackConfig":
        """Return this config, as encoder and decoder share it; transformers would set decoder_type as `type`."""
        return self

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config as in transformers; `backbone_config` may change fields of the layers, not their family."""
        version = config_dict.get("format_version", 3) if config_dict.get("model_type") == cls.model_type else 3
        if version == 1:
            config_dict = {**config_dict, "norm_eps": 1e-6}  # of all norms then
        if version < 3:
            config_dict = {**from_flat(config_dict), "format_version": 3}
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
        """Raise ValueError for names close to a field, which transformers would keep and nothing would read."""
        if "preset" in names:
            raise ValueError("preset is no field: use FeedbackConfig.preset('gru', hidden_size=64).")
        if names.get("model_type", self.model_type) != self.model_type:
            return  # PEFT reads the config of any base model with this class, for its vocabulary
        known = [field.name for field in fields(self)]
        for name in set(names) - set(self.attribute_map):
            meant = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, known, n=1, cutoff=0.855)), None)
            if meant:
                raise ValueError(f"Unknown field {name!r}: did you mean {meant}?")

    def _refuse_misplaced(self, names: dict[str, Any]) -> None:
        """Raise ValueError for fields of the transformer layers, which are read in backbone_config only."""
        if names.get("model_type", self.model_type) != self.model_type:
            return
        for name in sorted(set(names) & {*OF_LAYERS, *(field.name for field in fields(type(self.backbone_config)))}):
            where = f"backbone_config={{'model_type': {self.backbone_config.model_type!r}, {name!r}: ...}}"
            if self.retrofitted_from is not None:
                where = "the config of the model, and retrofit that"
            raise ValueError(f"{name} is a field of the transformer layers: set it in {where}.")

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as in transformers, with the model code, so that a checkpoint loads without this package."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in Path(__file__).parent.glob("*.py"):
            if file.name != "__init__.py" and file.parent != Path(save_directory).resolve():
                shutil.copyfile(file, Path(save_directory) / file.name)
        write_plugins(Path(save_directory), dict(self.registered_parts()))

    def registered_parts(self) -> list[tuple[str, str]]:
        """Return the file names and texts of the registered parts that this config names."""
        named = [*((field, getattr(self, field)) for field in CHOICES), ("input_type", self.source_type)]
        return [REGISTERED[each] for each in dict.fromkeys(named) if each in REGISTERED]

    def validate_architecture(self) -> None:
        """Raise ValueError, with a sentence that says what to change, for what can't be built."""
        types = getattr(self.backbone_config, "layer_types", None)
        layers = max(self.num_encoder_layers, self.num_feedback_layers, self.num_decoder_layers)
        if types and len(types) < layers and self.retrofitted_from is None:  # more layers were set later
            self.backbone_config.layer_types = [types[0]] * layers
        check(self)

    @property
    def in_passes(self) -> bool:
        """Whether the loop makes passes over all positions rather than going position by position."""
        return self.feedback_axis == "depth" or self.solver in SOLVERS_IN_PASSES

    @property
    def input_type(self) -> str:
        """Type of the model's input."""
        return self.input_config.type

    @property
    def source_type(self) -> str:
        """Type of the input that a sequence-to-sequence model's encoder reads."""
        return "tokens" if self.source_config is None else self.source_config.type

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
