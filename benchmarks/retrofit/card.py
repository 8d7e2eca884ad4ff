"""Write the model card of a retrofitted SmolLM2 from the results: `python -m benchmarks.retrofit.card`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feedback_transformers import hub, retrofit

from .__main__ import finished
from .pretrained import smollm2
from .reasoning import AS_TRAINED, EVERYTHING, KEEPS, MODELS, TESTED

CARD = Path(__file__).parents[2] / "model_cards" / "smollm2-retrofit.md"
NAME = "time"


def main() -> None:
    runs = finished()
    [line, *_] = runs[KEEPS][NAME]
    plain = runs[KEEPS]["plain"][0]
    original = runs["nothing-lost"]["original"][0]
    shown = {"": AS_TRAINED[NAME], ", the whole prompt seen": EVERYTHING}
    measured = {
        KEEPS: {f"accuracy at {n} swaps{how}": line["accuracy"][m][str(n)] for how, m in shown.items() for n in TESTED}
    }
    measured[KEEPS] |= {f"accuracy of plain LoRA at {n} swaps": plain["accuracy"]["1"][str(n)] for n in TESTED}
    for text, before in original["perplexity"].items():
        after = {f"perplexity, passes {mode}": texts[text] for mode, texts in line["perplexity"].items()}
        measured[text] = after | {"perplexity of the original": before}
    results = {f"{text}: {name}": value for text, found in measured.items() for name, value in found.items()}
    feedback = MODELS[NAME][1]
    assert feedback is not None
    card = hub.model_card(
        retrofit(smollm2()[0], **feedback),
        results,
        name="SmolLM2-135M-Instruct with feedback along time",
        dataset=", ".join(measured),
        description=(
            "Follows a ball under cups. SmolLM2-135M-Instruct (weights rounded to 4 bits) made a feedback model by "
            f"`retrofit`, of which adapters of rank {MODELS[NAME][0]} and the connection were trained, "
            f"{line['parameters']:,} parameters, for {line['steps']} steps; one seed. To follow the ball, the layers "
            f"behind the encoder see {line['recipe']['window']} tokens (sliding_window and layer_types of "
            "config.backbone_config); with attention to the whole prompt it does not, and other text is read so."
        ),
        command="; ".join(each["command"] for each in (line, plain, original)),
    )
    data: Any = card.data
    data.eval_results = [
        result for text, found in measured.items() for result in hub.eval_results(found, "text-generation", text)
    ]
    data.base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    card.save(CARD)
    print(CARD)


if __name__ == "__main__":
    main()
