"""What keeps a network able to learn: each mitigator works around the steps of any optimiser."""
