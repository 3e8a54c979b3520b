"""The report: what it shows, that it is self-contained, and that hostile text stays text."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maquette.errors import BadInput
from maquette.figures import duration, quantity
from maquette.study import plots
from maquette.study.charging import charged
from maquette.study.report import Report
from maquette.study.report_page import render, render_html
from maquette.study.statistics import Interval
from maquette.study.templating import fence, markdown_text
from maquette.study.verdict import decide

HOSTILE = "<script>alert(1)</script>&\"'><img src=x onerror=alert(2)>"


class Page(html.parser.HTMLParser):
    """Collects tags, attributes, ids and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _verdict(effect: float, half: float, arm: str, metric: str = "bits_per_byte") -> Any:
    return decide(
        Interval(effect, effect - half, effect + half, half / 2.78, 4, "two-way t", 0.975),
        metric=metric,
        direction="lower",
        smallest_effect="0.5%",
        baseline_mean=1.9125,
        n_seeds=5,
        n_items=412,
        arm=arm,
        baseline="causal",
    )


def _curves(rng: np.random.Generator, gap: float, speed: float) -> dict[str, Any]:
    steps = np.arange(1, 41)
    loss = 3.1 + 4.2 * steps**-0.55 + rng.normal(0, 0.03, 40)
    held_out = 3.1 + gap + 1.6 * steps**-0.8 + rng.normal(0, 0.006, 40)
    return {
        "flops": (steps * 7.5e13).tolist(),
        "seconds": (steps * 9.1 * speed).tolist(),
        "tokens": (steps * 5e5).tolist(),
        "train_loss": loss.tolist(),
        "held_out_loss": [float(b) if i % 4 == 3 else None for i, b in enumerate(held_out)],
    }


def _arm(name: str, gap: float, ledger: dict[str, Any], speed: float, **more: Any) -> dict:
    rng = np.random.default_rng(len(name))
    return {
        "name": name,
        "values": {str(s): 1.9125 + gap + float(rng.normal(0, 0.003)) for s in range(5)},
        "mean": 1.9125 + gap,
        "ledger": ledger,
        "curves": {str(s): _curves(rng, gap, speed) for s in range(5)},
        "status": "done",
        "recipe_yaml": f"workload: text/causal\nsize: 3m\nstages:\n- objective: {{type: {name}}}\n",
        **more,
    }


def sample() -> dict[str, Any]:
    """A study of four arms: one helps, one is undecided, one makes no difference, one failed."""
    train = {"flops": 1.5e16, "tokens": 1e8, "bytes": 4.2e8, "seconds": 1820.0}
    evaluation = {"flops": 4e14, "tokens": 2.5e6, "bytes": 1.1e7, "seconds": 61.0}
    base = {"train": train, "evaluation": evaluation}
    electra = base | {"generator": {"flops": 3.1e15, "tokens": 1e8, "bytes": 0, "seconds": 402.0}}
    selected = base | {"scorer": {"flops": 6.2e15, "tokens": 0, "bytes": 2.1e9, "seconds": 933.0}}
    return {
        "maquette_version": "0.1.0",
        "study_name": "objectives-on-python",
        "question": "Does a denoising objective pay on Python code at 3 PFLOP per run?",
        "digest": "9f31c27be0d5584a",
        "created": "2026-03-14",
        "machine": {"device": "CPU, 2 cores", "memory": "8 GiB", "torch": "2.13.0"},
        "budget": "3e15flop",
        "seeds": [0, 1, 2, 3, 4],
        "metric": {
            "name": "bits_per_byte",
            "direction": "lower",
            "smallest_effect": 0.0095625,
            "unit": "bits per byte",
        },
        "baseline": "causal",
        "summaries": [
            {
                "title": "Share of the gain kept",
                "columns": ["arm", "share"],
                "rows": [["student", 0.25], ["b", math.inf]],
                "sentences": ["student keeps 25%."],
            },
            {"title": "Mean rank", "columns": ["arm"], "refused": "2 seeds finished"},
        ],
        "arms": [
            _arm("causal", 0.0, base, 1.0),
            _arm(
                "replaced-token-detection",
                -0.0412,
                electra,
                1.2,
                verdict=_verdict(-0.0412, 0.0121, "replaced-token-detection"),
                secondary=[
                    {
                        "name": "identifier_accuracy",
                        "verdict": _verdict(0.004, 0.02, "replaced-token-detection"),
                    },
                    {"name": "calibration_error", "values": {"0": 0.0312, "1": 0.0298}},
                ],
                diagnostics=[
                    {"name": "mask rate seen", "value": 0.1497, "note": "asked for 0.15"},
                    {"name": "generator accuracy", "value": 0.4381, "note": "on masked tokens"},
                ],
            ),
            _arm(
                "selected-data",
                -0.009,
                selected,
                1.0,
                verdict=_verdict(-0.009, 0.0132, "selected-data"),
            ),
            _arm(
                "label-smoothing",
                0.0012,
                base,
                1.0,
                verdict=_verdict(0.0012, 0.0051, "label-smoothing"),
            ),
            {
                "name": "high-learning-rate",
                "status": "failed",
                "reason": "the loss was not a number at step 212",
                "ledger": {"train": {"flops": 8e14, "tokens": 5e6, "bytes": 2e7, "seconds": 96.0}},
                "recipe_yaml": "optim: {learning_rate: 0.3}\n",
            },
        ],
        "held_equal": [
            "initial weights, where shapes agree",
            "data order: seeds 0 to 4",
            "training compute: 3e15 FLOP per run",
            "evaluation: 412 held-out files",
        ],
        "warnings": ["untuned: every arm runs with the learning rate of its paper"],
        "rerun": ["maquette compare objectives-on-python.yaml", "maquette ls runs"],
        "charging": [
            c.model_dump()
            for name, ledger in (
                ("replaced-token-detection", electra),
                ("selected-data", selected),
                ("label-smoothing", base),
            )
            for c in charged(ledger, base, amortise_over=10, name=name)
        ],
    }


