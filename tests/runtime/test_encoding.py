"""Questions and pictures on their way to the model, and those that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy import toy_session

from mmm_export.errors import BundleError, ImageError, OptionError, PromptError
from mmm_export.model.testing.vocabulary import write_tokenizer
from mmm_export.runtime import GenerationOptions
from mmm_export.text import Tokenizer, chat_prompt


def asked(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(chat_prompt(question))


def one_image(path: Path) -> Iterator[Any]:
    picture = Image.new("RGB", (112, 56), (200, 10, 10))
    picture.save(path)
    yield from ([path], [str(path)], [picture], [path.read_bytes()], path, str(path), picture, iter([picture]))


def test_images_come_as_files_bytes_or_pictures_alone_or_in_a_list(folder: Path, tmp_path: Path) -> None:
    session, _ = toy_session(folder=folder)
    spec = session.manifest.model
    for images in one_image(tmp_path / "image.png"):
        ids, pixels = session.encode("What?", images)
        assert pixels is not None
        assert pixels.dtype == np.float32
        assert pixels.shape == (3, 3, 56, 56)  # 2 x 1 and the thumbnail
        assert np.count_nonzero(ids == spec.image_token_id) == 3 * spec.vision.tokens_per_tile
        assert ids.dtype == np.int64


def test_max_tiles_limits_the_tiles_of_each_image(folder: Path) -> None:
    session, _ = toy_session(folder=folder)
    picture = Image.new("RGB", (560, 56))
    _, pixels = session.encode("What?", [picture, picture], max_tiles=1)
    assert pixels is not None
    assert len(pixels) == 2
    answer = session.generate("What?", [picture], max_tiles=1)
    assert answer.statistics.image_tokens == session.manifest.model.vision.tokens_per_tile


def test_encode_gives_the_first_turn_whatever_the_context_holds(folder: Path, tokenizer: Tokenizer) -> None:
    session, _ = toy_session(folder=folder)
    session.prefill([5])
    ids, pixels = session.encode("Hi")
    assert ids.tolist() == asked(tokenizer, "Hi")
    assert pixels is None


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("prompt", ["", " \n", "two <image> marks <image>", "<IMG_CONTEXT>"])
def test_unusable_prompts_are_refused_before_anything_changes(folder: Path, prompt: str, start: int) -> None:
    session, backend = toy_session(folder=folder)
    if start:
        session.prefill([5] * start)
    with pytest.raises(PromptError):
        session.generate(prompt)
    assert session.tokens == backend.tokens == start


def test_unusable_image_is_refused_before_anything_changes(folder: Path, tmp_path: Path) -> None:
    session, _ = toy_session(folder=folder)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError):
        session.generate("What?", [tmp_path / "text.png"])
    assert session.tokens == 0


def test_stop_id_outside_the_vocabulary_is_refused(folder: Path) -> None:
    session, _ = toy_session(folder=folder)
    with pytest.raises(OptionError, match="stop id"):
        session.generate("Hi", options=GenerationOptions(stop_ids=(512,)))


def test_bundle_without_tokenizer_still_takes_token_ids(tmp_path: Path) -> None:
    session, _ = toy_session(folder=tmp_path)
    session.prefill([5])
    with pytest.raises(BundleError, match="no tokenizer"):
        session.generate("Hi")


def test_unknown_template_is_refused_but_token_ids_work(folder: Path) -> None:
    session, _ = toy_session(folder=folder, template="mpt")
    session.prefill(session.tokenizer.encode("Hi"))
    with pytest.raises(BundleError, match="template"):
        session.encode("Hi")


def test_tokenizer_without_a_turn_end_still_generates(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace("<|im_end|>", "<|other|>"))
    session, _ = toy_session(folder=tmp_path, script=lambda tokens: 300)
    assert session.tokenizer.find("<|im_end|>") is None
    list(session.generate("Hi", options=GenerationOptions(max_new_tokens=2)))
    follow_up = session.generate("And?", options=GenerationOptions(max_new_tokens=2))
    list(follow_up)
    closing = session.tokenizer.encode("<|im_end|>", add_bos=False)
    assert len(closing) > 1
    assert follow_up._turn.ids[: len(closing)].tolist() == closing
