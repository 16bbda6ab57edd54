"""One `.npz` in memory, to arrays and back, without pickles."""

import functools
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.array_codec import ALLOWED_TYPES, MAX_ARRAYS, MAX_DIMENSIONS, MAX_UNPACKED_BYTES, ArrayPlace

# ----------------------------------------------------------------------------------------------------------------------- npz


def unpack_npz(value: bytes | memoryview, *, limit: int = MAX_UNPACKED_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; those without dimensions (NumPy before 2 stored a stray `allow_pickle`) are left out.

    Args:
        limit: how many bytes all arrays together may have, against zip bombs.

    Raises:
        BadInput: no .npz, damaged, object arrays, a type that is not allowed, more than `limit` bytes.
    """
    return unpack_some(value, None, limit=limit)[1]


def unpack_some(
    value: bytes | memoryview, wanted: Collection[str] | None, *, limit: int = MAX_UNPACKED_BYTES
) -> tuple[dict[str, ArrayPlace], dict[str, NDArray[Any]]]:
    """`unpack_npz` of the wanted arrays (None: all) only; of the others no more than the headers is unpacked.

    Returns:
        Types and shapes of all arrays (their places mean nothing), and the wanted arrays.
    """
    places: dict[str, ArrayPlace] = {}
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise BadInput(f"the npz holds {len(members):,} members, expected at most {MAX_ARRAYS}")
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    shape, fortran, dtype = _npy_header(file, name)
                    if not shape:
                        continue
                    places[name] = ArrayPlace(dtype, shape, 0)
                    if wanted is not None and name not in wanted:
                        continue
                    size = math.prod(shape) * dtype.itemsize
                    limit -= size
                    if limit < 0:
                        raise BadInput(f"the npz unpacks to more than the allowed size at array {name!r} of shape {shape}")
                    data = file.read(size)
                    if len(data) != size or file.read(1):
                        raise BadInput(f"array {name!r} of shape {shape} needs {size:,} bytes, the npz has another number")
                    array = np.frombuffer(data, dtype=dtype)
                    arrays[name] = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
        ValueError,
        struct.error,
        KeyError,
    ) as error:
        raise BadInput(f"no readable npz ({error or type(error).__name__})") from None
    return places, arrays


def npz_rows(value: bytes | memoryview, name: str) -> int | None:
    """Rows of one array of an .npz, from its header alone; None if it is not there."""
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive, archive.open(f"{name}.npy") as file:
            shape, _, _ = _npy_header(file, name)
            return shape[0] if shape else None
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, struct.error) as error:
        raise BadInput(f"no readable npz ({error or type(error).__name__})") from None


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later versions exist for structured types, and their header may be 4 GiB long
        raise BadInput(f"array {name!r} has .npy version {version}, expected 1.0")
    size = file.read(2)
    text = file.read(int.from_bytes(size, "little"))
    try:
        shape, fortran, dtype = _parsed_header(size + text)
    except (SyntaxError, TypeError, RecursionError, MemoryError, AttributeError) as error:
        raise BadInput(f"array {name!r} has a damaged header ({type(error).__name__})") from None
    if dtype.hasobject or dtype.str not in ALLOWED_TYPES:
        raise BadInput(f"array {name!r} has type {dtype.str}; only plain number types are read, never Python objects")
    if len(shape) > MAX_DIMENSIONS or not all(0 <= extent < 1 << 40 for extent in shape):
        raise BadInput(f"array {name!r} has shape {shape}")
    return shape, bool(fortran), dtype


@functools.lru_cache(maxsize=1024)
def _parsed_header(text: bytes) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    """NumPy's reading of a header, which is slow; a database has few different ones."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(text), max_header_size=4096)


def pack_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as a compressed .npz, as UNITER's extraction writes them. The same arrays give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
