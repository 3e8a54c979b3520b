"""Monitors: idle or not, by the text alone."""

from __future__ import annotations

import pytest

from maquette.decoding.monitor import DereferenceMonitor, JointMonitor, TableAnalyser

ANALYSER = TableAnalyser(
    {"foo.": frozenset({"abc", "ab", "_p", "__d__"}), "x = foo.ab.": frozenset({"y"})}
)


def test_monitor_wakes_at_a_dot_and_sleeps_after_a_break_character() -> None:
    monitor = DereferenceMonitor(ANALYSER, members="public")
    assert monitor.allowed(b"foo") is None
    assert monitor.allowed(b"foo.") == {b"abc", b"ab"}
    assert monitor.allowed(b"foo.ab") == {b"c", b""}
    assert monitor.allowed(b"foo.ab(") is None
    assert monitor.allowed(b"x = foo.ab.") == {b"y"}


def test_empty_answer_and_foreign_start_leave_the_monitor_idle() -> None:
    monitor = DereferenceMonitor(ANALYSER)
    assert monitor.allowed(b"bar.") is None
    assert monitor.allowed(b"foo.zzz") is None
    assert monitor.allowed(b"") is None


def test_private_members_are_left_out_on_request() -> None:
    def allowed(members: str) -> object:
        return DereferenceMonitor(ANALYSER, members=members).allowed(b"foo.")

    assert allowed("all") == {b"abc", b"ab", b"_p", b"__d__"}
    assert allowed("no-dunder") == {b"abc", b"ab", b"_p"}
    with pytest.raises(ValueError, match="members must be"):
        DereferenceMonitor(ANALYSER, members="none")


@pytest.mark.parametrize(
    "gap", [b" ", b"\t", b"  ", b"\n", b"\n    ", b"\r\n ", b"\\\n  ", b" \\\r\n\\\n", b" \x0c"]
)
def test_white_space_behind_the_dot_keeps_the_constraint(gap: bytes) -> None:
    monitor = DereferenceMonitor(ANALYSER, members="public")
    assert monitor.allowed(b"foo." + gap) == {b"abc", b"ab"}
    assert monitor.allowed(b"foo." + gap + b"ab") == {b"c", b""}
    assert monitor.allowed(b"foo." + gap + b"ab ") is None
    assert monitor.allowed(b"bar." + gap) is None and monitor.allowed(b"foo" + gap) is None


def test_one_question_serves_all_tokens_of_an_identifier() -> None:
    asked = []

    class Asked:
        def complete(self, text: str, path: str | None = None) -> frozenset[str]:
            asked.append(text)
            return frozenset({"abc"})

    monitor = DereferenceMonitor(Asked())
    for text in (b"foo.", b"foo. ", b"foo.a", b"foo.ab"):
        assert monitor.constraints(text)
    assert not monitor.fits(b"foo", b".zz") and monitor.fits(b"foo", b".abc(")
    assert asked == ["foo."]


def test_started_identifiers_can_be_left_free() -> None:
    monitor = DereferenceMonitor(ANALYSER, finish_typed=False)
    assert monitor.allowed(b"foo.a") is None and monitor.allowed(b"foo.") is not None


def test_text_that_ends_within_a_character_keeps_its_constraint() -> None:
    monitor = DereferenceMonitor(TableAnalyser({"é.": frozenset({"größe", "grau"})}))
    cut = "é.grö".encode()[:-1]
    assert monitor.allowed(cut) == {"größe".encode()[3:]}


@pytest.mark.parametrize(
    ("text", "piece", "fits"),
    [
        (b"foo", b".abc(", True),
        (b"foo", b".zz(", False),
        (b"foo", b".a", True),
        (b"foo", b".a(", False),
        (b"foo", b".zz", False),
        (b"bar", b".zz(", True),
        (b"x = ", b"foo.ab.y", True),  # the second dot's text is `x = foo.ab.`
        (b"x = foo", b".ab.z", False),
        (b"foo.", b"zz", True),  # the dot stands before the piece: the constraint's business
        (b"foo", b".", True),
        (b"foo", b". ", True),  # what follows is the constraint's business
        (b"foo", b".\n  ", True),
        (b"foo", b". zz", False),
        (b"foo", b".\n zz", False),
        (b"foo", b". ab", True),
        (b"foo", b". #", False),  # a member could follow behind the comment
        (b"foo", b".\\", False),
        (b"bar", b". zz", True),
    ],
)
def test_dereferences_within_a_piece_are_judged_byte_by_byte(
    text: bytes, piece: bytes, fits: bool
) -> None:
    assert DereferenceMonitor(ANALYSER).fits(text, piece) is fits


def test_joint_monitors_hold_all_constraints() -> None:
    other = DereferenceMonitor(TableAnalyser({"foo.": frozenset({"ab", "zz"})}))
    joint = JointMonitor([DereferenceMonitor(ANALYSER, members="public"), other])
    assert joint.constraints(b"foo.") == (
        frozenset({b"abc", b"ab"}),
        frozenset({b"ab", b"zz"}),
    )
    assert not joint.fits(b"foo", b".zz(") and joint.fits(b"foo", b".ab(")
    assert joint.triggers == (b".",)
    with pytest.raises(ValueError, match="at least one"):
        JointMonitor([])
