"""New embedding rows from source rows that are alike in some outer space.

OFA (arXiv:2311.08849): the nearest source tokens by the vectors of the words they spell. FOCUS
(arXiv:2305.14481): the shared tokens, by vectors of the target's own tokens.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maquette.data.token_strings import n_rows
from maquette.data.word_vectors import WordVectors
from maquette.training.embedding_init import (
    COPIED,
    FUZZY,
    Transfer,
    from_copies,
    overlap,
    subword_vectors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIMILARITIES_PER_CHUNK = 1 << 26


def neighbours(
    target_Nd: Tensor, source_Md: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The k nearest source vectors by cosine, and softmax(cosine / temperature) over them.

    Returns int64 (N, k), nearest first, and float32 (N, k). Vectors must not be zero. Step 4;
    worked off in chunks of rows, so that the (N, M) matrix never exists.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature} (the paper uses 0.1)")
    if not 1 <= k <= len(source_Md):
        raise ValueError(f"k must be in [1, {len(source_Md)}], got {k} (the paper uses 10)")
    source = torch.nn.functional.normalize(source_Md.float(), dim=1, eps=0.0)
    target = torch.nn.functional.normalize(target_Nd.float(), dim=1, eps=0.0)
    found, weights = [], []
    for rows in target.split(max(1, _SIMILARITIES_PER_CHUNK // len(source))):
        cosine, index = (rows @ source.T).topk(k, dim=1)
        found.append(index)
        weights.append(torch.softmax(cosine / temperature, dim=1))
    if not found:
        return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
    return torch.cat(found), torch.cat(weights)


def ofa_transfer(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    word_vectors: WordVectors,
    *,
    k: int = 10,
    temperature: float = 0.1,
    fuzzy: bool = True,
    device: torch.device | str = "cpu",
) -> Transfer:
    """Steps 2 to 5: which source rows each target row is made of.

    k is clipped, with a warning, to the number of covered source tokens.
    Raises ValueError if no token is shared and none can be interpolated: the result would be a
    random table.
    """
    copied, how = overlap(source_tokenizer, target_tokenizer, fuzzy=fuzzy)
    u_s, covered_s = subword_vectors(source_tokenizer, word_vectors)
    u_t, covered_t = subword_vectors(target_tokenizer, word_vectors)
    rows = np.flatnonzero((copied < 0) & covered_t)
    near = np.flatnonzero(covered_s)
    if near.size == 0:
        rows = rows[:0]
    if rows.size == 0 and not np.isin(how, (COPIED, FUZZY)).any():
        raise ValueError(
            "the vocabularies share no token and the word vectors cover none: "
            "the table would be random; give word vectors of the languages of both tokenizers"
        )
    used = min(k, near.size)
    if used < k and rows.size:
        warnings.warn(
            f"k = {k} neighbours asked, but the word vectors cover {near.size} source tokens",
            stacklevel=2,
        )
    terms: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    if rows.size:
        index, weight = neighbours(
            torch.from_numpy(u_t[rows]).to(device),
            torch.from_numpy(u_s[near]).to(device),
            used,
            temperature,
        )
        sources = near[index.cpu().numpy()]
        weights = weight.cpu().numpy()
        examples = _examples(source_tokenizer, target_tokenizer, rows, sources, weights)
        terms = {
            "new_rows": np.repeat(rows, used),
            "sources": sources.ravel(),
            "weights": weights.ravel(),
        }
    return from_copies(
        copied,
        how,
        len(u_s),
        **terms,
        source_coverage=float(covered_s.mean()),
        target_coverage=float(covered_t.mean()),
        k=used,
        examples=examples,
    )


def sparsemax(scores: Tensor) -> Tensor:
    """The projection of each row onto the simplex (Martins and Astudillo, 2016, algorithm 1).

    scores: (..., K). Returns weights >= 0 that sum to 1, exactly 0 for all but the highest scores:
    max(z - tau, 0) with tau = (sum of the k highest - 1) / k for the largest k such that
    1 + k z_(k) > the sum of the k highest.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    k = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    total = ordered.cumsum(dim=-1)
    last = (1 + k * ordered > total).sum(dim=-1, keepdim=True)
    tau = (total.gather(-1, last - 1) - 1) / last
    return (scores - tau).clamp(min=0)


def focus_transfer(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    vectors_Vd: np.ndarray,
    covered_V: np.ndarray,
    *,
    fuzzy: bool = True,
    device: torch.device | str = "cpu",
) -> Transfer:
    """Shared tokens are copied; a new one is the sparsemax of its cosines with them.

    vectors_Vd: a vector of each target token, float32. covered_V: False where there is none; such
    a new token is drawn, such a shared one is nobody's neighbour.
    Raises ValueError if no shared token has a vector.
    """
    copied, how = overlap(source_tokenizer, target_tokenizer, fuzzy=fuzzy)
    has_vector = covered_V & (np.linalg.norm(vectors_Vd, axis=1) > 0)
    shared = np.flatnonzero(np.isin(how, (COPIED, FUZZY)) & has_vector)
    if shared.size == 0:
        raise ValueError(
            "no token that the vocabularies share occurs often enough in the text to have a "
            "vector: give text of the target, or use a rule that needs none (`fvt`)"
        )
    rows = np.flatnonzero((copied < 0) & has_vector)
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors_Vd).to(device), dim=1)
    anchors = unit[torch.from_numpy(shared).to(device)]
    new_rows, sources, weights = [], [], []
    chunk = max(1, _SIMILARITIES_PER_CHUNK // shared.size)
    for start in range(0, rows.size, chunk):
        here = rows[start : start + chunk]
        shares = sparsemax(unit[torch.from_numpy(here).to(device)] @ anchors.T).cpu().numpy()
        row, column = np.nonzero(shares)
        new_rows.append(here[row])
        sources.append(copied[shared[column]])
        weights.append(shares[row, column])
    terms: dict[str, Any] = {}
    if rows.size:
        terms = {
            "new_rows": np.concatenate(new_rows),
            "sources": np.concatenate(sources),
            "weights": np.concatenate(weights),
        }
    return from_copies(
        copied,
        how,
        n_rows(source_tokenizer),
        **terms,
        target_coverage=float(covered_V.mean()),
        anchors=int(shared.size),
    )


def _examples(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    rows: np.ndarray,
    sources: np.ndarray,
    weights: np.ndarray,
    n: int = 20,
) -> list[dict[str, Any]]:
    """The n interpolated tokens that lean most on one neighbour, for a person to judge."""
    top = np.argsort(-weights[:, 0], kind="stable")[:n]
    return [
        {
            "token": target.convert_ids_to_tokens(int(rows[i])),
            "neighbours": [
                (source.convert_ids_to_tokens(int(s)), round(float(w), 4))
                for s, w in zip(sources[i], weights[i], strict=True)
            ],
        }
        for i in top
    ]
