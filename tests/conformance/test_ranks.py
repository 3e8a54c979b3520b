"""Every part that says it can be shared out is trained by two ranks, all in one launch."""

import pytest

from maquette import parts
from maquette.conformance import cases, disagreements


@pytest.mark.slow
def test_two_ranks_train_every_part_to_the_numbers_of_one_process(world, tmp_path):
    found = cases(list(parts.parts()), world)
    kinds = {case.cls.kind for case in found}
    assert kinds == {"objective", "optim", "feed", "surgery"}
    told = disagreements(found, world, tmp_path)
    wrong = {name: what for name, what in told.items() if what}
    assert not wrong
    assert len(told) == len(found)
