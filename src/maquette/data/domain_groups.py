"""Groups of domains by glob: `{"math": ["sympy", "mpmath*"], "general": ["*"]}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from maquette.errors import BadInput, did_you_mean


def matches(domain: str, globs: Iterable[str]) -> bool:
    """Whether a domain matches one of the globs (case matters; `*`, `?` and `[..]`)."""
    return any(fnmatchcase(domain, glob) for glob in globs)


def group_of(domain: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """The first group one of whose globs the domain matches, or None."""
    return next((name for name, globs in groups.items() if matches(domain, globs)), None)


def assign_groups(
    domains: Iterable[str],
    groups: Mapping[str, Sequence[str]],
    *,
    leave_out: bool = False,
    key: str = "groups",
) -> dict[str, str]:
    """{domain: group}. Without groups every domain is a group of its own.

    leave_out: domains outside every group are left out; otherwise they are an error.
    Raises BadInput for a group that no domain falls into, naming the nearest domain.
    """
    names = sorted(set(domains))
    if not groups:
        return {name: name for name in names}
    found = {name: group_of(name, groups) for name in names}
    for group, globs in groups.items():
        if group not in found.values():
            taken = any(matches(name, globs) for name in names)
            raise BadInput(
                f"group `{group}` ({', '.join(globs)}) holds no domain of the corpus",
                key=f"{key}.{group}",
                mend="an earlier group takes its domains; put the wider glob last"
                if taken
                else did_you_mean(globs[0] if globs else group, names[:200]),
            )
    lost = [name for name, group in found.items() if group is None]
    if lost and not leave_out:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise BadInput(
            f"no group holds the domains {shown}",
            key=key,
            mend='add a last group that takes the rest: `general: ["*"]`',
        )
    return {name: group for name, group in found.items() if group is not None}
