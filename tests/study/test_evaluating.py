"""What the digest of an evaluated run follows."""

from maquette.conformance.world import OPTIONS
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store


def test_a_file_of_terms_that_has_changed_is_measured_with_again(world, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("def\n")
    audit = {"type": "toxic-generation", "words_file": str(words)}
    sampling = {"n_prompts": 2, "n_samples": 1, "n_tokens": 2, "prompt_tokens": 4}
    recipe = parse_recipe(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "1step",
            "evaluate": [audit | sampling],
        }
    )
    store = Store(tmp_path / "home")
    first = execute(recipe, 0, store, OPTIONS)
    assert execute(recipe, 0, store, OPTIONS) == first
    words.write_text("def\nclass\n")
    second = execute(recipe, 0, store, OPTIONS)
    assert second != first
    stages = [store.run(digest).metrics["stages"] for digest in (first, second)]
    assert stages[0] == stages[1]
