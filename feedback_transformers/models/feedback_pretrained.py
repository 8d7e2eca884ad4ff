"""FeedbackPreTrainedModel: what all models share of loading, saving, initial weights and switches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import CommitOperationDelete, HfApi, try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import attention_of, initialize
from .feedback_files import check_download, check_sums, drop_sums, finish_save, replaced_weights
from .feedback_registry import import_parts

# Parts that may be added to the body of a trained model, with new weights. A head is outside of the body.
ADDED = ("loop.halting.", "loop.cross_attention.")


def check_whole(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise ValueError where weights of the body are missing, which transformers would fill with random numbers."""
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    tied = model.all_tied_weights_keys
    tied = tied | {source: target for target, source in tied.items()}
    missing = {key for key in missing if key not in tied or tied[key] in missing}
    holes = sorted(key for key in missing if key.startswith(body) and not key.removeprefix(body).startswith(ADDED))
    if holes:
        raise ValueError(
            f"The checkpoint lacks {len(holes)} weights of the model, such as {holes[0]}: copy it again; if it is of "
            "another kind of model, make a feedback model of that with feedback_transformers.retrofit; or give "
            "ignore_mismatched_sizes=True, to begin with random ones."
        )


class FeedbackPreTrainedModel(PreTrainedModel):
    """Base of all models here: loading and saving, initial weights, checkpointing and attention switches."""

    config: FeedbackConfig
    config_class = FeedbackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FeedbackLoop"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _is_stateful = True  # no feedback state can be taken back; set here, as transformers' own False hides a mixin's
    # Weights of checkpoints of 0.1.0 that have other names now. PEFT knows tied embeddings by the name `embed_tokens`.
    renamed: ClassVar[dict[str, str]] = {r"embeddings\.tokens\.": "embeddings.embed_tokens."}
    # Called with a model, its folder and a repository before an upload: the package's writes the card.
    before_upload: ClassVar[list[Callable[..., None]]] = []
    # Asked in turn for checkpoints of other kinds: they return a model, or None. The package adds to them.
    converters: ClassVar[list[Callable[..., Any]]] = []
    sharing: Any = None  # what goes along in a push: see feedback_transformers.hub.describe
    loss_arguments: ClassVar[tuple[str, ...]] = ()  # what `forward(**kwargs)` takes beyond its signature
    unread: ClassVar[dict[str, str]] = {}  # arguments of other models that this one rejects, and what to do instead

    def __init__(self, config: FeedbackConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.can_generate():  # else transformers drops num_feedback_steps when it loads the generation config
            self.generation_config._from_model_config = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether passes are recomputed in the backward. PEFT still asks by this name, which transformers warns of."""
        return self.is_activation_checkpointing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as in transformers, from safetensors only, since a pickle could run code.

        Raises OSError for weights that are not what was saved (SHA256SUMS) or what the Hub announced, and ValueError
        for a checkpoint without some weights of the body. `ignore_mismatched_sizes=True` allows these to be new, as
        those of a head always may.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                "Weights are loaded from safetensors alone, as a pickle could run code: leave use_safetensors out."
            )
        for convert in FeedbackPreTrainedModel.converters:
            if (converted := convert(cls, pretrained_model_name_or_path, **kwargs)) is not None:
                return converted
        if kwargs.get("trust_remote_code"):
            import_parts(pretrained_model_name_or_path, **kwargs)
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_sums(folder)
        kwargs["key_mapping"] = FeedbackPreTrainedModel.renamed | cls.renamed | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        config = model.config
        revision = getattr(config, "_commit_hash", None) or kwargs.get("revision")
        path = f"{kwargs.get('subfolder', '')}/{CONFIG_NAME}".lstrip("/")
        if not Path(name := str(config.name_or_path)).is_dir():
            found = try_to_load_from_cache(name, path, kwargs.get("cache_dir"), revision)
            if isinstance(found, str):
                folder = Path(found).parent
                check_download(folder)
        if model.can_generate() and kwargs.get("generation_config") is None:
            model.restore_generation_config(folder)
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Reject a body with holes before transformers lists them, each in a line of its own."""
        if not load_config.ignore_mismatched_sizes:
            model.mark_tied_weights_as_initialized(loading_info)  # which also takes shared modules off the list
            check_whole(model, loading_info.missing_keys)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def restore_generation_config(self, folder: Path) -> None:
        """Read `num_feedback_steps` from the saved generation config, where transformers drops it in loading."""
        config: Any = self.generation_config
        config._from_model_config = False
        file = folder / GENERATION_CONFIG_NAME
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved.get("num_feedback_steps") is not None:
                config.num_feedback_steps = saved["num_feedback_steps"]

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Save the model as in transformers, remove the weights that it replaces, and write SHA256SUMS."""
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if not is_main_process or adapters_only:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            return
        drop_sums(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finish_save(save_directory)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what push_to_hub saved, and remove the weights that it replaces from the repository."""
        finish_save(working_dir)
        for complete in FeedbackPreTrainedModel.before_upload:
            complete(self, working_dir, repo_id)
        commit = super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
        api, revision = HfApi(token=kwargs.get("token")), commit.pr_revision or kwargs.get("revision")
        names = api.list_repo_files(repo_id, revision=revision)
        if replaced := replaced_weights(names, os.listdir(working_dir)):
            deletions = [CommitOperationDelete(name) for name in replaced]
            api.create_commit(repo_id, deletions, commit_message="Remove replaced weights", revision=revision)
        return commit

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the borrowed layers ask the interface of their config, which is a sub-config of ours

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Set the attention implementation as in transformers, also for the borrowed layers.

        Raises ValueError for an implementation that the borrowed family does not support.
        """
        asked: Any = attn_implementation
        if isinstance(asked, dict):
            asked = asked.get("backbone_config", asked.get("", self.config._attn_implementation))
        chosen = self._check_and_adjust_attn_implementation(asked, allow_all_kernels=allow_all_kernels)
        backbone = self.config.backbone_config
        if chosen != attention_of(self.config, chosen):
            raise ValueError(f"{backbone.model_type} layers support attn_implementation='eager' only: use that.")
        backbone._attn_implementation_internal = chosen  # before transformers does so, with a warning
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return self, as models without an encoder-decoder do, whatever layers run before the loop.

        PEFT and generation take a model for an encoder-decoder if this is another module.
        """
        return self

    def get_decoder(self) -> nn.Module:
        """Return the model below the head, as transformers means it; the decoder g is `model.decoder`."""
        return self.base_model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of tokens, as in transformers; reject a model that has none."""
        if self.config.embedding_type != "tokens":
            raise ValueError(f"A model of {self.config.embedding_type} has no vocabulary that could be resized.")
        return super().resize_token_embeddings(*args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialize a module, also one without weights of its own: GPT-2's attention initializes its projections.

        transformers passes over those in code outside of it.
        """
        own = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and own)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("transformers.models."):
            initialize(self.config.backbone_config, module)
        else:
            super()._init_weights(module)
        if isinstance(module, Conv1D):  # of GPT-2 layers, which the default leaves out
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif hasattr(module, "init_parameters"):  # our modules with parameters of their own
            module.init_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Switch checkpointing of layers and of the loop, which checkpoints whole passes or runs of positions.

        Layers inside the loop are not checkpointed once more: they would drop the cache that the loop keeps there.
        """
        checkpoint = kwargs.get("gradient_checkpointing_func")
        if enable and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError("A feedback loop can't be checkpointed with use_reentrant=True: set it to False.")
        super()._set_gradient_checkpointing(enable, **kwargs)
        model: Any = self.base_model
        parts = [model.loop.cell]
        if self.config.feedback_axis == "time" and self.config.feedback_signal == "output":  # decodes in the loop
            parts.append(model.encoder if model.decoder is None else model.decoder)
        for layer in (layer for part in parts for layer in part.modules()):
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = False
