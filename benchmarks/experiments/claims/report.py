"""The tables of the claims."""
from pathlib import Path


def report(results, out: Path) -> str:
    rows = []
    for part, some in results.by("part"):
        for row, one in some.by("row"):
            for measure in one.first["chosen"]:
                acc = sorted((o.first["strength"], round(o.final(measure).mean, 3)) for o in one.each() if o.final(measure) and measure in o.first["chosen"])
                rows.append(f"{part:18} {row:28} {measure:15} " + " ".join(f"{s:g}:{a}" for s, a in acc))
    return "# Claims\n\n```\n" + "\n".join(rows) + "\n```"
