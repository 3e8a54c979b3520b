"""A small world to try a part in: a corpus made from a seed, stores, and runs of a few steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from maquette import parts
from maquette.errors import BadInput
from maquette.parts import Objective, Part, Subject, Surgery
from maquette.recipe import Recipe, parse_part, parse_recipe
from maquette.study.evaluating import evaluation_ctx
from maquette.study.execute import (
    Options,
    Trained,
    execute,
    train_stages,
)
from maquette.study.models import load_subject
from maquette.study.store import Store
from maquette.training.loop import Progress, Settings

if TYPE_CHECKING:
    from maquette.parts import Ctx

PACKAGES = ("harbour", "orchard", "foundry", "library", "weather", "kitchen")
STEPS = 8
OPTIONS = Options(
    device="cpu",
    threads=1,
    precision="fp32",
    settings=Settings(compile="off", live_points=2, live_rows=8),
)
_SYLLABLES = ("ka", "lo", "mi", "ren", "tas", "ver", "un", "pil", "do", "gra", "sem", "bu", "fin")
_BODIES = (
    "    for {b} in range({n}):\n        {a} = {a} + {b} * {m}\n    return {a}\n",
    '    if {a} > {n}:\n        return "{c} {d}"\n    {b} = [{a}, {m}]\n    return {b}\n',
    '    {b} = {{"{c}": {a}, "{d}": {n}}}\n    return {b}.get("{c}", {m})\n',
    "    while {a} < {n}:\n        {a} += len(str({b}))\n    print({a}, {m})\n    return {b}\n",
    "    {c} = sorted({b}, key=lambda {d}: {d} % {n})\n    return {c}[: {m}] + [{a}]\n",
    "    with open(str({b})) as {c}:\n        {d} = {c}.read().split()\n    return {d}[{m}:{n}]\n",
)
_RISKY = (
    "    {c} = eval({b})\n    return {c} + {n} * {m}\n",
    "    import pickle\n\n    {c} = pickle.loads({b})\n    return {c}, {a}\n",
    "    import os\n\n    return os.system(str({b}) + str({n})) + {a}\n",
)


def _words(rng: np.random.Generator, n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choice(_SYLLABLES, rng.integers(2, 5)))] = None
    return list(found)


def _function(rng: np.random.Generator, words: Sequence[str]) -> str:
    """A function that parses; one in eight holds an insecure call. Long docstrings have two
    sentences."""
    bodies = _RISKY if rng.random() < 0.125 else _BODIES
    name, a, b, c, d = rng.choice(words, 5, replace=False)
    said = list(rng.choice(words, rng.integers(5, 14)))
    said[0] = said[0].capitalize()
    if len(said) > 7:
        said[3:5] = f"{said[3]}.", said[4].capitalize()
    doc = " ".join(said)
    n, m = rng.integers(2, 999, 2)
    body = bodies[rng.integers(len(bodies))].format(a=a, b=b, c=c, d=d, n=n, m=m)
    return f'def {name}_{d}({a}, {b}):\n    """{doc}."""\n{body}'


def write_corpus(folder: Path, *, files: int = 16, functions: int = 20, seed: int = 0) -> None:
    """Packages of Python files, each with words of its own, and `dated.jsonl` of the same text.

    Depends on its arguments alone; the defaults make about 500 KB.
    """
    rng = np.random.default_rng(seed)
    common = _words(rng, 60)
    records = []
    for number, package in enumerate(PACKAGES):
        words = _words(rng, 90) + common
        (folder / "corpus" / package).mkdir(parents=True)
        for i in range(files):
            topic = list(rng.choice(words, 70, replace=False))
            text = "\n\n".join(_function(rng, topic) for _ in range(functions))
            text = f'"""{" ".join(rng.choice(topic, 12))}."""\n\nimport math\n\n\n{text}'
            (folder / "corpus" / package / f"{topic[0]}_{i}.py").write_text(text)
            year = 2010 + (number + i) % 8
            records.append(json.dumps({"text": text, "domain": package, "year": year}))
    (folder / "dated.jsonl").write_text("\n".join(records) + "\n")
    (folder / "words.txt").write_text("\n".join(common[:3]) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run of one recipe: where it lies, and its last stage."""

    digest: str
    recipe: Recipe
    store: Store
    seed: int

    @property
    def folder(self) -> Path:
        """Of the last stage."""
        return self.store.run_dir(self.store.run(self.digest).metrics["stages"][-1])

    def weights(self) -> str:
        """SHA-256 of the trained weights of model and extra modules, by name."""
        # Not of the files: safetensors writes the names of shared weights in any order.
        whole = hashlib.sha256()
        for file in sorted((self.folder / "state" / "final").glob("*.safetensors")):
            for name, tensor in sorted(load_file(file).items()):
                whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                whole.update(tensor.contiguous().view(-1).numpy().tobytes())
        return whole.hexdigest()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` without what a clock measured."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    def ledger(self) -> dict[str, dict[str, float]]:
        """Training costs by cause, without seconds."""
        ledger = self.store.run(self.digest).ledger
        return {c: {k: v for k, v in e.items() if k != "seconds"} for c, e in ledger.items()}

    def trained(self) -> Trained:
        """The last stage's files and how to read them."""
        return self._stages()[self.recipe.last.name]

    def _stages(self) -> dict[str, Trained]:
        return train_stages(self.recipe, self.seed, self.store, OPTIONS)

    def subject(self) -> tuple[Subject, Trained, Ctx]:
        """The trained modules, frozen, and a context as an audit gets it."""
        done = self._stages()
        trained = done[self.recipe.last.name]
        return load_subject(trained), trained, evaluation_ctx(trained, self.seed, done)


class Stopped(Exception):
    """Raised inside a run to end it as a kill would."""


@dataclass
class World:
    """A folder with a corpus, a cache that all stores share, and what was trained in it."""

    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> World:
        write_corpus(folder)
        (folder / "cache").mkdir()
        return cls(folder)

    def store(self, name: str) -> Store:
        """A store of its own, on the shared cache of prepared corpora."""
        home = self.folder / "stores" / name
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "cache").exists():
            (home / "cache").symlink_to(self.folder / "cache", target_is_directory=True)
        return Store(home)

    def workload(self, slug: str, **options: Any) -> dict[str, Any]:
        given = {
            "type": slug,
            "corpus": {"path": str(self.folder / "corpus")},
            "length": 32,
            "vocabulary": 512,
            "held_out_fraction": 0.25,
        }
        return given | options

    def train(self, data: Mapping[str, Any], seed: int = 0) -> Run:
        """Run a recipe, or give the run that was made before."""
        key = json.dumps([data, seed], sort_keys=True)
        if key not in self.runs:
            self.runs[key] = _run(data, seed, self.store("shared"))
        return self.runs[key]

    def train_with_a_kill(self, data: Mapping[str, Any], after: int, seed: int = 0) -> Run:
        """The same run in a store of its own, ended inside step `after` of its last stage."""
        name = hashlib.sha256(json.dumps([data, seed, after]).encode()).hexdigest()[:12]
        store, recipe = self.store(name), parse_recipe(data)

        def kill(stage: str, progress: Progress) -> None:
            if stage == recipe.last.name and progress.step == after:
                raise Stopped

        settings = replace(OPTIONS.settings, checkpoint_seconds=0.0)
        try:
            execute(recipe, seed, store, replace(OPTIONS, settings=settings), on_step=kill)
        except Stopped:
            return _run(data, seed, store)
        raise AssertionError(f"the run had no step {after}")


def _run(data: Mapping[str, Any], seed: int, store: Store) -> Run:
    recipe = parse_recipe(data)
    return Run(execute(recipe, seed, store, OPTIONS), recipe, store, seed)


# --- recipes around a part -----------------------------------------------------------------------

OBJECTIVES = {
    "text/causal": "causal-lm",
    "text/encoder": "masked-lm",
    "text/seq2seq": "span-corruption",
}
AUDITED_WITH = {"infill": "span-corruption"}
"""Objectives that reserve the tokens an audit asks with."""


def example_options(cls: type[Part], world: World) -> tuple[dict[str, Any], ...]:
    """The sets of options to try a part with; names of files are those of the world's folder."""
    rooted = tuple(dict(options) for options in cls.examples)
    for options in rooted:
        if "words_file" in options:
            options["words_file"] = str(world.folder / options["words_file"])
    missing = [n for n, f in cls.model_fields.items() if f.is_required() and n not in rooted[0]]
    if missing:
        raise BadInput(
            f"no example gives the required options {', '.join(missing)}",
            where=f"{cls.kind} {cls.type}",
            mend="give the class `examples: ClassVar = ({...},)` with options for a tiny run",
        )
    return rooted


def workloads_of(cls: type[Part]) -> list[str]:
    """Text workloads a part can be tried on, by its `needs` and those of the objectives."""
    allowed = cls.needs.workloads
    known = [w.type for w in parts.parts("workload") if w.type in OBJECTIVES]
    return [slug for slug in known if not allowed or slug in allowed]


def recipe_for(
    cls: type[Part], options: Mapping[str, Any], world: World, workload: str
) -> dict[str, Any]:
    """A recipe of a few steps with this part in its slot, around it the baseline."""
    spec = {"type": cls.type, **options}
    slot = {"data_op": "data", "selector": "data"}.get(cls.kind, cls.kind)
    data: dict[str, Any] = {
        "workload": world.workload(workload),
        "size": "nano",
        "objective": OBJECTIVES[workload],
        "budget": f"{STEPS}step",
        "evaluate": [],
    }
    if cls.kind in ("data_op", "selector", "surgery"):
        data[slot] = [spec]
    elif cls.kind in ("objective", "optim", "feed"):
        data[slot] = spec
    elif cls.kind == "audit":
        asked = AUDITED_WITH.get(cls.type)
        if asked in {objective.type for objective in objectives_on(workload)}:
            data["objective"] = asked
    else:
        raise BadInput(f"a {cls.kind} is not trained with", where=cls.type)
    if "year" in cls.needs.columns:
        dated = {"domain_column": "domain", "year_column": "year"}
        data["workload"]["corpus"] = {"path": str(world.folder / "dated.jsonl"), **dated}
    if issubclass(cls, Surgery) and cls.replaces_tokenizer:
        return _after_a_source(data, world, workload)
    if read := list(parse_part(parts.KINDS[cls.kind], spec).reads()):
        if cls.kind == "audit":
            data["evaluate"] = [spec]  # else nothing would use what it reads
        return _after_what_it_reads(data, read, cls, world)
    return data


def _after_what_it_reads(
    data: dict[str, Any], read: Sequence[str], cls: type[Part], world: World
) -> dict[str, Any]:
    """The recipe with a stage of its own seed for every name the part reads.

    A data part reads language models, whatever the stage it prepares text for is.
    """
    slot = "data" if cls.kind == "data_op" else cls.kind
    own = {k: data.pop(k) for k in (slot, "workload", "objective") if k in data}
    plain = {"workload": own["workload"], "objective": own.get("objective", "causal-lm")}
    if cls.kind == "data_op":
        plain = {"workload": world.workload("text/causal"), "objective": "causal-lm"}
    elif cls.kind == "objective":
        plain["objective"] = OBJECTIVES[str(own["workload"]["type"])]
    stages = [{"name": n, "budget": "4step", "reseed": i, **plain} for i, n in enumerate(read, 1)]
    return data | {"stages": [*stages, {"name": "train", **own}]}


def _after_a_source(data: dict[str, Any], world: World, workload: str) -> dict[str, Any]:
    """The recipe as a second stage, whose tokenizer differs from the first one's."""
    surgery = data.pop("surgery")
    target = {"name": "target", "init": {"from": "source"}, "surgery": surgery}
    target["workload"] = world.workload(workload, vocabulary=400)
    return data | {"stages": [{"name": "source", "budget": "4step"}, target]}


def objectives_on(workload: str) -> list[type[Objective]]:
    """Objectives that work on a workload."""
    found = parts.parts("objective")
    return [
        cls
        for cls in found
        if issubclass(cls, Objective) and workload in (cls.needs.workloads or {workload})
    ]
