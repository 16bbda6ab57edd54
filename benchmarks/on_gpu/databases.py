"""What needs databases on disk: training with the loader, scoring all pairs, resuming. They are made here, with lengths like COCO's."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_gpu.rows import Place, Row, attempted
from on_gpu.steps import ARITHMETIC, speeds
from train import draw_lengths  # benchmarks/train.py

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.model.settings.files import read_settings
from uniter.model.train.pretraining import pretrain

WORDS = (
    *("a", "the", "man", "woman", "dog", "cat", "street", "table", "red", "blue", "green", "on", "in", "with", "of", "two", "three"),
    *("people", "standing", "sitting", "near", "large", "small"),
)
SMALL_MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def databases(place: Place, *, pictures: int, captions: int = 5) -> tuple[Path, Path, int]:
    """A text and a region database with random contents, and the bytes of a picture; those that a section before has made, if it did."""
    folder = Path(place.work) / f"databases-{pictures}-{captions}"
    texts, images = folder / "texts.db", folder / "regions.lmdb"
    if not (images / "header.json").is_file() or not (texts / "header.json").is_file():
        _write(place, texts, images, pictures=pictures, captions=captions)
    return texts, images, (images / "data.mdb").stat().st_size // pictures


def _write(place: Place, texts: Path, images: Path, *, pictures: int, captions: int) -> None:
    width, classes = (16, 9) if place.small else (2048, 1601)
    rng = np.random.default_rng(0)
    _, counts = draw_lengths(pictures, rng)
    counts = counts % 8 + 2 if place.small else counts
    pool = rng.random((400, width), dtype=np.float32)  # rows of which all pictures are made: drawing each value anew would take minutes
    labels = rng.random((400, classes), dtype=np.float32)
    labels /= labels.sum(axis=1, keepdims=True)
    store = UnitStore(images, settings={"made_up": True, "pictures": pictures})
    writer = store.unit(0)
    assert writer is not None
    with writer:
        for number, count in enumerate(counts.tolist()):
            rows = rng.integers(0, 400, count)
            corners = np.sort(rng.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4) * 400
            boxes = np.ascontiguousarray(corners, dtype=np.float32)
            record = RegionFeatures(
                pool[rows], normalised_boxes(boxes, (440, 440)), np.full(count, 0.5, np.float32), boxes, labels[rows], (440, 440)
            )
            writer.put(f"{number:06d}", encode_record(record, key=f"{number:06d}"), regions=count)
            if number % 200 == 199:
                writer.commit()
        writer.commit()
        writer.complete()
    store.finish(units=1, header={"feature_width": width, "label_classes": classes, "class_names": [str(n) for n in range(classes - 1)]})
    tokenizer = Tokenizer.learn([" ".join(WORDS)], size=200) if place.small else Tokenizer.load("bert-base-cased")
    most = 6 if place.small else 11
    found = (
        Caption(f"{picture:06d}#{number}", f"{picture:06d}", " ".join(rng.choice(WORDS, rng.integers(4, most + 3)).tolist()))
        for picture in range(pictures)
        for number in range(captions)
    )
    build_text_db(found, texts, tokenizer=tokenizer, settings={"made_up": True})


def settings_of(place: Place, texts: Path, images: Path, **changes: Any) -> Any:
    """Settings of a pre-training run in which nothing is left to chance."""
    values: dict[str, Any] = {
        "corpora": [{"name": "made", "text": [str(texts)], "images": [str(images)]}],
        "model": SMALL_MODEL if place.small else {"size": "base"},
        **{"dropout": 0.1, "validation_pictures": 4, "validation_examples": 8, "tensorboard": False, "device": str(place.device)},
        **changes,
    }
    return read_settings(values, source="benchmarks/gpu.py")


def pretraining_rows(place: Place) -> Iterator[Row]:
    """The published mixture of tasks, at 10k and 40k tokens, eager; then masked words compiled."""
    began = time.monotonic()
    texts, images, size = databases(place, pictures=60 if place.small else 2500)
    yield Row("made the databases, a picture", size / 1024, "KiB", "UNITER's have 164 without distributions")
    yield Row("making them took", time.monotonic() - began, "s")
    workers = 0 if place.small else min(12, max(2, len(os.sched_getaffinity(0)) - 2))
    for tokens in (150,) if place.small else (10240, 40960):
        run = partial(_run, place, texts, images, tokens=tokens, workers=workers, tasks=None, compiled=False)
        yield from attempted(f"all tasks, {tokens:,} tokens", run, place, needs_seconds=0 if place.small else 15)
    tokens = 150 if place.small else 10240
    if place.on_gpu:
        run = partial(_run, place, texts, images, tokens=tokens, workers=workers, tasks={"mlm": 1.0}, compiled=True)
        yield from attempted(f"mlm, {tokens:,} tokens, compiled", run, place, needs_seconds=60)


def _run(
    place: Place, texts: Path, images: Path, *, tokens: int, workers: int, tasks: dict[str, float] | None, compiled: bool
) -> Iterator[Row]:
    """One run of the training loop; its own log says how fast it was. Ended by the signal that a cluster would send."""
    name = f"{'mlm' if tasks else 'all tasks'}, {tokens:,} tokens{', compiled' if compiled else ''}, from disk"
    folder = Path(place.work) / f"run-{tokens}-{compiled}"
    updates = 6 if place.small else 400 if tokens < 20000 else 140
    settings = settings_of(
        place, texts, images, batch_tokens=tokens, accumulation=1, steps=updates, validate_every=updates, checkpoint_every=updates,
        workers=workers, compile=compiled, look_every=2 if place.small else 10, optimizer={"warmup_steps": 2},
    )  # fmt: skip
    settings.corpora[0].tasks = tasks
    bell = threading.Timer(max(min(place.left() - 12, 30 + 60 * compiled), 1.0), lambda: os.kill(os.getpid(), signal.SIGTERM))
    bell.start()
    try:
        pretrain(settings, folder)
    except UniterError as stopped:  # told to
        if not (folder / "log.jsonl").is_file():
            raise
        yield Row(f"{name}: ended early", str(stopped).split(";")[0])
    finally:
        bell.cancel()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "tokens_per_second" in line]
    late = trained[len(trained) // 3 :] or trained  # the first third warms up
    seconds = sum(line["seconds"] for line in late)
    yield from speeds(
        name, sum(line["tokens"] for line in late) / seconds, sum(line["examples"] for line in late) / seconds,
        wanted=ARITHMETIC.get(tokens, ""),
    )  # fmt: skip
    yield Row(
        f"{name}: share of the time spent waiting for data",
        sum(one["data_wait_share"] * one["seconds"] for one in late) / seconds,
        wanted="below 0.03",
    )
    yield Row(f"{name}: rows that only fill up", sum(one["padding_share"] for one in late) / len(late))
    yield Row(f"{name}: updates measured, workers", f"{len(late)} of {len(trained)}, {workers}")
    if place.on_gpu:
        yield Row(f"{name}: peak memory", torch.cuda.max_memory_allocated(place.device) / 2**30, "GiB")
        torch.cuda.reset_peak_memory_stats(place.device)


def resume_rows(place: Place) -> Iterator[Row]:
    """Six updates, and three and three: the same weights, to the bit on a CPU."""
    texts, images, _ = databases(place, pictures=60 if place.small else 100, captions=2)
    common: dict[str, Any] = {
        "model": SMALL_MODEL, "batch_tokens": 150 if place.small else 2048, "accumulation": 2, "steps": 6, "validate_every": 6,
        "checkpoint_every": 3, "workers": 0, "precision": "fp32",
    }  # fmt: skip

    def weights(run: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        folder = Path(place.work) / run
        found: dict[str, torch.Tensor] = load_file(checkpoint_path(folder, checkpoint_steps(folder)[-1]) / "model.safetensors")
        return found

    for name, steps in {"unbroken": [None], "again": [None], "resumed": [3, None]}.items():
        for last in steps:
            pretrain(settings_of(place, texts, images, **common, stop_after=last), Path(place.work) / name)
    unbroken, again, resumed = (weights(name) for name in ("unbroken", "again", "resumed"))

    def apart(other: dict[str, torch.Tensor]) -> float:
        return max(float((unbroken[key].double() - other[key].double()).abs().max()) for key in unbroken)

    # Six updates move a weight by some 1e-4; sums by atomic additions differ from run to run on a GPU.
    most = 1e-5 if place.on_gpu else 0.0
    yield Row("the same run twice: largest difference of a weight", apart(again), wanted="0 on a CPU")
    found = apart(resumed)
    yield Row(
        "resumed against unbroken: largest difference of a weight", found, wanted=f"at most {most:g}",
        state="measured" if found <= max(most, 2 * apart(again)) else "WRONG",
    )  # fmt: skip


def retrieval_rows(place: Place) -> Iterator[Row]:
    """Every text with every picture, as `uniter-train evaluate retrieval` does it; and the script's packed against padded."""
    yield from attempted("every pair, from disk", partial(_every_pair, place), place)
    yield from attempted("packed against padded", partial(_packed_and_padded, place), place, needs_seconds=0 if place.small else 8)


