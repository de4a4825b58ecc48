"""Shortcuts for pairs of curvature and structure: each equals the way through operator products."""

from avalanche_curv.core.rules import dense as dense
from avalanche_curv.core.rules import diagonal as diagonal
from avalanche_curv.core.rules import kronecker as kronecker
from avalanche_curv.core.rules import low_rank as low_rank
from avalanche_curv.core.rules import matrix_free as matrix_free
