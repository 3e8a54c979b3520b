"""The baseline feed leaves the corpus as it is."""

from maquette.methods.data.as_is import AsIs
from maquette.parts import Clock, Feed
from maquette.recipe import parse_part, parse_recipe


def test_it_asks_for_no_mixture_at_any_point_of_the_budget():
    feed = AsIs()
    for fraction in (0.0, 0.5, 1.0):
        assert feed.mixture(Clock(fraction=fraction), {"a": 10, "b": 90}) is None


def test_it_is_the_feed_a_recipe_has_by_default():
    recipe = parse_recipe(
        {"workload": "text/causal", "size": "nano", "objective": "causal-lm", "budget": "1step"}
    )
    assert recipe.last.feed == parse_part(Feed, "as-is") == AsIs()
