"""Tokenizers: byte-level BPE trained on the corpus, plain bytes, or any Hugging Face tokenizer.

Every tokenizer is a `transformers` fast tokenizer, so that `save_pretrained` writes a plain
directory that needs nothing of this library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from maquette.errors import BadInput
from maquette.quantities import parse_bytes

PAD, BOS, EOS, CLS, SEP, MASK = "[PAD]", "[BOS]", "[EOS]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, BOS, EOS, CLS, SEP, MASK)

FROM_DEV = "bpe:dev"
"""A `bpe` of documents that no model is trained on or scored on: membership is then a matter of
the model's weights alone."""

_LETTERS = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u1fff\u2c00-\u2dff\u3005-\u3007"
    "\u3021-\u3029\u3031-\u3035\u3041-\ud7ff\uf900-\ufdff\ufe70-\ufefe\uff21-\uff3a\uff41-\uff5a"
    "\uff66-\uffdc\U00010000-\U0001cfff\U00020000-\U0003ffff"
)
_SPACES = " \t\n\r\x0b\x0c"
PATTERN = (
    f" ?[{_LETTERS}]+| ?[0-9]+| ?[^{_SPACES}0-9{_LETTERS}]+"
    f"|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)
"""Where BPE may not merge across, after GPT-2. Classes are spelt out instead of `\\p{L}` and
`\\s`, so that every regular expression engine cuts the same words."""
_MAX_CACHED_CHARS = 64
_MAX_CACHE = 300_000


class TokenizerSpec(BaseModel):
    """Which tokenizer a corpus gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str = "bpe"
    """`bpe` (trained on the corpus), `bpe:dev` (on its part `dev`), `bytes`, or the folder or hub
    name of a tokenizer."""
    vocabulary: int = Field(default=4096, ge=300)
    """Ids of a trained `bpe` in all, special tokens included."""
    sample: str = "32MB"
    """How much of the training part `bpe` is trained on, chosen by a hash of the document id."""
    sentinels: int = Field(default=0, ge=0, le=10_000)
    """Number of `<extra_id_0>`, `<extra_id_1>`, ... tokens, for span corruption."""
    extra: tuple[str, ...] = ()
    """Further special tokens."""
    template: Literal["none", "cls_sep"] = "none"
    """`cls_sep`: `add_special_tokens=True` wraps a text as [CLS] text [SEP]."""

    @field_validator("sample")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @property
    def is_trained(self) -> bool:
        return self.type in ("bpe", FROM_DEV, "bytes")

    def special_tokens(self) -> list[str]:
        """Special tokens in the order of their ids, from 0."""
        sentinels = [f"<extra_id_{i}>" for i in range(self.sentinels)]
        return list(dict.fromkeys([*SPECIAL, *sentinels, *self.extra]))


@lru_cache(maxsize=1)
def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in set(shown)]
    alphabet = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [alphabet[b] for b in range(256)]


def byte_level_words() -> Any:
    """A pre-tokenizer that cuts at `PATTERN` and writes bytes as symbols of the byte alphabet."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(spec: TokenizerSpec, texts: Iterable[str]) -> Any:
    """A `PreTrainedTokenizerFast` for `bpe` (learnt from `texts`) or `bytes` (texts unused).

    The same texts in the same order give the same tokenizer, byte for byte.
    Raises BadInput if the texts hold fewer merges than `vocabulary` asks for.
    """
    from tokenizers import Tokenizer, decoders, models, trainers

    special = spec.special_tokens()
    if spec.type == "bytes":
        names = [*special, *byte_alphabet()]
        model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
    else:
        model = models.BPE()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = byte_level_words()
    tokenizer.decoder = decoders.ByteLevel()
    if spec.type == "bytes":
        tokenizer.add_special_tokens(special)
        return _wrap(spec, tokenizer)
    n_bytes = 0

    def counted() -> Iterable[str]:
        nonlocal n_bytes
        for text in texts:
            n_bytes += len(text.encode())
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=byte_alphabet(),
    )
    tokenizer.train_from_iterator(counted(), trainer)
    reached = tokenizer.get_vocab_size()
    if reached < spec.vocabulary:
        raise BadInput(
            f"{n_bytes} bytes of text support a vocabulary of {reached}, not {spec.vocabulary}",
            key="vocabulary",
            mend=f"`workload: {{vocabulary: {reached}}}` or less, "
            "`workload: {tokenizer: bytes}`, or more text",
        )
    return _wrap(spec, tokenizer)


