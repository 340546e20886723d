from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from emerging_optimizers.lab.config import TrainConfig

# Without the lab extra (a machine set up by others, for `make test-gpu`) these tests are left out.
collect_ignore_glob = [] if find_spec("tyro") and find_spec("rich") else ["test_*.py"]

# A model of about 20,000 parameters, as arguments so that the command line and Python get the same job.
TINY = {
    "steps": 6,
    "batch": 4,
    "context": 16,
    "width": 32,
    "depth": 1,
    "heads": 2,
    "warmup": 2,
    "eval_every": 3,
    "eval_windows": 32,
    "checkpoint_every": 2,
}


@pytest.fixture
def tiny() -> "TrainConfig":
    from emerging_optimizers.lab.config import TrainConfig

    return TrainConfig(**TINY)


@pytest.fixture
def tiny_args() -> list[str]:
    return [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
