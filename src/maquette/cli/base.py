"""What all verbs share: the application, the common options, output, and reading a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from maquette import __version__
from maquette.errors import BadInput

if TYPE_CHECKING:
    from maquette.data.corpus_spec import CorpusSpec
    from maquette.study.execute import Options
    from maquette.study.pool import Place
    from maquette.study.store import Store

app = App(
    name="maquette",
    version=__version__,
    help="Does this published idea pay, on my data, at my budget, before I spend the big budget?",
)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print one JSON document on stdout; logs stay on stderr."""
    home: Path | None = None
    """The store; MAQUETTE_HOME, else ~/.maquette."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    seed: int | None = None
    """Root seed of a single run or an audit, first one of an A/A; 0. A study has its own seeds."""
    debug: Annotated[bool, Parameter(negative=())] = False
    """Show the traceback of an error."""
    usd_per_hour: float | None = None
    """Price of this machine, for costs and budgets in dollars; MAQUETTE_USD_PER_HOUR."""
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"], negative=())] = False
    """Log what was decided and why."""

    @property
    def root_seed(self) -> int:
        return self.seed or 0

    def refuse_seed(self, count: int) -> None:
        """BadInput where `--seed` was given for a study, which runs under `count` seeds."""
        if self.seed is not None:
            seeds = ", ".join(str(self.seed + i) for i in range(count))
            raise BadInput(
                "a study runs under its own seeds",
                key="--seed",
                mend=f"`seeds: [{seeds}]` in the study, or --set 'seeds=[{seeds}]'",
            )

    def store(self, *, read_only: bool = False) -> Store:
        from maquette.study.store import Store

        return Store(self.home, read_only=read_only)

    def together(self) -> tuple[Store, Options]:
        """The store and how to run, once this process has met the other ranks of its launch."""
        from maquette.study.execute import pick_device
        from maquette.training.distributed import join

        options = replace(self.options(), team=join(pick_device(self.device)))
        return options.team.lead_first(self.store), options

    def quiet(self, options: Options) -> bool:
        """Whether to show no progress: for a machine that reads, or because the lead shows it."""
        return self.as_json or not options.team.is_lead

    def options(self) -> Options:
        from maquette.study.execute import Options
        from maquette.training.loop import Settings

        price = self.usd_per_hour
        if price is None and (given := os.environ.get("MAQUETTE_USD_PER_HOUR")):
            try:
                price = float(given)
            except ValueError:
                raise BadInput(
                    f"`{given}` is not a price", key="MAQUETTE_USD_PER_HOUR", mend="2.5"
                ) from None
        return Options(device=self.device, settings=Settings(usd_per_hour=price))


Sets = Annotated[
    list[str], Parameter(name="--set", negative=(), help="Override one key: size=nano.")
]
On = Annotated[
    str,
    Parameter(name="--on", help="Where the runs go: local, local:N processes, or ray://HOST:PORT."),
]


def say(common: Common, document: Any, text: str | None = None) -> None:
    """One JSON document, or the text for people."""
    if common.as_json:
        print(json.dumps(document, indent=2, sort_keys=True, default=str))
    elif text is not None:
        print(text)


def corpus_of(text: str, key: str) -> CorpusSpec:
    """A corpus given on the command line: a path, or options such as `{path: a.jsonl, ...}`."""
    import yaml

    from maquette.config import validate
    from maquette.data.corpus_spec import CorpusSpec

    if not text.lstrip().startswith("{"):
        return CorpusSpec(path=text)
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(
            f"`{text}` cannot be read as YAML ({str(error).splitlines()[0]})",
            key=key,
            mend="'{path: corpus.jsonl, text_column: body}'",
        ) from None
    return validate(CorpusSpec, options, key=key)


def place_of(on: str, options: Options) -> Place:
    """Where runs go; one process where the ranks of a launch share each of them."""
    from maquette.cluster import check_address
    from maquette.study.pool import Place

    kind, _, rest = on.partition(":")
    if kind == "ray" and rest:
        address = rest.removeprefix("//")
        check_address(address, "--on")
        return Place(ray=address)
    if kind != "local" or (rest and not rest.isdecimal()):
        raise BadInput(
            f"`{on}` is not a place to run", key="--on", mend="local, local:2, or ray://HOST:6379"
        )
    if rest:
        return Place(int(rest))
    return Place(_default_workers() if options.team.alone else 1)


def _default_workers() -> int:
    """One process a core on a small machine: small models leave a second thread idle."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def load_recipes(file: str, sets: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The recipes of a study by arm, or the one of a recipe file; and the number of seeds."""
    recipes, seeds, _ = load_tuned(file, sets)
    return recipes, seeds


def load_tuned(file: str, sets: Sequence[str]) -> tuple[dict[str, Any], int, int]:
    """As `load_recipes`, and the trials with which the study tunes each arm, 0 for none."""
    from maquette.config import load_yaml, set_dotted
    from maquette.recipe import parse_recipe
    from maquette.study.study import locate, parse_study

    path = locate(file)
    data = load_yaml(path)
    for assignment in sets:
        data = set_dotted(data, assignment)
    if "arms" in data:
        study = parse_study(data, name=path.stem, where=path)
        return dict(study.arms), len(study.seeds), study.tune.trials if study.tune else 0
    return {path.stem: parse_recipe(data, where=path)}, 1, 0


def one_of(recipes: dict[str, Any], arm: str, where: str) -> Any:
    if arm not in recipes:
        raise BadInput(f"there is no arm `{arm}`", where=where, mend=", ".join(recipes))
    return recipes[arm]
