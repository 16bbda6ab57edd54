"""One `.npz` in memory, to arrays and back, without pickles."""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.array_codec import ALLOWED_TYPES, MAX_ARRAYS, MAX_DIMENSIONS, MAX_UNPACKED_BYTES
from uniter.datasets.storage.plain_pickle import plain_pickle, to_plain_pickle

# ----------------------------------------------------------------------------------------------------------------------- npz


def unpack_npz(
    value: bytes | memoryview, *, limit: int = MAX_UNPACKED_BYTES, scalars: bool = False, plain: str | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; those without dimensions (NumPy before 2 stored a stray `allow_pickle`) are left out.

    Args:
        limit: how many bytes all arrays together may have, against zip bombs.
        scalars: arrays without dimensions too.
        plain: a member that may be a pickle of plain data (`plain_pickle`): its value stands where the array would.

    Raises:
        BadInput: no .npz, damaged, object arrays, a type that is not allowed, more than `limit` bytes.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise BadInput(f"the npz holds {len(members):,} members, expected at most {MAX_ARRAYS}")
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    if name == plain:
                        content = file.read(limit + 1)
                        if len(content) > limit:
                            raise BadInput(f"the npz unpacks to more than the allowed size at {name!r}")
                        arrays[name] = plain_npy(content, name)
                        continue
                    shape, fortran, dtype = npy_header(file, name)
                    if not shape and not scalars:
                        continue
                    count = 1
                    for extent in shape:
                        count *= extent
                    size = count * dtype.itemsize
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
    return arrays


def plain_npy(content: bytes, name: str) -> Any:
    """What a .npy file of Python objects holds, read by `plain_pickle`: one without dimensions gives its value."""
    if content[:8] != b"\x93NUMPY\x01\x00":
        raise BadInput(f"{name} is no .npy file of version 1.0")
    return plain_pickle(memoryview(content)[10 + int.from_bytes(content[8:10], "little") :], name)


def map_npy(path: Path) -> NDArray[Any]:
    """A .npy file of numbers, mapped and not read.

    Raises:
        BadInput: it is none, holds Python objects, or is cut off.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = npy_header(file, path.name)
            begin = file.tell()
        if path.stat().st_size < begin + dtype.itemsize * math.prod(shape):
            raise BadInput(f"{path} is cut off: it has {path.stat().st_size:,} bytes, too few for shape {shape}")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=shape, order="F" if fortran else "C")
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path} is no .npy file ({error})") from None


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as `numpy.savez` does, not compressed. The same arrays give the same bytes; objects become plain pickles."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as file:
                write_npy(file, array)


def write_npy(file: Any, array: NDArray[Any]) -> None:
    """Write one array as .npy of version 1.0; an array of objects as a plain pickle."""
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    if array.dtype.hasobject:
        file.write(to_plain_pickle(array))
    elif array.ndim and array.size and array.flags.c_contiguous:
        file.write(array.data.cast("B"))  # without a copy
    else:
        file.write(array.tobytes("F" if header["fortran_order"] else "C"))


def npz_rows(value: bytes | memoryview, name: str) -> int | None:
    """Rows of one array of an .npz, from its header alone; None if it is not there."""
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive, archive.open(f"{name}.npy") as file:
            shape, _, _ = npy_header(file, name)
            return shape[0] if shape else None
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, struct.error) as error:
        raise BadInput(f"no readable npz ({error or type(error).__name__})") from None


def npy_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later versions exist for structured types, and their header may be 4 GiB long
        raise BadInput(f"array {name!r} has .npy version {version}, expected 1.0")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
    except (SyntaxError, TypeError, RecursionError, MemoryError, AttributeError, tokenize.TokenError) as error:
        raise BadInput(f"array {name!r} has a damaged header ({type(error).__name__})") from None
    if dtype.hasobject or dtype.str not in ALLOWED_TYPES:
        raise BadInput(f"array {name!r} has type {dtype.str}; only plain number types are read, never Python objects")
    if len(shape) > MAX_DIMENSIONS or not all(0 <= extent < 1 << 40 for extent in shape):
        raise BadInput(f"array {name!r} has shape {shape}")
    return shape, bool(fortran), dtype


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
