"""What a long run costs in memory, and that a GPU is not waited for; the values are tested in test_butd.py and test_detector.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from uniter.extract.detector.detectron import Detectron2Detector

RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_detector import build
from uniter.extract import extract_images

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

photographs, out = Path(sys.argv[2]), Path(sys.argv[3])
detector, seen = build("butd"), {}
for count in (50, 2000):
    listed = out / f"{count}.jsonl"
    listed.write_text("\\n".join(json.dumps({"image": str(photographs / f"photo{n % 20:04d}.jpg"), "key": str(n)}) for n in range(count)))
    summary = extract_images(listed, out / str(count), detector=detector, batch_size=4, max_boxes=10)
    assert summary.images == count and summary.failures == 0, summary
    seen[count] = resident()
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat_with_a_network(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    """Resident size after 50 and after 2,000 small images, batches of mixed sizes, a narrow Bottom-Up-Attention detector."""
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(make_photos(20)), str(tmp_path)]
    seen = {
        int(count): size for count, size in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout).items()
    }
    print(f"resident: {seen[50] / 1024:.0f} MiB after 50 images, {seen[2000] / 1024:.0f} MiB after 2,000")
    # What remains is the list, and the pages of 2,000 records that LMDB has mapped, kB.
    assert seen[2000] - seen[50] < 30_000, seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
def test_the_heads_do_not_wait_for_the_gpu() -> None:
    network = Detectron2Detector("butd", weights="random:1", device="cuda").network
    with network.exact():
        maps, _ = network.feature_maps([torch.randn(3, 320, 480, device="cuda")])[0]
        boxes = torch.tensor([[16.0, 16.0, 200.0, 300.0]], device="cuda").repeat(600, 1)
        network.scores(network.region_features(maps, boxes), attributes=True)  # what is done once is done
        torch.cuda.set_sync_debug_mode("error")
        try:
            network.scores(network.region_features(maps, boxes), attributes=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
