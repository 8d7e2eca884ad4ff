"""Share a feedback model: a repository that loads anywhere, with a card of what was measured.

`save_pretrained` and `push_to_hub` already write the code and the complete auto_map (FeedbackConfig.save_pretrained).
Processor, results and pictures are named once, in one of three ways:

    hub.describe(model, tokenizer, {"accuracy": 0.75}, dataset="me/reviews")  # then model.push_to_hub("me/it")
    trainer.add_callback(hub.CardCallback(trainer, dataset="me/reviews"))  # for TrainingArguments(push_to_hub=True)
    hub.export(model, "folder", tokenizer, {"accuracy": 0.75}, dataset="me/reviews")

A model that was loaded from a folder and is pushed unchanged takes along what lies beside it there.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import AutoProcessor, PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .card import (
    SPLITS,
    THIS_REPOSITORY,
    Results,
    by_dataset,
    check_card,
    eval_results,
    model_card,
    numbers,
    pipeline_of,
    save_eval_results,
    training_facts,
)
from .models.configuration_feedback import FeedbackConfig
from .models.modeling_feedback import FeedbackPreTrainedModel

STUB = (
    "This model card has been automatically generated."  # what transformers says of a model that it knows nothing of
)
NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time")
KEPT = ("license", "language", "base_model", "datasets")  # of a card that is there, unless others are given


@dataclass
class Sharing:
    """Hold what belongs to a repository beside weights, config and code; `card` is what `model_card` takes."""

    processor: Any = None
    results: dict[str, Any] = field(default_factory=dict)
    plots: Sequence[str | Path] = ()
    card: dict[str, Any] = field(default_factory=dict)


def describe(
    model: FeedbackPreTrainedModel,
    processor: Any = None,
    results: Results | None = None,
    plots: Sequence[str | Path] = (),
    **card: Any,
) -> None:
    """Name what goes along when `model` is pushed. Name it again after further training.

    Args:
        processor: a tokenizer, image or feature processor, saved beside the model.
        results: measured numbers by metric, or by data set and metric. Names that begin with eval_ or test_, as
            Trainer's do, tell the split.
        plots: pictures, shown in the card.
        card: what `model_card` takes: `dataset` names what `results` were measured on, `license` the license.

    Raises:
        TypeError: for another model, an unknown name in `card`, or a result that is not a number.
        FileNotFoundError: for a picture that is not there.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type != FeedbackConfig.model_type:
        raise TypeError(f"Give a feedback model, not a {type(model).__name__}: merge_and_unload() adapters first.")
    check_card(card)
    for plot in plots:
        if not Path(plot).is_file():
            raise FileNotFoundError(f"There is no plot {plot}.")
    model.sharing = Sharing(processor, numbers(results or {}), plots, card)  # type: ignore[assignment]


def export(
    model: FeedbackPreTrainedModel,
    folder: str | Path,
    processor: Any = None,
    results: Results | None = None,
    plots: Sequence[str | Path] = (),
    **card: Any,
) -> Path:
    """Write to `folder` what push_to_hub would upload after `describe`, which takes the same arguments."""
    describe(model, processor, results, plots, **card)
    folder = Path(folder)
    model.save_pretrained(folder)
    complete(model, folder, model.sharing)
    return folder


def complete(model: FeedbackPreTrainedModel, folder: str | Path, sharing: Sharing) -> None:
    """Add processor, plots, README.md and .eval_results to `folder`, which a model was saved to."""
    folder = Path(folder)
    if sharing.processor is not None:
        sharing.processor.save_pretrained(folder)
    for plot in map(Path, sharing.plots):
        (folder / "plots").mkdir(exist_ok=True)
        if plot.resolve() != (folder / "plots" / plot.name).resolve():
            shutil.copyfile(plot, folder / "plots" / plot.name)
    given, readme = dict(sharing.card), folder / "README.md"
    said = load_card(readme).data.to_dict() if readme.exists() else {}
    for key in KEPT[:3]:
        if said.get(key):
            given.setdefault(key, said[key])
    card = model_card(model, sharing.results, plots=[Path(plot).name for plot in sharing.plots], **given)
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *(said.get("tags") or [])]))  # those of push_to_hub
    if said.get("datasets"):
        card.data["datasets"] = said["datasets"]
    card.save(readme)
    save_eval_results(folder, sharing.results, given)


