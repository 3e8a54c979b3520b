"""Which weights a method may change: the linear layers inside a transformer's blocks.

A layer is chosen by its type (`nn.Linear`, or Hugging Face's transposed `Conv1D`) and by its
position (inside an element of an `nn.ModuleList`, the stack of blocks), never by its name.
Embeddings, norms, biases, heads and weights tied to another module are left out.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from maquette.errors import BadInput
from maquette.training.factors import rank_of


@runtime_checkable
class Factorised(Protocol):
    """A layer that holds a product of factors instead of one trained matrix.

    factors: the trained parameters that stand for the matrix, to be given fresh optimiser state
    after `restart`. restart: what the layer does at a restart; the outputs do not change.
    to_linear: the plain layer with the same outputs.
    """

    def factors(self) -> tuple[nn.Parameter, ...]: ...

    def restart(self, rng: torch.Generator) -> None: ...

    def to_linear(self) -> nn.Linear: ...


def block_linears(
    model: nn.Module, *, transposed: bool = True
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, layer, weight) of every linear layer inside a block, in module order.

    transposed: also give Hugging Face `Conv1D` layers, whose weight is [in, out].
    Subclasses are left out: their owners read the weight without calling the layer.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D) if transposed else (nn.Linear,)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    stacks = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n)
    for name, module in model.named_modules():
        if type(module) in kinds and name.startswith(stacks):
            weight = module.get_parameter("weight")
            if owners[id(weight)] == 1:
                yield name, module, weight


def dense_weights(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The trainable 2-D weights of `block_linears` of all these modules."""
    return [w for m in modules for _, _, w in block_linears(m) if w.requires_grad]


def inner_weights(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """`dense_weights`, and the factors of every factorised layer."""
    modules = list(modules)
    factors = [
        p for m in modules for s in m.modules() if isinstance(s, Factorised) for p in s.factors()
    ]
    return [*dense_weights(modules), *factors]


def split_groups(
    modules: Iterable[nn.Module],
    inner: Iterable[nn.Parameter],
    *,
    rate: float | None,
    embedding_rate: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Disjoint parameter groups: the inner weights first, then all other matrices, then vectors.

    rate: peak rate of the inner weights. embedding_rate: peak rate of embeddings, norms, biases
    and heads; None takes `rate`. A group whose rate is not known carries no `peak_lr`: the loop
    gives it the size's. Vectors outside `inner` are not decayed. Empty groups are left out.
    """
    modules = list(modules)
    inside = {id(p): p for p in inner}
    others = {
        id(p): p for m in modules for p in m.parameters() if p.requires_grad and id(p) not in inside
    }
    outer_rate = rate if embedding_rate is None else embedding_rate
    groups = [
        (list(inside.values()), rate, weight_decay),
        ([p for p in others.values() if p.ndim >= 2], outer_rate, weight_decay),
        ([p for p in others.values() if p.ndim < 2], outer_rate, 0.0),
    ]
    return [
        {
            "params": params,
            "weight_decay": decay,
            **({} if peak is None else {"lr": peak, "peak_lr": peak}),
        }
        for params, peak, decay in groups
        if params
    ]


def decayed_groups(
    modules: Iterable[nn.Module], *, rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices that decay, and embeddings (with what is tied to them) and vectors.

    rate: peak rate; None leaves it to the loop. Only trainable parameters; no empty group.
    """
    modules = list(modules)
    tables = {
        id(p)
        for m in modules
        for inner in m.modules()
        if isinstance(inner, nn.Embedding)
        for p in inner.parameters(recurse=False)
    }
    unique = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    decays = [p for key, p in unique.items() if p.ndim >= 2 and key not in tables]
    others = [p for key, p in unique.items() if p.ndim < 2 or key in tables]
    peak = {} if rate is None else {"lr": rate, "peak_lr": rate}
    groups = ((decays, weight_decay), (others, 0.0))
    return [{"params": params, "weight_decay": d, **peak} for params, d in groups if params]


def projected_groups(
    modules: Iterable[nn.Module],
    *,
    rank: int | None,
    rank_fraction: float,
    rate: float | None,
    embedding_rate: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """`split_groups` with the dense block matrices inside, one group per rank, each with `rank`.

    Raises BadInput when there is no dense matrix in any block.
    """
    modules = list(modules)
    matrices = dense_weights(modules)
    if not matrices:
        raise BadInput(
            f"{type(modules[0]).__name__} has no dense linear layer inside its blocks to project",
            key="optim",
            mend="use optim `adamw` or `restarts`",
        )
    inner, *outer = split_groups(
        modules, matrices, rate=rate, embedding_rate=embedding_rate, weight_decay=weight_decay
    )
    by_rank: dict[int, list[nn.Parameter]] = {}
    for p in inner["params"]:
        by_rank.setdefault(rank_of(p.shape, rank, rank_fraction), []).append(p)
    return [*({**inner, "params": ps, "rank": r} for r, ps in by_rank.items()), *outer]


M = TypeVar("M", bound=nn.Module)


def replace_linears(model: M, make: Callable[[nn.Linear], nn.Module]) -> M:
    """The model with every `nn.Linear` inside a block replaced, in place, by `make(layer)`.

    Raises BadInput when there is none.
    """
    found = list(block_linears(model, transposed=False))
    if not found:
        raise BadInput(
            f"{type(model).__name__} has no linear layer inside its blocks to factorise",
            key="surgery",
            mend="use a model built from nn.Linear that has not been factorised before",
        )
    for name, layer, _ in found:
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, make(layer))
    return model


def merged(model: M) -> M:
    """A copy of the model with every factorised layer turned back into an `nn.Linear`."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Factorised):
            plain.set_submodule(name, layer.to_linear())
    return plain


def linear_from(weight: torch.Tensor, bias: torch.Tensor | None, training: bool) -> nn.Linear:
    """A plain layer holding copies of this weight [m, n] and bias [m]."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.train(training)
