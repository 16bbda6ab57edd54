"""What pre-training is worth down-stream: every task of the made-up world, fine-tuned from scratch and from pre-trained. Prints one table.

    python benchmarks/downstream.py --out downstream/

Each step is a command of the toolkit and is printed as one would type it: world, detector, regions, text databases, pre-training on the
training pictures' captions, then for each task and seed both fine-tunings and their evaluation on pictures that neither has seen. The
same command again goes on where it was stopped. All figures are also in OUT/measured.json; `2>log.txt` keeps the commands' logs apart.

"from scratch" is a model as pre-training begins it (same size, same deviation of its random weights, centred regions), after no update
that counts: nothing but pre-training differs. Another seed is another such model, and another order of examples for both; the
pre-trained model is one. Both get the same settings and as many updates.

`--regions known` leaves the detector out and makes each thing of a scene a region whose feature is a vector of its shape plus one of
its colour plus noise; with `--pictures 60 --held-out 20 --steps 20 --pretrain-steps 20 --seeds 1` it ends within a minute or two.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniter.datasets.image_db import encode_record
from uniter.datasets.lmdb_store import UnitStore, read_json, write_json
from uniter.datasets.regions import RegionFeatures, normalised_boxes

COMMANDS = {
    "uniter-scenes": "uniter.cli.scenes",
    "uniter-extract": "uniter.cli.extract",
    "uniter-build-db": "uniter.cli.build_db",
    "uniter-train": "uniter.cli.train",
}
# What is reported of each task; all from 0 to 1, the higher the better.
FIGURES = {"vqa": "accuracy", "ve": "accuracy", "nlvr2": "accuracy", "retrieval": "r_mean"}
ORIGINS = ("scratch", "pretrained")


def run(*words: object) -> dict[str, Any]:
    """Print a command as a user would type it, run it in this process and return its `--json` summary."""
    name, *rest = [str(word) for word in words]
    print(f"$ {shlex.join([name, *rest])}", flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(COMMANDS[name]).main([*rest, "--json"], prog_name=name, standalone_mode=False)
    summary: dict[str, Any] = json.loads(printed.getvalue())
    return summary


def known_regions(world: Path, out: Path, *, images: Path, noise: float = 0.3, width: int = 64, backgrounds: int = 3) -> None:
    """Write a region database for the world's pictures in `images`, from what is known of their scenes."""
    words = read_json(world / "world.json")["world"]
    shapes = list(words["shapes"])
    looks = np.random.default_rng(0)
    shape_looks = {shape: looks.normal(size=width) for shape in shapes}
    colour_looks = {colour: looks.normal(size=width) for colour in words["colours"]}
    scenes = {scene["key"]: scene for part in ("train", "val") for scene in read_json(world / f"scenes_{part}.json")["scenes"]}
    # Another name of a picture is known by its bytes.
    keys = {hashlib.sha256(path.read_bytes()).digest(): path.stem for path in (world / "images").iterdir()}
    store = UnitStore(out, settings={"made_up": True, "noise": noise, "width": width, "images": images.name})
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
            writer.put(path.stem, encode_record(record, key=path.stem), regions=len(boxes))
        writer.commit()
        writer.complete()
    store.finish(units=1, header={"feature_width": width, "label_classes": len(shapes) + 1, "class_names": shapes})


