"""Every registered part and workload, by existing, keeps the promises of its kind."""

import pytest

from maquette import conformance, parts
from maquette.conformance import recipe_for, workloads_of
from maquette.conformance.checks import TRAINED_WITH

ALL = list(parts.parts())


def name(cls):
    return f"{cls.kind}/{cls.type}"


def trained():
    """(part, index of its options, workload); what does not depend on the model is tried on one.

    `make test` leaves further options and further workloads to `make test-all`.
    """
    cases = []
    for cls in ALL:
        if cls.kind in TRAINED_WITH:
            slugs = workloads_of(cls)
            slugs = slugs[:1] if cls.kind in ("feed", "data_op", "selector") else slugs
            variants = range(len(cls.examples))
            cases += [
                pytest.param(
                    cls,
                    i,
                    slug,
                    id=f"{name(cls)}-{i}-{slug.removeprefix('text/')}",
                    marks=pytest.mark.exhaustive if i > 0 or slug != slugs[0] else (),
                )
                for i in variants
                for slug in slugs
            ]
    return cases


def audited():
    return [
        pytest.param(cls, slug, id=f"{name(cls)}-{slug.removeprefix('text/')}")
        for cls in ALL
        if cls.kind == "audit"
        for slug in workloads_of(cls)
    ]


every_part = pytest.mark.parametrize("cls", ALL, ids=name)


@every_part
def test_the_card_is_complete(cls):
    conformance.check_card(cls)


@every_part
def test_the_example_of_the_card_runs(cls):
    conformance.check_example(cls)


@every_part
def test_it_is_read_back_from_its_spec(cls, world):
    for options in conformance.example_options(cls, world):
        conformance.check_round_trip(cls, options)


@every_part
def test_bad_values_are_refused_by_name(cls, world):
    options = conformance.example_options(cls, world)[0]
    conformance.check_refuses_an_unknown_key(cls, options)
    conformance.check_refuses_a_wrong_type(cls, options)


@pytest.mark.parametrize(("cls", "variant", "workload"), trained())
def test_it_trains_resumes_to_the_same_bits_bills_and_exports(cls, variant, workload, world):
    options = conformance.example_options(cls, world)[variant]
    data = recipe_for(cls, options, world, workload)
    run = world.train(data)
    conformance.check_trains(run, cls)
    conformance.check_ledger(run, cls)
    conformance.check_export(run, cls)
    conformance.check_resume(world, cls, data, run)


@pytest.mark.parametrize(("cls", "workload"), audited())
def test_an_audit_gives_finite_unique_items_and_repeats_itself(cls, workload, world):
    options = conformance.example_options(cls, world)[0]
    run = world.train(recipe_for(cls, options, world, workload))
    conformance.check_audit(cls, options, run)


@pytest.mark.parametrize("cls", [c for c in ALL if c.kind == "workload"], ids=name)
def test_a_body_does_not_depend_on_the_head(cls, world):
    conformance.check_bodies_agree(cls, world)
