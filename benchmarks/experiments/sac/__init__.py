"""Spectral regularisation of actor and critic: SAC at a replay ratio of 16, on the DeepMind control suite."""
