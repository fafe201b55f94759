"""The task as files is the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmm_export.cli import cli
from mmm_export.command_line import run
from mmm_export.distillation.digits.assets import packaged_assets
from mmm_export.distillation.digits.samples import samples
from mmm_export.evaluation.samples import digits_samples, jsonl_samples


def test_the_files_hold_what_evaluate_draws_for_itself(tmp_path: Path) -> None:
    assert run(cli, ["digits", "-o", str(tmp_path / "test"), "--split", "test", "--samples", "12"]) == 0
    read, drawn = jsonl_samples(tmp_path / "test" / "data.jsonl"), list(digits_samples(12))
    assert [(s.kind, s.answer) for s in read] == [(s.kind, s.answer) for s in drawn]
    # `<image>` and a line end are what the chat template puts in front of a question without a mark.
    assert [s.question for s in read] == [f"<image>\n{s.question}" for s in drawn]
    for one, other in zip(read, drawn, strict=True):
        with Image.open(str(one.images[0])) as stored:
            assert np.array_equal(np.asarray(stored), np.asarray(other.images[0]))


def test_a_picture_and_its_question_become_one_tile_and_the_tokens_of_the_arrays(tmp_path: Path) -> None:
    """What training reads is what the runtime makes of picture and question."""
    from mmm_export.distillation.digits.architecture import digits_spec
    from mmm_export.distillation.digits.arrays import Encoding, arrays_from_samples
    from mmm_export.distillation.digits.vocabulary import write_digits_tokenizer
    from mmm_export.images import tiles_from_image
    from mmm_export.text import Tokenizer, chat_prompt

    write_digits_tokenizer(tmp_path)
    tokenizer, spec, assets = Tokenizer.from_folder(tmp_path), digits_spec("linear"), packaged_assets()
    drawn = list(samples("train", 20))
    arrays = arrays_from_samples(drawn, assets, Encoding.from_tokenizer(tokenizer, spec.vision.tokens_per_tile))
    mean, std = np.asarray((0.485, 0.456, 0.406)), np.asarray((0.229, 0.224, 0.225))
    for row, sample in enumerate(drawn):
        tiles = tiles_from_image(Image.fromarray(sample.picture(assets)), spec.vision)
        assert len(tiles) == 1
        # float32 against float64
        assert np.allclose(tiles[0], ((arrays.pixels[row] / 255 - mean) / std).transpose(2, 0, 1), atol=1e-5)
        prompt = chat_prompt(sample.question.text, tile_counts=[1], tokens_per_tile=spec.vision.tokens_per_tile)
        whole = tokenizer.encode(prompt + sample.question.answer + "<|im_end|>")
        assert arrays.ids[row, : arrays.tokens[row]].tolist() == whole
        assert tokenizer.encode(prompt) == whole[: arrays.prompt_tokens[row]]
