"""Cases made from sound inputs: bytes flipped, cut, repeated, spliced, and known traps put in."""

from __future__ import annotations

import random
from collections.abc import Sequence

TRAPS: tuple[bytes, ...] = (
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n\n", b"\t", b"\x85"),
    *(b"{", b"}", b"[" * 300, b"{a: " * 100, b'"', b"'", b"- ", b"? ", b": ", b"<<: *x", b"*x"),
    *(b"&x ", b"!!int ", b"!!float ", b"!!timestamp ", b"!!bool x", b"!!binary ", b"!!set ", b"!"),
    *(b"!!python/object/apply:os.system ['x']", b"!!omap ", b"!!pairs ", b"!!null x", b"%YAML 9\n"),
    *(b"nan", b"inf", b"-1", b"0", b"1e999", b"9" * 400, b"9" * 5000, b"-0x1", b"1:60:60", b"1_0"),
    *(b"null", b"true", b"NaN", b'"\\ud800"', b'{"a":' * 200, b"\\u0000", b"../../etc/passwd"),
    *(
        "٣".encode(),
        "𝄞".encode(),
        b"flop",
        b"GiB",
        b"__tensor__",
        b"__map__",
        b"__tuple__",
        b"PAR1",
    ),
    *(b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8, b"text", b"params", b"<script>", b"=1+1"),
)


def mutated(seeds: Sequence[bytes], chance: random.Random, limit: int = 1 << 14) -> bytes:
    """One case: a seed with one to eight changes, or now and then bytes out of nothing."""
    if chance.random() < 0.02:
        return chance.randbytes(chance.randrange(200))
    data = bytearray(chance.choice(seeds))
    if data and chance.random() < 0.2:  # what has a checksum or a length inside survives no more
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data)
    for _ in range(chance.choice((1, 1, 2, 3, 5, 8))):
        data = _changed(data, seeds, chance)
    return bytes(data[:limit])


def _changed(data: bytearray, seeds: Sequence[bytes], chance: random.Random) -> bytearray:
    a = chance.randrange(len(data) + 1)
    b = min(len(data), a + chance.choice((1, 1, 2, 4, 16, 64)))
    match chance.randrange(7):
        case 0:  # flip a bit
            if data:
                data[a % len(data)] ^= 1 << chance.randrange(8)
            return data
        case 1:  # remove
            return data[:a] + data[b:]
        case 2:  # repeat
            return data[:b] + data[a:b] * chance.choice((1, 2, 50)) + data[b:]
        case 3:  # put in a trap
            return data[:a] + chance.choice(TRAPS) + data[a:]
        case 4:  # put a trap in the place of something
            return data[:a] + chance.choice(TRAPS) + data[b:]
        case 5:  # go on as another seed does
            other = chance.choice(seeds)
            return data[:a] + other[chance.randrange(len(other) + 1) :]
        case _:  # cut
            return data[:a] if chance.random() < 0.3 else data[a:b] + data
