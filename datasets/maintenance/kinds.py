"""Which kind of database lies at a path."""

from pathlib import Path
from typing import Final

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.database import kind_of
from uniter.datasets.storage.files import read_json_object

_SIDE_FILES: Final = ("id2len.json", "id2len_qa.json", "id2len_qar.json", "txt2img.json", "img2txts.json")


# ------------------------------------------------------------------------------------------------------------- what a folder is


def database_kind(path: Path) -> str:
    """ "regions", "unfinished regions", "published regions", "folder of regions", "text", "unfinished text" or "published text".

    Raises:
        BadInput: no database.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is no folder; expected a database")
    for name, prefix in (("header.json", ""), ("settings.json", "unfinished ")):
        if (path / name).exists():
            return prefix + ("text" if _says_text(path) else "regions")
    if (path / "data.mdb").exists():
        published_text = (path / "meta.json").exists() or any((path / name).exists() for name in _SIDE_FILES)
        return "published text" if published_text else "published regions"
    if kind_of(path) in ("split", "folder"):
        return "folder of regions"
    raise BadInput(f"{path} is no database (no data.mdb, no settings.json)")


def _says_text(path: Path) -> bool:
    for name in ("header.json", "settings.json"):
        try:
            stated = read_json_object(path / name)
        except (OSError, BadInput):
            continue
        if "kind" in stated:
            return bool(stated["kind"] == "text")
    return (path / "meta.json").exists()
