import tracemalloc

import numpy as np
import pytest

from maquette.data import dedup
from maquette.data.documents import documents, hash_ids
from maquette.data.split import DEV, HELD_OUT, TRAIN, split


def words(rng: np.random.Generator, n: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, 50_000, n)]


def shingle_set(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + 5]) for i in range(len(text) - 4)}


def pairs(rng: np.random.Generator) -> list[tuple[list[str], list[str]]]:
    """Pairs of texts that share a beginning of varying length."""
    found = []
    for share in np.linspace(0.05, 0.95, 60):
        common, n = words(rng, int(2000 * share)), int(2000 * (1 - share))
        found.append((common + words(rng, n), common + words(rng, n)))
    return found


def test_estimated_jaccard_agrees_with_the_shingle_sets_and_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    ours, theirs, true = [], [], []
    for left, right in pairs(rng):
        a, b = shingle_set(left), shingle_set(right)
        true.append(len(a & b) / len(a | b))
        sigs = dedup.signatures([" ".join(left), " ".join(right)])
        ours.append(dedup.jaccard_estimate(sigs[0], sigs[1]))
        sketches = []
        for shingles in (a, b):
            sketch = datasketch.MinHash(128, seed=1)
            sketch.update_batch([" ".join(s).encode() for s in shingles])
            sketches.append(sketch)
        theirs.append(sketches[0].jaccard(sketches[1]))
    true, ours, theirs = map(np.array, (true, ours, theirs))
    deviation = np.sqrt(true * (1 - true) / 128)
    assert np.all(np.abs(ours - true) < 4.5 * deviation)
    # Two independent estimates: their difference has twice the variance.
    assert np.all(np.abs(ours - theirs) < 4.5 * np.sqrt(2) * deviation)
    assert abs(np.mean((ours - true) / deviation)) < 4 / np.sqrt(len(true))


def test_documents_with_fewer_shingles_than_bins_are_estimated_without_bias():
    rng = np.random.default_rng(1)
    estimates, true = [], []
    for _ in range(400):
        common = words(rng, 24)
        left, right = common + words(rng, 10), common + words(rng, 10)
        a, b = shingle_set(left), shingle_set(right)
        true.append(len(a & b) / len(a | b))
        sigs = dedup.signatures([" ".join(left), " ".join(right)])
        estimates.append(dedup.jaccard_estimate(sigs[0], sigs[1]))
    error = np.array(estimates) - np.array(true)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(error))


def test_a_signature_does_not_depend_on_the_other_texts():
    rng = np.random.default_rng(2)
    texts = [" ".join(words(rng, n)) for n in (3, 0, 500, 4, 5, 6, 40_000, 1)]
    together = dedup.signatures(texts)
    for i, text in enumerate(texts):
        assert np.array_equal(together[i], dedup.signatures([text])[0])


def test_case_white_space_and_punctuation_do_not_matter_but_words_do():
    a, b, c = dedup.signatures(
        ["One two, three four FIVE six!", "one  two\nthree (four) five six", "one two three four"]
    )
    assert dedup.jaccard_estimate(a, b) == 1
    assert dedup.jaccard_estimate(a, c) < 0.2


def test_texts_without_spaces_between_words_have_more_than_one_shingle():
    text = "".join(chr(0x4E00 + i) for i in np.random.default_rng(3).integers(0, 5000, 400))
    a, b = dedup.signatures([text, text[:360]])
    assert 0.75 < dedup.jaccard_estimate(a, b) < 1


def test_texts_without_words_match_only_themselves():
    sigs = dedup.signatures(["!!!", "!!!", "???"])
    assert dedup.jaccard_estimate(sigs[0], sigs[1]) == 1
    assert dedup.jaccard_estimate(sigs[0], sigs[2]) < 0.1


def test_bands_find_pairs_at_the_threshold_with_the_recall_asked_for():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        count, rows = dedup.bands(threshold)
        assert count * rows <= dedup.N_BINS
        assert 1 - (1 - threshold**rows) ** count >= 0.99


def test_planted_near_duplicates_are_clustered_and_unrelated_texts_are_not():
    rng = np.random.default_rng(4)
    originals = [words(rng, 600) for _ in range(150)]
    copies = []
    for text in originals[:50]:
        changed = list(text)
        for i in rng.integers(0, len(text), 4):
            changed[i] = "changed"
        copies.append(changed)  # true Jaccard about 0.94
    sigs = dedup.signatures([" ".join(t) for t in originals + copies])
    found = dedup.clusters(sigs, 0.8)
    assert np.array_equal(found[:150], np.arange(150))
    assert np.array_equal(found[150:], np.arange(50))


def test_clusters_are_transitive_and_do_not_depend_on_the_order_of_documents():
    rng = np.random.default_rng(5)
    chain = [words(rng, 2000)]
    for step in range(5):
        following = list(chain[-1])
        following[step * 100 : step * 100 + 100] = words(rng, 100)
        chain.append(following)
    texts = [" ".join(t) for t in [*chain, words(rng, 300)]]
    sigs = dedup.signatures(texts)
    assert np.array_equal(dedup.clusters(sigs, 0.8), [0, 0, 0, 0, 0, 0, 6])
    back = dedup.clusters(sigs[::-1], 0.8)
    assert np.array_equal(back, [0, 1, 1, 1, 1, 1, 1])