def make_databases(out: Path, tasks: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """World, regions and text databases; name -> (training texts, held-out texts, regions), for `captions` (training texts, regions)."""
    world = out / "world"
    run("uniter-scenes", world, "--images", arguments.pictures, "--held-out", arguments.held_out, "--tasks")
    regions = {"regions": world / "images"}
    if "nlvr2" in tasks:
        regions["nlvr2_regions"] = world / "tasks" / "nlvr2" / "images"  # the same pictures under NLVR2's names
    if arguments.regions == "detector":
        run("uniter-train", "detector", "--images", world / "images", "--annotations", world / "instances_train.json",
            "--val-annotations", world / "instances_val.json", "--out", out / "detector")  # fmt: skip
    for name, images in regions.items():
        if arguments.regions == "detector":
            run("uniter-extract", images, out / f"{name}.lmdb", "--detector", out / "detector")
        else:
            known_regions(world, out / f"{name}.lmdb", images=images)

    folder = world / "tasks"
    questions, answers = "v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json"
    sources: dict[str, list[list[Any]]] = {
        "captions": [[world / "captions_train.json"]],
        "vqa": [
            [folder / "vqa" / questions.format(part), "--join", folder / "vqa" / answers.format(part), "--key", "scene_{id:06d}"]
            for part in ("train", "val")
        ],
        "ve": [[folder / "snli_ve" / "snli_ve_train.jsonl"], [folder / "snli_ve" / "snli_ve_dev.jsonl"]],
        "nlvr2": [[folder / "nlvr2" / "train.json"], [folder / "nlvr2" / "dev.json"]],
        "retrieval": [[folder / "retrieval" / "dataset_scenes.json", "--split", part] for part in ("train", "val,test")],
    }
    # A held-out part numbers its answers as the training part does.
    sources["vqa"][1] += ["--join", out / "vqa_train.db" / "ans2label.json"]
    databases = {}
    for task in ("captions", *tasks):
        images = out / ("nlvr2_regions.lmdb" if task == "nlvr2" else "regions.lmdb")
        texts = []
        for part, (source, *options) in zip(("train", "val"), sources[task], strict=False):
            texts.append(out / f"{task}_{part}.db")
            named = [] if task == "captions" else ["--task", task]
            run("uniter-build-db", source, texts[-1], *named, *options, "--images", images)
        databases[task] = (*texts, images)
    return databases


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
    """One line a task: mean and deviation over the seeds, in percent."""
    print(f"\n{'task':10} {'figure':10} {'from scratch':>14} {'pre-trained':>14} {'difference':>11}   pre-training")
    without = []
    for task, of in measured.items():
        differences = [100 * (after - before) for before, after in zip(of["scratch"], of["pretrained"], strict=True)]
        cells = []
        for origin in ORIGINS:
            values = [100 * value for value in of[origin]]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        said = verdict(differences)
        if not said.startswith("helps"):
            without.append(task)
        print(f"{task:10} {FIGURES[task]:10} {cells[0]:>14} {cells[1]:>14} {statistics.mean(differences):+11.1f}   {said}")
    print(f"Pre-training helps on {len(measured) - len(without)} of {len(measured)} tasks" + (
        f"; not on {', '.join(without)}." if without else "."
    ))  # fmt: skip


def main(words: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Run what is missing and print the table; task -> origin -> the figure of each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("downstream"), help="where everything is written (default: downstream)")
    parser.add_argument("--tasks", nargs="+", default=list(FIGURES), choices=list(FIGURES))
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of each kind (default: 3)")
    parser.add_argument("--pictures", type=int, default=1200, help="of the world (default: 1200)")
    parser.add_argument("--held-out", type=int, default=200, help="of them, the last so many are measured on (default: 200)")
    parser.add_argument("--regions", default="detector", choices=["detector", "known"], help="see above (default: detector)")
    parser.add_argument("--pretrain-steps", type=int, help="updates of pre-training (default: chosen by the amount of data)")
    parser.add_argument("--steps", type=int, help="updates of each fine-tuning (default: chosen by the amount of data)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both trainings, e.g. batch_tokens=512"
    )
    parser.add_argument("--model-set", action="append", default=[], metavar="KEY=VALUE", help="a size of the model, e.g. hidden_size=32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    arguments = parser.parse_args(words)
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    device = ["--device", arguments.device] if arguments.device else []
    databases = make_databases(out, arguments.tasks, arguments)

    settings = [word for setting in (*arguments.set, "tensorboard=false") for word in ("--set", setting)]
    sizes = [word for setting in arguments.model_set for word in ("--set", f"model.{setting}")]
    captions, images = databases["captions"]
    pretraining = ["uniter-train", "pretrain", "--text", captions, "--images", images, "--model", "tiny", *device, *settings, *sizes]
    steps = ["--steps", arguments.pretrain_steps] if arguments.pretrain_steps else []
    run(*pretraining, *steps, "--out", out / "pretrained")
    untaught = ["--steps", 1, "--set", "optimizer.learning_rate=1e-12", "--set", "validation_examples=10"]
    for seed in range(arguments.seeds):
        run(*pretraining, *untaught, "--seed", seed, "--out", out / f"scratch-{seed}")

    steps = ["--steps", arguments.steps] if arguments.steps else []
    measured: dict[str, dict[str, list[float]]] = {}
    for task in arguments.tasks:
        training, held_out, images = databases[task]
        measured[task] = {origin: [] for origin in ORIGINS}
        for seed in range(arguments.seeds):
            for origin, start in zip(ORIGINS, (out / f"scratch-{seed}", out / "pretrained"), strict=True):
                tuned = out / f"{task}-{origin}-{seed}"
                run("uniter-train", "finetune", task, "--from", start, "--text", training, "--images", images, "--out", tuned,
                    *steps, "--seed", seed, *device, *settings)  # fmt: skip
                figures = run("uniter-train", "evaluate", task, "--from", tuned, "--text", held_out, "--images", images, *device)
                measured[task][origin].append(figures[FIGURES[task]])
        write_json(out / "measured.json", measured)
    print_table(measured)
    return measured


if __name__ == "__main__":
    main()
