"""Walk over the pages of an LMDB file without LMDB, so that no damage can crash the process and the rest stays readable.

The file is read, never mapped: a file that is too short gives an error, not SIGBUS. Format version 1, 64 bit, little-endian,
plain keys (no duplicates): what region and text databases are.

What a reader would get wrong: a value larger than a quarter page lies on overflow pages of its own, behind a 16-byte header,
so most of a region database is values and a bit flip there shows only in a checksum.

Source: LMDB 0.9's `mdb.c` (MDB_page, MDB_node, MDB_meta), and the verifier of py-lmdb 3.
"""

import itertools
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from uniter.datasets.errors import BadInput

_HEADER: Final = struct.Struct("<QHHHH")  # page number, pad, flags, lower, upper


_NODE: Final = struct.Struct("<HHHH")  # low and high half of size (or child), flags, key length


_PAGE_NUMBER: Final = struct.Struct("<Q")


_TREE: Final = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf and overflow pages, entries, root


_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04


_MAGIC: Final = 0xBEEFC0DE


_BIG, _SUBTREE, _DUPLICATES = 0x01, 0x02, 0x04


_EMPTY: Final = (1 << 64) - 1


_MAX_DEPTH: Final = 32


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`os.pread`, which Windows lacks: there a file is read by one thread at a time."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _ONE_READER:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


_ONE_READER: Final = threading.Lock()


MAX_KEY_BYTES: Final = 511
"""Of a key; LMDB's own limit."""


_SMALLEST_PAGE, _LARGEST_PAGE = 512, 32768


def own_page_size() -> int:
    """Bytes of a page in the LMDB files that this machine makes: the operating system's (Apple Silicon has 16 KiB)."""
    return min(mmap.PAGESIZE, _LARGEST_PAGE)


def is_empty_file(data: Path) -> bool:
    """Whether its writer was killed, or is, while LMDB wrote the first two pages: nothing is in it."""
    return data.stat().st_size < 2 * _stated_page_size(data)


def _stated_page_size(data: Path) -> int:
    """What the file's first page says, where it can be one; else this machine's."""
    with open(data, "rb") as file:
        head = file.read(44)
    stated = struct.unpack_from("<I", head, 40)[0] if len(head) == 44 else 0
    return stated if _is_page_size(stated) else own_page_size()


def _is_page_size(number: int) -> bool:
    return _SMALLEST_PAGE <= number <= _LARGEST_PAGE and number & (number - 1) == 0


