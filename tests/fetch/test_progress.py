"""What is seen of a fetch, on a terminal and without."""

from __future__ import annotations

import io
import threading

from sd_perf.console import TextConsole
from sd_perf.fetch import progress
from sd_perf.fetch.progress import Watch


def console(terminal: bool) -> TextConsole:
    return TextConsole(file=io.StringIO(), force_terminal=terminal, width=120)


def test_plain_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = console(False)
    watch = Watch(out)
    watch.begin(4_000_000, 2)
    watch.update("a", 500_000, 2_000_000)  # resumed
    now[0] = 10
    watch.tick()
    now[0] = 40
    watch.update("a", 2_000_000, 2_000_000)
    watch.update("b", 500_000, 2_000_000)
    watch.tick()
    watch.tick()
    watch.verifying("a")
    watch.done("a", 2_000_000, "SHA256 as published")
    watch.close()
    assert out.file.getvalue().splitlines() == [
        "2.5 MB of 4.0 MB, 37.5 kB/s, 0:00:40 left",
        "1/2 a: 2.0 MB, SHA256 as published",
    ]


def test_bars(monkeypatch):
    """What other threads say is printed by the main thread alone."""
    monkeypatch.setattr(progress, "_REDRAW", 0)
    out = console(True)
    watch = Watch(out)
    watch.begin(0, 2)
    watch.update("a\x1b[31m", 1, None)
    watch.update("a\x1b[31m", 50_000, 100_000)
    thread = threading.Thread(target=watch.say, args=("a line",))
    thread.start()
    thread.join()
    assert "a line" not in out.file.getvalue()
    watch.tick()
    shown = out.file.getvalue()
    assert "0 of 2 files" in shown and "50.0/100.0 kB" in shown and "a line" in shown
    assert "a\\x1b[31m" in shown
    watch.verifying("a\x1b[31m")
    watch.tick()
    assert "a\\x1b[31m: comparing" in out.file.getvalue()
    watch.done("a\x1b[31m", 50_000, "MD5 as published")
    watch.tick()
    watch.close()
    assert "1 of 2 files" in out.file.getvalue()
