"""Maquette: does this published idea pay, on my data, at my budget, before the big budget?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BadInput": "maquette.errors",
    "MaquetteError": "maquette.errors",
    "RunFailed": "maquette.errors",
    "Budget": "maquette.quantities",
    "Recipe": "maquette.recipe",
    "parse_recipe": "maquette.recipe",
    "Study": "maquette.study.study",
    "load_study": "maquette.study.study",
    "parse_study": "maquette.study.study",
    "compare": "maquette.study.compare",
    "execute": "maquette.study.execute",
    "Options": "maquette.study.execute",
    "Store": "maquette.study.store",
    "register": "maquette.parts",
}
__all__ = [
    "BadInput",
    "Budget",
    "MaquetteError",
    "Options",
    "Recipe",
    "RunFailed",
    "Store",
    "Study",
    "__version__",
    "compare",
    "execute",
    "load_study",
    "parse_recipe",
    "parse_study",
    "register",
]

if TYPE_CHECKING:
    from maquette.errors import BadInput, MaquetteError, RunFailed
    from maquette.parts import register
    from maquette.quantities import Budget
    from maquette.recipe import Recipe, parse_recipe
    from maquette.study.compare import compare
    from maquette.study.execute import Options, execute
    from maquette.study.store import Store
    from maquette.study.study import Study, load_study, parse_study


def __getattr__(name: str) -> Any:
    # Names are imported when asked for, so that `maquette --help` does not wait for torch.
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module `maquette` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
