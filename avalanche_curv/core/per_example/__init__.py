"""Derivatives of single examples, from what enters and leaves the layers of a model, or by Jacobian products."""
