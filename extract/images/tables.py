"""Images inside tables: parquet files, and what Hugging Face's `datasets` saved to disk.

What a reader would get wrong: the images are listed from their names alone; their bytes are read when they are wanted, and in order, since
a table is read in one direction.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import KeyRule, NameParts
from uniter.datasets.image_db.tables import picture_column, picture_names, table_columns, table_name
from uniter.extract.images.items import ImageItem, digest_of_keys, digests_of, image_item, refuse_equal_keys, text_of


class TableImages:
    """The images of tables one behind the other, so many to a unit."""

    def __init__(self, tables: Sequence[Path], rule: KeyRule, *, unit_images: int) -> None:
        self._tables, self.unit_images = list(tables), unit_images
        self._names: list[str] = []
        self._keys: list[str] = []
        self._firsts: list[int] = []
        for table in self._tables:
            column = picture_column(table)
            if column is None:
                raise BadInput(_without_pictures(table))
            self._firsts.append(len(self._names))
            for name in picture_names(table, column):
                self._names.append(name)
                self._keys.append(text_of(rule(NameParts.of_file(name, root=""))))
        if not self._keys:
            raise BadInput(f"{self._tables[0]}{' and the other tables' if len(self._tables) > 1 else ''}: no images inside")
        refuse_equal_keys(digests_of(self._keys), lambda: zip(self._keys, self._names, strict=True), otherwise="path")
        self.keys_sha256 = digest_of_keys(self._keys)

    @property
    def units(self) -> int:
        """Units of work, of `unit_images` rows each but for the last."""
        return -(-len(self._keys) // self.unit_images)

    @property
    def images(self) -> int:
        """Rows of all tables together."""
        return len(self._keys)

    def count(self, number: int) -> int:
        """How many images a unit has."""
        return len(self._places(number))

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit, in order."""
        return [self._item(place) for place in self._places(number)]

    def _places(self, number: int) -> range:
        return range(number * self.unit_images, min((number + 1) * self.unit_images, len(self._keys)))

    def _item(self, place: int) -> ImageItem:
        which = next(which for which in reversed(range(len(self._firsts))) if self._firsts[which] <= place)
        table, name = self._tables[which], self._names[place].removeprefix(f"{table_name(self._tables[which])}/")
        return image_item(self._keys[place], f"{table}/{name}", str(table), row=place - self._firsts[which])


def _without_pictures(table: Path) -> str:
    columns = table_columns(table)
    url = next((name for name in columns if name.lower() in ("url", "image_url", "link")), None)
    hint = f"fetch its addresses (URLs) first: {fetching(table, column=url)}" if url else "write its paths into a .txt or .jsonl list"
    return (
        f"{table} is a table without pictures (it has: {', '.join(columns[:8])}); expected a column of their bytes, such as `image`; {hint}"
    )


def fetching(urls: Path, *, column: str | None = None) -> str:
    """The commands that fetch the pictures of a list or table of addresses, unchanged, and extract them.

    Args:
        column: which column, or field of JSON, holds the addresses; None: the file is a plain list.
    """
    folder = shlex.quote(f"{urls.stem}-images")
    kind = urls.suffix.lower().removeprefix(".").replace("ndjson", "jsonl") or "txt"
    which = f" --url_col {shlex.quote(column)}" if column else ""
    fetch = f"img2dataset --url_list {shlex.quote(str(urls))} --input_format {kind}{which} --output_folder {folder}"
    return f"{fetch} --output_format webdataset --resize_mode no --skip_reencode True, then uniter-extract {folder} OUT"
