"""The Hessian's diagonal against squared gradients in EWC, each at its own strength, on permuted MNIST."""
