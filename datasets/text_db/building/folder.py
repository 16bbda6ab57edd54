"""The folder in which a text database is built: what is ours in it, and what an earlier version knew of its making."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import SettingsDiffer
from uniter.datasets.storage.cards import CARD_FILE
from uniter.datasets.storage.claims import MADE_FROM, SETTINGS, Maker, Source
from uniter.datasets.storage.files import difference_in_words, first_phrases, read_json_object, remove, sha256_of, write_json
from uniter.datasets.storage.index_file import INDEX

TASK_FILES: Final = ("ans2label.json", "labels.json", "refs.json", "images.json", "annotations.json", "categories.json", "boxes.json")
WORK: Final = "building"
REMEMBERED: Final = ("tokenizer", "exclude", "sources")
"""Settings that are compared by content: names of tokenisers and lists may differ, and how the sources of merged texts were made."""
TEXTS: Final = Maker(
    "text",
    "header.json",
    (
        *("data.mdb", "lock.mdb", INDEX, "meta.json", "vocab.txt", "id2len.json", "id2len_qa.json", "id2len_qar.json"),
        *("txt2img.json", "img2txts.json", *TASK_FILES, CARD_FILE, WORK),
    ),
)


@dataclass
class BuildReport:
    """What became of the texts.

    Attributes:
        counts: read, kept, empty, longer_than_60, longer_than_512, duplicate, special_words, without_image, names_sharing_a_key, excluded,
            and what the source counted of its own (images_without_caption ...). "longer", "duplicate" and "special_words" are kept.
        coverage: of `--images`: by rule, how many images were found by it; `missing` how many by none.
        images: how many different images the kept texts are about.
        already_complete: nothing was done, the finished database was there.
    """

    counts: dict[str, int]
    coverage: dict[str, int]
    images: int
    already_complete: bool = False

    @classmethod
    def of_complete(cls, folder: Path) -> "BuildReport":
        """What the header of a finished database tells."""
        report = read_json_object(folder / TEXTS.complete).get("report", {})
        return cls(report.get("texts", {}), report.get("coverage", {}), report.get("images", 0), already_complete=True)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON, as the header and the summary of `uniter-build-db` have it."""
        return {"texts": self.counts, "images": self.images, "coverage": self.coverage, "already_complete": self.already_complete}


def begin_anew(folder: Path) -> Path:
    """Take away everything of a database but its settings, and make the working folder."""
    for path in [folder / TEXTS.complete, *folder.iterdir()]:  # from the first one on it is not complete
        if path.name != SETTINGS and TEXTS.made(path):
            remove(path)
    work = folder / WORK
    work.mkdir()
    return work


def bring_up_to_date(folder: Path, wanted: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    """Write the settings of a database that an earlier version made as this one writes them, if it was made from the same.

    What they told of captions and tokeniser is compared by content; what they did not know (the keys of the region databases) is left to
    the claim, which says that it is unknown.

    Raises:
        SettingsDiffer: it was made from something else.
    """
    settings = folder / SETTINGS
    stored = read_json_object(settings) if settings.is_file() else {}
    if MADE_FROM in stored or "tokenizer" not in stored:
        return
    phrases = []
    for name, prefix in (("source", "captions"), ("join", "join")):
        paths = [path for label, path in sources.items() if label.rstrip("0123456789 ") == prefix and isinstance(path, Path)]
        known = stored.pop(name, [])
        if len(known) != len(paths):
            phrases.append(f"{len(known)} files of {prefix} then, {len(paths)} now")
        for before, path in zip(known, paths, strict=False):
            # Of folders, tars and large files other fingerprints were kept, which nobody makes any more.
            if "sha256" in before and path.is_file() and path.suffix != ".tar" and sha256_of(path) != before["sha256"]:
                phrases.append(f"{prefix} ({path.name}) has other contents now")
    pieces = tokenizer_content(stored["tokenizer"])
    asked = sources["tokenizer"]
    if isinstance(asked, Mapping) and asked["sha256"] != pieces["sha256"]:
        phrases.append(f"tokenizer was {pieces['name']}, now another one, {asked['name']}")
    lists = [sorted((one.get("exclude") or {}).values()) for one in (stored, wanted)]
    if lists[0] != lists[1]:
        phrases.append(f"exclude was {len(lists[0])} lists, now {len(lists[1])}, or others")
    for regions in stored.pop("images", []):
        stored["key"] = regions.get("key")
        there = sources.get("images")
        if not isinstance(there, Mapping) or regions.get("count") != there["images"]:
            phrases.append(f"images ({', '.join(regions.get('names', []))}) are others now")
    left = ("kind", *REMEMBERED)
    before, now = ({name: one[name] for name in one if name not in left} for one in (stored, wanted))
    phrases += difference_in_words(before, now)
    if phrases:
        raise SettingsDiffer(
            f"{folder} was begun with other settings ({first_phrases(phrases)}): use the same ones, another folder, or --overwrite"
        )
    write_json(settings, stored)


def tokenizer_content(told: Mapping[str, Any]) -> dict[str, Any]:
    """A tokeniser as a source: its pieces and whether it lowers letters; its name counts no more than that of a file."""
    return {"name": str(told.get("name")), "sha256": f"{told.get('sha256')}{'-lowercase' if told.get('lowercase') else ''}"}
