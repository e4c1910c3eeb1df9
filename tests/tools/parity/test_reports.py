"""What parity.html and the terminal say of a record."""

from __future__ import annotations

import dataclasses
import math

from sd_perf.config import Config
from sd_perf.console import TextConsole
from sd_perf.runs.parity_record import verdict
from sd_perf.tools.parity.comparison import Errors
from sd_perf.tools.parity.html_report import html_report
from sd_perf.tools.parity.terminal_report import terminal_report
from tests.tools.parity.comparisons import CURVE, GOOD, WRONG, record_of


def test_the_page_shows_curves_and_what_is_red() -> None:
    record = record_of(CURVE, WRONG)
    text = html_report(record, Config())
    assert "0.250000" in text and "WRONG" in text and verdict(record) in text
    assert list(terminal_report(record))


def test_the_terminal_names_what_is_red() -> None:
    noted = dataclasses.replace(WRONG, note="why", allowed=Errors(max=math.inf, rms=7e-7))
    console = TextConsole(width=200)
    with console.capture() as captured:
        console.print(*terminal_report(record_of(GOOD, noted)), sep="\n", highlight=False)
    text = captured.get()
    assert "block input_blocks.1.0 (ResBlock) – why, structure, float32: max 1.00e+00" in text
    assert "(allowed inf, plain torch 1.00e-07), RMS 1.00e+00 (allowed 7.00e-07" in text
    assert "Triton kernels: geglu_forward_kernel 1,200\na note\nred: 1 of 2" in text
