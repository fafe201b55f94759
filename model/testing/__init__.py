"""Checkpoints in the released layout at any size, with seeded random weights: for tests, demonstrations and benchmarks.

The weights are noise of sensible size, so such a model writes nonsense; all else is as released.
"""

from mmm_export.model.testing.released_config import ABSENT
from mmm_export.model.testing.specs import full_size_spec, tiny_spec
from mmm_export.model.testing.vocabulary import SPECIAL_TOKENS, vocab_size_for
from mmm_export.model.testing.writer import write_checkpoint

__all__ = ["ABSENT", "SPECIAL_TOKENS", "full_size_spec", "tiny_spec", "vocab_size_for", "write_checkpoint"]
