"""What would help where the step waits for its loader."""

import threading
import time

import pytest

from sd_perf.config import DataConfig
from sd_perf.data.usage import Stopwatch, Usage, remedy


def config(workers: int, ahead: int, format: str = "moments") -> DataConfig:
    more = {"autoencoder": "x"} if format == "raw" else {}
    return DataConfig(format=format, path="x", workers=workers, prefetch_batches=ahead, **more)


@pytest.mark.parametrize(
    ("given", "usage", "cores", "says"),
    [
        # 10 s of steps: two threads have 20 s
        (config(2, 2), Usage(9, 8.0, 8.0), 8, r"busy 40%.*compute 100%.*raise data\.prefetch_b"),
        (
            config(4, 2),
            Usage(9, 19.0, 9.0),
            8,
            r"prefetch_batches 2 leaves data\.workers 4",
        ),
        (config(2, 4), Usage(9, 19.0, 2.0), 8, r"compute 11%.*the storage; raise data\.workers"),
        (config(2, 4), Usage(9, 19.0, 18.0), 8, r"raise data\.workers \(2\), there are 8 cores"),
        (config(2, 4, "raw"), Usage(9, 19.0, 18.0), 2, r"encode the pictures once"),
        (config(2, 4), Usage(9, 19.0, 18.0), 2, r"half the bytes are enough"),
        (config(2, 4, "encoded"), Usage(9, 19.0, 18.0), 2, "give the process more cores"),
        (config(2, 4), Usage(0, 0.0, 0.0), 2, r"busy 0%"),
    ],
)
def test_remedy(given, usage, cores, says):
    import re

    assert re.search(says, remedy(given, usage, 10.0, cores))


def test_the_stopwatch_tells_computing_from_waiting():
    stopwatch = Stopwatch()

    def make(work):
        with stopwatch.batch():
            work()

    threads = [threading.Thread(target=make, args=(lambda: time.sleep(0.05),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited = stopwatch.usage
    assert waited.batches == 3 and waited.seconds >= 0.15 and waited.cpu_seconds < 0.05
    with stopwatch.batch(), stopwatch.elsewhere():
        time.sleep(0.05)
    used = stopwatch.usage - waited
    assert used.batches == 1 and used.cpu_seconds >= 0.045
