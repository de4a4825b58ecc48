"""Loops in C, where a C compiler is at hand, and memory in the order in which they read it."""
