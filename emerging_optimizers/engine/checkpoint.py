"""What `load_state_dict` adds to torch's: the state's own dtype is kept, and nothing changes if it does not fit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Written into every state_dict under "format"; raised when the layout of the state changes.
FORMAT = 1


def state_by_parameter(
    parameters: list[list[Tensor]], state_dict: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]] | None:
    """The saved state of each parameter, in the order of the groups; None if the groups do not correspond."""
    saved = [group["params"] for group in state_dict["param_groups"]]
    if [len(ids) for ids in saved] != [len(ps) for ps in parameters]:
        return None
    state = state_dict["state"]
    return {
        p: state[saved_id]
        for ids, ps in zip(saved, parameters, strict=True)
        for saved_id, p in zip(ids, ps, strict=True)
        if state.get(saved_id)
    }


def check_format(state_dict: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a later layout. One without the key is of torch or of the published library."""
    found = state_dict.get("format", FORMAT)
    if found > FORMAT:
        raise ValueError(
            f"this checkpoint has format {found}, this version of emerging_optimizers reads up to {FORMAT}; "
            "upgrade emerging_optimizers"
        )
