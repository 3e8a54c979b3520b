"""Lists of terms: whole words in any script, and the fast way to count them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maquette.data.terms import TermRate, bad_word_rate, read_words, term_pattern
from maquette.errors import BadInput


def test_terms_are_whole_words_in_any_case_and_script():
    pattern = term_pattern(["ass", "@$$", "馬鹿"])
    hits = [bad_word_rate(t, pattern) > 0 for t in ("an ass.", "class", "what @$$!", "彼は馬鹿だ")]
    assert hits == [True, False, True, True]


@given(
    st.lists(st.text("ab_ -$ßA", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=1),
    st.text("ab_ -$ßAB\n", max_size=40),
)
def test_words_looked_up_give_the_rate_of_the_pattern(terms, text):
    assert TermRate(terms)(text) == bad_word_rate(text, term_pattern(terms))


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(BadInput, match="empty"):
        read_words(tmp_path / "empty.txt")
    with pytest.raises(BadInput, match="cannot be read"):
        read_words(tmp_path / "absent.txt")
