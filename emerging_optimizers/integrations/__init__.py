"""Glue to other libraries, none of which is needed to import it: trainers, arguments of torch.optim, loggers."""
