"""One parquet file, a row an image, for Hugging Face's `datasets`, pandas, polars and whatever else reads tables.

    key string; height, width int32; features, norm_bb, soft_labels, attributes lists of rows of float16; boxes of float32, pixels;
    conf, object_conf, attribute_conf lists of float32; object_ids, attribute_ids of int32 (from 0, without background)

What is not known is null; the columns of soft labels and attributes are there only if the first image has them. What a reader would get
wrong: a table may have been written anew by others, who turn rows of one width into plain lists.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import MAX_REGIONS, MAX_WIDTH, Item, Skip, refuse
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.tables import said_of_table, table_batches, table_columns
from uniter.datasets.storage.files import written_aside

_IMAGES_AT_ONCE: Final = 32
_WIDE: Final = {"features": "<f2", "norm_bb": "<f2", "boxes": "<f4", "soft_labels": "<f2", "attributes": "<f2"}
_NARROW: Final = {"conf": "<f4", "object_ids": "<i4", "object_conf": "<f4", "attribute_ids": "<i4", "attribute_conf": "<f4"}
_NEEDED: Final = ("key", "features", "norm_bb")


def read(path: Path) -> Iterator[Item]:
    """Items of a file that `write` wrote, whoever wrote it anew."""
    there = table_columns(path)
    missing = [name for name in _NEEDED if name not in there]
    if missing:
        raise BadInput(f"{path} is a table without the column {missing[0]} (it has: {', '.join(there[:12])}); expected regions of images")
    wanted = ("key", "height", "width", *_WIDE, *_NARROW)
    row = 0
    with said_of_table(path):
        for batch in table_batches(path, wanted, batch_rows=_IMAGES_AT_ONCE):
            columns = {name: batch.column(name) for name in batch.schema.names}
            for place in range(batch.num_rows):
                cells = {name: column[place] for name, column in columns.items()}
                key = cells.pop("key").as_py()
                if not isinstance(key, str):
                    raise BadInput(f"{path}, row {row}: the key is {key!r}, expected a text")
                try:
                    yield key, _record(key, cells)
                except BadInput as error:
                    yield key, error
                row += 1


def _record(key: str, cells: dict[str, Any]) -> RegionFeatures:
    height, width = (cells.pop(name).as_py() if name in cells else None for name in ("height", "width"))
    known = {name: cell for name, cell in cells.items() if cell.is_valid}
    fields: dict[str, Any] = {name: _matrix(key, name, cell.values) for name, cell in known.items() if name in _WIDE}
    fields |= {name: _numbers(key, name, cell.values) for name, cell in known.items() if name in _NARROW}
    if missing := [name for name in _NEEDED[1:] if name not in fields]:
        raise BadInput(f"image {key!r}: {missing[0]} is null")
    fields.setdefault("conf", np.zeros(len(fields["features"]), np.float32))
    regions = RegionFeatures(**fields, size=(int(height), int(width)) if height and width else None)
    regions.check_shapes(key)
    return regions


def _matrix(key: str, name: str, rows: Any) -> NDArray[Any]:
    """(N, W) of a list of rows."""
    import pyarrow

    if pyarrow.types.is_fixed_size_list(rows.type):
        width = rows.type.list_size
    else:
        widths = np.unique(rows.value_lengths().to_numpy(zero_copy_only=False)) if len(rows) else np.zeros(1)
        if len(widths) > 1:
            raise BadInput(f"image {key!r}: the rows of {name} are {widths[0]} to {widths[-1]} wide; expected one width")
        width = int(widths[0])
    if len(rows) > MAX_REGIONS or width > MAX_WIDTH:
        raise BadInput(
            f"image {key!r}: {name} has {len(rows):,} rows of {width:,} numbers, expected at most {MAX_REGIONS:,}, {MAX_WIDTH:,}"
        )
    flat = _numbers(key, name, rows.flatten())
    if flat.size != len(rows) * width:
        raise BadInput(f"image {key!r}: {name} holds null")
    return flat.reshape(len(rows), width)


def _numbers(key: str, name: str, values: Any) -> NDArray[Any]:
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "fiu" or values.null_count:
        raise BadInput(f"image {key!r}: {name} holds {values.type}{' with null' if values.null_count else ''}; expected numbers")
    return array


def write(path: Path, items: Iterable[tuple[str, RegionFeatures]], *, skip: Skip = refuse) -> None:
    """Write the file; what is there is replaced."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = _alike(items, skip)
    with written_aside(path, large=True) as temporary:
        first = list(itertools.islice(stream, _IMAGES_AT_ONCE))
        if not first:
            raise BadInput(f"no image could be written to {path}")
        schema = _schema(first[0][1])
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            batch = first
            while batch:
                writer.write_batch(_batch(batch, schema), row_group_size=_IMAGES_AT_ONCE)
                batch = list(itertools.islice(stream, _IMAGES_AT_ONCE))


def _alike(items: Iterable[tuple[str, RegionFeatures]], skip: Skip) -> Iterator[tuple[str, RegionFeatures]]:
    """Those that fit the first one, and float16."""
    wanted: tuple[int, ...] | None = None
    for key, regions in items:
        widths = tuple(0 if array is None else array.shape[1] for array in (regions.features, regions.soft_labels, regions.attributes))
        wanted = wanted or widths
        try:
            if widths != wanted:
                raise BadInput(f"image {key!r}: features, soft labels and attributes are {widths} wide, the first image's {wanted}")
            encode_record(regions, key=key)  # refuses what float16 cannot hold
        except BadInput as error:
            skip(key, regions, error)
        else:
            yield key, regions


def _schema(first: RegionFeatures) -> Any:
    import pyarrow

    fields = [("key", pyarrow.string()), ("height", pyarrow.int32()), ("width", pyarrow.int32())]
    widths = {"boxes": 4, "norm_bb": 6}
    for name, spelling in _WIDE.items():
        array = getattr(first, name)
        width = widths.get(name, 0 if array is None else array.shape[1])
        if width:
            fields.append((name, pyarrow.list_(pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(spelling)), width))))
    fields += [(name, pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(spelling)))) for name, spelling in _NARROW.items()]
    return pyarrow.schema(fields)


def _batch(items: Sequence[tuple[str, RegionFeatures]], schema: Any) -> Any:
    import pyarrow

    sizes = [(None, None) if regions.size is None else regions.size for _, regions in items]
    columns: dict[str, Any] = {
        "key": pyarrow.array([key for key, _ in items], pyarrow.string()),
        "height": pyarrow.array([height for height, _ in sizes], pyarrow.int32()),
        "width": pyarrow.array([width for _, width in sizes], pyarrow.int32()),
    }
    for name in schema.names[3:]:
        arrays = [getattr(regions, name) for _, regions in items]
        dtype = np.dtype({**_WIDE, **_NARROW}[name])
        flat = np.concatenate([np.zeros(0, dtype), *(np.asarray(array, dtype).ravel() for array in arrays if array is not None)])
        kind = schema.field(name).type
        values: Any = pyarrow.array(flat, pyarrow.from_numpy_dtype(dtype))
        if name in _WIDE:
            values = pyarrow.FixedSizeListArray.from_arrays(values, type=kind.value_type)
        counts = [0 if array is None else len(array) for array in arrays]
        unknown = pyarrow.array([array is None for array in arrays])
        offsets = pyarrow.array(np.cumsum([0, *counts]), pyarrow.int32())
        columns[name] = pyarrow.ListArray.from_arrays(offsets, values, type=kind, mask=unknown)
    return pyarrow.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
