import numpy as np
import pytest

from maquette.data.documents import documents
from maquette.data.packing import PackedTokens, pack
from maquette.data.tokenizers import (
    CLS,
    MASK,
    SEP,
    Encoder,
    TokenizerSpec,
    content_digest,
    end_of_document,
    load,
    token_bytes,
    train,
)
from maquette.errors import BadInput

WORDS = (
    *("the", "cat_sat", "on", "12", "mats;", "don't", "", "stop\n\tdef", "f(x):", "return"),
    *("x+1", "naïve", "中文字符", "“quoted”", "😀", "é"),
)


def prose(n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    stems = [w + str(s) for w in WORDS for s in ("", "ing", "ed", "s", "ly")]
    return " ".join(stems[i] for i in rng.integers(0, len(stems), n))


def some_documents(n: int = 40):
    return documents(
        [f"doc{i}" for i in range(n)],
        [prose(20 + i, i) for i in range(n)],
        [f"d{i % 3}" for i in range(n)],
    )


@pytest.fixture(scope="module")
def bpe():
    spec = TokenizerSpec(vocabulary=360, sentinels=3, extra=("[TASK]",), template="cls_sep")
    return train(spec, [prose(3000, s) for s in range(3)])


@pytest.fixture(scope="module")
def characters():
    return train(TokenizerSpec(type="bytes"), [])


TRICKY = [
    "",
    " ",
    "\n\n  \t x",
    "trailing   ",
    "[MASK] and <extra_id_0> in a text",
    "a\u00a0b\u3000c\u2028d\x1c\x1d\x85e",
    "\u0e01\u0e33 हिन्दी Ελληνικά 한국어 １２３ ＡＢＣ",
    "😀👩‍👩‍👧\ufe0f e\u0301 ﬁ ² ½ Ⅻ ٣",
    "x" * 5000,
    "''''' \"\"\" ###### ",
    "\r\n\r\n  \x0b\x0c",
    "\ufeff\ufffd\u200b",
]


def test_the_fast_encoder_agrees_with_the_tokenizer_library(bpe, characters):
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in rng.integers(1, 0xD7FF, 3000)]
    letters += [chr(c) for c in rng.integers(0xE000, 0x2FFFF, 3000)]
    noise = ["".join(rng.choice([*letters, " ", "\n", "a", "1"], 200)) for _ in range(60)]
    texts = [*TRICKY, *noise, prose(500, 9)]
    for tokenizer in (bpe, characters):
        backend = tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            expected = [backend.encode(t, add_special_tokens=False).ids for t in texts]
        finally:
            backend.encode_special_tokens = False
        assert [ids.tolist() for ids in Encoder(tokenizer)(texts)] == expected


def test_encoding_loses_nothing(bpe, characters):
    for tokenizer in (bpe, characters):
        for text, ids in zip(TRICKY, Encoder(tokenizer)(TRICKY), strict=True):
            assert tokenizer.decode(ids.tolist()) == text
            assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_bytes_are_the_bytes_of_the_text(characters):
    first = characters.convert_tokens_to_ids("a") - ord("a")
    (ids,) = Encoder(characters)(["aé"])
    assert (ids.astype(int) - first).tolist() == list("aé".encode())
    assert len(characters) == 256 + 6


def test_special_tokens_have_the_first_ids_and_the_vocabulary_its_size(bpe):
    names = bpe.convert_ids_to_tokens(list(range(10)))
    assert names[:6] == ["[PAD]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "[MASK]"]
    assert names[6:] == ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "[TASK]"]
    assert len(bpe) == 360
    assert bpe.mask_token == MASK
    assert bpe("[TASK]", add_special_tokens=False)["input_ids"] == [9]


def test_cls_and_sep_are_added_only_when_asked(bpe, characters):
    assert bpe.tokenize("a b") == bpe.convert_ids_to_tokens(
        bpe("a b", add_special_tokens=False)["input_ids"]
    )
    wrapped = bpe.convert_ids_to_tokens(bpe("a", "b", add_special_tokens=True)["input_ids"])
    assert (wrapped[0], wrapped[2], wrapped[-1]) == (CLS, SEP, SEP)
    assert len(characters("ab", add_special_tokens=True)["input_ids"]) == 2


def test_the_same_sample_gives_the_same_tokenizer(bpe):
    spec = TokenizerSpec(vocabulary=360, sentinels=3, extra=("[TASK]",), template="cls_sep")
    again = train(spec, [prose(3000, s) for s in range(3)])
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    other = train(spec, [prose(3000, s) for s in range(3, 6)])
    assert content_digest(other) != content_digest(bpe)


