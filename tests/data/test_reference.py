"""Reference text is set aside, and no document of it is trained or evaluated on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from maquette.data.reference import ReferenceSpec, reference_rows, refuse_overlap
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.execute import make_ctx

WINDOW = 32


@pytest.fixture
def setting(world):
    data = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
    }
    stage = parse_recipe(data).last
    ctx = make_ctx(stage, 0, world.store("shared"), torch.device("cpu"))
    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
    return corpus, ctx.cache


def texts(corpus, part):
    return [t for batch in corpus.documents(part) for t in batch["text"].to_pylist()]


def corpus_file(folder, texts):
    path = folder / "reference.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def new_texts(n=4):
    rng = np.random.default_rng(5)
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    return [" ".join(rng.choice(words, 200)) for _ in range(n)]


def test_rows_of_domains_are_set_aside_with_all_rows_of_their_documents(setting):
    corpus, cache = setting
    found = reference_rows(ReferenceSpec(domains=("library",), rows=3), corpus, WINDOW, cache)
    tokens = corpus.train
    assert found.ids_RT.shape == (3, WINDOW)
    low, high = tokens.domain("library")
    assert all(low <= row * WINDOW + WINDOW and row * WINDOW < high for row in found.excluded)
    kept = np.setdiff1d(np.arange(tokens.n_tokens // WINDOW), found.excluded)
    documents = tokens.segments(np.zeros(1, int), 1)  # row 0 starts the first document
    assert documents[0, 0] == 0
    owner = np.searchsorted(tokens.doc_starts, np.arange(tokens.n_tokens), side="right") - 1
    trained = {d for row in kept for d in owner[row * WINDOW : (row + 1) * WINDOW]}
    assert not {tokens.doc_row[d] for d in trained} & set(found.documents)


@pytest.mark.parametrize("rows", [1, 3, 64, 10**6])
def test_most_of_a_domain_stays_in_the_training_part(setting, rows):
    corpus, cache = setting
    found = reference_rows(ReferenceSpec(domains=("library",), rows=rows), corpus, WINDOW, cache)
    n = int((corpus.train.doc_domain == corpus.train.domains.index("library")).sum())
    assert 1 <= len(found.documents) <= n // 2
    assert len(found.ids_RT) == rows or rows == 10**6


def test_a_reference_row_knows_where_its_documents_end(setting):
    corpus, cache = setting
    found = reference_rows(ReferenceSpec(domains=("*",), rows=2000), corpus, WINDOW, cache)
    eos = corpus.train.eos_id
    ends = found.ids_RT[:, :-1] == eos
    assert ends.any()
    assert np.array_equal(np.diff(found.segments_RT, axis=1) == 1, ends)
    assert (found.segments_RT[:, 0] == 0).all()


def test_a_corpus_of_its_own_is_read_with_the_runs_tokenizer(setting, tmp_path):
    corpus, cache = setting
    made = new_texts()
    spec = ReferenceSpec(corpus={"path": corpus_file(tmp_path, made)}, rows=1000)
    found = reference_rows(spec, corpus, WINDOW, cache)
    whole = corpus.tokenizer.decode(found.ids_RT.ravel().tolist())
    assert len(found.ids_RT) > 10
    assert made[0][:40] in whole or made[1][:40] in whole
    assert not len(found.excluded)
    refuse_overlap(found, corpus)


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_document_of_the_run_in_the_reference_is_refused(setting, tmp_path, part):
    corpus, cache = setting
    copy = "  " + texts(corpus, part)[0].replace("\n", " \n ")  # white space does not hide it
    path = corpus_file(tmp_path, [*new_texts(), copy])
    found = reference_rows(ReferenceSpec(corpus={"path": path}, rows=10**4), corpus, WINDOW, cache)
    with pytest.raises(BadInput, match=f"1 documents of the {part} part are also in the ref"):
        refuse_overlap(found, corpus)


def test_rows_set_aside_are_no_overlap_but_a_copy_elsewhere_is(setting):
    corpus, cache = setting
    found = reference_rows(ReferenceSpec(domains=("library",), rows=3), corpus, WINDOW, cache)
    refuse_overlap(found, corpus)
    copied = replace(corpus, parts={"train": corpus.parts["train"], "dev": corpus.parts["train"]})
    with pytest.raises(BadInput, match="of the dev part are also in the reference"):
        refuse_overlap(replace(found, source=copied), copied)


def test_no_domain_no_text_and_no_place_are_refused(setting, tmp_path):
    corpus, cache = setting
    with pytest.raises(BadInput, match="no domain matches libary"):
        reference_rows(ReferenceSpec(domains=("libary",)), corpus, WINDOW, cache)
    path = corpus_file(tmp_path, ["too short", "as well"])
    with pytest.raises(BadInput, match="one row takes 32"):
        reference_rows(ReferenceSpec(corpus={"path": path}), corpus, WINDOW, cache)
    with pytest.raises(ValueError, match="name a `corpus` of its own"):
        ReferenceSpec()
