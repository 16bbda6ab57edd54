"""Captions to a finished text database (the layout of `text_db.py`), in memory that does not grow with the number of captions.

The captions are read once. Their records go, sorted by id, into runs on disk that are then merged, because an LMDB filled in the order
of its keys is compact and touches one page at a time; what the side files and the index need is spooled beside them. All of it lies in
`OUT/building/` until the end. `settings.json` is written first and `header.json` last: a folder between the two opens nowhere as complete,
and the same command starts it anew.
"""

import contextlib
import errno
import fcntl
import gc
import heapq
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import lmdb
import msgpack
import numpy as np
import orjson
from numpy.typing import NDArray

from uniter.datasets.captions.caption import Caption
from uniter.datasets.cards import CARD_FILE, has_foreign_readme, text_card
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.index_file import hash_key, save_arrays
from uniter.datasets.keys import key_maker
from uniter.datasets.lmdb_store import INDEX, difference_in_words, sync_folder, write_json
from uniter.datasets.progress import Progress
from uniter.datasets.text_db import TEXT_FORMAT, compress_record, read_json_object
from uniter.datasets.tokenizer import Tokenizer

BATCH = 4096  # captions tokenised at once
RUN_BYTES = 48 << 20  # of records held before they are sorted and written out
LONGEST_ID = 511  # bytes; LMDB's limit of keys
LONG, TOO_LONG = 60, 512  # word pieces: UNITER's max_txt_len, and BERT's positions
REMEMBERED_IMAGES = 1 << 18
MISSING, BY_TEMPLATE = "missing", "template"
OURS = (
    "data.mdb",
    "lock.mdb",
    "meta.json",
    "id2len.json",
    "id2len_qa.json",
    "id2len_qar.json",
    "txt2img.json",
    "img2txts.json",
    "vocab.txt",
    INDEX,
)
TASK_FILES = (
    "ans2label.json",
    "refs.json",
    "images.json",
    "annotations.json",
    "categories.json",
    "boxes.json",
)  # may lie there of an earlier task

MatchImage = Callable[[str], tuple[str, str] | None]


@dataclass
class BuildReport:
    """What became of the texts.

    Attributes:
        counts: read, kept, empty, longer_than_60, longer_than_512, duplicate, special_words, without_image, excluded, and what the
            source counted of its own (images_without_caption ...). "longer", "duplicate" and "special_words" are kept.
        coverage: of `--images`: by rule, how many images were found by it; `missing` how many by none.
        images: how many different images the kept texts are about.
        already_complete: nothing was done, the finished database was there.
    """

    counts: dict[str, int]
    coverage: dict[str, int]
    images: int
    already_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"texts": self.counts, "images": self.images, "coverage": self.coverage, "already_complete": self.already_complete}


