"""What a corpus looks like after an intervention, and what the intervention did to every slice.

After the feature tables and delta matrices of Longpre et al. (2023, arXiv:2305.13169).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from maquette.data.documents import byte_lengths
from maquette.data.scores import kept_rows

_WORD = re.compile(r"\w+")
# A run of signs is tried from its beginning only: from each of them takes time in its square.
_SENTENCE = re.compile(r"(?<![.!?])[.!?]++(?:\s|$)")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]+\.[\w.-]*\w")
_IPV4 = re.compile(
    r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"
)


def type_token_ratio(words: Sequence[str], window: int = 1000) -> float:
    """Distinct words over words, as a mean over consecutive windows of `window` words.

    The plain ratio falls with the length of a text, so corpora of different size could not be
    compared. A last, shorter window counts only when it is the only one. NaN without words.
    """
    if not words:
        return math.nan
    starts = range(0, max(1, len(words) - window + 1), window)
    return float(np.mean([len(set(c)) / len(c) for c in (words[s : s + window] for s in starts)]))


def corpus_features(table: pa.Table, window: int = 1000) -> dict[str, float]:
    """Features of the kept documents of a table of documents.

    Returns documents, bytes, words per document, characters per word, words per sentence,
    type-token ratio (lower-cased words), share of non-ASCII characters, e-mail and IPv4 addresses
    per MB, and `mean_<column>` of every score column. NaN where nothing was there to measure.
    """
    keep = kept_rows(table)
    table = table.filter(pa.array(keep))
    n_bytes = int(byte_lengths(table).sum())
    chars = non_ascii = n_words = word_chars = sentences = personal = 0
    ratios: list[float] = []
    pending: list[str] = []
    for text in (t.as_py() for t in table.column("text")):
        words = _WORD.findall(text.lower())
        chars += len(text)
        non_ascii += 0 if text.isascii() else sum(1 for c in text if ord(c) > 127)
        n_words += len(words)
        word_chars += sum(map(len, words))
        sentences += max(1, sum(1 for _ in _SENTENCE.finditer(text))) if words else 0
        personal += sum(1 for _ in _EMAIL.finditer(text)) + sum(1 for _ in _IPV4.finditer(text))
        pending += words
        while len(pending) >= window:
            ratios.append(len(set(pending[:window])) / window)
            pending = pending[window:]
    features = {
        "documents": float(table.num_rows),
        "bytes": float(n_bytes),
        "words_per_document": _ratio(n_words, table.num_rows),
        "characters_per_word": _ratio(word_chars, n_words),
        "words_per_sentence": _ratio(n_words, sentences),
        "type_token_ratio": float(np.mean(ratios)) if ratios else type_token_ratio(pending, window),
        "non_ascii_share": _ratio(non_ascii, chars),
        "addresses_per_mb": _ratio(personal * 1e6, n_bytes),
    }
    for field in table.schema:
        if pa.types.is_floating(field.type):
            column = table.column(field.name).drop_null()
            values = column.to_numpy() if len(column) else np.array([math.nan])
            features[f"mean_{field.name}"] = float(values.mean())
    return features


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def feature_table(arms: Mapping[str, pa.Table]) -> pa.Table:
    """`corpus_features` of every arm: a column `arm` and one per feature, NaN where absent."""
    rows = {arm: corpus_features(table) for arm, table in arms.items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = {"arm": pa.array(list(rows), pa.string())}
    for name in names:
        columns[name] = pa.array([r.get(name, math.nan) for r in rows.values()], pa.float64())
    return pa.table(columns)


@dataclass(frozen=True)
class ArmData:
    """kept_bytes, kept_tokens: size of an arm's corpus. seen_tokens: tokens it trained on."""

    kept_bytes: int
    kept_tokens: int
    seen_tokens: int


def intervention_matrix(
    slices: Mapping[str, Mapping[str, float]],
    data: Mapping[str, ArmData],
    baseline: str,
) -> pa.Table:
    """Arms x slices: what every intervention did to every slice.

    slices: {arm: {slice: score}}; a slice an arm lacks is NaN. data: facts of each arm.
    Returns columns `arm`, `kept_fraction` (of the baseline's bytes), `unique_tokens`, `epochs`
    (tokens seen over tokens kept) and per slice the score minus the baseline's; the baseline's
    own row holds its plain scores.
    Raises ValueError if the baseline or the facts of an arm are missing.
    """
    if baseline not in slices:
        raise ValueError(f"baseline `{baseline}` is not among the arms {sorted(slices)}")
    if missing := sorted(set(slices) - set(data)):
        raise ValueError(f"no facts about the data of the arms {missing}")
    arms = [baseline, *(a for a in slices if a != baseline)]
    names = list(dict.fromkeys(n for arm in arms for n in slices[arm]))
    columns: dict[str, pa.Array] = {
        "arm": pa.array(arms, pa.string()),
        "kept_fraction": pa.array(
            [_ratio(data[a].kept_bytes, data[baseline].kept_bytes) for a in arms], pa.float64()
        ),
        "unique_tokens": pa.array([data[a].kept_tokens for a in arms], pa.int64()),
        "epochs": pa.array(
            [_ratio(data[a].seen_tokens, data[a].kept_tokens) for a in arms], pa.float64()
        ),
    }
    for name in names:
        base = slices[baseline].get(name, math.nan)
        values = [slices[a].get(name, math.nan) - (0.0 if a == baseline else base) for a in arms]
        columns[name] = pa.array(values, pa.float64())
    return pa.table(columns)
