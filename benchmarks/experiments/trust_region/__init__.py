"""Accuracy against the number of refreshes, between one at each task's end and replay."""
