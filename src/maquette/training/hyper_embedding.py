"""A network from a token's source pieces to its embeddings (ZeTT, arXiv:2405.07883, section 3.1).

It reads the source embeddings of the pieces a token is spelt with and gives an input row, an
output row and a bias. Tokens do not see each other, so a vocabulary of any size, in any order,
can be embedded by one set of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Least spread of an embedding dimension; a constant one would else be divided by zero."""
SPREAD = 0.02
"""Standard deviation of fresh weights, as in BERT: residual branches begin small."""


@dataclass(frozen=True)
class HyperConfig:
    """The shape of a HyperEmbedding.

    width: d of the model's embeddings. pad_id: source id that fills short forms. separate_output:
    the model's head is untied, so rows of both tables are read (2d per piece) and predicted.
    max_pieces: m. hidden: h, None takes d. heads must divide it. bias: predict the output bias.
    languages: learned language vectors, 0 for none. Paper: 3 layers, h = d, m = 7, a feed-forward
    of 2h, one head per 128 (Mistral-7B: 4096, 8192, 32).
    """

    width: int
    pad_id: int
    separate_output: bool = False
    max_pieces: int = 7
    hidden: int | None = None
    layers: int = 3
    heads: int = 4
    feed_forward: int | None = None
    bias: bool = False
    languages: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "max_pieces", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.inner % self.heads:
            raise ValueError(
                f"hidden must be divisible by heads, got {self.inner} and {self.heads}"
            )
        if self.pad_id < 0 or self.languages < 0:
            raise ValueError(
                f"pad_id and languages must be >= 0, got {self.pad_id} and {self.languages}"
            )

    @property
    def inner(self) -> int:
        return self.width if self.hidden is None else self.hidden

    @property
    def wide(self) -> int:
        return 2 * self.inner if self.feed_forward is None else self.feed_forward

    @property
    def read_width(self) -> int:
        """Values per piece: d, or 2d where both tables are read."""
        return self.width * (2 if self.separate_output else 1)


@dataclass(frozen=True)
class Predicted:
    """Rows for N tokens: input (N, d); output (N, d), None for a tied model; bias (N,) or None."""

    input_ND: Tensor
    output_ND: Tensor | None
    bias_N: Tensor | None


class ResidualMLP(nn.Module):
    """LayerNorm(x + gelu(W2 gelu(W1 x)))."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.gelu(self.second(F.gelu(self.first(x)))))


class EncoderLayer(nn.Module):
    """Bidirectional attention and a feed-forward block, each followed by LayerNorm of the sum."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm_attention, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_NTH: Tensor, *, first_only: bool = False) -> Tensor:
        """The layer's states; of position 0 alone, (N, 1, H), if nothing else will be read."""
        asked = x_NTH[:, :1] if first_only else x_NTH
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(asked), self.key(x_NTH), self.value(x_NTH))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_attention(asked + self.out(mixed))
        return self.norm(x + self.second(F.gelu(self.first(x))))


