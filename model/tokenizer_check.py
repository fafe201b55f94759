"""Whether the tokenizer of a checkpoint fits its weights."""

from __future__ import annotations

from pathlib import Path

from mmm_export import names
from mmm_export.errors import CheckpointError
from mmm_export.spec import ModelSpec


def check_tokenizer(folder: Path, spec: ModelSpec) -> list[str]:
    """Compare the tokenizer files of a checkpoint with its dimensions; returns findings.

    Raises:
        CheckpointError: the tokenizer makes ids that the model has no rows for, or has another image token.
        MmmError: a tokenizer file is damaged.
    """
    if not (folder / names.TOKENIZER_MODEL_FILE).is_file():
        return [f"no {names.TOKENIZER_MODEL_FILE}: prompts cannot be encoded, token ids still work"]
    from mmm_export.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    rows = spec.vocab_size + spec.special_tokens
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"the tokenizer of {folder} does not fit the model",
            found=f"token ids up to {tokenizer.vocab_size - 1}",
            wanted=f"0 to {rows - 1}: the model has {rows} embeddings",
            hint="the tokenizer files may be of another checkpoint",
        )
    image_token_id = tokenizer.find(names.IMAGE_TOKEN)
    if image_token_id is None:
        return [f"the tokenizer has no {names.IMAGE_TOKEN}: images cannot be put into prompts"]
    if image_token_id != spec.image_token_id:
        raise CheckpointError(
            f"the tokenizer of {folder} has another image token than the model",
            found=f"{names.IMAGE_TOKEN} is id {image_token_id}",
            wanted=f"id {spec.image_token_id}, img_context_token_id of config.json",
            hint="the tokenizer files may be of another checkpoint",
        )
    return []
