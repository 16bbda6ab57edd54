"""What is installed is what is on the disk, and installing it takes no name away from others."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "datasets", "model", "cli")
# PyPI's name -> conda-forge's, where they differ
CONDA_NAMES = {
    "lmdb": "python-lmdb",
    "opencv-python-headless": "py-opencv",
    "torch": "pytorch",
    "msgpack": "msgpack-python",
}
CONDA_ONLY = {"python", "pip", "detectron2"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_those_on_the_disk(pyproject: dict[str, Any]) -> None:
    """A sub-package missing from the list works when editable and is missing from the wheel."""
    on_disk = {"uniter.datasets"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            on_disk.add("uniter." + ".".join(init.parent.relative_to(ROOT).parts))
    assert set(pyproject["tool"]["setuptools"]["packages"]) == on_disk


def test_folders_with_python_files_are_packages() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if path.parent != ROOT / "datasets":
                assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def split_requirement(requirement: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+?)(\[[^]]*\])?\s*((?:[><=!~].*)?)", requirement.strip())
    assert match, requirement
    return match[1].lower(), match[3]


def test_environment_yml_says_the_same_as_pyproject(pyproject: dict[str, Any]) -> None:
    wanted = {}
    for requirement in pyproject["project"]["dependencies"]:
        name, bound = split_requirement(requirement)
        wanted[CONDA_NAMES.get(name, name)] = bound
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    listed = dict(split_requirement(line) for line in environment["dependencies"])
    assert listed.pop("python") == pyproject["project"]["requires-python"]
    assert set(listed) >= CONDA_ONLY - {"python"}
    assert {name: bound for name, bound in listed.items() if name not in CONDA_ONLY} == wanted


def test_libraries_the_user_named_are_declared_and_used(pyproject: dict[str, Any]) -> None:
    declared = {split_requirement(requirement)[0] for requirement in pyproject["project"]["dependencies"]}
    sources = "\n".join(path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    modules = {"torch": "torch", "opencv-python-headless": "cv2", "h5py": "h5py", "lmdb": "lmdb", "pycocotools": "pycocotools"}
    modules |= {"transformers": "transformers", "click": "click"}
    for name, module in modules.items():
        assert name in declared, name
        assert re.search(rf"^\s*(import|from) {module}\b", sources, flags=re.MULTILINE), f"{name} is declared but nothing imports it"


def test_hugging_face_datasets_is_not_shadowed(tmp_path: Path) -> None:
    """With the repository root first on the path (as `python` and pytest put it), `import datasets` must give the installed package."""
    stand_in = tmp_path / "site" / "datasets"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("WHO = 'hugging face'\n")
    code = f"import sys; sys.path.append({str(stand_in.parent)!r}); import datasets, uniter.datasets.image_db.regions; print(datasets.WHO)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "hugging face"


def test_every_console_script_can_be_imported(pyproject: dict[str, Any]) -> None:
    for name, target in pyproject["project"]["scripts"].items():
        module, function = target.split(":")
        code = f"from {module} import {function}; assert callable({function})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.slow
def test_wheel_from_an_sdist_holds_every_module_and_data_file(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if (
                path.is_file()
                and path.suffix in {".py", ".txt", ".yaml", ".json", ".html", ".css", ".js", ".safetensors"}
                and "__pycache__" not in path.parts
            ):
                assert f"uniter/{path.relative_to(ROOT).as_posix()}" in inside
    assert not [name for name in inside if name.startswith(("datasets/", "model/", "tests/"))]
