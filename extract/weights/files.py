"""Reading other people's weight files without executing anything that is in them.

Which kind a file is follows from its first bytes, not from its name. Pickles (Detectron2's model zoo, airsplay's ports) go through an
unpickler of our own that knows NumPy arrays and plain containers only, and even those as inert stand-ins: no function that a file names
is ever looked up. PyTorch's files go through `torch.load(weights_only=True)`.
"""

import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from uniter.datasets.errors import BadInput
from uniter.extract.weights.caffemodel import read_caffemodel

Tensors = dict[str, torch.Tensor]


TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


CAFFE_STARTS = (b"\n", b"\xa2\x06", b"\x12")  # the fields `name`, `layer` and `layers` of a NetParameter


PLAIN_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


MOST_TIMES_FILE = 4


"""So many times a file's size its tensors may take together; more are views of the same few bytes."""


ENTRY_BYTES = 32  # what an entry of a container counts as; it takes at least a dozen in the file


WRAPPERS = ("model", "state_dict", "model_state_dict", "module")


def recognise(path: Path) -> str:
    """One of "safetensors", "torch", "pickle", "caffemodel", by content.

    Raises:
        BadInput: it is none of them; a web page or a Git LFS pointer in a weight file's place is named as such.
    """
    with path.open("rb") as file:
        start = file.read(512)
    stripped = start.lstrip().lower()
    if stripped.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BadInput(
            f"{path}: a web page, not weights; the link gave a page instead of the file. Open it in a browser and download it there"
        )
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not weights; run `git lfs pull` where it came from")
    if start.startswith(b"PK\x03\x04") or start.startswith(TORCH_LEGACY_MAGIC):
        return "torch"
    if len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if start.startswith(CAFFE_STARTS):
        return "caffemodel"
    raise BadInput(
        f"{path}: no weight file that is known here; expected .safetensors, a Detectron2 or PyTorch checkpoint, or a .caffemodel. "
        f"Was the download cut off?"
    )


def read_tensors(path: Path) -> tuple[str, Tensors]:
    """All tensors of a weight file by their names, wrappers such as {"model": ...} taken off, and the kind of file.

    Blobs of a Caffe model are named `layer[0]`, `layer[1]` ...

    Raises:
        BadInput: the file is damaged, of no known kind, or names something that would have to be executed.
    """
    kind = recognise(path)
    try:
        tensors = READERS[kind](path)
    except BadInput:
        raise
    except (OSError, MemoryError) as error:
        raise BadInput(f"{path}: cannot be read ({error or type(error).__name__})") from error
    if not tensors:
        raise BadInput(f"{path}: holds no tensors; expected the weights of a detector")
    return kind, tensors


def _read_safetensors(path: Path) -> Tensors:
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: no readable safetensors file ({error}); was it cut off?") from error