def build_text_db(
    captions: Iterable[Caption],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any] | None = None,
    images: MatchImage | None = None,
    key: str = "stem",
    excluded: Callable[[Caption], bool] | None = None,
    source_counts: Counter[str] | None = None,
    lengths: Mapping[str, Callable[[Mapping[str, Any]], int]] | None = None,
    meta: Mapping[str, Any] | None = None,
    side_files: Callable[[], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> BuildReport:
    """Write a text database, or find it finished.

    Args:
        captions: the texts, in the order that their examples will have. Not touched if the database is complete already.
        out: the database's folder, made if it is not there.
        settings: JSON; what else than the tokeniser and `key` decides what is written. Another run with others is refused.
        images: from an image's name to (its key in the region databases, the rule it was found by), None if it is in none. Texts
            without an image are left out and counted.
        key: how an image's key is made from its name where `images` is None (`keys.key_maker`).
        excluded: true for texts whose image must not be seen; they are left out and counted.
        source_counts: what the source counts while it is read; goes into the report.
        lengths: what side files of lengths to write, by name, from the finished record; by default `id2len` of `input_ids`.
        meta: what meta.json says beside the tokeniser.
        side_files: the further JSON files of a task, by name; asked for once the texts are read.
        overwrite: begin anew whatever was there.

    Raises:
        SettingsDiffer: `out` holds a database made with other settings.
        BadInput: an id is unusable or used twice; no text is left; no image is in `images`.
    """
    folder = Path(out)
    wanted = {
        "format": TEXT_FORMAT,
        "kind": "text",
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256(), "lowercase": tokenizer.lowercase},
        "key": None if images is not None else key,
        **(settings or {}),
    }
    wanted = json.loads(json.dumps(wanted))  # as it will be read again: tuples are lists
    make_key = key_maker(key) if images is None else None
    with _only_builder(folder):
        finished = _prepare_folder(folder, wanted, overwrite=overwrite)
        if finished is not None:
            return finished
        try:
            return _build(
                captions,
                folder,
                spool_of=lambda work: _Spool(
                    work, folder, tokenizer, images, make_key, lengths or {"id2len": _length_of_input_ids}, excluded
                ),
                finish=lambda: _write_meta(folder, tokenizer, meta or {}, side_files),
                source_counts=source_counts,
                wanted=wanted,
                with_images=images is not None,
            )
        except (UniterError, OSError) as error:
            # What cannot be built with these settings must not stand in the way of others. (A killed run leaves its settings.)
            _clear(folder)
            (folder / "settings.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds files of somebody else
                folder.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UniterError(
                    f"the disk is full while building {folder}, of which nothing is kept; make room and run the same command again"
                ) from error
            raise


def _build(
    captions: Iterable[Caption],
    folder: Path,
    *,
    spool_of: Callable[[Path], "_Spool"],
    finish: Callable[[], None],
    source_counts: Counter[str] | None,
    wanted: Mapping[str, Any],
    with_images: bool,
) -> BuildReport:
    work = folder / "building"
    work.mkdir()
    spool = spool_of(work)
    with _seldom_collected(), Progress(None, unit="captions", label="reading") as progress:
        source = iter(captions)
        while batch := list(islice(source, BATCH)):
            spool.add(batch)
            progress.update(len(batch))
    spool.close()
    counts = {**spool.counts(), **(source_counts or {})}
    if not spool.kept:
        raise BadInput(_nothing_left(counts, with_images, folder, spool.first_without_image))
    _merge(folder, spool)
    image_count, coverage = _write_index(work, folder, spool)
    counts["duplicate"] = spool.duplicates()
    finish()
    shutil.rmtree(work)
    sync_folder(folder)
    report = BuildReport(counts, coverage if with_images else {}, image_count)
    header = {
        "format": TEXT_FORMAT,
        "kind": "text",
        "examples": spool.kept,
        "settings": wanted,
        "report": report.as_dict(),
        "software": f"uniter-toolkit {version('uniter-toolkit')}",
    }
    if not has_foreign_readme(folder):
        (folder / CARD_FILE).write_text(text_card(header), encoding="utf-8")
    write_json(folder / "header.json", header)
    return report


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for cycles of garbage a hundred times less often: records make none, and the looking costs 15 % of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _length_of_input_ids(record: Mapping[str, Any]) -> int:
    return len(record["input_ids"])


def _nothing_left(counts: Mapping[str, int], with_images: bool, folder: Path, image: str | None) -> str:
    if not counts["read"]:
        return "the source holds no captions; is it the right file, and the right --split?"
    if with_images and counts["without_image"]:
        return (
            f"of {counts['read']:,} texts, none is about an image of the region databases ({counts['without_image']:,} without an image, "
            f"{counts['excluded']:,} excluded, {counts['empty']:,} empty); do --images and the captions belong together? "
            f"The first wants {image!r}; `uniter-db info` shows how the keys of --images look"
        )
    return f"of {counts['read']:,} texts none is left ({counts['without_image']:,} without an image, {counts['excluded']:,} excluded, " + (
        f"{counts['empty']:,} empty); nothing was written to {folder}"
    )


# The folder: who may write, and what stands there already.


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder against another build; a killed process gives it back."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; expected a folder for the text database, or none")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UniterError(f"another process is building {folder}; wait for it, or choose another OUT") from None
        yield
    finally:
        os.close(handle)