def test_a_saved_tokenizer_loads_as_a_plain_directory(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert content_digest(loaded) == content_digest(bpe)
    assert loaded(TRICKY)["input_ids"] == bpe(TRICKY)["input_ids"]
    assert [i.tolist() for i in Encoder(loaded)(TRICKY)] == [
        i.tolist() for i in Encoder(bpe)(TRICKY)
    ]


def test_a_vocabulary_that_the_text_cannot_support_is_refused_with_numbers():
    with pytest.raises(BadInput, match=r"8 bytes of text support a vocabulary of \d+, not 5000"):
        train(TokenizerSpec(vocabulary=5000), ["abc abcd"])


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot load the tokenizer") as error:
        load(tmp_path / "none")
    assert error.value.key == "tokenizer"


def test_packed_documents_decode_to_their_texts_and_end_with_eos(bpe, tmp_path):
    batch = some_documents()
    packed = pack([batch.slice(0, 15), batch.slice(15)], bpe, tmp_path)
    given = batch.to_pylist()
    assert sorted(packed.doc_row.tolist()) == list(range(40))
    for i in range(packed.n_documents):
        row, ids = given[packed.doc_row[i]], packed.document(i)
        assert ids[-1] == end_of_document(bpe)
        assert bpe.decode(ids[:-1]) == row["text"]
        assert packed.doc_bytes[i] == len(row["text"].encode())
        assert packed.domains[packed.doc_domain[i]] == row["domain"]
    assert packed.n_bytes == sum(len(r["text"].encode()) for r in given)
    assert packed.tokens.dtype == np.uint16


def test_a_domain_is_a_contiguous_range_of_tokens(bpe, tmp_path):
    packed = pack([some_documents()], bpe, tmp_path)
    edges = [packed.domain(name) for name in packed.domains]
    assert edges[0][0] == 0
    assert edges[-1][1] == packed.n_tokens
    assert [b for _, b in edges[:-1]] == [a for a, _ in edges[1:]]
    for code, (a, b) in enumerate(edges):
        mine = packed.doc_domain == code
        assert b - a == np.diff(packed.doc_starts)[mine].sum()
    with pytest.raises(KeyError, match="d0, d1, d2"):
        packed.domain("d9")


def test_the_order_within_a_domain_does_not_depend_on_other_documents(bpe, tmp_path):
    batch = some_documents()
    ids = np.array(batch["id"].to_pylist())
    whole = pack([batch], bpe, tmp_path / "a")
    part = pack([batch.slice(0, 20)], bpe, tmp_path / "b")
    kept = whole.doc_row[whole.doc_row < 20]
    assert ids[kept].tolist() == ids[part.doc_row].tolist()
    assert kept.tolist() != sorted(kept.tolist())


def test_rewriting_in_small_pieces_gives_the_same_file(bpe, tmp_path, monkeypatch):
    whole = pack([some_documents()], bpe, tmp_path / "a")
    monkeypatch.setattr("maquette.data.packing._COPY_TOKENS", 50)
    pieces = pack([some_documents()], bpe, tmp_path / "b")
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert whole.digest == pieces.digest


def test_windows_are_slices_and_segments_count_documents_within_a_row(bpe, tmp_path):
    packed = pack([some_documents()], bpe, tmp_path)
    starts = np.array([0, 5, int(packed.doc_starts[3]), int(packed.n_tokens) - 64])
    windows, segments = packed.windows(starts, 64), packed.segments(starts, 64)
    for row, start in enumerate(starts):
        assert np.array_equal(windows[row], packed.tokens[start : start + 64])
        assert np.array_equal(windows[row], packed.window(int(start), 64))
        # A new document begins right after each end mark.
        ends = windows[row] == packed.eos_id
        assert np.array_equal(segments[row], np.concatenate([[0], np.cumsum(ends)[:-1]]))
    for bad in (-1, packed.n_tokens - 63):
        with pytest.raises(ValueError, match="must lie within"):
            packed.window(bad, 64)


def test_large_vocabularies_take_four_bytes_per_token(characters, tmp_path):
    class Large:
        def __init__(self, inner) -> None:
            self.__dict__.update(vars(inner))
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

        def __len__(self) -> int:
            return 70_000

    packed = pack([some_documents(3)], Large(characters), tmp_path)
    assert packed.tokens.dtype == np.uint32
    assert np.array_equal(
        packed.tokens, pack([some_documents(3)], characters, tmp_path / "small").tokens
    )


def test_an_empty_part_opens(characters, tmp_path):
    pack([], characters, tmp_path)
    packed = PackedTokens.open(tmp_path)
    assert (packed.n_tokens, packed.n_documents, packed.n_bytes) == (0, 0, 0)
