"""When a diagonal stands for the Hessian, and where its error ends and that of the expansion begins."""
