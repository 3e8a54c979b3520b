"""What a report says was held equal: each line where it is true of every arm, and only there."""

import pytest

from maquette.study.held_equal import held_equal
from maquette.study.study import parse_study

CORPUS = "the corpus, its duplicates removed, and the held-out documents"
DOCUMENTS = "the documents trained on, after data parts"
TOKENIZER = "the tokenizer"
START = "model shape and initial weights, wherever shapes agree (per seed)"
ORDER = "order of the training rows (per seed)"
OPTIM = "optimiser and schedule"
BUDGET = "budget: 10step"
ITEMS = "evaluation items"
ALL = {CORPUS, DOCUMENTS, TOKENIZER, START, ORDER, OPTIM, BUDGET, ITEMS}

WORKLOAD = {"type": "text/causal", "corpus": {"path": "x.jsonl"}}
DSIR = {"type": "dsir", "reference": {"domains": ["library"], "rows": 8}}
SOURCE = {"name": "source", "budget": "50step"}
ON = {"name": "on", "init": {"from": "source"}}


def facts(*arms, **over):
    """What is held equal between these arms."""
    data = {
        "workload": WORKLOAD,
        "size": "nano",
        "objective": "causal-lm",
        "budget": "10step",
        "metric": "bits-per-byte",
        "arms": {f"arm{n}": arm for n, arm in enumerate(arms)},
    }
    return set(held_equal(parse_study(data | over, name="equal")))


def members(*reseeds):
    names = [f"m{reseed}" for reseed in reseeds]
    stages = [{"name": n, "reseed": r} for n, r in zip(names, reseeds, strict=True)]
    both = {"name": "both", "init": {"ensemble": names}, "budget": "0step"}
    return {"stages": [*stages, both]}


@pytest.mark.parametrize(
    ("arm", "differs"),
    [
        ({"optim": {"type": "adamw", "weight_decay": 0.3}}, {OPTIM}),
        ({"budget": "20step"}, {BUDGET}),
        ({"reseed": 7}, {START, ORDER}),
        ({"stages": [SOURCE, ON]}, {START, ORDER, BUDGET}),
        (members(1, 2), {START, ORDER, BUDGET}),
        ({"data": {"type": "insecure-calls", "keep": 0.9}}, {DOCUMENTS, ORDER}),
        ({"feed": DSIR}, {ORDER}),
        ({"surgery": {"type": "low-rank"}}, {START}),
        ({"objective": "prefix-lm"}, set()),
        ({"size": "1m"}, {START, ORDER, OPTIM}),
        ({"workload": {"length": 48}}, {START, ORDER}),
        ({"workload": {"vocabulary": 512}}, {TOKENIZER, START, ORDER}),
        ({"workload": {"model": "some/folder"}}, {TOKENIZER, START, ORDER}),
        ({"evaluate": [{"type": "bits-per-byte", "max_tokens": 9}]}, {ITEMS}),
    ],
)
def test_a_line_is_left_out_where_one_arm_differs_in_what_decides_it(arm, differs):
    assert facts({}, {}, arm) == ALL - differs


def test_arms_that_start_from_one_stage_start_equal_and_from_two_do_not():
    low = {"surgery": [{"type": "low-rank"}]}
    other = SOURCE | {"optim": {"type": "adamw", "learning_rate": 1e-4}}
    both = "budget: 50step, 10step"
    assert facts({"stages": [SOURCE, ON]}, {"stages": [SOURCE, ON]}) == ALL - {BUDGET} | {both}
    assert START not in facts({"stages": [SOURCE, ON]}, {"stages": [SOURCE, ON | low]})
    found = facts({"stages": [SOURCE, ON]}, {"stages": [other, ON]})
    assert not {START, OPTIM} & found
    assert {ORDER, both} <= found


def test_the_tokenizer_is_the_one_in_the_end_whatever_carried_the_model_over_to_it():
    def moved(surgery, vocabulary=600):
        to = {"workload": WORKLOAD | {"vocabulary": vocabulary}}
        return {"stages": [SOURCE, ON | to | {"surgery": [surgery]}]}

    assert TOKENIZER in facts(moved("focus"), moved("vocabulary-transfer"))
    assert START not in facts(moved("focus"), moved("vocabulary-transfer"))
    assert TOKENIZER not in facts(moved("focus"), moved("focus", 700))
    assert TOKENIZER not in facts(moved("focus"), {"stages": [SOURCE, ON]})


def test_a_teacher_that_only_one_arm_trains_is_no_equal_budget_and_spoils_no_other_line():
    taught = {
        "stages": [
            {"name": "teacher", "budget": "5step"},
            {"name": "pupil", "objective": {"type": "salt", "teacher": "teacher"}},
        ]
    }
    assert facts({}, taught) == ALL - {BUDGET}


def test_what_a_data_part_reads_decides_the_documents():
    def judged(budget):
        pupil = {"name": "pupil", "data": [{"type": "perplexity-filter", "model": "judge"}]}
        return {"stages": [{"name": "judge", "budget": budget}, pupil]}

    assert DOCUMENTS in facts(judged("5step"), judged("5step"))
    assert DOCUMENTS not in facts(judged("5step"), judged("6step"))


def test_a_feed_that_may_ask_the_model_gives_one_order_to_one_training_alone():
    assert ORDER in facts({}, {}, feed=DSIR)
    assert ORDER not in facts({}, {"optim": {"type": "adamw", "weight_decay": 0.3}}, feed=DSIR)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            "1e12flop",
            "1e+12flop of counted training FLOPs, side costs of the training included",
        ),
        ("20000tok", "20000tok, to within a step"),
        ("2epoch", "2epoch"),
    ],
)
def test_budgets_say_what_they_are_in(budget, said):
    [found] = [fact for fact in facts({}, {}, budget=budget) if fact.startswith("budget")]
    assert found.startswith(f"budget: {said}")
