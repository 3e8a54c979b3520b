"""Does a decoder name the true member after a dot? Dots of held-out Python files.

The experiment of monitor-guided decoding (Agrawal et al., 2023, arXiv:2306.10763) made small,
with two controls: a sham monitor that allows as many identifiers, drawn from the file at random,
and the member that followed the same object name most often in training.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maquette.data.installed import parse, site_folders
from maquette.decoding import metrics
from maquette.decoding.monitor import DereferenceMonitor, TableAnalyser, is_shown
from maquette.errors import BadInput
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register

if TYPE_CHECKING:
    from maquette.data.corpus import Corpus
    from maquette.decoding.analysis import RememberingAnalyser

_BEFORE_DOT = r"((?<!\w)\w++|[)\]}\"'])\."
_ACCESS = re.compile(_BEFORE_DOT + r"([^\W\d]\w*)")
_AT_DOT = re.compile(_BEFORE_DOT + r"\Z")


@dataclass(frozen=True)
class Dot:
    """One attribute access. text: the file up to and including the dot. truth: the rest of the
    line. path: the file on this machine, if it is known."""

    item: str
    text: str
    truth: str
    path: str | None


def dots_of(name: str, source: str, path: str | None = None) -> list[Dot]:
    """Every attribute access whose member stands directly behind the dot, in order."""
    tree = parse(source)
    if tree is None:
        return []
    data = source.encode()
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.end_lineno and node.end_col_offset:
            column = node.end_col_offset - len(node.attr.encode())
            at = starts[node.end_lineno - 1] + column
            if data[at - 1 : at] != b"." or data[at : at + len(node.attr.encode())] != (
                node.attr.encode()
            ):
                continue  # the parser counts lines at form feeds too, or the member is apart
            line_end = data.find(b"\n", at)
            truth = data[at : len(data) if line_end < 0 else line_end]
            item = f"{name}:{node.end_lineno}:{column}"
            found[at] = Dot(item, data[:at].decode(), truth.decode(), path)
    return [found[at] for at in sorted(found)]


def choose_dots(
    files: Iterable[tuple[str, str, str | None]], n: int, per_file: int, rng: np.random.Generator
) -> list[Dot]:
    """At most `n` dots, at most `per_file` of each (name, source, path), drawn at random."""
    chosen: list[Dot] = []
    for name, source, path in files:
        dots = dots_of(name, source, path)
        picked = rng.permutation(len(dots))[:per_file]
        chosen.extend(dots[i] for i in sorted(picked))
    order = sorted(rng.permutation(len(chosen))[:n])
    return [chosen[i] for i in order]


def installed_path(document_id: str) -> str | None:
    """The file a document of the `python:` corpus was read from, if it is still there."""
    kind, _, name = document_id.partition("/")
    roots = {"stdlib": [Path(sysconfig.get_paths()["stdlib"])], "site": site_folders()}
    return next((str(r / name) for r in roots.get(kind, []) if (r / name).is_file()), None)


def attribute_counts(sources: Iterable[str]) -> dict[str, Counter[str]]:
    """How often each member follows each object name (or closing sign); "" counts them all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        for owner, member in _ACCESS.findall(source):
            counts[owner][member] += 1
            counts[""][member] += 1
    return dict(counts)


def most_frequent(counts: Mapping[str, Counter[str]], text: str) -> str:
    """The member that follows the name before the dot most often; of any name if it is new."""
    match = _AT_DOT.search(text[-200:])
    seen = counts.get(match[1]) if match else None
    seen = seen or counts.get("")
    if not seen:
        return ""
    return min(seen, key=lambda member: (-seen[member], member))


def sham_set(text: str, size: int, rng: np.random.Generator) -> frozenset[str]:
    """`size` different identifiers of the text at random; all of them if it has fewer."""
    names = sorted(set(metrics.identifiers(text)))
    picked = rng.permutation(len(names))[:size]
    return frozenset(names[i] for i in picked)


