"""Shortcuts for pairs of curvature and structure: each equals the way through operator products."""

from avalanche_curv.core.rules import diagonal as diagonal
from avalanche_curv.core.rules import gram as gram
