"""What leaks back into a protected subspace: one projection after another, and projected gradients."""
