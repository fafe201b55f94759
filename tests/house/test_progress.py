"""Progress in a log: one line a stage, readable when stages nest or fail."""

from __future__ import annotations

import io
import re

import pytest

from mmm_export.progress import BarProgress, LogProgress, SilentProgress, console_progress


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d s", "T s", text)


def test_a_stage_is_one_line_with_quarters() -> None:
    stream = io.StringIO()
    with LogProgress(stream).stage("write weights", 100 << 20) as advance:
        for _ in range(10):
            advance(10 << 20)
    assert without_times(stream.getvalue()) == "write weights (100.0 MiB) ... 25 % 50 % 75 % T s\n"


def test_nested_stages_stay_readable() -> None:
    stream = io.StringIO()
    progress = LogProgress(stream)
    with progress.stage("export"):
        with progress.stage("trace"):
            pass
        with progress.stage("write"):
            pass
    assert without_times(stream.getvalue()) == "export ...\ntrace ... T s\nwrite ... T s\nexport: T s\n"


def test_a_failed_stage_ends_its_line() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), LogProgress(stream).stage("trace"):
        raise ValueError("no")
    assert stream.getvalue() == "trace ... stopped\n"


def test_bars_nest_and_end_at_full_length(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BarProgress()
    with progress.stage("export"), progress.stage("write", 100) as advance:
        advance(40)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("100 %") == 2


def test_a_pipe_gets_lines_and_a_library_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(console_progress(), LogProgress)  # pytest's stderr is no terminal
    with SilentProgress().stage("trace", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
