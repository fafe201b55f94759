"""The task as files: PNG pictures and one line a conversation, in the form that InternVL and `mmm-export distill` read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from mmm_export.distillation.digits.assets import Assets
from mmm_export.distillation.digits.samples import Sample

DATA_FILE = "data.jsonl"
PICTURES = "pictures"


def write_samples(
    folder: Path, samples: Iterable[Sample], assets: Assets, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Write data.jsonl and pictures/ into an existing folder; `advance` is told 1 after each sample."""
    from PIL import Image

    (folder / PICTURES).mkdir()
    with (folder / DATA_FILE).open("w", encoding="utf-8") as stream:
        for sample in samples:
            picture = Image.fromarray(sample.picture(assets))
            name = f"{PICTURES}/{sample.number:06}.png"
            picture.save(folder / name)
            line = {
                "id": sample.number,
                "image": name,
                "width": picture.width,
                "height": picture.height,
                "kind": sample.question.kind,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{sample.question.text}"},
                    {"from": "gpt", "value": sample.question.answer},
                ],
            }
            stream.write(json.dumps(line) + "\n")
            advance(1)
