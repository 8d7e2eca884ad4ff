"""CheckpointMixin: how all models here are loaded, saved and uploaded, with checks that nothing is lost or changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitOperationDelete, HfApi, try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

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


class CheckpointMixin:
    """Load, save and upload as PreTrainedModel does, and check the files.

    Weights are read from safetensors alone, and compared with their checksums; a body with holes is rejected; weights
    that a save replaces are removed.
    """

    generation_config: Any
    # Weights of checkpoints of 0.1.0 that have other names now. PEFT knows tied embeddings by the name `embed_tokens`.
    renamed: ClassVar[dict[str, str]] = {r"embeddings\.tokens\.": "embeddings.embed_tokens."}
    # Called with a model, its folder and a repository before an upload: the package's writes the card.
    before_upload: ClassVar[list[Callable[..., None]]] = []
    # Asked in turn for checkpoints of other kinds: they return a model, or None. The package adds to them.
    converters: ClassVar[list[Callable[..., Any]]] = []

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
        for convert in CheckpointMixin.converters:
            if (converted := convert(cls, pretrained_model_name_or_path, **kwargs)) is not None:
                return converted
        if kwargs.get("trust_remote_code"):
            import_parts(pretrained_model_name_or_path, **kwargs)
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_sums(folder)
        kwargs["key_mapping"] = CheckpointMixin.renamed | cls.renamed | (kwargs.get("key_mapping") or {})
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
        for complete in CheckpointMixin.before_upload:
            complete(self, working_dir, repo_id)
        commit = super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
        api, revision = HfApi(token=kwargs.get("token")), commit.pr_revision or kwargs.get("revision")
        names = api.list_repo_files(repo_id, revision=revision)
        if replaced := replaced_weights(names, os.listdir(working_dir)):
            deletions = [CommitOperationDelete(name) for name in replaced]
            api.create_commit(repo_id, deletions, commit_message="Remove replaced weights", revision=revision)
        return commit
