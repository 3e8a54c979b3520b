"""Fine-tuning a copy of a body with a linear head on few labels: the machinery of the probes.

`shuffled` and `descend` serve any short fine-tuning. The probes' recipe is the one of ELECTRA
(Clark et al., 2020, arXiv:2003.10555): AdamW, 10% linear warm-up and linear decay, rates that fall
with the depth of a layer, the best of a few peak rates by accuracy on a development part.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maquette.errors import BadInput
from maquette.schedules import Horizon, Schedule
from maquette.training.ledger import FlopCounter, Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is neither learnt nor scored."""
LAYER_DECAY = 0.8
WEIGHT_DECAY = 0.01
CLIP = 1.0
EVALUATE_ROWS = 128
"""Rows of a forward pass without gradients."""
_SCHEDULE = Schedule(shape="linear", warmup_fraction=0.1, floor=0.0)

R = TypeVar("R")
Autocast = Callable[[], AbstractContextManager[Any]]


# --- labelled text -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Encoded texts with their labels.

    ids_NT: int64, padded on the right. mask_NT: True on real tokens. labels: class of each text,
    int64 of shape (N,), or of each token, (N, T), where -100 is ignored.
    """

    ids_NT: Tensor
    mask_NT: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids_NT)

    def rows(self, index: Any, device: torch.device) -> Labelled:
        return Labelled(*(t[index].to(device) for t in (self.ids_NT, self.mask_NT, self.labels)))


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """(ids_NT, mask_NT, character span of each token) of the first `length` tokens of each text.

    The tokenizer's own template is applied; its special tokens stand for no character. The text
    of a special token inside a text is encoded as text. The given tokenizer is not changed.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.enable_truncation(length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(texts), length), pad, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    spans = []
    for row, encoding in enumerate(backend.encode_batch(list(texts))):
        n = len(encoding.ids)
        ids[row, :n], mask[row, :n] = torch.tensor(encoding.ids, dtype=torch.int64), True
        special = encoding.special_tokens_mask
        spans.append([(0, 0) if s else o for o, s in zip(encoding.offsets, special, strict=True)])
    return ids, mask, spans


# --- heads ---------------------------------------------------------------------------------------


class PooledHead(nn.Module):
    """A linear layer on the mean of the hidden states over real tokens: logits (B, K)."""

    def __init__(self, width: int, classes: int, generator: np.random.Generator) -> None:
        super().__init__()
        self.linear = _linear(width, classes, generator)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        mask = mask_BT.unsqueeze(-1)
        summed = (hidden_BTD.float() * mask).sum(dim=1)
        return self.linear(summed / mask.sum(dim=1).clamp(min=1))


class TokenHead(nn.Module):
    """A linear layer on every hidden state: logits (B, T, K)."""

    def __init__(self, width: int, classes: int, generator: np.random.Generator) -> None:
        super().__init__()
        self.linear = _linear(width, classes, generator)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return self.linear(hidden_BTD)


def _linear(width: int, classes: int, generator: np.random.Generator) -> nn.Linear:
    # Not drawn by torch: its global random state is not ours to move.
    layer = nn.utils.skip_init(nn.Linear, width, classes)
    drawn = generator.normal(0.0, 0.02, (classes, width))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(drawn))
        layer.bias.zero_()
    return layer


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; of an encoder-decoder the encoder."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model.base_model


def hidden_width(body: nn.Module) -> int:
    """Width of the final hidden states."""
    return int(body.config.hidden_size)  # type: ignore[union-attr, arg-type]


# --- cost ----------------------------------------------------------------------------------------


@dataclass
class CountedCalls:
    """FLOPs of repeated calls: each kind of call is counted once, then added up."""

    costs: dict[object, float] = field(default_factory=dict)
    total: float = 0.0

    def __call__(self, kind: object, work: Callable[[], R]) -> R:
        """`work()`. kind: two calls of one kind cost the same FLOPs."""
        if kind in self.costs:
            result = work()
        else:
            with FlopCounter() as counter:
                result = work()
            self.costs[kind] = counter.total
        self.total += self.costs[kind]
        return result


