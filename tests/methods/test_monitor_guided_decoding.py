"""The decoder part on real Python, and the dereference audit's dots, rivals and rows."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.documents import documents
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.decoding.metrics import identifiers, next_identifier
from maquette.errors import BadInput
from maquette.evaluation import dereference as audit
from maquette.methods.inference.monitor_guided_decoding import REPORT_KEY, MonitorGuidedDecoding
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

TOKENIZER = train(TokenizerSpec(type="bytes"), [])
SOURCE = """\
import collections

class Shelf:
    def __init__(self):
        self.books, self.größe = collections.deque(), 1

    def add(self, book):
        self.books.append(book)  # é.not_a_dot
        return self . size, 1.5, "x.y"

shelf = Shelf()
shelf.add(shelf.größe)
"""


def model(vocabulary: int = len(TOKENIZER), seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def ctx(cache: Path, seed: int = 0) -> Ctx:
    return Ctx(torch.device("cpu"), seed, cache, Ledger())


PROMPTS = [f"{SOURCE}shelf.", f"{SOURCE}x = 1", f"{SOURCE}collections.dequ"]


def test_a_random_model_writes_members_alone_and_the_analyser_is_billed(tmp_path: Path) -> None:
    batch = pa.record_batch({"text": PROMPTS, "item": ["a", "b", "c"]})
    part = MonitorGuidedDecoding(new_tokens=12, timeout=60, members="public")
    here = ctx(tmp_path)
    table = part.predict(model(), TOKENIZER, batch, here)
    assert table["item"].to_pylist() == ["a", "b", "c"]
    written = table["prediction"].to_pylist()
    assert next_identifier(written[0]) in {"books", "größe", "add"}
    assert next_identifier(written[2]) == "e"
    report = json.loads(table.schema.metadata[REPORT_KEY])
    assert report["masks"]["constrained"] > 0 and report["masks"]["dropped"] == 0
    assert 0 < report["masks"]["removed_mass"] <= 1
    asked = report["analyser"]["asked"]
    billed = here.ledger.entries["scorer"].seconds
    assert asked >= 2 and billed == pytest.approx(report["analyser"]["charged_seconds"])

    again = ctx(tmp_path)
    second = part.predict(model(), TOKENIZER, batch, again)
    assert second["prediction"].to_pylist() == written
    assert json.loads(second.schema.metadata[REPORT_KEY])["analyser"]["asked"] == 0
    assert again.ledger.entries["scorer"].seconds == pytest.approx(billed)


def test_samples_depend_on_the_runs_seed_and_on_nothing_global(tmp_path: Path) -> None:
    part = MonitorGuidedDecoding(new_tokens=8, timeout=60, temperature=0.8, samples=6)
    batch = pa.record_batch({"text": PROMPTS[:1]})

    def samples(seed: int) -> list[str]:
        return part.predict(model(), TOKENIZER, batch, ctx(tmp_path, seed))["samples"][0].as_py()

    before = torch.random.get_rng_state()
    first = samples(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert samples(1) == first and len(first) == 6
    assert samples(2) != first


def test_a_tokenizer_of_another_model_is_bad_input(tmp_path: Path) -> None:
    batch = pa.record_batch({"text": PROMPTS[:1]})
    with pytest.raises(BadInput, match="the tokenizer has"):
        MonitorGuidedDecoding().predict(model(100), TOKENIZER, batch, ctx(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "java"}, "jedi analyses Python"),
        ({"analyser": "language-server", "language": "java"}, "project must name"),
        ({"beams": 2, "temperature": 0.5}, "beam search is greedy"),
        ({"timeout": 0}, "greater than 0"),
        ({"members": "some"}, "public"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorGuidedDecoding(**options)


def test_card_example_runs() -> None:
    assert MonitorGuidedDecoding.card is not None
    exec(MonitorGuidedDecoding.card.example, {})


# --- the audit -----------------------------------------------------------------------------------


def test_dots_are_the_attribute_accesses_of_the_syntax_tree() -> None:
    dots = audit.dots_of("f", SOURCE)
    accesses = [n.attr for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Attribute)]
    accesses.remove("size")  # apart from its dot
    assert sorted(next_identifier(d.truth) for d in dots) == sorted(accesses)
    assert all(d.text.endswith(".") and SOURCE.startswith(d.text + d.truth) for d in dots)
    assert len({d.item for d in dots}) == len(dots)
    assert audit.dots_of("f", "not python (") == []


def test_the_draw_of_dots_is_fixed_and_bounded_per_file() -> None:
    files = [(f"f{i}", SOURCE, None) for i in range(6)]
    draws = [audit.choose_dots(files, 9, 2, np.random.default_rng(0)) for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) == 9
    names = [d.item.split(":")[0] for d in draws[0]]
    assert max(names.count(n) for n in names) <= 2


def test_the_rival_names_the_most_frequent_member_of_that_object() -> None:
    counts = audit.attribute_counts(["self.a; self.b; self.b; os.path; f(x).z", "q.path; q.path"])
    assert audit.most_frequent(counts, "return self.") == "b"
    assert audit.most_frequent(counts, "g(y).") == "z"
    assert audit.most_frequent(counts, "unseen.") == "path"
    assert audit.most_frequent({}, "self.") == ""


def test_the_sham_set_is_as_large_and_drawn_from_the_text() -> None:
    rng = np.random.default_rng(0)
    drawn = audit.sham_set(SOURCE, 4, rng)
    assert len(drawn) == 4 and drawn <= set(identifiers(SOURCE))
    assert audit.sham_set("a b", 9, rng) == {"a", "b"}


class Corpus:
    """Two files, one of them held out."""

    def documents(self, split: str) -> Iterator[pa.RecordBatch]:
        text = SOURCE if split == "held_out" else "self.books.append\nself.books"
        yield documents([f"stdlib/{split}.py"], [text], "stdlib")


def measured(decoder: str, cache: Path) -> tuple[dict[str, dict[str, float]], Ledger]:
    here = ctx(cache)
    subject = Subject(model(), TOKENIZER)
    part = audit.Dereference(decoder=decoder, dots=6, new_tokens=16, context=40, timeout=60)
    table = part.measure(subject, Corpus(), here)  # type: ignore[arg-type]
    rows: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        assert row["weight"] == 1 and row["item"] not in rows.setdefault(row["metric"], {})
        rows[row["metric"]][row["item"]] = row["value"]
    assert set(rows) <= set(part.metrics)
    return rows, here.ledger


def test_arms_share_their_dots_and_only_analysing_arms_pay_the_scorer(tmp_path: Path) -> None:
    rows = {d: measured(d, tmp_path) for d in ("plain", "monitor", "sham", "frequency")}
    items = {tuple(table["next-identifier-match"]) for table, _ in rows.values()}
    assert len(items) == 1 and len(items.pop()) == 6
    monitored, ledger = rows["monitor"]
    # What the monitor allows is a member, unless the 16 bytes end before the name does.
    assert all(v == 1 for v in rows["monitor"][0]["member-exists"].values())
    assert monitored["analyser-covers"] == rows["plain"][0]["analyser-covers"]
    assert ledger.entries["scorer"].seconds > 0 and ledger.entries["evaluation"].flops > 0
    assert "scorer" not in rows["plain"][1].entries
    assert "scorer" not in rows["frequency"][1].entries
    covered = set(monitored["next-identifier-match-covered"])
    assert covered == {i for i, v in monitored["analyser-covers"].items() if v}


def test_a_corpus_without_dots_is_bad_input(tmp_path: Path) -> None:
    empty = SimpleNamespace(documents=lambda split: iter([documents(["x"], ["a.b"], "web")]))
    with pytest.raises(BadInput, match="no attribute access in 0 held-out documents"):
        audit.Dereference().measure(Subject(model(), TOKENIZER), empty, ctx(tmp_path))  # type: ignore[arg-type]
