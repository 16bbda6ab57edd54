"""Brings Detectron2 from the package index where no Detectron2 is: `python -m uniter.extract.install`.

Detectron2 is no project of the Python package index. The source package `pb1-detectron2` 0.6 there holds the Python code of
the official v0.6 tag without its C++ sources, so its own `setup.py` cannot build it. Box detectors need only that Python, on
torchvision's operators: here it is downloaded with pip, checked against a hash, brought up to today's torch, NumPy and Pillow,
and installed as a pure-Python wheel `detectron2-0.6+uniter.1`. Nothing of the package is executed on the way.

A Detectron2 that can be imported already (conda-forge, a source build) is left alone and used.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from uniter.datasets.errors import BadInput, UniterError

SOURCE_PROJECT, SOURCE_VERSION = "pb1-detectron2", "0.6"


SOURCE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"


WHEEL_VERSION = "0.6+uniter.1"


REMEDY = "uniter-extract --install-detectron2"


LARGEST_FILE, LARGEST_TOTAL = 16 * 2**20, 128 * 2**20  # bytes; the real package holds 4 MB


# What the package's Python imports, without the pins that hold it back (black==21.4b2, iopath<0.1.10) and without what only
# its exporters and its lazy configuration's command line use (future, pydot, hydra-core, black).
REQUIREMENTS = (
    "cloudpickle",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1",
    "packaging",
    "Pillow>=7.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "torch>=1.8",
    "torchvision",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)


# Names that NumPy and Pillow have removed, with what they meant; they apply to every Python file of the package.
REMOVED_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bnp\.(int|float|bool|object|str|complex)\b", r"\1"),
    (r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    (r"\bImage\.CUBIC\b", "Image.BICUBIC"),
    (r"\bImage\.ANTIALIAS\b", "Image.LANCZOS"),
)


# (file, text as released, text that runs today). A text that is not found means that the package is not the one we know.
REPLACEMENTS: tuple[tuple[str, str, str], ...] = (
    ("detectron2/__init__.py", '__version__ = "0.6"', f'__version__ = "{WHEEL_VERSION}"'),
    ("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    (
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(\n        os.path.dirname(os.path.abspath(__file__)), "configs", config_path\n    )',
    ),
    (
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
)


# Stands in for the compiled extension: importing it works (evaluation does so unconditionally), asking it for an operator says
# what is missing. An AttributeError, so that hasattr() and `from detectron2._C import name` answer as Python expects.
COMPILED_STAND_IN = '''\
"""Stands where Detectron2's compiled operators would be: this Detectron2 is the pure-Python wheel of the UNITER toolkit."""


def get_compiler_version():
    return "none (pure Python)"


def get_cuda_version():
    return "not compiled"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this Detectron2 is pure Python; box detectors do not need it "
        "(for COCO evaluation pass use_fast_impl=False); for rotated boxes, deformable convolutions or the fast COCO evaluation "
        "install Detectron2 from conda-forge or build it from its sources"
    )
'''


# pip prepares metadata of every source package it downloads, which would run the package's setup.py. This stands in for the
# build backend while it does (first on PYTHONPATH, without build isolation), so that pip runs our four lines instead.
BACKEND_STAND_IN = f'''\
import pathlib


class _Backend:
    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{SOURCE_PROJECT.replace("-", "_")}-{SOURCE_VERSION}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {SOURCE_PROJECT}\\nVersion: {SOURCE_VERSION}\\n")
        return folder.name


