"""The table of optimizers: name, import path, one line, paper. Importing it imports no optimizer."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Literal, overload


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer.

    Attributes:
        path: module and class, "package.module:Class".
        description: one line.
        paper: author, year, arXiv number.
        elementwise: it takes parameters of any shape; otherwise matrices only.
    """

    path: str
    description: str
    paper: str
    elementwise: bool = False

    def load(self) -> Any:
        """The class."""
        module, name = self.path.split(":")
        return getattr(import_module(module), name)


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(
        path="emerging_optimizers.scalar_optimizers.adamw:AdamW",
        description="Adam with decoupled weight decay, equal to torch.optim.AdamW",
        paper="Loshchilov and Hutter 2019, arXiv 1711.05101",
        elementwise=True,
    ),
    "laprop": Entry(
        path="emerging_optimizers.scalar_optimizers.laprop:LaProp",
        description="Adam that normalises the gradient before the momentum; forgets a spike in a few steps",
        paper="Ziyin et al. 2020, arXiv 2002.04839",
        elementwise=True,
    ),
    "lion": Entry(
        path="emerging_optimizers.scalar_optimizers.lion:Lion",
        description="sign of an interpolated momentum; one state tensor",
        paper="Chen et al. 2023, arXiv 2302.06675",
        elementwise=True,
    ),
    "muon": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        description="momentum orthogonalized by Newton-Schulz; one state tensor",
        paper="Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
    ),
    "rekls": Entry(
        path="emerging_optimizers.soap.rekls:REKLS",
        description="SOAP with KL factors and a fresh eigendecomposition at every refresh",
        paper="Lin et al. 2025, arXiv 2509.03378",
    ),
    "soap": Entry(
        path="emerging_optimizers.soap.soap:SOAP",
        description="Adam in the eigenbasis of Shampoo's factors, plain or KL",
        paper="Vyas et al. 2024, arXiv 2409.11321",
    ),
}


def entry(name: str) -> Entry:
    """The entry of a name, upper or lower case.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.
    """
    found = OPTIMIZERS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no optimizer {name!r}; {hint}Known are {', '.join(OPTIMIZERS)}")
    return found


@overload
def list_optimizers(pattern: str = ..., with_description: Literal[False] = ...) -> list[str]: ...
@overload
def list_optimizers(pattern: str, with_description: Literal[True]) -> list[tuple[str, str]]: ...
@overload
def list_optimizers(*, with_description: Literal[True]) -> list[tuple[str, str]]: ...
def list_optimizers(pattern: str = "*", with_description: bool = False) -> list[str] | list[tuple[str, str]]:
    """The names that match a shell-style pattern, sorted; with one line each if asked for.

    Example:
        >>> list_optimizers("*ao*")
        []
        >>> list_optimizers("l*")
        ['laprop', 'lion']
    """
    names = [name for name in sorted(OPTIMIZERS) if fnmatchcase(name, pattern.lower())]
    return [(name, OPTIMIZERS[name].description) for name in names] if with_description else names
