"""What a part declares of itself: what it needs, and what a reader must know before using it."""

from __future__ import annotations

from typing import Literal

from maquette.config import Frozen

Scale = Literal["one", "ddp", "fsdp"]
Head = Literal["causal-lm", "masked-lm", "seq2seq-lm", "token-discrimination"]


class Card(Frozen):
    """What a reader must know before using a method; the docs page is generated from it."""

    title: str
    paper: str
    """Authors, year, venue."""
    arxiv: str = ""
    idea: str
    """The method in two or three plain sentences."""
    claim: str
    """What its study tests, in one sentence that can turn out false."""
    paper_figures: tuple[str, ...] = ()
    """Published numbers, each with its place in the paper."""
    defaults_from: str
    cost: str
    """What it costs besides the baseline's steps, and which ledger cause carries it."""
    when: str
    """When to reach for it and when not."""
    clashes: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    """Deliberate differences from the official code, each with its reason."""
    example: str = ""
    """About ten lines of plain PyTorch or Hugging Face code; the conformance suite runs them."""


class Needs(Frozen):
    """What a part requires of its surroundings; `check` refuses a recipe that does not give it."""

    workloads: frozenset[str] = frozenset()
    """Workload types it can work on; empty means any."""
    scale: Scale = "fsdp"
    """The widest kind of sharding it is correct under; the conformance suite tries it.

    fsdp: it sees shares of weights and of gradients outside the loss (elementwise work on them is
    fine), and whole weights inside it. ddp: every rank sees all of them. one: no other rank, as
    where the loss keeps state from the micro-batches it has seen, of which a rank sees its own.
    """
    columns: frozenset[str] = frozenset()
    """Document columns that must hold values (`year`, `domain`, a score)."""
    clashes: frozenset[str] = frozenset()
    """Slugs of parts it cannot be combined with."""
