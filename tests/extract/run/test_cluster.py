"""The run on a Ray cluster of two machines, one of which is lost: nothing lost, nothing twice, the bytes of one process."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from uniter.datasets.errors import UniterError
from uniter.datasets.storage.files import read_json_object
from uniter.extract.images.decoding import decode_image
from uniter.extract.images.items import read_bytes
from uniter.extract.images.listing import list_images
from uniter.extract.run.options import Options
from uniter.extract.run.photographs import photograph_as_read

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'uniter-toolkit[ray]'")

Content = Callable[[Path], dict[str, Any]]
Photos = Callable[..., Path]
SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


def patiently(start: Callable[[], Any]) -> Any:
    """Start a machine of the cluster; Ray gives it 30 seconds, which may be too few where others need the processor."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def cluster(fake: ModuleType) -> Iterator[Any]:
    """A cluster of this machine alone, one CPU; tests add others."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # Actors import the fake detector by its name.
        folders = [str(Path(str(fake.__file__)).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        nodes = patiently(lambda: Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False}))
        try:
            ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


def test_a_machine_is_lost_in_mid_run(
    cluster: Any, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from uniter.extract.run.cluster import extract_on_ray

    second = patiently(lambda: cluster.add_node(**SMALL))
    cluster.wait_for_nodes()
    photos = make_photos(60)
    (photos / "photo0017.jpg").write_text("broken")
    listed = list_images(photos, unit_images=6)
    out = tmp_path / "out"
    lost: list[int] = []

    def at_work() -> int:
        return len(list((out / "units").glob("*.partial")))

    def lose_a_machine() -> None:
        until = time.monotonic() + 600
        while time.monotonic() < until and at_work() < 2:  # each machine has a unit
            time.sleep(0.02)
        lost.append(at_work())
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose_a_machine)
    thread.start()
    build = functools.partial(fake.build_fake, seconds=0.25)
    summary = extract_on_ray(listed, out, Options(batch_size=2), build=build)
    thread.join()
    assert lost == [2], "the machine was lost before the work began"
    assert "a worker was lost" in caplog.text, "the machine had nothing to do when it was lost"
    assert (summary.complete, summary.images, summary.failures) == (True, 59, 1)
    fake.extract_images(photos, tmp_path / "one", detector=fake.FakeDetector(), batch_size=2, unit_images=6)
    assert content(out) == content(tmp_path / "one")


def test_what_an_actor_says_reaches_the_user(cluster: Any, make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    from uniter.extract.run.cluster import extract_on_ray

    listed = list_images(make_photos(6))
    with pytest.raises(UniterError, match="failed on 5 images in a row"):
        extract_on_ray(listed, tmp_path / "out", Options(batch_size=1), build=fake.build_failing)
    stop = threading.Event()
    stop.set()
    with pytest.raises(UniterError, match="stopped after 0 images"):
        extract_on_ray(listed, tmp_path / "stopped", Options(), build=fake.build_fake, stop=stop)
    summary = extract_on_ray(listed, tmp_path / "stopped", Options(), build=fake.build_fake)
    assert summary.complete and summary.images == 6


@pytest.mark.parametrize("gpus", [0, 1])
def test_half_precision_needs_gpus_in_the_cluster(
    gpus: int, make_photos: Photos, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before an actor is hired where there are none; where there are, it starts, on a GPU."""
    from uniter.extract.run import cluster

    hired: list[str] = []

    class StandIn:
        """A cluster that runs what it is told here and now."""

        cluster_resources = available_resources = staticmethod(lambda: {"CPU": 4, "GPU": gpus})
        nodes = staticmethod(lambda: [{"Alive": True}])
        get = put = staticmethod(lambda value: value)
        wait = staticmethod(lambda futures, **_: (futures[:1], futures[1:]))
        kill = staticmethod(lambda _: None)
        get_runtime_context = staticmethod(lambda: SimpleNamespace(was_current_actor_reconstructed=False))
        exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)

        @staticmethod
        def remote(**wanted: Any) -> Any:
            hired.append(next(iter(wanted)))

            class Actor:
                def __init__(self, worker: Any) -> None:
                    self.describe = SimpleNamespace(remote=worker.describe)
                    self.run = SimpleNamespace(remote=lambda *unit: Report(worker.run(*unit)))

            return lambda kind: SimpleNamespace(remote=lambda *arguments: Actor(kind(*arguments)))

    class Report:
        """A report that can be a key, as a future can."""

        def __init__(self, told: Any) -> None:
            self.finished, self.tally, self.restarted = told.finished, told.tally, told.restarted

    monkeypatch.setattr(cluster, "_connected", lambda *_: StandIn)
    monkeypatch.setattr(ray, "get_runtime_context", StandIn.get_runtime_context)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpus))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a card: at cuda")
    monkeypatch.setattr("uniter.extract.run.units.prepare_item", _on_no_real_gpu)
    listed, devices = list_images(make_photos(3)), list[str]()

    def build(device: str) -> Any:
        devices.append(device)
        return fake.FakeDetector(device=device)

    def extract() -> Any:
        return cluster.extract_on_ray(listed, tmp_path / "out", Options(batch_size=2, workers=1), build=build, needs_gpu="--precision fp16")

    if gpus:
        assert extract().complete and hired == ["num_gpus"] and set(devices) == {"cuda"}
        # Asked of the worker: the machine that hands out the work may have no card.
        assert read_json_object(tmp_path / "out" / "header.json")["device"] == "a card: at cuda"
    else:
        with pytest.raises(UniterError, match=r"--precision fp16 needs a GPU, and the Ray cluster has none"):
            extract()
        assert not hired and not (tmp_path / "out").exists()


def test_half_precision_is_refused_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from uniter.extract.run import cluster

    started: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        started.append(options)
        if "address" in options:
            raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UniterError, match=r"--precision fp16 needs a GPU, and this machine, which belongs to no Ray cluster, has none"):
        cluster.extract_on_ray([], "out", Options(), build=print, needs_gpu="--precision fp16")  # type: ignore[arg-type]
    assert len(started) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cluster._connected("auto", "--precision fp16") is ray and len(started) == 3


def _on_no_real_gpu(item: Any, *, detector: Any, work: Any, read: Any) -> Any:
    """As `prepare_item`, without pinned memory, which this machine need not have."""
    data = read_bytes(item)
    read[item.key] = photograph_as_read(item, data)
    return detector.prepare(decode_image(data))


def test_relative_paths_hold_on_the_workers(
    cluster: Any, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are started where the cluster was, not where the command is; what they lack is said in words."""
    from uniter.extract.run.cluster import extract_on_ray

    photos = make_photos(7)
    monkeypatch.chdir(tmp_path)
    Path("weights.pkl").write_text("")
    build = functools.partial(fake.build_with, weights="weights.pkl")
    assert extract_on_ray(list_images("photos"), "out", Options(batch_size=2), build=build).complete
    fake.extract_images(photos, tmp_path / "one", detector=fake.FakeDetector(), batch_size=2)
    assert content(tmp_path / "out") == content(tmp_path / "one")
    Path("weights.pkl").unlink()
    with pytest.raises(UniterError, match=r"weights\.pkl does not exist in .*test_relative_paths"):
        extract_on_ray(list_images("photos"), "again", Options(batch_size=2), build=build)
    assert not Path("again").exists()
