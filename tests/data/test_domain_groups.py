"""Groups of domains by glob."""

import pytest

from maquette.data.domain_groups import assign_groups
from maquette.errors import BadInput


def test_the_first_group_that_matches_takes_a_domain():
    groups = {"math": ("sympy", "mp*"), "general": ("*",)}
    assert assign_groups(["sympy", "mpmath", "torch"], groups) == {
        "sympy": "math",
        "mpmath": "math",
        "torch": "general",
    }


def test_without_groups_every_domain_is_its_own():
    assert assign_groups(["b", "a"], {}) == {"a": "a", "b": "b"}


def test_an_empty_group_names_the_nearest_domain():
    with pytest.raises(BadInput, match="did you mean `sympy`"):
        assign_groups(["sympy", "torch"], {"math": ("simpy",), "rest": ("*",)})


def test_a_group_behind_a_wider_one_is_explained():
    with pytest.raises(BadInput, match="put the wider glob last"):
        assign_groups(["sympy"], {"all": ("*",), "math": ("sympy",)})


def test_a_domain_outside_every_group_is_refused_unless_left_out():
    with pytest.raises(BadInput, match="no group holds the domains torch"):
        assign_groups(["sympy", "torch"], {"math": ("sympy",)})
    assert assign_groups(["sympy", "torch"], {"math": ("sympy",)}, leave_out=True) == {
        "sympy": "math"
    }
