"""Try something on a live model and take it back, bit for bit.

A branch copies once what an optimiser step changes: trainable weights, buffers, and the optimiser's
state. `restore` writes the copies back into the tensors in place, so that a thousand trials cost a
thousand copies of memory and no reloads.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Branch:
    """What `restore` goes back to: the state of modules and optimiser when it was made.

    frozen: also keep weights that take no gradient; an optimiser that merges factors into them
    changes them all the same.
    """

    def __init__(
        self, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, frozen: bool = False
    ) -> None:
        self._modules, self._optimizer = tuple(modules), optimizer
        parameters: dict[int, nn.Parameter] = {
            id(p): p for m in self._modules for p in m.parameters()
        }
        buffers = {id(b): b for m in self._modules for b in m.buffers()}
        self._needs_grad = [(p, p.requires_grad) for p in parameters.values()]
        self._grads = [(p, _copied(p.grad)) for p in parameters.values()]
        self._live: list[Tensor] = list(buffers.values())
        self._live += [p for p in parameters.values() if p.requires_grad or frozen]
        self._state = {p: self._noted(entry) for p, entry in optimizer.state.items()}
        self._groups = [
            {name: self._noted(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._copies = [tensor.detach().clone() for tensor in self._live]

    def restore(self) -> None:
        """Weights, buffers, gradients and optimiser state as they were; bit for bit."""
        with torch.no_grad():
            if self._live:
                torch._foreach_copy_(self._live, self._copies)
        for parameter, needs_grad in self._needs_grad:
            parameter.requires_grad_(needs_grad)
        for parameter, grad in self._grads:
            parameter.grad = _copied(grad)
        state = self._optimizer.state
        for owner in [p for p in state if p not in self._state]:
            del state[owner]
        for owner, make in self._state.items():
            state[owner] = make()
        for group, entries in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update({name: make() for name, make in entries.items()})

    def _noted(self, value: Any) -> Callable[[], Any]:
        """How to make `value` again: the same tensors (their content is copied), new containers."""
        if isinstance(value, Tensor):
            self._live.append(value)
            return lambda: value
        if isinstance(value, Mapping):
            entries = {key: self._noted(item) for key, item in value.items()}
            return lambda: {key: make() for key, make in entries.items()}
        if isinstance(value, list | tuple):
            kind, items = type(value), [self._noted(item) for item in value]
            return lambda: kind(make() for make in items)
        plain = copy.deepcopy(value)
        return lambda: copy.deepcopy(plain)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


@contextmanager
def branch(
    modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, frozen: bool = False
) -> Iterator[Branch]:
    """A `Branch` that is restored when the block ends, with modes and global random streams.

    Inside, take steps on the live model and call `restore` between trials; nothing of it is left
    afterwards. The modules may be put into eval mode inside.
    """
    modules = tuple(modules)
    modes = [(module, module.training) for whole in modules for module in whole.modules()]
    devices = {p.device for m in modules for p in m.parameters() if p.device.type == "cuda"}
    streams = (random.getstate(), np.random.get_state())  # noqa: NPY002 - kept, never drawn from
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
        point = Branch(modules, optimizer, frozen)
        try:
            yield point
        finally:
            point.restore()
            for module, training in modes:
                module.training = training
            random.setstate(streams[0])
            np.random.set_state(streams[1])  # noqa: NPY002