def load_card(readme: Path) -> ModelCard:
    try:
        return ModelCard.load(readme)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{readme} can't be read as a card: {str(error).partition(chr(10))[0]}.") from None


def complete_push(model: FeedbackPreTrainedModel, folder: str, repository: str) -> None:
    """Complete `folder` before push_to_hub uploads it to `repository`."""
    target, origin = Path(folder), Path(model.name_or_path or ".")
    named = {"name": repository.split("/")[-1], "repository": repository}
    if model.sharing is not None:
        complete(model, target, replace(model.sharing, card={**named, **model.sharing.card, "repository": repository}))
    elif model.name_or_path and origin.resolve() != target.resolve() and same_weights(origin, target):
        complete(model, target, Sharing(processor_of(origin), plots=sorted(origin.glob("plots/*.png"))))
        for file in (*origin.glob("README.md"), *origin.glob(".eval_results/*.yaml")):
            copy = target / file.relative_to(origin)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(file.read_text(encoding="utf-8").replace(THIS_REPOSITORY, repository), encoding="utf-8")
    elif STUB in (target / "README.md").read_text(encoding="utf-8"):
        complete(model, target, Sharing(card=named))


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same weights, so that results of one are true of the other."""
    names = [{file.name for file in folder.glob("*.safetensors")} for folder in (one, other)]
    return names[0] == names[1] != set() and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0]
    )


def processor_of(folder: str | Path) -> Any:
    """Return the tokenizer, image or feature processor in `folder`; None without one."""
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of Trainer's `metrics` that say how good a model is: not its speed, nor the training loss."""
    names = [name for name in metrics if name.split("_")[0] in SPLITS or name == "perplexity"]
    kept = {name: metrics[name] for name in names if name.partition("_")[2] not in NOT_MEASURED}
    for name, value in kept.items():
        if not isinstance(value, Real):
            raise ValueError(f"The metrics hold {name}={value!r}, which is not a number.")
    return {name: float(value) for name, value in kept.items()}


def draw_losses(history: Sequence[Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw plots/loss.png of Trainer's `state.log_history`, if it has losses and matplotlib is installed."""
    if find_spec("matplotlib") is None or not any({"loss", "eval_loss"} & set(entry) for entry in history):
        return []
    from . import visualize

    path = Path(folder) / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    visualize.loss_curves({"loss": history}, path)
    return [path]


class CardCallback(TrainerCallback):
    """Complete every push of a Trainer with `push_to_hub=True`: code, card, results, plots.

    Trainer alone pushes checkpoints without their code and with a card of its own. This callback writes our card in
    its place: how the model was trained, and what evaluate and predict measured of these weights. With adapters, the
    card of Trainer and PEFT stays, and the results are added to it.

    Args:
        trainer: the Trainer that this is added to.
        dataset: what it evaluates on.
        card: what else `model_card` takes, such as `license`.

    Raises:
        ValueError: where TrainingArguments hold a token, which would be uploaded.
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
        self.results = {}  # they belong to the weights before this step

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
        """Describe the model, so that its own push_to_hub is complete too."""
        if isinstance(self.model(), FeedbackPreTrainedModel) and self.trainer.is_world_process_zero():
            plots = draw_losses(self.trainer.state.log_history, self.drawn.name)
            card = training_facts(self.trainer) | self.card
            describe(self.model(), self.trainer.processing_class, self.results, plots, **card)

    def write(self, **kwargs: Any) -> None:
        """Complete output_dir; called in place of Trainer.create_model_card."""
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
        task = pipeline_of(model.get_base_model())
        card.data.model_name = self.card["name"]
        for key in ("license", "language"):
            if key in self.card:
                card.data[key] = self.card[key]
        results = by_dataset(self.results, self.card["dataset"])
        card.data.eval_results = eval_results(results, task) or None
        card.save(folder / "README.md")
        save_eval_results(folder, results, self.card)