@pytest.fixture(scope="module")
def page_text() -> str:
    return render_html(Report.model_validate(sample()))


def test_page_says_every_verdict_cost_warning_and_command(page_text: str) -> None:
    text = Page(page_text).text
    for expected in (
        "Does a denoising objective pay",
        "Helps · replaced-token-detection",
        "Undecided · selected-data",
        "No difference · label-smoothing",
        "−0.041",
        "15 PFLOP",
        "30 min 20 s",
        "untuned",
        "the loss was not a number at step 212",
        "mask rate seen",
        "initial weights, where shapes agree",
        "maquette compare objectives-on-python.yaml",
        "amortised",
    ):
        assert expected in text, expected


def test_page_uses_neither_script_nor_network(page_text: str) -> None:
    page = Page(page_text)
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = [v for n, v in page.attributes if n in ("src", "href", "xlink:href", "action")]
    assert all(address.startswith("#") for address in addresses)
    assert "@import" not in page_text and "url(h" not in page_text


def test_a_trial_that_was_refused_is_shown_with_the_reason(tmp_path: Path) -> None:
    trials = [
        {"values": [0.1], "score": 2.0},
        {"values": [0.3], "score": None, "refused": "the rate is too high"},
    ]
    arm = {"arm": "a", "keys": ["optim.learning_rate"], "best": [0.1], "certified": True}
    tuning = [arm | {"trials": trials, "flops": 1.0}]
    paths = render(Report.model_validate(sample() | {"tuning": tuning}), tmp_path)
    assert "0.3 – the rate is too high" in Page(paths["html"].read_text(encoding="utf-8")).text
    assert "| 0.3 | – | the rate is too high |" in paths["md"].read_text(encoding="utf-8")


