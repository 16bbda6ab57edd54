"""What pre-training is worth down-stream: UNITER's nine rows on a made-up world, fine-tuned from scratch and from pre-trained.

    python benchmarks/downstream.py --out downstream/

There are worlds of the same words and other pictures. Pre-training reads the captions of the first one's pictures. The tasks are asked
about others, which pre-training never saw, and of which only a few are annotated (a twentieth of them for referring expressions, of which
a picture has more): that is what one pre-trains for. The exception is "retrieval-coco", which ranks pictures and captions of the first
world, as UNITER was pre-trained on COCO's; "retrieval-flickr30k" ranks others. All figures are on held-out pictures that nothing was
trained on.

Each step is a command of the toolkit and is printed as one would type it. The same command again goes on where it was stopped. All
figures are also in OUT/measured.json; `2>log.txt` keeps the commands' logs apart.

"from scratch" is a model as pre-training begins it (same size, same deviation of its random weights, centred regions), after no update
that counts: nothing but pre-training differs. Another seed is another such model, and another order of examples for both; the
pre-trained model is one. Both get the same settings and as many updates.

`--regions known` makes each thing of a scene a region whose feature is a vector of its shape plus one of its colour plus noise.
`--regions detector` begins at the pixels, with a detector trained on the first world and its regions; then pre-training wants more
updates (`--pretrain-steps`).
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.storage.files import read_json, write_json

COMMANDS = {
    "uniter-scenes": "uniter.cli.scenes",
    "uniter-extract": "uniter.cli.extract",
    "uniter-build-db": "uniter.cli.build_db",
    "uniter-train": "uniter.cli.train",
}
ORIGINS = ("scratch", "pretrained")
Words = Sequence[object]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        task: its name on the command line.
        figure: what is reported, from 0 to 1, the higher the better.
        train, held_out: the annotation files below a world's `tasks`, and options, as `uniter-build-db` takes them.
        images: of each part, the region databases by name; two are joined as VCR's annotated and detected ones.
        world: whose pictures.
    """

    task: str
    figure: str
    train: Words
    held_out: Words
    images: tuple[tuple[str, ...], tuple[str, ...]] = (("detected",), ("detected",))
    world: str = "few"


QUESTIONS, ANSWERS = "vqa/v2_OpenEnded_mscoco_{}2014_questions.json", "vqa/v2_mscoco_{}2014_annotations.json"


def _asked(part: str) -> list[object]:
    return [QUESTIONS.format(part), "--join", ANSWERS.format(part), "--key", "scene_{id:06d}"]


def _referring(name: str, by: str, held_out: str) -> Row:
    files = [f"{name}/refs({by}).p", "--join", f"{name}/instances.json", "--split"]
    return Row("refcoco", "accuracy", [*files, "train"], [*files, held_out], (("annotated",), ("annotated",)), "fewer")


def _ranked(world: str) -> Row:
    file = "retrieval/dataset_scenes.json"
    return Row("retrieval", "r_mean", [file, "--split", "train"], [file, "--split", "test"], world=world)


ROWS = {
    "vqa": Row("vqa", "accuracy", _asked("train"), _asked("val")),
    "vcr": Row("vcr", "q2ar", ["vcr/train.jsonl"], ["vcr/val.jsonl"], (("vcr_gt_train", "vcr_train"), ("vcr_gt_val", "vcr_val"))),
    "nlvr2": Row("nlvr2", "accuracy", ["nlvr2/train.json"], ["nlvr2/dev.json"], (("nlvr2",), ("nlvr2",))),
    "ve": Row("ve", "accuracy", ["snli_ve/snli_ve_train.jsonl"], ["snli_ve/snli_ve_dev.jsonl"]),
    "retrieval-coco": _ranked("world"),
    "retrieval-flickr30k": _ranked("few"),
    "refcoco": _referring("refcoco", "unc", "val,testA,testB"),
    "refcoco+": _referring("refcoco+", "unc", "val,testA,testB"),
    "refcocog": _referring("refcocog", "umd", "val,test"),
}


