"""Monitor-guided decoding (Agrawal et al., 2023, NeurIPS, arXiv:2306.10763).

While a frozen model writes code, a static analyser is asked at each dot which members may follow,
and every token that would leave them is forbidden. No training, no longer prompt.

The mathematics is in `maquette.decoding`: `VocabIndex` (which tokens a set of identifiers leaves
allowed), `DereferenceMonitor` (when there is a constraint) and `MonitorLogitsProcessor`.

Differences from the official code, each for a reason:
- identifiers are matched as bytes, because a byte-level token need not be valid text;
- all ids of one string are allowed together, where the official trie keeps one of them;
- end of sequence is allowed after a finished identifier, where the official code never allows it;
- monitors keep no state, so that beams may be re-ordered;
- a constraint no token can satisfy is lifted and counted instead of leaving only -inf;
- `strict`, the default, also judges dereferences inside one token (`.append(`), which slip through
  the official monitor;
- white space after the dot keeps the constraint, where the official trigger is the dot alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from maquette.decoding.analysis import RememberingAnalyser
from maquette.decoding.monitor import DereferenceMonitor
from maquette.decoding.processor import MaskReport
from maquette.decoding.vocabulary import PYTHON_BREAKS, VocabIndex, break_bytes
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, Decoder, Needs, register

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_KEY = b"monitor"
"""Key of the table's schema metadata that holds the report as JSON."""


