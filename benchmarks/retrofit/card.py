"""Write the model card of a retrofitted SmolLM2 from the results file: `python -m benchmarks.retrofit.card`."""

from __future__ import annotations

from pathlib import Path

from feedback_transformers import retrofit
from feedback_transformers.card import model_card

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
        after = {
            f"perplexity with {mode} pass{'es' * (mode != '1')}": texts[text]
            for mode, texts in line["perplexity"].items()
        }
        measured[text] = after | {"perplexity of the original": before}
    feedback = MODELS[NAME][1]
    assert feedback is not None
    model_card(
        retrofit(smollm2()[0], **feedback),
        measured,
        name="SmolLM2-135M-Instruct with feedback along time",
        license="apache-2.0",  # that of SmolLM2
        language="en",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        description=(
            "This model follows a ball under cups that are swapped. It is SmolLM2-135M-Instruct, with weights rounded "
            "to 4 bits, made a feedback model by `retrofit`."
        ),
        good_at="it was trained on up to 6 swaps, and follows the ball through 12 and 18 better than plain LoRA does.",
        limits=(
            f"it follows the ball only while the layers behind the encoder see {line['recipe']['window']} tokens "
            "(`sliding_window` and `layer_types` of `config.backbone_config`). With attention to the whole prompt, as "
            "other text is read, it does not. All figures are of one seed."
        ),
        training={
            "trained parameters": f"{line['parameters']:,}: adapters of rank {MODELS[NAME][0]} and the connection",
            "steps": line["steps"],
            "seeds": 1,
        },
        command="; ".join(each["command"] for each in (line, plain, original)),
    ).save(CARD)
    print(CARD)


if __name__ == "__main__":
    main()
