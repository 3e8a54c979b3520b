"""ZeTT against hand numbers, closed forms and the frozen model's own loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
)

from maquette.config import validate
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import BadInput, RunFailed
from maquette.evaluation.bits_per_byte import bits_per_byte_of
from maquette.methods.surgery.zett import (
    Network,
    Plan,
    Sampling,
    ZeroShotTransfer,
    add_body_difference,
    hypernet_for,
    identity_loss,
    overlap_loss,
    sampler_for,
    surface_forms,
    train_hypernet,
    transfer,
)
from maquette.parts import Ctx
from maquette.training.ledger import FlopCounter, Ledger
from maquette.training.table_substitution import Substituted, Tables
from maquette.training.tokenizer_transfer import predicted_tables
from maquette.training.vocabulary_swap import apply, source_tables

CODE = ["def add(first, second):\n    return first + second  # the sum of two numbers given"] * 30
PROSE = ["The sum of the first and the second number is what this function will return."] * 30
SMALL = Plan(identity_steps=2, steps=2, batch=4, length=16)
FEW = Sampling(vocabulary=512, queue=8)


def tokenizer(texts=CODE, vocabulary=300, template="none"):
    return train(TokenizerSpec(vocabulary=vocabulary, template=template), texts)


def causal(vocabulary=300, tied=True, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )


def encoder(cls=ElectraForMaskedLM, vocabulary=300):
    torch.manual_seed(0)
    return cls(
        ElectraConfig(
            vocab_size=vocabulary,
            embedding_size=16,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def trained(model, source, plan=SMALL, seed=0, **network):
    own = source_tables(model, source)
    hypernet = hypernet_for(own, source, Network(**{"layers": 1, "heads": 2, **network}))
    sampler = sampler_for(source, FEW)
    rng = np.random.default_rng(seed)
    return train_hypernet(model, source, sampler, CODE + PROSE, hypernet, plan, rng=rng)


# --- losses and schedule -------------------------------------------------------------------------


def test_the_overlap_loss_of_the_hand_case():
    predicted = torch.tensor([[3.0, 4], [9, 9]])
    first = torch.tensor([[3.0, 2], [0, 1]])
    loss = overlap_loss(predicted, first, torch.tensor([True, False]))
    assert float(loss) == pytest.approx(4 / ((math.sqrt(13) + 1) / 2), rel=1e-6)
    assert float(loss) == pytest.approx(1.7370, abs=5e-5)
    none = overlap_loss(predicted, first, torch.tensor([False, False]))
    assert float(none) == 0


def test_the_identity_loss_sums_over_dimensions_and_averages_over_tokens():
    predicted, true = torch.tensor([[1.0, 2], [0, 0]]), torch.tensor([[0.0, 0], [3, 0]])
    assert float(identity_loss(predicted, true)) == (5 + 9) / 2


def test_the_papers_schedule_rises_restarts_and_falls_to_zero():
    plan = Plan(
        identity_steps=10_000, steps=190_000, identity_rate=3e-4, rate=6e-5, warmup=10 / 190
    )
    assert plan.rate_at(0) == pytest.approx(3e-8)
    assert plan.rate_at(4_999) == pytest.approx(1.5e-4)
    assert plan.rate_at(9_999) == pytest.approx(3e-4)
    assert plan.rate_at(10_000) == pytest.approx(6e-9)
    assert plan.rate_at(19_999) == pytest.approx(6e-5)
    assert plan.rate_at(110_000) == pytest.approx(3e-5)  # half way down the cosine
    assert plan.rate_at(199_999) == pytest.approx(0, abs=1e-13)


# --- the frozen model under tables that are not its own ------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_its_own_tables_give_the_models_own_loss(tied):
    model = causal(tied=tied).eval()
    ids = torch.arange(24).reshape(2, 12) * 7 % 300
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    own = source_tables(model, tokenizer())
    out = own.input if own.output is None else own.output
    tables = Tables(own.input, out, torch.ones(300, dtype=torch.bool))
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(Substituted(model).loss(tables, ids, labels), wanted)


def test_an_encoders_own_output_bias_is_switched_off_and_a_given_one_added():
    model = encoder().eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    own, filled = source_tables(model, tokenizer(template="cls_sep")), torch.ones(300) > 0
    ids = torch.randint(6, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 3] = ids[:, 3]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 3]
        wanted = torch.nn.functional.cross_entropy(logits, ids[:, 3])
        bare = torch.nn.functional.cross_entropy(logits - own.bias, ids[:, 3])
    given = Substituted(model)
    torch.testing.assert_close(
        given.loss(Tables(own.input, own.input, filled, own.bias), ids, labels), wanted
    )
    torch.testing.assert_close(given.loss(Tables(own.input, own.input, filled), ids, labels), bare)


def test_an_empty_slot_takes_no_probability():
    model = causal().eval()
    own = source_tables(model, tokenizer())
    wide = torch.cat([own.input, 50 * torch.ones(7, 16)])
    filled = torch.arange(307) < 300
    ids = torch.arange(12).reshape(1, 12)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss
    got = Substituted(model).loss(Tables(wide, wide, filled), ids, labels)
    torch.testing.assert_close(got, wanted)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied", "encoder"])
def test_only_the_hypernetwork_changes_and_all_of_it_does(kind):
    template = "cls_sep" if kind == "encoder" else "none"
    source = tokenizer(template=template)
    model = encoder() if kind == "encoder" else causal(tied=kind == "tied")
    model.train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    own = source_tables(model, source)
    hypernet = hypernet_for(own, source, Network(layers=1, heads=2, bias=True))
    start = {n: p.clone() for n, p in hypernet.named_parameters()}
    plan = SMALL.model_copy(update={"clip": 1e3, "mask_rate": 0.5})
    rng = np.random.default_rng(0)
    done = train_hypernet(model, source, sampler_for(source, FEW), CODE, hypernet, plan, rng=rng)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    # A key's bias shifts all scores of a softmax alike, so it has no gradient but rounding.
    still = [
        n
        for n, p in hypernet.named_parameters()
        if torch.equal(start[n], p) and "key.bias" not in n
    ]
    assert still == []
    assert done.tokens > 0 and done.bytes > 0 and done.flops > 0
    assert len(done.losses["main"]) == len(done.losses["identity"]) == 2


def test_the_bill_is_what_a_counter_over_the_whole_training_counts():
    source, model = tokenizer(), causal()
    short = SMALL.model_copy(update={"steps": 1})
    with FlopCounter() as once:
        one = trained(model, source, short)
    with FlopCounter() as thrice:
        three = trained(model, source, short.model_copy(update={"steps": 3}))
    # The counter also sees what is done once (calibration, the counting itself), which cancels.
    assert three.flops - one.flops == thrice.total - once.total


def test_the_warm_up_teaches_single_tokens_their_own_rows():
    source, model = tokenizer(), causal()
    plan = Plan(identity_steps=60, steps=0, identity_rate=3e-3)
    done = trained(model, source, plan, hidden=32)
    assert done.losses["identity"][-1] < 0.5 * done.losses["identity"][0]
    assert done.losses["main"] == []


def test_the_main_stage_lowers_the_models_loss_under_new_tokenizers():
    source, model = tokenizer(), causal()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.tensor([source(CODE[0])["input_ids"]])
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    plan = Plan(identity_steps=20, steps=60, batch=4, length=24, rate=3e-3, clip=1.0)
    losses = trained(model, source, plan, hidden=32).losses["main"]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_a_seed_repeats_the_training_and_another_does_not():
    source, model = tokenizer(), causal()
    one, same, other = (trained(model, source, seed=s) for s in (0, 0, 1))
    assert one.losses == same.losses != other.losses


@pytest.mark.parametrize("embedded", [400, 5000])
def test_a_part_of_the_vocabulary_can_be_embedded(embedded):
    plan = SMALL.model_copy(update={"embedded": embedded, "identity_tokens": 50})
    whole = trained(causal(), tokenizer(), SMALL)
    part = trained(causal(), tokenizer(), plan)
    assert all(map(math.isfinite, part.losses["main"]))
    assert part.flops < whole.flops


def test_what_cannot_be_trained_is_refused():
    source = tokenizer()
    with pytest.raises(ValueError, match="has no head that scores tokens"):
        trained(encoder(ElectraForPreTraining), tokenizer(template="cls_sep"))
    no_mask = tokenizer()
    no_mask.mask_token = None
    with pytest.raises(ValueError, match="needs a mask token"):
        trained(encoder(), no_mask)
    no_pad = tokenizer()
    no_pad.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        hypernet_for(source_tables(causal(), source), no_pad, Network())
    with pytest.raises(ValueError, match="do not belong together"):
        trained(causal(vocabulary=290), source)
    with pytest.raises(ValueError, match="divisible by heads"):
        trained(causal(), source, heads=3)
    hypernet = hypernet_for(source_tables(causal(), source), source, Network(heads=2))
    bare = type(sampler_for(source, FEW))(8, 512)
    with pytest.raises(ValueError, match=r"sampler must hold the special ids \[0\]"):
        train_hypernet(causal(), source, bare, CODE, hypernet, SMALL, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="source rows must be 16 wide"):
        two = source_tables(causal(tied=False), source)
        tied = hypernet_for(source_tables(causal(), source), source, Network(heads=2))
        predicted_tables(tied, two, source, source)


def test_a_tied_model_has_no_output_rows_for_a_network_that_wants_them():
    source = tokenizer()
    wants_two = hypernet_for(source_tables(causal(tied=False), source), source, Network(heads=2))
    with pytest.raises(ValueError, match=r"source rows must be 32 wide \(input and output\)"):
        predicted_tables(wants_two, source_tables(causal(), source), source, source)


def test_a_loss_that_is_no_number_stops_the_training():
    model = causal()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(RunFailed, match="loss is nan at step 2"):
        trained(model, tokenizer())


# --- transfer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_fvt_to_the_same_tokenizer_is_the_original_model(tied):
    source, model = tokenizer(), causal(tied=tied)
    report = transfer(
        model, source, source, "fvt", texts=CODE, bits_per_byte=bits_per_byte_of(CODE[:2])
    )
    assert report.bits_after == report.bits_before
    assert (report.overlap, report.length_change) == (300, 0.0)


@pytest.mark.parametrize("how", ["fvt", "lexical", "random", "hypernet"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_way_gives_the_same_report_and_a_plain_model(how, tied, tmp_path):
    source, target, model = tokenizer(), tokenizer(PROSE, 310), causal(tied=tied)
    given = trained(model, source).hypernet if how == "hypernet" else how
    measure = bits_per_byte_of(PROSE[:2])
    report = transfer(model, source, target, given, texts=PROSE, bits_per_byte=measure)
    assert report.how == how
    assert report.target_vocabulary == 310 and 256 <= report.overlap <= 310
    lengths = [len(t(PROSE[0], add_special_tokens=False)["input_ids"]) for t in (target, source)]
    assert report.length_change == pytest.approx(lengths[0] / lengths[1] - 1)
    assert math.isfinite(report.bits_after)
    special = target.all_special_ids
    own = causal(tied=tied).get_input_embeddings().weight[special]
    torch.testing.assert_close(model.get_input_embeddings().weight[special], own)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert measure(again, target) == pytest.approx(report.bits_after, abs=1e-6)


def test_lexical_copies_what_random_draws():
    source, target = tokenizer(), tokenizer(PROSE, 310)
    lexical, drawn = causal(), causal()
    transfer(lexical, source, target, "lexical")
    transfer(drawn, source, target, "random")
    ids, report = surface_forms(target, source)
    shared = [i for i in np.flatnonzero(report.pieces_V == 1) if i not in report.special]
    rows = lexical.get_input_embeddings().weight[shared]
    torch.testing.assert_close(rows, causal().get_input_embeddings().weight[ids[shared, 0]])
    assert not (rows == drawn.get_input_embeddings().weight[shared]).any()


def test_ofa_needs_word_vectors_and_unknown_ways_are_named():
    source = tokenizer()
    with pytest.raises(ValueError, match="`ofa` needs `word_vectors`"):
        transfer(causal(), source, source, "ofa")
    with pytest.raises(ValueError, match="how must be fvt, lexical, random, ofa"):
        transfer(causal(), source, source, "focus")


def test_a_sibling_gets_the_rows_that_the_bases_embeddings_predict():
    source, target, base = tokenizer(), tokenizer(PROSE, 310), causal()
    hypernet = trained(base, source).hypernet
    sibling, wanted = causal(seed=5), causal()
    transfer(sibling, source, target, hypernet, base=base)
    transfer(wanted, source, target, hypernet)
    rows = sibling.get_input_embeddings().weight
    torch.testing.assert_close(rows, wanted.get_input_embeddings().weight)
    body = sibling.model.layers[0].mlp.up_proj.weight
    assert torch.equal(body, causal(seed=5).model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_body_difference_is_added_to_the_body_alone(tied):
    sibling, base, after = causal(tied=tied, seed=1), causal(tied=tied), causal(310, tied, seed=2)
    before = {n: p.clone() for n, p in sibling.state_dict().items()}
    add_body_difference(sibling, after, base, 0.25)
    for name, now in sibling.state_dict().items():
        moved = before[name]
        if "embed_tokens" not in name and "lm_head" not in name:
            moved = moved + 0.25 * (after.state_dict()[name] - base.state_dict()[name])
        torch.testing.assert_close(now, moved)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 2"):
        add_body_difference(sibling, after, base, 2)
    with pytest.raises(ValueError, match="do not have the same body"):
        add_body_difference(sibling, encoder(), base)


def test_a_token_the_source_cannot_name_gets_the_mean_row():
    source, model = tokenizer(), causal()
    target = tokenizer(PROSE, 310)
    target.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tables = predicted_tables(
        trained(model, source).hypernet, source_tables(model, source), source, target
    )
    own = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(
        tables.coordinates[target.convert_tokens_to_ids("<new>")], own.mean(0)
    )
    apply(model, tables)
    assert model.config.vocab_size == 311


# --- the part ------------------------------------------------------------------------------------


def context(folder, target, seed=0):
    return Ctx(
        device=torch.device("cpu"), seed=seed, cache=folder, ledger=Ledger(), tokenizer=target
    )


def part(folder, **given):
    (folder / "text").mkdir(exist_ok=True)
    for i, text in enumerate(CODE[:1] + PROSE[:1]):
        (folder / "text" / f"{i}.txt").write_text(text * 20)
    options = {
        "network": {"layers": 1, "heads": 2},
        "plan": SMALL.model_dump(),
        "sampling": FEW.model_dump(),
        "text": [{"path": str(folder / "text")}],
    }
    return ZeroShotTransfer(**{**options, **given})


def test_the_hypernetwork_is_trained_once_and_billed_to_every_target(tmp_path):
    source, model, surgery = tokenizer(), causal(), part(tmp_path)
    one, other = (context(tmp_path / "cache", tokenizer(PROSE, v)) for v in (310, 305))
    first = surgery.fit(model, source, one)
    surgery.fit(model, source, other)
    assert len(list((tmp_path / "cache").glob("hypernet-*/card.json"))) == 1
    bills = [ctx.ledger.as_dict()["causes"]["helper"] for ctx in (one, other)]
    assert bills[0] == bills[1] and bills[0]["flops"] > 0 and bills[0]["tokens"] > 0
    assert one.ledger.entries["train"].flops < 0.1 * bills[0]["flops"]  # the pass of this swap
    again = surgery.fit(causal(), source, context(tmp_path / "empty", tokenizer(PROSE, 310)))
    assert torch.equal(again.tensors["coordinates"], first.tensors["coordinates"])
    surgery.fit(causal(seed=1), source, context(tmp_path / "cache", tokenizer(PROSE, 310)))
    assert len(list((tmp_path / "cache").glob("hypernet-*/card.json"))) == 2


def test_a_surgery_is_replayed_from_its_state_on_a_fresh_model(tmp_path):
    source, target, surgery = tokenizer(), tokenizer(PROSE, 310), part(tmp_path)
    state = surgery.fit(causal(), source, context(tmp_path / "cache", target))
    assert set(state.meta["losses"]) == {"identity", "main", "overlap"}
    one, read = surgery.apply(causal(), source, state)
    other, _ = surgery.apply(causal(), source, state)
    assert read(PROSE[0])["input_ids"] == target(PROSE[0])["input_ids"]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert surgery.merge(one) is one
    assert one.config.vocab_size == 310


def test_what_a_user_can_get_wrong_is_bad_input(tmp_path):
    source, target = tokenizer(), tokenizer(PROSE, 310)
    with pytest.raises(BadInput, match="tokenizer of the stage's workload"):
        part(tmp_path).fit(causal(), source, context(tmp_path, None))
    with pytest.raises(BadInput, match="no text to train the hypernetwork on"):
        part(tmp_path, text=[]).fit(causal(), source, context(tmp_path, target))
    with pytest.raises(BadInput, match="divisible by heads"):
        part(tmp_path, network={"heads": 3}).fit(causal(), source, context(tmp_path, target))
    with pytest.raises(BadInput, match="304 embeddings, its tokenizer 300 ids"):
        part(tmp_path).fit(causal(304), source, context(tmp_path, target))
    part(tmp_path, drop_padding=True).fit(causal(304), source, context(tmp_path, target))


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        ({"sample": "foo"}, "sample", "`foo` is not a size"),
        ({"sample": "0MB"}, "sample", "`0MB` is not a size"),
        ({"network": {"hidden": 64, "heads": 3}}, "network", "divisible by heads, got 64 and 3"),
        ({"plan": {"rate": math.inf}}, "plan.rate", "finite number"),
        ({"sampling": {"noise_mean": math.inf}}, "sampling.noise_mean", "finite number"),
    ],
)
def test_options_that_cannot_work_are_refused_when_they_are_read(options, key, says):
    with pytest.raises(BadInput, match=says) as caught:
        validate(ZeroShotTransfer, options)
    assert caught.value.key == key


def test_two_hops_a_source_and_a_new_vocabulary_without_a_step(world):
    source = {"name": "source", "budget": "4step"}
    target = {
        "name": "target",
        "init": {"from": "source"},
        "workload": world.workload("text/causal", vocabulary=400),
        "surgery": [{"type": "zett", **ZeroShotTransfer.examples[0]}],
        "budget": "0step",
    }
    run = world.train(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "stages": [source, target],
            "evaluate": [{"type": "bits-per-byte", "max_tokens": 2000}],
        }
    )
    record = run.store.run(run.digest)
    assert 0 < record.metrics["bits-per-byte"] < 20
    assert record.ledger["helper"]["flops"] > 0
    folders = [run.store.run_dir(stage) for stage in record.metrics["stages"]]
    before, after = (LlamaForCausalLM.from_pretrained(f / "model") for f in folders)
    assert (before.config.vocab_size, after.config.vocab_size) == (512, 400)
    body = before.model.layers.state_dict()
    assert all(torch.equal(body[n], p) for n, p in after.model.layers.state_dict().items())
