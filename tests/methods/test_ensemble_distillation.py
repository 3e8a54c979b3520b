"""Text sampled from a stage joins the training part of another, billed and by its share."""

import pyarrow as pa
import pytest
import torch

from maquette.config import validate
from maquette.conformance.world import OPTIONS
from maquette.data.tokenizers import Encoder
from maquette.errors import BadInput
from maquette.methods.data.ensemble_distillation import (
    EnsembleDistillation,
    kept_gain,
    mixed_epochs,
    mixed_steps,
    teacher_writes,
)
from maquette.recipe import parse_recipe
from maquette.study.execute import execute, train_stages
from maquette.study.models import load_subject
from maquette.training.ledger import TRAINING_CAUSES

SHARE = 0.75
MIX = {"teacher": SHARE, "real": 1 - SHARE}
FEED = {
    "type": "domain-upsampling",
    "groups": {"teacher": ["teacher"], "real": ["*"]},
    "base": MIX,
    "upsampled": MIX,
    "control": "base",
    "fraction": 0.5,
    "min_source_tokens": 64,
}


def test_sampled_text_lengthens_a_run_so_that_the_real_text_is_read_as_often():
    assert mixed_steps(800, 16, 0.75) == 51_200
    assert mixed_steps(800, 16, 0.0) == 12_800
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="teacher_share"):
            mixed_steps(800, 16, share)


def test_steps_and_passes_over_both_texts_are_the_same_run():
    rows, batch, epochs, share, times = 4000, 16, 16, 0.75, 4
    passes = mixed_epochs(epochs, share, times)
    assert passes == pytest.approx(12.8)
    both = rows * (1 + times)
    assert passes * both / batch == mixed_steps(rows // batch, epochs, share)
    with pytest.raises(ValueError, match="times > 0"):
        mixed_epochs(16, 0.75, 0)


def test_a_student_keeps_a_share_of_the_ensembles_gain():
    assert kept_gain(single=3.5, student=3.4, ensemble=3.3) == pytest.approx(0.5)
    assert kept_gain(3.5, 3.6, 3.3) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="not better"):
        kept_gain(3.3, 3.4, 3.3)


def recipe(world, **options):
    op = {"type": "ensemble-distillation", "times": 0.05, "document_tokens": 40, **options}
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "6step",
        "stages": [
            {"name": "a"},
            {"name": "b", "reseed": 1},
            {"name": "teacher", "init": {"ensemble": ["a", "b"]}, "budget": "0step"},
            {"name": "student", "data": [op], "feed": FEED},
        ],
    }


@pytest.fixture(scope="module")
def run(world):
    return world.train(recipe(world))


@pytest.fixture(scope="module")
def done(run):
    return train_stages(run.recipe, run.seed, run.store, OPTIONS)


def test_the_samples_are_a_domain_of_the_training_part_and_of_no_other(done):
    real, mixed = done["a"].corpus, done["student"].corpus
    assert set(mixed.domains) == {*real.domains, "teacher"}
    assert mixed.held_out.digest == real.held_out.digest
    texts = {t for batch in real.documents() for t in batch["text"].to_pylist()}
    kept = [row for batch in mixed.documents() for row in batch.to_pylist()]
    assert texts <= {row["text"] for row in kept if row["domain"] != "teacher"}
    start, stop = mixed.train.domain("teacher")
    assert stop - start > 0


def test_the_student_trains_and_pays_for_its_teacher_and_its_samples(run, done):
    ledger = run.store.run(run.digest).ledger
    members = [done[name].ledger.total("flops", TRAINING_CAUSES) for name in ("a", "b")]
    assert ledger["helper"]["flops"] == pytest.approx(sum(members), rel=1e-6)
    wanted = 0.05 * done["a"].corpus.train.n_tokens
    assert ledger["generator"]["tokens"] == pytest.approx(wanted, abs=2)
    rows = [row for batch in done["student"].corpus.documents() for row in batch.to_pylist()]
    written = sum(len(row["text"].encode()) for row in rows if row["domain"] == "teacher")
    assert ledger["generator"]["bytes"] == written
    assert ledger["generator"]["flops"] > 0
    assert ledger["train"]["flops"] > 0


def test_samples_that_another_run_drew_are_billed_all_the_same(world, run):
    data = recipe(world)
    data["stages"][-1]["budget"] = "2step"
    again = run.store.run(execute(parse_recipe(data), run.seed, run.store, OPTIONS)).ledger
    first = run.store.run(run.digest).ledger
    assert again["generator"]["tokens"] == first["generator"]["tokens"]
    assert again["generator"]["flops"] == first["generator"]["flops"]


def test_another_seed_of_the_part_is_other_text(world, done):
    ctx = done["student"].ctx
    table = pa.Table.from_batches(done["a"].corpus.documents())
    drawn = [
        EnsembleDistillation(tokens=60, document_tokens=20, seed=seed).fit(table, ctx).meta["texts"]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_domain_of_that_name_in_the_corpus_is_refused(world, done):
    data = recipe(world, domain="library")
    with pytest.raises(BadInput, match="domain `library` of its own") as caught:
        execute(parse_recipe(data), 0, world.store("shared"), OPTIONS)
    assert caught.value.key == "domain"


@pytest.mark.parametrize(
    ("workload", "objective"), [("text/encoder", "masked-lm"), ("text/seq2seq", "span-corruption")]
)
def test_an_encoder_cannot_teach_and_is_refused_when_the_recipe_is_read(world, workload, objective):
    data = recipe(world)
    encoder = {"workload": world.workload(workload), "objective": objective}
    data["stages"] = [{"name": "teacher", **encoder}, data["stages"][-1]]
    with pytest.raises(BadInput, match="cannot write from left to right") as caught:
        parse_recipe(data)
    assert caught.value.key == "stages.student.data.0.teacher"


def test_two_amounts_and_a_domain_without_a_name_are_refused():
    with pytest.raises(BadInput, match=r"either `times`.*or `tokens`.*got 50 and 300"):
        validate(EnsembleDistillation, {"times": 50, "tokens": 300})
    with pytest.raises(BadInput, match="at least 1 character"):
        validate(EnsembleDistillation, {"domain": ""})
    spec = EnsembleDistillation(tokens=300).spec()
    del spec["type"]
    assert validate(EnsembleDistillation, spec).tokens == 300


def test_what_is_written_starts_as_a_document_and_holds_no_special_token(done):
    subject = load_subject(done["teacher"])
    texts, sampled = teacher_writes(
        subject.model, subject.tokenizer, 200,
        generator=torch.Generator().manual_seed(0), longest=30,
    )  # fmt: skip
    assert 199 <= sampled.n_tokens <= 200
    assert not any(special in text for text in texts for special in ("[EOS]", "[PAD]"))
    assert all(len(ids) for ids in Encoder(subject.tokenizer)(texts))
    subject.model.train()
    with pytest.raises(ValueError, match="training mode"):
        teacher_writes(
            subject.model, subject.tokenizer, 20, generator=torch.Generator().manual_seed(0)
        )
