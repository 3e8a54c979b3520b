"""Random tokenizers from a moving queue of texts (ZeTT, arXiv:2405.07883, section 3.2).

Each is a UnigramLM over substrings of the texts' words, weighted by how often they occur and how
long they are, with noise; so a network that must embed them meets many vocabularies, none twice.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from maquette.data.tokenizers import PATTERN, byte_alphabet, byte_level_words

STRIDE = 4
"""Substrings start at every fourth character of a word."""
LONGEST = 15
"""Symbols of the longest substring, and of the longest run of white space."""
IMPOSSIBLE = -1e5
"""Score of a substring whose noisy probability is not above zero."""
_INTERNED = 1 << 20
_WORDS = re.compile(PATTERN)


def _blank_symbols() -> str:
    return "".join(byte_alphabet()[b] for b in b" \n\t")


def blank_runs() -> list[str]:
    """Runs of 2 to 15 white-space symbols: one of space, line feed or tab, then equal ones."""
    blanks = _blank_symbols()
    return [first + rest * n for rest in blanks for first in blanks for n in range(1, LONGEST)]


def word_substrings(word: str) -> list[str]:
    """Substrings of a word in byte symbols that start at character 0, 4, 8, ..., 1 to 15 long."""
    alphabet = byte_alphabet()
    symbols = ["".join(alphabet[b] for b in c.encode("utf-8", "surrogatepass")) for c in word]
    whole, starts, at = "".join(symbols), [], 0
    for index, symbol in enumerate(symbols):
        if index % STRIDE == 0:
            starts.append(at)
        at += len(symbol)
    return [
        whole[start : start + n]
        for start in starts
        for n in range(1, min(LONGEST, len(whole) - start) + 1)
    ]


@dataclass(frozen=True)
class Vocabulary:
    """Slots in the order in which a network embeds them.

    tokens: string in byte symbols, None for special and empty slots. special: source id by slot.
    """

    tokens: tuple[str | None, ...]
    special: Mapping[int, int]

    @property
    def filled(self) -> np.ndarray:
        """True where a slot holds a token, bool (V,)."""
        filled = np.array([token is not None for token in self.tokens])
        filled[list(self.special)] = True
        return filled

    def slot_of(self, source_id: int) -> int:
        """The slot of a special token, by its id in the source."""
        return next(slot for slot, index in self.special.items() if index == source_id)


@dataclass(frozen=True)
class SampledTokenizer(Vocabulary):
    """A vocabulary with a UnigramLM over it. scores: log probability by slot, 0 for no string."""

    scores: np.ndarray
    _slots: np.ndarray
    _model: Any

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Slots of each text by Viterbi segmentation, int64; special tokens never occur."""
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._slots[np.asarray(e.ids, np.int64)] for e in found]


