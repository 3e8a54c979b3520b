"""The graph of stages: what it refuses, its order, and who pays for what was only read."""

import pytest

from maquette.errors import BadInput
from maquette.plan import Init, Node, charged_to, in_order, parse_init


def refused(*nodes, read=None):
    with pytest.raises(BadInput) as caught:
        in_order(nodes, read or {}, "my.yaml")
    return caught.value


def test_what_is_read_comes_before_its_reader_and_the_last_written_comes_last():
    nodes = [
        Node("student", ("warm",), {"teacher": "helper"}),
        Node("teacher"),
        Node("warm"),
        Node("result", ("student",)),
    ]
    order = in_order(nodes, {}, None)
    assert order[-1] == "result"
    assert order.index("student") > max(order.index("teacher"), order.index("warm"))


def test_a_cycle_through_a_teacher_is_named():
    error = refused(Node("a", (), {"b": "helper"}), Node("b", ("a",)), Node("c", ("b",)))
    assert "need each other" in error.what
    assert "a" in error.what
    assert "b" in error.what


def test_a_stage_that_nothing_uses_is_refused():
    error = refused(Node("idle"), Node("result"))
    assert error.key == "stages.idle"
    assert in_order([Node("idle"), Node("result")], {"idle": "evaluation"}, None)


def test_no_stage_starts_from_an_ensemble_but_one_may_read_it():
    both = Node("both", ("a", "b"), plain=False)
    members = Node("a"), Node("b")
    error = refused(*members, both, Node("on", ("both",)))
    assert error.key == "stages.on.init"
    assert "an ensemble" in error.what
    assert in_order([*members, both, Node("student", (), {"both": "helper"})], {}, None)


def test_no_stage_may_need_the_result():
    error = refused(Node("b", ("a",)), Node("a"))
    assert error.key == "stages.a"
    assert "write `b` after it" in error.mend


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (Node("b", ("teachr",)), "stages.b.init"),
        (Node("b", (), {"teachr": "helper"}), "stages.b.reads"),
    ],
)
def test_an_unknown_stage_is_refused_with_the_near_one(node, key):
    error = refused(Node("teacher"), node)
    assert error.key == key
    assert "did you mean `teacher`" in error.mend


def test_an_evaluation_that_reads_an_unknown_stage_is_refused():
    assert refused(Node("a"), read={"refrence": "evaluation"}).key == "evaluate"


def test_a_stage_made_from_one_run_under_two_names_is_refused_with_what_tells_members_apart():
    members = [Node("a", own="member"), Node("b", own="another"), Node("c", own="member")]
    error = refused(*members, Node("all", ("a", "b", "c")))
    assert error.key == "stages.all.init"
    assert "`a` and `c` are one run" in error.what
    assert "give `c` a `reseed`" in error.mend


def test_equal_stages_that_start_from_unlike_ones_are_two_runs_and_from_like_ones_are_one():
    seeds = [Node("s", own="1"), Node("t", own="2"), Node("u", own="1")]
    grown = [Node(f"from-{name}", (name,), own="more") for name in "stu"]
    order = in_order([*seeds, *grown, Node("soup", ("from-s", "from-t"))], {"from-u": "x"}, None)
    assert order[-1] == "soup"
    error = refused(*seeds, *grown, Node("soup", ("from-t", "from-s", "from-u")))
    assert "`from-s` and `from-u`" in error.what


def test_a_stage_that_is_only_read_bills_the_cause_its_reader_names_with_all_it_came_from():
    nodes = [
        Node("seed"),
        Node("teacher", ("seed",), {"judge": "scorer"}),
        Node("judge"),
        Node("warm"),
        Node("student", ("warm",), {"teacher": "helper"}),
    ]
    assert charged_to(nodes, {}) == {
        "student": None,
        "warm": None,
        "teacher": "helper",
        "seed": "helper",
        "judge": "helper",
    }


def test_a_stage_that_the_result_is_made_from_keeps_its_causes_though_it_is_read_too():
    nodes = [Node("a"), Node("b", ("a",), {"a": "helper"})]
    assert charged_to(nodes, {})["a"] is None
    assert charged_to(nodes, {"a": "probe"})["a"] is None


@pytest.mark.parametrize(
    ("value", "init"),
    [
        (None, None),
        ({"from": "a"}, Init("from", ("a",))),
        ({"soup": ["a", "b"]}, Init("soup", ("a", "b"))),
        ({"ensemble": ["a"]}, Init("ensemble", ("a",))),
    ],
)
def test_an_init_reads_back_from_its_spec(value, init):
    assert parse_init(value, None, "init") == init
    if init is not None:
        assert parse_init(init.spec(), None, "init") == init


@pytest.mark.parametrize(
    "value",
    ["a", {"from": ["a"]}, {"soup": "a"}, {"soup": []}, {"soup": [1]}, {"form": "a"},
     {"from": "a", "soup": ["b"]}, {"ensemble": ["a", "a"]}],
)  # fmt: skip
def test_an_init_that_names_no_stages_is_refused(value):
    with pytest.raises(BadInput) as caught:
        parse_init(value, "my.yaml", "stages.b.init")
    assert caught.value.key == "stages.b.init"
    assert caught.value.mend


def test_a_ladder_of_one_run_twice_is_refused_with_the_key_of_the_part():
    read = {"l1": "helper", "l2": "helper", "l3": "helper"}
    reader = Node("b", (), read, apart={"data.0.ladder": tuple(read)})
    twins = Node("l1", own="x"), Node("l2", own="y"), Node("l3", own="x")
    error = refused(*twins, reader)
    assert (error.key, error.mend) == (
        "stages.b.data.0.ladder",
        "give `l3` a `reseed` of its own",
    )
    assert "`l1` and `l3` are one run under two names" in error.what
    assert in_order([*twins, Node("b", (), read)], {}, None)