@contextmanager
def metered(ledger: Ledger) -> Iterator[CountedCalls]:
    """Bill `evaluation` the seconds of a block and the FLOPs of the calls made through it."""
    calls, start = CountedCalls(), time.perf_counter()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled graphs hide their operations
            yield calls
    finally:
        ledger.bill("evaluation", flops=calls.total, seconds=time.perf_counter() - start)


# --- fine-tuning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned copy. dev_accuracy: {peak learning rate: accuracy on the development part}."""

    body: nn.Module
    head: nn.Module
    learning_rate: float
    dev_accuracy: Mapping[float, float]


def default_rates(width: int) -> tuple[float, float, float]:
    """Peak rates to choose from: 1, 3 and 9 times 0.0768 / width.

    0.0768 / width is ELECTRA's own choice at widths 256 and 768 (3e-4 and 1e-4); the larger ones
    are for the few steps that few labels give.
    """
    base = 0.0768 / width
    return base, 3 * base, 9 * base


def parameter_depths(body: nn.Module) -> tuple[dict[str, int], int]:
    """({parameter: depth}, layers): 0 for embeddings, 1 .. n for layers, n + 1 for what follows.

    The layers are the longest list of modules. Raises BadInput if there is none.
    """
    lists = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise BadInput(
            f"{type(body).__name__} keeps its layers in no list", mend="set `layer_decay: 1`"
        )
    path, layers = max(lists, key=lambda item: len(item[1]))
    depths, after = {}, False
    for name, _ in body.named_parameters():
        if name.startswith(f"{path}."):
            depths[name] = int(name[len(path) + 1 :].split(".")[0]) + 1
            after = True
        else:
            depths[name] = len(layers) + 1 if after else 0
    return depths, len(layers)


def parameter_groups(
    body: nn.Module, head: nn.Module, learning_rate: float, layer_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups with `peak_lr` = rate * decay^(n + 2 - d) at depth d; the head is at n + 2.

    No weight decay on vectors (norms, biases).
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay} (ELECTRA: 0.8)")
    depths, n = parameter_depths(body) if layer_decay < 1 else ({}, 0)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for module, is_head in ((body, False), (head, True)):
        for name, parameter in module.named_parameters():
            depth = n + 2 if is_head else depths.get(name, n + 2)
            decay = WEIGHT_DECAY if parameter.ndim >= 2 else 0.0
            rate = learning_rate * layer_decay ** (n + 2 - depth)
            group = {"params": [], "weight_decay": decay, "lr": rate, "peak_lr": rate}
            groups.setdefault((depth, decay), group)["params"].append(parameter)
    return list(groups.values())


def fine_tune(
    body: nn.Module,
    head: nn.Module,
    train: Labelled,
    dev: Labelled,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch: int,
    generator: np.random.Generator,
    device: torch.device,
    autocast: Autocast = nullcontext,
    layer_decay: float = LAYER_DECAY,
    count: CountedCalls | None = None,
) -> Tuned:
    """Train a copy of body and head at each peak rate; the best on `dev` comes back.

    body: gives `last_hidden_state` for `input_ids` and `attention_mask`; left as it is. head:
    (hidden_BTD, mask_BT) to logits. batch: rows per step; all batches are full. generator: draws
    one order and one dropout seed, shared by all rates. autocast: makes the context of a forward
    pass. count: told of every pass.
    Accuracy is of labels; of equal ones the smaller loss on `dev` wins.
    """
    if not learning_rates or min(learning_rates) <= 0 or epochs < 1 or batch < 1:
        raise ValueError("fine-tuning needs learning rates above 0, and epochs and batch above 0")
    if not len(train) or not len(dev):
        raise ValueError(f"fine-tuning needs rows, got {len(train)} to train, {len(dev)} dev")
    count = count or CountedCalls()
    order = shuffled(len(train), batch, epochs, generator)
    seed = int(generator.integers(2**63))
    best, best_score, accuracies = None, (-1.0, 0.0), {}
    for rate in learning_rates:
        tuned = _train(body, head, train, order, rate, seed, device, autocast, layer_decay, count)
        loss, accuracy = _evaluate(*tuned, dev, device, autocast, count)
        accuracies[rate] = accuracy
        if (accuracy, -loss) > best_score or best is None:
            best, best_score = Tuned(*tuned, rate, {}), (accuracy, -loss)
    assert best is not None
    return replace(best, dev_accuracy=accuracies)


