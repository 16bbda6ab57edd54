"""Pickles of arrays and plain containers: read without executing anything, written so that every NumPy reads them."""

import contextlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.npz import map_npy, plain_npy, unpack_npz, write_npy, write_npz
from uniter.datasets.storage.plain_pickle import plain_pickle, to_plain_pickle

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4) | st.sets(st.text(), max_size=4)
    ),
    max_leaves=12,
)


@given(value=plain)
def test_plain_values_there_and_back(value: Any) -> None:
    assert plain_pickle(to_plain_pickle(value), "x") == value
    assert pickle.loads(to_plain_pickle(value)) == value
    for protocol in range(5):
        assert plain_pickle(pickle.dumps(value, protocol=protocol), "x") == value


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f2", "<i8", "|u1", "|b1"])
def test_arrays_there_and_back(kind: str) -> None:
    value = {"a": np.arange(12).astype(kind).reshape(3, 4), "b": np.int64(7), "c": [np.asfortranarray(np.eye(3))]}
    for content in (to_plain_pickle(value), *(pickle.dumps(value, protocol=protocol) for protocol in range(5))):
        for read in (lambda content: plain_pickle(content, "x"), pickle.loads):
            found = read(content)
            np.testing.assert_array_equal(found["a"], value["a"])
            assert found["b"] == 7
            np.testing.assert_array_equal(found["c"][0], np.eye(3))
    assert b"numpy._core" not in to_plain_pickle(value), "NumPy before 1.26 has no numpy._core"
    assert b"numpy.core.multiarray" in to_plain_pickle(value)


def test_texts_that_look_like_names_stay_what_they_are() -> None:
    value = {"cnumpy._core.multiarray\n_reconstruct\n": np.frombuffer(b"cnumpy._core.multiarray\nscalar\n", np.uint8), "n": np.int64(3)}
    for read in (lambda content: plain_pickle(content, "x"), pickle.loads):
        found = read(to_plain_pickle(value))
        assert found.keys() == value.keys() and found["n"] == 3
        np.testing.assert_array_equal(found["cnumpy._core.multiarray\n_reconstruct\n"], value["cnumpy._core.multiarray\n_reconstruct\n"])


def test_arrays_of_objects_are_what_they_hold() -> None:
    info = {"bbox": np.ones((2, 4), np.float32), "names": ["a", "b"]}
    for content in (pickle.dumps(np.array(info, dtype=object)), to_plain_pickle(np.array(info, dtype=object))):
        found = plain_pickle(content, "x")
        assert found["names"] == ["a", "b"]
        np.testing.assert_array_equal(found["bbox"], info["bbox"])
    row = np.empty(2, dtype=object)
    row[:] = ["a", 3]
    assert plain_pickle(pickle.dumps(row), "x") == ["a", 3]
    buffer = io.BytesIO()
    write_npy(buffer, np.array(info, dtype=object))
    assert plain_npy(buffer.getvalue(), "x")["names"] == ["a", "b"]
    buffer.seek(0)
    assert np.load(buffer, allow_pickle=True).item()["names"] == ["a", "b"]


class Bomb:
    def __init__(self, what: Any) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize("what", [(open, ("OWNED", "w")), (np.savetxt, ("OWNED", [1])), (eval, ("1",)), (np.memmap, ("OWNED",))])
def test_whatever_could_run_is_refused_inside_arrays_too(what: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (Bomb(what), {"a": Bomb(what)}, np.array({"a": Bomb(what)}, dtype=object)):
        with pytest.raises(BadInput, match="nothing in a file may run code"):
            plain_pickle(pickle.dumps(value), "x")
        buffer = io.BytesIO()
        np.savez(buffer, x=np.ones(2), info=np.array(value, dtype=object))
        with pytest.raises(BadInput, match="nothing in a file may run code"):
            unpack_npz(buffer.getvalue(), plain="info")
        with pytest.raises(BadInput, match="never Python objects"):
            unpack_npz(buffer.getvalue())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [10, 50, 60, 70, 127])
def test_heads_of_npy_that_are_no_python_are_said(place: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    write_npy(buffer, np.ones((2, 3), np.float32))
    for damage in (b"(", b"\0", b"'", b"\xff", b"{"):
        content = bytearray(buffer.getvalue())
        content[place : place + 1] = damage
        (tmp_path / "x.npy").write_bytes(content)
        with contextlib.suppress(BadInput):
            assert map_npy(tmp_path / "x.npy").shape == (2, 3)


@given(data=st.data())
def test_npz_files_are_zips_that_everybody_reads(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    kinds = data.draw(st.lists(st.sampled_from(["<f4", "<i8", "<f2", "|u1"]), min_size=4, max_size=4))
    arrays = {f"a{number}": np.ones(shape, kind) * number for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))}
    arrays = {name: np.asarray(array, kind).T for (name, array), kind in zip(arrays.items(), kinds, strict=False)}
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    write_npz(path, {**arrays, "info": np.array({"a": [1, "b"]}, dtype=object)})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path, allow_pickle=True) as stored:
        assert stored["info"].item() == {"a": [1, "b"]}
        for name, array in arrays.items():
            assert stored[name].dtype == array.dtype
            np.testing.assert_array_equal(stored[name], array)
    assert unpack_npz(path.read_bytes(), scalars=True, plain="info").keys() == {*arrays, "info"}