class Rescaler(nn.Module):
    """x -> scale * x + shift with values set once from data and never trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("shift", torch.zeros(width))

    def map(self, mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> None:
        """Set it so that data of this mean and std get the other mean and std."""
        scale = to_std / std.clamp_min(EPS)
        self.scale.copy_(scale)
        self.shift.copy_(to_mean - scale * mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


class HyperEmbedding(nn.Module):
    """H: source embeddings and surface forms to the rows of any vocabulary."""

    def __init__(self, config: HyperConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = c = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rescale_in = Rescaler(c.read_width)
            self.project = nn.Linear(c.read_width, c.inner)
            self.block = ResidualMLP(c.inner, c.wide)
            self.positions = nn.Parameter(torch.empty(c.max_pieces, c.inner))
            self.languages = nn.Embedding(c.languages, c.inner) if c.languages else None
            self.layers = nn.ModuleList(
                EncoderLayer(c.inner, c.heads, c.wide) for _ in range(c.layers)
            )
            sides = ("input", "output") if c.separate_output else ("input",)
            self.heads = nn.ModuleDict(
                {
                    side: nn.Sequential(ResidualMLP(c.inner, c.wide), nn.Linear(c.inner, c.width))
                    for side in sides
                }
            )
            self.rescale_out: Any = nn.ModuleDict({side: Rescaler(c.width) for side in sides})
            self.bias_head = nn.Linear(c.inner, 1) if c.bias else None
            for parameter in self.parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=SPREAD)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def forward(self, source_VE: Tensor, ids_NM: Tensor, language: int | None = None) -> Predicted:
        """Rows of the tokens with these surface forms.

        source_VE: the source table, or input and output table side by side, (V_a, d or 2d).
        ids_NM: source ids, int64 (N, m'), m' <= m, padded on the right; a form of padding alone is
        read as the padding token itself. language: index of the language vector.
        Raises ValueError for shapes that do not fit, and for a language where there is none.
        """
        self._check(source_VE, ids_NM, language)
        hidden_NH = self._first_states(source_VE, ids_NM, language)
        rows = {side: self.rescale_out[side](head(hidden_NH)) for side, head in self.heads.items()}
        bias = None if self.bias_head is None else self.bias_head(hidden_NH).squeeze(-1)
        return Predicted(rows["input"], rows.get("output"), bias)

    def _check(self, source_VE: Tensor, ids_NM: Tensor, language: int | None) -> None:
        if source_VE.ndim != 2 or source_VE.shape[1] != self.config.read_width:
            raise ValueError(
                f"source rows must be {self.config.read_width} wide"
                f"{' (input and output)' if self.config.separate_output else ''}, "
                f"got {tuple(source_VE.shape)}"
            )
        if ids_NM.ndim != 2 or not 1 <= ids_NM.shape[1] <= self.config.max_pieces:
            raise ValueError(
                f"surface forms must be (N, 1 to {self.config.max_pieces}), got "
                f"{tuple(ids_NM.shape)}"
            )
        if (language is not None) != bool(self.config.languages):
            raise ValueError(
                f"language is {language}, but the network has {self.config.languages} languages"
            )

    def _first_states(self, source_VE: Tensor, ids_NM: Tensor, language: int | None) -> Tensor:
        """The encoder's state at position 0 of each token, (N, h).

        Tokens of one length are worked on together without their padding: the result is that of
        masking it, at the cost of the pieces alone. What depends on one source token only is
        computed once for each.
        """
        used, place_NM = torch.unique(ids_NM, return_inverse=True)
        pieces_UH = self.block(self.project(self.rescale_in(source_VE[used])))
        length_N = (ids_NM != self.config.pad_id).sum(1).clamp_min(1)
        order = torch.argsort(length_N, stable=True)
        sizes = torch.bincount(length_N, minlength=ids_NM.shape[1] + 1).tolist()
        found, start = [], 0
        for n, size in enumerate(sizes):
            if size:
                rows = order[start : start + size]
                found.append(self._encode(pieces_UH[place_NM[rows, :n]], language))
                start += size
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return torch.cat(found)[inverse]

    def _encode(self, x_NTH: Tensor, language: int | None) -> Tensor:
        x = x_NTH + self.positions[: x_NTH.shape[1]]
        if self.languages is not None and language is not None:
            index = torch.full((len(x), 1), language, device=x.device)
            x = torch.cat([x, self.languages(index)], dim=1)
        for i, layer in enumerate(self.layers):
            x = layer(x, first_only=i == len(self.layers) - 1)
        return x[:, 0]

    @torch.no_grad()
    def calibrate(self, source_VE: Tensor) -> None:
        """Set the frozen rescalers from the source rows.

        Each input dimension gets mean 0 and spread 1; the predictions for single source tokens get
        the mean and the spread of the source rows.
        """
        mean, std = source_VE.mean(0), source_VE.std(0, correction=0)
        self.rescale_in.map(mean, std, torch.zeros_like(mean), torch.ones_like(std))
        for rescaler in self.rescale_out.values():
            rescaler.scale.fill_(1.0)
            rescaler.shift.zero_()
        each = torch.arange(len(source_VE), device=source_VE.device)
        language = 0 if self.config.languages else None
        raw = self(source_VE, each[:, None], language)
        wanted = source_VE.split(self.config.width, dim=1)
        sides = zip((raw.input_ND, raw.output_ND), self.rescale_out.values(), wanted, strict=False)
        for rows, rescaler, table in sides:
            assert rows is not None
            spread = rows.std(0, correction=0), table.std(0, correction=0)
            rescaler.map(rows.mean(0), spread[0], table.mean(0), spread[1])
