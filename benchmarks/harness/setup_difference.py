"""What two results were made with and of, where it is not the same."""

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.results import Results

LONGEST = 160
APART = ("units", "seconds", "unit_seconds", "grid", "version", "workers", "threads_per_worker", "jobs")
"""What a manifest says of how a run went, rather than of what was run."""


def environment(a: Results, b: Results) -> str:
    """What the two ran with, where it is not the same."""
    before, after = (_flat({k: v for k, v in r.manifest.items() if k not in APART}) for r in (a, b))
    before["commit of the units"], after["commit of the units"] = _commits(a), _commits(b)
    lines = [
        f"- {key}: {_code(before.get(key))} → {_code(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if not lines:
        return "## Environment\n\nThe same command, options, commit, versions and machine."
    return "## Environment\n\nWhat is not listed is the same.\n\n" + "\n".join(lines)


def coverage(a: Results, b: Results) -> str:
    """Units of one side only, and labels whose configuration is not the same."""
    lines = []
    for name, one, other in (("A", a, b), ("B", b, a)):
        theirs = _seeds(other)
        alone = {label: sorted(seeds - theirs.get(label, set())) for label, seeds in _seeds(one).items()}
        lines += [f"- only in {name}: {label}, {_some(seeds)}" for label, seeds in alone.items() if seeds]
    for label in (label for label in a.labels if label in b.labels):
        before, after = _flat(a.config(label)), _flat(b.config(label))
        if before and after:
            lines += [
                f"- {label}: `{key}` {_code(before.get(key))} → {_code(after.get(key))}"
                for key in dict.fromkeys([*before, *after])
                if before.get(key) != after.get(key)
            ]
    return "## Units and configurations\n\n" + ("\n".join(lines) or "The same labels, seeds and configurations.")


def _seeds(results: Results) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for header in results.headers:
        found.setdefault(header["label"], set()).add(header["seed"])
    return found


def _some(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _commits(results: Results) -> str:
    return ", ".join(sorted({str(header.get("commit"))[:12] for header in results.headers}))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted path."""
    if isinstance(value, dict):
        inner = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
        return {leaf: item for leaves in inner for leaf, item in leaves.items()}
    return {path: value}


def _code(value: Any) -> str:
    text = str(value)
    return "–" if value is None else f"`{text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}`"
