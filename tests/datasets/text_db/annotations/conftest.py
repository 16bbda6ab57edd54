"""Writing annotation files as their authors do, and building text databases of them through the command."""

import json
from collections import Counter

import pytest
from click.testing import CliRunner

from uniter.datasets.text_db.annotations.table import ANNOTATIONS


@pytest.fixture
def write(tmp_path):
    """write(name, value): a JSON file; write(name, [..], lines=True): one value a line."""

    def write_file(name, value, *, lines=False):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in value) if lines else json.dumps(value), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def read():
    """read(task, path, ...): (the examples, the counts)."""

    def read_all(task, path, *, split=None, join=()):
        counts = Counter()
        return list(ANNOTATIONS[task].read(path, split=split, join=join, counts=counts)), +counts

    return read_all


@pytest.fixture
def build():
    """build(*words): uniter-build-db with these words; its result."""
    from uniter.cli.build_db import main

    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])
