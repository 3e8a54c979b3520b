"""The index against the definition of an allowed token, tried on every token."""

from __future__ import annotations

import keyword

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.decoding.monitor import remaining
from maquette.decoding.vocabulary import PYTHON_BREAKS, VocabIndex, break_bytes, token_bytes

TOY = ["a", "ab", "abc", "b", "(", "abc(", "ab.", "x", "c", ".", "", "foo", " "]
EOS = 10
CPU = torch.device("cpu")


def toy_index() -> VocabIndex:
    return VocabIndex([t.encode() for t in TOY], eos_ids=[EOS])


def allowed(index: VocabIndex, constraint: frozenset[bytes]) -> set[int]:
    return set(index.allowed_ids(constraint).tolist())


def by_definition(index: VocabIndex, constraint: frozenset[bytes]) -> set[int]:
    found = set(index.eos_ids) if b"" in constraint else set()
    for i, token in enumerate(index.pieces):
        for suffix in constraint:
            prefix = bool(token) and suffix.startswith(token)
            longer = token.startswith(suffix) and len(token) > len(suffix)
            if prefix or (longer and token[len(suffix)] in index.breaks):
                found.add(i)
    return found


def test_toy_vocabulary_allows_what_the_paper_allows_at_the_start() -> None:
    ids = allowed(toy_index(), frozenset({b"abc", b"ab"}))
    assert {TOY[i] for i in ids} == {"a", "ab", "abc", "abc(", "ab."}


def test_toy_vocabulary_allows_finishing_or_going_on_after_a_shared_prefix() -> None:
    left = remaining(frozenset({b"abc", b"ab"}), b"ab")
    assert left == {b"c", b""}
    ids = allowed(toy_index(), left)
    assert {TOY[i] for i in ids} == {"c", "(", ".", " ", ""} and EOS in ids


ALPHABET = st.lists(st.sampled_from(list(b"ab_1.( \xc3\xa9\xff\x00")), max_size=4).map(bytes)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(ALPHABET, min_size=1, max_size=40),
    suffixes=st.frozensets(
        st.lists(st.sampled_from(list(b"ab_1\xc3\xa9\xff")), max_size=5).map(bytes),
        min_size=1,
        max_size=6,
    ),
)
def test_index_agrees_with_the_definition_on_every_token(
    pieces: list[bytes], suffixes: frozenset[bytes]
) -> None:
    pieces = [b"", *pieces, b"a"]
    index = VocabIndex(pieces, eos_ids=[0])
    assert allowed(index, suffixes) == by_definition(index, suffixes)


def test_every_id_of_one_string_is_allowed() -> None:
    index = VocabIndex([b"get", b"x", b"get", b"get"])
    assert allowed(index, frozenset({b"get"})) == {0, 2, 3}


def test_mask_covers_padded_heads_and_leaves_out_ids_the_head_lacks() -> None:
    index = VocabIndex([b"a", b"b", b"a"], base_size=2)
    wide = index.mask(frozenset({b"a"}), 6, CPU)
    assert wide is not None and wide.tolist() == [True, False, True, False, False, False]
    narrow = index.mask(frozenset({b"a"}), 2, CPU)
    assert narrow is not None and narrow.tolist() == [True, False]
    assert index.mask(frozenset({b"z"}), 6, CPU) is None


def test_a_tokenizer_of_another_model_is_refused() -> None:
    index = VocabIndex([b"a", b"b", b"c"], base_size=3)
    with pytest.raises(ValueError, match="another model"):
        index.mask(frozenset({b"a"}), 2, CPU)
    with pytest.raises(ValueError, match="another model"):
        index.join([0, 7])


def test_break_bytes_are_what_cannot_continue_an_identifier() -> None:
    names = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
    assert set(range(128)) - names == PYTHON_BREAKS
    assert ord("$") not in break_bytes("$") and ord("(") in break_bytes("$")


def test_byte_level_tokens_add_up_to_the_text_even_within_a_character() -> None:
    words = [f"{k} é→ x_{i}.append(y)\n" for i, k in enumerate(keyword.kwlist * 4)]
    tokenizer = train(TokenizerSpec(vocabulary=300), words)
    text = "naïve.größe → self.x\n\tif é: pass"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    index = VocabIndex.from_tokenizer(tokenizer)
    assert index.join(ids) == text.encode()
    assert index.join([tokenizer.eos_token_id, *ids]) == text.encode()
    assert index.eos_ids == {tokenizer.eos_token_id}
    assert any(len(p) == 1 and p[0] >= 0x80 for p in index.pieces)


def sentencepiece_like() -> object:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3}
    for token in ["▁", "s", "e", "l", "f", ".", "x"]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_byte_fallback_tokens_are_bytes_and_the_leading_space_is_no_text() -> None:
    tokenizer = sentencepiece_like()
    index = VocabIndex.from_tokenizer(tokenizer)
    ids = tokenizer("self.é x", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    assert index.strip(index.join(ids)) == "self.é x".encode()
    assert index.strips_space


def test_a_tokenizer_that_joins_with_spaces_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="pieces as bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words))


def test_compounds_are_the_tokens_that_go_on_behind_a_trigger() -> None:
    texts = [".", ".x", ". ", ".\n x", ".(", ".#", ".\\", "a.b", "->x", ">x", "-", "> x", "x>y", ""]
    index = VocabIndex([t.encode() for t in texts])

    def compounds(*triggers: bytes) -> set[str]:
        return {texts[i] for i in index.compounds(triggers, len(texts), CPU).tolist()}

    assert compounds(b".") == {".x", ".\n x", ".#", ".\\", "a.b"}
    assert compounds(b"->") == {"->x", ">x", "> x"}  # the sign before may end the text so far
    assert compounds(b".", b"->") == compounds(b".") | compounds(b"->")
    assert index.compounds((b".",), 2, CPU).tolist() == [1]
