"""What a rank runs in the tests: `maquette.conformance.ranks` with objectives that fail."""

import sys

from maquette import parts
from maquette.conformance.ranks import main
from maquette.methods.objectives.causal_lm import CausalLM
from maquette.parts import Loss

COLLATED = []


@parts.register("breaks-everywhere")
class BreaksEverywhere(CausalLM):
    """Its loss stops being a number on one rank, whose logs all ranks share."""

    def loss(self, model, extra, batch, clock):
        loss = super().loss(model, extra, batch, clock)
        return Loss(loss.total * float("nan")) if clock.step == 2 else loss


@parts.register("breaks-on-rank-1")
class BreaksOnOneRank(CausalLM):
    """Raises in the middle of a step, on one rank alone."""

    def collate(self, examples, ctx, rng):
        COLLATED.append(len(examples))
        if ctx.team.rank == 1 and len(COLLATED) > 6:
            raise RuntimeError("this rank breaks")
        return super().collate(examples, ctx, rng)


if __name__ == "__main__":
    main(sys.argv[1:])
