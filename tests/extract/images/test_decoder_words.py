"""What libjpeg writes to descriptor 2 does not stand in the progress; all else does."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from uniter.extract.images.decoder_words import counted_decoder_words
from uniter.extract.images.decoding import decode_image


def stumbling() -> bytes:
    """A JPEG of which libjpeg complains and which it decodes."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", picture)[1].tobytes()
    return data[:-2] + bytes(range(1, 60)) + data[-2:]


def test_the_decoder_does_say_something(capfd: pytest.CaptureFixture[str]) -> None:
    decode_image(stumbling())
    assert "Corrupt JPEG data" in capfd.readouterr().err


def test_its_words_are_counted_and_said_at_the_end(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with counted_decoder_words():
        os.write(2, b"before\n\r 3% of the bar")
        threads = [threading.Thread(target=decode_image, args=(stumbling(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with counted_decoder_words():  # a run within a run
            decode_image(stumbling())
        os.write(2, b"\r 4%\nafter\n")
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'a child\\n')"], check=True)
    os.write(2, b"the end\n")
    assert capfd.readouterr().err == "before\n\r 3% of the bar\r 4%\nafter\na child\nthe end\n"
    (record,) = caplog.records
    assert "Corrupt JPEG data: N extraneous bytes before marker N (5 times)" in record.getMessage()
    caplog.clear()
    with counted_decoder_words():
        pass
    assert not caplog.records


def test_a_process_that_outlives_it_can_still_write(tmp_path: Path) -> None:
    with counted_decoder_words():
        code = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\nos.write(2, b'late\\n')"
        child = subprocess.Popen([sys.executable, "-c", code])
    (tmp_path / "go").touch()
    assert child.wait(timeout=60) == 0


def test_no_stderr_and_a_crash(tmp_path: Path) -> None:
    """Without descriptor 2 all goes on; and of a crash something is still said."""
    begin = "import os, sys\nfrom uniter.extract.images.decoder_words import counted_decoder_words\n"
    code = begin + "os.close(2)\nwith counted_decoder_words(): print('done')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout == "done\n"
    crashed = subprocess.run(
        [sys.executable, "-c", begin + "with counted_decoder_words(): os.abort()"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert crashed.returncode < 0 and "Aborted" in crashed.stderr
