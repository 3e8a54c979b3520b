"""The tokenizer sampler against the closed form, a direct count and hand-made segmentations."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from maquette.data import tokenizer_sampler
from maquette.data.sampled_rows import (
    crops,
    encode_rows,
    frame_of,
    masked_rows,
    narrowed,
    next_token_rows,
)
from maquette.data.tokenizer_sampler import TokenizerSampler, blank_runs, word_substrings
from maquette.data.tokenizers import TokenizerSpec, byte_alphabet, byte_level_words, train

TEXTS = [
    "def add(first, second):\n    return first + second",
    "for word in words:\n\tprint(word.upper(), 'naïve – 数')",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)",
]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_probabilities_of_one_text_are_the_closed_form():
    sampler = TokenizerSampler(4, 600, None)
    sampler.push(["ab"])
    assert sampler.probabilities() == pytest.approx({"Ġ": 1 / 6, "Ġa": 2 / 6, "Ġab": 3 / 6})


def test_lengths_in_utf8_are_the_official_count_where_a_space_is_two():
    sampler = TokenizerSampler(4, 600, None, length_in="utf8")
    sampler.push(["ab"])
    assert sampler.probabilities() == pytest.approx({"Ġ": 2 / 9, "Ġa": 3 / 9, "Ġab": 4 / 9})


def by_hand(texts):
    """Weights by definition, one occurrence at a time, with the library's own pre-tokenizer."""
    weights = Counter()
    for text in texts:
        for word, (start, end) in byte_level_words().pre_tokenize_str(f" {text}"):
            whole = f" {text}"[start:end]
            at = 0
            for index, character in enumerate(whole):
                if index % 4 == 0:
                    for n in range(1, 16):
                        if at + n <= len(word):
                            weights[word[at : at + n]] += n
                at += len(character.encode())
    return weights


def test_weights_are_those_of_a_direct_count():
    sampler = TokenizerSampler(8, 600, None)
    sampler.push(TEXTS)
    wanted = by_hand(TEXTS)
    total = sum(wanted.values())
    assert sampler.probabilities() == pytest.approx({s: w / total for s, w in wanted.items()})


def test_a_substring_starts_at_every_fourth_character_and_has_at_most_15_symbols():
    found = word_substrings("abcdéfghij")
    assert {s[:1] for s in found} == {"a", byte_alphabet()["é".encode()[0]], "i"}
    assert max(map(len, word_substrings("x" * 40))) == 15


def test_the_queue_lets_the_oldest_batch_go():
    moving, fresh = TokenizerSampler(2, 600, None), TokenizerSampler(2, 600, None)
    for text in TEXTS:
        moving.push([text])
    fresh.push(TEXTS[1:])
    assert moving.n_texts == 2
    assert moving.probabilities() == fresh.probabilities()


def test_forgetting_what_left_the_queue_changes_no_probability(monkeypatch):
    monkeypatch.setattr(tokenizer_sampler, "_INTERNED", 1)
    forgetful, plain = TokenizerSampler(1, 600, None), TokenizerSampler(1, 600, None)
    for text in [*TEXTS, "ab", "b", "ab"]:
        forgetful.push([text])
    plain.push(["ab"])
    assert len(forgetful._strings) < 20
    assert forgetful.probabilities() == plain.probabilities()
    assert forgetful.sample(rng()).tokens == plain.sample(rng()).tokens


def test_a_preview_is_what_pushing_would_give_and_restores_the_queue():
    sampler, pushed = TokenizerSampler(2, 600, None), TokenizerSampler(2, 600, None)
    for text in TEXTS[:2]:
        sampler.push([text])
        pushed.push([text])
    before = sampler.probabilities()
    seen = sampler.preview(["something new altogether"], rng())
    pushed.push(["something new altogether"])
    assert seen.tokens == pushed.sample(rng()).tokens
    assert sampler.probabilities() == before
    assert sampler.n_texts == 2


