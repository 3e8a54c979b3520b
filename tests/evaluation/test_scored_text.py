"""Stretches of documents: whole characters, the same bytes for everyone, no giant outweighs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.data.documents import documents
from maquette.data.tokenizers import train
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import BitsPerByte, bits_per_byte_of
from maquette.evaluation.domains import DomainBitsPerByte
from maquette.evaluation.scored_text import held_out_tokens, stretch, stretches
from maquette.parts import Ctx
from maquette.training.ledger import Ledger
from tests.evaluation.models import tiny_llama

LENGTH = 16
CAP = 64 * 3


WORDS = ["ab", "cé", "def", "語文", "🙂", "hedge", "mason"]


def words(rng: np.random.Generator, n: int) -> str:
    return " ".join(rng.choice(WORDS, n))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Forty documents, of which every eighth is fifty times as long as the others."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(40):
        text = words(rng, 2000 if i % 8 == 0 else 40)
        (folder / "text" / f"{i}.txt").write_text(f"{i} {text}", encoding="utf-8")
    spec = CorpusSpec(path=str(folder / "text"))
    return prepare(spec, TokenizerSpec(type="bytes"), cache=folder / "cache", held_out_fraction=0.5)


def context(tmp_path: Path) -> Ctx:
    return Ctx(torch.device("cpu"), 0, tmp_path, Ledger(), length=LENGTH)


def held_out_texts(corpus: Corpus) -> dict[str, str]:
    rows = [row for batch in corpus.documents("held_out") for row in batch.to_pylist()]
    return {row["id"]: row["text"] for row in rows}


@pytest.mark.parametrize("alphabet", ["ascii only ", "é à ü ", "語文漢字", "🙂🙃 "])
def test_a_stretch_is_a_piece_of_the_text_with_whole_characters(alphabet):
    text = alphabet * 100
    pieces = {stretch(text, f"name{i}", 100) for i in range(200)}
    assert all(piece in text for piece in pieces)
    # A cut character at each end and the way to a first white space are all that may be missing.
    assert all(100 - 6 - 28 <= len(piece.encode()) <= 100 for piece in pieces)
    assert len(pieces) >= len(set(alphabet.split()[0]))


def test_a_stretch_begins_after_white_space_and_depends_on_the_name_alone():
    text = " ".join(f"word{i:03}" for i in range(500))
    pieces = [stretch(text, f"name{i}", 100) for i in range(300)]
    assert pieces == [stretch(text, f"name{i}", 100) for i in range(300)]
    assert all(piece.startswith("word") for piece in pieces)
    # Places are spread evenly: a quarter of them in each quarter of the text.
    places = np.array([text.index(piece) for piece in pieces]) / len(text)
    shares = np.histogram(places, bins=4, range=(0, 1))[0] / len(pieces)
    assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 300)


def test_short_texts_come_whole_and_other_columns_stay():
    batch = documents(["a", "b"], ["short", "long " * 100], ["x", "y"])
    (cut,) = stretches([batch], 50)
    assert cut.schema == batch.schema
    assert cut.drop_columns(["text"]).equals(batch.drop_columns(["text"]))
    short, long = cut["text"].to_pylist()
    assert short == "short" and len(long) <= 50 and long.startswith("long")
    assert isinstance(cut, pa.RecordBatch)


def test_the_stretches_are_the_same_under_every_tokenizer(corpus, tmp_path):
    texts = held_out_texts(corpus)
    other = train(TokenizerSpec(vocabulary=300), list(texts.values()))
    ctx = context(tmp_path)
    parts = [
        held_out_tokens(tiny_llama(t), corpus, ctx, CAP // 3) for t in (corpus.tokenizer, other)
    ]
    assert parts[0].n_tokens > parts[1].n_tokens
    names = list(texts)
    for part, tokenizer in zip(parts, (corpus.tokenizer, other), strict=True):
        for i in range(part.n_documents):
            name = names[part.doc_row[i]]
            expected = stretch(texts[name], name, CAP)
            assert part.doc_bytes[i] == len(expected.encode()) <= CAP
            assert tokenizer.decode(part.document(i)[:-1]) == expected


def test_the_audit_scores_each_stretch_as_a_text_of_its_own(corpus, tmp_path):
    subject, texts = tiny_llama(corpus.tokenizer), held_out_texts(corpus)
    ctx = context(tmp_path)
    table = BitsPerByte(document_tokens=CAP // 3).measure(subject, corpus, ctx)
    assert table.num_rows == len(texts)
    for row in table.to_pylist():
        piece = stretch(texts[row["item"]], row["item"], CAP)
        alone = bits_per_byte_of([piece], LENGTH)(subject.model, corpus.tokenizer)
        assert row["value"] == pytest.approx(alone, rel=1e-5)
        assert row["weight"] == len(piece.encode())
    groups = DomainBitsPerByte(groups={"all": ("*",)}, document_tokens=CAP // 3)
    by_group = groups.measure(subject, corpus, ctx)
    assert dict(zip(table["item"].to_pylist(), table["value"].to_pylist(), strict=True)) == (
        dict(zip(by_group["item"].to_pylist(), by_group["value"].to_pylist(), strict=True))
    )


def test_long_documents_do_not_outweigh_the_others(corpus, tmp_path):
    subject, ctx = tiny_llama(corpus.tokenizer), context(tmp_path)

    def effective(audit: BitsPerByte) -> float:
        """Kish's effective number of items."""
        weight = audit.measure(subject, corpus, ctx)["weight"].to_numpy()
        return weight.sum() ** 2 / (weight**2).sum()

    n = len(held_out_texts(corpus))
    whole, cut = (effective(BitsPerByte(document_tokens=m)) for m in (None, CAP // 3))
    assert whole < 0.5 * n < 0.9 * n < cut


def test_documents_that_are_all_short_are_not_encoded_again(corpus, tmp_path):
    subject, ctx = tiny_llama(corpus.tokenizer), context(tmp_path)
    assert held_out_tokens(subject, corpus, ctx, 10**6) is corpus.held_out
    assert held_out_tokens(subject, corpus, ctx) is corpus.held_out
    assert not list(tmp_path.iterdir())
    held_out_tokens(subject, corpus, ctx, CAP // 3)
    assert sum(place.is_dir() for place in tmp_path.iterdir()) == 1


def test_another_part_in_the_place_of_the_held_out_one_leaves_it_its_own_tokens(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        text = words(np.random.default_rng(i), 400)
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} {text}", encoding="utf-8")
    fractions = {"held_out_fraction": 0.3, "dev_fraction": 0.3}
    corpus = prepare(
        CorpusSpec(path=str(tmp_path / "text")),
        TokenizerSpec(type="bytes"),
        cache=tmp_path / "cache",
        **fractions,
    )
    dev = replace(corpus, parts={**corpus.parts, "held_out": corpus.parts["dev"]})
    subject = tiny_llama(corpus.tokenizer)
    for part in (dev, corpus):  # the dev part first, as a tuning does it
        packed = held_out_tokens(subject, part, context(tmp_path), 64)
        for i, row in enumerate(packed.doc_row):
            name, text = list(held_out_texts(part).items())[row]
            assert packed.doc_bytes[i] == len(stretch(text, name, CAP).encode())
            assert corpus.tokenizer.decode(packed.document(i)[:-1]) == stretch(text, name, CAP)


def word_tokenizer(*, lower: bool, words: list[str]) -> PreTrainedTokenizerFast:
    names = ["[UNK]", "[EOS]", *words]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if lower:
        made.normalizer = Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[EOS]")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_tokenizer(lower=False, words=["Aa", "ab", "def"]), "tokens are `.UNK.`"),
        (word_tokenizer(lower=True, words=["aa", *map(str, range(40)), *WORDS]), "capitals"),
    ],
)
def test_a_vocabulary_that_does_not_tell_the_text_is_refused(corpus, tmp_path, tokenizer, message):
    with pytest.raises(BadInput, match=message):
        BitsPerByte().measure(tiny_llama(tokenizer), corpus, context(tmp_path))


def test_a_vocabulary_of_whole_words_that_tells_them_all_is_scored(corpus, tmp_path):
    tokenizer = word_tokenizer(lower=False, words=["Aa", *map(str, range(40)), *WORDS])
    assert BitsPerByte().measure(tiny_llama(tokenizer), corpus, context(tmp_path)).num_rows