def run(*words: object) -> dict[str, Any]:
    """Print a command as a user would type it, run it in this process and return its `--json` summary."""
    name, *rest = [str(word) for word in words]
    print(f"$ {shlex.join([name, *rest])}", flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(COMMANDS[name]).main([*rest, "--json"], prog_name=name, standalone_mode=False)
    summary: dict[str, Any] = json.loads(printed.getvalue())
    return summary


# ------------------------------------------------------------------------------------------------------------------- regions


def known_regions(
    world: Path, out: Path, *, images: Path, key: str = "{}", noise: float = 0.3, width: int = 64, backgrounds: int = 3
) -> None:
    """Write a region database for the world's pictures in `images`, from what is known of their scenes.

    Args:
        key: of a picture, with its stem for {}.
        backgrounds: regions that show nothing, behind the things.
    """
    words = read_json(world / "world.json")["world"]
    shapes = list(words["shapes"])
    looks = np.random.default_rng(0)
    shape_looks = {shape: looks.normal(size=width) for shape in shapes}
    colour_looks = {colour: looks.normal(size=width) for colour in words["colours"]}
    scenes = {scene["key"]: scene for part in ("train", "val") for scene in read_json(world / f"scenes_{part}.json")["scenes"]}
    # Another name of a picture is known by its bytes.
    keys = {hashlib.sha256(path.read_bytes()).digest(): path.stem for path in (world / "images").iterdir()}
    settings = {"made_up": True, "noise": noise, "width": width, "images": images.name, "backgrounds": backgrounds}
    store = UnitStore(out, settings=settings)
    if store.is_complete():
        return
    writer = store.unit(0)
    assert writer is not None
    with writer:
        for number, path in enumerate(sorted(images.iterdir())):
            scene = scenes[keys[hashlib.sha256(path.read_bytes()).digest()]]
            rng = np.random.default_rng([1, number])
            height, across = scene["size"]
            features, boxes, classes = [], [], []
            for thing in scene["things"]:
                features.append(shape_looks[thing["shape"]] + colour_looks[thing["colour"]])
                boxes.append(thing["box"])
                classes.append(1 + shapes.index(thing["shape"]))
            for _ in range(backgrounds):
                x, y = rng.uniform(0, across * 0.7), rng.uniform(0, height * 0.7)
                features.append(np.zeros(width))
                boxes.append([x, y, x + across * 0.25, y + height * 0.25])
                classes.append(0)
            pixels = np.array(boxes, dtype=np.float32)
            labels = np.full((len(boxes), len(shapes) + 1), 0.01, dtype=np.float32)
            labels[np.arange(len(boxes)), classes] = 1
            record = RegionFeatures(
                features=(np.array(features) + noise * rng.normal(size=(len(boxes), width))).astype(np.float32),
                norm_bb=normalised_boxes(pixels, (height, across)),
                conf=np.full(len(boxes), 0.9, dtype=np.float32),
                boxes=pixels,
                soft_labels=labels / labels.sum(axis=1, keepdims=True),
                size=(height, across),
            )
            name = key.format(path.stem)
            writer.put(name, encode_record(record, key=name), regions=len(boxes))
        writer.commit()
        writer.complete()
    store.finish(units=1, header={"feature_width": width, "label_classes": len(shapes) + 1, "class_names": shapes})


def make_regions(out: Path, world: Path, name: str, detector: Path | None) -> None:
    """The region database `name` of a world's pictures."""
    database, annotated = out / f"{world.name}-{name}.lmdb", name == "annotated" or name.startswith("vcr_gt")
    # The same pictures under NLVR2's names.
    images = world / "tasks" / "nlvr2" / "images" if name == "nlvr2" else world / "images"
    key = f"{name}_{{}}.npz" if name.startswith("vcr") else "{}"
    if detector is None:
        known_regions(world, database, images=images, key=key, backgrounds=0 if annotated else 3)
        return
    options: list[object] = ["--boxes", world / "tasks" / "refcoco" / "instances.json"] if annotated else []
    options += ["--key", key.replace("{}", "{stem}")] if name.startswith("vcr") else []
    run("uniter-extract", images, database, "--detector", detector, *options)


# ----------------------------------------------------------------------------------------------------------------- databases


@dataclass(frozen=True)
class Databases:
    """What a row is trained and evaluated on: a text database and its regions each."""

    train: tuple[Path, str]
    held_out: tuple[Path, str]


def make_databases(out: Path, rows: Sequence[str], arguments: argparse.Namespace) -> tuple[dict[str, Databases], tuple[Path, Path]]:
    """The worlds, their regions and text databases: those of each row, and the captions and regions of pre-training."""
    for name, (pictures, *options) in {
        "world": [arguments.pictures],
        "few": [arguments.few, "--captions", 2, "--seed", 1],
        "fewer": [max(arguments.few // 20, 4), "--captions", 1, "--seed", 2],
    }.items():
        if not (out / name / "tasks" / "vcr" / "val.jsonl").exists():  # what is written last; drawing takes a while
            number = pictures + (0 if name == "world" else arguments.held_out)
            run("uniter-scenes", out / name, "--images", number, "--held-out", arguments.held_out, *options, "--tasks")
    world = out / "world"
    detector = None
    if arguments.regions == "detector":
        detector = out / "detector"
        run("uniter-train", "detector", "--images", world / "images", "--annotations", world / "instances_train.json",
            "--val-annotations", world / "instances_val.json", "--out", detector)  # fmt: skip
    names = {("world", "detected")} | {(ROWS[row].world, name) for row in rows for part in ROWS[row].images for name in part}
    for of, name in sorted(names):
        make_regions(out, out / of, name, detector)

    found = {}
    for row in rows:
        texts: list[tuple[Path, str]] = []
        for part, (source, *options), images in zip(
            ("train", "held-out"), (ROWS[row].train, ROWS[row].held_out), ROWS[row].images, strict=True
        ):
            folder, text = out / ROWS[row].world / "tasks", out / f"{row}-{part}.db"
            options = [folder / str(option) if str(option).endswith(".json") else option for option in options]
            # A held-out part numbers its answers as the training part does.
            options += ["--join", out / f"{row}-train.db" / "ans2label.json"] if row == "vqa" and part == "held-out" else []
            regions = [out / f"{ROWS[row].world}-{name}.lmdb" for name in images]
            matched = ["--key", "{parent}_{stem}.npz"] if row == "vcr" else ["--images", regions[0]]
            run("uniter-build-db", folder / str(source), text, "--task", ROWS[row].task, *options, *matched)
            texts.append((text, ";".join(map(str, regions))))
        found[row] = Databases(*texts)
    captions = out / "captions.db"
    run("uniter-build-db", world / "captions_train.json", captions, "--images", out / "world-detected.lmdb")
    return found, (captions, out / "world-detected.lmdb")


# ------------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Fine:
    """One fine-tuning and its evaluation, made in whatever process is free."""

    row: str
    origin: str
    seed: int
    out: Path
    start: Path
    databases: Databases
    options: list[object] = field(default_factory=list)
    device: list[object] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        name = f"{self.row}-{self.origin}-{self.seed}"
        (text, images), task, tuned = self.databases.train, ROWS[self.row].task, self.out / name
        run("uniter-train", "finetune", task, "--from", self.start, "--text", text, "--images", images, "--out", tuned,
            "--seed", self.seed, *self.device, *self.options)  # fmt: skip
        kept = self.out / "figures" / f"{name}.json"
        if not kept.exists():
            text, images = self.databases.held_out
            found = run("uniter-train", "evaluate", task, "--from", tuned, "--text", text, "--images", images, *self.device)
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, found)
        figures: dict[str, Any] = read_json(kept)
        return figures


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., concurrent.futures.Future[Any]]]:
    """A `submit` to that many processes of one thread each; with one, a plain call in this process."""
    if count == 1:

        def at_once(function: Callable[..., Any], *words: Any) -> concurrent.futures.Future[Any]:
            done: concurrent.futures.Future[Any] = concurrent.futures.Future()
            done.set_result(function(*words))
            return done

        yield at_once
        return
    with concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            yield pool.submit
        except BaseException:  # told to stop: what is killed goes on another time
            for process in multiprocessing.active_children():
                process.kill()
            raise