def test_a_sample_holds_bytes_blank_runs_the_best_substrings_and_special_tokens_at_their_ids():
    sampler = TokenizerSampler(8, 450, None, special=[0, 5, 9000])
    sampler.push(TEXTS)
    sampled = sampler.sample(rng())
    assert len(sampled.tokens) == 450 and sampled.filled.all()
    assert {s: i for s, i in sampled.special.items() if i < 450} == {0: 0, 5: 5}
    assert sampled.slot_of(9000) == 449  # cannot keep an id beyond the vocabulary
    tokens = [t for t in sampled.tokens if t is not None]
    assert len(set(tokens)) == len(tokens) == 447
    assert set(byte_alphabet()) <= set(tokens) and set(blank_runs()) <= set(tokens)
    wanted = by_hand(TEXTS)
    others = [s for s in wanted if len(s) > 1 and sum(s.count(c) for c in "ĠĊĉ") < 2]
    room = 447 - 256 - len(blank_runs())
    chosen = set(tokens) - set(byte_alphabet()) - set(blank_runs())
    least = sorted((wanted[s] for s in others), reverse=True)[room - 1]
    assert len(chosen) == room and min(wanted[s] for s in chosen) == least
    best = max(chosen, key=lambda token: wanted[token])
    log_p = math.log(wanted[best] / sum(wanted.values()))
    assert sampled.scores[sampled.tokens.index(best)] == pytest.approx(log_p)


def test_a_small_queue_leaves_slots_empty():
    sampler = TokenizerSampler(8, 600, None)
    sampler.push(["ab"])
    sampled = sampler.sample(rng())
    assert sampled.filled.sum() == 256 + len(blank_runs()) + 2
    assert sampled.tokens[-1] is None


def test_segmentation_maximises_the_sum_of_scores():
    sampler = TokenizerSampler(8, 600, None, special=[3])
    sampler.push(TEXTS)
    sampled = sampler.sample(rng())
    scores = {t: float(s) for t, s in zip(sampled.tokens, sampled.scores, strict=True) if t}
    (slots,) = sampled.encode([TEXTS[0]])
    pieces = [sampled.tokens[i] for i in slots]
    for word, _ in byte_level_words().pre_tokenize_str(TEXTS[0]):
        best = [0.0] + [-math.inf] * len(word)
        for end in range(1, len(word) + 1):
            for start in range(max(0, end - 15), end):
                if word[start:end] in scores:
                    best[end] = max(best[end], best[start] + scores[word[start:end]])
        got, mine = "", 0.0
        while got != word:
            mine += scores[pieces[0]]
            got += pieces.pop(0)
        assert mine == pytest.approx(best[-1])
    assert not pieces


def test_any_text_is_spelt_back():
    sampler = TokenizerSampler(8, 600, special=[0])
    sampler.push(TEXTS)
    sampled = sampler.sample(rng(1))
    values = {c: b for b, c in enumerate(byte_alphabet())}
    for text in [*TEXTS, "żółć 𝄞\r\n\n  \t x"]:
        spelt = "".join(sampled.tokens[i] or "" for i in sampled.encode([text])[0])
        assert bytes(values[c] for c in spelt).decode() == text


def test_noise_makes_tokenizers_differ_and_a_seed_repeats_them():
    sampler = TokenizerSampler(8, 450, (1e-2, 0.1))
    sampler.push(TEXTS)
    one, other = sampler.sample(rng(0)), sampler.sample(rng(1))
    assert set(one.tokens) != set(other.tokens)
    assert sampler.sample(rng(0)).tokens == one.tokens
    assert one.scores.min() == tokenizer_sampler.IMPOSSIBLE or np.isfinite(one.scores).all()


def test_the_spread_of_the_noise_is_lognormal():
    sampler = TokenizerSampler(8, 500, (1e-5, 4.0))
    sampler.push(TEXTS)
    p = sampler.probabilities()

    class Recording:
        def __init__(self):
            self.inner, self.asked = rng(0), []

        def normal(self, *given):
            self.asked.append(given)
            return self.inner.normal(*given)

        def standard_normal(self, n):
            assert n == len(p)
            return np.zeros(n)

    recording = Recording()
    sampled = sampler.sample(recording)
    assert recording.asked == [(math.log(1e-5), 4.0)]  # once for the whole tokenizer
    at = sampled.tokens.index("Ġself" if "Ġself" in sampled.tokens else "self")
    assert sampled.scores[at] == pytest.approx(math.log(p[sampled.tokens[at]]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"queue": 0}, "queue must be at least 1"),
        ({"size": 300}, "size must be above"),
        ({"noise": (0.0, 4.0)}, "noise must be"),
        ({"length_in": "words"}, "length_in must be"),
    ],
)
def test_bad_settings_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        TokenizerSampler(**given)


