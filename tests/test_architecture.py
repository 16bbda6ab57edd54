"""The arrows of the house: which room may import which, and where the heavy libraries may be named."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "datasets", "model", "cli")
MAY_IMPORT = {
    "datasets": {"datasets"},
    "extract": {"extract", "datasets"},
    "model": {"model", "datasets"},
    "cli": {"cli", "extract", "datasets", "model"},
}
# Folder -> the folders it may import besides its own, of its room and of `datasets/`; every file may import those right in `datasets/`
# (errors, progress) and `datasets/vocabulary`. `cli/` may import all. Another arrow is a decision: draw it here, and say why.
_RECORDS = {"datasets/storage", "datasets/image_db"}
_TEXTS = {"datasets/storage", "datasets/text_db"}
_ON_DISK = _RECORDS | _TEXTS
_NETWORK = {"model", "model/heads", "datasets/batches"}
FOLDERS = {
    "datasets": set(),
    "datasets/vocabulary": set(),
    "datasets/storage": set(),
    "datasets/runs": {"datasets/storage"},
    "datasets/image_db": {"datasets/storage"},
    "datasets/image_db/writing": _RECORDS,
    "datasets/image_db/formats": {*_RECORDS, "datasets/image_db/formats/projects", "datasets/image_db/writing"},
    "datasets/image_db/formats/projects": {*_RECORDS, "datasets/image_db/formats"},  # families build on the files that stand there
    "datasets/text_db": {"datasets/storage", "datasets/text_db/captions"},  # exclusions know SBU's names of photographs
    "datasets/text_db/captions": {*_TEXTS, "datasets/image_db"},  # which members of a tar are images
    "datasets/text_db/annotations": {"datasets/image_db", *_TEXTS, "datasets/text_db/captions"},
    # what is built is read by the rows of captions and annotations, and matched with images by key
    "datasets/text_db/building": {*_TEXTS, "datasets/image_db", "datasets/text_db/captions", "datasets/text_db/annotations"},
    "datasets/batches": {"datasets/storage", "datasets/image_db", "datasets/text_db", "datasets/text_db/annotations"},
    "datasets/maintenance": {
        *_ON_DISK,
        "datasets/image_db/formats",
        "datasets/image_db/formats/projects",
        "datasets/image_db/writing",
        "datasets/text_db/captions",  # layouts that hold captions beside the regions
        "datasets/text_db/annotations",
        "datasets/text_db/building",
    },
    "datasets/view": {"datasets/image_db", "datasets/image_db/writing", "datasets/runs", "datasets/storage"},
    "datasets/made_up": {"datasets/storage"},
    "datasets/made_up/tasks": {"datasets/storage", "datasets/made_up"},
    "extract/images": {*_RECORDS},
    "extract/weights": {"datasets/storage"},
    "extract/detector": {"extract", "extract/weights", "datasets/storage"},  # `extract` holds install and select
    "extract/run": {*_RECORDS, "datasets/image_db/writing", "extract", "extract/detector", "extract/images"},
    "extract/training": {"datasets/image_db", "datasets/runs", "datasets/storage", "extract/detector", "extract/images", "extract/weights"},
    # `extract_regions` in a notebook shows the picture that it looked at
    "extract": {*_RECORDS, "datasets/view", "extract/detector", "extract/images", "extract/run", "extract/weights"},
    "model": {"datasets/batches", "datasets/text_db/annotations", "model/heads"},
    "model/heads": {"datasets/batches", "datasets/text_db/annotations", "model"},
    "model/tasks": {*_NETWORK, "datasets/storage", "datasets/text_db/annotations"},
    "model/settings": {"datasets/batches", "datasets/storage", "model", "model/tasks"},
    "model/checkpoints": {
        *_ON_DISK,
        "datasets/runs",
        "model",
        "model/heads",
        "model/settings",
    },  # a model knows whose regions it learnt from
    "model/train": {
        *_NETWORK,
        *_ON_DISK,
        "datasets/runs",
        "datasets/text_db/annotations",
        "model/checkpoints",
        "model/settings",
        "model/tasks",
    },
    "model/evaluation": {*_NETWORK, *_TEXTS, "model/checkpoints", "model/tasks", "model/train"},
    # the page of `uniter-app`: a click command starts it, and no other folder knows both of photographs and of models
    "cli/web": {"datasets/image_db", "datasets/view", "extract", "extract/images", "model/understanding"},
    "model/understanding": {*_NETWORK, "datasets/image_db", "datasets/text_db", "datasets/view", "model/checkpoints", "model/tasks"},
}
# library -> the paths (folders or files, from the root) inside which it may be imported
ONLY_IN = {
    "detectron2": ("extract/",),
    "ray": ("extract/run/cluster.py",),
    "torch.distributed": ("model/train/", "extract/training/"),
}


def imports(path: Path) -> Iterator[str]:
    """Every module name that the file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write uniter.… (one spelling of every name)"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """benchmarks/house.py, which counts folders, arrows and circles."""
    description = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def is_or_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_rooms_import_only_in_the_direction_of_the_arrows() -> None:
    wrong = []
    for path in sources():
        room = path.relative_to(ROOT).parts[0]
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "uniter" and len(parts) > 1 and parts[1] not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
            if parts[0] in ROOMS:
                owner = "Hugging Face's" if parts[0] == "datasets" else "nobody's"
                wrong.append(f"{path.relative_to(ROOT)} imports {module}, which is {owner}; ours is uniter.{module}")
    assert not wrong, "\n".join(wrong)


def test_folders_import_only_what_the_table_allows(house: ModuleType) -> None:
    anyone = {"datasets", "datasets/vocabulary"}
    wrong = [
        f"{folder} imports {other}"
        for folder, others in house.folder_arrows(ROOT).items()
        if folder != "cli"
        for other in sorted(others - anyone - FOLDERS.get(folder, set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_names_folders_that_exist() -> None:
    on_disk = {path.parent.relative_to(ROOT).as_posix() for path in sources()} - {"cli", "model/settings/configs"}
    assert set(FOLDERS) == on_disk
    assert {folder for others in FOLDERS.values() for folder in others} <= on_disk


def test_no_files_import_each_other_in_a_circle(house: ModuleType) -> None:
    assert house.circles(house.import_graph(ROOT)) == []
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_heavy_libraries_are_imported_only_in_their_place() -> None:
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for module in imports(path):
            for library, places in ONLY_IN.items():
                if is_or_below(module, library) and not name.startswith(places):
                    wrong.append(f"{name} imports {module}, which belongs in {' or '.join(places)}")
    assert not wrong, "\n".join(wrong)


def test_the_check_itself_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    from uniter.cli import extract\n    import ray.util\n")
    assert set(imports(file)) == {"uniter.cli", "uniter.cli.extract", "ray.util"}


def test_datasets_has_no_init() -> None:
    """A folder without one always loses to an installed package of that name (PEP 420): Hugging Face's `datasets` wins."""
    assert not (ROOT / "datasets" / "__init__.py").exists()
    for room in ("extract", "model", "cli"):
        assert (ROOT / room / "__init__.py").exists()


# The table of tasks, what reads and writes their files, and UNITER's own settings files, which name them.
MAY_NAME_TASKS = ("model/tasks/", "model/settings/published.py", "model/evaluation/pretrained.py")


def test_tasks_are_named_in_their_table_alone() -> None:
    """A new task is a new row: no code asks which task it is. (The figures of pre-training are called by its tasks' names.)"""
    from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING, SYNONYMS

    names = {*DOWNSTREAM, *PRETRAINING, *SYNONYMS}
    wrong = []
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(MAY_NAME_TASKS) or not place.startswith(("model/", "cli/train", "cli/predict")):
            continue
        wrong += [
            f"{place}:{node.lineno} names {node.value!r}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and node.value in names
        ]
    assert not wrong, "\n".join(wrong)
