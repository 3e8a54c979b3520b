"""AUROC against scipy and scikit-learn, log-probabilities against one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.evaluation.membership import (
    as_labels,
    auroc,
    blind_control,
    bootstrap_aurocs,
    delong_std,
    evaluate,
    member_wins,
    tpr_at_fpr,
)
from maquette.evaluation.overlap import near_duplicates, overlapping, repeated
from maquette.evaluation.token_logprobs import token_logprobs

WORDS = [f"word{i}" for i in range(60)]


def two_groups(seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    members, others = rng.normal(0.5, 1, 70), rng.normal(0, 1, 90)
    return (members.round(1), others.round(1)) if ties else (members, others)


@pytest.fixture(scope="module")
def tokenizer():
    return train(TokenizerSpec(type="bytes"), [])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


# --- token_logprobs ------------------------------------------------------------------------------


def direct(model, ids: list[int]) -> np.ndarray:
    """log p of every token after the first, one text, no batch, no mask."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return np.array([float(log_p[i, t]) for i, t in enumerate(ids[1:])])


def test_a_batch_gives_each_text_what_it_gets_alone(model, tokenizer) -> None:
    texts = ["ab", "a longer text of many bytes", "Größe", "x = [1, 2, 3]\n", "zz"]
    together = token_logprobs(model, tokenizer, texts, batch_size=4)
    for text, row in zip(texts, together, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row.ids.tolist() == ids[1:]
        np.testing.assert_allclose(row.logprob, direct(model, ids), atol=2e-5)


def test_a_beginning_of_text_token_lets_the_first_token_be_predicted(model, tokenizer) -> None:
    (row,) = token_logprobs(model, tokenizer, ["abc"], bos=True)
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert row.ids.tolist() == ids
    np.testing.assert_allclose(
        row.logprob, direct(model, [tokenizer.bos_token_id, *ids]), atol=2e-5
    )


def test_a_long_text_is_scored_once_per_token_with_half_a_window_of_context(
    model, tokenizer
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(37))
    (row,) = token_logprobs(model, tokenizer, [text], context=16)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = list(direct(model, ids[:16]))
    for start, stop, fresh in ((8, 24, 16), (16, 32, 24), (21, 37, 32)):
        wanted += list(direct(model, ids[start:stop])[fresh - start - 1 :])
    assert len(row) == 36
    np.testing.assert_allclose(row.logprob, wanted, atol=2e-5)


def test_moments_are_those_of_the_predicted_distribution(model, tokenizer) -> None:
    (row,) = token_logprobs(model, tokenizer, ["hello"], moments=True)
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()[:-1]
    p = np.exp(log_p)
    mean = (p * log_p).sum(1)
    np.testing.assert_allclose(row.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(row.std, np.sqrt((p * log_p**2).sum(1) - mean**2), rtol=1e-4)


def test_a_uniform_model_gives_minus_log_v_and_the_mode_of_the_model_is_kept(
    model, tokenizer
) -> None:
    import copy

    flat = copy.deepcopy(model).train()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    (row,) = token_logprobs(flat, tokenizer, ["anything"])
    np.testing.assert_allclose(row.logprob, -np.log(len(tokenizer)), rtol=1e-6)
    assert flat.training


def test_a_text_without_a_prediction_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="text 1 has 0 tokens"):
        token_logprobs(model, tokenizer, ["fine", ""])
    assert len(token_logprobs(model, tokenizer, ["a"], bos=True)[0]) == 1


# --- detection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_mann_whitney_u_over_the_number_of_pairs(ties: bool) -> None:
    members, others = two_groups(ties=ties)
    u = mannwhitneyu(members, others).statistic
    assert auroc(members, others) == pytest.approx(u / (70 * 90), abs=1e-12)
    scores = np.concatenate([members, others])
    assert auroc(members, others) == pytest.approx(roc_auc_score(as_labels(70, 90), scores))


def test_the_mean_of_member_wins_is_the_auroc_and_a_constant_score_gives_one_half() -> None:
    members, others = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    np.testing.assert_allclose(member_wins(members, others), [1, 0.5, 0.75])
    assert auroc(np.ones(4), np.ones(9)) == 0.5


def test_tpr_at_fpr_is_the_best_point_of_the_roc_curve_left_of_it() -> None:
    for seed in range(5):
        for ties in (False, True):
            members, others = two_groups(seed, ties)
            fpr, tpr, _ = roc_curve(
                as_labels(70, 90), np.concatenate([members, others]), drop_intermediate=False
            )
            for limit in (0.0, 0.05, 0.3):
                wanted = tpr[fpr <= limit + 1e-12].max()
                assert tpr_at_fpr(members, others, limit) == pytest.approx(wanted)


def test_delong_agrees_with_the_bootstrap_and_with_repeated_sampling() -> None:
    members, others = two_groups()
    boot = bootstrap_aurocs(members, others, 2000, np.random.default_rng(1))
    assert boot.mean() == pytest.approx(auroc(members, others), abs=0.005)
    assert delong_std(members, others) == pytest.approx(boot.std(), rel=0.1)
    spread = np.std([auroc(*two_groups(s)) for s in range(400)])
    assert np.mean([delong_std(*two_groups(s)) for s in range(50)]) == pytest.approx(
        spread, rel=0.12
    )


def test_one_bootstrap_resample_equals_the_auroc_of_the_resampled_scores() -> None:
    members, others = two_groups(ties=True)
    rng = np.random.default_rng(3)
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    drawn = [rng.choice(p, len(p)) for p in (place[:70], place[70:])]
    (got,) = bootstrap_aurocs(members, others, 1, np.random.default_rng(3))
    assert got == pytest.approx(auroc(values[drawn[0]], values[drawn[1]]))


def test_evaluate_reads_labels_and_gives_both_intervals() -> None:
    members, others = two_groups()
    scores, labels = np.concatenate([members, others]), as_labels(70, 90)
    shuffled = np.random.default_rng(0).permutation(160)
    normal = evaluate(scores[shuffled], labels[shuffled], bootstrap=0)
    boot = evaluate(scores, labels, rng=np.random.default_rng(0))
    assert normal.auc == boot.auc == pytest.approx(auroc(members, others))
    assert normal.low < normal.auc < normal.high
    assert boot.low == pytest.approx(normal.low, abs=0.015)
    assert normal.null_std == pytest.approx(np.sqrt(161 / (12 * 70 * 90)))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "both classes"),
        ([1.0, float("nan")], [1, 0], "not a number"),
        ([1.0], [1, 0], "one length"),
        ([1.0, 2.0], [1, 2], "0 or 1"),
    ],
)
def test_what_has_no_auroc_is_refused(scores, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(np.array(scores), np.array(labels), bootstrap=0)


# --- controls ------------------------------------------------------------------------------------


def random_texts(rng: np.random.Generator, n: int, words: list[str]) -> list[str]:
    return [" ".join(rng.choice(words, 30)) for _ in range(n)]


def test_the_blind_control_is_at_chance_on_one_source_and_high_on_two() -> None:
    rng = np.random.default_rng(0)
    labels = as_labels(80, 80)
    same = blind_control(random_texts(rng, 160, WORDS), labels, rng)
    assert abs(auroc(same[:80], same[80:]) - 0.5) < 0.15  # three standard deviations
    texts = random_texts(rng, 80, WORDS[:40]) + random_texts(rng, 80, WORDS[20:])
    differ = blind_control(texts, labels, rng)
    assert auroc(differ[:80], differ[80:]) > 0.95


def brute_pairs(a: list[str], b: list[str], n: int) -> list[tuple[int, int]]:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        if len(words) < n:
            return {tuple(words)} if words else set()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    return [(i, j) for i, x in enumerate(a) for j, y in enumerate(b) if grams(x) & grams(y)]


def test_near_duplicates_are_the_pairs_that_share_a_run_of_n_words() -> None:
    rng = np.random.default_rng(0)
    a, b = random_texts(rng, 12, WORDS), random_texts(rng, 15, WORDS)
    b[3] = " ".join(b[3].split()[:10] + a[5].split()[7:20] + b[3].split()[10:])
    b[4] = " ".join(b[4].split()[:10] + a[5].split()[7:19] + b[4].split()[10:])
    a[0] = b[0] = "short text"
    for n in (1, 2, 13):
        wanted = brute_pairs(a, b, n)
        assert list(map(tuple, near_duplicates(a, b, n))) == wanted
        assert np.flatnonzero(overlapping(a, b, n)).tolist() == sorted({i for i, _ in wanted})
    assert brute_pairs(a, b, 13) == [(0, 0), (5, 3)]


def test_repeated_marks_every_text_but_the_first_that_holds_a_run() -> None:
    rng = np.random.default_rng(0)
    texts = random_texts(rng, 8, WORDS)
    texts[2] = texts[6] = texts[1]
    texts[0] = " ".join(["again"] * 40)
    assert np.flatnonzero(repeated(texts)).tolist() == [2, 6]
    assert repeated([]).tolist() == []
