"""Checksums of saved weights (SHA256SUMS, in the format of `sha256sum`), and the removal of replaced weights.

safetensors has no checksum of its own: a flipped bit on a disk or in a copy would load as another weight.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"
# model.safetensors, model-00001-of-00003.safetensors, and the same with a variant, as model.fp16.safetensors.
WEIGHTS = re.compile(r"(?P<stem>model(?:\.[^.]+?)?)(?P<shard>-\d{5}-of-\d{5})?\.safetensors")
INDEX = re.compile(r"model\.safetensors\.index(?P<variant>\.[^.]+)?\.json")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def drop_sums(folder: str | Path) -> None:
    """Remove SHA256SUMS before weights are overwritten, so that a crash on the way leaves no wrong sums."""
    (Path(folder) / SUMS).unlink(missing_ok=True)


def stale_weights(names: Iterable[str]) -> list[str]:
    """Return the files among `names` that hold replaced weights, or index them.

    transformers removes old shards at every save, but leaves an old whole file beside new shards, and an old index
    beside a new whole file. So a whole file beside shards is older than they are.
    """
    names = list(names)
    whole, shards = {}, set()
    for name in names:
        if found := WEIGHTS.fullmatch(name):
            if found["shard"]:
                shards.add(found["stem"])
            else:
                whole[found["stem"]] = name
    stale = [name for stem, name in whole.items() if stem in shards]
    for name in names:
        if found := INDEX.fullmatch(name):
            stem = f"model{found['variant'] or ''}"
            if stem in whole and stem not in shards:
                stale.append(name)
    return stale


def replaced_weights(names: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Return the weights and indices among `names` which the files of a save replace without having their names."""
    saved = set(saved)
    stems = {found["stem"] for name in saved if (found := WEIGHTS.fullmatch(name))}
    replaced = []
    for name in set(names) - saved:
        weights, index = WEIGHTS.fullmatch(name), INDEX.fullmatch(name)
        stem = weights["stem"] if weights else index and f"model{index['variant'] or ''}"
        if stem in stems:
            replaced.append(name)
    return sorted(replaced)


def finish_save(folder: str | Path) -> None:
    """Remove the weights that this save replaced, and write SHA256SUMS for the others."""
    folder = Path(folder)
    for name in stale_weights(os.listdir(folder)):
        (folder / name).unlink()
    files = sorted(file for file in folder.iterdir() if WEIGHTS.fullmatch(file.name))
    if files:
        (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")


def check_sums(folder: str | Path) -> None:
    """Compare the weights in `folder` with its SHA256SUMS, where it has one; raise OSError where they differ."""
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
    """Compare the weights in a snapshot of the Hub's cache with the SHA-256 they are named by; return their number.

    huggingface_hub compares sizes only. Where the cache has no symbolic links, there is no name to compare with.
    """
    links = {file: os.path.basename(os.readlink(file)) for file in folder.glob("*.safetensors") if file.is_symlink()}
    blobs = {file: announced for file, announced in links.items() if len(announced) == 64}  # git's names are shorter
    for file, announced in blobs.items():
        if sha256(file) != announced:
            raise OSError(
                f"{file} is not what the Hub announced, its SHA-256 is another one: download it again with "
                "force_download=True."
            )
    return len(blobs)
