"""The main comparison: the strategies of this package beside Avalanche's own, on one stream in one scenario."""