@register("monitor-guided-decoding")
class MonitorGuidedDecoding(Decoder):
    """Completes code under a dereference monitor (Agrawal et al., 2023, arXiv:2306.10763)."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}), scale="one")

    analyser: Literal["jedi", "language-server"] = "jedi"
    """Who is asked: `jedi` for Python (extra `monitors`), or a language server through multilspy
    (extra `monitors-lsp`; the paper uses Eclipse JDT.LS for Java)."""
    language: str = "python"
    """Language of a language server; jedi knows Python alone."""
    project: Path | None = None
    """Folder of the code base; None lets jedi know the installed packages alone."""
    timeout: float = Field(5.0, gt=0)
    """Seconds per question; a late answer is no constraint."""
    members: Literal["all", "no-dunder", "public"] = "all"
    """Which members count: all (the paper), none of `__add__`'s kind, or no `_x` either."""
    strict: bool = True
    """Also judge dereferences inside one token (`.append`); False is the paper's rule, under which
    such tokens escape the monitor."""
    finish_typed: bool = True
    """Hold an identifier that the prompt breaks off (`self.get`) to the members too; False is the
    paper's rule."""
    new_tokens: int = Field(512, ge=1)
    """The most tokens generated (paper: 512)."""
    context: int | None = Field(None, ge=1)
    """Prompt tokens the model reads, from the end (paper: 2048 - 512); None: all it can take. The
    analyser always reads the whole prompt."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; the paper's samples use 0.2, 0.4, 0.6 and 0.8."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the sampling, taken among allowed tokens."""
    samples: int = Field(1, ge=1)
    """Continuations per prompt (paper: 6)."""
    beams: int = Field(1, ge=1)
    """Beams; above 1 with temperature 0 alone."""
    batch_size: int = Field(8, ge=1)
    """Prompts generated together."""

    card: ClassVar[Card] = Card(
        title="Monitor-guided decoding",
        paper="Agrawal, Kanade, Goyal, Lahiri and Rajamani, 2023, NeurIPS",
        arxiv="2306.10763",
        idea="A code model invents members of types that are defined in another file. A static "
        "analyser knows the true ones: it is asked at each dot, and tokens that lead to no member "
        "get probability 0.",
        claim="On dots of held-out files, the same model names the true member more often under "
        "the monitor than without, and more often than under a random set of the same size.",
        paper_figures=(
            "Compilation rate, score@1: CodeGen-350M 35.7 to 44.6, SantaCoder 44.7 to 55.3",
            "Next identifier match, score@1: CodeGen-350M 68.9 to 76.2, SantaCoder 75.7 to 82.3",
            "text-davinci-003 without a monitor: 51.7 and 80.8",
        ),
        defaults_from="The official code: 512 new tokens, all members, a trigger on the dot alone.",
        cost="The analyser's seconds, once per distinct text up to a dot (cause `scorer`), also "
        "where a token that begins with a dot is likely and another one is taken; the "
        "masks cost microseconds per token (`benchmarks/monitor_overhead.py`).",
        when="When generated code calls into types the model has not seen and an analyser knows "
        "them. With Python expect holes: an analyser that misses the true member forbids it.",
        clashes=(
            "A truncation of the logits that stands before the monitor in a processor list",
            "Beam sampling: it draws more candidates than a constraint may leave",
        ),
        differs=(
            "Bytes instead of characters: byte-level tokens need not be valid text.",
            "All ids of one string are allowed; the official trie forbids all but one.",
            "End of sequence is allowed after a finished identifier.",
            "No state between tokens, so that beams may be re-ordered.",
            "A constraint that no token satisfies is lifted and counted.",
            "Dereferences inside one token (`.append`) are judged too; the official monitor wakes "
            "only when the text ends in a dot.",
            "White space after the dot keeps the constraint; the official one is asleep then.",
            "Python, by jedi, besides language servers; its answers are not sound.",
        ),
        example="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.decoding.monitor import DereferenceMonitor, TableAnalyser
from maquette.decoding.processor import MonitorLogitsProcessor
from maquette.decoding.vocabulary import VocabIndex

pieces = [b"", *(bytes([b]) for b in range(128))]   # id 0 ends a sequence, id b + 1 is byte b
index = VocabIndex(pieces, eos_ids=[0])             # or VocabIndex.from_tokenizer(tokenizer)
analyser = TableAnalyser({"queue.": frozenset({"append", "appendleft"})})
processor = MonitorLogitsProcessor(index, DereferenceMonitor(analyser))   # strict by default
model = LlamaForCausalLM(LlamaConfig(vocab_size=129, hidden_size=16, intermediate_size=32,
                                     num_hidden_layers=1, num_attention_heads=2, eos_token_id=0))
ids = torch.tensor([[b + 1 for b in b"queue."]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0,
                     do_sample=False, logits_processor=[processor])
assert index.join(out[0].tolist()).startswith(b"queue.append")
""",
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> MonitorGuidedDecoding:
        if self.analyser == "jedi" and self.language != "python":
            raise ValueError(
                f"jedi analyses Python, got language {self.language!r} (use analyser: "
                "language-server)"
            )
        if self.analyser == "language-server" and self.project is None:
            raise ValueError("project must name the code base's folder for a language server")
        self._sampling()
        return self

    def _sampling(self) -> Any:
        from maquette.decoding.generation import Sampling

        return Sampling(self.new_tokens, self.temperature, self.top_p, self.samples, self.beams)

    @contextmanager
    def analysing(self, cache: Path) -> Iterator[RememberingAnalyser]:
        """The analyser, running; its answers are kept below `cache`."""
        store = cache / "monitors" / "answers.sqlite"
        if self.analyser == "jedi":
            from maquette.decoding.jedi_analyser import JediAnalyser

            with JediAnalyser(self.project, self.timeout, store) as python:
                yield python
        else:
            from maquette.decoding.language_server import LanguageServerAnalyser

            assert self.project is not None
            with LanguageServerAnalyser(self.project, self.language, self.timeout, store) as server:
                yield server

    def breaks(self) -> frozenset[int]:
        """Bytes that end an identifier of the language."""
        if self.analyser == "jedi":
            return PYTHON_BREAKS
        from maquette.decoding.language_server import IDENTIFIER_SIGNS

        return break_bytes(IDENTIFIER_SIGNS.get(self.language, ""))

    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: pa.RecordBatch,
        ctx: Ctx,
    ) -> pa.Table:
        """Columns `item`, `prediction` (the first continuation) and `samples` (all of them).

        batch: column `text` (prompts), and maybe `item` (names) and `path` (the file a prompt
        belongs to). The schema's metadata holds what masks and analyser did, as JSON.
        Raises BadInput if the tokenizer's tokens are no bytes or do not fit the model.
        """
        import pyarrow as pa

        prompts = batch["text"].to_pylist()
        index = self._index(model, tokenizer)
        names = batch.schema.names
        paths = batch["path"].to_pylist() if "path" in names else [None] * len(prompts)
        items = batch["item"].to_pylist() if "item" in names else map(str, range(len(prompts)))
        samples: list[list[str]] = []
        reports: list[MaskReport] = []
        with self.analysing(ctx.cache) as analyser:
            monitors = [self._monitor(analyser, p) for p in paths]
            for at in range(0, len(prompts), self.batch_size):
                part = slice(at, at + self.batch_size)
                made, report = self._generate(
                    model, tokenizer, prompts[part], monitors[part], index, ctx, at
                )
                samples.extend(made)
                reports.append(report)
            cost = analyser.report()
        ctx.ledger.bill("scorer", seconds=cost.charged_seconds)
        summary = {"masks": _total(reports), "analyser": asdict(cost)}
        table = pa.table(
            {
                "item": pa.array(list(items), pa.string()),
                "prediction": pa.array([s[0] for s in samples], pa.string()),
                "samples": pa.array(samples, pa.list_(pa.string())),
            }
        )
        return table.replace_schema_metadata({REPORT_KEY: json.dumps(summary)})

    def _monitor(self, analyser: RememberingAnalyser, path: str | None) -> DereferenceMonitor:
        return DereferenceMonitor(
            analyser,
            path,
            members=self.members,
            finish_typed=self.finish_typed,
            breaks=self.breaks(),
        )

    def _index(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> VocabIndex:
        configured = model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        try:
            index = VocabIndex.from_tokenizer(
                tokenizer, breaks=self.breaks(), eos_ids=[e for e in ends if e is not None]
            )
        except ValueError as error:
            raise BadInput(str(error), where="tokenizer") from None
        if index.base_size > model.config.get_text_config().vocab_size:
            raise BadInput(
                f"the tokenizer has {index.base_size} tokens and the model "
                f"{model.config.get_text_config().vocab_size}",
                where="tokenizer",
                mend="load the tokenizer from the model's own folder",
            )
        return index

    def _generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[str],
        monitors: list[DereferenceMonitor],
        index: VocabIndex,
        ctx: Ctx,
        at: int,
    ) -> tuple[list[list[str]], MaskReport]:
        from maquette.decoding.generation import generate

        made, report = generate(
            model,
            tokenizer,
            prompts,
            self._sampling(),
            index=index,
            monitors=monitors,
            context=self.context,
            strict=self.strict,
            generator=ctx.torch_rng("eval", at) if self.temperature > 0 else None,
        )
        assert report is not None
        return made, report


def _total(reports: list[MaskReport]) -> dict[str, float]:
    """Sums; the removed mass is averaged over constrained steps."""
    constrained = sum(r.constrained for r in reports)
    mass = sum(r.removed_mass * r.constrained for r in reports)
    return {
        "steps": sum(r.steps for r in reports),
        "constrained": constrained,
        "dropped": sum(r.dropped for r in reports),
        "removed_mass": mass / constrained if constrained else 0.0,
    }
