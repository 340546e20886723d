import pytest

from emerging_optimizers.lab.config import TrainConfig

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
def tiny() -> TrainConfig:
    return TrainConfig(**TINY)


@pytest.fixture
def tiny_args() -> list[str]:
    return [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
