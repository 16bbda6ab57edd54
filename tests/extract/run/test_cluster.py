"""The run on a Ray cluster of two machines, one of which is lost: nothing lost, nothing twice, the bytes of one process."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uniter.datasets.errors import UniterError
from uniter.extract.images.listing import list_images
from uniter.extract.run.options import Options

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
    locks = out / "units" / ".locks"
    lost: list[int] = []

    def lose_a_machine() -> None:
        until = time.monotonic() + 600
        # Both are at work once two units are begun and one is done.
        while time.monotonic() < until and not (locks.is_dir() and len(list(locks.iterdir())) >= 4):
            time.sleep(0.02)
        lost.append(len(list(locks.iterdir())))
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose_a_machine)
    thread.start()
    build = functools.partial(fake.build_fake, seconds=0.05)
    summary = extract_on_ray(listed, out, Options(batch_size=2), build=build)
    thread.join()
    assert lost and lost[0] >= 4, "the machine was lost before the work began"
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
