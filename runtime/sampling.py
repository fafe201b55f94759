"""Which token follows: float32 logits in, one id out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmm_export.errors import MmmError
from mmm_export.runtime.generation_options import GenerationOptions

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Sampler:
    """Draws tokens by the options; the same seed and the same logits give the same tokens.

    Args:
        options: see `GenerationOptions` for the order of the filters.
        banned: ids that are never drawn.

    """

    def __init__(self, options: GenerationOptions, banned: tuple[int, ...] = ()) -> None:
        self.options = options
        self._banned = list(banned)
        self._random = np.random.default_rng(options.seed)
        self._all_ids = np.arange(0)

    def choose(self, logits: NDArray[np.float32], seen: Mask) -> int:
        """Draw one token.

        Args:
            logits: (vocab,), not modified; -inf excludes a token.
            seen: (at least vocab,), ids that are already in the context.

        Raises:
            MmmError: the logits hold NaN or +inf, or exclude every token.

        """
        if self.options.is_greedy:
            best = int(np.argmax(logits)) if self.options.repetition_penalty == 1 else -1
            # Without a copy of all logits, which would cost a good part of a decode step for each row of a batch.
            if best >= 0 and best not in self._banned and np.isfinite(logits[best]):  # a NaN is a maximum too
                return best
            return int(np.argmax(self._scores(logits, seen)))
        ids, likely = self._candidates(logits, seen)
        cumulative = np.cumsum(likely)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        if (
            drawn == likely.size
        ):  # the product was rounded up to the whole sum, behind the last token that has a probability
            drawn = np.flatnonzero(likely)[-1]
        return int(ids[drawn])

    def probabilities(self, logits: NDArray[np.float32], seen: Mask) -> Floats:
        """Return the distribution that `choose` draws from, (vocab,): it sums to 1, and is 1 at one id when greedy."""
        whole = np.zeros(logits.shape)
        if self.options.is_greedy:
            whole[np.argmax(self._scores(logits, seen))] = 1.0
            return whole
        ids, likely = self._candidates(logits, seen)
        whole[ids] = likely
        return whole

    def _candidates(self, logits: NDArray[np.float32], seen: Mask) -> tuple[NDArray[np.intp], Floats]:
        """Return the ids that may be drawn, ascending, and their probabilities, (n,) each.

        Every filter leaves the next one fewer tokens: most vocabularies are large, and few of their tokens are ever likely.
        """
        scores = self._scores(logits, seen)
        # Temperature keeps the order, so the k largest can be taken before it, where no two have been rounded to one.
        if 0 < self.options.top_k < scores.size:
            ids = np.flatnonzero(top_k_mask(scores, self.options.top_k))
            scores = scores[ids]
        else:
            ids = self._all_ids = self._all_ids if self._all_ids.size == scores.size else np.arange(scores.size)
        # Differences first: a tiny temperature then sends them to 0 and -inf, never to NaN.
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / self.options.temperature
        likely = _normalised(np.exp(scores))
        if self.options.top_p < 1:
            ids, likely = _filtered(top_p_mask(likely, self.options.top_p), ids, likely)
            likely = _normalised(likely)
        if self.options.min_p > 0:
            ids, likely = _filtered(likely >= self.options.min_p * likely.max(), ids, likely)
            likely = _normalised(likely)
        return ids, likely

    def _scores(self, logits: NDArray[np.float32], seen: Mask) -> Floats:
        scores: Floats = logits.astype(np.float64)
        scores[self._banned] = -np.inf
        top = scores.max()
        if not np.isfinite(top):  # NaN and +inf are maxima too; -inf is one when nothing else is left
            raise MmmError(
                "the model's logits are not usable",
                found=f"{np.count_nonzero(np.isnan(scores))} NaN, {np.count_nonzero(np.isposinf(scores))} infinite",
                wanted="finite numbers",
                hint="fp16 may have overflowed: export the checkpoint with --dtype fp32; reset the session first",
            )
        penalty = self.options.repetition_penalty
        if penalty != 1:
            scores = np.where(seen[: scores.size], penalised(scores, penalty), scores)
        return scores


def penalised(scores: Floats, penalty: float) -> Floats:
    """Make scores less likely: divide where positive, multiply where negative, as transformers and mamba_ssm do."""
    return np.where(scores > 0, scores / penalty, scores * penalty)


def top_k_mask(scores: Floats, k: int) -> Mask:
    """Mark exactly the k largest, (vocab,); the lowest ids among equals."""
    limit = np.partition(scores, scores.size - k)[scores.size - k]
    mask: Mask = scores > limit
    mask[np.flatnonzero(scores == limit)[: k - np.count_nonzero(mask)]] = True
    return mask


def top_p_mask(likely: Floats, p: float) -> Mask:
    """Mark the smallest set of likeliest tokens whose probabilities reach p, (vocab,); the lowest ids among equals."""
    # Only those are sorted that can matter: tokens below this share reach less than 1 - p together, so the others
    # reach p. Rounding may leave them just short of it when p is next to 1; then all are sorted.
    able = np.flatnonzero(likely >= (1 - p) / likely.size)
    order = able[np.argsort(-likely[able], kind="stable")]
    reached = np.searchsorted(np.cumsum(likely[order]), p)
    if reached == order.size:
        order = np.argsort(-likely, kind="stable")
        reached = np.searchsorted(np.cumsum(likely[order]), p)
    mask: Mask = np.zeros(likely.size, np.bool_)
    mask[order[: reached + 1]] = True
    return mask


def _filtered(mask: Mask, ids: NDArray[np.intp], values: Floats) -> tuple[NDArray[np.intp], Floats]:
    kept = np.flatnonzero(mask)
    return ids[kept], values[kept]


def _normalised(weights: Any) -> Floats:
    result: Floats = weights / weights.sum()
    return result
