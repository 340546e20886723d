"""Published paths only; the optimizers live with their families."""
