"""Detectron2 from the package index: nothing is executed, nothing hostile unpacked, what is there is left alone."""

import hashlib
import importlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract import install

# The least that `modernise` accepts as Detectron2 0.6: the files that it changes, with the texts that it changes.
PACKAGE = {path: "" for path, _, _ in install.REPLACEMENTS}
for _path, _old, _ in install.REPLACEMENTS:
    PACKAGE[_path] += f"{_old}\n"


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def source_package(folder: Path, **extra: str) -> Path:
    files = {**PACKAGE, "LICENSE": "Apache", **extra}
    name = "pb1-detectron2-0.6"
    return write_tar(folder / f"{name}.tar.gz", [(tarfile.TarInfo(f"{name}/{path}"), text.encode()) for path, text in files.items()])


def test_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    archive = source_package(tmp_path)
    install.check_hash(archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    with pytest.raises(BadInput, match=r"has sha256 [0-9a-f]{64}, expected 5d2e9e51"):
        install.check_hash(archive, install.SOURCE_SHA256)


@pytest.mark.parametrize("name", ["/etc/passwd", "top/../../escape.py", "top\\..\\escape.py", "C:/escape.py"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    archive = write_tar(tmp_path / "hostile.tar.gz", [(tarfile.TarInfo(name), b"x")])
    with pytest.raises(BadInput, match="leads out of it"):
        install.read_archive(archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("top/detectron2/link.py")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(BadInput, match="no plain file"):
        install.read_archive(write_tar(tmp_path / "hostile.tar.gz", [(member, b"")]))


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "bomb.tar.gz", [(tarfile.TarInfo("top/big"), bytes(install.LARGEST_FILE + 1))])
    with pytest.raises(BadInput, match="more than a Detectron2 can be"):
        install.read_archive(archive)


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    archive = source_package(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(BadInput, match="cut off"):
        install.read_archive(archive)


def test_another_package_of_that_name_is_refused() -> None:
    files = {path: text.encode() for path, text in PACKAGE.items()} | {"detectron2/modeling/anchor_generator.py": b"pass"}
    with pytest.raises(BadInput, match="this is not pb1-detectron2"):
        install.modernise(files)


def test_removed_names_are_replaced() -> None:
    source = "a = np.int; b = np.int64; c = x.astype(np.bool); d = np.bool_; e = Image.LINEAR; f = Image.BILINEAR; np.float(1)"
    files = {path: text.encode() for path, text in PACKAGE.items()} | {"detectron2/a.py": source.encode(), "setup.py": b"hostile"}
    package = install.modernise(files)
    assert package["detectron2/a.py"] == (
        b"a = int; b = np.int64; c = x.astype(bool); d = np.bool_; e = Image.BILINEAR; f = Image.BILINEAR; float(1)"
    )
    assert "setup.py" not in package
    assert b"pkg_resources" not in package["detectron2/model_zoo/model_zoo.py"]


def test_the_wheel_is_one_that_pip_installs(tmp_path: Path) -> None:
    zoo = "detectron2/model_zoo/configs/COCO-Detection/some.yaml"
    wheel = install.build_wheel(source_package(tmp_path, **{zoo: "MODEL: {}"}), tmp_path / "wheel")
    again = install.build_wheel(tmp_path / "pb1-detectron2-0.6.tar.gz", tmp_path / "again")
    assert wheel.name == again.name == "detectron2-0.6+uniter.1-py3-none-any.whl"
    assert wheel.read_bytes() == again.read_bytes()
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    assert (target / zoo).read_text() == "MODEL: {}"
    metadata = (target / "detectron2-0.6+uniter.1.dist-info" / "METADATA").read_text()
    assert "Requires-Dist: iopath>=0.1.7\n" in metadata
    assert "black" not in metadata
    with zipfile.ZipFile(wheel) as bundle:
        listed = bundle.read("detectron2-0.6+uniter.1.dist-info/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in listed} == set(bundle.namelist())


@pytest.mark.timeout(120)
def test_downloading_executes_nothing_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "executed"
    index = tmp_path / "index"
    index.mkdir()
    archive = source_package(index, **{"setup.py": f"open({str(marker)!r}, 'w')", "PKG-INFO": "Metadata-Version: 2.1\n"})
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UniterError, match=r"Expected sha256 5d2e9e51.*Got [0-9a-f]{64}"):
        install.download_source(tmp_path / "refused")
    monkeypatch.setattr(install, "SOURCE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    downloaded = install.download_source(tmp_path / "taken")
    assert downloaded.read_bytes() == archive.read_bytes()
    assert not marker.exists()


def test_an_importable_detectron2_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("raise RuntimeError('looking is not importing')")
    program = (
        "import sys; from uniter.extract import install\n"
        "def refuse(*arguments, **more): raise AssertionError('pip was called')\n"
        "install._pip = refuse\n"
        "code = install.main()\n"
        "install.require_detectron2()\n"
        "assert 'torch' not in sys.modules and 'detectron2' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is used as it is" in done.stderr


def test_without_detectron2_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UniterError, match=r"uniter-extract --install-detectron2"):
        install.require_detectron2()


def test_importing_detectron2_tells_the_user_nothing() -> None:
    program = "from uniter.extract.install import require_detectron2; require_detectron2(); import uniter.extract.detector.recipes"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_mere_folder_is_no_detectron2(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    program = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; from uniter.extract.install import is_importable;"
        "print(is_importable())"
    )
    root = Path(install.__file__).resolve().parents[1]
    (tmp_path / "uniter").mkdir()
    for room in ("extract", "datasets"):
        (tmp_path / "uniter" / room).mkdir()
    (tmp_path / "uniter" / "extract" / "install.py").write_text((root / "extract" / "install.py").read_text())
    (tmp_path / "uniter" / "datasets" / "errors.py").write_text((root / "datasets" / "errors.py").read_text())
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_pip_says_reaches_the_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(install, "is_importable", lambda: False)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    assert install.main() == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "No matching distribution found for pb1-detectron2==0.6" in message


def test_what_detectors_use_of_detectron2_runs_here() -> None:
    """Importing is where the removed names of NumPy and Pillow, pkg_resources and the compiled operators bite."""
    for name in ("model_zoo", "evaluation", "data.transforms", "data.build", "engine", "modeling", "checkpoint", "utils.visualizer"):
        importlib.import_module(f"detectron2.{name}")
    zoo = importlib.import_module("detectron2.model_zoo")
    assert Path(zoo.get_config_file("COCO-Detection/faster_rcnn_R_101_C4_3x.yaml")).is_file()
    build = importlib.import_module("detectron2.data.build")
    build.print_instances_class_histogram([{"annotations": [{"category_id": 0}]}], ["thing"])


def test_a_compiled_operator_is_missed_by_name() -> None:
    stand_in: dict[str, object] = {}
    exec(install.COMPILED_STAND_IN, stand_in)
    with pytest.raises(AttributeError, match=r"_C\.box_iou_rotated is a compiled operator.*use_fast_impl=False"):
        stand_in["__getattr__"]("box_iou_rotated")  # type: ignore[operator]
