"""What momentum and bases in bfloat16 do to the demo's loss and to the bytes of the state.

`python benchmarks/state_dtype.py` trains the demo's model with and without `state_dtype=torch.bfloat16`, and saves.
"""

from dataclasses import replace
from pathlib import Path

import torch

from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import train_one

OUT = Path(__file__).parent / "results" / "state_dtype.json"
SEEDS = (0, 1)


def main() -> None:
    """Train, show, save."""
    rows = []
    text = load_text(None, TrainConfig().context)
    for name in ("adamw", "muon", "soap", "rekls"):
        for seed in SEEDS:
            config = replace(TrainConfig(), seed=seed)
            arm = TUNED[name]
            row: dict[str, object] = {"optimizer": name, "seed": seed}
            for label, options in (("float32", {}), ("bfloat16", {"state_dtype": torch.bfloat16})):
                run = train_one(config, name, replace(arm, options={**arm.options, **options}), text)
                row[f"loss_{label}"] = round(run.final_loss, 4)
                row[f"state_bytes_{label}"] = run.state_bytes
            rows.append(row)
            print(row, flush=True)
    write_json(OUT, rows)
    write_json(OUT.with_suffix(".environment.json"), environment(1, text))


if __name__ == "__main__":
    main()