def test_html_of_hostile_document_text_comes_out_escaped(tmp_path: Path) -> None:
    report = sample()
    before = Page(render_html(Report.model_validate(report))).tags
    report["question"] = report["study_name"] = report["budget"] = HOSTILE
    report["machine"] = {HOSTILE: HOSTILE}
    report["held_equal"] = [*report["held_equal"][:-1], HOSTILE]
    report["warnings"] = [HOSTILE]
    kept, none = report["summaries"]
    kept |= {"title": HOSTILE, "columns": [HOSTILE, "share"], "sentences": [HOSTILE]}
    kept["rows"][0][0] = none["refused"] = HOSTILE
    report["rerun"] = [HOSTILE]
    report["metric"]["unit"] = HOSTILE
    report["machine"] |= {"a": "", "b": ""}
    arm = report["arms"][1]
    arm["recipe_yaml"] = HOSTILE
    arm["diagnostics"][0] = {"name": HOSTILE, "value": HOSTILE, "note": HOSTILE}
    for charge in report["charging"]:
        charge["arm"] = HOSTILE if charge["arm"] == arm["name"] else charge["arm"]
    arm["name"] = HOSTILE
    report["baseline"] = report["arms"][0]["name"] = "</style></title>" + HOSTILE
    paths = render(report, tmp_path)
    text = paths["html"].read_text(encoding="utf-8")
    assert Page(text).tags == before  # not one element more or less
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    assert "&lt;script&gt;" in text
    assert "<script" not in paths["md"].read_text(encoding="utf-8").split("```")[0]


def test_summaries_are_shown_or_the_reason_why_not(tmp_path: Path) -> None:
    paths = render(sample(), tmp_path)
    page = Page(paths["html"].read_text(encoding="utf-8")).text
    assert "student keeps 25%." in page
    assert "None: 2 seeds finished." in page
    text = paths["md"].read_text(encoding="utf-8")
    assert "| arm | share |\n|---|---:|\n| student | 0.25 |\n| b | – |\n" in text
    stored = json.loads(paths["json"].read_text(encoding="utf-8"))["summaries"]
    assert stored[0]["rows"] == [["student", 0.25], ["b", None]]


def test_ids_are_unique_over_all_drawings(page_text: str) -> None:
    page = Page(page_text)
    ids = [v for n, v in page.attributes if n == "id"]
    assert len(ids) == len(set(ids)) > 20
    targets = {v[1:] for n, v in page.attributes if n.endswith("href")}
    assert targets and targets <= set(ids)


def test_drawings_take_every_colour_from_the_page(page_text: str) -> None:
    svgs = page_text.split("<svg")[1:]
    assert len(svgs) == 3
    for svg in svgs:
        drawing = svg.split("</svg>")[0]
        for marker in ("#0101", "#0202", "#0303", "#0404", "#0505", "#0606", "#0707", "#000000"):
            assert marker not in drawing
        assert "var(--" in drawing
    css = page_text.split("<style>")[1].split("</style>")[0]
    for variable in plots.VARIABLES.values():
        assert css.count(f"{variable}:") == 3  # light, dark and print


def test_json_holds_the_same_numbers_unrounded_and_keys_in_order(tmp_path: Path) -> None:
    report = sample()
    report["arms"][1]["mean"] = 0.1 + 0.2
    first = render(report, tmp_path / "a")["json"].read_text(encoding="utf-8")
    again = render(dict(reversed(report.items())), tmp_path / "b")["json"]
    assert first == again.read_text(encoding="utf-8")
    data = json.loads(first)
    assert data["arms"][1]["mean"] == 0.1 + 0.2
    assert list(data) == sorted(data)
    assert Report.model_validate(data) == Report.model_validate(report)


def test_the_page_is_the_same_each_time(page_text: str) -> None:
    assert render_html(Report.model_validate(sample())) == page_text


def test_losses_that_are_not_numbers_become_null_and_leave_gaps(tmp_path: Path) -> None:
    report = sample()
    curves = report["arms"][1]["curves"]["0"]
    curves["train_loss"][5] = math.nan
    curves["held_out_loss"] = [math.inf] * 40
    paths = render(report, tmp_path)
    stored = json.loads(paths["json"].read_text(encoding="utf-8"))["arms"][1]["curves"]["0"]
    assert stored["train_loss"][5] is None
    assert stored["held_out_loss"][0] is None
    assert "NaN" not in paths["json"].read_text(encoding="utf-8")


def test_report_without_a_verdict_or_curve_still_renders(tmp_path: Path) -> None:
    report = sample()
    report["arms"] = [{"name": "causal", "status": "failed", "reason": "disk full"}]
    report["charging"] = []
    text = Page(render(report, tmp_path)["html"].read_text(encoding="utf-8")).text
    assert "No verdict" in text
    assert "disk full" in text


def _drawn(report: dict[str, Any]) -> list[str]:
    """The SVG drawings of learning curves, in the page's order."""
    page = render_html(Report.model_validate(report))
    return [svg.split("</svg>")[0] for svg in page.split("<svg") if 'aria-label="loss' in svg]


