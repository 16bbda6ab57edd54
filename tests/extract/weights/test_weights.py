"""Every published weight layout becomes Detectron2's, key by key; no file executes anything; what is made is kept and checked."""

import http.server
import io
import json
import pickle
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.detector.butd import caffe_anchors
from uniter.extract.weights import load as weights_module
from uniter.extract.weights import sources as sources_module
from uniter.extract.weights.caffemodel import read_caffemodel
from uniter.extract.weights.files import read_tensors, recognise
from uniter.extract.weights.layouts import ANCHORS, CAFFE_HEADS, _caffe_convolution, to_detectron2
from uniter.extract.weights.load import load_known_weights, load_weight_file, load_weights
from uniter.extract.weights.random import random_tensors

State = dict[str, NDArray[np.float32]]
P, R = "roi_heads.box_predictor.", "proposal_generator.rpn_head."


@pytest.fixture(scope="module")
def state(generator: ModuleType) -> State:
    """All 536 keys of the published checkpoint; few classes and small matrices keep it quick."""
    small: State = {}
    for name, shape in generator.key_shapes(classes=6, attrs=4):
        narrow = shape if name == ANCHORS or len(shape) == 1 else tuple(min(side, 8) if at else side for at, side in enumerate(shape))
        small[name] = np.asarray(generator.draw(name, narrow, 3), dtype=np.float32)
    return small


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def write(layout: str, path: Path, state: State, generator: ModuleType, writer: ModuleType) -> None:
    if layout.startswith("pickle"):
        content = {"model": state, "__author__": "somebody", "iteration": np.float32(3)}
        path.write_bytes(pickle.dumps(content, protocol=int(layout[-1])))
    elif layout == "safetensors":
        save_file(tensors(state), path)
    elif layout.startswith("huggingface"):
        torch.save(tensors(generator.to_hf(state)), path, _use_new_zipfile_serialization=not layout.endswith("legacy"))
    elif layout.startswith("milvlg"):
        content = {"model": tensors(generator.to_milvlg(state)), "iteration": 7, "optimizer": {"state": {}}}
        torch.save(content, path, _use_new_zipfile_serialization=not layout.endswith("legacy"))
    else:
        path.write_bytes(writer.caffemodel_of(state, old="old" in layout, double="double" in layout))