def verdict(differences: Sequence[float]) -> str:
    """What the differences (pre-trained - scratch, one a seed) say."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return "helps (one seed)" if mean > 0 else "DOES NOT HELP (one seed)"
    if mean <= 0:
        return "DOES NOT HELP"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return "helps" if mean > 2 * error else "NOT BEYOND THE NOISE"


def print_table(measured: dict[str, dict[str, list[float]]]) -> None:
    """One line a row: mean and deviation over the seeds, in percent."""
    print(f"\n{'task':20} {'figure':10} {'from scratch':>14} {'pre-trained':>14} {'difference':>11}   pre-training")
    without = []
    for row, of in measured.items():
        differences = [100 * (after - before) for before, after in zip(of["scratch"], of["pretrained"], strict=True)]
        cells = []
        for origin in ORIGINS:
            values = [100 * value for value in of[origin]]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        said = verdict(differences)
        if not said.startswith("helps"):
            without.append(row)
        print(f"{row:20} {ROWS[row].figure:10} {cells[0]:>14} {cells[1]:>14} {statistics.mean(differences):+11.1f}   {said}")
    print(f"Pre-training helps on {len(measured) - len(without)} of {len(measured)} tasks" + (
        f"; not on {', '.join(without)}." if without else "."
    ))  # fmt: skip


def main(words: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Run what is missing and print the table; row -> origin -> the figure of each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("downstream"), help="where everything is written (default: downstream)")
    parser.add_argument("--tasks", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of each kind (default: 3)")
    parser.add_argument("--pictures", type=int, default=1200, help="of pre-training's world (default: 1200)")
    parser.add_argument("--few", type=int, default=200, help="annotated pictures of the tasks' world (default: 200)")
    parser.add_argument("--held-out", type=int, default=200, help="more pictures of each world, on which is measured (default: 200)")
    parser.add_argument("--regions", default="known", choices=["known", "detector"], help="see above (default: known)")
    parser.add_argument("--pretrain-steps", type=int, default=4000, help="updates of pre-training (default: 4000)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each fine-tuning (default: 300)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of fine-tuning, e.g. batch_tokens=512")
    parser.add_argument("--model-set", action="append", default=[], metavar="KEY=VALUE", help="a size of the model, e.g. hidden_size=32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--processes", type=int, help="fine-tunings side by side (default: one a core; one where there is a GPU)")
    arguments = parser.parse_args(words)
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    chosen = {name: getattr(arguments, name) for name in ("pictures", "few", "held_out", "regions")}
    if (out / "worlds.json").exists() and read_json(out / "worlds.json") != chosen:
        parser.error(f"{out} holds worlds of other sizes ({read_json(out / 'worlds.json')}); give another --out")
    write_json(out / "worlds.json", chosen)
    device: list[object] = ["--device", arguments.device] if arguments.device else []
    databases, (captions, images) = make_databases(out, arguments.tasks, arguments)

    quiet = ["--set", "tensorboard=false"]
    sizes = [word for setting in arguments.model_set for word in ("--set", f"model.{setting}")]
    settings = ["batch_tokens=1024", f"validate_every={arguments.steps}", "checkpoint_every=100", "keep=1", *arguments.set]
    settings = [word for setting in settings for word in ("--set", setting)]
    pretraining = ["uniter-train", "pretrain", "--text", captions, "--images", images, "--model", "tiny", *device, *quiet, *sizes]
    steps = ["--steps", arguments.pretrain_steps]
    untaught = ["--steps", 1, "--set", "optimizer.learning_rate=1e-12", "--set", "validation_examples=10"]

    def fine(row: str, origin: str, seed: int) -> Fine:
        start = out / (f"scratch-{seed}" if origin == "scratch" else "pretrained")
        return Fine(row, origin, seed, out, start, databases[row], ["--steps", arguments.steps, *quiet, *settings], device)

    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    with workers(arguments.processes or (1 if on_gpu else len(os.sched_getaffinity(0)))) as submit:
        # Pre-training keeps one process busy while the others begin from scratch.
        first = submit(run, *pretraining, *steps, "--out", out / "pretrained")
        for started in [
            submit(run, *pretraining, *untaught, "--seed", seed, "--out", out / f"scratch-{seed}") for seed in range(arguments.seeds)
        ]:
            started.result()
        made = {}
        for origin in ORIGINS:
            if origin == "pretrained":
                first.result()
            for row in arguments.tasks:
                for seed in range(arguments.seeds):
                    made[row, origin, seed] = submit(Fine.figures, fine(row, origin, seed))
        measured = {
            row: {origin: [made[row, origin, seed].result()[ROWS[row].figure] for seed in range(arguments.seeds)] for origin in ORIGINS}
            for row in arguments.tasks
        }
    write_json(out / "measured.json", measured)
    print_table(measured)
    return measured


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
