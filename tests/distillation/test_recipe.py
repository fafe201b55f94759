"""Recipes: the shipped ones hold the paper's values, every other file is a recipe or refused with a reason."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm_export.distillation.layout import PLACEMENTS, Layout
from mmm_export.distillation.recipe import Recipe, chosen_stages
from mmm_export.distillation.recipe_file import (
    RecipeError,
    read_recipe,
    recipe_from_mapping,
    recipe_path,
    shipped_recipes,
)
from mmm_export.distillation.stage import learning_rate
from mmm_export.errors import OptionError

MINIMAL = {"stages": {"stage-1": {"steps": 1, "batch_samples": 1, "learning_rate": 0.001}}}


def changed(path, value):
    data = json.loads(json.dumps(MINIMAL))
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    return data


@pytest.mark.parametrize(("name", "kept"), [("mmmamba-linear", ()), ("mmmamba-hybrid", tuple(range(0, 32, 4)))])
def test_the_shipped_recipes_hold_the_values_of_the_paper(name, kept):
    recipe = read_recipe(recipe_path(name))
    rates = [stage.learning_rate for stage in recipe.stages.values()]
    assert (list(recipe.stages), rates) == (["stage-1", "stage-2", "stage-3"], [1e-3, 5e-4, 5e-5])
    assert [stage.batch_samples for stage in recipe.stages.values()] == [128, 128, 64]
    assert {(s.steps, s.weight_decay, s.clip_norm) for s in recipe.stages.values()} == {(20000, 0.05, 5.0)}
    assert [stage.loss_scale for stage in recipe.stages.values()] == [1000, 1000, 1]
    stage = recipe.stages["stage-1"]
    assert learning_rate(stage, 1999) == learning_rate(stage, 17999) == 1e-3
    assert learning_rate(stage, 1998) < 1e-3 > learning_rate(stage, 18000)
    assert recipe.data.max_tokens == 8192
    assert recipe.layout.kept(32) == kept


def test_every_shipped_recipe_is_readable():
    assert {"mmmamba-linear", "mmmamba-hybrid", "supervised"} <= set(shipped_recipes())
    assert all(isinstance(read_recipe(recipe_path(name)), Recipe) for name in shipped_recipes())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("sedd", 1, "did you mean 'seed'"),
        ("stages/stage-1/learning_rat", 1, "did you mean 'learning_rate'"),
        ("stages/stage1", {}, "did you mean 'stage-1'"),
        ("data/max_token", 1, "did you mean 'max_tokens'"),
        ("layout/placement", "head-stackd", "did you mean head-stacked"),
        ("run/dtype", "bf-16", "did you mean bf16"),
        ("seeding/init", True, "scratch or inherit"),
        ("stages/stage-1/steps", 0, "1 or more"),
        ("stages/stage-1/steps", 1.5, "a whole number"),
        ("stages/stage-1/steps", True, "a whole number"),
        ("stages/stage-1/learning_rate", "1e-3", "a number"),
        ("stages/stage-1/learning_rate", float("nan"), "a number"),
        ("stages/stage-1/learning_rate", 10**400, "a number"),
        ("stages/stage-1/learning_rate", -1, "above 0"),
        ("stages/stage-1/warmup_share", 0.95, "at most 1"),
        ("stages/stage-1/train", ["qvk"], "cannot train 'qvk'"),
        ("stages/stage-1/train", "qkv", "a list"),
        ("stages", {}, "no stage"),
        ("stages", None, "holds no keys"),
        ("stages/supervised", MINIMAL["stages"]["stage-1"], "either supervised or a distillation"),
        ("data", 3, "holds no keys"),
        ("data/max_tokens", 1, "2 to"),
        ("run/log_steps", 0, "1 or more"),
        ("seed", -1, "0 to"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(path, value, said):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(changed(path, value), "recipe.yaml")
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: [", "no YAML"),
        ("a: 1\na: 2\n", "no YAML"),
        ("!!python/object:os.system x", "no YAML"),
        ("", "holds no keys"),
        ("- 1\n", "holds no keys"),
        ("1: 2\n", "no word"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a" * (1 << 21), "no recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=said):
        read_recipe(path)


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: {stage-1: {steps: 5, batch_samples: 2, learning_rate: 1e-3}}", encoding="utf-8")
    assert read_recipe(path).stages["stage-1"].learning_rate == 1e-3  # YAML 1.1 would read text


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean mmmamba-linear"):
        recipe_path("mmamba-linear")


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    ["stages", "stage-1", "stage-3", "steps", "learning_rate", "batch_samples", "seed", "data", "max_tokens", "train"]
)


@settings(max_examples=150, deadline=None)
@given(st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(words | st.text(max_size=5), x)))
def test_any_data_is_a_recipe_or_a_recipe_error(data):
    try:
        recipe = recipe_from_mapping(data, "x")
    except RecipeError as error:
        told = str(error)
        assert told.startswith("x")
    else:
        assert recipe.stages


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="stage-123:{}[]&*!|>\n \t\"'seed0.", max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):  # no such text names all that a stage needs
        read_recipe(path)


@given(layers=st.integers(1, 40), count=st.integers(0, 40), placement=st.sampled_from(PLACEMENTS))
def test_a_layout_keeps_as_many_layers_as_asked(layers, count, placement):
    layout = Layout(count, placement)
    if count > layers:
        with pytest.raises(OptionError):
            layout.kept(layers)
    else:
        kept = layout.kept(layers)
        assert len(set(kept)) == count
        assert all(0 <= i < layers for i in kept)


def test_the_placements_of_eight_among_thirty_two_are_those_of_the_paper():
    kept = {placement: Layout(8, placement).kept(32) for placement in PLACEMENTS}
    assert kept == {
        "head-interleaved": (0, 4, 8, 12, 16, 20, 24, 28),
        "tail-interleaved": (3, 7, 11, 15, 19, 23, 27, 31),
        "head-stacked": tuple(range(8)),
        "tail-stacked": tuple(range(24, 32)),
    }


def test_one_stage_can_be_chosen_if_the_recipe_has_it():
    recipe = recipe_from_mapping(MINIMAL, "x")
    assert chosen_stages(recipe, "1") == chosen_stages(recipe, "all") == ("stage-1",)
    with pytest.raises(OptionError, match="no stage-3"):
        chosen_stages(recipe, "3")
