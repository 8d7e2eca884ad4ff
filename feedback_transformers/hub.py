"""Sharing: a repository that loads anywhere with `trust_remote_code=True`, with a card of measured results.

The code and the complete auto_map go along with every `save_pretrained` and `push_to_hub` (see
FeedbackConfig.save_pretrained). What else belongs to a model, its processor, what was measured, plots, is said once:

    hub.describe(model, tokenizer, {"accuracy": 0.75}, dataset="me/reviews")  # then model.push_to_hub("me/it")
    trainer.add_callback(hub.CardCallback(trainer, dataset="me/reviews"))  # for TrainingArguments(push_to_hub=True)
    hub.export(model, "folder", tokenizer, {"accuracy": 0.75}, dataset="me/reviews")

A model loaded from a folder and pushed as it is takes along what lies beside it there, with nothing said.
"""

from __future__ import annotations

import filecmp
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import EvalResult
from transformers import AutoProcessor, PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .models.configuration_feedback import MODELING, FeedbackConfig
from .models.modeling_feedback import FeedbackPreTrainedModel

TEMPLATE = Path(__file__).with_name("card_template.md")
STUB = (
    "This model card has been automatically generated."  # what transformers says of a model that it knows nothing of
)
PIPELINES = {
    "FeedbackForCausalLM": "text-generation",
    "FeedbackForMaskedLM": "fill-mask",
    "FeedbackForSequenceClassification": "text-classification",
    "FeedbackForTokenClassification": "token-classification",
    "FeedbackForQuestionAnswering": "question-answering",
    "FeedbackForConditionalGeneration": "text2text-generation",
    "FeedbackForImageClassification": "image-classification",
    "FeedbackForTimeSeriesPrediction": "time-series-forecasting",
}
SPLITS = {"eval": "validation", "test": "test"}
NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time")


@dataclass
class Sharing:
    """What a repository holds beyond weights, config and code; `card` is what `model_card` takes."""

    processor: Any = None
    results: dict[str, float] = field(default_factory=dict)
    plots: Sequence[str | Path] = ()
    card: dict[str, Any] = field(default_factory=dict)


KEPT = ("license", "language", "base_model", "datasets")  # of a card that is there, unless others are given