LAYOUTS = {
    "pickle2": "detectron2",
    "pickle4": "detectron2",
    "pickle5": "detectron2",
    "safetensors": "detectron2",
    "huggingface": "huggingface",
    "huggingface-legacy": "huggingface",
    "milvlg": "milvlg",
    "milvlg-legacy": "milvlg",
    "caffe": "caffe",
    "caffe-old": "caffe",
    "caffe-double": "caffe",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_keys_of_every_layout(layout: str, state: State, generator: ModuleType, writer: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "weights.of-no-known-suffix"
    write(layout, file, state, generator, writer)
    loaded = load_weight_file(file)
    assert loaded.layout == LAYOUTS[layout]
    expected = set(state) - ({ANCHORS} if layout.startswith("caffe") else set())
    assert set(loaded.tensors) == expected
    for name in sorted(expected):
        assert loaded.tensors[name].dtype == torch.float32
        np.testing.assert_allclose(loaded.tensors[name].numpy(), state[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_golden_layouts_without_arithmetic_have_one_hash(state: State, generator: ModuleType, writer: ModuleType, tmp_path: Path) -> None:
    hashes = set()
    for layout in ("pickle2", "safetensors", "huggingface"):
        write(layout, tmp_path / layout, state, generator, writer)
        loaded = load_weight_file(tmp_path / layout)
        assert loaded.source_sha256 != loaded.sha256
        hashes.add(loaded.sha256)
    assert len(hashes) == 1


def test_caffe_names_are_those_of_the_key_list(shared: Path, writer: ModuleType) -> None:
    lines = (shared / "facts" / "butd_state_dict_keys.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    assert len(rows) == 536
    for row in rows:
        name, caffe = row[0], row[2]
        if name == ANCHORS:
            continue
        layer = caffe.split("[")[0]
        if name.startswith(("backbone", "roi_heads.res5")) and ".norm." not in name:
            assert writer.caffe_convolution(name.removesuffix(".weight")) == layer
            assert _caffe_convolution(layer) == name.removesuffix(".weight")
        elif ".norm." not in name:
            assert CAFFE_HEADS[layer] == name.rpartition(".")[0]


def test_golden_anchors_are_caffes(generator: ModuleType) -> None:
    assert np.array_equal(caffe_anchors().numpy(), generator.cell_anchors())


def test_caffe_batch_norm_divisor_of_zero_means_zero_statistics(state: State, writer: ModuleType, tmp_path: Path) -> None:
    layers = writer.caffe_layers(state)
    layers["bn_conv1"][2] = np.zeros(1, dtype=np.float32)
    file = tmp_path / "zero.caffemodel"
    file.write_bytes(b"".join(writer.layer(name, arrays) for name, arrays in layers.items()))
    loaded = load_weight_file(file)
    assert not loaded.tensors["backbone.stem.conv1.norm.running_mean"].any()


# Keeping


def test_a_converted_file_is_kept_with_both_hashes_and_taken_again(
    state: State, generator: ModuleType, writer: ModuleType, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "milvlg.pth"
    write("milvlg", file, state, generator, writer)
    first = load_weight_file(file)
    (kept,) = (cache / "weights").glob("*.safetensors")
    facts = json.loads(kept.with_suffix(".json").read_text())
    assert facts["source_sha256"] == first.source_sha256 and facts["layout"] == "milvlg" and len(facts["sha256"]) == 64

    def not_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kept result is there")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "read_tensors", not_again)
        again = load_weight_file(file)
    assert again.sha256 == first.sha256 and again.layout == "milvlg"
    # A kept file that was tampered with is not taken.
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    assert load_weight_file(file).sha256 == first.sha256


def test_a_cache_that_cannot_be_written_costs_time_only(
    state: State,
    generator: ModuleType,
    writer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "weights"
    write("pickle2", file, state, generator, writer)
    (tmp_path / "in-the-way").write_text("a file where the folder would be")
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "in-the-way"))
    assert load_weight_file(file).layout == "detectron2"
    assert "not kept" in caplog.text


# Hostile and damaged files


class Opens:
    """Pickles to `open(path, "w")`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["value", "key", "beside", "torch", "torch-legacy"])
def test_nothing_in_a_weight_file_is_executed(place: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    bad = Opens(witness)
    file = tmp_path / "weights.pkl"
    good = np.zeros(2, dtype=np.float32)
    if place == "value":
        file.write_bytes(pickle.dumps({"model": {"a": good, "b": bad}}))
    elif place == "key":
        file.write_bytes(pickle.dumps([bad, {"model": {"a": good}}], protocol=2))
    elif place == "beside":
        file.write_bytes(pickle.dumps({"model": {"a": good}, "__author__": bad}))
    else:
        torch.save({"model": {"a": torch.zeros(2)}, "extra": bad}, file, _use_new_zipfile_serialization=place == "torch")
    with pytest.raises(BadInput, match="execute"):
        load_weight_file(file)
    assert not witness.exists()


def operations(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


HOSTILE_PICKLES = {
    "builtins": operations(b"c__builtin__\neval\n", b"(X\x01\x00\x00\x001tR"),
    "module attribute": operations(b"cnumpy.core.multiarray\n_reconstruct.__globals__\n"),
    "codec": operations(b"c_codecs\nencode\n", b"(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR"),
    "inst": operations(b"(S'true'\nios\nsystem\n"),
    "extension": operations(b"\x82\x01"),
    "persistent": operations(b"Pweights\n"),
    "sets attributes of a class": operations(b"cnumpy\nndarray\n", b"N}X\x01\x00\x00\x00aK\x01s\x86b"),
    "huge memo": operations(b"}r\xff\xff\xff\x7f"),
    "huge bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"abc",
    "object array": pickle.dumps({"a": np.array([None, {}], dtype=object)}, protocol=2),
    "cut off": pickle.dumps({"a": np.zeros(100, dtype=np.float32)}, protocol=2)[:-60],
    "a list": pickle.dumps([1, 2, 3], protocol=2),
    "nothing": pickle.dumps({}, protocol=2),
    "wrong length": pickle.dumps({"a": np.zeros(4, dtype=np.float32)}, protocol=2).replace(b"K\x04\x85", b"K\x05\x85"),
}


ARRAY_OF_A_NUMBER = (
    b"}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x00\x00\x00\x30\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87R"
    b"\x89J\x00\x00\x00\x30tbs"
)
TEXT = b"X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"q\x000"
# Files of a few bytes, or a few copies, that name memory by the gigabyte.
GREEDY_PICKLES = {
    "an array of a number": operations(ARRAY_OF_A_NUMBER),
    "bytes": b"\x80\x04\x8e" + (1 << 33).to_bytes(8, "little") + b"aa.",
    "bytearray": b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"aa.",
    "frame": b"\x80\x04\x95" + (1 << 33).to_bytes(8, "little") + b"aa.",
    "integer": b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"aa.",
    "copies of a text": operations(TEXT, b"](", b"c_codecs\nencode\nq\x01" + b"h\x01h\x00\x85R" * 2000, b"e"),
    "copies of a mapping": operations(
        b"}q\x00(" + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(20_000)) + b"u0](",
        b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 5000 + b"e",
    ),
}


@pytest.mark.parametrize("name", GREEDY_PICKLES)
def test_a_pickle_takes_no_more_memory_than_a_few_times_its_size(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pkl"
    file.write_bytes(GREEDY_PICKLES[name])
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=r"weights\.pkl: .*(bytes|unpacks to many times)"):
            read_tensors(file)
        assert tracemalloc.get_traced_memory()[1] < 100 * file.stat().st_size + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("call", [b"c__builtin__\nbytearray\nJ\x00\x00\x00\x30\x85R", b"cbuiltins\nbytearray\nJ\x00\x00\x00\x30\x85R"])
def test_a_pytorch_file_takes_no_memory_that_it_merely_names(call: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.bin", "w") as archive:
        archive.writestr("a/data.pkl", operations(call))
        archive.writestr("a/version", "3\n")
    with pytest.raises(BadInput, match=r"weights\.bin: .*bytearray"):
        read_tensors(tmp_path / "weights.bin")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "weights.pkl"
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    file.write_bytes(pickle.dumps({"model": {"a": rows, "b": np.asfortranarray(rows), "c": rows[0]}}, protocol=protocol))
    _, found = read_tensors(file)
    assert all(np.array_equal(found[name].numpy(), wanted) for name, wanted in (("a", rows), ("b", rows), ("c", rows[0])))


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_hostile_or_damaged_pickle_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pkl"
    file.write_bytes(HOSTILE_PICKLES[name])
    before = set(sys.modules)
    with pytest.raises(BadInput, match=r"weights\.pkl"):
        load_weight_file(file)
    assert not {module for module in set(sys.modules) - before if module in ("antigravity", "this")}


HOSTILE_TENSORS: dict[str, Any] = {
    "expanded from one value": {"a": torch.ones(1, dtype=torch.float16).expand(1 << 40)},
    "many views of the same values": dict.fromkeys((f"t{number}" for number in range(500)), torch.ones(1000)),
    "sparse": {"a": torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (1 << 20, 1 << 20), check_invariants=True)},
    "meta": {"a": torch.empty(1 << 40, device="meta")},
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_tensors_larger_than_their_file_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(HOSTILE_TENSORS[name], tmp_path / "weights.bin")
    with pytest.raises(BadInput, match=r"weights\.bin: .*(many times what the file holds|no plain tensor|refused)"):
        load_weight_file(tmp_path / "weights.bin")
    if "many" in name:
        array = np.ones(1000, dtype=np.float32)
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps({f"t{number}": array for number in range(500)}, protocol=2))
        with pytest.raises(BadInput, match=r"weights\.pkl: .*many times what the file holds"):
            load_weight_file(tmp_path / "weights.pkl")


def test_a_pytorch_file_damaged_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    memory = io.BytesIO()
    torch.save({"backbone.a": torch.arange(6.0), "backbone.b": torch.ones(2, 2)}, memory)
    whole, file = memory.getvalue(), tmp_path / "weights.bin"
    random = np.random.default_rng(1)
    for at in random.integers(0, len(whole), 150):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ int(random.integers(1, 256))]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            try:
                read_tensors(file)
            except BadInput as error:
                assert "weights.bin" in str(error)


def zipped(compression: int) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 10000)
    return memory.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"", "no weight file"),
        (b"\x00" * 100, "no weight file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "no weight file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{garbage", "safetensors"),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "Caffe"),
        (b"\n\x03net\xa2\x06\xff\x01", "Caffe"),
        (b"\n\x03net", "without any weights"),
        (zipped(zipfile.ZIP_DEFLATED), "compressed"),
        (zipped(zipfile.ZIP_STORED), "PyTorch"),
    ],
)
def test_a_file_that_is_no_weights_is_named_for_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        load_weight_file(file)


def test_a_caffemodel_cut_anywhere_is_refused_or_shorter(writer: ModuleType, tmp_path: Path) -> None:
    whole = writer.layer("conv1", [np.arange(6, dtype=np.float32)]) + writer.layer("cls_score", [np.ones((2, 2), dtype=np.float32)])
    file = tmp_path / "cut.caffemodel"
    file.write_bytes(whole)
    assert {name: [blob.shape for blob in blobs] for name, blobs in read_caffemodel(file).items()} == {
        "conv1": [(6,)],
        "cls_score": [(2, 2)],
    }
    first = len(writer.layer("conv1", [np.arange(6, dtype=np.float32)]))
    for end in range(1, len(whole)):
        file.write_bytes(whole[:end])
        if end == first:
            assert set(read_caffemodel(file)) == {"conv1"}
        else:
            with pytest.raises(BadInput):
                read_caffemodel(file)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"backbone.stem.conv1.weight": torch.tensor([float("nan")])}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"backbone\.stem\.conv1\.weight holds values that are not finite"):
        load_weight_file(tmp_path / "w.safetensors")


def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"module.backbone.a": torch.ones(2, dtype=torch.float16)}}, tmp_path / "w")
    kind, found = read_tensors(tmp_path / "w")
    assert (kind, recognise(tmp_path / "w")) == ("torch", "torch")
    converted, layout = to_detectron2(found)
    assert layout == "detectron2" and converted["backbone.a"].dtype == torch.float32


# Sources


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr("uniter.extract.weights.fetching._PLAIN_HOSTS", frozenset(["127.0.0.1"]))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", folder
        serving.shutdown()


def no_network(*_: Any, **__: Any) -> Any:
    raise AssertionError("the network was asked")


def test_a_url_is_downloaded_once(server: tuple[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = server
    save_file({"backbone.a": torch.ones(3)}, folder / "w.safetensors")
    first = load_weights(f"{address}/w.safetensors", shapes={})
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert load_weights(f"{address}/w.safetensors", shapes={}).sha256 == first.sha256
    assert load_known_weights((f"{address}/w.safetensors", "https://example.org/other.pkl"), detector="butd").sha256 == first.sha256
    assert [path.name for path in (cache / "downloads").iterdir()] and first.source.startswith("http://127.0.0.1")


def test_a_download_that_is_no_weights_is_not_kept(server: tuple[str, Path], cache: Path) -> None:
    address, folder = server
    good = io.BytesIO()
    torch.save({"backbone.a": torch.ones(3)}, good)
    for content in (b"<html>sign in</html>", good.getvalue()[:-40]):
        (folder / "w.bin").write_bytes(content)
        with pytest.raises(BadInput):
            load_weights(f"{address}/w.bin", shapes={})
        assert not list((cache / "downloads").iterdir())
    (folder / "w.bin").write_bytes(good.getvalue())
    assert set(load_weights(f"{address}/w.bin", shapes={}).tensors) == {"backbone.a"}


def test_detectron2s_own_way_of_writing_a_url(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = server
    (folder / "COCO-Detection").mkdir()
    save_file({"backbone.a": torch.ones(3)}, folder / "COCO-Detection" / "model_final.pkl")
    monkeypatch.setattr(sources_module, "DETECTRON2_URL", f"{address}/")
    loaded = load_weights("detectron2://COCO-Detection/model_final.pkl", shapes={})
    assert loaded.source == "detectron2://COCO-Detection/model_final.pkl" and set(loaded.tensors) == {"backbone.a"}


def test_a_network_that_says_nothing_costs_seconds_not_minutes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All hosts are asked at once, and nobody waits for a look-up of names that has no limit."""
    over = threading.Event()

    def says_nothing(*_: Any, **__: Any) -> Any:
        over.wait(60)
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", says_nothing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    monkeypatch.setattr(sources_module, "ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.chdir(tmp_path)
    sources = ("https://one.example/a.pkl", "https://two.example/b.pkl", "https://three.example/c.pkl", "owner/name")
    start = time.monotonic()
    with pytest.raises(UniterError) as caught:
        load_known_weights(sources, detector="butd-36")
    with pytest.raises(UniterError, match=r"owner/name: https://huggingface\.co did not answer within 0\.1 s"):
        load_weights("owner/name", shapes={})
    assert time.monotonic() - start < 50  # on a machine that others use; each host alone would take 60
    over.set()
    for source in sources:
        assert f"{source}: http" in str(caught.value)
    assert str(caught.value).count("did not answer within") == 4 and "What works now" in str(caught.value)


def test_when_no_known_source_answers_each_is_named_with_what_to_do(server: tuple[str, Path], cache: Path) -> None:
    address, folder = server
    (folder / "page.pkl").write_text("<html>moved</html>")
    sources = (f"{address}/gone.caffemodel", f"{address}/page.pkl", "http://127.0.0.1:9/refused.pkl")
    with pytest.raises(UniterError) as caught:
        load_known_weights(sources, detector="butd")
    sentence = str(caught.value)
    for words in (
        *sources,
        "404",
        "web page",
        "refused",
        "--weights FILE",
        "model-zoo detector",
        "uniter-train detector",
        "on-board",
        "not Visual Genome",
    ):
        assert words in sentence, words
    good = folder / "good.safetensors"
    save_file({"backbone.a": torch.ones(3)}, good)
    assert load_known_weights((*sources, f"{address}/good.safetensors"), detector="butd").source.endswith("good.safetensors")


@pytest.mark.parametrize("path", ["/nowhere/weights.pkl", "modèles/poids.pkl", "my--models/weights.pkl"])
def test_a_path_that_is_not_there_says_what_could_stand_there(path: str) -> None:
    with pytest.raises(UniterError, match=r"no such file; expected a weight file, a URL, a hub id"):
        load_weights(path, shapes={})


def test_a_hub_id_that_does_not_answer_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked: list[str] = []

    def answer(_: str, name: str) -> str:
        asked.append(name)
        if name == "model.safetensors":
            raise missing()
        raise LocalEntryNotFoundError("no network, and nothing kept")

    def missing() -> Exception:
        error = EntryNotFoundError.__new__(EntryNotFoundError)
        Exception.__init__(error, "no such file there")
        return error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    monkeypatch.setattr(weights_module, "silent_sources", lambda _: {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UniterError, match="hub id somebody/detector: no network"):
        load_weights("somebody/detector", shapes={})
    assert asked == ["model.safetensors", "pytorch_model.bin"]


# Random weights


def test_random_weights_depend_on_name_and_seed_only(caplog: pytest.LogCaptureFixture) -> None:
    shapes = {"backbone.stem.conv1.weight": (4, 3, 7, 7), "backbone.stem.conv1.norm.running_var": (4,), f"{R}conv.bias": (5,)}
    first, again = random_tensors(shapes, 1), random_tensors(dict(reversed(shapes.items())), 1)
    assert all(torch.equal(first[name], again[name]) for name in shapes)
    assert not torch.equal(first[f"{R}conv.bias"], random_tensors(shapes, 2)[f"{R}conv.bias"])
    assert bool((first["backbone.stem.conv1.norm.running_var"] > 0).all())
    loaded = load_weights("random:1", shapes=shapes)
    assert "RANDOM" in caplog.text and "RANDOM" in loaded.settings()["note"]
    with pytest.raises(BadInput, match="random:SEED"):
        load_weights("random:one", shapes=shapes)
