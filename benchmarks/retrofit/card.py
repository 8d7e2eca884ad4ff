"""The model card of a retrofitted SmolLM2: `python -m benchmarks.retrofit.card` writes what the results file says."""

from __future__ import annotations

from pathlib import Path

from feedback_transformers import hub, retrofit

from .__main__ import finished
from .pretrained import smollm2
from .reasoning import KEEPS, MODELS, TESTED

CARD = Path(__file__).parents[2] / "model_cards" / "smollm2-retrofit.md"
NAME, MODE = "time", "in order"


def main() -> None:
    runs = finished()
    [line, *_] = runs[KEEPS][NAME]
    results = {f"accuracy at {n} swaps": line["accuracy"][MODE][str(n)] for n in TESTED}
    plain = runs[KEEPS]["plain"][0]["accuracy"]["1"]
    results |= {f"accuracy of plain LoRA at {n} swaps": plain[str(n)] for n in TESTED}
    results |= {
        f"perplexity on {text}, passes {mode}": value
        for mode, texts in line["perplexity"].items()
        for text, value in texts.items()
    }
    original = runs["nothing-lost"]["original"][0]["perplexity"]
    results |= {f"perplexity on {text} of the original": value for text, value in original.items()}
    feedback = MODELS[NAME][1]
    assert feedback is not None
    card = hub.model_card(
        retrofit(smollm2()[0], **feedback),
        results,
        name="SmolLM2-135M-Instruct with feedback along time",
        dataset=KEEPS,
        description=(
            "Follows a ball under cups. SmolLM2-135M-Instruct (weights rounded to 4 bits) made a feedback model by "
            f"`retrofit`, of which adapters of rank {MODELS[NAME][0]} and the connection were trained, "
            f"{line['parameters']:,} parameters, for {line['steps']} steps; one seed. It is no better than plain LoRA "
            "within the trained lengths, and a little beyond them."
        ),
        command=line["command"],
    )
    card.save(CARD)
    print(CARD)


if __name__ == "__main__":
    main()