def _prepare_folder(folder: Path, wanted: dict[str, Any], *, overwrite: bool) -> BuildReport | None:
    settings, header = folder / "settings.json", folder / "header.json"
    _drop_unfinished(folder)
    if settings.is_file() and not overwrite:
        there = read_json_object(settings)
        if phrases := difference_in_words(there, wanted):
            raise SettingsDiffer(
                f"{folder} was made with other settings ({'; '.join(phrases)}); give the same ones, choose another OUT, or pass --overwrite"
            )
        if header.is_file():
            report = read_json_object(header).get("report", {})
            return BuildReport(report.get("texts", {}), report.get("coverage", {}), report.get("images", 0), already_complete=True)
    elif not settings.is_file() and any(folder.iterdir()) and not overwrite:
        raise BadInput(f"{folder} holds files that are no text database of ours; choose another OUT, or pass --overwrite")
    _clear(folder)
    write_json(settings, wanted)
    return None


def _clear(folder: Path) -> None:
    """Take away everything of a database but its settings."""
    (folder / "header.json").unlink(missing_ok=True)  # first: from here on it is not complete
    sync_folder(folder)
    for name in (*OURS, *TASK_FILES):
        (folder / name).unlink(missing_ok=True)
    if not has_foreign_readme(folder):
        (folder / CARD_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "building", ignore_errors=True)
    _drop_unfinished(folder)


def _drop_unfinished(folder: Path) -> None:
    """Remove what writes left that were killed, or found the disk full."""
    for name in ("settings.json", "header.json", *OURS, *TASK_FILES):
        for unfinished in folder.glob(f"{name}.*.tmp"):
            unfinished.unlink()


# Reading: one pass over the captions, everything that is needed later onto disk.


class _Spool:
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
        self._id2len = {name: _JsonObject(folder / f"{name}.json") for name in self._length_of}
        self._txt2img = _JsonObject(folder / "txt2img.json")
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


class _JsonObject:
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


# Merging: the sorted runs into one LMDB.


def _merge(folder: Path, spool: _Spool) -> None:
    # Twice what is needed costs nothing: the file grows only as far as it is filled.
    map_size = 2 * spool.record_bytes + (64 << 20)
    records = heapq.merge(*map(_read_run, spool.runs)) if len(spool.runs) > 1 else _read_run(spool.runs[0])
    try:
        environment = lmdb.open(str(folder), map_size=map_size, lock=False, sync=False, metasync=False, max_spare_txns=0)
        with environment, Progress(spool.kept, unit="captions", label="writing") as progress:
            last, last_number = b"", -1
            while batch := list(islice(records, 4 * BATCH)):
                for key, _, number in batch:
                    if key == last:
                        first, second = sorted((last_number + 1, number + 1))
                        raise BadInput(
                            f"the id {key.decode()!r} is used twice, by texts number {first:,} and {second:,} of those kept; "
                            "ids must differ: mend them, or leave the id field away to number the texts"
                        )
                    last, last_number = key, number
                with environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(((key, value) for key, value, _ in batch), append=True)
                progress.update(len(batch))
            environment.sync(True)
    except lmdb.Error as error:
        raise UniterError(
            f"writing {folder / 'data.mdb'} failed ({error}); make room if the disk is full, and run the same command again"
        ) from None


