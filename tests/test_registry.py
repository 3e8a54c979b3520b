"""Parts of other packages: found through entry points, recorded with a run, named when missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from maquette import parts, registry
from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.parts import find
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.study import parse_study

PLUGIN = '''
from maquette.parts import Surgery, register


@register("acme-lora-plus")
class AcmeLora(Surgery):
    """Leaves the model as it is."""

    def apply(self, model, tokenizer, state):
        return model, tokenizer
'''
METADATA = "Metadata-Version: 2.1\nName: acme-lora\nVersion: 1.2\n"


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """A distribution on the path with one part, gone afterwards."""
    site = tmp_path / "site"
    (site / "acme_lora-1.2.dist-info").mkdir(parents=True)
    (site / "acme_lora.py").write_text(PLUGIN)
    (site / "acme_lora-1.2.dist-info" / "METADATA").write_text(METADATA)
    entry = "[maquette.parts]\nlora = acme_lora\n"
    (site / "acme_lora-1.2.dist-info" / "entry_points.txt").write_text(entry)
    registry.load_all()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(registry, "_PARTS", {k: dict(v) for k, v in registry._PARTS.items()})
    monkeypatch.setattr(registry, "_PACKAGES", {})
    monkeypatch.setattr(registry, "_loaded", False)
    registry.load_all()
    yield monkeypatch
    sys.modules.pop("acme_lora", None)


def uninstall(monkeypatch):
    kept = {k: v for k, v in registry._PARTS["surgery"].items() if k != "acme-lora-plus"}
    monkeypatch.setitem(registry._PARTS, "surgery", kept)


def recipe_of(world):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "surgery": ["acme-lora-plus"],
        "budget": "2step",
        "evaluate": [],
    }


def test_a_run_records_the_package_of_a_foreign_part_beside_its_digest(acme, world):
    run = world.train(recipe_of(world))
    for folder in (run.folder, run.store.run_dir(run.digest)):
        stored = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert stored["packages"] == {"surgery acme-lora-plus": "acme-lora==1.2"}
    acme.setattr(registry, "_PACKAGES", {})
    elsewhere = world.store("unrecorded")
    assert execute(run.recipe, 0, elsewhere, OPTIONS) == run.digest
    assert "packages" not in (elsewhere.run_dir(run.digest) / "recipe.yaml").read_text()


def test_a_stored_recipe_names_the_package_that_is_not_installed(acme, world):
    run = world.train(recipe_of(world))
    file = run.store.run_dir(run.digest) / "recipe.yaml"
    stored = yaml.safe_load(file.read_text())
    uninstall(acme)
    with pytest.raises(BadInput) as caught:
        parse_recipe(stored, where=file)
    text = str(caught.value)
    assert "`acme-lora-plus` needs the package acme-lora (1.2)" in text
    assert "pip install acme-lora==1.2" in text and str(file) in text


def test_a_study_with_recorded_packages_is_read_with_and_without_them(acme, world):
    shared = {k: v for k, v in recipe_of(world).items() if k not in ("surgery", "evaluate")}
    data = {
        **shared,
        "metric": "bits-per-byte",
        "arms": {"plain": {}, "lora": {"surgery": ["acme-lora-plus"]}},
    }
    recorded = {**data, "packages": {"surgery acme-lora-plus": "acme-lora==1.2"}}
    assert parse_study(recorded, name="s").digest == parse_study(data, name="s").digest
    uninstall(acme)
    with pytest.raises(BadInput, match=r"needs the package acme-lora \(1.2\)"):
        parse_study(recorded, name="s")
    unused = {**recorded, "arms": {"plain": {}, "same": {}}}
    assert set(parse_study(unused, name="s").arms) == {"plain", "same"}


def test_parts_of_maquette_itself_have_no_package(world):
    data = recipe_of(world) | {"surgery": ["low-rank"]}
    assert registry.packages_of(parse_recipe(data).parts) == {}


def test_an_unknown_part_without_a_record_points_at_packages():
    with pytest.raises(BadInput, match="there is no surgery `acme-lora-plus`") as caught:
        find("surgery", "acme-lora-plus")
    assert "install the package that brings `acme-lora-plus`" in str(caught.value)


def test_packages_that_are_no_names_are_refused(world):
    with pytest.raises(BadInput, match="must name the package"):
        parse_recipe({**recipe_of(world), "surgery": [], "packages": ["acme-lora"]})


def test_a_recipe_of_data_parts_loads_their_files_and_no_library_of_training():
    program = """
import sys
from maquette.recipe import parse_data
filtered = {"type": "toxicity-filter", "terms": ["blast"], "threshold": 0}
parse_data([filtered, {"type": "top-k", "column": "toxicity", "best": "lowest", "take": "40%"}])
print(*sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_every_method_stands_in_a_file_of_its_name():
    for cls in parts.parts():
        if cls.__module__.startswith("maquette.methods."):
            assert cls.__module__.rpartition(".")[2] == cls.type.replace("-", "_")


def test_the_kinds_of_a_slug_are_found_whatever_was_loaded_before(acme):
    assert registry.kinds_of("top-k") == ("selector",)
    assert registry.kinds_of("salt") == ("objective",)
    assert registry.kinds_of("acme-lora-plus") == ("surgery",)
    assert registry.kinds_of("nothing-of-that-name") == ()
