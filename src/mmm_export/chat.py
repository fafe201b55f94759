"""A conversation on the command line: questions and /commands in, answers on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmm_export import rendering
from mmm_export.errors import MmmError, PromptError

if TYPE_CHECKING:
    from mmm_export.runtime import GenerationOptions, Session

HELP = """\
/image PATH  add an image to the next question
/reset       forget the conversation
/save FILE   save the conversation
/load FILE   continue a saved conversation
/help        show this
/quit        leave (so does the end of the input)"""


class Conversation:
    """Questions to one session; each continues what came before."""

    def __init__(
        self,
        session: Session,
        options: GenerationOptions,
        *,
        images: Sequence[Path] = (),
        max_tiles: int | None = None,
    ) -> None:
        """Begin, or go on where the session's context ends; `images` belong to the first question."""
        self._session = session
        self._options = options
        self._max_tiles = max_tiles
        self._images = list(images)

    def ask(self, question: str) -> None:
        """Stream the answer to stdout, then tell its statistics on stderr. Ctrl-C ends the answer, not the session."""
        answer = self._session.generate(question, self._images, self._options, max_tiles=self._max_tiles)
        self._images = []  # only now: a refused question keeps them for the next try
        try:
            for piece in answer:
                click.echo(piece, nl=False)
        finally:
            click.echo()  # what follows, even an error, begins on a line of its own
        click.echo(rendering.answer_statistics(answer.statistics, answer.finish_reason), err=True)

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash. Returns False when the conversation is over."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/image", "/save", "/load") and not argument:
            raise PromptError(f"{name} needs a file name", hint="/help lists the commands")
        if name == "/image":
            if not Path(argument).is_file():
                raise PromptError(f"no file {argument}", hint="/image PATH")
            self._images.append(Path(argument))
        elif name == "/reset":
            self._images = []
            self._session.reset()
        elif name == "/save":
            self._session.save_state(Path(argument))
        elif name == "/load":
            self._session.load_state(Path(argument))
        elif name == "/help":
            click.echo(HELP, err=True)
        elif name != "/quit":
            raise PromptError(f"no command {name}", hint="/help lists the commands")
        return name != "/quit"


def converse(conversation: Conversation) -> bool:
    """Read stdin to its end, or to /quit. Returns whether everything worked; a terminal's mistakes do not count."""
    at_terminal = sys.stdin.isatty()
    worked = True
    for line in _lines(at_terminal):
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    break
            elif line:
                conversation.ask(line)
        except MmmError as error:
            click.echo(f"error: {error}", err=True)
            worked = at_terminal
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            click.echo("\n(stopped)", err=True)
    return worked


def _lines(at_terminal: bool) -> Iterator[str]:
    if at_terminal:
        import readline  # noqa: F401  line editing and history for input()

        click.echo("Ask away; /help lists the commands.", err=True)
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                return
    for line in sys.stdin:
        yield line.strip()
