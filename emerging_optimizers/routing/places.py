"""Where the parameters of a model stand: the layer that each belongs to, whatever has been wrapped around it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from emerging_optimizers.engine.checkpoint import plain_name

# PEFT's: the layer that an adapter stands beside, and copies of a layer that is trained as a whole.
_COPIES = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
# Names under which old `weight_norm` keeps magnitude and direction, and `spectral_norm` and `prune` the weight.
_OLD = {"_g": "magnitude", "_v": "", "_orig": ""}


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        name: as in `model.named_parameters()`.
        p: the parameter.
        path: of its layer, without wrappers.
        layer: the module that computes with it.
        own: what the layer calls it: "weight", say, also where a parametrization keeps it under another name.
        parent: the module that holds the layer.
        magnitude: it holds the lengths of a weight's rows, of which another parameter holds the directions.
    """

    name: str
    p: nn.Parameter
    path: str
    layer: nn.Module
    own: str
    parent: nn.Module
    magnitude: bool = False

    @property
    def word(self) -> str:
        """The last component of the path that is no number: "lm_head", say."""
        return next((part for part in reversed(self.path.split(".")) if not part.isdigit()), "")


def places(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[Place]:
    """A place for each parameter, in the order of `named_parameters()`; `modules` are all, by their paths."""
    found = []
    paths: dict[str, str] = {}
    parents: dict[str, nn.Module] = {}
    for name, p in model.named_parameters():
        path, _, own = name.rpartition(".")
        layer, magnitude = modules[path], False
        if isinstance(layer, ParametrizationList):
            magnitude = own == "original0" and type(layer[0]).__name__ == "_WeightNorm"
            path, _, own = path.rpartition(".")
            path = path.removesuffix("parametrizations").removesuffix(".")
            layer = modules[path]
        else:
            ending = f"_{own.rpartition('_')[2]}"
            if ending in _OLD and _is_made_from_it(layer, own.removesuffix(ending), ending):
                own, magnitude = own.removesuffix(ending), _OLD[ending] == "magnitude"
        if path not in paths:
            paths[path] = plain_path(path)
            outer = path.rpartition(".")[0]
            while outer and isinstance(modules[outer], (nn.ModuleDict, nn.ModuleList)):
                outer = outer.rpartition(".")[0]
            parents[path] = modules[outer]
        found.append(Place(name, p, paths[path], layer, own, parents[path], magnitude))
    return found


def plain_path(path: str) -> str:
    """The path of a module, without what wrappers put into it."""
    return _COPIES.sub("", "." + plain_name(path + ".").removesuffix(".")).removeprefix(".")


def _is_made_from_it(layer: nn.Module, base: str, ending: str) -> bool:
    """Whether `base` is an attribute that is made out of parameters when the layer is called."""
    if base in layer._parameters or not hasattr(layer, base):
        return False
    return ending == "_orig" or (hasattr(layer, f"{base}_g") and hasattr(layer, f"{base}_v"))
