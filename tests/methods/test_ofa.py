"""OFA against hand-computed rows, Eckart-Young, and the dense model's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from maquette.data.token_strings import standardise
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.data.word_vectors import WordVectors
from maquette.errors import BadInput
from maquette.methods.surgery.ofa import OfaSurgery, apply, merge, neighbours, ofa_init
from maquette.training.embedding_init import (
    COPIED,
    FALLEN_BACK,
    FUZZY,
    INTERPOLATED,
    SPECIAL,
    copy_transfer,
    fvt_transfer,
    overlap,
    spellings,
    subword_vectors,
)
from maquette.training.factorised_embedding import factorise, is_tied
from maquette.training.vocabulary_swap import carry_tables

TEXTS = ["one two three four five six seven eight nine ten eleven twelve thousand million"] * 20


def wordpiece(tokens: list[str], **special: str) -> PreTrainedTokenizerFast:
    special = special or {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    vocab = {t: i for i, t in enumerate([*special.values(), *tokens])}
    made = Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def byte_bpe(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    return train(TokenizerSpec(vocabulary=vocabulary), texts)


# --- the mathematics -----------------------------------------------------------------------------


def test_neighbours_and_weights_of_the_hand_case() -> None:
    source = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    index, weights = neighbours(torch.tensor([[0.8, 0.6]]), source, 2, 0.1)
    assert index.tolist() == [[2, 0]]
    np.testing.assert_allclose(weights.numpy(), [[0.83202, 0.16798]], atol=5e-6)
    rows = torch.tensor([[2.0, 0], [0, 4], [1, 1]])
    made = (weights[0, :, None] * rows[index[0]]).sum(0)
    np.testing.assert_allclose(made.numpy(), [1.16798, 0.83202], atol=5e-6)


def test_neighbours_in_chunks_are_those_of_the_whole_matrix(monkeypatch) -> None:
    from maquette.training import similarity_transfer

    generator = torch.Generator().manual_seed(0)
    target, source = (
        torch.randn(37, 5, generator=generator),
        torch.randn(20, 5, generator=generator),
    )
    cosine = torch.nn.functional.cosine_similarity(target[:, None], source[None], dim=-1)
    order = cosine.argsort(dim=1, descending=True)[:, :4]
    monkeypatch.setattr(similarity_transfer, "_SIMILARITIES_PER_CHUNK", 60)
    index, weights = neighbours(target, source, 4, 0.3)
    assert torch.equal(index, order)
    scores = (cosine.gather(1, order) / 0.3).exp()
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


def test_factors_of_a_hand_table() -> None:
    table = torch.tensor([[3.0, 0], [0, 2], [0, 0], [3, 0]])
    F, P = factorise(table, 1)
    np.testing.assert_allclose(F.abs().ravel().numpy(), [0.5**0.5, 0, 0, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(P.abs().numpy(), [[18**0.5, 0]], atol=1e-6)


def test_the_error_of_a_factorisation_is_the_sum_of_dropped_squared_singular_values() -> None:
    table = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    singular = np.linalg.svd(table.numpy(), compute_uv=False)
    for dim in (1, 5, 12):
        F, P = factorise(table, dim)
        error = float(((F @ P - table) ** 2).sum())
        assert error == pytest.approx((singular[dim:] ** 2).sum(), abs=1e-4)
    low = table[:, :3] @ table[:3, :]
    F, P = factorise(low, 3)
    torch.testing.assert_close(F @ P, low, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"dim must be in \[1, 12\]"):
        factorise(table, 13)


# --- tokens --------------------------------------------------------------------------------------


def test_a_word_is_spelt_three_ways_and_one_letter_is_no_trouble() -> None:
    words = WordVectors(("a", "bc"), np.eye(2, dtype=np.float32), np.array([True, False]))
    assert list(zip(*spellings(words), strict=True)) == [("a", " a", " A"), ("bc", " bc", "Bc")]


def test_a_subword_vector_is_the_mean_over_spellings_without_repeats() -> None:
    # xx -> x ##x; " xx" the same; " Xx" -> X ##x. xy -> x ##y twice, " Xy" -> X ##y.
    tokenizer = wordpiece(["x", "X", "##x", "##y", "z"])
    words = WordVectors(("xx", "xy"), np.array([[1.0, 0], [0, 3]], np.float32))
    vectors, covered = subword_vectors(tokenizer, words)
    by_token = dict(zip(tokenizer.convert_ids_to_tokens(range(7)), vectors.tolist(), strict=True))
    assert by_token["x"] == [0.5, 1.5]  # twice each
    assert by_token["X"] == [0.5, 1.5]  # once each
    assert by_token["##x"] == [1, 0]
    assert by_token["##y"] == [0, 3]
    assert by_token["z"] == [0, 0]
    assert covered.tolist() == [False, False, True, True, True, True, False]


def test_a_subword_counts_a_word_by_spellings_and_not_by_occurrences() -> None:
    tokenizer = wordpiece(["a", "##a", "A", "b"])
    # aaa -> a ##a ##a in two spellings, A ##a ##a in the third: ##a counts it three times.
    words = WordVectors(("aaa", "a"), np.array([[1.0], [-5.0]], np.float32))
    vectors, _ = subword_vectors(tokenizer, words)
    assert vectors[tokenizer.convert_tokens_to_ids("##a")].item() == 1
    assert vectors[tokenizer.convert_tokens_to_ids("a")].item() == pytest.approx((2 - 10) / 4)


def test_the_unknown_token_has_no_subword_vector() -> None:
    tokenizer = wordpiece(["a"])
    vectors, covered = subword_vectors(
        tokenizer, WordVectors(("zzz", "a"), np.ones((2, 2), np.float32))
    )
    assert covered.tolist() == [False, False, True]
    assert vectors[0].tolist() == [0, 0]


def test_tokens_of_three_families_mean_the_same_text() -> None:
    byte_level = byte_bpe([*["über the"] * 60, *TEXTS], 300)
    texts = standardise(byte_level)
    assert "über" in texts and " the" in texts
    assert texts[byte_level.pad_token_id] == byte_level.pad_token
    assert len(set(texts)) == len(texts)  # half characters stay apart
    assert standardise(wordpiece(["the", "##er"]))[2:] == [" the", "er"]
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("er", -2.0)], 0, True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    piece = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    assert standardise(piece)[:3] == ["<unk>", " the", "er"]


def test_overlap_goes_by_role_then_by_string_then_by_lower_case() -> None:
    source = wordpiece(["cat", "Dog", "dOG", "bus"], unk_token="<unk>", bos_token="<s>")
    target = wordpiece(["cat", "dog", "car"], cls_token="[CLS]", unk_token="[UNK]")
    copied, how = overlap(source, target)
    strings = target.convert_ids_to_tokens(range(5))
    found = dict(zip(strings, zip(copied.tolist(), how.tolist(), strict=True), strict=True))
    assert found["[CLS]"] == (source.bos_token_id, SPECIAL)
    assert found["[UNK]"] == (source.unk_token_id, SPECIAL)
    assert found["cat"] == (source.convert_tokens_to_ids("cat"), COPIED)
    # "Dog" sorts before "dOG": the last in sorted order is taken.
    assert found["dog"] == (source.convert_tokens_to_ids("dOG"), FUZZY)
    assert found["car"] == (-1, FALLEN_BACK)
    assert overlap(source, target, fuzzy=False)[1][3] == FALLEN_BACK


# --- the whole initialisation --------------------------------------------------------------------


def animals() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, WordVectors, torch.Tensor]:
    source = wordpiece(["cat", "dog", "car"])
    target = wordpiece(["cat", "kitten", "bus", "void"])
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [0.6, 0.8]], np.float32)
    words = WordVectors(("cat", "dog", "car", "kitten", "bus"), vectors)
    table = torch.tensor([[9.0, 9], [8, 8], [2, 0], [0, 4], [1, 1]])
    return source, target, words, table


def test_rows_are_copied_interpolated_by_hand_numbers_or_drawn() -> None:
    source, target, words, table = animals()
    init = ofa_init(table, source, target, words, k=2)
    row = dict(zip(target.convert_ids_to_tokens(range(6)), init.coordinates.tolist(), strict=True))
    assert row["cat"] == [2, 0]
    assert row["[UNK]"] == [9, 9]
    np.testing.assert_allclose(row["kitten"], [1.16798, 0.83202], atol=5e-6)
    counts = {k: init.report[k] for k in ("copied", "fuzzy", "interpolated", "fallen_back")}
    assert counts == {"copied": 1, "fuzzy": 0, "interpolated": 2, "fallen_back": 1}
    assert init.report["source_coverage"] == pytest.approx(3 / 5)
    assert init.primitives is None


def test_a_token_that_means_exactly_one_source_token_takes_its_row() -> None:
    source, target, words, table = animals()
    init = ofa_init(table, source, target, words, k=1)
    bus = init.coordinates[target.convert_tokens_to_ids("bus")]
    torch.testing.assert_close(bus, table[source.convert_tokens_to_ids("car")])
    first = init.report["examples"][0]
    assert first["neighbours"][0][1] == 1.0


def test_interpolated_rows_lie_between_their_neighbours() -> None:
    rng = np.random.default_rng(0)
    names = [f"{a}{b}" for a in "abcdefgh" for b in "uvwxyz"]
    source, target = wordpiece(names[:30]), wordpiece(names[10:])
    words = WordVectors(tuple(names), rng.normal(size=(48, 6)).astype(np.float32))
    table = torch.from_numpy(rng.normal(size=(32, 9)).astype(np.float32))
    init = ofa_init(table, source, target, words, k=5)
    transfer_rows = {e["token"]: [n for n, _ in e["neighbours"]] for e in init.report["examples"]}
    assert len(transfer_rows) == 18
    for token, near in transfer_rows.items():
        rows = table[source.convert_tokens_to_ids(near)]
        made = init.coordinates[target.convert_tokens_to_ids(token)]
        assert (made >= rows.min(0).values - 1e-6).all()
        assert (made <= rows.max(0).values + 1e-6).all()


def test_factorising_comes_before_interpolating() -> None:
    source, target, words, table = animals()
    dense = ofa_init(table, source, target, words, k=2, seed=1)
    low = ofa_init(table, source, target, words, k=2, dim=1, seed=1)
    assert low.coordinates.shape == (6, 1) and low.primitives is not None
    F, P = factorise(table, 1)
    kept = target.convert_tokens_to_ids("kitten")
    weights = torch.tensor([0.83202, 0.16798])
    wanted = (weights @ F[[4, 2]]) @ P
    torch.testing.assert_close(low.coordinates[kept] @ low.primitives, wanted, atol=1e-5, rtol=0)
    assert ofa_init(table, source, target, words, k=2, dim=2).primitives is None
    assert not torch.allclose(dense.coordinates[kept], wanted, atol=1e-3)


def test_rows_without_a_source_are_drawn_from_each_columns_normal() -> None:
    rng = np.random.default_rng(0)
    source = wordpiece([f"s{i}" for i in range(30)])
    target = wordpiece(["s0", *(f"t{i}" for i in range(4000))])
    table = torch.from_numpy((rng.normal(size=(32, 3)) * [1, 5, 0.1] + [0, 2, -1]).astype("f"))
    init = carry_tables(copy_transfer(source, target), table, np.random.default_rng(0))
    drawn = init.coordinates[3:].numpy()
    np.testing.assert_allclose(drawn.mean(0), table.mean(0), atol=0.25)
    np.testing.assert_allclose(drawn.std(0), table.numpy().std(0), rtol=0.05)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05
    again = carry_tables(copy_transfer(source, target), table, np.random.default_rng(0))
    assert torch.equal(init.coordinates, again.coordinates)
    mean = carry_tables(copy_transfer(source, target, fallback="mean"), table, rng)
    torch.testing.assert_close(mean.coordinates[5], table.mean(0))


def test_fvt_takes_the_mean_of_the_pieces() -> None:
    source, target = byte_bpe(TEXTS, 300), byte_bpe([*TEXTS, *["twofour"] * 40], 310)
    transfer = fvt_transfer(source, target)
    texts = standardise(target)
    new = int(np.flatnonzero(transfer.how == INTERPOLATED)[-1])
    pieces = source(texts[new], add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    table = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    init = carry_tables(transfer, table, np.random.default_rng(0))
    torch.testing.assert_close(init.coordinates[new], table[pieces].mean(0))


def test_what_cannot_be_carried_is_refused_or_said() -> None:
    source, target, words, table = animals()
    with pytest.raises(ValueError, match=r"if it is padded, pass table\[:n_ids\]"):
        ofa_init(torch.zeros(8, 2), source, target, words)
    with pytest.raises(ValueError, match="dim must be in"):
        ofa_init(table, source, target, words, dim=3)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        ofa_init(table, source, target, words, k=2, temperature=0.0)
    with pytest.warns(UserWarning, match="cover 3 source tokens"):
        init = ofa_init(table, source, target, words, k=10)
    assert init.report["k"] == 3
    stranger = wordpiece(["qq"], unk_token="?")
    with pytest.raises(ValueError, match="would be random"):
        ofa_init(
            torch.zeros(2, 2), stranger, wordpiece(["rr"], pad_token="!", unk_token="u"), words
        )


# --- models --------------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def build(kind: str, vocabulary: int):
    torch.manual_seed(0)
    makers = {
        "electra": lambda: ElectraForMaskedLM(
            ElectraConfig(vocab_size=vocabulary, embedding_size=16, hidden_size=24, **SMALL)
        ),
        "discriminator": lambda: ElectraForPreTraining(
            ElectraConfig(vocab_size=vocabulary, embedding_size=16, hidden_size=24, **SMALL)
        ),
        "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=vocabulary, hidden_size=16, **SMALL)),
        "roberta": lambda: RobertaForMaskedLM(
            RobertaConfig(vocab_size=vocabulary, hidden_size=16, **SMALL)
        ),
        "tied": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=vocabulary, hidden_size=16, tie_word_embeddings=True, **SMALL)
        ),
        "untied": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=vocabulary, hidden_size=16, tie_word_embeddings=False, **SMALL)
        ),
    }
    return makers[kind]().eval()


KINDS = ("electra", "discriminator", "bert", "roberta", "tied", "untied")


def tables(model, transfer, dim: int | None):
    head = model.get_output_embeddings()
    untied = head is not None and not is_tied(model)
    return carry_tables(
        transfer,
        model.get_input_embeddings().weight,
        np.random.default_rng(0),
        dim=dim,
        output_embeddings=head.weight if untied else None,
        output_bias=None if head is None else head.bias,
    )


@pytest.fixture(scope="module")
def source() -> PreTrainedTokenizerFast:
    return byte_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def target() -> PreTrainedTokenizerFast:
    return byte_bpe([*TEXTS, *["nineteen twenty"] * 20], 312)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_vocabulary_gives_the_same_logits_dense_and_at_full_rank(kind, source) -> None:
    ids = torch.tensor([source("one two three")["input_ids"]])
    model = build(kind, 300)
    with torch.no_grad():
        wanted = model(ids).logits
        transfer = copy_transfer(source, source)
        apply(model, tables(model, transfer, None))
        assert torch.equal(model(ids).logits, wanted)
        F, P = factorise(model.get_input_embeddings().weight, 16)
        init = tables(model, transfer, None)
        out, out_P = (None, None)
        if init.output_coordinates is not None:
            out, out_P = factorise(init.output_coordinates, 16)
        apply(model, type(init)(F, P, {}, out, out_P))
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_a_plain_model_with_the_same_logits_after_training(
    kind, source, target, tmp_path
) -> None:
    model = build(kind, 300)
    apply(model, tables(model, fvt_transfer(source, target), 4))
    ids = torch.tensor([target("one two nineteen")["input_ids"]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).logits.pow(2).mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "coordinates" in n)
    optimizer.step()
    plain = merge(model)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        for other in (plain, loaded):
            torch.testing.assert_close(other(ids).logits, wanted, atol=1e-5, rtol=0)
    assert loaded.config.vocab_size == 312
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert is_tied(loaded) == (kind in ("electra", "bert", "roberta", "tied"))
    assert model.get_input_embeddings() is not plain.get_input_embeddings()


@pytest.mark.parametrize(("kind", "pairs"), [("tied", 1), ("untied", 2), ("electra", 1)])
def test_a_factorised_table_costs_rank_times_vocabulary_and_is_held_once(
    kind, pairs, source, target
) -> None:
    model = build(kind, 300)
    before = sum(p.numel() for p in model.parameters()) - pairs * 300 * 16
    biases = 0 if kind != "electra" else 312 - 300
    apply(model, tables(model, fvt_transfer(source, target), 4))
    after = sum(p.numel() for p in model.parameters())
    assert after - before == pairs * (312 * 4 + 4 * 16) + biases
    names = [n for n in model.state_dict() if "coordinates" in n]
    assert len(names) == pairs


def test_an_untied_model_needs_its_output_table(source, target) -> None:
    model = build("untied", 300)
    init = carry_tables(
        fvt_transfer(source, target), model.get_input_embeddings().weight, np.random.default_rng(0)
    )
    with pytest.raises(ValueError, match="untied"):
        apply(model, init)


# --- the part ------------------------------------------------------------------------------------


def context(tmp_path, target, corpus=None):
    from maquette.parts import Ctx
    from maquette.training.ledger import Ledger

    return Ctx(
        device=torch.device("cpu"),
        seed=0,
        cache=tmp_path,
        ledger=Ledger(),
        tokenizer=target,
        corpus=corpus,
    )


@pytest.mark.parametrize(("kind", "dim"), [("tied", 4), ("electra", 4), ("untied", None)])
def test_a_surgery_is_replayed_from_its_state_on_a_fresh_model(
    kind, dim, source, target, tmp_path
) -> None:
    vectors = tmp_path / "words.vec"
    rng = np.random.default_rng(0)
    vectors.write_text(
        "\n".join(
            f"{w} {a:.4f} {b:.4f}"
            for w, (a, b) in zip(
                ["one", "two", "three", "four", "five", "six", "seven", "nineteen", "twenty"],
                rng.normal(size=(9, 2)),
                strict=True,
            )
        )
    )
    part = OfaSurgery(dim=dim, k=2, word_vectors=str(vectors))
    model = build(kind, 300)
    state = part.fit(model, source, context(tmp_path, target))
    assert state.meta["report"]["interpolated"] > 0
    assert all(t.is_contiguous() for t in state.tensors.values())
    one, tokenizer = part.apply(model, source, state)
    text = "one two nineteen</s> ü"
    assert tokenizer(text)["input_ids"] == target(text)["input_ids"]
    assert tokenizer.special_tokens_map == target.special_tokens_map
    other, _ = part.apply(build(kind, 300), source, state)
    assert {n: tuple(t.shape) for n, t in one.state_dict().items()} == {
        n: tuple(t.shape) for n, t in other.state_dict().items()
    }
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_ppmi_vectors_come_from_the_stages_corpus_and_the_named_ones(source, tmp_path) -> None:
    from maquette.data.corpus import prepare
    from maquette.data.corpus_spec import CorpusSpec

    rng = np.random.default_rng(0)
    words = ["nineteen", "twenty", "one", "two"]
    for name in ("target", "source"):
        (tmp_path / name).mkdir()
        for i in range(30):
            text = " ".join(rng.choice([*words, f"{name}{chr(97 + i)}"], 60))
            (tmp_path / name / f"{i}.txt").write_text(text)
    corpus = prepare(
        str(tmp_path / "target"),
        TokenizerSpec(vocabulary=300),
        cache=tmp_path / "cache",
        held_out_fraction=0.2,
    )
    ctx = context(tmp_path, corpus.tokenizer, corpus)
    part = OfaSurgery(k=2, word_dim=3, word_corpora=(CorpusSpec(path=str(tmp_path / "source")),))
    model = build("tied", 300)
    state = part.fit(model, source, ctx)
    assert state.meta["report"]["interpolated"] > 0
    assert ctx.ledger.entries["scorer"].seconds > 0
    assert part.fit(model, source, ctx).tensors["coordinates"].equal(state.tensors["coordinates"])


def test_a_padded_table_is_cut_only_on_demand(source, target, tmp_path) -> None:
    model, ctx = build("tied", 304), context(tmp_path, target)
    with pytest.raises(BadInput, match="304 embeddings, its tokenizer 300 ids"):
        OfaSurgery(init="fvt").fit(model, source, ctx)
    state = OfaSurgery(init="fvt", drop_padding=True).fit(model, source, ctx)
    assert state.tensors["coordinates"].shape == (312, 16)
    with pytest.raises(BadInput, match="do not belong together"):
        OfaSurgery(init="fvt").fit(build("tied", 290), source, ctx)


@pytest.mark.parametrize("init", ["random", "mean", "fvt"])
def test_baselines_share_the_copied_rows(init, source, target, tmp_path) -> None:
    model = build("tied", 300)
    ctx = context(tmp_path, target)
    tensors = OfaSurgery(init=init).fit(model, source, ctx).tensors
    copied, _ = overlap(source, target)
    table = model.get_input_embeddings().weight
    rows = tensors["coordinates"][copied >= 0]
    torch.testing.assert_close(rows, table[copied[copied >= 0]].detach())
