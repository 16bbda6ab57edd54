"""Dataset cards: the `README.md` of a database, which tells people and the Hugging Face hub what it holds.

A card follows from the database's header alone: the same database has the same card, wherever it lies.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"


_BEGINNING = "---\ntags:\n- uniter\n"


def has_foreign_readme(folder: Path) -> bool:
    """Whether the README.md in a folder is no card: then it is somebody's own, and neither replaced nor removed."""
    try:
        with (folder / CARD_FILE).open(encoding="utf-8") as file:
            return file.read(len(_BEGINNING)) != _BEGINNING
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True


def region_card(header: Mapping[str, Any]) -> str:
    """The card of a region database from its `header.json`."""
    weights = header.get("weights")
    told = weights if isinstance(weights, Mapping) else {}
    classes = int(header.get("label_classes") or 0)
    rows = {
        "images": f"{header['images']:,}, and {header['failures']:,} that could not be read (`failures.jsonl`)",
        "regions": f"{header['regions']:,}",
        "detector": header.get("detector"),
        "weights": told.get("source"),
        "sha256 of the weights": header.get("weights_sha256") or told.get("sha256"),
        "note": told.get("note"),
        "made from": header.get("converted_from"),
        "features": f"{header['feature_width']:,} wide" if header.get("feature_width") else None,
        "classes": f"{classes:,} with the background, which is column 0" if classes else "no distribution over classes was kept",
        "boxes": header.get("box_kind"),
        "which regions": _selection(header.get("selection")),
        "made with": header.get("software"),
    }
    return _card(
        "Region features for UNITER",
        ["region-features"],
        ["What a detector sees in images: for each image the features, boxes and class distributions of its regions.", ""],
        rows,
        "from uniter.datasets.image_db import ImageDB\n\nregions = ImageDB('this/folder')['an image key']",
        "The regions are what the detector was trained to find, and its classes say of people and places what its training data said.\n"
        "The images themselves are not here; their own terms hold for what is made from them.",
    )


def text_card(header: Mapping[str, Any]) -> str:
    """The card of a text database from its `header.json`."""
    settings, report = header["settings"], header["report"]
    tokenizer, counts = settings.get("tokenizer", {}), report.get("texts", {})
    left_out = {name.replace("_", " "): counts.get(name, 0) for name in ("empty", "without_image", "excluded")}
    rows = {
        "texts": f"{header['examples']:,}",
        "images": f"{report.get('images', 0):,}",
        "task": settings.get("task"),
        "split": settings.get("split"),
        "read from": _sources(settings.get("source_format"), settings.get("source", [])),
        "left out": ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count) or None,
        "word pieces": f"{tokenizer.get('name')} (sha256 of `vocab.txt` {tokenizer.get('sha256')})",
        "made with": header.get("software"),
    }
    return _card(
        "Texts for UNITER",
        ["text"],
        ["Texts as word pieces, each with the key of its image in a database of region features.", ""],
        rows,
        "from uniter.datasets.text_db import TextDB\n\nrecord = TextDB('this/folder')['an example id']",
        "The texts say of people and places what their writers said; nothing was checked, corrected or left out for what it says.",
    )


def _card(title: str, tags: Iterable[str], opening: list[str], rows: Mapping[str, Any], code: str, limits: str) -> str:
    lines = [*(f"- {tag}" for tag in tags), "---", "", f"# {title}", "", *opening, "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "")]
    return _BEGINNING + "\n".join([*lines, "", "```python", code, "```", "", "## Limits", "", limits, ""])


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _selection(selection: Any) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in selection.items()) if isinstance(selection, Mapping) else None


def _sources(layout: Any, sources: Any) -> str:
    hashes = [str(one.get("sha256"))[:12] for one in sources if isinstance(one, Mapping)] if isinstance(sources, list) else []
    return f"{layout or 'texts'}" + (f" (sha256 {', '.join(hashes[:4])}{' ...' if len(hashes) > 4 else ''})" if hashes else "")
