"""Text before the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmm_export.runtime.stop_strings import StopScanner

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


def expected(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Grow the text by one character until it ends in a stop string; the longest one is cut off."""
    for end in range(1, len(text) + 1):
        hits = [len(string) for string in stop if text[:end].endswith(string)]
        if hits:
            return text[: end - max(hits)], True
    return text, False


@given(letters, stops, st.lists(st.integers(0, 12), max_size=6))
def test_text_is_cut_before_the_first_complete_stop_string_wherever_pieces_end(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    scanner = StopScanner(stop)
    ends = sorted({*(cut for cut in cuts if cut < len(text)), len(text)})
    found = "".join(scanner.push(text[begin:end]) for begin, end in zip([0, *ends], ends, strict=False))
    found += scanner.flush()
    assert (found, scanner.is_stopped) == expected(text, stop)


@given(letters, stops)
def test_nothing_is_emitted_that_a_stop_string_takes_back_and_nothing_is_held_for_no_reason(
    text: str, stop: tuple[str, ...]
) -> None:
    scanner = StopScanner(stop)
    emitted = ""
    for end in range(1, len(text) + 1):
        emitted += scanner.push(text[end - 1])
        if scanner.is_stopped:
            break
        held = text[len(emitted) : end]
        assert held == "" or any(string.startswith(held) for string in stop)


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopScanner(()).push("abc") == "abc"
