"""Files of other projects' layouts that are cut off, overwritten or of other contents: every image is regions or a sentence."""

import contextlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db.formats.projects.layout import Known, read_all
from uniter.datasets.image_db.formats.projects.rows import LAYOUTS
from uniter.datasets.image_db.formats.table import recognise
from uniter.datasets.image_db.regions import RegionFeatures


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=max(8, settings().max_examples // 5))
@given(data=st.data())
def test_golden_formats_damaged_are_read_or_refused(
    name: str, formats_golden: Path, fuzzing: ModuleType, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    copy = Path(shutil.copytree(formats_golden / name, root / name))
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    file.write_bytes(fuzzing.damaged(data, file.read_bytes(), near=2048))
    with contextlib.suppress(BadInput):
        recognise(copy)
    try:
        for key, regions in read_all(LAYOUTS[name], copy, Known()):
            assert isinstance(key, str)
            assert isinstance(regions, RegionFeatures | BadInput)
    except UniterError as error:
        assert 20 < len(str(error)) < 2000
    shutil.rmtree(root, ignore_errors=True)
