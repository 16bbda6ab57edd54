"""What img2dataset downloaded: a folder or list of its shards, as parquet, tar (WebDataset) or files; captions come with the keys.

An image is called `<key>.jpg`, as its tar and `uniter-extract` call it. Of a shard that has both, the parquet is read, for it is short.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import IMAGE_SUFFIXES
from uniter.datasets.image_db.tables import table_rows
from uniter.datasets.storage.streams import first_character, id_of, json_items, json_value, object_of, text_of
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.downloads import DONE, URL_COLUMNS
from uniter.datasets.text_db.captions.rows import CAPTION_COLUMNS, column_named

LARGEST_TEXT = 1 << 20  # bytes of a caption or of an image's JSON in a tar


def read_img2dataset(
    path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = ""
) -> Iterator[Caption]:
    """The captions of all shards in the order of their names.

    `counts` receives `urls_not_downloaded` and, of tars, `images_without_caption`.
    """
    if split is not None:
        raise BadInput(f"{path} is img2dataset's output, which has no parts; leave --split away")
    if join:
        raise BadInput(f"{path} is img2dataset's output, which names its images itself; leave --join away")
    for shard in shards_in(path):
        if shard.is_dir():
            yield from _folder_captions(shard, counts)
        elif shard.suffix == ".tar":
            yield from _tar_captions(shard, counts)
        elif shard.suffix == ".json":
            yield from (_caption(row, counts, f"{shard}") for row in _json_rows(shard))
        else:
            names = (*CAPTION_COLUMNS, *URL_COLUMNS, "key", "status")
            for number, row in enumerate(table_rows(shard, names)):
                yield _caption(row, counts, f"row {number} of {shard}")


def shards_in(path: Path) -> list[Path]:
    """The shards of a folder (parquet before tar before sub-folders of files), or the file itself.

    Raises:
        BadInput: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path} is not there; expected img2dataset's output folder or one of its shards")
    parquets, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
    with_table = {shard.stem for shard in parquets}
    found = sorted([*parquets, *(shard for shard in tars if shard.stem not in with_table)], key=lambda shard: shard.name)
    found = found or sorted(folder for folder in path.iterdir() if folder.is_dir() and next(folder.glob("*.json"), None) is not None)
    if not found:
        raise BadInput(f"folder {path} holds neither parquet files, nor tars, nor folders of files; expected img2dataset's output")
    return found


def _caption(row: dict[str, Any], counts: Counter[str], where: str) -> Caption:
    key, column = row.get("key"), column_named(row, CAPTION_COLUMNS)
    if not isinstance(key, str | int) or column is None:
        missing = "key" if column is not None else "caption"
        raise BadInput(f"{where} has no {missing} (it has: {', '.join(list(row)[:8])[:400]}); expected img2dataset's table")
    done = row.get("status") is None or str(row["status"]).lower() in DONE
    counts["urls_not_downloaded"] += not done
    return Caption(id_of(key, 0), f"{key}.jpg" if done else "", text_of(row[column], where))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON array, or the one row of an object."""
    for number, value in enumerate(json_items(path, "item" if first_character(path) == "[" else "")):
        yield object_of(value, f"entry {number} of {path}")


def _folder_captions(folder: Path, counts: Counter[str]) -> Iterator[Caption]:
    for path in sorted(folder.glob("*.json")):
        for row in _json_rows(path):
            yield _caption({"key": path.stem, **row}, counts, str(path))


def _tar_captions(path: Path, counts: Counter[str]) -> Iterator[Caption]:
    """The members of one key stand together in WebDataset's tars."""
    key = ""
    sample: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                name = PurePosixPath(member.name)
                folder = member.name.removeprefix("./").rpartition("/")[0]
                stem, _, suffix = name.name.partition(".")
                member_key = f"{folder}/{stem}" if folder else stem
                if member_key != key:
                    yield from _sample(path, key, sample, counts)
                    key, sample = member_key, {}
                suffix = suffix.lower()
                if suffix in ("txt", "json"):
                    if member.size > LARGEST_TEXT:
                        raise BadInput(f"{member.name} in {path} has {member.size:,} bytes; expected a caption of at most {LARGEST_TEXT:,}")
                    file = tar.extractfile(member)
                    sample[suffix] = file.read() if file is not None else b""
                elif name.suffix.lower() in IMAGE_SUFFIXES:
                    sample["image"] = name.suffix.lower().removeprefix(".").encode()
            # tarfile takes a file that stops between two members, or within a header, for a whole one.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise BadInput(f"{path} has no end; was it cut off? Download the shard again")
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"{path} is not there; expected one of img2dataset's tars") from None
        raise BadInput(f"{path} is no readable tar ({error}); was it cut off?") from None
    yield from _sample(path, key, sample, counts)


def _sample(path: Path, key: str, sample: dict[str, bytes], counts: Counter[str]) -> Iterator[Caption]:
    if not sample:
        return
    where = f"{key} in {path}"
    if "txt" in sample:
        text = sample["txt"].decode("utf-8", "replace")
    elif "json" in sample:
        row = object_of(json_value(sample["json"], f"the JSON of {where}"), where)
        column = column_named(row, CAPTION_COLUMNS)
        text = text_of(row[column], where) if column is not None else ""
    else:
        counts["images_without_caption"] += 1
        return
    yield Caption(key, f"{key}.{sample['image'].decode()}" if "image" in sample else "", text)
