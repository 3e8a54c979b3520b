"""The processor inside `transformers` generation, with adversarial random models."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Sequenced
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maquette.decoding.generation import Sampling, generate, left_padded
from maquette.decoding.metrics import next_identifier
from maquette.decoding.monitor import DereferenceMonitor, JointMonitor, TableAnalyser
from maquette.decoding.processor import MonitorLogitsProcessor
from maquette.decoding.vocabulary import VocabIndex

NAMES = ["append", "appendleft", "pop", "popleft", "größe", "x", "clear", "copy", "index"]
WORDS = [f"self.{a} = queue.{b}(x)\nprint({a}.{b}, 1.5)\n" for a in NAMES for b in NAMES]


def tokenizer_with_dots_in_tokens() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose words may start with a sign, so that `.clear` can be one token."""
    bpe = Tokenizer(models.BPE())
    words = Split(Regex(r"[^\w\s]?[^\W\d]+|\s+|\d+|[^\w\s]+"), behavior="isolated")
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = Sequenced([words, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")


TOKENIZER = tokenizer_with_dots_in_tokens()
INDEX = VocabIndex.from_tokenizer(TOKENIZER)
EOS = TOKENIZER.eos_token_id


class Everywhere:
    """The same members after every dot."""

    def __init__(self, members: Sequence[str]) -> None:
        self.members = frozenset(members)

    def complete(self, text: str, path: str | None = None) -> frozenset[str]:
        return self.members


def model(seed: int = 0, vocabulary: int = len(TOKENIZER), scale: float = 40.0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config).eval()
        made.lm_head.weight.data.normal_(0, scale / 16)  # sharp, so that it is surely wrong
    return made


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def assert_members_alone(text: str, members: Sequence[str]) -> None:
    """Every dot before an identifier leads to a member, or to the start of one at the end."""
    for match in re.finditer(r"\.([^\W\d]\w*|\d\w*)", text):
        name = match[1]
        if match.end() < len(text):
            assert name in members, (name, text)
        else:
            assert any(m.startswith(name) for m in members), (name, text)


@settings(max_examples=15, deadline=None)
@given(
    members=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    seed=st.integers(0, 10_000),
    sampling=st.sampled_from(
        [
            Sampling(12),
            Sampling(12, temperature=1.5, samples=3),
            Sampling(12, temperature=3.0, top_p=0.5),
            Sampling(8, beams=3),
            Sampling(8, beams=3, samples=3),
        ]
    ),
)
def test_no_random_model_leaves_the_members_behind_the_prompts_dot(
    members: list[str], seed: int, sampling: Sampling
) -> None:
    prompts = ["queue.", "x = 1\nprint(self.", "größe."]
    monitors = [DereferenceMonitor(Everywhere(members)) for _ in prompts]
    written, report = generate(
        model(seed),
        TOKENIZER,
        prompts,
        sampling,
        index=INDEX,
        monitors=monitors,
        generator=torch.Generator().manual_seed(seed),
    )
    assert report is not None and report.constrained > 0
    for text in (t for samples in written for t in samples):
        name, rest = next_identifier(text), text[len(next_identifier(text)) :]
        if rest or text == "":
            assert name in members
        else:
            assert any(m.startswith(name) for m in members)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_strict_decoding_holds_at_dots_inside_tokens_too(seed: int, temperature: float) -> None:
    members = ["append", "größe", "x"]
    written, _ = generate(
        model(seed),
        TOKENIZER,
        ["queue", "self.append(x)\nself"],
        Sampling(24, temperature=temperature),
        index=INDEX,
        monitors=[DereferenceMonitor(Everywhere(members))] * 2,
        strict=True,
        generator=torch.Generator().manual_seed(seed),
    )
    for samples in written:
        # U+FFFD stands for bytes that are no text; as bytes they count as identifier bytes.
        # The last character may still lack bytes; elsewhere a stray byte is a character of its own.
        assert_members_alone("q" + samples[0].rstrip("\ufffd").replace("\ufffd", "_"), members)


def test_without_strict_a_token_that_holds_the_dot_slips_through() -> None:
    token = next(i for i, p in enumerate(INDEX.pieces) if p == b".clear")
    scores = torch.full((1, len(INDEX)), -5.0)
    scores[0, token] = 5.0
    ids = torch.tensor([ids_of("queue")])
    monitor = DereferenceMonitor(Everywhere(["pop"]))
    paper = MonitorLogitsProcessor(INDEX, monitor, strict=False)
    assert paper(ids, scores).argmax() == token
    assert MonitorLogitsProcessor(INDEX, monitor)(ids, scores)[0, token] == float("-inf")
    allowed = DereferenceMonitor(Everywhere(["clear"]))
    assert MonitorLogitsProcessor(INDEX, allowed)(ids, scores).argmax() == token


# Tokens that hold a dot and what follows, as vocabularies trained on prose or code have them.
GAPS = [b".", b". ", b".\n", b".\n    ", b". #", b".\\\n", b".bogus", b". bogus", b"pop.bogus"]
GAP_INDEX = VocabIndex([b"", *GAPS, b" ", b"\n", b"#", b"(", b"pop", b"bogus", b"q"], eos_ids=[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), prompt=st.sampled_from(["q", "(q", "f(q)", "q.", "q. "]))
def test_no_token_leads_past_the_members_by_a_gap_behind_the_dot(seed: int, prompt: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    monitor = DereferenceMonitor(Everywhere(["pop"]))
    processor = MonitorLogitsProcessor(GAP_INDEX, monitor, prefixes=[prompt], start=0)
    ids = torch.zeros((1, 0), dtype=torch.long)
    for _ in range(12):
        scores = 3 * torch.randn((1, len(GAP_INDEX)), generator=rng)
        scores[0, 0] = float("-inf")
        chosen = processor(ids, scores).softmax(-1).multinomial(1, generator=rng)
        ids = torch.cat([ids, chosen], 1)
        text = prompt.encode() + GAP_INDEX.join(ids[0].tolist())
        for name in re.findall(rb"\.(?:\s|\\\n|#[^\n]*\n)*(\w+)", text):
            assert b"pop".startswith(name), text
    assert processor.report().dropped == 0


class Counted(Everywhere):
    asked = 0

    def complete(self, text: str, path: str | None = None) -> frozenset[str]:
        self.asked += 1
        return super().complete(text, path)


def test_strict_decoding_asks_once_a_step_and_makes_no_masks_of_its_own() -> None:
    def run(strict: bool) -> tuple[int, int]:
        index = VocabIndex.from_tokenizer(TOKENIZER)
        analyser = Counted(["pop"])
        processor = MonitorLogitsProcessor(
            index, DereferenceMonitor(analyser), prefixes=["x = "], start=0, strict=strict
        )
        ids = torch.tensor([ids_of("queue")])
        for _ in range(10):  # every compound token is likely: all scores are equal
            processor(ids, torch.zeros((1, len(index))))
            ids = torch.cat([ids, torch.tensor([ids_of("e")])], 1)
        return analyser.asked, len(index._masks)

    assert run(False) == (0, 0)
    assert run(True) == (10, 0)


def test_mask_comes_before_top_k() -> None:
    """With the mask after a top-1 truncation nothing would be left to sample."""
    monitor = DereferenceMonitor(Everywhere(["popleft"]))
    for seed in range(5):
        processor = MonitorLogitsProcessor(INDEX, monitor)
        ids = torch.tensor([ids_of("queue.")])
        out = model(seed).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=True,
            top_k=1,
            pad_token_id=TOKENIZER.pad_token_id,
            logits_processor=[processor],
        )
        text = INDEX.join(out[0].tolist())
        assert text.startswith(b"queue.popleft") or b"queue.popleft".startswith(text)
        assert processor.report().dropped == 0


def test_a_left_padded_batch_decodes_each_row_as_if_alone() -> None:
    prompts = ["a.", "x = queue.pop()\nprint(größe."]
    monitor = DereferenceMonitor(Everywhere(NAMES))
    one = model(3)

    def written(texts: list[str]) -> list[list[str]]:
        monitors = [monitor] * len(texts)
        return generate(one, TOKENIZER, texts, Sampling(6), index=INDEX, monitors=monitors)[0]

    assert written(prompts) == [written([p])[0] for p in prompts]


def test_each_row_of_expanded_prompts_has_its_own_monitor_and_prefix() -> None:
    monitors = [DereferenceMonitor(Everywhere([name])) for name in ("pop", "copy")]
    processor = MonitorLogitsProcessor(INDEX, monitors, prefixes=["a.", "b."], start=3)
    ids = torch.zeros((4, 3), dtype=torch.long)
    out = processor(ids, torch.zeros((4, len(INDEX))))
    starts = [{INDEX.pieces[i][:1] for i in row.isfinite().nonzero().flatten()} for row in out]
    assert starts == [{b"p"}, {b"p"}, {b"c"}, {b"c"}]
    with pytest.raises(ValueError, match="3 rows cannot be shared by 2"):
        processor(ids[:3], torch.zeros((3, len(INDEX))))


def test_constraint_follows_from_the_ids_when_beams_change_places() -> None:
    processor = MonitorLogitsProcessor(INDEX, DereferenceMonitor(Everywhere(["pop", "copy"])))
    fresh = MonitorLogitsProcessor(INDEX, DereferenceMonitor(Everywhere(["pop", "copy"])))
    b = {p: i for i, p in enumerate(INDEX.pieces) if p}
    first = torch.tensor([[b[b"x"], b[b"."]], [b[b"("], b[b"."]]])
    processor(first, torch.zeros((2, len(INDEX))))
    moved = torch.tensor([[b[b"("], b[b"."], b[b"p"]], [b[b"x"], b[b"."], b[b"c"]]])
    scores = torch.randn((2, len(INDEX)), generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor(moved, scores), fresh(moved, scores))


def test_unconstrained_rows_keep_their_scores_and_allowed_tokens_theirs() -> None:
    monitor = DereferenceMonitor(Everywhere(["pop"]))
    processor = MonitorLogitsProcessor(INDEX, monitor, strict=False)
    ids = left_padded([ids_of("queue."), ids_of("queue")], 0, torch.device("cpu"))[0]
    scores = torch.randn((2, len(INDEX)), generator=torch.Generator().manual_seed(0))
    kept = scores.clone()
    out = processor(ids, scores)
    assert torch.equal(scores, kept) and torch.equal(out[1], scores[1])
    finite = out[0].isfinite()
    assert torch.equal(out[0][finite], scores[0][finite])
    expected = 1 - float(scores[0].softmax(-1)[finite].sum())
    report = processor.report()
    assert report.removed_mass == pytest.approx(expected, abs=1e-6)
    assert (report.steps, report.constrained, report.dropped) == (2, 1, 0)


def test_all_identifiers_of_the_alphabet_leave_identifier_tokens_alone() -> None:
    pieces = [b"a", b"b", b"aa", b"ab", b"ba", b"bb", b"(", b"a(", b"bb.", b"."]
    words = [a + b + c for a in "ab" for b in ["", "a", "b"] for c in ["", "a", "b"]]
    processor = MonitorLogitsProcessor(VocabIndex(pieces), DereferenceMonitor(Everywhere(words)))
    scores = torch.arange(10.0)[None]
    out = processor(torch.tensor([[9]]), scores)
    assert out[0, :6].tolist() == scores[0, :6].tolist()
    assert out[0, 6:].tolist() == [float("-inf"), 7.0, 8.0, float("-inf")]


def test_a_constraint_no_token_satisfies_is_lifted_and_counted() -> None:
    index = VocabIndex([b"a", b".", b"b"])
    monitor = DereferenceMonitor(Everywhere(["é"]))
    processor = MonitorLogitsProcessor(index, monitor)
    scores = torch.zeros((1, 3))
    assert torch.equal(processor(torch.tensor([[0, 1]]), scores), scores)
    assert processor.report().dropped == 1
    # Also if another processor has already forbidden all that the monitor allows.
    other = MonitorLogitsProcessor(index, DereferenceMonitor(Everywhere(["a"])))
    scores = torch.tensor([[float("-inf"), 0.0, 0.0]])
    assert torch.equal(other(torch.tensor([[0, 1]]), scores), scores)
    report = other.report()
    assert (report.constrained, report.dropped, report.removed_mass) == (1, 1, 0.0)


def test_joint_monitors_that_leave_nothing_in_common_are_lifted() -> None:
    index = VocabIndex([b"a", b".", b"b"])
    pair = [DereferenceMonitor(Everywhere([n])) for n in ("a", "b")]
    processor = MonitorLogitsProcessor(index, JointMonitor(pair))
    out = processor(torch.tensor([[0, 1]]), torch.zeros((1, 3)))
    assert out.isfinite().all() and processor.report().dropped == 1


def test_end_of_sequence_is_allowed_after_a_finished_member_alone() -> None:
    processor = MonitorLogitsProcessor(INDEX, DereferenceMonitor(Everywhere(["pop", "popleft"])))
    for text, allowed in (("q.", False), ("q.po", False), ("q.pop", True), ("q.popl", False)):
        out = processor(torch.tensor([ids_of(text)]), torch.zeros((1, len(INDEX))))
        assert bool(out[0, EOS].isfinite()) is allowed


def test_rows_that_have_ended_are_left_alone() -> None:
    processor = MonitorLogitsProcessor(INDEX, DereferenceMonitor(Everywhere(["pop"])))
    ids = torch.tensor([[*ids_of("q."), EOS, TOKENIZER.pad_token_id]])
    scores = torch.zeros((1, len(INDEX)))
    assert processor(ids, scores) is scores and processor.report().steps == 0


@pytest.mark.parametrize("extra", [64, -1])
def test_heads_wider_or_narrower_than_the_vocabulary_are_masked(extra: int) -> None:
    index = VocabIndex([*INDEX.pieces[:-1], b"pop"], [EOS], base_size=len(INDEX) - 1)
    processor = MonitorLogitsProcessor(index, DereferenceMonitor(Everywhere(["pop"])))
    out = processor(torch.tensor([ids_of("q.")]), torch.zeros((1, len(INDEX) + extra)))
    assert out.shape[1] == len(INDEX) + extra
    finite = out[0].isfinite().nonzero().flatten().tolist()
    assert finite and all(i < len(INDEX) and b"pop".startswith(index.pieces[i]) for i in finite)


def test_an_empty_prompt_generates() -> None:
    monitors = [DereferenceMonitor(TableAnalyser({}))]
    written, report = generate(
        model(), TOKENIZER, [""], Sampling(3), index=INDEX, monitors=monitors
    )
    assert len(written) == 1 and report is not None and report.constrained == 0


def test_long_prompts_are_cut_for_the_model_and_not_for_the_monitor() -> None:
    long = "x = 1\n" * 300 + "queue."
    analyser = TableAnalyser({long: frozenset({"popleft"})})
    written, _ = generate(
        model(),
        TOKENIZER,
        [long],
        Sampling(10),
        index=INDEX,
        monitors=[DereferenceMonitor(analyser)],
    )
    assert next_identifier(written[0][0]) == "popleft"


def test_half_precision_scores_are_masked() -> None:
    processor = MonitorLogitsProcessor(INDEX, DereferenceMonitor(Everywhere(["pop"])))
    scores = torch.zeros((1, len(INDEX)), dtype=torch.bfloat16)
    out = processor(torch.tensor([ids_of("q.")]), scores)
    assert out.dtype == torch.bfloat16 and not out.isnan().any()


def test_impossible_samplings_are_refused() -> None:
    for bad in (
        {"new_tokens": 0},
        {"temperature": -1.0},
        {"samples": 2},
        {"beams": 2, "temperature": 0.5},
        {"top_p": 0.0},
    ):
        with pytest.raises(ValueError):
            Sampling(**bad)  # type: ignore[arg-type]
