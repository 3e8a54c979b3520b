import sys
from pathlib import Path

import numpy as np
import pytest

from maquette.data.mapped import release


def resident_kb(path):
    """Resident memory of this process's maps of a file, as the kernel tells it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "numbers.bin"
    np.arange(1 << 18, dtype=np.uint32).tofile(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_map_that_was_read_through_holds_no_memory_after_its_release(stored):
    numbers = np.memmap(stored, np.uint32, "r").reshape(-1, 128)
    assert int(numbers.sum(dtype=np.int64)) == (2**18 - 1) * 2**17
    assert resident_kb(stored) >= 1024
    release(numbers)
    assert resident_kb(stored) == 0
    assert int(numbers[-1, -1]) == 2**18 - 1


def test_what_was_written_to_a_map_or_an_array_is_kept(stored):
    private = np.memmap(stored, np.uint32, "c")
    private[0] = 7
    plain = np.full(4, 7)
    release(private)
    release(plain)
    assert private[0] == 7
    assert plain.tolist() == [7, 7, 7, 7]
