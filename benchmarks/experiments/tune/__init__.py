"""Strengths for the other experiments, chosen on seeds that they never report."""