@register("dereference")
class Dereference(Audit):
    """Members named after the dots of held-out Python files.

    The analyser's set scores every arm. Its seconds are billed to `scorer` where the decoder
    itself needs it, else to `evaluation`, at what asking each question once costs, cached or not.
    """

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "next-identifier-match": "higher",
        "next-identifier-match-covered": "higher",
        "member-exists": "higher",
        "identifier-sequence-match": "higher",
        "analyser-covers": "higher",
    }
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    card: ClassVar[Card] = Card(
        title="Members named after dots",
        paper="Agrawal, Kanade, Goyal, Lahiri and Rajamani, 2023, NeurIPS",
        arxiv="2306.10763",
        idea="Cut held-out Python files after a dot, let the model write on, and compare the "
        "member it names with the one that stood there and with those the analyser knows.",
        claim="Measures whether a monitor (or a rival) makes a model name the right member more "
        "often; `decoder` picks who answers.",
        paper_figures=(
            "next identifier matches, score@1: CodeGen-350M 68.9 to 76.2 with the monitor, "
            "SantaCoder 75.7 to 82.3 (result tables of the official repository, Java)",
        ),
        defaults_from="Greedy decoding as in the official tests; 150 dots of the standard library.",
        cost="Generation, billed to `evaluation`; the analyser's seconds, billed to `scorer` "
        "where the decoder itself needs them.",
        when="For causal models of Python. jedi's sets are not sound: `analyser-covers` gives the "
        "share of dots where the truth is among them, the ceiling of any monitor.",
        differs=("Python and jedi instead of Java and a language server.",),
        example="""
from maquette.decoding.metrics import score_at_k

assert score_at_k([1, 0, 0, 0, 0, 0], 1) == 1 / 6    # expected best of one of six samples
assert score_at_k([1, 0, 0, 0, 0, 0], 6) == 1
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"domain": None, "dots": 8, "context": 24, "new_tokens": 4},
    )

    decoder: Literal["plain", "monitor", "sham", "frequency"] = "plain"
    """`plain`: the model alone; `monitor`: held to the analyser's set; `sham`: held to as many
    random identifiers of the file; `frequency`: no model, the most frequent member."""
    dots: int = Field(150, ge=1)
    """Dots in all."""
    per_file: int = Field(12, ge=1)
    """Dots of one file at most."""
    domain: str | None = "stdlib"
    """Domain of the held-out documents; None takes every domain."""
    context: int = Field(192, ge=1)
    """Prompt tokens the model reads, from the end; the analyser reads the whole file so far."""
    new_tokens: int = Field(32, ge=1)
    """Tokens generated, greedily."""
    members: Literal["all", "no-dunder", "public"] = "all"
    """Which members count."""
    every_dot: bool = False
    """Hold the model at the dots it writes itself too; each of them asks the analyser."""
    timeout: float = Field(30.0, gt=0)
    """Seconds per question to the analyser; a late answer is the empty set, for all seeds and arms
    that share the store. Longer than at a keyboard: a busy machine must not change the items."""
    batch_size: int = Field(16, ge=1)
    """Prompts generated together."""
    draw: int = 0
    """Which dots: the same number gives the same ones for every seed and arm."""

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        """Rows per dot: `next-identifier-match` and `identifier-sequence-match` (over the rest of
        the line) on all dots, `next-identifier-match-covered` where the analyser's set holds the
        truth, `member-exists` where the set is not empty, `analyser-covers` on all."""
        from maquette.decoding.jedi_analyser import JediAnalyser

        dots = self._dots(data)
        store = ctx.cache / "monitors" / "answers.sqlite"
        with JediAnalyser(None, self.timeout, store) as analyser:
            answers = [analyser.complete(d.text, d.path) for d in dots]
            sets = [frozenset(m for m in a if is_shown(m, self.members)) for a in answers]
            with ctx.ledger.meter("evaluation"):
                written = self._write(subject, data, ctx, dots, sets, analyser)
            cause = "scorer" if self.decoder in ("monitor", "sham") else "evaluation"
            ctx.ledger.bill(cause, seconds=analyser.report().charged_seconds)
        return _rows(dots, sets, written)

    def _dots(self, data: Corpus) -> list[Dot]:
        files = []
        for batch in data.documents("held_out"):
            columns = (batch[c].to_pylist() for c in ("id", "text", "domain"))
            for name, text, domain in zip(*columns, strict=True):
                if self.domain is None or domain == self.domain:
                    files.append((name, text, installed_path(name)))
        files.sort()
        dots = choose_dots(files, self.dots, self.per_file, np.random.default_rng(self.draw))
        if not dots:
            raise BadInput(
                f"no attribute access in {len(files)} held-out documents"
                + (f" of the domain `{self.domain}`" if self.domain else ""),
                key="evaluate.dereference.domain",
                mend="use a corpus of Python code (`python:code`), or domain: null",
            )
        return dots

    def _write(
        self,
        subject: Subject,
        data: Corpus,
        ctx: Ctx,
        dots: Sequence[Dot],
        sets: Sequence[frozenset[str]],
        analyser: RememberingAnalyser,
    ) -> list[str]:
        """What the decoder writes after each dot."""
        if self.decoder == "frequency":
            batches = (batch["text"].to_pylist() for batch in data.documents("train"))
            counts = attribute_counts(text for texts in batches for text in texts)
            return [most_frequent(counts, d.text) for d in dots]
        monitors = None
        if self.decoder == "monitor":
            otherwise = analyser if self.every_dot else None
            monitors = self._monitors(dots, sets, otherwise)
        elif self.decoder == "sham":
            shams = [
                sham_set(d.text, len(s), np.random.default_rng([self.draw, i]))
                for i, (d, s) in enumerate(zip(dots, sets, strict=True))
            ]
            monitors = self._monitors(dots, shams, None)
        return self._generate(subject, dots, monitors)

    def _monitors(
        self,
        dots: Sequence[Dot],
        sets: Sequence[frozenset[str]],
        otherwise: RememberingAnalyser | None,
    ) -> list[DereferenceMonitor]:
        return [
            DereferenceMonitor(TableAnalyser({d.text: s}, otherwise), d.path, members=self.members)
            for d, s in zip(dots, sets, strict=True)
        ]

    def _generate(
        self,
        subject: Subject,
        dots: Sequence[Dot],
        monitors: Sequence[DereferenceMonitor] | None,
    ) -> list[str]:
        from maquette.decoding.generation import Sampling, generate
        from maquette.decoding.vocabulary import VocabIndex

        index = VocabIndex.from_tokenizer(subject.tokenizer)
        written: list[str] = []
        was_training = subject.model.training
        subject.model.eval()
        for at in range(0, len(dots), self.batch_size):
            part = slice(at, at + self.batch_size)
            made, _ = generate(
                subject.model,
                subject.tokenizer,
                [d.text for d in dots[part]],
                Sampling(self.new_tokens),
                index=index,
                monitors=None if monitors is None else monitors[part],
                context=self.context,
            )
            written.extend(samples[0] for samples in made)
        subject.model.train(was_training)
        return written


def _rows(dots: Sequence[Dot], sets: Sequence[frozenset[str]], written: Sequence[str]) -> pa.Table:
    rows: list[tuple[str, str, float]] = []
    for dot, members, text in zip(dots, sets, written, strict=True):
        match = metrics.next_identifier_match(text, dot.truth)
        line = text.split("\n", 1)[0]
        sequence = metrics.identifier_sequence_match(line, dot.truth)
        covered = metrics.next_identifier(dot.truth) in members
        rows.append(("next-identifier-match", dot.item, match))
        rows.append(("identifier-sequence-match", dot.item, sequence))
        rows.append(("analyser-covers", dot.item, float(covered)))
        if covered:
            rows.append(("next-identifier-match-covered", dot.item, match))
        if members:
            rows.append(("member-exists", dot.item, metrics.member_exists(text, members)))
    names, items, values = zip(*rows, strict=True)
    return pa.table(
        {
            "metric": pa.array(names, pa.string()),
            "item": pa.array(items, pa.string()),
            "value": pa.array(values, pa.float64()),
            "weight": pa.array(np.ones(len(rows)), pa.float64()),
        }
    )