def _wrap(spec: TokenizerSpec, tokenizer: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if spec.template == "cls_sep":
        ids = [(t, tokenizer.token_to_id(t)) for t in (CLS, SEP)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
        extra_special_tokens=spec.special_tokens()[len(SPECIAL) :],
        clean_up_tokenization_spaces=False,
    )


def load(name: str | Path) -> Any:
    """The fast tokenizer in a folder or on the hub; runs no code that comes with it.

    Raises BadInput if it is not there, is not a fast tokenizer, or marks no end of a document.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:
        raise BadInput(
            f"cannot load the tokenizer ({str(error).splitlines()[0] if str(error) else error!r})",
            where=name,
            key="tokenizer",
            mend="give `bpe`, `bytes`, a folder that `save_pretrained` wrote, or a hub name",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "the tokenizer has no fast version",
            where=name,
            key="tokenizer",
            mend="convert it with `transformers` and save it again",
        )
    end_of_document(tokenizer)
    return tokenizer


def end_of_document(tokenizer: Any) -> int:
    """The id written between documents: the tokenizer's EOS, else its SEP."""
    for found in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if found is not None:
            return int(found)
    raise BadInput(
        "the tokenizer has neither an EOS nor a SEP token",
        where=tokenizer.name_or_path or "tokenizer",
        mend="set `eos_token` and save the tokenizer again",
    )


def content_digest(tokenizer: Any) -> str:
    """A digest of vocabulary, merges and special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None, "special": tokenizer.special_tokens_map}
    return hashlib.blake2b(
        json.dumps(state, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


def token_bytes(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes that each id stands for, int64 of shape (V,); special tokens stand for 0.

    Raises BadInput if the tokenizer is not byte-level (its tokens are no fixed strings of bytes).
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise BadInput(
            "bytes per token are known for byte-level tokenizers only",
            where=tokenizer.name_or_path or "tokenizer",
            mend="count the bytes of whole documents (`PackedTokens.doc_bytes`)",
        )
    lengths = np.zeros(len(tokenizer), np.int64)
    special = set(tokenizer.backend_tokenizer.get_added_tokens_decoder())
    for token, i in tokenizer.get_vocab().items():
        lengths[i] = 0 if i in special else len(token)
    return lengths


class Encoder:
    """Text to ids without special tokens, as fast as this tokenizer allows.

    The text of a special token inside a document is encoded as text, never as that token.
    For tokenizers trained here, words are looked up in a table that fills as they are met.
    """

    def __init__(self, tokenizer: Any, dtype: np.dtype | type = np.uint32) -> None:
        from tokenizers import Tokenizer

        self.dtype = np.dtype(dtype)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"padding": None, "truncation": None, "post_processor": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokenizer.encode_special_tokens = True
        steps = (state.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
        ours = steps[0].get("pattern") == {"Regex": PATTERN} and not state.get("normalizer")
        self._find = re.compile(PATTERN).findall if ours else None
        self._table: dict[str, bytes] = {}
        self._offset: int | None = None
        if ours and not state["model"]["merges"]:
            ids = [state["model"]["vocab"][c] for c in byte_alphabet()]
            self._offset = ids[0] if ids == list(range(ids[0], ids[0] + 256)) else None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, arrays of `dtype`."""
        if self._offset is not None:
            return [
                np.frombuffer(t.encode(), np.uint8).astype(self.dtype)
                + self.dtype.type(self._offset)
                for t in texts
            ]
        if self._find is not None:
            return [self._by_words(text) for text in texts]
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, self.dtype) for e in found]

    def _by_words(self, text: str) -> np.ndarray:
        assert self._find is not None
        words = self._find(text)
        table = self._table
        if new := set(words).difference(table):
            if len(table) + len(new) > _MAX_CACHE:
                table.clear()
                new = set(words)
            listed = list(new)
            for word, encoding in zip(
                listed,
                self._tokenizer.encode_batch_fast(listed, add_special_tokens=False),
                strict=True,
            ):
                table[word] = np.array(encoding.ids, self.dtype).tobytes()
        ids = np.frombuffer(b"".join(map(table.__getitem__, words)), self.dtype)
        for word in new:
            if len(word) > _MAX_CACHED_CHARS:
                del table[word]
        return ids