@pytest.fixture
def related(tmp_path) -> np.ndarray:
    """3000 signatures, a third of them changed copies of earlier ones, many copies of one."""
    rng = np.random.default_rng(3)
    sigs = rng.integers(0, 2**32, (3000, dedup.N_BINS), dtype=np.uint32)
    for row in range(2000, 3000):
        sigs[row] = sigs[int(rng.integers(0, 40 if row % 2 else row))]
        changed = rng.choice(dedup.N_BINS, int(rng.integers(0, 40)), replace=False)
        sigs[row, changed] = rng.integers(0, 2**32, len(changed), dtype=np.uint32)
    return sigs


def test_clusters_from_disk_and_by_buckets_are_those_from_memory(related, tmp_path, monkeypatch):
    whole = dedup.clusters(related, 0.8)
    assert 500 < (whole != np.arange(3000)).sum() < 1000
    (tmp_path / "signatures").write_bytes(related.tobytes())
    stored = dedup.SignatureFile(tmp_path / "signatures")
    assert np.array_equal(dedup.clusters(stored, 0.8), whole)
    monkeypatch.setattr(dedup, "_BUCKET_ROWS", 100)
    monkeypatch.setattr(dedup, "_ROWS", 64)
    assert np.array_equal(dedup.clusters(stored, 0.8), whole)


def test_a_file_of_signatures_reads_like_an_array(related, tmp_path):
    (tmp_path / "signatures").write_bytes(related.tobytes())
    stored = dedup.SignatureFile(tmp_path / "signatures")
    assert len(stored) == 3000
    rows = np.array([2999, 0, 7, 7])
    assert np.array_equal(stored[rows], related[rows])
    assert np.array_equal(stored[2990:4000, 3:9], related[2990:4000, 3:9])


def test_memory_of_clustering_is_some_bytes_per_document_whatever_a_signature_weighs(tmp_path):
    n = 120_000
    rng = np.random.default_rng(0)
    with (tmp_path / "signatures").open("wb") as out:
        for _ in range(n // 10_000):
            sigs = rng.integers(0, 2**32, (10_000, dedup.N_BINS), dtype=np.uint32)
            sigs[::20] = sigs[1::20]
            out.write(sigs.tobytes())
    stored = dedup.SignatureFile(tmp_path / "signatures")
    tracemalloc.start()
    try:
        labels = dedup.clusters(stored, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (labels != np.arange(n)).sum() == n // 20
    constant = 3 * dedup._ROWS * 4 * dedup.N_BINS
    assert peak < constant + 100 * n < n * 4 * dedup.N_BINS / 2


def test_a_sketch_holds_what_was_computed_and_keeps_the_order(tmp_path):
    texts = ["one two three four five six", "one  two three four five six", "seven", "one"]
    with dedup.SketchFile(tmp_path / "sketch") as file:
        for start in (0, 3):
            here = slice(start, start + 3)
            ids = [f"d{n}" for n in range(4)][here]
            file.add(dedup.Sketch()(documents(ids, texts[here])))
        assert file.n_documents == 4
        assert all(rows.flags.owndata for rows in (*file._keys, *file._exact))
        assert np.array_equal(file.keys(), hash_ids([f"d{n}" for n in range(4)]))
        equal = file.equal_texts()
        assert equal[0] == equal[1]
        assert len(set(equal.tolist())) == 3
        assert np.array_equal(file.signatures()[0:4, 0:128], dedup.signatures(texts))
    assert not (tmp_path / "sketch").exists()


def test_texts_whose_hashes_agree_in_one_half_are_not_equal(tmp_path):
    halves = np.array([[1, 7], [2, 7], [1, 7], [1, 8], [2, 7]], np.uint64)
    with dedup.SketchFile(tmp_path / "sketch") as file:
        file._exact, file.n_documents = [halves[:2], halves[2:]], 5
        group = file.equal_texts()
    assert (group[:, None] == group[None]).tolist() == (halves[:, None] == halves[None]).all(
        -1
    ).tolist()
    assert set(group.tolist()) == {0, 1, 2}


def test_exact_keys_ignore_white_space_and_unicode_composition_only():
    keys = dedup.exact_keys(["a b\n", " a  b", "a B", "caf\u00e9", "cafe\u0301"])
    same = (keys[:, None] == keys[None]).all(-1)
    assert same[0, 1]
    assert same[3, 4]
    assert same.sum() == 5 + 4


def test_thresholds_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="threshold must be in"):
        dedup.bands(1.5)


def test_a_cluster_is_never_divided_and_large_ones_are_not_favoured():
    rng = np.random.default_rng(6)
    cluster = rng.integers(0, 4000, 40_000)
    part = split([f"doc{i}" for i in range(40_000)], cluster, 0.1, 0.1)
    whole = np.zeros((4000, 3), bool)
    whole[cluster, part] = True
    assert whole.sum(1).max() == 1
    for code, expected in ((TRAIN, 0.8), (HELD_OUT, 0.1), (DEV, 0.1)):
        share = whole[:, code].sum() / 4000
        assert abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4000)


def test_documents_stay_in_their_part_when_others_are_added():
    ids = [f"doc{i}" for i in range(3000)]
    before = split(ids[:1000], np.arange(1000), 0.2)
    assert np.array_equal(split(ids, np.arange(3000), 0.2)[:1000], before)
    held = split(ids, np.arange(3000), 0.1)[:1000] == HELD_OUT
    assert np.all(before[held] == HELD_OUT)


def test_fractions_that_leave_no_training_are_refused():
    with pytest.raises(ValueError, match="sum to less than 1"):
        split(["a"], np.zeros(1, np.int64), 0.6, 0.4)
