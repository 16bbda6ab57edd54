"""`.npz` and `.npy` files to arrays and back; of pickles only plain data, where a layout of others demands them."""

import functools
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.array_codec import ALLOWED_TYPES, MAX_ARRAYS, MAX_DIMENSIONS, MAX_UNPACKED_BYTES, ArrayPlace
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
    return unpack_some(value, None, limit=limit, scalars=scalars, plain=plain)[1]


def unpack_some(
    value: bytes | memoryview,
    wanted: Collection[str] | None,
    *,
    limit: int = MAX_UNPACKED_BYTES,
    scalars: bool = False,
    plain: str | None = None,
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
                    if name == plain:
                        content = file.read(limit + 1)
                        if len(content) > limit:
                            raise BadInput(f"the npz unpacks to more than the allowed size at {name!r}")
                        arrays[name] = plain_npy(content, name)
                        continue
                    shape, fortran, dtype = npy_header(file, name)
                    if not shape and not scalars:
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
    """Write arrays as `numpy.savez` does, not compressed. The same arrays give the same bytes; objects become plain pickles.

    The few records of such a zip are made here: `zipfile` takes longer for them than the disk for the arrays.
    """
    pieces: list[bytes | memoryview] = []
    directory = b""
    offset = 0
    for name, array in arrays.items():
        member = f"{name}.npy".encode("ascii")
        head, content = _npy_pieces(array)
        checksum, size = zlib.crc32(content, zlib.crc32(head)), len(head) + len(content)
        if offset + size >= 1 << 31:
            raise BadInput(f"the arrays of {path.name} have more than {1 << 31:,} bytes together, expected those of one image")
        described = struct.pack("<5H3L2H", 20, 0, 0, 0, _FIRST_DAY, checksum, size, size, len(member), 0)
        pieces += [b"PK\3\4" + described + member, head, content]
        directory += struct.pack("<4sH", b"PK\1\2", 0x314) + described + struct.pack("<3H2L", 0, 0, 0, 0o600 << 16, offset) + member
        offset += 30 + len(member) + size
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(arrays), len(arrays), len(directory), offset, 0)
    with open(path, "wb") as file:
        file.writelines([*pieces, directory, end])


_FIRST_DAY: Final = 0x21  # 1 January 1980, the first that a zip knows


def write_npy(file: BinaryIO, array: NDArray[Any]) -> None:
    """Write one array as .npy of version 1.0; an array of objects as a plain pickle."""
    file.writelines(_npy_pieces(array))


def _npy_pieces(array: NDArray[Any]) -> tuple[bytes, bytes | memoryview]:
    """The head and the content of a .npy file."""
    header = np.lib.format.header_data_from_array_1_0(array)
    head = _npy_head(header["descr"], header["fortran_order"], header["shape"])
    if array.dtype.hasobject:
        return head, to_plain_pickle(array)
    if array.ndim and array.size and array.flags.c_contiguous:
        return head, array.data.cast("B")
    return head, array.tobytes("F" if header["fortran_order"] else "C")


@functools.lru_cache(maxsize=1024)
def _npy_head(descr: str, fortran_order: bool, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": fortran_order, "shape": shape})
    return buffer.getvalue()


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
    """What the header of a .npy file says, read up to the data: shape, whether in Fortran's order, and dtype.

    Raises:
        BadInput: it is no header of version 1.0, or of objects.
    """
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later versions exist for structured types, and their header may be 4 GiB long
        raise BadInput(f"array {name!r} has .npy version {version}, expected 1.0")
    size = file.read(2)
    text = file.read(int.from_bytes(size, "little"))
    try:
        shape, fortran, dtype = _parsed_header(size + text)
    except (SyntaxError, TypeError, RecursionError, MemoryError, AttributeError, tokenize.TokenError) as error:
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
