"""Text database: example id -> word pieces and fields, by UNITER's layout.

A database is a folder with an LMDB of lz4-framed msgpack records and JSON side files. Ours carry a memory-mapped index besides
(ids, lengths, image keys), so that ten million examples open at once and cost nothing in a further process; published ones have only
the JSON, which is read whole.

A reader would get this wrong: `lengths` count the word pieces without [CLS] and [SEP].
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.storage.index_file import INDEX, KEY_COLUMNS, KeyList, map_arrays
from uniter.datasets.storage.lmdb_files import open_reader
from uniter.datasets.storage.lmdb_pages import MAX_KEY_BYTES
from uniter.datasets.text_db.records import MissingExample, decode_text_record, spelt

TEXT_FORMAT = 1


LENGTHS = ("id2len", "id2len_qar", "id2len_qa")  # VCR has two of them, and "qa,qar" training goes by the longer


class _ImageTexts(Mapping[str, Sequence[int]]):
    """Image key -> the numbers of its examples, from the index."""

    def __init__(self, keys: KeyList, starts: NDArray[np.int64], examples: NDArray[np.int32]) -> None:
        self._keys, self._starts, self._examples = keys, starts, examples

    def __getitem__(self, key: str) -> list[int]:
        place = self._keys.find(key)
        if place < 0:
            raise _no_text_about(key)
        numbers: list[int] = self._examples[int(self._starts[place]) : int(self._starts[place + 1])].tolist()
        return numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _PublishedTexts(dict[str, list[int]]):
    """The same, from the side files."""

    def __missing__(self, key: str) -> list[int]:
        raise _no_text_about(key)


def _no_text_about(image: str) -> MissingExample:
    return MissingExample(f"no text of the database is about an image {image!r}")


class TextDB(Mapping[str, dict[str, Any]]):
    """Examples of a text database, ours or published, by id and by number.

    It can be pickled, and used after a fork: the LMDB is opened when a process first reads a record.

    Args:
        path: the database's folder.
        allow_partial: read one of ours that is not finished, as far as it goes.
        lengths: which lengths count: "id2len", or VCR's "id2len_qa" and "id2len_qar"; by default the first of `LENGTHS` that is there.
        readahead: let the system read ahead; better off for random reads of a database larger than memory on a local disk.

    Attributes:
        ids: the examples' ids in their order (as they stood in the source).
        lengths: (N,) int32, word pieces of each, without [CLS] and [SEP].
        image_keys: the keys of all images, each once, by first appearance.
        image_numbers: (N, K) int32, the places in `image_keys` of each example's K images.
        meta: meta.json.
        header: of ours, None for published databases.

    Raises:
        BadInput: it is not a text database, or damaged, or unfinished.
    """

    def __init__(self, path: str | Path, *, allow_partial: bool = False, lengths: str | None = None, readahead: bool = True) -> None:
        self.path = Path(path)
        self._allow_partial, self._lengths_name, self._readahead = allow_partial, lengths, readahead
        self._environment: lmdb.Environment | None = None
        self._transaction: Any = None
        self._process = 0
        if not self.path.is_dir():
            raise BadInput(f"text database {self.path} is not there; expected the folder that uniter-build-db made")
        ours, complete = (self.path / "settings.json").is_file(), (self.path / "header.json").is_file()
        if ours and not complete and not allow_partial:
            raise BadInput(f"text database {self.path} is not finished; run the same uniter-build-db command again")
        if not (self.path / "data.mdb").is_file():
            raise BadInput(f"text database {self.path} holds no data.mdb; expected the folder that uniter-build-db made")
        self.header: Mapping[str, Any] | None = read_json_object(self.path / "header.json") if ours and complete else None
        if self.header is not None and (self.header.get("kind") != "text" or self.header.get("format") != TEXT_FORMAT):
            raise BadInput(
                f"database {self.path} is of kind {self.header.get('kind')!r}, format {self.header.get('format')!r}; "
                f"expected 'text' of format {TEXT_FORMAT}"
            )
        self.meta: dict[str, Any] = read_json_object(self.path / "meta.json") if (self.path / "meta.json").is_file() else {}
        self._read_index() if complete and ours else self._read_side_files()

    # What the database says of its tokeniser.

    def __repr__(self) -> str:
        return f"<TextDB {self.path}: {len(self.ids):,} examples>"

    def _special(self, name: str) -> int:
        value = self.meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadInput(f"{self.path / 'meta.json'} says {value!r} of {name}; expected the id of that word piece")
        return value

    @cached_property
    def cls_id(self) -> int:
        """The id of the word piece [CLS] in this database's vocabulary; BadInput where meta.json does not tell it."""
        return self._special("CLS")

    @cached_property
    def sep_id(self) -> int:
        """The id of the word piece [SEP]; BadInput where meta.json does not tell it."""
        return self._special("SEP")

    @cached_property
    def mask_id(self) -> int:
        """The id of the word piece [MASK]; BadInput where meta.json does not tell it."""
        return self._special("MASK")

    @cached_property
    def unk_id(self) -> int:
        """The id of the word piece [UNK]; BadInput where meta.json does not tell it."""
        return self._special("UNK")

    @cached_property
    def v_range(self) -> tuple[int, int]:
        """Ids that MLM draws random replacements from, half open."""
        value = self.meta.get("v_range")
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(end, int) for end in value) and value[0] < value[1]):
            raise BadInput(f"{self.path / 'meta.json'} says {value!r} of v_range; expected [first id, end]")
        return value[0], value[1]

    @property
    def tokenizer_name(self) -> str | None:
        """`bert`, `toker` or `tokenizer` of meta.json: published databases have one or another (facts 8.2)."""
        names = (self.meta.get(field) for field in ("bert", "toker", "tokenizer"))
        return next((name for name in names if isinstance(name, str)), None)

    # Records.

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, example: object) -> bool:
        return isinstance(example, str) and self._get(example.encode("utf-8", "surrogatepass")) is not None

    def __getitem__(self, example: str) -> dict[str, Any]:
        value = self._get(example.encode("utf-8", "surrogatepass"))
        if value is None:
            raise MissingExample(f"text database {self.path} has no example {example!r}")
        return decode_text_record(value, example=example)

    def record(self, index: int) -> dict[str, Any]:
        """The record of the example of that number."""
        ids = self.ids
        key = ids.raw(index) if isinstance(ids, KeyList) else ids[index].encode("utf-8", "surrogatepass")
        value = self._get(key)
        if value is None:
            raise MissingExample(f"text database {self.path} has no example {ids[index]!r}, which its index names; rebuild it")
        return decode_text_record(value, example=key)

    def raw_record(self, example: str) -> bytes:
        """A record's bytes as stored.

        Raises:
            MissingExample: there is none of that id.
        """
        value = self._get(example.encode("utf-8", "surrogatepass"))
        if value is None:
            raise MissingExample(f"text database {self.path} has no example {example!r}; see `uniter-db check` if it is listed")
        return bytes(value)

    def index_of(self, example: str) -> int:
        """The number of an example.

        Raises:
            MissingExample: there is none of that id.
        """
        place = self.ids.find(example) if isinstance(self.ids, KeyList) else self._places.get(example, -1)
        if place < 0:
            raise MissingExample(f"text database {self.path} has no example {example!r}")
        return place

    def image_key(self, index: int) -> str | tuple[str, ...]:
        """The key of the example's image, or the keys of its images."""
        keys = tuple(self.image_keys[int(number)] for number in self.image_numbers[index])
        return keys[0] if len(keys) == 1 else keys

    def images(self) -> Mapping[str, Sequence[int]]:
        """Image key -> numbers of the examples about it, in their order (img2txts); MissingExample where there are none."""
        return self._images

    def _get(self, key: bytes) -> bytes | memoryview | None:
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return None
        if self._process != os.getpid():
            self._open()
        try:
            value: bytes | memoryview | None = self._transaction.get(key)
        except lmdb.Error as error:
            raise BadInput(f"text database {self.path} is damaged at example {spelt(key)!r} ({error}); rebuild it") from None
        return value

    def _open(self) -> None:
        # A process that was forked must not use its parent's environment.
        self._environment = open_reader(self.path, readahead=self._readahead)
        self._transaction = self._environment.begin(buffers=True)
        self._process = os.getpid()

    def close(self) -> None:
        """Give the file back; reading opens it again."""
        if self._process == os.getpid() and self._transaction is not None:
            self._transaction.abort()
        self._environment, self._transaction, self._process = None, None, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._allow_partial, self._lengths_name, self._readahead)

    # The index of ours.

    def _read_index(self) -> None:
        arrays = map_arrays(self.path / INDEX)
        names = [self._lengths_name] if self._lengths_name else LENGTHS
        there = next((name for name in names if name in arrays), names[0])
        try:
            ids, image_keys = (KeyList({column: arrays[f"{what}.{column}"] for column in KEY_COLUMNS}) for what in ("ids", "image_keys"))
            lengths, numbers = arrays[there], arrays["image_numbers"]
            starts, examples = arrays["image_starts"], arrays["image_examples"]
        except KeyError as error:
            raise BadInput(f"the index of text database {self.path} has no column {error}; rebuild it with --overwrite") from None
        if not len(ids) == len(lengths) == len(numbers) or numbers.ndim != 2 or len(starts) != len(image_keys) + 1:
            raise BadInput(f"the index of text database {self.path} does not fit together; rebuild it with --overwrite")
        self.ids: Sequence[str] = ids
        self.lengths: NDArray[np.int32] = lengths
        self.image_keys: Sequence[str] = image_keys
        self.image_numbers: NDArray[np.int32] = numbers
        self._images: Mapping[str, Sequence[int]] = _ImageTexts(image_keys, starts, examples)

    # The side files of published ones.

    def _read_side_files(self) -> None:
        lengths = self._published_lengths()
        ids = list(lengths)
        self.ids = ids
        self.lengths = np.fromiter(lengths.values(), np.int32, len(ids))
        self._places = {example: place for place, example in enumerate(ids)}
        images = self._published_images(ids)
        numbers: dict[str, int] = {}
        width = max((len(keys) for keys in images), default=1)
        rows = np.zeros((len(ids), width), np.int32)
        texts: dict[str, list[int]] = {}
        for place, keys in enumerate(images):
            if len(keys) != width:
                raise BadInput(f"text database {self.path}: example {ids[place]!r} is about {len(keys)} images, others about {width}")
            for slot, key in enumerate(keys):
                rows[place, slot] = numbers.setdefault(key, len(numbers))
                texts.setdefault(key, []).append(place)
        self.image_keys, self.image_numbers = list(numbers), rows
        self._images = _PublishedTexts(self._published_texts(texts))

    def _published_lengths(self) -> dict[str, int]:
        names = [self._lengths_name] if self._lengths_name else LENGTHS
        there = next((name for name in names if (self.path / f"{name}.json").is_file()), None)
        if there is not None:
            lengths = read_json_object(self.path / f"{there}.json")
            if not all(isinstance(length, int) and 0 <= length < 2**31 for length in lengths.values()):
                raise BadInput(f"{self.path / f'{there}.json'} holds something else than lengths; expected {{id: number of word pieces}}")
            return lengths
        if self._lengths_name is not None:
            raise BadInput(f"text database {self.path} holds no {self._lengths_name}.json; leave `lengths` away to use what there is")
        self._open()
        found = {}
        for key, value in self._transaction.cursor():
            example = bytes(key).decode("utf-8", "replace")
            found[example] = len(decode_text_record(value, example=example).get("input_ids", ()))
        return found

    def _published_images(self, ids: Sequence[str]) -> list[tuple[str, ...]]:
        if (self.path / "txt2img.json").is_file():
            table = read_json_object(self.path / "txt2img.json")
            found = [table.get(example) for example in ids]
        else:  # RefCOCO's have none
            found = [self[example].get("img_fname") for example in ids]
        images = []
        for example, image in zip(ids, found, strict=True):
            keys = (image,) if isinstance(image, str) else tuple(image) if isinstance(image, list) else ()
            if not keys or not all(isinstance(key, str) for key in keys):
                raise BadInput(f"text database {self.path}: the image of example {example!r} is {image!r}; expected a name or several")
            images.append(keys)
        return images

    def _published_texts(self, found: dict[str, list[int]]) -> dict[str, list[int]]:
        """img2txts.json where there is one (its order of images counts for retrieval), else what the examples say."""
        if not (self.path / "img2txts.json").is_file():
            return found
        table = read_json_object(self.path / "img2txts.json")
        try:
            return {image: [self._places[example] for example in examples if example in self._places] for image, examples in table.items()}
        except TypeError:
            raise BadInput(f"{self.path / 'img2txts.json'} holds something else than {{image: [ids]}}") from None


def _reopen(path: Path, allow_partial: bool, lengths: str | None, readahead: bool) -> TextDB:
    return TextDB(path, allow_partial=allow_partial, lengths=lengths, readahead=readahead)
