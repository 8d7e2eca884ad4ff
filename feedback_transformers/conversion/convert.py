"""Turn a published checkpoint into a model of ours, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..models.configuration_feedback import FeedbackConfig
from . import albert, hrm_text, huginn, nanbeige, ouro, trm  # noqa: F401 - each enters its families
from .families import FAMILIES, Family, Official
from .mapping import Weights, to_ours, to_theirs

# model_type of a published config -> which family its weights are of
TYPES: dict[str, Any] = {
    "albert": lambda official, names: "albert",
    "ouro": lambda official, names: "ouro",
    "nanbeige": lambda official, names: "nanbeige",
    "hrm_text": lambda official, names: "hrm_text",
    "huginn_raven": huginn.kind_of,
}
# model_type, or _class_name, of a published config that is known and not built -> its name, and what is missing here
NOT_BUILT = dict.fromkeys(
    ("parcae", "ParcaeConfig"),
    "A Parcae has value embeddings with gates, norms of queries and keys without weights, a squared ReLU and a "
    "projection behind the loop, which are not built here: only its injection is, as feedback_connection='decay'.",
)
DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def family_of(official: Official, names: Collection[str]) -> Family:
    """Return the family of a published config and of the names of its weights.

    Raises:
        ValueError: no family here has such a config.
    """
    check_built(official)
    kind = official.get("model_type")
    if kind in TYPES:
        return FAMILIES[TYPES[kind](official, names)]
    if trm.is_puzzle(official):
        return FAMILIES[trm.kind_of(official, names)]
    raise ValueError(f"A config of type {kind!r} is of no family that loads here: {', '.join(FAMILIES)}.")


def check_built(official: Official) -> None:
    """Raise ValueError for a published config that is known, and asks for what is not built."""
    for name in (official.get("model_type"), official.get("_class_name")):
        if name in NOT_BUILT:
            raise ValueError(NOT_BUILT[name])


def convert(official: Official, weights: Weights, family: str | None = None, head: Any = None, **options: Any) -> Any:
    """Return a model of ours that computes what the published one computes.

    Args:
        official: the published config, as a dictionary.
        weights: the published weights by their official names.
        family: one of FAMILIES; told from the config and the weights where left out.
        head: a FeedbackFor... class; the family's own where left out. Another head gets new weights.
        options: for `from_pretrained`, such as dtype, and fields of the config.

    Raises:
        ValueError: the config asks for what is not built, or a weight is missing or belongs to no part.
    """
    from .. import FeedbackForCausalLM, FeedbackForMaskedLM

    kind = FAMILIES[family] if family else family_of(official, weights)
    heads = {"FeedbackForCausalLM": FeedbackForCausalLM, "FeedbackForMaskedLM": FeedbackForMaskedLM}
    config = kind.config(official)
    ours = to_ours(kind.rows(official), plain(kind, weights))
    cls = head or heads[kind.head]
    with torch.device("meta"):
        expected = heads[kind.head](config).state_dict()
    for name, weight in expected.items():
        if name not in ours and any(re.fullmatch(pattern, name) for pattern in kind.zeros):
            ours[name] = torch.zeros(weight.shape, dtype=next(iter(ours.values())).dtype)
    tied = {name for name in kind.tied if name in expected} if config.tie_word_embeddings else set()
    body = cls is not heads[kind.head]  # of which the official head is no part
    missing, unknown = expected.keys() - ours.keys() - tied, ours.keys() - expected.keys()
    missing = {name for name in missing if name.startswith("model.") or not body}
    if missing or unknown:
        which, name = ("lacks", min(missing)) if missing else ("has", min(unknown))
        raise ValueError(
            f"This {kind.name} checkpoint {which} {name}: its weights are not those that its config tells."
        )
    for name in tied:
        ours.pop(name, None)
    if body:
        ours = {name: weight for name, weight in ours.items() if name.startswith("model.")}
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    options.setdefault("dtype", next(iter(ours.values())).dtype)
    fields = {name: options.pop(name) for name in list(options) if name != "dtype" and hasattr(config, name)}
    if "num_labels" in fields:
        fields["id2label"] = {i: f"LABEL_{i}" for i in range(fields.pop("num_labels"))}
    if isinstance(fields.get("backbone_config"), dict):
        fields["backbone_config"] = {**config.backbone_config.to_dict(), **fields["backbone_config"]}
    if fields:
        config = FeedbackConfig.from_dict({**config.to_dict(), **fields})
    return cls.from_pretrained(None, config=config, state_dict=ours, **options)


def plain(family: Family, weights: Weights) -> Weights:
    """Return the weights without the prefixes that some checkpoints have, and without what holds nothing learned."""
    named = {}
    base = bool(family.body) and not any(name.startswith(family.body) for name in weights)
    for name, weight in weights.items():
        name = family.body * base + name
        prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), "")
        if not any(re.fullmatch(pattern, name) for pattern in family.dropped):
            named[name.removeprefix(prefix)] = weight
    return named


def to_official(model: Any, family: str) -> tuple[Official, Weights]:
    """Return the config and the weights of a model in the layout of a published family.

    Raises:
        ValueError: the model computes another function than this family's, or holds what the layout has no place for.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}; choose one of {', '.join(FAMILIES)}.")
    kind, config = FAMILIES[family], model.config
    official = kind.official(config)
    again = kind.config(official)
    for name in COMPARED:
        here, there = getattr(config, name), getattr(again, name)
        if here != there:
            raise ValueError(
                f"A {family} has {name}={there!r}, and this model {here!r}, so it can't be written as one."
            )
    for name in COMPARED_LAYERS:
        here, there = (getattr(each.backbone_config, name, None) for each in (config, again))
        if here != there:
            raise ValueError(f"The layers of a {family} have {name}={there!r}, and those of this model {here!r}.")
    ours = {name: weight.detach() for name, weight in model.state_dict().items()}
    for name in kind.tied if config.tie_word_embeddings else ():
        ours.pop(name, None)
    for name in list(ours):
        if any(re.fullmatch(pattern, name) for pattern in kind.zeros):
            if ours[name].any():
                raise ValueError(f"{name} is not zero, and the layout of {family} has no place for it.")
            del ours[name]
    return official, to_theirs(kind.rows(official), ours)


