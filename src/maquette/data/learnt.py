"""What a data part learnt, kept in the cache with its bill.

Another threshold, arm or study that needs the same thing finds it here and computes nothing. It
still pays: what a result cost does not depend on who asked for it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from maquette.data.cache import built_once, digest, read_card
from maquette.flow import Ctx, State

TENSORS = "learnt.safetensors"


def learnt_once(name: str, key: object, ctx: Ctx, build: Callable[[Ctx], State]) -> State:
    """`build(ctx)`, or what it gave before under this key; either way `ctx.ledger` is billed.

    name: slug of the part. key: JSON-able facts the result depends on. build: gets a context with
    a ledger of its own; its state's `meta` must be JSON-able.
    """

    def write(folder: Path) -> dict[str, Any]:
        apart = replace(ctx, ledger=type(ctx.ledger)())
        state = build(apart)
        save_file({k: v.contiguous() for k, v in state.tensors.items()}, folder / TENSORS)
        return {"meta": dict(state.meta), "ledger": apart.ledger.as_dict()}

    folder = built_once(ctx.cache, f"{name}-{digest(key)}", write)
    card = read_card(folder)
    ctx.ledger.add(type(ctx.ledger).from_dict(card["ledger"]))
    return State(load_file(folder / TENSORS), card["meta"])