def check_data_file(data: Path | str) -> None:
    """Look at the two meta pages of a `data.mdb` without LMDB: right format, sane, and the file as long as they say.

    Raises:
        BadInput: not LMDB, of another format version, or cut off. (A cut-off file would kill the process with SIGBUS.)
    """
    try:
        with open(data, "rb") as file:
            head = file.read(_LARGEST_PAGE + 160)  # both meta pages
            size = os.fstat(file.fileno()).st_size  # after the header was read: the file may be growing
    except FileNotFoundError:
        raise BadInput(f"{Path(data).parent} holds no data.mdb; is it a database?") from None
    if len(head) < 2 * _SMALLEST_PAGE:
        raise BadInput(f"{data} has {size} bytes, less than an empty LMDB; was it cut off?")
    page_size = struct.unpack_from("<I", head, 16 + 24)[0]
    best = (-1, 0)
    for number in range(2):
        start = number * page_size
        if number and not _is_page_size(page_size):
            raise BadInput(f"{data} is damaged: its first page names a page size of {page_size}")
        if len(head) < start + 160:
            raise BadInput(f"{data} has {size} bytes, less than an empty LMDB; was it cut off?")
        magic, version = struct.unpack_from("<II", head, start + 16)
        if magic != _MAGIC:
            if struct.unpack_from("<I", head, start + 24)[0] == _MAGIC:
                raise BadInput(f"{data} is LMDB of format version 3 (lmdb 1.0); expected version 1; dump it with the lmdb that wrote it")
            raise BadInput(f"{data} is no LMDB file, or its meta page {number} is damaged")
        if version != 1:
            raise BadInput(f"{data} is LMDB of format version {version}, expected version 1")
        last_page, transaction = struct.unpack_from("<QQ", head, start + 16 + 24 + 96)
        best = max(best, (transaction, last_page))
    needed = (best[1] + 1) * page_size
    if size < needed:
        raise BadInput(f"{data} has {size} bytes but its header says {needed}; it was cut off (a broken copy or download?): copy it again")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record's value lies in the file."""

    key: bytes
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A page or record that is damaged, in words."""

    words: str


class PageFile:
    """The pages of one `data.mdb`, read-only.

    Attributes:
        entries, root: of the main tree.
        identity: last transaction, number of entries and root page; they change with whatever moves a value.

    Raises:
        BadInput: the file is no LMDB of version 1, or its header is damaged (see `check_data_file`).
    """

    def __init__(self, data: Path, *, whole: bool = True) -> None:
        if whole:
            check_data_file(data)
        self.path = data
        self._look_at_values = True
        self._descriptor = os.open(data, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._descriptor).st_size
        head = _read_at(self._descriptor, 1 << 17, 0)
        self.page_size = _stated_page_size(data)  # with a damaged first page this machine's is the best guess
        metas: list[tuple[int, tuple[int, ...]]] = []
        for number in range(2):
            start = number * self.page_size + 16
            if start + 136 <= len(head) and struct.unpack_from("<I", head, start)[0] == _MAGIC:
                transaction = struct.unpack_from("<Q", head, start + 128)[0]
                metas.append((transaction, _TREE.unpack_from(head, start + 24 + 48)))
        transaction_number, tree = max(metas, default=(0, (0,) * 7 + (_EMPTY,)))
        self.entries, self.root = tree[6], tree[7]
        self.identity = (transaction_number, tree[6], tree[7] if tree[7] != _EMPTY else -1)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def value(self, place: Place) -> bytes | None:
        """A record's value; None if the file ends before it."""
        content = _read_at(self._descriptor, place.size, place.offset)
        return content if len(content) == place.size else None

    def _page(self, number: int) -> bytes | None:
        page = _read_at(self._descriptor, self.page_size, number * self.page_size)
        return page if len(page) == self.page_size else None

    def records(self, table: bytes | None = None, *, look_at_values: bool = True) -> Iterator[Place | Fault]:
        """All records in key order as far as the tree can be walked, and a `Fault` for each part that cannot.

        Args:
            table: a named database inside the file; None: the main one.
            look_at_values: also read the header in front of each large value; without, only the tree itself is read.
        """
        self._look_at_values = look_at_values
        root = self.root
        if table is not None:
            for found in self._walk(self.root, "main", subtrees=True):
                if isinstance(found, Place) and found.key == table and found.size == _TREE.size:
                    content = self.value(found)
                    root = _TREE.unpack(content)[7] if content else _EMPTY
                    break
            else:
                return
        yield from self._walk(root, "the tree")

    def _walk(self, root: int, name: str, *, subtrees: bool = False) -> Iterator[Place | Fault]:
        if root == _EMPTY:
            return
        visited: set[int] = set()
        stack = [(root, 0)]
        last: bytes | None = None
        while stack:
            number, depth = stack.pop()
            where = f"page {number} of {name}"
            if number in visited or depth > _MAX_DEPTH:
                yield Fault(f"{where} is linked twice")
                continue
            visited.add(number)
            page = self._page(number) if 2 <= number < 1 << 48 else None
            if page is None:
                yield Fault(f"{where} lies beyond the end of the file")
                continue
            own, _, flags, lower, upper = _HEADER.unpack_from(page)
            if own != number or flags not in (_BRANCH, _LEAF) or not 16 <= lower <= upper <= self.page_size or lower % 2:
                yield Fault(f"{where} has a damaged header; what hangs on it is lost")
                continue
            starts = struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16)
            if flags == _BRANCH:
                children = []
                for start in starts:
                    if not upper <= start <= self.page_size - 8:
                        yield Fault(f"{where} has a damaged entry; what hangs on it is lost")
                        continue
                    low, high, top, _ = _NODE.unpack_from(page, start)
                    children.append((low | high << 16 | top << 32, depth + 1))
                stack += reversed(children)
                continue
            for start in starts:
                found = self._record(page, start, upper, subtrees)
                if isinstance(found, str):
                    yield Fault(f"{where} has a damaged entry ({found})")
                elif found is not None:
                    if last is not None and found.key <= last:
                        yield Fault(f"{where}: key {found.key[:60]!r} is out of order")
                        continue
                    last = found.key
                    yield found

    def _record(self, page: bytes, start: int, upper: int, subtrees: bool) -> Place | str | None:
        if not upper <= start <= self.page_size - 8:
            return "it points outside its page"
        low, high, flags, key_length = _NODE.unpack_from(page, start)
        size = low | high << 16
        begin = start + 8 + key_length
        key = page[start + 8 : begin]
        if not 0 < key_length <= MAX_KEY_BYTES or begin > self.page_size:
            return f"a key of {key_length} bytes"
        if flags & _DUPLICATES or (flags & _SUBTREE and not subtrees):
            return f"key {key[:60]!r} is a database inside the database"
        if flags & _BIG:
            if begin + 8 > self.page_size:
                return f"key {key[:60]!r} has no value"
            page_number = _PAGE_NUMBER.unpack_from(page, begin)[0]
            if not self._look_at_values and page_number >= 2 and (page_number * self.page_size) + 16 + size <= self.size:
                return Place(key, page_number * self.page_size + 16, size)
            header = _read_at(self._descriptor, 16, page_number * self.page_size) if 2 <= page_number < 1 << 48 else b""
            if len(header) < 16:
                return f"the value of key {key[:60]!r} lies beyond the end of the file"
            own, _, kind, _, _ = _HEADER.unpack(header)
            pages = struct.unpack_from("<I", header, 12)[0]
            if own != page_number or kind != _OVERFLOW or size + 16 > pages * self.page_size:
                return f"the value page of key {key[:60]!r} has a damaged header"
            return Place(key, page_number * self.page_size + 16, size)
        if begin + size > self.page_size:
            return f"the value of key {key[:60]!r} runs over its page"
        own_number = _PAGE_NUMBER.unpack_from(page)[0]
        return Place(key, own_number * self.page_size + begin, size)

    def damage(self, tables: Sequence[bytes]) -> str | None:
        """The first fault of the main tree or of those of the named databases that are there, in words; None where there is none."""
        trees = [self._walk(self.root, "the main tree", subtrees=True), *map(self.records, tables)]
        return next((found.words for found in itertools.chain(*trees) if isinstance(found, Fault)), None)

    def stray_leaves(self) -> Iterator[Place]:
        """Records of every page of the file that looks like a leaf, reachable or not, newest pages last. For salvage: old
        versions are among them, so only what a checksum confirms may be believed.
        """
        for number in range(2, self.size // self.page_size):
            header = _read_at(self._descriptor, 16, number * self.page_size)
            if len(header) < 16:
                return
            own, _, flags, lower, upper = _HEADER.unpack(header)
            if own != number or flags != _LEAF or not 16 <= lower <= upper <= self.page_size or lower % 2:
                continue
            page = self._page(number)
            if page is None:
                return
            for start in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
                found = self._record(page, start, upper, False)
                if isinstance(found, Place):
                    yield found