class TokenizerSampler:
    """Counts the substrings of the last texts it was given, and samples tokenizers from them.

    queue: texts remembered, >= 1; the oldest batch leaves when a newer one needs its place (the
    paper: 2048). size: slots of a sampled vocabulary, special tokens and all 256 bytes included
    (the paper: 32,768). noise: (m, s) of sigma ~ LogNormal(ln m, s), drawn once per tokenizer, the
    spread of the noise on every probability (the paper: 1e-5, 4); None for no noise. special: ids
    that stay special; each keeps its id where it is below `size`. length_in: what a substring's
    length is counted in. `symbols`, or `utf8`: bytes of its symbols in UTF-8, so that a space
    counts two (the official code).
    """

    def __init__(
        self,
        queue: int = 256,
        size: int = 2048,
        noise: tuple[float, float] | None = (1e-5, 4.0),
        *,
        special: Iterable[int] = (),
        length_in: Literal["symbols", "utf8"] = "symbols",
    ) -> None:
        self.special = tuple(sorted(set(special)))
        least = 256 + len(blank_runs()) + len(self.special)
        if queue < 1:
            raise ValueError(f"queue must be at least 1 text, got {queue} (the paper: 2048)")
        if size <= least:
            raise ValueError(
                f"size must be above {least} (256 bytes, {len(blank_runs())} runs of white space, "
                f"{len(self.special)} special tokens), got {size} (the paper: 32768)"
            )
        if noise is not None and not (noise[0] > 0 and noise[1] >= 0):
            raise ValueError(f"noise must be (m > 0, s >= 0), got {noise} (the paper: 1e-5, 4)")
        if length_in not in ("symbols", "utf8"):
            raise ValueError(f"length_in must be `symbols` or `utf8`, got {length_in!r}")
        self.queue, self.size, self.noise, self.length_in = queue, size, noise, length_in
        self._batches: deque[tuple[int, np.ndarray, np.ndarray]] = deque()
        self._intern: dict[str, int] = {}
        self._strings: list[str] = []
        self._words: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._weight_S = np.zeros(0, np.int64)
        self._keeps_S = np.zeros(0, bool)

    # --- counting ---------------------------------------------------------------------------------

    @property
    def n_texts(self) -> int:
        return sum(n for n, _, _ in self._batches)

    def push(self, texts: Sequence[str]) -> None:
        """Add a batch of texts, and let the oldest batches go that the queue has no room for."""
        self._admit(texts)
        if len(self._strings) > max(_INTERNED, 4 * int(np.count_nonzero(self._weight_S))):
            self._compact()

    def _admit(self, texts: Sequence[str]) -> None:
        index, weight = self._counted(texts)
        self._batches.append((len(texts), index, weight))
        self._weight_S[index] += weight
        while len(self._batches) > 1 and self.n_texts > self.queue:
            _, index, weight = self._batches.popleft()
            self._weight_S[index] -= weight

    def _counted(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Distinct substrings of a batch and the weight of each."""
        words = Counter(word for text in texts for word in _WORDS.findall(f" {text}"))
        for word in words.keys() - self._words.keys():
            self._words[word] = self._learn(word)
        self._grow()
        if not words:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        parts = [self._words[word] for word in words]
        sizes = np.fromiter((len(index) for index, _ in parts), np.int64, len(parts))
        times = np.repeat(np.fromiter(words.values(), np.int64, len(parts)), sizes)
        index, place = np.unique(np.concatenate([p[0] for p in parts]), return_inverse=True)
        weights = np.concatenate([p[1] for p in parts]) * times
        # Sums stay far below 2**53, so that counting in float64 is exact.
        return index, np.bincount(place, weights, len(index)).astype(np.int64)

    def _learn(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        found = word_substrings(word)
        index = np.empty(len(found), np.int64)
        for i, string in enumerate(found):
            known = self._intern.get(string)
            if known is None:
                known = self._intern[string] = len(self._strings)
                self._strings.append(string)
            index[i] = known
        in_utf8 = self.length_in == "utf8"
        sizes = [len(s.encode()) if in_utf8 else len(s) for s in found]
        return index, np.array(sizes, np.int64)

    def _grow(self) -> None:
        new = self._strings[len(self._weight_S) :]
        blanks = _blank_symbols()
        keeps = [len(s) > 1 and sum(map(s.count, blanks)) < 2 for s in new]
        self._weight_S = np.concatenate([self._weight_S, np.zeros(len(new), np.int64)])
        self._keeps_S = np.concatenate([self._keeps_S, np.array(keeps, bool)])

    def _compact(self) -> None:
        """Forget substrings and words that have left the queue."""
        kept = np.flatnonzero(self._weight_S)
        moved = np.full(len(self._strings), -1, np.int64)
        moved[kept] = np.arange(len(kept))
        self._strings = [self._strings[i] for i in kept.tolist()]
        self._intern = {s: i for i, s in enumerate(self._strings)}
        self._words = {}
        self._weight_S, self._keeps_S = self._weight_S[kept], self._keeps_S[kept]
        self._batches = deque((n, moved[index], weight) for n, index, weight in self._batches)

    # --- sampling ---------------------------------------------------------------------------------

    def probabilities(self) -> dict[str, float]:
        """Share of each substring in the queue's weight, before noise."""
        active, p = self._active()
        return {self._strings[i]: float(x) for i, x in zip(active.tolist(), p, strict=True)}

    def _active(self) -> tuple[np.ndarray, np.ndarray]:
        active = np.flatnonzero(self._weight_S)
        if not active.size:
            raise ValueError("the queue holds no text: push some before sampling")
        weight = self._weight_S[active].astype(np.float64)
        return active, weight / weight.sum()

    def sample(self, rng: np.random.Generator) -> SampledTokenizer:
        """A tokenizer from the queue as it is. Raises ValueError while the queue is empty."""
        active, p = self._active()
        lowest = math.log(p.min())
        noisy = p
        if self.noise is not None:
            sigma = math.exp(rng.normal(math.log(self.noise[0]), self.noise[1]))
            noisy = p + sigma * rng.standard_normal(len(p))
        score = np.full(len(p), IMPOSSIBLE)
        np.log(noisy, out=score, where=noisy > 0)
        keeps = self._keeps_S[active]
        active, score = active[keeps], score[keeps]
        fixed = [*zip(byte_alphabet(), [lowest] * 256, strict=True)]
        fixed += [(run, 0.0) for run in blank_runs()]
        room = self.size - len(self.special) - len(fixed)
        if len(score) > room:
            best = np.argpartition(-score, room - 1)[:room]
            active, score = active[best], score[best]
        order = np.argsort(-score, kind="stable")
        strings = [self._strings[i] for i in active[order].tolist()]
        return self._tokenizer([*fixed, *zip(strings, score[order].tolist(), strict=True)])

    def preview(self, texts: Sequence[str], rng: np.random.Generator) -> SampledTokenizer:
        """A tokenizer as if `texts` had been pushed; the queue is left as it was."""
        batches, weight_S = deque(self._batches), self._weight_S.copy()
        try:
            self._admit(texts)
            return self.sample(rng)
        finally:
            self._batches = batches
            new = len(self._strings) - len(weight_S)
            self._weight_S = np.concatenate([weight_S, np.zeros(new, np.int64)])

    def _tokenizer(self, pieces: list[tuple[str, float]]) -> SampledTokenizer:
        from tokenizers import Tokenizer, models

        special: dict[int, int] = {i: i for i in self.special if i < self.size}
        free = (slot for slot in range(self.size - 1, -1, -1) if slot not in special)
        special |= dict(zip(free, (i for i in self.special if i >= self.size), strict=False))
        slots = np.setdiff1d(np.arange(self.size), list(special))[: len(pieces)]
        tokens: list[str | None] = [None] * self.size
        scores = np.zeros(self.size)
        for slot, (string, score) in zip(slots.tolist(), pieces, strict=True):
            tokens[slot], scores[slot] = string, score
        model = Tokenizer(models.Unigram(pieces))
        model.pre_tokenizer = byte_level_words()
        return SampledTokenizer(tuple(tokens), special, scores, slots, model)
