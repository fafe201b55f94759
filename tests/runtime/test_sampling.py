"""Which token follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.errors import MmmError, OptionError
from mmm_export.runtime import GenerationOptions
from mmm_export.runtime.sampling import Sampler, top_p_mask

FLOAT32_MAX = float(np.finfo(np.float32).max)

# Few distinct values, so that ties are common; -inf excludes; the largest float32 must not overflow.
values = st.sampled_from([-np.inf, -FLOAT32_MAX, -3.5, -1.0, 0.0, 1e-30, 0.5, 2.0, 2.25, 80.0, FLOAT32_MAX])
some_logits = (
    st.lists(values, min_size=1, max_size=30)
    .filter(lambda row: max(row) > -np.inf)
    .map(lambda row: np.array(row, np.float32))
)
temperatures = st.sampled_from([1e-300, 0.01, 0.7, 1.0, 5.0, 1e300])
UNSEEN = np.zeros(1000, np.bool_)


def probabilities(logits: Any, seen: Any = UNSEEN, **options: Any) -> Any:
    options = {"temperature": 1.0, **options}
    return Sampler(GenerationOptions(**options)).probabilities(np.asarray(logits, np.float32), seen)


@settings(deadline=None)
@given(
    some_logits, temperatures, st.integers(0, 40), st.floats(0.01, 1), st.floats(0, 1), st.sampled_from([0.5, 1.0, 1.3])
)
def test_probabilities_sum_to_one_whatever_the_options(
    logits: Any, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    seen = np.arange(1000) % 3 == 0
    likely = probabilities(
        logits, seen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    assert likely.sum() == pytest.approx(1, abs=1e-12)  # 30 additions in float64
    assert (likely >= 0).all()
    assert (likely[np.isneginf(logits)] == 0).all()


@settings(deadline=None)
@given(some_logits, temperatures)
def test_temperature_keeps_the_order(logits: Any, temperature: float) -> None:
    likely = probabilities(logits, temperature=temperature)
    order = np.argsort(logits, kind="stable")
    assert (np.diff(likely[order]) >= 0).all()


def test_probabilities_are_the_softmax_of_logits_over_temperature() -> None:
    logits = np.array([1.0, 2.0, 4.0])
    wanted = np.exp(logits / 2) / np.exp(logits / 2).sum()
    # Two float64 softmaxes that differ in the order of operations only.
    assert np.allclose(probabilities(logits, temperature=2.0), wanted, rtol=1e-14, atol=0)


@settings(deadline=None)
@given(some_logits, st.integers(2, 40))
def test_top_k_keeps_k_of_the_largest(logits: Any, k: int) -> None:
    # A huge temperature makes every allowed token count, so that kept ones can be told by their probability.
    likely = probabilities(logits, temperature=1e300, top_k=k)
    usable = np.count_nonzero(logits > -np.inf)
    kept = likely > 0
    assert kept.sum() == min(k, usable)
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


def test_top_k_takes_the_lowest_ids_among_equals() -> None:
    assert np.flatnonzero(probabilities([1, 2, 2, 2, 3], top_k=3)).tolist() == [1, 2, 4]


@settings(deadline=None)
@given(some_logits, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: Any, p: float) -> None:
    before, after = probabilities(logits), probabilities(logits, top_p=p)
    kept = before[after > 0]
    # Cumulative sums in another order may differ by a few float64 roundings.
    assert kept.sum() >= p - 1e-12
    assert kept.sum() - kept.min() < p + 1e-12
    if (after == 0).any():
        assert kept.min() >= before[after == 0].max()


@settings(deadline=None)
@given(some_logits, st.floats(0.001, 1))
def test_min_p_keeps_exactly_what_is_likely_enough(logits: Any, min_p: float) -> None:
    before, after = probabilities(logits), probabilities(logits, min_p=min_p)
    assert np.array_equal(after > 0, (before >= min_p * before.max()) & (before > 0))


@settings(deadline=None)
@given(some_logits)
def test_greedy_is_the_first_largest_logit(logits: Any) -> None:
    wanted = next(i for i, value in enumerate(logits) if value == max(logits))
    for options in (GenerationOptions(), GenerationOptions(temperature=0.9, top_k=1)):
        assert Sampler(options).choose(logits, UNSEEN) == wanted
        assert Sampler(options).probabilities(logits, UNSEEN)[wanted] == 1


@settings(deadline=None)
@given(some_logits, temperatures, st.integers(0, 2**40))
def test_only_tokens_with_a_probability_are_drawn_and_a_seed_repeats_them(
    logits: Any, temperature: float, seed: int
) -> None:
    options = GenerationOptions(temperature=temperature, top_p=0.9, seed=seed)
    a, b = Sampler(options), Sampler(options)
    likely = a.probabilities(logits, UNSEEN)
    drawn = [a.choose(logits, UNSEEN) for _ in range(5)]
    assert drawn == [b.choose(logits, UNSEEN) for _ in range(5)]
    assert (likely[drawn] > 0).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(GenerationOptions(temperature=1.0, seed=3))
    draws = 4000
    counts = np.bincount([sampler.choose(logits, UNSEEN) for _ in range(draws)], minlength=3) / draws
    # Five standard deviations of a binomial share; the seed is fixed, so this cannot flicker.
    assert np.allclose(counts, [0.5, 0.3, 0.2], atol=5 * np.sqrt(0.25 / draws))


def test_without_a_seed_two_samplers_differ() -> None:
    logits = np.zeros(1000, np.float32)
    options = GenerationOptions(temperature=1.0)
    a, b = ([Sampler(options).choose(logits, UNSEEN)] for _ in range(2))
    many = [(Sampler(options).choose(logits, UNSEEN)) for _ in range(5)]
    assert len({*a, *b, *many}) > 1  # all seven equal by chance: 1e-18


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    seen = np.array([True, True, False, False])
    likely = probabilities([2.0, -2.0, 2.0, -2.0], seen, repetition_penalty=2.0)
    wanted = np.exp([1.0, -4.0, 2.0, -2.0])
    assert np.allclose(likely, wanted / wanted.sum(), rtol=1e-14, atol=0)  # float64 roundings


def test_repetition_penalty_can_change_a_greedy_choice() -> None:
    seen = np.array([True, False])
    logits = np.array([2.0, 1.5], np.float32)
    assert Sampler(GenerationOptions()).choose(logits, seen) == 0
    assert Sampler(GenerationOptions(repetition_penalty=1.5)).choose(logits, seen) == 1


def test_filters_come_in_the_documented_order() -> None:
    # Top-p before top-k would keep {0, 1, 2}: 0.4 + 0.3 + 0.2 >= 0.8. After top-k 2 their shares are 4/7 and 3/7.
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert np.flatnonzero(probabilities(logits, top_k=2, top_p=0.56)).tolist() == [0]
    assert np.flatnonzero(probabilities(logits, top_p=0.56)).tolist() == [0, 1]


def test_banned_tokens_are_never_drawn() -> None:
    sampler = Sampler(GenerationOptions(), banned=(1,))
    assert sampler.choose(np.array([0.0, 9.0, 1.0], np.float32), UNSEEN) == 2


@pytest.mark.parametrize("options", [GenerationOptions(), GenerationOptions(temperature=1.0)])
@pytest.mark.parametrize("row", [[1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_unusable_logits_are_an_error_and_not_a_token(options: GenerationOptions, row: list[float]) -> None:
    with pytest.raises(MmmError, match="logits are not usable"):
        Sampler(options).choose(np.array(row, np.float32), UNSEEN)


def test_logits_are_not_modified() -> None:
    logits = np.array([1.0, 2.0], np.float32)
    Sampler(GenerationOptions(repetition_penalty=2.0), banned=(1,)).choose(logits, np.ones(2, np.bool_))
    assert logits.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": (b"x",)},
        {"stop_ids": (-1,)},
        {"stop_ids": ("a",)},
    ],
)
def test_option_out_of_range_is_named_with_its_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**wrong)
    assert next(iter(wrong)) in caught.value.what
    assert caught.value.wanted


def test_unknown_option_is_told_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        GenerationOptions.from_mapping({"temprature": 1.0})
    assert GenerationOptions.from_mapping({"top_k": 3}) == GenerationOptions(top_k=3)


def test_one_stop_string_needs_no_list() -> None:
    assert GenerationOptions(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(("draw", "wanted"), [(0.0, 1), (np.nextafter(1.0, 0.0), 2)])
def test_extreme_draws_hit_only_tokens_with_a_probability(
    draw: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed:
        def random(self) -> float:
            return draw

    sampler = Sampler(GenerationOptions(temperature=1.0))
    monkeypatch.setattr(sampler, "_random", Fixed())
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf], np.float32)
    assert sampler.choose(logits, UNSEEN) == wanted


@settings(deadline=None)
@given(
    weights=st.lists(
        st.sampled_from([0.0, 1e-300, 1e-17, 1e-9, 0.5, 1.0, 1.0, 7.0, 1e6]), min_size=1, max_size=60
    ).filter(any),
    p=st.floats(1e-12, 1, exclude_max=True) | st.just(float(np.nextafter(1, 0))),
)
def test_top_p_keeps_what_sorting_every_token_keeps(weights: list[float], p: float) -> None:
    likely = np.array(weights) / np.sum(weights)
    order = np.argsort(-likely, kind="stable")
    wanted = np.zeros(likely.size, np.bool_)
    wanted[order[: np.searchsorted(np.cumsum(likely[order]), p) + 1]] = True
    assert np.array_equal(top_p_mask(likely, p), wanted)


def test_top_p_sorts_only_tokens_that_can_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    likely = np.full(1000, 1e-9)
    likely[5] = 1 - likely.sum()
    sorted_sizes: list[int] = []
    argsort = np.argsort

    def counted(values: Any, **options: Any) -> Any:
        sorted_sizes.append(len(values))
        return argsort(values, **options)

    monkeypatch.setattr(np, "argsort", counted)
    assert np.flatnonzero(top_p_mask(likely, 0.9)).tolist() == [5]
    assert sorted_sizes == [1]