def test_an_empty_queue_cannot_be_sampled():
    with pytest.raises(ValueError, match="the queue holds no text"):
        TokenizerSampler(4, 600).sample(rng())


# --- rows ----------------------------------------------------------------------------------------


def test_crops_go_through_all_text_in_every_epoch():
    stream = crops(["a" * 40 + "b" * 20, "c" * 10], 20, 3, rng())
    epochs = [sorted(next(stream)) for _ in range(3)]
    assert epochs == [["a" * 20, "a" * 20, "b" * 20]] * 3  # ten characters are too few
    with pytest.raises(ValueError, match="no text has 16 characters"):
        next(crops(["short"], 20, 3, rng()))


def test_a_frame_is_what_the_tokenizer_puts_around_a_text():
    wrapped = train(TokenizerSpec(type="bytes", template="cls_sep"), [])
    assert frame_of(wrapped) == ((wrapped.cls_token_id,), (wrapped.sep_token_id,))
    assert frame_of(train(TokenizerSpec(type="bytes"), [])) == ((), ())


def sampled_rows(size=600, length=24):
    sampler = TokenizerSampler(8, size, None, special=[0, 1, 2, 3])
    sampler.push(TEXTS)
    sampled = sampler.sample(rng())
    ids, real = encode_rows(sampled, ["ab", TEXTS[2]], length, 0, ((1,), (2,)))
    return sampled, ids, real


def test_rows_are_framed_cut_and_padded():
    sampled, ids, real = sampled_rows()
    assert ids.shape == (2, 24)
    assert ids[0][real[0]].tolist() == [1, *sampled.encode(["ab"])[0].tolist(), 2]
    assert (ids[0][~real[0]] == 0).all()
    assert real[1].all() and ids[1, 0] == 1 and ids[1, -1] == 2
    with pytest.raises(ValueError, match="room for 2 tokens"):
        encode_rows(sampled, ["ab"], 3, 0, ((1,), (2,)))


def test_padding_is_never_a_target_and_the_last_position_predicts_nothing():
    _, ids, real = sampled_rows()
    rows = next_token_rows(ids, real)
    n = int(real[0].sum())
    assert rows.labels_BT[0, : n - 1].tolist() == ids[0, 1:n].tolist()
    assert (rows.labels_BT[0, n - 1 :] == -100).all()
    assert rows.labels_BT[1, -1] == -100


def test_masked_rows_hide_text_only_and_ask_for_what_they_hid():
    sampled, ids, real = sampled_rows()
    rows = masked_rows(ids, real, sampled, 3, 0.3, rng())
    asked = rows.labels_BT != -100
    assert (rows.labels_BT[asked] == ids[asked]).all()
    assert not (asked & (~real | np.isin(ids, [0, 1, 2]))).any()
    assert (rows.ids_BT[~asked] == ids[~asked]).all()
    assert asked[1].sum() == round(0.3 * 24)


@pytest.mark.parametrize("special", [[0, 1, 2, 3], [0, 1, 2, 599]])
def test_a_narrowed_vocabulary_says_the_same_in_fewer_slots(special):
    sampler = TokenizerSampler(8, 600, None, special=special)
    sampler.push(TEXTS)
    sampled = sampler.sample(rng())
    ids, real = encode_rows(sampled, TEXTS, 24, 0, ((1,), (2,)))
    rows = next_token_rows(ids, real)
    vocabulary, few = narrowed(sampled, rows, 200, rng())
    assert len(vocabulary.tokens) == 200 and vocabulary.filled.all()
    assert set(vocabulary.special.values()) == set(special)
    assert all(s == i for s, i in vocabulary.special.items() if i < 200)

    def said(tokens, special, ids):
        return [tokens[i] or special[i] for i in ids.flatten().tolist()]

    assert said(vocabulary.tokens, vocabulary.special, few.ids_BT) == said(
        sampled.tokens, sampled.special, rows.ids_BT
    )
    kept = few.labels_BT != -100
    assert (kept == (rows.labels_BT != -100)).all()
    assert said(vocabulary.tokens, vocabulary.special, few.labels_BT[kept]) == said(
        sampled.tokens, sampled.special, rows.labels_BT[kept]
    )
    with pytest.raises(ValueError, match="embedded must be at least"):
        narrowed(sampled, rows, 10, rng())
    assert narrowed(sampled, rows, 600, rng())[1] is rows
