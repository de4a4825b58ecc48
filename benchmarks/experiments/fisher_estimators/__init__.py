"""Five methods to compute the Fisher information, each across strengths: the best λ differ by orders of magnitude."""
