import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from maquette.data import corpus as corpus_module
from maquette.data.corpus import Corpus, CorpusSpec, DedupSpec, TokenizerSpec, prepare
from maquette.data.documents import documents
from maquette.errors import BadInput, RunFailed
from maquette.flow import Ctx
from maquette.training.ledger import Ledger

BYTES = TokenizerSpec(type="bytes")


def write(path: Path, texts: list[str]) -> str:
    lines = (json.dumps({"text": t, "part": f"p{i % 2}"}) for i, t in enumerate(texts))
    path.write_text("\n".join(lines))
    return str(path)


def random_texts(n: int, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[f"w{k}" for k in rng.integers(0, 9999, 120)] for _ in range(n)]


@pytest.fixture
def source(tmp_path) -> str:
    """200 texts, 40 families of 4 relatives (Jaccard about 0.6), 20 near and 10 exact copies."""
    rng = np.random.default_rng(1)
    texts = random_texts(200)
    for parent in texts[:40]:
        for _ in range(3):
            place = int(rng.integers(0, 90))
            relative = list(parent)
            relative[place : place + 24] = random_texts(1, int(rng.integers(1 << 30)))[0][:24]
            texts.append(relative)
    near = [[*t[:-1], "end"] for t in texts[50:70]]
    lines = [" ".join(t) for t in texts + near]
    return write(tmp_path / "source.jsonl", lines + ["  " + t + "\n" for t in lines[100:110]])


def ids(corpus: Corpus, part: str) -> list[str]:
    return [i for batch in corpus.documents(part) for i in batch["id"].to_pylist()]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_no_document_and_no_relative_is_on_both_sides_of_the_split(source, tmp_path):
    corpus = prepare(source, BYTES, cache=tmp_path / "cache", held_out_fraction=0.3)
    kept: dict[str, list[set]] = {}
    for part in ("train", "held_out"):
        batches = corpus.documents(part)
        kept[part] = [shingles(t) for b in batches for t in b["text"].to_pylist()]
    assert min(len(k) for k in kept.values()) > 20
    related = [(a, b) for a in kept["train"] for b in kept["held_out"] if not a.isdisjoint(b)]
    worst = max((len(a & b) / len(a | b) for a, b in related), default=0.0)
    assert worst < 0.45
    assert not set(ids(corpus, "train")) & set(ids(corpus, "held_out"))


def test_planted_duplicates_are_removed_and_recorded_with_their_reason(source, tmp_path):
    corpus = prepare(source, BYTES, cache=tmp_path / "cache")
    assert corpus.card["read"]["documents"] == 350
    assert corpus.card["dropped"] == {"exact duplicate": 10, "near duplicate": 20}
    rows = [row for batch in corpus.dropped() for row in batch.to_pylist()]
    assert len(rows) == 30
    assert {r["why"] for r in rows} == {"exact duplicate", "near duplicate"}
    total = sum(p["documents"] for p in corpus.card["parts"].values())
    assert total == 320
    everything = prepare(
        source,
        BYTES,
        cache=tmp_path / "cache",
        dedup=DedupSpec(exact=False, near=None, group=None),
    )
    assert sum(p["documents"] for p in everything.card["parts"].values()) == 350