def _train(
    body: nn.Module,
    head: nn.Module,
    data: Labelled,
    order: np.ndarray,
    learning_rate: float,
    seed: int,
    device: torch.device,
    autocast: Autocast,
    layer_decay: float,
    count: CountedCalls,
) -> tuple[nn.Module, nn.Module]:
    """Copies of body and head after one pass over `order`, a batch of rows per step."""
    body, head = (copy.deepcopy(m).to(device).float().train() for m in (body, head))
    body.requires_grad_(True)
    groups = parameter_groups(body, head, learning_rate, layer_decay)

    def loss_of(rows: np.ndarray) -> Tensor:
        here = data.rows(rows, device)
        with autocast():
            logits = _logits(body, head, here)
        return _loss(logits, here.labels)

    descend(groups, order, loss_of, schedule=_SCHEDULE, seed=seed, device=device, count=count)
    return body.eval(), head.eval()


def shuffled(n: int, batch: int, epochs: int, generator: np.random.Generator) -> np.ndarray:
    """Row numbers of each step, int64 of shape (steps, min(batch, n)): a new order every epoch.

    All batches are full; an epoch's rest goes to the next one, and the last one's is left out.
    """
    batch = min(batch, n)
    line = np.concatenate([generator.permutation(n) for _ in range(epochs)])
    return line[: len(line) // batch * batch].reshape(-1, batch)


def descend(
    groups: Sequence[dict[str, Any]],
    order: np.ndarray,
    loss_of: Callable[[np.ndarray], Tensor],
    *,
    schedule: Schedule,
    seed: int,
    device: torch.device,
    count: CountedCalls,
) -> None:
    """One AdamW step per row of `order`, gradients clipped to norm 1; changes the parameters.

    groups: parameter groups with their `peak_lr`. loss_of: the mean loss of a batch of rows.
    seed: of dropout, which draws from torch's global stream; that stream is left as it was.
    """
    optimizer = torch.optim.AdamW(list(groups), betas=(0.9, 0.999), eps=1e-6, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    horizon = Horizon(len(order))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for step, rows in enumerate(order):

            def gradients(rows: np.ndarray = rows) -> None:
                loss_of(rows).backward()

            count(("train", len(rows)), gradients)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule.factor(step, horizon)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _logits(body: nn.Module, head: nn.Module, data: Labelled) -> Tensor:
    output = body(input_ids=data.ids_NT, attention_mask=data.mask_NT.long())
    return head(output.last_hidden_state, data.mask_NT)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def logits_of(
    body: nn.Module,
    head: nn.Module,
    data: Labelled,
    device: torch.device,
    autocast: Autocast = nullcontext,
    count: CountedCalls | None = None,
) -> Tensor:
    """Logits of all rows in order, fp32 on the CPU: (N, K), or (N, T, K) of a token head."""
    count, parts = count or CountedCalls(), []
    for rows in torch.arange(len(data)).split(EVALUATE_ROWS):
        here = data.rows(rows, device)

        def forward(here: Labelled = here) -> Tensor:
            with autocast():
                return _logits(body, head, here)

        parts.append(count(("evaluate", len(rows)), forward).float().cpu())
    return torch.cat(parts)


def _evaluate(
    body: nn.Module,
    head: nn.Module,
    data: Labelled,
    device: torch.device,
    autocast: Autocast,
    count: CountedCalls,
) -> tuple[float, float]:
    logits = logits_of(body, head, data, device, autocast, count)
    real = data.labels != IGNORED
    right = (logits.argmax(-1) == data.labels)[real]
    return float(_loss(logits, data.labels)), float(right.float().mean())