def _every_pair(place: Place) -> Iterator[Row]:
    from uniter.datasets.batches.corpus import open_corpus
    from uniter.model.checkpoints.write import save_checkpoint
    from uniter.model.evaluation.finetuned import evaluate_finetuned
    from uniter.model.heads.downstream import UniterForRetrieval
    from uniter.model.uniter import UniterConfig

    pictures = 12 if place.small else 500
    texts, images, _ = databases(place, pictures=pictures, captions=1)
    corpus = open_corpus("made", [texts], [images])
    overrides: dict[str, Any] = {"vocab_size": corpus.texts[0].v_range[1], "image_feature_size": corpus.images.feature_width}
    model = UniterForRetrieval(UniterConfig.preset("tiny" if place.small else "base", **overrides, **(SMALL_MODEL if place.small else {})))
    weights = Path(place.work) / "retrieval"
    save_checkpoint(weights, model)
    for tokens in (600,) if place.small else (8192, 32768):
        began = time.monotonic()
        evaluate_finetuned(
            "retrieval", str(weights), text=[str(texts)], images=[str(images)], batch_tokens=tokens, device=str(place.device),
            workers=0 if place.small else None,
        )  # fmt: skip
        seconds = time.monotonic() - began
        yield Row(
            f"{pictures} texts with {pictures} pictures, {tokens:,} tokens a batch", pictures**2 / seconds, "pairs/s", "loading counted"
        )
        yield Row("COCO 5k (25 million pairs) would take", 25_000 * 1000 / (pictures**2 / seconds) / 3600, "hours of this card")


def _packed_and_padded(place: Place) -> Iterator[Row]:
    import retrieval  # benchmarks/retrieval.py

    sizes = ["--hidden=32", "--layers=2", "--texts=12", "--pictures=12", "--batch=8", "--count=1", "--repeats=1"] if place.small else []
    sizes = sizes or ["--batch=256", "--count=4", "--repeats=3", "--texts=300", "--pictures=300"]
    for precision in ("fp32", "bf16") if place.on_gpu else ("fp32",):
        for kind, ratio in retrieval.main([*sizes, f"--device={place.device}", f"--precision={precision}"]).items():
            yield Row(f"packed, times as fast as padded, {kind} batches, {precision}", ratio, wanted="1" if kind == "sorted" else "1.5")