def test_preparing_twice_does_no_work_and_gives_the_same_digest(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = prepare(source, BYTES, cache=cache)

    def refuse(*args: Any) -> None:
        raise AssertionError("worked again")

    for name in ("pack", "split_documents", "_tokens"):
        monkeypatch.setattr(corpus_module, name, refuse)
    again = prepare(source, BYTES, cache=cache)
    assert (again.digest, again.parts) == (first.digest, first.parts)
    monkeypatch.undo()
    elsewhere = prepare(source, BYTES, cache=tmp_path / "other")
    assert elsewhere.digest == first.digest
    assert np.array_equal(elsewhere.train.tokens, first.train.tokens)


def test_a_changed_file_is_read_again(source, tmp_path):
    first = prepare(source, BYTES, cache=tmp_path / "cache")
    with Path(source).open("a") as out:
        out.write("\n" + json.dumps({"text": "a wholly new document", "part": "p0"}))
    second = prepare(source, BYTES, cache=tmp_path / "cache")
    assert second.digest != first.digest
    assert second.card["read"]["documents"] == 351


def _prepare_in_process(source: str, cache: Path, results: Any) -> None:
    results.put(prepare(source, BYTES, cache=cache).digest)


def test_two_processes_that_prepare_at_once_agree(source, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_prepare_in_process, args=(source, tmp_path / "cache", results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    digests = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert digests[0] == digests[1] == prepare(source, BYTES, cache=tmp_path / "cache").digest
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_build_that_fails_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module, "pack", broken)
    with pytest.raises(RunFailed, match="no room to write"):
        prepare(source, BYTES, cache=tmp_path / "cache")
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob("tokens-*/card.json"))
    assert not list((tmp_path / "cache").glob("*.tmp-*"))
    assert prepare(source, BYTES, cache=tmp_path / "cache").train.n_tokens > 0


class DropPart:
    """Drops the documents of one domain and upper-cases the rest."""

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def digest_key(self) -> str:
        return f"drop:{self.domain}"

    def reads(self) -> dict[str, str]:
        return {}

    def fit(self, sample: pa.Table, ctx: Any) -> int:
        assert sample.num_rows > 0
        return sample.num_rows

    def apply(self, batch: pa.RecordBatch, state: int) -> pa.RecordBatch:
        keep = pc.not_equal(batch["domain"], self.domain)
        why = pc.if_else(keep, pa.scalar(None, pa.string()), f"is {self.domain}")
        text = batch.schema.get_field_index("text")
        shouted = batch.set_column(text, batch.schema.field("text"), pc.utf8_upper(batch["text"]))
        return shouted.append_column("keep", keep).append_column("why", why)


class AddPart(DropPart):
    """Also rates what it keeps and adds a document of its own."""

    def apply(self, batch: pa.RecordBatch, state: int) -> pa.RecordBatch:
        rates = pa.array([0.5] * batch.num_rows)
        return super().apply(batch, state).append_column("rate", rates)

    def added(self, state: int) -> Any:
        yield documents(["mine"], [f"written after {state} documents"], "mine")


def test_documents_a_data_part_adds_join_the_training_part_behind_the_others(source, tmp_path):
    spec = CorpusSpec(path=source, domain_column="part")
    corpus = prepare(spec, BYTES, cache=tmp_path / "cache", ops=[AddPart("p0")])
    rows = [row for batch in corpus.documents() for row in batch.to_pylist()]
    assert [row["id"] for row in rows if row["rate"] is None] == ["mine"]
    assert rows[-1]["text"].startswith("written after ")
    assert corpus.domains == ("mine", "p1")
    plain = prepare(spec, BYTES, cache=tmp_path / "cache")
    assert set(ids(corpus, "held_out")) == set(ids(plain, "held_out"))


def test_data_parts_change_the_training_part_only(source, tmp_path):
    spec = CorpusSpec(path=source, domain_column="part")
    plain = prepare(spec, BYTES, cache=tmp_path / "cache")
    ops = [DropPart("p0")]
    curated = prepare(spec, BYTES, cache=tmp_path / "cache", ops=ops)
    assert curated.domains == ("p1",)
    assert set(ids(curated, "train")) < set(ids(plain, "train"))
    assert all(t.isupper() for b in curated.documents() for t in b["text"].to_pylist())
    assert curated.parts["held_out"] == plain.parts["held_out"]
    assert curated.tokenizer_folder == plain.tokenizer_folder
    n_dropped = len(ids(plain, "train")) - len(ids(curated, "train"))
    assert curated.card["dropped"]["is p0"] == n_dropped
    with pytest.raises(BadInput, match="dropped all documents"):
        prepare(spec, BYTES, cache=tmp_path / "cache", ops=[*ops, DropPart("p1")])


class BillingPart(DropPart):
    """A part that learns at a price, and has something to say."""

    def fit(self, sample: pa.Table, ctx: Any) -> int:
        held = pq.read_table(ctx.held_out)["id"].to_pylist()
        assert held
        assert not set(held) & set(sample["id"].to_pylist())
        ctx.ledger.bill("scorer", flops=5.0, tokens=2)
        return super().fit(sample, ctx)

    def diagnose(self, state: int) -> dict[str, str]:
        return {"part": f"saw {state} documents"}


def test_a_part_bills_every_run_that_uses_it_and_its_notes_are_on_the_card(source, tmp_path):
    spec = CorpusSpec(path=source, domain_column="part")
    for _ in range(2):  # the second finds it in the cache
        ctx = Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger())
        ctx.ledger.bill("train", flops=1.0)
        corpus = prepare(spec, BYTES, cache=ctx.cache, ops=[BillingPart("p0")], ctx=ctx)
        entries = ctx.ledger.entries
        assert (entries["scorer"].flops, entries["scorer"].tokens) == (5.0, 2)
        assert entries["train"].flops == 1.0
        assert corpus.card["warnings"]["part"].startswith("saw ")


def test_rows_of_packed_documents_point_into_the_stored_documents(source, tmp_path):
    corpus = prepare(source, BYTES, cache=tmp_path / "cache")
    texts = [t for b in corpus.documents() for t in b["text"].to_pylist()]
    for i in (0, 5, corpus.train.n_documents - 1):
        decoded = corpus.tokenizer.decode(corpus.train.document(i)[:-1])
        assert decoded == texts[corpus.train.doc_row[i]]


def test_a_dev_part_is_there_only_when_asked_for(source, tmp_path):
    with_dev = prepare(source, BYTES, cache=tmp_path / "cache", dev_fraction=0.2)
    assert with_dev.part("dev").n_documents > 10
    with pytest.raises(BadInput, match="no part `dev`") as error:
        prepare(source, BYTES, cache=tmp_path / "cache").part("dev")
    assert error.value.key == "dev_fraction"


def test_a_folder_that_save_pretrained_wrote_is_a_tokenizer(source, tmp_path):
    cache = tmp_path / "cache"
    first = prepare(source, BYTES, cache=cache)
    first.tokenizer.save_pretrained(tmp_path / "own")
    second = prepare(source, TokenizerSpec(type=str(tmp_path / "own")), cache=cache)
    assert np.array_equal(first.train.tokens, second.train.tokens)


def test_corpora_that_cannot_be_split_are_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", ["only one"])
    with pytest.raises(BadInput, match="is one document"):
        prepare(one, BYTES, cache=tmp_path / "cache")
    same = write(tmp_path / "same.jsonl", ["all the same"] * 50)
    with pytest.raises(BadInput, match="leave none for the part") as error:
        prepare(same, BYTES, cache=tmp_path / "cache")
    assert error.value.key == "held_out_fraction"
    with pytest.raises(BadInput, match="sum to less than 1"):
        prepare(same, BYTES, cache=tmp_path / "cache", held_out_fraction=1.0)


def test_a_cache_that_cannot_be_written_is_bad_input(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write to the cache"):
        prepare(source, BYTES, cache=tmp_path / "file" / "cache")
