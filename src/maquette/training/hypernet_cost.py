"""What training a hypernetwork costs: counted on a few real passes, multiplied by what ran.

Counting every operation of every step would double its time. Tokens do not see each other, so the
FLOPs of a pass are a sum over them that depends on their number of pieces alone; each term is
counted once. The frozen model's pass has one shape throughout, and is counted once too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maquette.training.hyper_embedding import HyperEmbedding
from maquette.training.ledger import FlopCounter
from maquette.training.table_substitution import Tables


@dataclass(frozen=True)
class HypernetCost:
    """FLOPs of a pass forward and backward through a HyperEmbedding.

    per_source: for each distinct source id. per_token: for each token, by its pieces from 1 up.
    """

    pad_id: int
    per_source: float
    per_token: tuple[float, ...]

    def of(self, ids_NM: np.ndarray) -> float:
        """FLOPs of a pass for these surface forms."""
        pieces_N = np.maximum((ids_NM != self.pad_id).sum(1), 1)
        tokens = np.bincount(pieces_N, minlength=len(self.per_token) + 1)[1:]
        return len(np.unique(ids_NM)) * self.per_source + float(np.dot(tokens, self.per_token))


def count_hypernet(hypernet: HyperEmbedding, source_VE: Tensor) -> HypernetCost:
    """Count passes for one and for two equal tokens of every length."""
    pad_id = hypernet.config.pad_id
    other = 0 if pad_id else 1

    def flops(n_tokens: int, n_pieces: int) -> float:
        ids_NM = torch.full((n_tokens, n_pieces), other, device=source_VE.device)
        with FlopCounter() as counter:
            found = hypernet(source_VE, ids_NM)
            sides = (found.input_ND, found.output_ND, found.bias_N)
            torch.stack([side.sum() for side in sides if side is not None]).sum().backward()
        hypernet.zero_grad(set_to_none=True)
        return counter.total

    lengths = range(1, hypernet.config.max_pieces + 1)
    per_token = tuple(flops(2, n) - flops(1, n) for n in lengths)
    return HypernetCost(pad_id, flops(1, 1) - per_token[0], per_token)


def count_body(loss: Callable[[Tables], Tensor], tables: Tables) -> float:
    """FLOPs of the frozen model's loss under these tables, and of its gradient to them."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    tied = tables.output_VD is tables.input_VD
    table = leaf(tables.input_VD)
    given = Tables(
        table,
        table if tied else leaf(tables.output_VD),
        tables.filled_V,
        None if tables.bias_V is None else leaf(tables.bias_V),
    )
    with FlopCounter() as counter:
        loss(given).backward()
    return counter.total