def _read_torch(path: Path) -> Tensors:
    try:
        _refuse_makers_of_bytes(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise BadInput("a compressed archive, no PyTorch checkpoint; unpack it first")
        return _flattened(torch.load(path, map_location="cpu", weights_only=True), path)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged or hostile file provokes ends here: nothing of it was executed
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BadInput(
            f"{path}: refused or unreadable PyTorch file ({reason[:200]}); files that hold more than tensors and containers are not "
            f"loaded, since loading them would execute code. Save its state dict alone"
        ) from error


def _refuse_makers_of_bytes(path: Path) -> None:
    """BadInput if a PyTorch file calls what PyTorch admits although it makes any number of bytes out of few: no weights need it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name in (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n", b"_codecs\nencode\n"):
            if content.find(b"c" + name) >= 0:
                raise BadInput(
                    f"holds objects made by {name.decode().strip().replace(chr(10), '.')}, no tensors; save its state dict alone"
                )


def _read_pickle(path: Path) -> Tensors:
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, path.stat().st_size).load()
            return _flattened(content, path)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        except Exception as error:  # as above
            raise BadInput(f"{path}: no readable pickle of arrays ({error or type(error).__name__}); was it cut off?") from error


def _read_caffe(path: Path) -> Tensors:
    return {f"{layer}[{at}]": torch.from_numpy(blob) for layer, blobs in read_caffemodel(path).items() for at, blob in enumerate(blobs)}


READERS: dict[str, Callable[[Path], Tensors]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "pickle": _read_pickle,
    "caffemodel": _read_caffe,
}


def _flattened(content: Any, path: Path) -> Tensors:
    """The tensors of a checkpoint: the state dict itself or the one inside a known wrapper; anything else in it is left."""
    for _ in range(len(WRAPPERS)):
        if not isinstance(content, Mapping):
            raise BadInput(f"holds a {type(content).__name__} where a mapping of names to tensors was expected")
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    found: Tensors = {}
    total, limit = 0, MOST_TIMES_FILE * path.stat().st_size
    for name, value in content.items():
        tensor = value.tensor() if isinstance(value, _Array) else value
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise BadInput(f"{name} is no plain tensor; save it as a dense one")
        total += tensor.numel() * tensor.element_size()
        # A few bytes can be expanded to a tensor of any size, or named a million times.
        if total > limit:
            raise BadInput(f"its tensors, up to {name}, claim {total:,} bytes, many times what the file holds; it is damaged or hostile")
        found[name] = tensor
    return found


class _Array:
    """Stands where a pickle holds an ndarray; only plain numbers in a contiguous block become one."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> torch.Tensor:
        try:
            _, shape, kind, fortran, raw = self.state
            if isinstance(raw, str):  # Python 2 wrote bytes as text
                raw = raw.encode("latin-1")
            if not isinstance(raw, bytes | bytearray):  # of a number, bytes() would make as many zeros
                raise TypeError(f"a {type(raw).__name__} in the place of its bytes")
            array = np.frombuffer(raw, dtype=kind.numpy()).reshape(tuple(map(int, shape)), order="F" if fortran else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"holds an array that is no plain block of numbers ({error})") from error
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _array_of_buffer(raw: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    """What NumPy writes for contiguous arrays in protocol 5."""
    array = _Array()
    array.state = (1, shape, kind, order == "F", raw)
    return array


class _Kind:
    """Stands where a pickle holds a dtype."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        name = self.name.decode("ascii") if isinstance(self.name, bytes) else self.name
        if not isinstance(name, str) or name not in PLAIN_KINDS or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"a type of number that is none of {', '.join(sorted(PLAIN_KINDS))}")
        return np.dtype(f"{'=' if self.order == '|' else self.order}{name}")


class _Scalar:
    """Stands where a pickle holds a NumPy scalar (iteration counters and the like): never a weight."""

    def __init__(self, *_: Any) -> None: ...


def _latin_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """What Python 3 writes for bytes in protocol 2: `_codecs.encode(text, "latin1")`, and nothing else of that function."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise BadInput("names a codec other than latin1")
    return text.encode("latin-1")


ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    **{
        (module, name): stand_in
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _Scalar))
    },
    **{(module, "_frombuffer"): _array_of_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
}


class _WithinFile:
    """A file that is never asked for more bytes than it has left: reading allocates what it is asked for, before it finds the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        if count > left:
            raise BadInput(f"claims {count:,} bytes where {left:,} are left; it is cut off, damaged or hostile")
        return self._file.read(count)


# The interpreter's own Python implementation: the C one allocates whatever size a hostile file names.
class _ArrayUnpickler(pickle._Unpickler):
    """Admits NumPy arrays and plain containers, as stand-ins; any other name in the file ends the reading.

    Calls that a file asks for may copy their arguments, and it can ask for many in a few bytes: all of them together get MOST_TIMES_FILE
    times the file's size.
    """

    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(_WithinFile(file, size), encoding="latin1")
        self._left = MOST_TIMES_FILE * size

    def _spend(self, arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Sized):
                self._left -= len(argument) * (1 if isinstance(argument, str | bytes | bytearray) else ENTRY_BYTES)
        if self._left < 0:
            raise BadInput("unpacks to many times what the file holds; it is damaged or hostile")

    def load_reduce(self) -> None:
        self._spend(self.stack[-1])
        super().load_reduce()  # type: ignore[misc]

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self._spend(arguments)
        super()._instantiate(kind, arguments)  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        """As the base class, which makes room for as many bytes as are named before it reads them."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return ADMITTED[module_name, global_name]
        except KeyError:
            raise BadInput(
                f"the pickle names {module_name}.{global_name}, which loading would execute; only arrays and containers are admitted. "
                f"Do not load this file elsewhere unless you trust where it came from"
            ) from None

    def load_build(self) -> None:
        """Hand a state to an array or dtype stand-in; the attributes that PyTorch hangs on an OrderedDict are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array | _Kind):
            target.__setstate__(state)
        elif not isinstance(target, OrderedDict):
            raise BadInput(f"the pickle sets attributes of a {type(target).__name__}; only arrays and containers are admitted")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def persistent_load(self, pid: Any) -> Any:
        raise BadInput("the pickle refers to outside objects; is it a part of a PyTorch checkpoint?")
