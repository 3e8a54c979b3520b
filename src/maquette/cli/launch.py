"""The command line as one of several processes: who speaks, and which verbs may be shared."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from maquette.errors import BadInput

TOGETHER = ("run", "compare", "replicate", "noise", "resume")


def follows() -> bool:
    """Whether this process is a rank of a launch other than the one that speaks."""
    return os.environ.get("RANK", "0") != "0"


def refuse_ranks(arguments: Sequence[str]) -> None:
    """BadInput for a verb that several processes would each do in full."""
    launched = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    verb = next((a for a in arguments if not a.startswith("-")), None)
    if launched and verb not in (None, *TOGETHER):
        raise BadInput(
            f"`{verb}` runs in one process", mend=f"torchrun is for {', '.join(TOGETHER)}"
        )


def leave() -> None:
    """Part from the other ranks, if this process met any."""
    if "maquette.training.distributed" in sys.modules:
        from maquette.training import distributed

        distributed.leave()
