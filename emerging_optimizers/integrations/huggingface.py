"""The optimizer of a Hugging Face `Trainer`, by name.

A factory in place of an optimizer class sees the model, so that every parameter is routed by what it is in the model
(`create_optimizer`). Nothing of transformers is imported.
"""

from typing import Any

import torch
from torch import nn

from emerging_optimizers import registry
from emerging_optimizers.routing import create_optimizer


class RoutedFactory:
    """Makes the optimizer for a model; no subclass of `torch.optim.Optimizer`, by which the Trainer tells a factory.

    Its name in full, `emerging_optimizers.integrations.huggingface.RoutedFactory`, is for programs that are configured
    by a path; `name` then stands among the options.
    """

    def __call__(self, model: nn.Module, *, name: str, **options: Any) -> torch.optim.Optimizer:
        """What `create_optimizer(name, model, **options)` returns."""
        return create_optimizer(name, model, **options)


def optimizer(name: str, **options: Any) -> tuple[type[RoutedFactory], dict[str, Any]]:
    """What `Trainer(model, args, optimizer_cls_and_kwargs=...)` takes.

    The Trainer hands a factory the model and nothing of its own arguments: `learning_rate`, `weight_decay`,
    `adam_beta1` and the like of `TrainingArguments` have no effect. Say `lr=` and `weight_decay=` here; without `lr` it
    is the rate that the registry says to start from. Schedules and warm-up of `TrainingArguments` work, in proportion
    for every group. The learning rate that the Trainer logs is the one of `name`.

    Args:
        name: a name of `list_optimizers()`.
        **options: of `create_optimizer`: `lr`, `companion_lr`, `weight_decay`, `overrides`, ...

    Returns:
        The factory and its arguments.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> factory, arguments = optimizer("muon", lr=2e-3)
        >>> arguments
        {'name': 'muon', 'lr': 0.002}
        >>> made = factory()(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10)), **arguments)
        >>> [group["algorithm"] for group in made.param_groups]
        ['muon', 'adamw', 'adamw']
    """
    registry.entry(name)  # a misspelled name is an error here, not after the model has been loaded
    return RoutedFactory, {"name": name, **options}