def describe(
    model: FeedbackPreTrainedModel,
    processor: Any = None,
    results: dict[str, float] | None = None,
    plots: Sequence[str | Path] = (),
    **card: Any,
) -> None:
    """Says what goes along when `model` is pushed. Say it again when the model has been trained on.

    Args:
        processor: a tokenizer, image or feature processor, saved beside the model.
        results: measured metrics by name; names that begin with eval_ or test_, as Trainer's do, tell the split.
        plots: pictures, shown in the card.
        card: what `model_card` takes: `dataset` names what `results` were measured on.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type != FeedbackConfig.model_type:
        raise TypeError(
            f"This takes a feedback model, not a {type(model).__name__}: merge_and_unload() adapters first."
        )
    for name, value in (results or {}).items():
        if not isinstance(value, Real):
            raise TypeError(f"results holds {name}={value!r}, which is not a number.")
    check_card(card)
    for plot in plots:
        if not Path(plot).is_file():
            raise FileNotFoundError(f"There is no plot {plot}.")
    numbers = {name: value if isinstance(value, int) else float(value) for name, value in (results or {}).items()}
    model.sharing = Sharing(processor, numbers, plots, card)  # type: ignore[assignment]


def check_card(card: dict[str, Any]) -> None:
    """Before it is written, which may be after a training of hours."""
    known = [name for name in signature(model_card).parameters if name not in ("model", "results", "plots")]
    unknown = sorted(set(card) - set(known))
    if unknown:
        raise TypeError(f"A card has no {', '.join(unknown)}; it takes {', '.join(known)}.")


def export(
    model: FeedbackPreTrainedModel,
    folder: str | Path,
    processor: Any = None,
    results: dict[str, float] | None = None,
    plots: Sequence[str | Path] = (),
    **card: Any,
) -> Path:
    """Writes to `folder` what push_to_hub would upload after `describe`, which takes the same arguments."""
    describe(model, processor, results, plots, **card)
    folder = Path(folder)
    model.save_pretrained(folder)
    complete(model, folder, model.sharing)
    return folder


def complete(model: FeedbackPreTrainedModel, folder: str | Path, sharing: Sharing) -> None:
    """Adds processor, plots, README.md and .eval_results to `folder`, which a model was saved to."""
    folder = Path(folder)
    if sharing.processor is not None:
        sharing.processor.save_pretrained(folder)
    for plot in map(Path, sharing.plots):
        (folder / "plots").mkdir(exist_ok=True)
        if plot.resolve() != (folder / "plots" / plot.name).resolve():
            shutil.copyfile(plot, folder / "plots" / plot.name)
    card = model_card(model, sharing.results, plots=[Path(plot).name for plot in sharing.plots], **sharing.card)
    readme = folder / "README.md"
    if readme.exists():  # the tags that push_to_hub was given are in it, and what its author said
        said = load_card(readme).data
        card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *(said.get("tags") or [])]))
        for key in KEPT:
            if said.get(key) and key not in sharing.card:
                card.data[key] = said[key]
    card.save(readme)
    save_eval_results(folder, sharing)


def load_card(readme: Path) -> ModelCard:
    try:
        return ModelCard.load(readme)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{readme} can't be read as a card: {str(error).partition(chr(10))[0]}.") from None


def complete_push(model: FeedbackPreTrainedModel, folder: str, repository: str) -> None:
    """What FeedbackPreTrainedModel does before `folder` is uploaded by push_to_hub."""
    target, origin = Path(folder), Path(model.name_or_path or ".")
    if model.sharing is not None:
        named = {"name": repository.split("/")[-1], "repository": repository} | model.sharing.card
        complete(model, target, Sharing(model.sharing.processor, model.sharing.results, model.sharing.plots, named))
    elif model.name_or_path and origin.resolve() != target.resolve() and same_weights(origin, target):
        sharing = Sharing(processor_of(origin), plots=sorted(origin.glob("plots/*.png")))
        complete(model, target, sharing)
        for file in (*origin.glob("README.md"), *origin.glob(".eval_results/*.yaml")):
            (target / file.relative_to(origin)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(origin))
    elif STUB in (target / "README.md").read_text(encoding="utf-8"):
        complete(model, target, Sharing(card={"name": repository.split("/")[-1], "repository": repository}))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, so that what was measured in one is true of the other."""
    names = [{file.name for file in folder.glob("*.safetensors")} for folder in (one, other)]
    return names[0] == names[1] != set() and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0]
    )


def processor_of(folder: str | Path) -> Any:
    """The tokenizer, image or feature processor in `folder`; None without one."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of Trainer's `metrics` says how good a model is: not the speed, not the progress, not the training loss."""
    names = [name for name in metrics if name.split("_")[0] in SPLITS or name == "perplexity"]
    kept = {name: metrics[name] for name in names if name.partition("_")[2] not in NOT_MEASURED}
    for name, value in kept.items():
        if not isinstance(value, Real):
            raise ValueError(f"The metrics hold {name}={value!r}, which is not a number.")
    return {name: float(value) for name, value in kept.items()}


