"""Sizes, budgets and bytes: how large a model is, how much may be spent, how much text is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from maquette.errors import BadInput, did_you_mean

# --- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model scale; a recipe is a function of it.

    weights: non-embedding weights of the Llama shape, about. length: tokens per row.
    batch_tokens: tokens per optimiser step. learning_rate: AdamW peak rate for that batch.
    """

    name: str
    weights: float
    width: int
    depth: int
    heads: int
    length: int
    batch_tokens: int
    learning_rate: float

    def rows(self, length: int) -> int:
        """Rows per step so that a step holds `batch_tokens` tokens whatever the row length."""
        return max(1, self.batch_tokens // length)


_SIZES = (
    Size("nano", 1e5, 64, 2, 2, 64, 1_024, 4e-3),
    Size("300k", 3.3e5, 96, 3, 3, 64, 1_024, 3e-3),
    Size("1m", 8e5, 128, 4, 4, 128, 2_048, 2e-3),
    Size("3m", 3e6, 256, 4, 4, 256, 4_096, 2e-3),
    Size("10m", 1.1e7, 384, 6, 6, 256, 16_384, 1.5e-3),
    Size("30m", 3.1e7, 512, 10, 8, 512, 32_768, 1.2e-3),
    Size("60m", 5.9e7, 640, 12, 10, 512, 65_536, 1e-3),
    Size("125m", 1.3e8, 768, 18, 12, 1_024, 262_144, 6e-4),
    Size("350m", 3.5e8, 1_024, 28, 16, 1_024, 524_288, 4e-4),
    Size("1b", 1.0e9, 2_048, 20, 16, 2_048, 1_048_576, 3e-4),
    Size("3b", 3.0e9, 2_560, 38, 20, 2_048, 2_097_152, 2e-4),
    Size("7b", 6.8e9, 4_096, 34, 32, 4_096, 4_194_304, 1.5e-4),
)
SIZES = {size.name: size for size in _SIZES}


def size_named(name: str, *, where: object = None, key: str = "size") -> Size:
    if name not in SIZES:
        raise BadInput(
            f"there is no size `{name}`", where=where, key=key, mend=did_you_mean(name, SIZES)
        )
    return SIZES[name]


# --- budgets -------------------------------------------------------------------------------------

Unit = Literal["flop", "tok", "step", "epoch", "s", "usd"]
_UNITS: dict[str, tuple[Unit, float]] = {
    "flop": ("flop", 1),
    "flops": ("flop", 1),
    "tok": ("tok", 1),
    "token": ("tok", 1),
    "tokens": ("tok", 1),
    "step": ("step", 1),
    "steps": ("step", 1),
    "epoch": ("epoch", 1),
    "epochs": ("epoch", 1),
    "s": ("s", 1),
    "sec": ("s", 1),
    "min": ("s", 60),
    "h": ("s", 3600),
    "usd": ("usd", 1),
}
_BUDGET = re.compile(r"([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]+)")
# Neither pattern can take the same characters in two ways: a mistake of 200 KB costs no minutes.


@dataclass(frozen=True)
class Budget:
    """An amount of one unit: counted training FLOPs, tokens, steps, epochs (passes over the
    training part), seconds or US dollars. No steps at all, `0step`, leaves a model as it starts.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: object, *, where: object = None, key: str = "budget") -> Budget:
        """`3e15flop`, `2e7tok`, `2000step`, `8epoch`, `10min`, `5usd`; `0step` for none."""
        mend = "a number and a unit: 3e15flop, 2e7tok, 2000step, 8epoch, 10min or 5usd"
        match = _BUDGET.fullmatch(str(text).strip())
        given = str(text)[:80]
        if not match:
            raise BadInput(f"`{given}` is not a budget", where=where, key=key, mend=mend)
        number, unit = match.groups()
        if unit.lower() not in _UNITS:
            raise BadInput(
                f"`{unit[:80]}` is not a unit of budget", where=where, key=key, mend=mend
            )
        name, factor = _UNITS[unit.lower()]
        amount = float(number.replace("_", "")) * factor
        if not (0 < amount < float("inf") or (amount == 0 and name == "step")):
            what = "above zero" if amount == 0 else "a finite number"
            raise BadInput(f"a budget must be {what}, got `{given}`", where=where, key=key)
        return cls(amount, name)

    def __str__(self) -> str:
        return f"{self.amount:.12g}{self.unit}"


# --- bytes ---------------------------------------------------------------------------------------

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `64MB` or `1.5 GiB`; raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    n_bytes = float(match[1]) * _BYTES.get(match[2].upper(), 0) if match else 0.0
    if not 0 < n_bytes < float("inf"):
        raise ValueError(f"`{text[:80]}` is not a size (write 64MB, 1.5GB or 512KiB)")
    return int(n_bytes)
