"""The arrows of the house: which room may import which, and where the heavy libraries may be named."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "datasets", "model", "cli")
MAY_IMPORT = {
    "datasets": {"datasets"},
    "extract": {"extract", "datasets"},
    "model": {"model", "datasets"},
    "cli": {"cli", "extract", "datasets", "model"},
}
# library -> the paths (folders or files, from the root) inside which it may be imported
ONLY_IN = {
    "detectron2": ("extract/",),
    "ray": ("extract/cluster.py",),
    "torch.distributed": ("model/train/",),
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
