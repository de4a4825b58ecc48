"""Ten permuted MNIST tasks in the setting of gradient projection memory (Saha et al. 2021), with its family."""
