"""Trees of tensors and plain data, as JSON beside a table of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "t", *, copied: bool = True) -> Any:
    """A JSON-able tree of `value`; its tensors go into `tensors` under the path they stand at.

    Handles mappings with any scalar keys, sequences, numbers, strings, None and tensors.
    copied: False hands over the tensors themselves.
    Raises TypeError for anything else, because what cannot be stored cannot be resumed.
    """
    if isinstance(value, Tensor):
        # A view would drag its whole storage into the file.
        kept = value.detach()
        tensors[path] = kept.contiguous().clone() if copied else kept
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        return {
            "__map__": [
                [k, flatten(v, tensors, f"{path}.{i}", copied=copied)]
                for i, (k, v) in enumerate(value.items())
            ]
        }
    if isinstance(value, list | tuple):
        items = [flatten(v, tensors, f"{path}.{i}", copied=copied) for i, v in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint (at {path})")


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    if isinstance(tree, dict):
        if "__tensor__" in tree:
            return tensors[tree["__tensor__"]]
        if "__tuple__" in tree:
            return tuple(unflatten(v, tensors) for v in tree["__tuple__"])
        return {k: unflatten(v, tensors) for k, v in tree["__map__"]}
    return tree
