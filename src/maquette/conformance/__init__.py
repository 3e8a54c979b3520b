"""What every part must do, as plain functions: each takes a part class and raises what is wrong.

The test suite runs them over every registered part; `conform` runs them over one from elsewhere.
"""

from maquette.conformance.agreement import cases, disagreements
from maquette.conformance.checks import (
    check_audit,
    check_bodies_agree,
    check_card,
    check_example,
    check_export,
    check_ledger,
    check_refuses_a_wrong_type,
    check_refuses_an_unknown_key,
    check_resume,
    check_round_trip,
    check_same_bits,
    check_trains,
    conform,
    conform_named,
)
from maquette.conformance.world import World, example_options, recipe_for, workloads_of

__all__ = [
    "World",
    "cases",
    "check_audit",
    "check_bodies_agree",
    "check_card",
    "check_example",
    "check_export",
    "check_ledger",
    "check_refuses_a_wrong_type",
    "check_refuses_an_unknown_key",
    "check_resume",
    "check_round_trip",
    "check_same_bits",
    "check_trains",
    "conform",
    "conform_named",
    "disagreements",
    "example_options",
    "recipe_for",
    "workloads_of",
]
