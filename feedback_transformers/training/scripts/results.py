"""Train, evaluate, and publish the model with what was measured."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ... import hub
from ...card import training_facts
from ..checkpoints import train_safely
from .passes import measure_passes

if TYPE_CHECKING:
    from datasets import Dataset


def train(trainer: Trainer) -> dict[str, float]:
    """Train, from the checkpoint that --resume_from_checkpoint says; true is the last complete one of output_dir."""
    given = trainer.args.resume_from_checkpoint
    known = {"true": True, "false": None}
    return train_safely(trainer, known.get(given.lower(), given) if given else None).metrics


def fit(
    trainer: Trainer,
    test: Dataset | None = None,
    more: Callable[[Any], dict[str, float]] | None = None,
    metric: str | None = None,
) -> dict[str, float]:
    """Train, evaluate and test, as --do_train, --do_eval and --do_predict say; return the last metrics.

    Args:
        more: further metrics, made of the predictions for `test`.
        metric: the metric to measure at each number of passes too, on the data of the last evaluation.
    """
    args, metrics = trainer.args, dict[str, float]()
    if args.do_train:
        record(trainer, "train", train(trainer))
    if args.do_eval:
        metrics = trainer.evaluate()
        if test is None or not args.do_predict:
            metrics |= by_passes(trainer, trainer.eval_dataset, "eval", metric)
        record(trainer, "eval", metrics)
    if args.do_predict and test is not None:
        output = trainer.predict(test)
        metrics = dict(output.metrics or {})
        if more is not None:
            metrics |= more(output.predictions)
        metrics |= by_passes(trainer, test, "test", metric)
        record(trainer, "test", metrics)
    return metrics


def by_passes(trainer: Trainer, rows: Any, split: str, metric: str | None) -> dict[str, float]:
    """Measure `metric` of `rows` at 1 to 2 K passes; nothing without a metric."""
    if metric is None:
        return {}
    name = f"{split}_{metric}"
    return measure_passes(trainer, name, lambda: trainer.predict(rows, metric_key_prefix=split).metrics[name])


def record(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """Print the metrics and write them to {split}_results.json and all_results.json in output_dir.

    Without any, as where nothing was left to train, the files keep those of the run that did."""
    if not metrics:
        return
    trainer.log_metrics(split, {name: value for name, value in metrics.items() if "_step_" not in name})  # a table
    trainer.save_metrics(split, metrics)
    trainer.save_state()


def publish(trainer: Trainer, processor: Any, results: dict[str, float], **card: Any) -> None:
    """Write the model and its card to output_dir, and with --push_to_hub to the Hub too."""
    args, model = trainer.args, whole(trainer.accelerator, trainer.model)
    if not trainer.is_world_process_zero():
        return
    push = args.hub_model_id or Path(str(args.output_dir)).name if args.push_to_hub else None
    card = training_facts(trainer) | card
    publish_model(model, str(args.output_dir), processor, results, push, args.hub_token, **card)


def set_max_length(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Tell the tokenizer how many tokens the model takes, so that `pipeline(..., truncation=True)` cuts there."""
    if model.config.has_attention:
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)


def whole(accelerator: Accelerator, model: Any) -> Any:
    """Return the model without what wraps it; of sharded weights, on the main process, a copy with all of them.

    Every process must call it.
    """
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return unwrapped
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return unwrapped
    kind: Any = next(
        kind for kind in type(unwrapped).__mro__ if not issubclass(kind, FSDPModule)
    )  # FSDP makes a subclass
    complete = kind(deepcopy(unwrapped.config))
    complete.load_state_dict(weights)
    return complete


def publish_model(
    model: Any,
    folder: str,
    processor: Any,
    results: dict[str, float],
    push: str | None,
    token: str | None,
    **card: Any,
) -> None:
    """Export the model and, where `push` names a repository, upload it without checkpoints and logs."""
    from huggingface_hub import HfApi

    hub.export(model, folder, processor=processor, results=results, **card)
    print(f"Model, processor and card are in {folder}")
    if push:
        api = HfApi(token=token)
        repository = api.create_repo(push, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "step_*", "non_finite_batch_*", "runs/*", "logs/*", "training_args.bin"],
        )
