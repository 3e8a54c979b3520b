"""Surface forms against the tokenizers' own segmentation and hand-made vocabularies."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from maquette.data.surface_forms import Decomposer, surface_forms
from maquette.data.token_strings import byte_spellings
from maquette.data.tokenizers import TokenizerSpec, byte_alphabet, train

TEXTS = ["one two three four five six seven eight nine ten eleven twelve thousand"] * 20


def byte_bpe(texts=TEXTS, vocabulary=300):
    return train(TokenizerSpec(vocabulary=vocabulary), texts)


def sentencepiece(pieces, byte_fallback=True):
    """Unigram with SentencePiece's word mark; all bytes as `<0x..>` if asked."""
    bytes_ = [(f"<0x{b:02X}>", -20.0) for b in range(256)] if byte_fallback else []
    scored = [("<unk>", 0.0), ("<pad>", 0.0), *bytes_, *pieces]
    made = Tokenizer(models.Unigram(scored, 0, byte_fallback))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def test_every_token_of_the_same_tokenizer_is_its_own_form():
    tokenizer = byte_bpe()
    ids_VM, report = surface_forms(tokenizer, tokenizer)
    assert ids_VM[:, 0].tolist() == list(range(300))
    assert (ids_VM[:, 1:] == tokenizer.pad_token_id).all()
    assert (report.single, report.cut, report.unplaced) == (300, 0, ())


def test_a_form_is_the_source_tokenizers_segmentation_of_the_token():
    source, target = byte_bpe(), byte_bpe([*TEXTS, *["nineteen twentyfour"] * 40], 312)
    ids_VM, report = surface_forms(target, source, 4)
    for token, index in target.get_vocab().items():
        if index in target.all_special_ids:
            continue
        text = target.convert_tokens_to_string([token])
        if "�" in text:
            continue
        wanted = source(text, add_special_tokens=False)["input_ids"]
        assert report.pieces_V[index] == len(wanted)
        row = [*wanted[:4], *[source.pad_token_id] * (4 - len(wanted))]
        assert ids_VM[index].tolist() == row
    assert report.cut == int((report.pieces_V > 4).sum())
    assert report.cut > 0


def test_no_prefix_space_or_special_token_enters_a_form():
    source = byte_bpe()
    cls_sep = train(TokenizerSpec(vocabulary=300, template="cls_sep"), TEXTS)
    decompose = Decomposer(cls_sep)
    ids, pieces = decompose(["one", "[PAD]"])
    plain, _ = Decomposer(source)(["one", "[PAD]"])
    assert ids.tolist() == plain.tolist()
    assert cls_sep.convert_ids_to_tokens(ids[0][: pieces[0]].tolist()) != ["Ġone"]
    assert not set(ids[1][: pieces[1]].tolist()) & set(cls_sep.all_special_ids)


def test_special_tokens_are_their_counterparts_by_role_or_by_name():
    source, target = byte_bpe(), sentencepiece([("▁the", -1.0)])
    ids_VM, report = surface_forms(target, source)
    assert ids_VM[target.pad_token_id, 0] == source.pad_token_id
    assert report.special == {target.pad_token_id: source.pad_token_id}
    assert report.unplaced == (target.unk_token_id,)  # the source has no unknown token
    assert report.pieces_V[target.unk_token_id] == 0


def test_a_sentencepiece_source_spells_words_with_its_mark_and_odd_bytes_with_byte_tokens():
    source = sentencepiece([("▁th", -1.0), ("e", -2.0), ("é", -3.0), ("▁", -4.0), ("t", -5.0)])
    a = byte_alphabet()
    half = a["é".encode()[0]]
    ids, pieces = Decomposer(source)(
        ["Ġthe", "".join(a[b] for b in "é".encode()), half, f"t{half}"]
    )
    forms = [
        source.convert_ids_to_tokens(row[:n].tolist()) for row, n in zip(ids, pieces, strict=True)
    ]
    assert forms == [["▁th", "e"], ["é"], ["<0xC3>"], ["t", "<0xC3>"]]


def test_spellings_of_two_families_agree_on_the_bytes():
    assert byte_spellings(sentencepiece([("▁é", -1.0)]))[-1] == "ĠÃ©"
    tokenizer = byte_bpe()
    spelt = byte_spellings(tokenizer)
    assert "Ġt" in spelt and len(spelt) == 300
    assert spelt[tokenizer.pad_token_id] is None


def test_what_was_asked_before_is_remembered_and_forgetting_changes_nothing(monkeypatch):
    source = byte_bpe()
    decompose = Decomposer(source)
    first, _ = decompose(["one", "two"])
    monkeypatch.setattr("maquette.data.surface_forms._KNOWN_ROWS", 3)
    again, _ = decompose(["two", "three", "one", "four"])
    np.testing.assert_array_equal(again[[2, 0]], first)


def test_what_cannot_be_decomposed_is_refused_with_the_mend():
    good = byte_bpe()
    with pytest.raises(ValueError, match="max_pieces must be at least 1, got 0"):
        Decomposer(good, 0)
    no_pad = byte_bpe()
    no_pad.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*set `pad_token`"):
        Decomposer(no_pad)
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    wordpiece = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    )
    with pytest.raises(ValueError, match=r"no strings of bytes \(wordpiece\)"):
        Decomposer(wordpiece)
    with pytest.raises(ValueError, match="fewer than 256 are left"):
        surface_forms(wordpiece, good)
    few = sentencepiece([(f"w{i}", -1.0) for i in range(300)], byte_fallback=False)
    with pytest.raises(ValueError, match=r"lacks \d+ of 256 single bytes"):
        surface_forms(few, good)


def test_a_python_only_tokenizer_is_refused():
    class Slow:
        pad_token_id = 0
        backend_tokenizer = None

        def get_vocab(self):
            return {"▁a": 0}

    with pytest.raises(ValueError, match="Python-only tokenizer without a model"):
        Decomposer(Slow())


def test_a_token_that_decomposes_to_nothing_is_named():
    alphabet = {c: i for i, c in enumerate(["[PAD]", *byte_alphabet()[:-1]])}
    bare = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    source = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"spells 1 token\(s\) with nothing"):
        Decomposer(source)([byte_alphabet()[255]])
