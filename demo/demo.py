"""The main job on a bare machine, both halves, with nothing but what a package registry ships.

First half: real photographs through the detector on board, whose weights ship with the package. Second half: a made-up captioned
world, in which learning can be seen: a detector trained on it, regions, text database, a pre-trained tiny UNITER, and what it
understands on held-out pairs.

Every step is a command that a user would type; it is printed before it runs. The whole script may be repeated: finished steps are
recognised by the commands themselves.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
ON_BOARD = """\
These regions are what the detector on board sees: COCO's 80 classes, small and quick, and wrong at times. UNITER's published models read
other features, Bottom-Up-Attention's, whose weights no package registry ships. With a file of them the same command gives those:
    uniter-extract photographs/ photographs-butd.lmdb --weights faster_rcnn_from_caffe_attr.pkl"""


def run(*words: str | Path) -> None:
    """Print a command as a user would type it, then run it; the demo ends where a command fails."""
    started = time.monotonic()
    print(f"\n$ {shlex.join(str(word) for word in words)}", flush=True)
    done = subprocess.run([str(BIN / str(words[0])), *map(str, words[1:])])
    if done.returncode:
        sys.exit(f"demo: {words[0]} ended with exit code {done.returncode}")
    print(f"  ({time.monotonic() - started:.0f} s)", flush=True)


def read(*words: str | Path) -> Any:
    """Run a command with `--json` and return what it printed."""
    print(f"\n$ {shlex.join(str(word) for word in words)}", flush=True)
    done = subprocess.run([str(BIN / str(words[0])), *map(str, words[1:])], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"demo: {words[0]} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def photographs(out: Path) -> None:
    """First half: real photographs to region features and a page to look at."""
    import skimage.data

    source = Path(skimage.data.__file__).parent
    folder = out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        target = folder / name
        if not target.exists():
            target.write_bytes((source / name).read_bytes())
    run("uniter-extract", folder, out / "photographs.lmdb", "--detector", "on-board")
    run("uniter-db", "info", out / "photographs.lmdb")
    run("uniter-view", out / "photographs.lmdb", "--images", folder, "--out", out / "photographs-report")
    print(f"\n{ON_BOARD}\nLook at {out / 'photographs-report' / 'index.html'}", flush=True)


def world(out: Path) -> dict[str, Any]:
    """Second half: the made-up world from pictures and captions to what a pre-trained UNITER understands of held-out pairs."""
    scenes = out / "world"
    run("uniter-scenes", scenes)
    run("uniter-train", "detector", "--model", "tiny", "--images", scenes / "images", "--annotations", scenes / "instances_train.json",
        "--val-annotations", scenes / "instances_val.json", "--out", out / "detector")  # fmt: skip
    run("uniter-extract", scenes / "images", out / "world.lmdb", "--detector", out / "detector")
    for part in ("train", "val"):
        run("uniter-build-db", scenes / f"captions_{part}.json", out / f"{part}.db", "--images", out / "world.lmdb")
    run("uniter-train", "pretrain", "--text", out / "train.db", "--images", out / "world.lmdb",
        "--model", "tiny", "--tasks", "itm,mlm,mrfr,mrc-kl", "--out", out / "run")  # fmt: skip
    run("uniter-view", out / "world.lmdb", "--images", scenes / "images", "--text", out / "val.db", "--out", out / "world-report")
    run("uniter-view", out / "run", "--out", out / "run-report")
    words = json.loads((scenes / "world.json").read_text(encoding="utf-8"))["world"]
    colours_and_shapes = ",".join([*words["colours"], *words["shapes"]])
    measured: dict[str, Any] = read(
        "uniter-train", "evaluate", "pretrain", "--from", out / "run", "--text", out / "val.db", "--images", out / "world.lmdb",
        "--words", colours_and_shapes, "--json",
    )  # fmt: skip
    return measured


def table(measured: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was measured on held-out pairs: (what, measured, what it should reach, whether it does)."""
    mlm, itm, mrc_kl, retrieval = measured["mlm"], measured["itm"], measured["mrc-kl"], measured["retrieval"]
    margin = mlm["words_accuracy"] - mlm["words_accuracy_other_picture"]
    ratio = mrc_kl["kl"] / mrc_kl["kl_of_mean"]
    candidates = retrieval["candidates"]
    chance = 1 / candidates
    worst_r1 = min(retrieval["text_r1"], retrieval["image_r1"])
    return [
        ("MLM on colour and shape words, with the picture", f"{mlm['words_accuracy']:.1%}", "", True),
        ("MLM on the same words, with another picture", f"{mlm['words_accuracy_other_picture']:.1%}", "", True),
        ("  the picture is worth", f"{100 * margin:.1f} points", "10 points or more", margin >= 0.10),
        ("ITM accuracy", f"{itm['accuracy']:.1%}", "over 70 %", itm["accuracy"] > 0.70),
        ("MRC-KL", f"{mrc_kl['kl']:.3f}", "", True),
        ("  always predicting the mean", f"{mrc_kl['kl_of_mean']:.3f}", "", True),
        ("  MRC-KL of the mean's", f"{ratio:.2f}", "under 0.80", ratio < 0.8),
        (
            f"text retrieval R@1 among {candidates}",
            f"{retrieval['text_r1']:.1%}",
            f"over {5 * chance:.0%}",
            retrieval["text_r1"] >= 5 * chance,
        ),
        (f"image retrieval R@1 among {candidates}", f"{retrieval['image_r1']:.1%}", f"over {5 * chance:.0%}", worst_r1 >= 5 * chance),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where everything is written (default: demo-output)")
    parser.add_argument("--half", choices=("first", "second", "both"), default="both", help="which half to run (default: both)")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.half in ("first", "both"):
        photographs(arguments.out)
    if arguments.half in ("second", "both"):
        measured = world(arguments.out)
        (arguments.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        rows = table(measured)
        print("\nWhat the pre-trained model understands of held-out pairs:")
        for what, value, wanted, reached in rows:
            print(f"  {what:<50} {value:>12}   {wanted}{'' if reached else '   NOT REACHED'}")
        if not all(reached for *_, reached in rows):
            sys.exit("demo: a figure was not reached")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Everything is in {arguments.out}/", flush=True)


if __name__ == "__main__":
    main()
