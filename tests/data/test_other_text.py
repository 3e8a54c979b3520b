"""Text beside the run's own corpus: all of it but what the corpus holds out."""

import json

from maquette.data.corpus import prepare
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.other_text import texts_of
from maquette.data.tokenizers import TokenizerSpec


def test_what_the_corpus_holds_out_is_left_out_of_another_column_of_the_same_rows(tmp_path):
    rows = [{"text": f"prose {i} " * (i + 1), "code": f"code {i}"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare(
        CorpusSpec(path=str(file)),
        TokenizerSpec(type="bytes"),
        cache=tmp_path / "cache",
        held_out_fraction=0.4,
    )
    held_out = {
        int(text.split()[1])
        for batch in corpus.documents("held_out")
        for text in batch["text"].to_pylist()
    }
    assert held_out
    other = CorpusSpec(path=str(file), text_column="code")
    rest = [f"code {i}" for i in range(40) if i not in held_out]
    assert sorted(texts_of([other], corpus)) == sorted(rest)
    assert len(list(texts_of([other], None))) == 40
