"""Min-K% against hand numbers, closed forms, a memorising and an untrained model."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.evaluation.membership import as_labels, evaluate
from maquette.evaluation.membership_texts import (
    apart,
    distinct,
    shared_elsewhere,
    window_of,
)
from maquette.evaluation.token_logprobs import TokenLogprobs
from maquette.methods.audit.min_k import (
    MinK,
    as_table,
    audit_model,
    lowercase_score,
    max_k,
    min_k,
    min_k_plus,
    scores,
    seen_only,
    zlib_score,
)

HAND = np.array([-0.1, -3, -0.2, -7, -0.5, -1, -0.05, -2, -0.3, -4])


def text_of(logprob, **more) -> TokenLogprobs:
    logprob = np.asarray(logprob, np.float32)
    return TokenLogprobs(np.arange(len(logprob)), logprob, **more)


@pytest.mark.parametrize(("k", "wanted"), [(0.2, -5.5), (0.3, -14 / 3), (0.5, -3.4), (1.0, -1.815)])
def test_min_k_of_ten_tokens_by_hand(k: float, wanted: float) -> None:
    assert min_k(HAND, k) == pytest.approx(wanted)


def test_perplexity_of_the_hand_case_is_the_exponential_of_minus_min_100() -> None:
    assert np.exp(-min_k(HAND, 1.0)) == pytest.approx(6.1411, abs=5e-5)


def test_min_k_rises_with_k_and_does_not_depend_on_the_order_of_tokens() -> None:
    rng = np.random.default_rng(0)
    values = -rng.exponential(2, 57)
    curve = [min_k(values, k) for k in np.linspace(0.01, 1, 40)]
    assert np.all(np.diff(curve) >= -1e-12)
    assert min_k(rng.permutation(values), 0.2) == pytest.approx(min_k(values, 0.2), abs=1e-12)


def test_the_count_of_tokens_is_floored_but_never_zero() -> None:
    assert min_k(np.array([-1.0, -2.0, -4.0]), 0.2) == -4  # floor(0.6) = 0 would be no token
    values = -np.arange(1.0, 101.0)
    assert min_k(values, 0.29) == pytest.approx(-np.arange(72, 101).mean())  # 0.29 * 100 < 29


def test_a_uniform_model_scores_minus_log_v_at_every_k() -> None:
    flat = np.full(30, -np.log(500))
    for k in (0.05, 0.2, 1.0):
        assert min_k(flat, k) == pytest.approx(-np.log(500))
    zero = np.zeros(30, np.float32)
    text = text_of(flat, mean=flat.astype(np.float32), std=zero)
    assert min_k_plus(text) == pytest.approx(0)


def test_max_k_takes_the_other_end() -> None:
    assert max_k(HAND, 0.2) == pytest.approx(-0.075)


def test_min_k_plus_standardises_before_it_picks() -> None:
    # Standardised: -1, -3, 0; the least likely token (-5) is not the most surprising one.
    text = text_of([-5, -4, -1], mean=np.array([-3.0, -1, -1]), std=np.array([2.0, 1, 1]))
    assert min_k_plus(text, 0.34) == pytest.approx(-3)
    with pytest.raises(ValueError, match="moments=True"):
        min_k_plus(text_of([-5.0]))


def test_zlib_divides_by_bytes_and_lowercase_is_one_without_capitals() -> None:
    text = "Größe " * 20
    assert zlib_score(HAND, text) == pytest.approx(-1.815 / len(zlib.compress(text.encode())))
    assert lowercase_score(HAND, HAND) == 1
    assert lowercase_score(HAND, 2 * HAND) == pytest.approx(2)
    assert np.isfinite(lowercase_score(np.zeros(3), HAND))


def test_the_ablation_leaves_out_tokens_that_training_lacks() -> None:
    seen = np.ones(10, bool)
    seen[3] = False
    assert min_k(seen_only(text_of(HAND), seen), 0.2) == pytest.approx(-4)
    assert len(seen_only(text_of(HAND), ~np.ones(10, bool))) == 10


@pytest.mark.parametrize(
    ("values", "k", "message"),
    [
        (HAND, 0.0, r"k must be in \(0, 1\]"),
        (HAND, 1.2, r"k must be in \(0, 1\]"),
        (np.array([]), 0.2, "at least one"),
        (np.array([np.nan, -1.0]), 0.2, "not a number"),
    ],
)
def test_what_has_no_min_k_is_refused(values, k, message) -> None:
    with pytest.raises(ValueError, match=message):
        min_k(values, k)


# --- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train(TokenizerSpec(type="bytes"), [])


def llama(tokenizer, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=64,
        )
    )


def noise_texts(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh"), 24)) for _ in range(n)]


def test_a_memorising_model_is_found_out_and_an_untrained_one_is_not(tokenizer) -> None:
    members, others = noise_texts(24, 1), noise_texts(24, 2)
    model, labels = llama(tokenizer), as_labels(24, 24)
    before = scores(model, tokenizer, members + others)
    bound = 2 * evaluate(before["loss"], labels, bootstrap=0).null_std
    for name in ("loss", "min-20"):
        assert abs(evaluate(before[name], labels, bootstrap=0).auc - 0.5) < bound
    ids = torch.tensor(tokenizer(members, add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = scores(model, tokenizer, members + others)
    for name in ("loss", "min-20", "min-20-plus", "zlib"):
        assert evaluate(after[name], labels, bootstrap=0).auc > 0.99


def test_a_reference_model_that_is_the_model_itself_tells_nothing(tokenizer) -> None:
    model = llama(tokenizer)
    found = scores(model, tokenizer, noise_texts(4, 0), reference=(model, tokenizer))
    np.testing.assert_allclose(found["reference"], 0, atol=1e-9)


def test_a_folder_is_audited_end_to_end(tokenizer, tmp_path) -> None:
    llama(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = np.array([f"w{i}" for i in range(50)])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 40)) for _ in range(24)]
    texts[20] = texts[3]  # a "non-member" that was trained on
    report = audit_model(tmp_path, texts[:12], texts[12:], rng=rng, length=32, bootstrap=50)
    assert "other-8" not in report.items
    assert len(report.items) == len(report.labels) == 23
    assert {"min-20", "min-20-seen", "loss", "blind"} <= set(report.detections)


# --- texts and table -----------------------------------------------------------------------------


def test_windows_have_one_length_and_depend_on_the_key_alone(tokenizer) -> None:
    text = "\n".join(f"line {i} of the text" for i in range(200))
    windows = {window_of(text, f"doc{i}", tokenizer, 64) for i in range(20)}
    assert len(windows) > 10
    assert all(len(w) == 64 and w in text and w.startswith("line") for w in windows if w)
    assert window_of(text, "doc3", tokenizer, 64) == window_of(text, "doc3", tokenizer, 64)
    assert window_of("too short", "doc", tokenizer, 64) is None


def test_groups_are_distinct_and_apart() -> None:
    long = " ".join(f"w{i}" for i in range(20))
    mine = distinct([("a", long), ("b", "other words"), ("c", long + " more")], 13)
    assert [i for i, _ in mine] == ["a", "b"]
    kept, others = apart(mine, [("x", "before " + long), ("y", "fresh text")], 13)
    assert [i for i, _ in kept] == ["a", "b"]
    assert [i for i, _ in others] == ["y"]


def test_the_mean_of_the_auc_rows_is_the_auroc_of_the_score_rows() -> None:
    rng = np.random.default_rng(0)
    labels = as_labels(30, 40)
    found = {"min-20": rng.normal(labels, 1), "loss": rng.normal(size=70).round(1)}
    table = as_table([f"t{i}" for i in range(70)], labels, found, "min-20").to_pandas()
    assert set(table.metric) <= set(MinK.metrics)
    for name, values in found.items():
        rows = table[table.metric == f"auc-{name}"]
        assert rows.item.is_unique and (rows.label == 1).all() and len(rows) == 30
        wanted = evaluate(values, labels, bootstrap=0).auc
        assert np.average(rows.value, weights=rows.weight) == pytest.approx(wanted, abs=1e-12)
        back = table[table.metric == f"score-{name}"]
        assert evaluate(back.value, back.label, bootstrap=0).auc == pytest.approx(wanted)
    assert (
        table[table.metric == "detector-auc"].value.to_numpy()
        == table[table.metric == "auc-min-20"].value.to_numpy()
    ).all()


def test_unknown_scores_and_percents_are_refused() -> None:
    with pytest.raises(ValueError, match="min-20"):
        MinK(score="mink-20")
    with pytest.raises(ValueError, match="among"):
        MinK(percents=(25,))


def test_members_and_non_members_come_from_the_two_parts_of_the_corpus(tokenizer, tmp_path) -> None:
    from maquette.data.corpus import prepare
    from maquette.parts import Ctx, Subject
    from maquette.training.ledger import Ledger

    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(300)])
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(
            "\n".join(" ".join(rng.choice(words, 12)) for _ in range(9))
        )
    corpus = prepare(
        str(folder), TokenizerSpec(type="bytes"), cache=tmp_path / "cache", held_out_fraction=0.3
    )
    ctx = Ctx(device=torch.device("cpu"), seed=0, cache=tmp_path, ledger=Ledger(), corpus=corpus)
    audit = MinK(texts=10, length=32, percents=(20,), score="loss")
    table = audit.measure(
        Subject(llama(corpus.tokenizer), corpus.tokenizer), corpus, ctx
    ).to_pandas()
    parts = {
        part: {i for b in corpus.documents(part) for i in b["id"].to_pylist()}
        for part in ("train", "held_out")
    }
    rows = table[table.metric == "score-loss"]
    assert set(rows.item[rows.label == 1]) <= parts["train"]
    assert set(rows.item[rows.label == 0]) <= parts["held_out"]
    assert (rows.label == 1).sum() == 10
    assert not table.value.isna().any()
    again = audit.measure(
        Subject(llama(corpus.tokenizer, 1), corpus.tokenizer), corpus, ctx
    ).to_pandas()
    assert set(again.item) == set(table.item)
    assert set(table.metric) == set(audit.metric_directions())
    assert "blind" in str(MinK(blind=True).metric_directions())


def test_members_that_share_words_with_another_training_text_are_dropped_like_the_others() -> None:
    words = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(5)]
    licence = " ".join(f"licence{j}" for j in range(13))
    texts = [words[0], f"{words[1]} {licence}", f"{licence} {words[2]}", words[3]]
    ids = ["a", "b", "c", "d"]
    items = [("a", words[0]), ("b", texts[1]), ("x", f"{words[4]} {licence}"), ("y", words[4])]
    assert shared_elsewhere(items, ids, texts, 13).tolist() == [False, True, True, False]
    # A window finds itself in its own document, and only another document counts.
    assert not shared_elsewhere(items, ids[:2], texts[:2], 13)[:2].any()
    assert not shared_elsewhere(items, [], [], 13).any()


def test_the_audit_drops_common_text_from_both_groups_alike(tokenizer, tmp_path) -> None:
    from maquette.data.corpus import prepare
    from maquette.parts import Subject

    rng = np.random.default_rng(1)
    names = np.array([f"word{i}" for i in range(5000)])
    licence = " ".join(f"licence{i}" for i in range(14))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        own = " ".join(rng.choice(names, 60))
        (folder / f"{i}.txt").write_text(f"{licence} {own}" if i % 2 else own)
    corpus = prepare(
        str(folder), TokenizerSpec(type="bytes"), cache=tmp_path / "cache", held_out_fraction=0.4
    )
    audit = MinK(texts=60, length=200, ngram=13)
    mine, others, _ = audit._texts(
        Subject(llama(corpus.tokenizer), corpus.tokenizer).tokenizer, corpus
    )
    assert mine and others
    assert not any("licence1" in text for _, text in mine + others)


def test_the_tokenizer_can_be_learnt_on_a_part_that_neither_group_comes_from(tmp_path) -> None:
    from maquette.data.corpus import prepare
    from maquette.errors import BadInput

    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(2)
    letters = np.array(list("abcdefgh"))
    for i in range(80):
        text = " ".join("".join(rng.choice(letters, 6)) for _ in range(60))
        (folder / f"{i}.txt").write_text(text)

    def made(kind: str, dev: float):
        spec = TokenizerSpec(type=kind, vocabulary=300)
        return prepare(
            str(folder), spec, cache=tmp_path / "cache", held_out_fraction=0.3, dev_fraction=dev
        )

    apart_, usual = made("bpe:dev", 0.3), made("bpe", 0.3)
    texts = [t for b in apart_.documents("dev") for t in b["text"].to_pylist()]
    alone = train(TokenizerSpec(vocabulary=300), texts)
    assert apart_.tokenizer.get_vocab() == alone.get_vocab() != usual.tokenizer.get_vocab()
    with pytest.raises(BadInput, match="a part that is empty"):
        made("bpe:dev", 0.0)
