"""What databases must have in common to be put together."""

from pathlib import Path

import pytest

from uniter.datasets.errors import SettingsDiffer
from uniter.datasets.maintenance.copying import shared_header

HEADER = {"detector": "butd", "weights_sha256": "ab", "box_kind": "proposal", "selection": {"rule": "caffe"}, "images": 3}


def test_neither_device_nor_version_nor_batch_size_keep_databases_apart() -> None:
    paths = [Path("one"), Path("two")]
    ours = [{**HEADER, "device": "cpu", "software": "1", "batch_size": 2}, {**HEADER, "device": "a card", "software": "2", "images": 5}]
    assert "device" not in shared_header(ours, paths)
    with pytest.raises(SettingsDiffer, match=r'two was made otherwise than one .*weights_sha256 was "ab", now "cd"'):
        shared_header([ours[0], {**ours[1], "weights_sha256": "cd"}], paths)
