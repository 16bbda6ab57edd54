"""Tables with columns: parquet files, and the Arrow files that Hugging Face's `datasets` keeps on disk; read in pieces, written whole.

Nothing of theirs is unpickled or imported: both are plain data that pyarrow reads. What a reader would get wrong: a row may be a photograph
of megabytes, so rows come in small batches, and only the columns that are asked for.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object

PARQUET_MAGIC: Final = b"PAR1"
TABLE_SUFFIXES: Final = (".parquet", ".arrow")
ROWS: Final = 8192
DATASET_FILES: Final = ("state.json", "dataset_dict.json")
"""What Hugging Face's `save_to_disk` leaves at the top of a folder: of one part, or of several."""


def is_table(path: Path) -> bool:
    """Whether a file is parquet or an Arrow stream, by its content."""
    with open(path, "rb") as file:
        start = file.read(8)
    return start[:4] == PARQUET_MAGIC or start[:6] == b"ARROW1" or (path.suffix == ".arrow" and start[:4] == b"\xff\xff\xff\xff")


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


def table_columns(path: Path) -> list[str]:
    """The names of the columns."""
    with _opened(path) as (schema, _):
        return list(schema.names)


def table_rows(path: Path, names: Sequence[str], *, batch_rows: int = ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a table, only those columns whose name is one of `names` (in lower case); memory for one batch.

    Raises:
        BadInput: it is no such table, or cut off.
    """
    for batch in table_batches(path, names, batch_rows=batch_rows):
        yield from batch.to_pylist()


def table_batches(path: Path, names: Sequence[str] | None, *, batch_rows: int = ROWS) -> Iterator[Any]:
    """The same as pyarrow's record batches of at most `batch_rows` rows; a name with a dot means a part of a column (`image.path`)."""
    with _opened(path) as (schema, batches):
        columns = None if names is None else [name for name in schema.names if name.lower() in names]
        yield from batches(columns, batch_rows)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The schema, and from (columns, rows) to batches."""
    import pyarrow
    import pyarrow.parquet

    kind = "parquet file" if path.suffix != ".arrow" else "Arrow file"
    try:
        with open(path, "rb") as file:
            parquet = file.read(4) == PARQUET_MAGIC
        if parquet:
            with pyarrow.parquet.ParquetFile(path) as table:
                yield table.schema_arrow, lambda columns, rows: table.iter_batches(batch_size=rows, columns=columns)
            return
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                reader: Any = pyarrow.ipc.open_stream(mapped)
                stream: Iterable[Any] = reader
            except pyarrow.ArrowInvalid:  # the other of Arrow's two containers
                reader = pyarrow.ipc.open_file(mapped)
                stream = map(reader.get_batch, range(reader.num_record_batches))
            yield reader.schema, lambda columns, rows: _pieces(stream, columns, rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no readable {kind} ({str(error).strip().partition(chr(10))[0]}); was it cut off?") from None


def _pieces(batches: Iterable[Any], columns: Sequence[str] | None, rows: int) -> Iterator[Any]:
    for batch in batches:
        chosen = batch if columns is None else batch.select(list(columns))
        for first in range(0, chosen.num_rows, rows):
            yield chosen.slice(first, rows)


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
