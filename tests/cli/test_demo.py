"""What the demo shows: one page that needs nothing else, pictures in a terminal, and every step of the flow."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.demo import Shown, run_demo
from mmm_export.rendering.demo import demo_page, picture_lines


def png(colour: tuple[int, int, int], size: tuple[int, int] = (96, 96)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format="PNG")
    return stream.getvalue()


def test_the_page_holds_its_pictures_and_needs_no_other_file() -> None:
    picture = png((1, 2, 3))
    page = demo_page("linear", [Shown(picture, "edge", "Which <b>?", "<7>", "8", False)])
    assert base64.b64encode(picture).decode() in page
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "Which &lt;b&gt;?" in page  # texts of a model must not become markup
    assert "&lt;7&gt;" in page
    assert "wrong, the truth is 8" in page
    assert "0 of 1" in page


def test_a_terminal_picture_has_the_colours_of_the_picture() -> None:
    lines = list(picture_lines(png((10, 200, 30))))
    assert len(lines) == 24
    assert set(lines) == {"\x1b[38;2;10;200;30m\x1b[48;2;10;200;30m\u2580" * 48 + "\x1b[0m"}


def test_a_failed_step_stops_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmm_export.errors import MmmError

    asked: list[str] = []

    def fail_at_verify(arguments: list[str]) -> int:
        asked.append(arguments[0])
        return 1 if arguments[0] == "verify" else 0

    with pytest.raises(MmmError, match="stopped at step 3 of 6"):
        run_demo(tmp_path / "demo", "linear", fail_at_verify)
    assert asked == ["inspect", "onnx", "verify"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_the_demo_runs_to_its_end_and_most_answers_are_right(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert run(cli, ["demo", "-o", str(folder), "--model", kind]) == 0
    shown = capsys.readouterr().out
    right = re.search(r"(\d+) of 18 right", shown)
    assert right is not None
    assert (
        int(right[1]) >= 15
    )  # the worst of the models is right more than 9 times in 10; 14 of 18 or fewer would be 1 in 100
    assert "verdict: PASSED" in shown
    page = (folder / "demo.html").read_text(encoding="utf-8")
    assert page.count("<li") == 18
    assert len(list((folder / "pictures").glob("*.png"))) == 18
