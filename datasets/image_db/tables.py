"""Tables with columns: parquet files, and the Arrow files that Hugging Face's `datasets` keeps on disk; read in pieces, written whole.

Nothing of theirs is unpickled or imported: both are plain data that pyarrow reads. What a reader would get wrong: a row may be a photograph
of megabytes, so rows come in small batches, and only the columns that are asked for.
"""

import bisect
import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.files import read_json_object

PARQUET_MAGIC: Final = b"PAR1"
ROWS: Final = 8192
PICTURE_COLUMNS: Final = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
NAME_COLUMNS: Final = ("file_name", "filename", "image_name", "image_path", "filepath", "path", "key", "image_id", "img_id")
"""What tables call their pictures in, where these do not bear their path themselves."""

_BATCH_PICTURES: Final = 32
_OPEN_TABLES: Final = 2
_BUFFER: Final = 1 << 20  # bytes that are read ahead; without it a whole group of rows would be
_KEPT_BATCHES: Final = 6
"""What threads that read ahead are apart, in batches."""

DATASET_FILES: Final = ("state.json", "dataset_dict.json")
"""What Hugging Face's `save_to_disk` leaves at the top of a folder: of one part, or of several."""


def is_table(path: Path) -> bool:
    """Whether a file is parquet or an Arrow stream, by its content."""
    with open(path, "rb") as file:
        start = file.read(8)
    return start[:4] == PARQUET_MAGIC or (path.suffix == ".arrow" and start[:4] in (b"ARRO", b"\xff\xff\xff\xff"))


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `datasets.save_to_disk` wrote."""
    return path.is_dir() and any((path / name).is_file() for name in DATASET_FILES)


def dataset_files(path: Path, *, split: str | None = None) -> list[Path]:
    """The Arrow files of a dataset that was saved to disk, in order.

    Args:
        split: one part of several, or several with commas; None takes all.

    Raises:
        BadInput: a part that is not there, rows chosen by an index file (flatten it and save again), or a file that is gone.
    """
    if (path / "dataset_dict.json").is_file():
        parts = read_json_object(path / "dataset_dict.json").get("splits")
        if not isinstance(parts, list) or not all(isinstance(part, str) and part and "/" not in part and part != ".." for part in parts):
            raise BadInput(f"{path / 'dataset_dict.json'} names no parts; expected a folder of datasets.save_to_disk")
        wanted = parts if split is None else split.split(",")
        if unknown := [part for part in wanted if part not in parts]:
            raise BadInput(f"{path} has no part {unknown[0]!r} (it has: {', '.join(parts)})")
        return list(itertools.chain.from_iterable(dataset_files(path / part) for part in wanted))
    if split is not None:
        raise BadInput(f"{path} is a single dataset without parts; leave --split away")
    state = read_json_object(path / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise BadInput(f"{path} chooses its rows by a file of indices; save it again with dataset.flatten_indices().save_to_disk(...)")
    rows = state.get("_data_files")
    named = [row.get("filename") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not named or not all(isinstance(name, str) and "/" not in name for name in named):
        raise BadInput(f"{path / 'state.json'} names no data files; expected a folder of datasets.save_to_disk")
    files = [path / str(name) for name in named]
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file} is not there, and {path / 'state.json'} names it; was a part of the dataset not copied?")
    return files


def tables_in(path: Path, *, split: str | None = None) -> list[Path]:
    """The tables that a path stands for: itself, the parquet files of a folder, or a dataset that was saved to disk.

    Args:
        split: a part of a dataset that was saved to disk, or the beginning of the names of parquet files (`train-00000-of-00002.parquet`).

    Raises:
        BadInput: there are none, or none of that part.
    """
    if path.is_file():
        return [path]
    if is_saved_dataset(path):
        return dataset_files(path, split=split)
    found = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if split is not None:
        wanted = tuple(f"{part}-" for part in split.split(","))
        found = [file for file in found if file.name.startswith(wanted)]
    if not found:
        raise BadInput(
            f"folder {path} holds no parquet files{f' of part {split}' if split else ''}; expected some, or save_to_disk's Arrow files"
        )
    return found


def table_columns(path: Path) -> list[str]:
    """The names of the columns."""
    with _opened(path) as (schema, _):
        return list(schema.names)


def picture_column(path: Path) -> str | None:
    """The column that holds pictures as bytes (`datasets`' {bytes, path}, or plain bytes under a usual name), None where there is none."""
    with _opened(path) as (schema, _):
        found = [field.name for field in schema if _is_bytes(field.type) or _holds_bytes(field.type)]
        usual = [name for name in found if name.lower() in PICTURE_COLUMNS]
        structs = [name for name in found if _holds_bytes(schema.field(name).type)]
        return next(iter([*usual, *structs]), None)


def table_rows(path: Path, names: Sequence[str], *, batch_rows: int = ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a table, only those columns whose name is one of `names` (in lower case); memory for one batch.

    Pictures are never read: a column of {bytes, path} gives {path}, one of bytes {}.

    Raises:
        BadInput: it is no such table, or cut off.
    """
    with _opened(path) as (schema, batches):
        wanted = [field for field in schema if field.name.lower() in names]
        bare = [field.name for field in wanted if _is_bytes(field.type) or _beside_bytes(field.type) == []]
        columns: list[str] = []
        for field in (field for field in wanted if field.name not in bare):
            columns += [f"{field.name}.{part}" for part in _beside_bytes(field.type) or ()] or [field.name]
        for batch in batches(columns, batch_rows):
            rows = batch.to_pylist() if columns else [{} for _ in range(batch.num_rows)]
            yield from ({**row, **{name: {} for name in bare}} for row in rows) if bare else rows


def table_batches(path: Path, names: Sequence[str], *, batch_rows: int = ROWS) -> Iterator[Any]:
    """The same as batches of pyarrow, bytes and all: only those columns whose name is one of `names`."""
    with _opened(path) as (schema, batches):
        yield from batches([name for name in schema.names if name in names], batch_rows)


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind)) and any(part.name == "bytes" and _is_bytes(part.type) for part in kind)


def _beside_bytes(kind: Any) -> list[str] | None:
    """The parts of a column of pictures that are no bytes; None where it is no such column."""
    return [part.name for part in kind if not _is_bytes(part.type)] if _holds_bytes(kind) else None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The schema, and from (columns, rows) to batches; a column with a dot means a part of a column (`image.path`)."""
    with said_of_table(path):
        table, close = _open(path)
        try:
            if hasattr(table, "iter_batches"):  # parquet
                yield table.schema_arrow, lambda columns, rows: table.iter_batches(batch_size=rows, columns=columns)
            else:
                yield table.schema, lambda columns, rows: _pieces(table, columns, rows)
        finally:
            close()


@contextmanager
def said_of_table(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file, as a sentence."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Arrow" if path.suffix == ".arrow" else "parquet"
        raise BadInput(f"{path} is no readable {kind} file ({str(error).strip().partition(chr(10))[0]}); was it cut off?") from None


def _open(path: Path) -> tuple[Any, Any]:
    """A `pyarrow.parquet.ParquetFile`, or an Arrow file as a `pyarrow.Table` that lies in the file; and what closes it."""
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as file:
        parquet = file.read(4) == PARQUET_MAGIC
    if parquet or path.suffix != ".arrow":
        opened = pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        return opened, opened.close
    mapped = pyarrow.memory_map(str(path))
    try:
        table = pyarrow.ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:  # the other of Arrow's two containers
        table = pyarrow.ipc.open_file(mapped).read_all()
    table.validate(full=True)  # pyarrow believes the file's offsets otherwise, wherever they lead
    return table, mapped.close


def _pieces(table: Any, columns: Sequence[str], rows: int) -> Iterator[Any]:
    import pyarrow

    arrays: dict[str, Any] = {}
    for name in columns:
        whole, _, part = name.partition(".")
        if name in table.column_names:
            arrays[name] = table.column(name)
        else:  # of a column of pictures
            chunks = [
                pyarrow.StructArray.from_arrays([chunk.field(part)], [part], mask=chunk.is_null()) for chunk in table.column(whole).chunks
            ]
            kind = pyarrow.struct([table.schema.field(whole).type.field(part)])
            arrays[whole] = pyarrow.chunked_array(chunks, type=kind)
    chosen = pyarrow.table(arrays) if arrays else table.select([])
    for first in range(0, table.num_rows, rows):
        piece = chosen.slice(first, rows)
        yield piece if arrays else _Counted(min(rows, table.num_rows - first))


class _Counted:
    """A batch without columns."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


# -------------------------------------------------------------------------------------------------------------------- pictures


def table_name(path: Path) -> str:
    """How a table is called in the names of its pictures: without suffix; of a dataset of several parts with the part."""
    part = f"{path.parent.name}-" if (path.parent.parent / DATASET_FILES[1]).is_file() else ""
    return f"{part}{path.stem}"


def picture_name(table: str, number: int, row: Mapping[str, Any], column: str) -> str:
    """The name of a picture that lies in a table, for whoever extracts it and whoever reads its caption: TABLE/ROW/NAME.

    NAME is what its path ends in, or a column of file names or ids; where nothing is said, it is the table and the row. So `--key stem` is
    the picture's own name, and `--key path` unique in any case.
    """
    value = row.get(column)
    named = value.get("path") if isinstance(value, Mapping) else None
    by_name = {name.lower(): cell for name, cell in row.items() if name != column}
    cells = [named, *(by_name.get(name) for name in NAME_COLUMNS)]
    base = next((PurePosixPath(str(cell)).name for cell in cells if isinstance(cell, str | int) and PurePosixPath(str(cell)).name), "")
    return f"{table}/{number:06d}/{base}" if base else f"{table}/{table.replace('.', '_')}-{number:06d}"


def picture_names(path: Path, column: str) -> Iterator[str]:
    """The names of all pictures of a table, by row."""
    table = table_name(path)
    for number, row in enumerate(table_rows(path, (column.lower(), *NAME_COLUMNS))):
        yield picture_name(table, number, row, column)


class PictureBytes:
    """The pictures of a table by row. Asked for in order they cost one pass; threads may ask together."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column = path, column
        self._lock = threading.Lock()
        with said_of_table(path):
            self._table, _ = _open(path)  # closed when nobody holds it
            self._groups = [0]
            if hasattr(self._table, "iter_batches"):
                counts = [self._table.metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)]
                self._groups = [0, *itertools.accumulate(counts)]
        self._kept: deque[tuple[int, list[Any]]] = deque(maxlen=_KEPT_BATCHES)
        self._coming: Iterator[tuple[int, list[Any]]] = iter(())
        self._next = -1  # the first row that `_coming` has not given

    def of_row(self, number: int) -> bytes:
        """The bytes.

        Raises:
            BadInput: the row has none, or the table is damaged there.
        """
        with self._lock, said_of_table(self._path):
            value = self._value(number)
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes):
            named = value.get("path") if isinstance(value, Mapping) else None
            hint = f", only the path {shown(named)}; extract the files themselves" if named else ""
            raise BadInput(f"row {number} of {self._path} holds no bytes{hint}")
        return content

    def _value(self, number: int) -> Any:
        if not hasattr(self._table, "iter_batches"):
            return self._table.column(self._column)[number].as_py()
        while True:
            for first, values in self._kept:
                if first <= number < first + len(values):
                    return values[number - first]
            group = bisect.bisect_right(self._groups, number) - 1
            if not self._groups[group] <= self._next <= number:  # behind us, or in a later group
                self._kept.clear()
                self._coming, self._next = self._from_group(group), self._groups[group]
            found = next(self._coming, None)
            if found is None:
                raise BadInput(f"{self._path} has no row {number}; was it replaced while it was read?")
            self._next = found[0] + len(found[1])
            self._kept.append(found)

    def _from_group(self, first: int) -> Iterator[tuple[int, list[Any]]]:
        for group in range(first, len(self._groups) - 1):
            row = self._groups[group]
            for batch in self._table.iter_batches(batch_size=_BATCH_PICTURES, columns=[self._column], row_groups=[group]):
                values = batch.column(0).to_pylist()
                yield row, values
                row += len(values)


class _OpenTables:
    """The tables whose pictures were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int, int, int], PictureBytes] = OrderedDict()

    def get(self, file: str) -> PictureBytes:
        status = os.stat(file)  # noqa: PTH116  # a million times
        known = (file, status.st_ino, status.st_size, status.st_mtime_ns)  # one that was written anew is another table
        with self._lock:
            found = self._open.pop(known, None)
            if found is None:
                column = picture_column(Path(file))
                if column is None:
                    raise BadInput(f"{file} holds no pictures any more; was it replaced while it was read?")
                found = PictureBytes(Path(file), column)
            self._open[known] = found
            while len(self._open) > _OPEN_TABLES:
                self._open.popitem(last=False)
            return found


_open_tables = _OpenTables()


def picture_of_row(file: str, row: int) -> bytes:
    """The bytes of the picture in a row of a table, from any thread.

    Raises:
        BadInput: the row has none, or the table cannot be read there.
    """
    return _open_tables.get(file).of_row(row)


def write_parquet(path: Path, schema: Any, rows: Iterable[Mapping[str, Any]], *, batch_rows: int = ROWS) -> None:
    """Write rows under a schema of pyarrow, so many at once.

    Args:
        path: a name beside the file that it is to become (`files.written_aside`).
        batch_rows: rows of a group, which is what readers take into memory.
    """
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        stream = iter(rows)
        while batch := list(itertools.islice(stream, batch_rows)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema), row_group_size=batch_rows)
