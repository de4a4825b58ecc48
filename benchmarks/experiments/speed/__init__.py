"""Cost of a penalty step, of estimates and of fidelity, as ratios to plain training work."""
