"""Where a corpus lies, and a document as its reader found it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from maquette.quantities import parse_bytes


class CorpusSpec(BaseModel):
    """Where documents come from. A plain string stands for `{path: ...}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file or folder, `hub:owner/name[:split]`, or `python:` (`data/installed.py`)."""
    text_column: str = "text"
    domain_column: str | None = None
    """Column that names the domain; else the first sub-folder, or the file's stem."""
    year_column: str | None = None
    """Column with a year, a date, or text that starts with a year."""
    include: tuple[str, ...] = ()
    """Endings of the file names to read in a folder (`.py`, `_clean.txt`); empty means all."""
    split: str | None = None
    """Part of a Hugging Face dataset; `train` by default."""
    config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Revision of a hub dataset. What is prepared once is not asked for again: pin it."""
    limit: str | None = Field(default=None, examples=["64MB"])
    """Size such as `64MB`: documents in the order of a hash of their id until it is reached, so
    that a larger limit holds every document of a smaller one (a hub dataset: its first ones)."""
    min_chars: int = Field(default=1, ge=0)
    max_chars_per_document: int = Field(default=1_000_000, ge=1)
    """A longer document is cut here and counted; a longer paragraph of a `.txt` file goes on in
    the next document instead."""
    max_expansion: int = Field(default=100, ge=1)
    """A compressed file that expands to more than this many times its size is refused."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("limit")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


@dataclass(frozen=True)
class Raw:
    """A document before cleaning. `text` is None when the reader already counted a reason."""

    id: str
    text: str | None
    domain: str
    year: int | None
    source: str


@dataclass(frozen=True)
class File:
    """A file of a corpus: absolute path, name inside the corpus, size, default domain."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    domain: str
