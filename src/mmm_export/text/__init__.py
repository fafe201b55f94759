"""Text on its way into and out of the model: tokenizer, chat prompt, stream of tokens to text."""

from mmm_export.errors import TokenizerError
from mmm_export.text.prompt import DEFAULT_SYSTEM, IMAGE_MARK, chat_prompt, turn_prompt
from mmm_export.text.stream import TextStream
from mmm_export.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_SYSTEM",
    "IMAGE_MARK",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "chat_prompt",
    "turn_prompt",
]