def test_losses_of_one_kind_share_axes_and_of_two_kinds_do_not() -> None:
    report = sample()
    together = _drawn(report)
    assert len(together) == 2  # over FLOPs and over seconds
    assert all("var(--baseline)" in svg and "var(--arm-0)" in svg for svg in together)
    report["arms"][1]["loss"] = "replaced-token-detection"
    apart = _drawn(report)
    assert len(apart) == 4
    with_colour = [[f"var(--{name})" in svg for svg in apart] for name in ("baseline", "arm-0")]
    assert with_colour == [[True, True, False, False], [False, False, True, True]]
    assert "not comparable with each other" in Page(render_html(Report.model_validate(report))).text


def test_held_out_loss_is_drawn_beside_the_training_loss() -> None:
    report = sample()
    both = _drawn(report)[0]
    for arm in report["arms"]:
        for curve in arm.get("curves", {}).values():
            curve["train_loss"] = [None] * 40
    held_out = _drawn(report)[0]
    for arm in report["arms"]:
        for curve in arm.get("curves", {}).values():
            curve["held_out_loss"] = [None] * 40
    assert len(both) > len(held_out)
    assert _drawn(report) == []


def test_too_early_stands_before_the_verdicts_and_untrained_beside_the_arms(tmp_path: Path) -> None:
    said = "Too early to compare: no arm is better than the untrained model."
    report = sample() | {
        "too_early": said,
        "untrained": {"values": {"0": 1.93, "1": None}, "mean": 1.93},
    }
    paths = render(report, tmp_path)
    shown = Page(paths["html"].read_text(encoding="utf-8")).text
    assert shown.index(said) < shown.index("Helps ·")
    assert "untrained 1.9300 –" in shown
    lines = paths["md"].read_text(encoding="utf-8").splitlines()
    assert lines.index(f"**{said}**") < next(i for i, x in enumerate(lines) if "**Helps.**" in x)
    assert "| untrained | 1.9300 | – | – | – | – | 1.9300 |" in lines
    assert json.loads(paths["json"].read_text(encoding="utf-8"))["too_early"] == said
    assert "Too early" not in Page(render_html(Report.model_validate(sample()))).text


def test_unknown_field_is_refused_with_its_place(tmp_path: Path) -> None:
    report = sample()
    report["arms"][0]["colour"] = "red"
    with pytest.raises(BadInput, match=r"arms\.0\.colour"):
        render(report, tmp_path)
    report = sample() | {"baseline": "nobody"}
    with pytest.raises(BadInput, match="baseline `nobody` is not among the arms"):
        render(report, tmp_path)


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    report = sample()
    report["arms"][1]["name"] = "a|b\nc"
    lines = render(report, tmp_path)["md"].read_text(encoding="utf-8").splitlines()
    start = lines.index("| arm | verdict | effect | interval | level | p |")
    rows = lines[start : start + 5]
    assert [row.replace("\\|", "").count("|") for row in rows] == [7] * 5
    assert lines[start + 5] == ""


def test_markdown_text_and_fences_cannot_be_broken_out_of() -> None:
    assert markdown_text("*a* <b> [c](d)") == "\\*a\\* &lt;b> \\[c\\](d)"
    assert fence("x\n````\ny") == "`````\nx\n````\ny\n`````"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5e16, "flops", "15 PFLOP"),
        (1.234e15, "flops", "1.23 PFLOP"),
        (999.7e12, "flops", "1 PFLOP"),
        (1e8, "tokens", "100M"),
        (4.2e8, "bytes", "420 MB"),
        (0.0, "bytes", "0"),
        (None, "flops", "–"),
        (1820.0, "seconds", "30 min 20 s"),
    ],
)
def test_costs_carry_units_and_three_digits(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_durations_carry_over_to_the_next_unit() -> None:
    assert [duration(s) for s in (0.42, 59.99, 3599.7, 7500)] == [
        "0.42 s",
        "1 min 00 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_mean_curve_covers_only_what_all_seeds_cover() -> None:
    x, y = plots.mean_curve(
        [(np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])), (np.array([1.0, 3.0]), np.ones(2))]
    )
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [1, 1.5, 2]
