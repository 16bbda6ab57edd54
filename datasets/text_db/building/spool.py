"""Captions on their way into a database: tokenized, packed and spooled in sorted runs."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.index_file import hash_key
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.records import compress_record
from uniter.datasets.text_db.tokenizer import Tokenizer

BATCH = 4096  # captions tokenised at once


RUN_BYTES = 48 << 20  # of records held before they are sorted and written out


LONGEST_ID = 511  # bytes; LMDB's limit of keys


LONG, TOO_LONG = 60, 512  # word pieces: UNITER's max_txt_len, and BERT's positions


REMEMBERED_IMAGES = 1 << 18


MISSING, BY_TEMPLATE = "missing", "template"


MatchImage = Callable[[str], tuple[str, str] | None]


# Reading: one pass over the captions, everything that is needed later onto disk.


class Spool:
    """Takes captions in, holds one run of records at most, leaves sorted runs and columns in the working folder."""

    def __init__(
        self,
        work: Path,
        folder: Path,
        tokenizer: Tokenizer,
        match: MatchImage | None,
        make_key: Callable[[str], str] | None,
        lengths: Mapping[str, Callable[[Mapping[str, Any]], int]],
        excluded: Callable[[Caption], bool] | None,
    ) -> None:
        self._work, self._tokenizer, self._excluded = work, tokenizer, excluded
        self._match, self._make_key, self._length_of = match, make_key, dict(lengths)
        self.read = self.kept = self.empty = self.long = self.too_long = self.special = self.without_image = self.left_out = 0
        self.first_without_image: str | None = None
        self.runs: list[Path] = []
        self.record_bytes = 0  # what the LMDB will need at least
        self._run: list[tuple[bytes, bytes, int]] = []
        self._run_bytes = 0
        self._packer = msgpack.Packer(use_bin_type=True)
        self._run_packer = msgpack.Packer(use_bin_type=True)
        self.width = 0  # images of an example
        self.length_names = tuple(self._length_of)
        self._columns = {
            name: open(work / name, "wb")  # noqa: SIM115 - closed in close()
            for name in (
                "ids",
                "id_lengths",
                "images",
                "id_hashes",
                "texts",
                "image_keys",
                "image_key_lengths",
                "image_rules",
                *self._length_of,
            )
        }
        self._id2len = {name: JsonObject(folder / f"{name}.json") for name in self._length_of}
        self._txt2img = JsonObject(folder / "txt2img.json")
        # A name's provisional number: REMEMBERED_IMAGES of them are known at once; one that was forgotten and comes again gets another
        # number, and _write_index brings those together.
        self._image_numbers: dict[str, int] = {}
        self._image_keys: list[str] = []
        self.image_rows = 0
        self.rules: list[str] = [MISSING]
        self.forgot_images = False
        self._special_ids = frozenset((tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id))
        self._keys_of_numbers: dict[int, str | None] = {}

    def counts(self) -> dict[str, int]:
        return {
            "read": self.read,
            "kept": self.kept,
            "empty": self.empty,
            "longer_than_60": self.long,
            "longer_than_512": self.too_long,
            "duplicate": 0,
            "special_words": self.special,
            "without_image": self.without_image,
            "excluded": self.left_out,
        }

    def add(self, batch: Sequence[Caption]) -> None:
        self.read += len(batch)
        if self._excluded is not None:
            here = [caption for caption in batch if not self._excluded(caption)]
            self.left_out += len(batch) - len(here)
            batch = here
        rows = self._tokenizer.encode_batch([caption.text or "" for caption in batch])
        ids: list[str] = []
        keys: list[bytes] = []
        numbers = array("i")
        texts = array("q")
        lengths: dict[str, array[int]] = {name: array("i") for name in self._length_of}
        shown_images: list[str | list[str]] = []
        known, keys_of, run = self._image_numbers, self._keys_of_numbers, self._run
        pack, compress, plain = self._packer.pack, compress_record, self._special_ids.isdisjoint
        for (example, name, text, _, fields, more_texts), pieces in zip(batch, rows, strict=True):
            if not pieces and (fields is None or not fields.get("input_ids")):
                self.empty += 1
                continue
            image: str | list[str]
            if isinstance(name, str):
                number = known.get(name)
                if number is None:
                    number = self._number(name)
                one_image = keys_of[number]
                if one_image is None:
                    self.without_image += 1
                    self.first_without_image = self.first_without_image or name
                    continue
                image, width = one_image, 1
                numbers.append(number)
            else:
                several = [self._number(each) for each in name]
                image = [key for key in map(keys_of.__getitem__, several) if key is not None]
                width = len(name)
                if not name or len(image) < width:
                    self.without_image += 1
                    self.first_without_image = self.first_without_image or ", ".join(name)
                    continue
                numbers.extend(several)
            if width != self.width:
                if self.width:
                    raise BadInput(f"text {example!r} is about {width} images, those before about {self.width}; expected as many")
                self.width = width
            record: dict[str, Any] = {"input_ids": pieces, "img_fname": image}
            if text is not None:
                record["sent"] = text
            if fields is not None:
                record.update(fields)
            if more_texts is not None:
                self._encode_more(more_texts, record)
            try:
                key = example.encode()
                value = pack(record)
            except UnicodeEncodeError:
                record, example = _whole(record), _whole(example)
                key, value = example.encode(), pack(record)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadInput(
                    f"the fields of text {example!r} cannot be stored ({error}); expected numbers, strings, lists, maps"
                ) from None
            if not 0 < len(key) <= LONGEST_ID:
                raise BadInput(
                    f"the id of one of the first {self.read:,} texts has {len(key)} bytes, expected 1 to {LONGEST_ID}: {example[:60]!r}"
                )
            pieces = record["input_ids"]
            if len(pieces) > LONG:
                self.long += 1
                self.too_long += len(pieces) > TOO_LONG
            if not plain(pieces):
                self.special += 1
            value = compress(value)
            run.append((key, value, self.kept))
            size = len(key) + len(value)
            self._run_bytes += size
            self.record_bytes += size + 16 if size < 1900 else size + 4096 + 64
            self.kept += 1
            ids.append(example)
            keys.append(key)
            texts.append(hash((image if width == 1 else tuple(image), text)))
            shown_images.append(image)
            for length_name, length_of in self._length_of.items():
                lengths[length_name].append(length_of(record))
        self._columns["ids"].write(b"".join(keys))
        self._columns["id_hashes"].write(array("Q", map(hash_key, keys)).tobytes())
        self._columns["id_lengths"].write(array("i", map(len, keys)).tobytes())
        self._columns["images"].write(numbers.tobytes())
        self._columns["texts"].write(texts.tobytes())
        for name, column in lengths.items():
            self._columns[name].write(column.tobytes())
            self._id2len[name].write(zip(ids, column, strict=True))
        self._txt2img.write(zip(ids, shown_images, strict=True))
        if self._run_bytes >= RUN_BYTES:
            self._write_run()
        if len(self._image_numbers) >= REMEMBERED_IMAGES:
            self._image_numbers.clear()
            self._keys_of_numbers.clear()
            self.forgot_images = True

    def _encode_more(self, texts: Mapping[str, str | Sequence[str]], record: dict[str, Any]) -> None:
        for name, text in texts.items():
            record[name] = self._tokenizer.encode(text) if isinstance(text, str) else self._tokenizer.encode_batch(text)

    def _number(self, name: str) -> int:
        number = self._image_numbers.get(name)
        if number is not None:
            return number
        if not name.strip("/. "):  # the source does not say which image it is
            key, rule = _whole(name), MISSING
        elif self._make_key is not None:
            key, rule = _whole(self._make_key(name)), BY_TEMPLATE
        else:
            assert self._match is not None
            matched = self._match(name)
            key, rule = matched if matched is not None else (_whole(name), MISSING)
        if rule not in self.rules:
            self.rules.append(rule)
        number = self.image_rows
        self.image_rows += 1
        self._image_numbers[name] = number
        self._keys_of_numbers[number] = key if rule != MISSING else None
        encoded = key.encode()
        self._columns["image_keys"].write(encoded)
        self._columns["image_key_lengths"].write(len(encoded).to_bytes(4, "little"))
        self._columns["image_rules"].write(bytes((self.rules.index(rule),)))
        return number

    def _write_run(self) -> None:
        self._run.sort()
        path = self._work / f"run-{len(self.runs):05d}"
        with open(path, "wb") as file:
            for start in range(0, len(self._run), BATCH):
                file.write(b"".join(map(self._run_packer.pack, self._run[start : start + BATCH])))
        self.runs.append(path)
        self._run.clear()
        self._run_bytes = 0

    def close(self) -> None:
        if self._run:
            self._write_run()
        for column in self._columns.values():
            column.close()
        self._image_numbers.clear()
        self._keys_of_numbers.clear()
        for table in (*self._id2len.values(), self._txt2img):
            table.close()

    def duplicates(self) -> int:
        """How many texts were there before, word for word, about the same images."""
        texts = np.fromfile(self._work / "texts", np.int64)
        texts.sort()
        return int((texts[1:] == texts[:-1]).sum())


class JsonObject:
    """A JSON object written bit by bit."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._separator = b"{"

    def write(self, items: Iterable[tuple[str, Any]]) -> None:
        text = orjson.dumps(dict(items))[1:-1]
        if text:
            self._file.write(self._separator)
            self._file.write(text)
            self._separator = b",\n"

    def close(self) -> None:
        self._file.write(b"{}" if self._separator == b"{" else b"}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _whole(value: Any) -> Any:
    """The value with U+FFFD for every half of a surrogate pair: JSON can hold one (\\ud83d), UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_whole(name): _whole(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return value


def pairs(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for first in range(0, len(starts), BATCH):
        yield from zip(starts[first : first + BATCH].tolist(), ends[first : first + BATCH].tolist(), strict=True)
