"""Text for people: what comes from files cannot steer the terminal."""

from __future__ import annotations

from mmm_export import rendering


def test_control_characters_of_files_are_spelt_out() -> None:
    evil = "a\x1b[2J\r\nb"
    shown = rendering.inspection(
        {
            "kind": "bundle",
            "path": "x",
            "source": evil,
            "files": {evil: 1},
            "tools": {evil: evil},
            "findings": [evil],
        }
    )
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert shown.count("a\\x1b[2J\\r\\nb") == 5


def test_other_scripts_stay_as_they_are() -> None:
    assert rendering.printable("书生 é 'x' \\") == "书生 é 'x' \\"
