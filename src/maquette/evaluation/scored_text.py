"""Which held-out text a causal model is scored on: a stretch of many documents.

Documents are the items of a verdict, weighted by their bytes. Were they scored whole, the few
longest would be most of the text: ten of them count for more than the other hundred, and an
interval over items is then as wide as one over ten. A stretch of each, as long at most as
`document_tokens`, spends the same tokens on several times as many documents. It is chosen by a
hash of the document's id and cut from its text, so every arm and every tokenizer is scored on the
same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from maquette.data.corpus import Corpus
from maquette.data.dedup import mix64
from maquette.data.documents import hash64
from maquette.data.packing import PackedTokens
from maquette.errors import BadInput
from maquette.parts import Audit, Ctx, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOMINAL_BYTES = 3
"""Bytes of text a token is reckoned as when text is chosen, whatever the tokenizer."""
MOST_UNKNOWN = 0.001
_SPACE = re.compile(r"\s")
_CASES = "Aa"


def stretch(text: str, name: str, n_bytes: int) -> str:
    """At most `n_bytes` of UTF-8 out of `text`, from a place that a hash of `name` chooses.

    A text that is no longer comes whole. Otherwise the stretch begins after white space if there is
    some in its first quarter, so that it need not begin within a word; characters stay whole.
    """
    raw = text.encode()
    if len(raw) <= n_bytes:
        return text
    start = hash64(name, b"stretch") % (len(raw) - n_bytes + 1)
    found = raw[start : start + n_bytes].decode(errors="ignore")
    space = _SPACE.search(found, 0, len(found) // 4) if start else None
    return found[space.end() :] if space else found


def stretches(batches: Iterable[pa.RecordBatch], n_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same documents, in the same order, each with its `stretch` for a text."""
    for batch in batches:
        names, texts = batch["id"].to_pylist(), batch["text"].to_pylist()
        cut = [stretch(text, name, n_bytes) for text, name in zip(texts, names, strict=True)]
        at = batch.schema.get_field_index("text")
        yield batch.set_column(at, batch.schema.field(at), pa.array(cut, pa.large_string()))


def chosen_documents(
    part: PackedTokens,
    max_tokens: int,
    domains: Collection[str] | None = None,
    numbers: Collection[int] | None = None,
) -> np.ndarray:
    """Numbers of the documents to score, int64 ascending: the first by a hash, up to the limit.

    max_tokens: a token is reckoned as 3 bytes of text, so that the choice is the same under every
    tokenizer. At least one document is taken; documents without text are not. domains, numbers: of
    these domains, and of these numbers in the part's file, alone.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    wanted = np.array([domains is None or name in domains for name in part.domains], bool)
    usable = (part.doc_bytes > 0) & wanted[part.doc_domain]
    if numbers is not None:
        usable &= np.isin(part.doc_row, np.fromiter(numbers, np.int64))
    full = np.flatnonzero(usable)
    order = full[np.argsort(mix64(part.doc_row[full].astype(np.uint64)), kind="stable")]
    total = np.cumsum(part.doc_bytes[order])
    n = max(1, int(np.searchsorted(total, max_tokens * NOMINAL_BYTES, side="right")))
    return np.sort(order[:n])


def held_out_tokens(
    subject: Subject, data: Corpus, ctx: Ctx, document_tokens: int | None = None
) -> PackedTokens:
    """The held-out part in the subject's own vocabulary.

    document_tokens: of each document a `stretch` of that many tokens, reckoned as 3 bytes; None
    takes documents whole. What is not the corpus's own encoding is made once and cached.
    """
    from maquette.data.cache import built_once, digest
    from maquette.data.packing import pack
    from maquette.data.table import stored
    from maquette.data.tokenizers import content_digest

    own = content_digest(subject.tokenizer)
    n_bytes = None if document_tokens is None else document_tokens * NOMINAL_BYTES
    whole = n_bytes is None or int(data.held_out.doc_bytes.max(initial=0)) <= n_bytes
    if whole and own == content_digest(data.tokenizer):
        return data.held_out
    source, _ = data.parts["held_out"]

    def build(folder: Path) -> dict[str, str]:
        batches = stored(source, ["id", "text", "domain"])
        if n_bytes is not None and not whole:
            batches = stretches(batches, n_bytes)
        return {"digest": pack(batches, subject.tokenizer, folder).digest}

    facts = (data.held_out.digest, data.name_of("held_out"))
    key = digest(*facts, own, *([] if whole else [n_bytes]))
    return PackedTokens.open(built_once(ctx.cache, f"tokens-{key}", build))


def refuse_lossy(tokenizer: PreTrainedTokenizerBase, part: PackedTokens) -> None:
    """BadInput for a tokenizer whose ids do not tell the text, which then seems easy to predict.

    part: text in its ids. Up to a thousandth of the tokens may stand for unknown text.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = (state.get("decoder") or {}).get("type")
    if decoder == "ByteLevel" and state.get("normalizer") is None:
        return
    unknown = tokenizer.unk_token_id
    share = 0.0 if unknown is None else float((part.tokens == unknown).mean())
    ids = tokenizer(_CASES, add_special_tokens=False)["input_ids"]
    folded = tokenizer.decode(ids).replace(" ", "")
    if share > MOST_UNKNOWN:
        loss = (
            f"{share:.1%} of the tokens are `{tokenizer.unk_token}`, whatever text they stand for"
        )
    elif folded != _CASES and folded.casefold() == _CASES.casefold():
        loss = "it does not tell capitals from small letters"
    else:
        return
    raise BadInput(
        f"the tokenizer loses text, and bits per byte of what is left are too few: {loss}",
        where=tokenizer.name_or_path or None,
        key="workload.tokenizer",
        mend="a tokenizer of bytes (`bpe` or `bytes`), or one that keeps case and falls back on "
        "bytes",
    )


def document_ids(data: Corpus) -> list[str]:
    """The id of each document of the held-out part, by its number."""
    from maquette.data.table import stored

    batches = stored(data.parts["held_out"][0], ["id"])
    return [name for batch in batches for name in batch["id"].to_pylist()]


class ScoredText(Audit):
    """An audit that scores stretches of held-out documents."""

    document_tokens: int | None = Field(1024, ge=16)
    """Of one document, at most, in tokens reckoned as 3 bytes: a stretch chosen by a hash of its
    id; None scores documents whole, and the longest then outweigh the rest. Raise it for models
    that read more than this at once."""

    def held_out(self, subject: Subject, data: Corpus, ctx: Ctx) -> PackedTokens:
        """The text that is scored, in the subject's own vocabulary.

        Raises BadInput for a vocabulary that does not tell the text.
        """
        part = held_out_tokens(subject, data, ctx, self.document_tokens)
        refuse_lossy(subject.tokenizer, part)
        return part
