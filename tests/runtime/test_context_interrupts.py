"""A context whose replacement is interrupted, or that is full, is never half of one and half of another."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import toy_session

from mmm_export.errors import MmmError


@pytest.mark.parametrize("method", ["clear", "write_state"])
def test_interrupt_while_the_context_is_replaced_asks_for_a_reset(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, backend = toy_session()
    session.prefill([5, 6])
    session.save_state(tmp_path / "state")
    session.prefill([7])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.reset() if method == "clear" else session.load_state(tmp_path / "state")
    with pytest.raises(MmmError, match="lost"):
        session.step(5)
    session.load_state(tmp_path / "state")
    assert session.tokens == 2
    session.step(5)


def test_token_that_no_longer_fits_is_not_remembered_as_seen() -> None:
    session, _ = toy_session("hybrid", max_tokens=3)
    session.prefill([5, 5, 5])
    assert not session._context.add_sampled(9)
    assert not session._context.seen[9]
