"""SHA256SUMS: what the files of weights in a folder were when they were saved, in the format of `sha256sum`.

safetensors has no checksum of its own: a bit that flipped on a disk or in a copy would load as another weight.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

SUMS = "SHA256SUMS"
WEIGHTS = "model*.safetensors"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def drop_sums(folder: str | Path) -> None:
    """Before files are written over, so that a crash on the way leaves none that are wrong."""
    (Path(folder) / SUMS).unlink(missing_ok=True)


def write_sums(folder: str | Path) -> None:
    """Notes the weights in `folder`; without any, as where only adapters are saved, there is nothing to note."""
    files = sorted(Path(folder).glob(WEIGHTS))
    lines = [f"{sha256(file)}  {file.name}\n" for file in files]
    if lines:
        (Path(folder) / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: str | Path) -> None:
    """Compares the weights in `folder` with what was noted, if anything was."""
    sums = Path(folder) / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        noted, _, name = line.partition("  ")
        file = Path(folder) / name
        if file.parent == Path(folder) and file.is_file() and sha256(file) != noted:
            raise OSError(
                f"{file} is not the file that was saved, its SHA-256 is not the one in {SUMS}: copy it again, or "
                f"delete {SUMS} if you changed it on purpose."
            )


def check_download(folder: Path) -> int:
    """Compare the weights in a snapshot of the Hub's cache with the SHA-256 that they are named by, and count them.

    huggingface_hub compares the size only. A cache without symbolic links has no name to compare with.
    """
    links = {file: os.path.basename(os.readlink(file)) for file in folder.glob("*.safetensors") if file.is_symlink()}
    blobs = {file: announced for file, announced in links.items() if len(announced) == 64}  # a shorter name is git's
    for file, announced in blobs.items():
        if sha256(file) != announced:
            raise OSError(
                f"{file} is not what the Hub announced, its SHA-256 is another one: download it again with "
                "force_download=True."
            )
    return len(blobs)


# Parts that may be added to the body of a trained model, and so begin new; a head is outside of the body.
ADDED = ("loop.halting.", "loop.cross_attention.")


def check_whole(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Reject a body with holes, which transformers would fill with random numbers and a warning."""
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
