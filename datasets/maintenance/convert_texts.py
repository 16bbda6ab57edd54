"""`uniter-db convert` of text databases: to UNITER's layout, whose own code reads them, and to parquet.

What a reader would get wrong: UNITER looks an image up under the very key that the text names, and our converter of regions ends every
key in `.npz`. So texts and regions fit only where both were converted, which is why the keys get `.npz` here by the same function.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.image_db.formats.records import npz_name
from uniter.datasets.image_db.tables import write_parquet
from uniter.datasets.maintenance.copying import refuse_overlap
from uniter.datasets.maintenance.kinds import database_kind
from uniter.datasets.maintenance.published_texts import Text, side_files_of, write_published_texts
from uniter.datasets.progress import Progress
from uniter.datasets.storage.claims import REPORT, may_replace, note_of, write_note
from uniter.datasets.storage.files import read_json_object, written_aside
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.annotations.referring import side_files_of_texts
from uniter.datasets.text_db.records import compress_record


@dataclass
class TextsReport:
    """What was converted.

    Attributes:
        target: the layout, a name in `TEXT_LAYOUTS`.
        texts, images: how many.
        notes: what must be known to use it, in sentences.
        already_complete: nothing was done, it was there already, made from the same.
    """

    target: str
    texts: int
    images: int
    notes: list[str] = field(default_factory=list)
    already_complete: bool = False


def holds_texts(path: Path) -> bool:
    """Whether a text database lies there, ours or a published one."""
    try:
        return path.is_dir() and database_kind(path).endswith("text")
    except BadInput:
        return False


def convert_texts(source: Path, target: Path, *, to: str, overwrite: bool = False) -> TextsReport:
    """Convert a text database.

    Args:
        source: ours or a published one.
        target: the folder (uniter) or file (parquet) to write.
        to: a name in `TEXT_LAYOUTS`.
        overwrite: replace what is at `target`.

    Raises:
        BadInput: an unknown layout, or a source that is no text database, unfinished or damaged.
        SettingsDiffer: `target` is there, made from something else.
    """
    if to not in TEXT_LAYOUTS:
        raise WrongUsage(f"{source} is a text database: {unknown_name('layout of texts', to, TEXT_LAYOUTS)}; name one with --to")
    refuse_overlap(target, [source])
    database = TextDB(source)
    if not len(database):
        raise BadInput(f"{source} holds no texts; there is nothing to convert")
    return TEXT_LAYOUTS[to](database, target, overwrite)


def _to_uniter(database: TextDB, out: Path, overwrite: bool) -> TextsReport:
    source = database.path
    with Progress(len(database), unit="texts", label="texts to uniter") as progress:
        texts, complete = write_published_texts(
            out,
            _with_npz_keys(database, progress),
            [source],
            settings={"made_by": "uniter-db convert", "source": source.name, "format": "uniter"},
            contents={"source": source},
            overwrite=overwrite,
            side_files=side_files_of_texts,
        )
    return TextsReport("uniter", texts, len(database.image_keys), _notes(database), complete)


def _with_npz_keys(database: TextDB, progress: Progress) -> Iterator[Text]:
    for example in database.ids:
        record = database[example]
        image = record.get("img_fname")
        record["img_fname"] = npz_name(image) if isinstance(image, str) else [npz_name(name) for name in image or ()]
        progress.update()
        yield example, compress_record(msgpack.packb(record, use_bin_type=True))


def _notes(database: TextDB) -> list[str]:
    """Where UNITER's code takes something from elsewhere than its databases."""
    notes = []
    files = side_files_of([database.path])
    if "refs.json" in files and not all(_is_published_key(key) for key in database.image_keys):
        notes.append(
            "UNITER makes the keys of referring expressions itself: extract the regions with --key "
            "'visual_grounding_coco_gt_{id:012d}.npz' (given boxes) or 'visual_grounding_det_coco_{id:012d}.npz' (detected ones)"
        )
    if "ans2label.json" in files and database.meta.get("task") == "vqa":
        notes.append("UNITER's train_vqa.py reads utils/ans2label.json of its own repository: put the ans2label.json of these texts there")
    return notes


def _is_published_key(key: str) -> bool:
    return key.startswith(("visual_grounding_coco_gt_", "visual_grounding_det_coco_"))


def _to_parquet(database: TextDB, out: Path, overwrite: bool) -> TextsReport:
    import pyarrow

    settings = {"made_by": "uniter-db convert", "source": database.path.name, "format": "parquet"}
    note = may_replace(out, settings, sources={"source": database.path}, overwrite=overwrite)
    if note is None:
        return TextsReport(**{**read_json_object(note_of(out))[REPORT], "already_complete": True})
    several = database.image_numbers.shape[1] > 1
    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("image", pyarrow.list_(pyarrow.string()) if several else pyarrow.string()),
            ("caption", pyarrow.string()),
            ("input_ids", pyarrow.list_(pyarrow.int32())),
            ("fields", pyarrow.string()),
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        write_note(out, note)
    seen = _Written()
    with Progress(len(database), unit="texts", label="texts to parquet") as progress, written_aside(out, large=True) as temporary:
        write_parquet(temporary, schema, (seen.row(database, place, progress) for place in range(len(database))))
    notes = [] if seen.with_text else ["the texts themselves are not in the database, only their word pieces: `caption` is empty"]
    report = TextsReport("parquet", len(database), len(database.image_keys), notes)
    write_note(out, note, asdict(report))
    return report


class _Written:
    """The rows of a parquet file of texts; whether any had its text."""

    def __init__(self) -> None:
        self.with_text = False

    def row(self, database: TextDB, place: int, progress: Progress) -> dict[str, Any]:
        record = database.record(place)
        text = record.pop("sent", None)
        self.with_text = self.with_text or isinstance(text, str)
        row = {"id": database.ids[place], "image": record.pop("img_fname", None), "input_ids": record.pop("input_ids", None)}
        progress.update()
        return {**row, "caption": text, "fields": json.dumps(record, ensure_ascii=False) if record else None}


TEXT_LAYOUTS: Final[Mapping[str, Callable[[TextDB, Path, bool], TextsReport]]] = {"uniter": _to_uniter, "parquet": _to_parquet}
