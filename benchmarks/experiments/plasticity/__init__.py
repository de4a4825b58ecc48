"""Accuracy at the end of each task against its number: whether a network stays able to learn, and by what."""