def _read_run(path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    with open(path, "rb") as file:
        yield from msgpack.Unpacker(file, raw=True, use_list=False, read_size=1 << 16, max_buffer_size=0)


# The index, and the side file that needs all images together.


def _write_index(work: Path, folder: Path, spool: _Spool) -> tuple[int, dict[str, int]]:
    """index.safetensors and img2txts.json; returns the number of images and, by rule, how many were found by it."""
    key_ends = np.cumsum(np.fromfile(work / "image_key_lengths", "<u4"), dtype=np.int64)
    key_bytes = _mapped(work / "image_keys")
    rules = np.fromfile(work / "image_rules", np.uint8)
    starts = np.concatenate([np.zeros(1, np.int64), key_ends[:-1]])
    hashes = np.fromiter((hash_key(key_bytes[start:end].tobytes()) for start, end in _pairs(starts, key_ends)), np.uint64, len(key_ends))
    # Several names may lead to one key, and a name that was forgotten has several numbers: what has one hash is one image.
    _, firsts, image_of = np.unique(hashes, return_index=True, return_inverse=True)
    coverage = {rule: int(count) for rule, count in zip(spool.rules, np.bincount(rules[firsts], minlength=len(spool.rules)), strict=True)}
    used = image_of.astype(np.int32)[np.fromfile(work / "images", np.int32)]
    first_uses = np.full(len(firsts), len(used), np.int64)
    np.minimum.at(first_uses, used, np.arange(len(used), dtype=np.int32))
    by_first_use = np.argsort(first_uses, kind="stable")[: int((first_uses < len(used)).sum())]
    number_of = np.full(len(firsts), -1, np.int32)
    number_of[by_first_use] = np.arange(len(by_first_use), dtype=np.int32)
    numbers = number_of[used]
    del used, image_of, first_uses
    rows = firsts[by_first_use]
    image_bytes = b"".join(key_bytes[start:end].tobytes() for start, end in _pairs(starts[rows], key_ends[rows]))
    image_ends = np.cumsum(key_ends[rows] - starts[rows], dtype=np.int64)

    order = np.argsort(numbers, kind="stable")
    image_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(numbers, minlength=len(rows)), dtype=np.int64)])
    examples = (order // spool.width).astype(np.int32)
    del order
    ids_bytes = _mapped(work / "ids")
    id_ends = np.cumsum(np.fromfile(work / "id_lengths", np.int32), dtype=np.int64)
    _write_texts_of_images(folder / "img2txts.json", image_bytes, image_ends, image_starts, examples, ids_bytes, id_ends)

    arrays: dict[str, NDArray[Any]] = {name: np.fromfile(work / name, np.int32) for name in spool.length_names}
    arrays |= _key_columns("ids", ids_bytes, id_ends, np.fromfile(work / "id_hashes", np.uint64))
    arrays |= _key_columns("image_keys", np.frombuffer(image_bytes, np.uint8), image_ends, hashes[rows])
    arrays |= {"image_numbers": numbers.reshape(-1, spool.width), "image_starts": image_starts, "image_examples": examples}
    save_arrays(folder / INDEX, arrays)
    return len(rows), coverage


def _key_columns(what: str, key_bytes: NDArray[np.uint8], ends: NDArray[np.int64], hashes: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    columns: dict[str, NDArray[Any]] = {"key_bytes": key_bytes, "key_ends": ends, "hashes": hashes[order], "hash_rows": order}
    return {f"{what}.{name}": column for name, column in columns.items()}


def _write_texts_of_images(
    path: Path,
    image_bytes: bytes,
    image_ends: NDArray[np.int64],
    image_starts: NDArray[np.int64],
    examples: NDArray[np.int32],
    ids_bytes: NDArray[np.uint8],
    id_ends: NDArray[np.int64],
) -> None:
    """{image key: [ids]}, images by first appearance, a block of images at a time."""
    table = _JsonObject(path)
    start = 0
    for first in range(0, len(image_ends), BATCH):
        last = min(first + BATCH, len(image_ends))
        places = examples[image_starts[first] : image_starts[last]]
        id_starts = np.where(places > 0, id_ends[np.maximum(places, 1) - 1], 0)
        ids = [ids_bytes[begin:end].tobytes().decode() for begin, end in _pairs(id_starts, id_ends[places])]
        bounds = (image_starts[first : last + 1] - image_starts[first]).tolist()
        items = []
        for place, end in enumerate(image_ends[first:last].tolist()):
            items.append((image_bytes[start:end].decode(), ids[bounds[place] : bounds[place + 1]]))
            start = end
        table.write(items)
    table.close()


def _pairs(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for first in range(0, len(starts), BATCH):
        yield from zip(starts[first : first + BATCH].tolist(), ends[first : first + BATCH].tolist(), strict=True)


def _mapped(path: Path) -> NDArray[np.uint8]:
    return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)


def _write_meta(folder: Path, tokenizer: Tokenizer, more: Mapping[str, Any], side_files: Callable[[], Mapping[str, Any]] | None) -> None:
    # The pieces themselves lie beside it: a learned vocabulary is nowhere else, and `--tokenizer OTHER.db` takes it from here.
    with open(folder / "vocab.txt", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{piece}\n" for piece in tokenizer.vocabulary)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / "meta.json", {**more, **tokenizer.meta()})
    for name, value in (side_files() if side_files is not None else {}).items():
        write_json(folder / name, value)