def draw_losses(history: Sequence[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """The picture plots/loss.png of Trainer's `state.log_history`, if it has losses and matplotlib is installed."""
    if find_spec("matplotlib") is None or not any({"loss", "eval_loss"} & set(entry) for entry in history):
        return []
    from . import visualize

    path = Path(folder) / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    visualize.loss_curves({"loss": history}, path)
    return [path]


def split_of(metric: str) -> tuple[str, str | None]:
    """eval_accuracy -> accuracy, validation"""
    prefix, _, name = metric.partition("_")
    return (name, SPLITS[prefix]) if prefix in SPLITS and name else (metric, None)


def save_eval_results(folder: Path, sharing: Sharing) -> None:
    """The results as the Hub reads them, .eval_results/<dataset>.yaml; without a dataset they have no place there."""
    dataset = sharing.card.get("dataset")
    if not dataset or not sharing.results:
        return
    entries = [
        EvalResultEntry(dataset_id=dataset, task_id=metric, value=value, notes=sharing.card.get("command") or None)
        for metric, value in sharing.results.items()
        if math.isfinite(value)
    ]
    (folder / ".eval_results").mkdir(exist_ok=True)
    file = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', dataset)}.yaml"
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def eval_results(results: Mapping[str, float], task: str, dataset: str) -> list[EvalResult]:
    """The results as the model-index of a card."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split_of(metric)[1],
            metric_type=split_of(metric)[0],
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in results.items()
        if math.isfinite(value)
    ]


def model_card(
    model: FeedbackPreTrainedModel,
    results: dict[str, float],
    name: str = "feedback model",
    dataset: str = "unknown",
    license: str = "apache-2.0",
    description: str = "",
    command: str = "",
    repository: str = "<this repository>",
    plots: Sequence[str] = (),
) -> ModelCard:
    """A card with the sizes of `model` and the measured `results` on `dataset`, which `command` reproduces."""
    config = model.config
    head = type(model).__name__
    task = PIPELINES.get(head, "feature-extraction")
    data = ModelCardData(
        library_name="transformers",
        license=license,
        pipeline_tag=task,
        tags=["feedback", "feedback_transformers", f"feedback-{config.feedback_axis}"],
        model_name=name,
        eval_results=eval_results(results, task, dataset) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        description=description,
        head=head,
        auto=next(auto for auto, reference in MODELING.items() if reference.endswith(f".{head}")),
        parameters=f"{model.num_parameters():,}",
        config=config,
        results=results,
        dataset=dataset,
        command=command,
        repository=repository,
        plots=plots,
    )


class CardCallback(TrainerCallback):
    """Completes every push of a Trainer with `push_to_hub=True`: code, card, results, plots.

    Trainer pushes a checkpoint without its code, and writes a README.md of its own after the last event before the
    final upload; this writes ours in its place, with what evaluate and predict measured of the weights as they are.
    With adapters, Trainer's and PEFT's card stays, and the results are added to it.

    Args:
        trainer: the Trainer that this is added to.
        dataset: what it evaluates on.
        card: what else `model_card` takes.
    """

    def __init__(self, trainer: Trainer, dataset: str, **card: Any) -> None:
        if trainer.args.hub_token is not None:
            raise ValueError(
                "Trainer uploads training_args.bin with the hub_token in it: leave hub_token out, and set HF_TOKEN or "
                "run `hf auth login`."
            )
        check_card(card)
        name = Path(trainer.args.hub_model_id or trainer.args.output_dir or "feedback model").name
        self.trainer, self.card = trainer, {"name": name, "dataset": dataset, **card}
        self.results: dict[str, float] = {}
        self.drawn = TemporaryDirectory()  # not in output_dir, which an upload may be reading in the background
        self.create_model_card, trainer.create_model_card = trainer.create_model_card, self.write  # type: ignore

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.results = {}  # what was measured was measured of other weights

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, metrics: dict | None = None, **kwargs: Any
    ) -> None:
        self.results = self.results | measured(metrics or {})
        self.describe()

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: Any, metrics: Any, **_: Any) -> None:
        self.on_evaluate(args, state, control, metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_global_step is not None:
            best = [entry for entry in state.log_history if entry.get("step") == state.best_global_step]
            self.results = {name: value for entry in best for name, value in measured(entry).items()}
        self.describe()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.write()

    def model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def describe(self) -> None:
        """So that the model's own push_to_hub is complete too."""
        if isinstance(self.model(), FeedbackPreTrainedModel) and self.trainer.is_world_process_zero():
            plots = draw_losses(self.trainer.state.log_history, self.drawn.name)
            describe(self.model(), self.trainer.processing_class, self.results, plots, **self.card)

    def write(self, **kwargs: Any) -> None:
        """Completes output_dir; in place of Trainer.create_model_card."""
        if not self.trainer.is_world_process_zero():
            return
        folder, model = Path(self.trainer.args.output_dir or "."), self.model()
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, FeedbackPreTrainedModel):
            model.config.save_pretrained(folder)  # for the code
            self.describe()
            complete(model, folder, model.sharing)
            return
        self.create_model_card(**kwargs)
        card = ModelCard.load(folder / "README.md")
        task = PIPELINES.get(type(model.get_base_model()).__name__, "feature-extraction")
        card.data.model_name = self.card["name"]
        card.data.eval_results = eval_results(self.results, task, self.card["dataset"]) or None
        card.save(folder / "README.md")
        save_eval_results(folder, Sharing(results=self.results, card=self.card))
