"""Documents whose tables cog fills from published results."""

import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from cogapp.cogapp import Cog, CogError

from benchmarks.harness import published
from benchmarks.harness.errors import UsageError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "avalanche_curv/README.md", *sorted((ROOT / "benchmarks").rglob("README.md"))]


def fill(files: Sequence[Path] = (), check: bool = False) -> int:
    """Fill the documents (default: all), or with `check` only name those that are not what they would be filled with.
    Returns the exit status, 1 for such. Raises UsageError for a file that is none, for lines that cog or `show` cannot
    follow, and, of all documents, for published results that none of them shows."""
    changed = []
    published.shown.clear()
    for path in files or [path for path in DOCUMENTS if path.exists()]:
        if not path.is_file():
            raise UsageError(f"expected a file, but '{path}' is none.")
        before = path.read_text(encoding="utf-8")
        after = filled(path, before)
        if after != before:
            changed.append(path)
            if not check:
                published.write_atomically(path, after)
    for name, place in published.files().items():
        if not files and name not in published.shown:
            raise UsageError(f'{place} has no place in a document: show("{name}") it, or remove the file.')
    if check:
        for path in changed:
            print(f"{path}: not what its published results say.", file=sys.stderr)
        return 1 if changed else 0
    print("\n".join(f"{path} changed." for path in changed) or "Nothing changed.")
    return 0


def filled(path: Path, text: str) -> str:
    """The text of a document with what its lines for cog print."""
    out, errors = StringIO(), StringIO()
    cog = Cog()
    cog.set_output(stdout=errors, stderr=errors)
    cog.options.verbosity = 0
    try:
        cog.process_file(StringIO(text), out, str(path))
    except CogError as error:
        raise UsageError(f"{path}: {_last(str(error))}") from error
    return out.getvalue()


def _last(traceback: str) -> str:
    """The message at the end of a traceback, without the name of `UsageError`."""
    return traceback.strip().splitlines()[-1].rpartition("UsageError: ")[2]
