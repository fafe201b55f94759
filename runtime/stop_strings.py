"""Cuts a stream of text before the first stop string, which may be spread over many pieces."""

from __future__ import annotations


class StopScanner:
    """Passes text on as soon as it can no longer be the beginning of a stop string.

    Args:
        stop: the strings, none empty.

    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Take a piece and return what is certain; after a stop string has come, nothing any more."""
        if self.is_stopped:
            return ""
        self._held += text
        # The one that is complete first counts, so that the cut does not depend on where the pieces end.
        found = [(self._held.find(string) + len(string), -len(string)) for string in self._stop if string in self._held]
        if found:
            self.is_stopped = True
            end, length = min(found)
            text, self._held = self._held[: end + length], ""
            return text
        certain = len(self._held) - self._open_characters()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def flush(self) -> str:
        """Return what is still held back; call it when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _open_characters(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._held)), longest, -1):
                if self._held.endswith(string[:length]):
                    longest = length
                    break
        return longest