# Fields that have to be the same for two models to compute the same function.
COMPARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_encoder_layers", "num_feedback_layers", "num_decoder_layers", "feedback_type", "feedback_axis"),
    *("feedback_connection", "connection_norm", "feedback_signal", "feedback_recursion", "num_low_steps"),
    *("share_levels", "initial_state", "norm_placement", "norm_weights", "norm_eps", "output_norm", "token_mixer"),
    *("halting", "embedding_scale", "is_causal", "prefix_lm", "num_prefix_tokens", "tie_word_embeddings"),
    *("num_feedback_steps", "supervision_interval", "halting_scope", "initial_state_scale", "shared_step_cache"),
    *("mixer_size", "num_prefixes", "encoder_type", "decoder_type", "feedback_interval"),
    *("relaxation", "initial_state_cut"),
)


COMPARED_LAYERS = (
    "model_type",
    "head_dim",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
)


def load_official(name: str | Path, **options: Any) -> tuple[Official, Weights]:
    """Read the config and the weights of a published checkpoint, from a folder or the Hub, without its code.

    A puzzle model's folder holds `all_config.yaml` and a pickle, which is read with `weights_only=True`.
    """
    downloads = {key: value for key, value in options.items() if key in DOWNLOADS}
    folder = Path(name)
    if (folder / "all_config.yaml").is_file():
        return puzzle_folder(folder)
    official, _ = PreTrainedConfig.get_config_dict(name, **downloads)
    return official, read_weights(name, **downloads)


def read_weights(name: str | Path, **downloads: Any) -> Weights:
    """Return all weights of a safetensors checkpoint, whole or in shards."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **downloads)
    if index is None:
        return load_file(str(cached_file(name, SAFE_WEIGHTS_NAME, **downloads)))
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(json.loads(Path(str(index)).read_text())["weight_map"].values())):
        weights |= load_file(str(cached_file(name, shard, **downloads)))
    return weights


def puzzle_folder(folder: Path) -> tuple[Official, Weights]:
    """Read a folder of a puzzle model's training: all_config.yaml, and the last step_N.

    Raises:
        ValueError: the weights are missing, or nothing tells how many cells a puzzle has.
    """
    import yaml

    written = yaml.safe_load((folder / "all_config.yaml").read_text(encoding="utf-8"))
    steps = sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    if not steps:
        raise ValueError(f"{folder} holds no weights, named step_ and a number.")
    weights = torch.load(steps[-1], map_location="cpu", weights_only=True)
    official = {**written["arch"], **{name: written[name] for name in ("seq_len", "vocab_size") if name in written}}
    plainly = {name.split("inner.")[-1]: weight for name, weight in weights.items()}
    official.setdefault("vocab_size", len(plainly["embed_tokens.embedding_weight"]))
    if (puzzles := plainly.get("puzzle_emb.weights")) is not None:
        official.setdefault("num_puzzle_identifiers", len(puzzles))
    if (mixer := plainly.get("L_level.layers.0.mlp_t.down_proj.weight")) is not None:
        official.setdefault("seq_len", len(mixer) - trm.prefix_length(official))
    if "seq_len" not in official:
        raise ValueError(
            f"{folder}/all_config.yaml lacks seq_len: add a puzzle's number of cells, such as seq_len: 81."
        )
    return official, weights


def is_published(config: dict[str, Any]) -> bool:
    """Return whether a config is a published one that loads here."""
    return config.get("model_type") in TYPES or trm.is_puzzle(config)


def convert_checkpoint(cls: Any, name: Any, **options: Any) -> Any:
    """Return the published checkpoint `name` as a model of class `cls`; None where it is none that is known.

    `FeedbackPreTrainedModel.from_pretrained` asks this first.
    """
    given = options.get("config")
    if name is None or isinstance(given, FeedbackConfig):
        return None
    downloads = {key: value for key, value in options.items() if key in DOWNLOADS}
    folder = Path(str(name))
    if not (folder / "all_config.yaml").is_file():
        official, _ = PreTrainedConfig.get_config_dict(name, **downloads)
        check_built(official)
        if not is_published(official):
            return None
    official, weights = load_official(name, **downloads)
    kept = {key: value for key, value in options.items() if key not in (*DOWNLOADS, "config", "trust_remote_code")}
    if isinstance(given, PreTrainedConfig):  # which may have been changed since it was read
        official = {**official, **given.to_dict()}
        if given.id2label and given.id2label != {0: "LABEL_0", 1: "LABEL_1"}:
            kept.setdefault("id2label", given.id2label)
    loaded = convert(official, weights, head=cls, **kept)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config._name_or_path = str(name)
    if model.can_generate():
        with suppress(OSError):  # where there is none
            model.generation_config = GenerationConfig.from_pretrained(name, **downloads)
    return loaded
