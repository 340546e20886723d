"""Commands that answer a question and train nothing: they need nothing but the package itself."""

import json
import math
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from textwrap import shorten
from typing import Annotated, Any, ClassVar

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.convert import Convert
from emerging_optimizers.cli.progress import asked
from emerging_optimizers.columns import in_columns

Json = Annotated[bool, "Print JSON."]
_MODEL = (
    "gpt2-small, llama-7b, llama-70b, moe-256, or a .json or .toml file with layers, width, heads, vocabulary (and "
    "hidden, kv_heads, experts, ...)."
)
_MESH = (
    "SHARDSxTENSOR, as in 64x8: shards of FSDP2 times the degree of tensor parallelism; SHARDS alone; or "
    "REPLICASxSHARDSxTENSOR, as in 2x32x8, for HSDP."
)
# Options of `eopt estimate` that belong to one of its two questions.
_OF_ONE = ("shapes", "device", "seconds")
_OF_A_MESH = ("expert_parallel", "dtype", "tokens", "link", "tflops", "optimizer_tflops")
_MOST_ELEMENTS, _MOST_PARAMETERS = 2**60, 10**5


def show(value: Any, as_json: bool) -> None:
    """Print an answer."""
    if as_json:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        print(json.dumps(plain, indent=1, default=str))
    else:
        print(value)


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the optimizers."""

    positional: ClassVar[tuple[str, ...]] = ("pattern",)
    pattern: Annotated[str, "Which ones, as in '*muon*'."] = "*"
    json: Json = False

    def run(self) -> None:
        """Prints a table."""
        from emerging_optimizers.registry import OPTIMIZERS, list_optimizers

        names = list_optimizers(self.pattern.lower())
        if not names:
            raise UsageError(f"no optimizer matches {self.pattern!r}; known are {', '.join(OPTIMIZERS)}")
        found = [
            {
                "name": name,
                "what it is": entry.description,
                "for": "any shape" if entry.elementwise else "matrices",
                "lr to start from": "" if entry.start is None else f"{entry.start:g}",
                "unit": entry.unit,
                "paper": entry.paper,
            }
            for name, entry in OPTIMIZERS.items()
            if name in names
        ]
        rows = [[*found[0]], *([*row.values()] for row in found)]
        show(found if self.json else "\n".join(in_columns(rows)), self.json)


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Show the named sets of hyper-parameters, as in create_optimizer(..., recipe=NAME)."""

    json: Json = False

    def run(self) -> None:
        """Prints each with its options and its source."""
        from emerging_optimizers.routing.recipes import RECIPES

        if self.json:
            show({name: asdict(recipe) for name, recipe in RECIPES.items()}, True)
            return
        for name, recipe in RECIPES.items():
            for optimizer, options in recipe.options.items():
                print(f'create_optimizer("{optimizer}", model, recipe="{name}")')
                print(f"  {optimizer}: " + ", ".join(f"{key}={value!r}" for key, value in options.items()))
                beside = {**recipe.companion, **recipe.overrides}
                print("  adamw: " + ", ".join(f"{key}={value!r}" for key, value in beside.items()))
                print(f"  {recipe.source}\n")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Say what a step of an optimizer will cost: bytes of state, bytes for a moment, operations, time.

    With --model and --mesh: what it costs each rank, where each whole matrix is worked on by one of them.
    """

    positional: ClassVar[tuple[str, ...]] = ("optimizer",)
    optimizer: Annotated[str, "A name from `eopt list`."] = "muon"
    shapes: Annotated[
        str,
        "The parameters, as in COUNT*ROWSxCOLUMNS,...; by default the hidden matrices of GPT-2 small",
    ] = "12*4*768x768,12*3072x768,12*768x3072"
    device: Annotated[str, "Where the step would run."] = "cpu"
    seconds: Annotated[bool, "Time the operations, in little memory."] = True
    model: Annotated[str | None, f"In place of --shapes: {_MODEL}"] = None
    mesh: Annotated[str | None, _MESH] = None
    expert_parallel: Annotated[int, "Ranks over which the experts of a layer are spread."] = 1
    dtype: Annotated[str, "Of parameters and gradients on the mesh: float32 or bfloat16."] = "float32"
    tokens: Annotated[int, "Tokens of a step, all ranks together."] = 4 * 2**20
    link: Annotated[float, "GB/s that a rank sends, and at the same time receives."] = 50.0
    tflops: Annotated[float, "TFLOP/s of the model's products on a rank."] = 400.0
    optimizer_tflops: Annotated[
        float | None, "TFLOP/s of the optimizer's operations on a rank; by default as --tflops."
    ] = None
    json: Json = False

    def run(self) -> None:
        """Counts, times and shows."""
        if (self.model is None) != (self.mesh is None):
            raise UsageError("--model and --mesh belong together, as in --model llama-7b --mesh 8x8; give both or none")
        idle = _OF_ONE if self.mesh is not None else _OF_A_MESH
        if given := [field.name for field in fields(self) if field.name in idle and self._is_given(field)]:
            option = f"--{given[0].replace('_', '-')}"
            raise UsageError(
                f"{option} says nothing {'without' if self.mesh is None else 'beside'} --model and --mesh; leave it out"
            )
        show(asked("estimate", self._on_one if self.mesh is None else self._on_a_mesh), self.json)

    def _is_given(self, field: Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)

    def _on_one(self) -> object:
        import torch

        from emerging_optimizers.cost import estimate

        parameters: list[tuple[str, torch.nn.Parameter]] = []
        for text in self.shapes.split(","):
            *counts, shape = text.split("*")
            try:
                count, size = math.prod(map(int, counts)), [int(side) for side in shape.lower().split("x")]
            except ValueError:
                raise UsageError(
                    f"--shapes {self.shapes}: {text!r} is not COUNT*ROWSxCOLUMNS, as in 12*768x3072"
                ) from None
            if count < 1 or min(size) < 1:
                raise UsageError(f"--shapes {self.shapes}: {text!r} has a number below 1")
            if math.prod(size) > _MOST_ELEMENTS:
                raise UsageError(f"--shapes {self.shapes}: {text!r} has more elements than torch can count, 2^60")
            if len(parameters) + count > _MOST_PARAMETERS:
                raise UsageError(f"--shapes {self.shapes} are more than {_MOST_PARAMETERS:,} parameters")
            for i in range(count):
                parameters.append((f"{shape} {i}", torch.nn.Parameter(torch.empty(size, device="meta"))))
        return estimate(parameters, self.optimizer.lower(), self.device, seconds=self.seconds)

    def _on_a_mesh(self) -> object:
        from emerging_optimizers.cost.scale import Machine, at_scale

        machine = Machine(
            link=self.link, tflops=self.tflops, optimizer_tflops=self.optimizer_tflops, tokens=self.tokens
        )
        return at_scale(
            str(self.model),
            self.optimizer.lower(),
            str(self.mesh),
            expert_parallel=self.expert_parallel,
            dtype=self.dtype,
            machine=machine,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say which rank of a mesh works on each matrix of a model, what travels for it, and why; no process is started.

    `print(optimizer.plan)` says the same of an optimizer whose parameters are sharded.
    """

    positional: ClassVar[tuple[str, ...]] = ("optimizer",)
    optimizer: Annotated[str, "A name from `eopt list`."] = "muon"
    model: Annotated[str, _MODEL] = "gpt2-small"
    mesh: Annotated[str, _MESH] = "8"
    expert_parallel: Annotated[int, "Ranks over which the experts of a layer are spread."] = 1
    dtype: Annotated[str, "Of parameters and gradients: float32 or bfloat16."] = "float32"
    json: Json = False

    def run(self) -> None:
        """Prints a table."""
        from emerging_optimizers.cost.scale import plan_at_scale

        found = asked(
            "plan",
            lambda: plan_at_scale(
                self.model, self.optimizer.lower(), self.mesh, expert_parallel=self.expert_parallel, dtype=self.dtype
            ),
        )
        show(found, self.json)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Try on an optimizer what people do around one: schedulers, clipping, edits, copies, checkpoints."""

    positional: ClassVar[tuple[str, ...]] = ("subject",)
    subject: Annotated[
        str,
        "A name from `eopt list`, or MODULE:CALLABLE, which makes an optimizer of a list of parameters, as in "
        "torch.optim:AdamW.",
    ]
    lr: Annotated[float | None, "Its learning rate; by default the one to start from, or its own."] = None
    json: Json = False

    def run(self) -> None:
        """Prints what came of each check; a failure is exit status 1."""
        from emerging_optimizers.testing.conformance import check_optimizer, made_by

        name = self.subject if ":" in self.subject else self.subject.lower()
        try:
            report = asked("check", lambda: check_optimizer(made_by(name, self.lr), name=name, raises=False))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # of whatever kind: it calls what others have written
            reason = shorten(f"{type(error).__name__}: {error}", 160)
            raise UsageError(f"{self.subject} makes no optimizer of a list of parameters: {reason}") from error
        show(report.to_json() if self.json else report, self.json)
        if report.failures:
            raise SystemExit(1)


QUESTIONS: dict[str, Any] = {
    "list": List,
    "recipes": Recipes,
    "estimate": Estimate,
    "plan": Plan,
    "check": Check,
    "convert": Convert,
}
