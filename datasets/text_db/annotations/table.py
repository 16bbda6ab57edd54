"""The down-stream tasks' annotation files, as their authors publish them: task name -> reader.

A reader gives `Caption`s, the examples that `build_text_db` writes: images by the names of their files, the fields of UNITER's text
databases (facts/uniter.md, 2.4). Companion files (answers, boxes, missing images ...) are `join`, recognised by their content.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from uniter.datasets.errors import WrongUsage
from uniter.datasets.text_db.annotations import entailment, entities, gqa, nlvr2, own_labels, referring, vcr, vqa
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.karpathy import read_karpathy

__all__ = ["ANNOTATIONS", "Annotations"]

Length = Callable[[Mapping[str, Any]], int]


class Read(Protocol):
    """As `captions.CaptionReader`."""

    def __call__(self, path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]: ...


class SideFiles(Protocol):
    """The JSON files that a task keeps beside its text database, by name."""

    def __call__(self, paths: Sequence[Path], *, split: str | None, join: Sequence[Path]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Annotations:
    """One row of the table.

    Attributes:
        read: the examples of a file.
        companions: what may be given as `join`, in words.
        beside: what is read of a file's neighbours without being named, from the file and `join`.
        published_keys: templates (as of `key_maker`) of the keys that UNITER's published region databases have for these images.
        side_files: of the finished text database.
        lengths: what side files of lengths are written, from the finished record.
        added_words: word pieces that the task adds to the vocabulary, in order.
        folders_tell_apart: whether names in different folders are of different images.
        options: the further arguments that its reader and its side files take; "files" is not the user's: all files of the database.
        may_lack_text: whether an example may be a picture alone.
    """

    read: Read
    companions: str
    published_keys: tuple[str, ...]
    beside: Callable[[Path, Sequence[Path]], Sequence[Path]] = lambda path, join: ()
    side_files: SideFiles = lambda paths, *, split, join: {}
    lengths: Mapping[str, Length] | None = None
    added_words: Sequence[str] = field(default=())
    folders_tell_apart: bool = True
    options: tuple[str, ...] = ()
    may_lack_text: bool = False

    def with_options(self, task: str, given: Mapping[str, Any], files: Sequence[Path]) -> "Annotations":
        """The row whose functions are called with these options.

        Args:
            given: what the user gave, by name.
            files: all files of the database.

        Raises:
            BadInput: the task has no such option.
        """
        for name in given:
            if name not in self.options:
                takers = [other for other, row in ANNOTATIONS.items() if name in row.options]
                raise WrongUsage(f"--{name.replace('_', '-')} does nothing with --task {task}; it is of --task {' and '.join(takers)}")
        bound = {**given, **({"files": tuple(files)} if "files" in self.options else {})}
        read: Any = self.read
        side_files: Any = self.side_files
        return replace(self, read=partial(read, **bound), side_files=partial(side_files, **bound)) if bound else self


ANNOTATIONS: dict[str, Annotations] = {
    "vqa": Annotations(
        read=vqa.read_vqa,
        companions="VQA's annotations of these questions, and a list of answers (a JSON list, or {answer: number})",
        published_keys=("coco_{parent}_{id:012d}.npz", "vg_{stem}.npz", "vg_{id:012d}.npz"),
        side_files=vqa.side_files,
        options=("files", "label_separator", "answers_more_than"),
    ),
    "ve": Annotations(
        read=entailment.read_entailment,
        companions="nothing",
        published_keys=("flickr30k_{id:012d}.npz", "flickr30k_{stem}.npz"),
        side_files=entailment.side_files,
    ),
    "nlvr2": Annotations(
        read=nlvr2.read_nlvr2,
        companions="a JSON list of missing images",
        published_keys=("nlvr2_{stem}.npz",),
    ),
    "retrieval": Annotations(
        read=read_karpathy,
        companions="nothing",
        published_keys=("coco_{parent}_{id:012d}.npz", "flickr30k_{id:012d}.npz", "flickr30k_{stem}.npz"),
    ),
    "refcoco": Annotations(
        read=referring.read_referring,
        companions="COCO's instances.json, and a JSON of the order of annotations {image id: [annotation ids]}",
        published_keys=("visual_grounding_coco_gt_{id:012d}.npz", "visual_grounding_det_coco_{id:012d}.npz"),
        side_files=referring.side_files,
    ),
    "vcr": Annotations(
        read=vcr.read_vcr,
        companions="the folder of VCR's images and metadata (vcr1images/)",
        published_keys=("{parent}_{stem}.npz",),
        side_files=vcr.side_files,
        lengths={"id2len_qa": vcr.question_and_answer, "id2len_qar": vcr.question_answer_and_rationale},
        added_words=vcr.TAG_WORDS,
        folders_tell_apart=False,  # the annotated and the detected boxes of one photograph
    ),
    "gqa": Annotations(
        read=gqa.read_gqa,
        companions="a list of answers (a JSON list, or {answer: number}), or further files of questions whose answers are learnt",
        published_keys=("vg_{stem}.npz", "vg_{id:012d}.npz"),
        side_files=gqa.side_files,
        options=("files",),
    ),
    "flickr30k-entities": Annotations(
        read=entities.read_entities,
        companions="the folder that holds Annotations/ and Sentences/, where it is not that of the list",
        beside=entities.folders_beside,
        published_keys=("flickr30k_{id:012d}.npz", "flickr30k_{stem}.npz"),
    ),
    "classify": Annotations(
        read=own_labels.read_labels,
        companions="a list of labels (a JSON list, or {label: number})",
        published_keys=(),
        side_files=own_labels.side_files,
        options=("files", "label_separator", "score"),
        may_lack_text=True,
    ),
}


def may_lack_text(task: object) -> bool:
    """Whether the texts of a task, as a database's meta.json calls it, may be empty."""
    return isinstance(task, str) and task in ANNOTATIONS and ANNOTATIONS[task].may_lack_text