__legacy__ = _Backend()
'''


def is_importable() -> bool:
    """Whether `import detectron2` would find a package (a mere folder of that name in the working directory is none)."""
    try:
        found = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None


def require_detectron2() -> None:
    """Raise a UniterError that names the remedy unless Detectron2 can be imported. Imports nothing heavy itself.

    Also silences what PyTorch says of Detectron2's own code when it is imported: a user can do nothing about it.
    """
    if not is_importable():
        raise UniterError(
            f"Detectron2 is not installed, and detectors are built on it; run `{REMEDY}` (or `python -m uniter.extract.install`), "
            "or install it from conda-forge"
        )
    warnings.filterwarnings("ignore", message=".*torch.jit.script")  # Detectron2 compiles functions so when it is imported


def installed_version() -> str:
    """The version of the importable Detectron2 as its metadata says, "of unknown version" where it has none."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def install_detectron2() -> str:
    """Install Detectron2 into the running interpreter's environment unless one can be imported.

    Returns:
        One sentence saying what was done or found.

    Raises:
        UniterError: pip failed (its last lines are in the message), or the downloaded package is not the expected one.
    """
    if is_importable():
        return f"Detectron2 {installed_version()} is installed already and is used as it is"
    with tempfile.TemporaryDirectory(prefix="uniter-detectron2-") as temporary:
        folder = Path(temporary)
        archive = download_source(folder)
        check_hash(archive, SOURCE_SHA256)
        wheel = build_wheel(archive, folder / "wheel")
        _pip("install", str(wheel))
    importlib.invalidate_caches()
    if not is_importable():
        raise UniterError("pip installed Detectron2, but it still cannot be imported; is pip's target folder on this interpreter's path?")
    return f"installed Detectron2 {WHEEL_VERSION} (pure Python, from {SOURCE_PROJECT} {SOURCE_VERSION})"


def download_source(folder: Path) -> Path:
    """Download the source package with pip into `folder`; pip's own settings (index, find-links, proxy ...) apply.

    Returns:
        The archive. pip has compared its hash before looking inside; `check_hash` does so again.
    """
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(BACKEND_STAND_IN)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SOURCE_PROJECT}=={SOURCE_VERSION} --hash=sha256:{SOURCE_SHA256}\n")
    target = folder / "download"
    _pip(
        *("download", "--no-deps", "--no-binary", SOURCE_PROJECT, "--no-build-isolation", "--use-pep517"),
        *("--require-hashes", "--dest", str(target), "--requirement", str(requirements)),
        # SETUPTOOLS_USE_DISTUTILS: an installed setuptools would otherwise look for its distutils inside the stand-in.
        environment={"PYTHONPATH": str(backend.parent), "SETUPTOOLS_USE_DISTUTILS": "stdlib"},
    )
    archives = sorted(target.glob("*.tar.gz"))
    if len(archives) != 1:
        raise UniterError(
            f"pip downloaded {[path.name for path in archives]} where one {SOURCE_PROJECT}-{SOURCE_VERSION}.tar.gz was expected"
        )
    return archives[0]


def check_hash(archive: Path, sha256: str) -> None:
    """Raise BadInput unless the file's SHA-256 is `sha256` (hexadecimal)."""
    with archive.open("rb") as file:  # not by storage's function: this file runs on the standard library alone
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise BadInput(f"{archive.name} has sha256 {found}, expected {sha256}; it was not installed: is another package index in the way?")


def read_archive(archive: Path) -> dict[str, bytes]:
    """All files of a source package's tar, by their path without its top folder. Nothing is written to disk.

    Raises:
        BadInput: the archive is damaged or too large, or holds a path that leads out of it, a link or a device.
    """
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
                    raise BadInput(f"{archive.name} holds {member.name!r}, a path that leads out of it; it was not installed")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise BadInput(f"{archive.name} holds {member.name!r}, which is no plain file; it was not installed")
                total += member.size
                if member.size > LARGEST_FILE or total > LARGEST_TOTAL:
                    raise BadInput(f"{archive.name} unpacks to more than a Detectron2 can be (at {member.name!r}); it was not installed")
                content = tar.extractfile(member)
                assert content is not None  # a plain file has content
                files["/".join(path.parts[1:])] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadInput(f"{archive.name} cannot be read as a tar archive ({error}); was it cut off? Run the command again") from error
    return files


def modernise(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The package's own files under `detectron2/`, with the changes that today's torch, NumPy and Pillow ask for."""
    package = {path: content for path, content in files.items() if path.startswith("detectron2/")}
    for path, content in package.items():
        if path.endswith(".py"):
            source = content.decode()
            for pattern, replacement in REMOVED_NAMES:
                source = re.sub(pattern, replacement, source)
            package[path] = source.encode()
    for path, old, new in REPLACEMENTS:
        source = package.get(path, b"").decode()
        if old not in source:
            raise BadInput(
                f"{path} of the downloaded package does not hold {old.strip().splitlines()[0]!r}; this is not {SOURCE_PROJECT} 0.6"
            )
        package[path] = source.replace(old, new).encode()
    package["detectron2/_C.py"] = COMPILED_STAND_IN.encode()
    return package


def build_wheel(archive: Path, folder: Path) -> Path:
    """Write the pure-Python wheel made of the source package into `folder` and return its path."""
    files = read_archive(archive)
    information = f"detectron2-{WHEEL_VERSION}.dist-info"
    metadata = [
        *("Metadata-Version: 2.1", "Name: detectron2", f"Version: {WHEEL_VERSION}", "License: Apache-2.0"),
        "Summary: Detectron2 0.6 without compiled operators, for box detectors, adapted to current torch, NumPy and Pillow",
        *("Home-page: https://github.com/facebookresearch/detectron2", "Requires-Python: >=3.8"),
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
    ]
    contents = modernise(files)
    contents[f"{information}/LICENSE"] = files.get("LICENSE", b"")
    contents[f"{information}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    contents[f"{information}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: uniter-toolkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"detectron2-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as bundle:
        for path in sorted(contents):
            bundle.writestr(zipfile.ZipInfo(path, date_time=(2021, 11, 15, 0, 0, 0)), contents[path], zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(contents[path]).digest()).rstrip(b"=").decode()
            record.write(f"{path},sha256={digest},{len(contents[path])}\n")
        record.write(f"{information}/RECORD,,\n")
        bundle.writestr(f"{information}/RECORD", record.getvalue())
    return wheel


def _pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise UniterError(f"{sys.executable} has no pip to bring Detectron2 with; run `{sys.executable} -m ensurepip` and then this again")
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    raise UniterError(f"`pip {arguments[0]}` failed while bringing Detectron2: {textwrap.shorten(' | '.join(lines[-3:]), 600)}")


def main(arguments: Sequence[str] = ()) -> int:
    """`python -m uniter.extract.install`: exit code 0 when Detectron2 is there afterwards, 1 with one line of error otherwise."""
    if arguments:
        print("usage: python -m uniter.extract.install (no arguments; pip's own settings apply)", file=sys.stderr)
        return 2
    try:
        print(install_detectron2(), file=sys.stderr)
    except UniterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
