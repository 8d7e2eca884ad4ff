"""Read files, folders and patterns as data sets, and find the line of a row."""

from __future__ import annotations

import csv
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import read_images

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}  # by the ending of a file


def read_files(given: dict[str, str], words: bool = False, streaming: bool = False) -> Any:
    """Return a DatasetDict of the files, folders or patterns of each split.

    Args:
        words: whether the columns hold words, so that "NA" or "None" in a csv file is one, and not a gap.
        streaming: read the rows as they are iterated over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is empty, damaged or of an unknown kind.
    """
    from datasets import DatasetDict

    dataset = DatasetDict()
    for split, name in given.items():
        paths = files_of(name)
        dataset[split] = read_rows(name, paths, words, streaming) if paths else read_images(name, split == "test")
    return dataset


def files_of(name: str) -> list[Path]:
    """Return the files that `name` means, sorted: itself, those of a pattern, or those of a folder of texts.

    A folder that holds no file of a known kind is one of images, and gives none.
    """
    path = Path(name)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        known = [file for file in inside if ending(file) in BUILDERS]
        pictures = {"png", "jpg", "jpeg", "gif", "bmp", "tif", "tiff", "webp"} & {ending(file) for file in inside}
        return [] if pictures else known
    if path.exists():
        return [path]
    found = sorted(Path(file) for file in glob(name, recursive=True) if Path(file).is_file())
    if not found:
        raise FileNotFoundError(f"{name} " + ("matches no file." if has_magic(name) else "does not exist."))
    return found


def ending(file: Path) -> str:
    """Return the ending of a file's name, without its dot."""
    return file.suffix.lstrip(".").lower()


def read_rows(name: str, paths: list[Path], words: bool, streaming: bool) -> Dataset | IterableDataset:
    """Read files of one kind, one after the other."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    endings = {ending(path) for path in paths}
    unknown = sorted(endings - BUILDERS.keys())
    if unknown:
        raise ValueError(f"{name} ends in {unknown[0]!r}; it must be one of {', '.join(BUILDERS)}.")
    if len(endings) > 1:
        raise ValueError(f"{name} holds files of several kinds ({', '.join(sorted(endings))}): give a pattern of one.")
    kind = endings.pop()
    filled = [path for path in paths if path.stat().st_size and (streaming or path.read_bytes().strip())]
    if not filled:
        raise ValueError(f"{name} is empty: there is nothing to learn from.")
    options: dict[str, Any] = {"keep_linebreaks": True} if BUILDERS[kind] == "text" else {}
    if kind == "tsv":
        options["sep"] = "\t"
    if BUILDERS[kind] == "csv" and words:
        options |= {"keep_default_na": False, "na_values": [""]}
    files = [str(path) for path in filled]
    try:
        return load_dataset(BUILDERS[kind], data_files=files, split="train", streaming=streaming, **options)
    except (ValueError, DatasetGenerationError) as error:
        if "corresponds to no data" in str(error):  # a csv file with a header alone
            raise ValueError(f"{name} has no examples: there is nothing to learn from.") from None
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{name} can't be read as {BUILDERS[kind]}, it may be damaged: {reason}") from error


def lines_of_rows(name: str) -> list[tuple[Path, int]]:
    """Return the file and the line, counted from 1, at which each row begins; nothing where rows are not lines."""
    found: list[tuple[Path, int]] = []
    for path in files_of(name):
        with path.open(encoding="utf-8-sig", newline="") as text:
            if BUILDERS[ending(path)] == "csv":
                found += [(path, line) for line in _csv_lines(text, "\t" if ending(path) == "tsv" else ",")][1:]
            elif text.read(1) == "[":  # one JSON list of all rows
                return []
            else:
                text.seek(0)
                found += [(path, line) for line, row in enumerate(text, start=1) if row.strip()]
    return found


def _csv_lines(text: Any, delimiter: str) -> list[int]:
    """Return the line at which each row begins, the header too; a field in quotes may hold line breaks."""
    reader, begins, start = csv.reader(text, delimiter=delimiter), [], 1
    for row in reader:
        if row:
            begins.append(start)
        start = reader.line_num + 1
    return begins
