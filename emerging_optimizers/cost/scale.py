"""What a step costs each process of a mesh where each whole matrix is worked on by one of them, for up to thousands.

What each process has, sends and receives is added up in `ledger`; here stand the request, the rates and the tables.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from emerging_optimizers.columns import in_columns
from emerging_optimizers.cost.ledger import Ledger, Mesh, Place, Update, owners_of, sharding_of_weight
from emerging_optimizers.cost.models import Decoder, read_model
from emerging_optimizers.distributed.owners import least_load
from emerging_optimizers.distributed.table import WorkPlan, entry_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTION_BYTES = 4  # directions travel in the dtype in which they are computed
COMPANION = "adamw"
MOST_RANKS = 2**17  # more than a job has had; what each holds is added up


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of a process, and what is computed in a step.

    Attributes:
        link: GB/s that a process sends, and at the same time receives.
        tflops: 10^12 operations a second of the model's products.
        optimizer_tflops: the same of the optimizer's; None: as the model's.
        tokens: of a step, all processes together.
    """

    link: float = 50.0
    tflops: float = 400.0
    optimizer_tflops: float | None = None
    tokens: int = 4 * 2**20

    def __post_init__(self) -> None:
        for name in ("link", "tflops", "optimizer_tflops", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e18:  # above, a model's step would take no time
                raise ValueError(f"{name}={value!r} is not allowed; give a number > 0, at most 1e18")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Parameters of one shape that are treated alike.

    Attributes:
        names: what they are.
        shape: of each.
        count: how many.
        work: "owned": whole, by one process, or a stack by several; "rows": some rows are, by one; "local": where it
            lies; "elements": its companion.
        flops: operations of a step of each.
        state_bytes: of each, all processes together; copies once.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    count: int
    work: str
    flops: float
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A step on a mesh. Bytes, state and operations are those of the process that has most.

    Attributes:
        optimizer: its name.
        model: its name.
        mesh: replicas of HSDP, shards of FSDP2, degree of tensor parallelism.
        expert_parallel: over how many processes the experts of a layer are spread; 1: they are cut like the others.
        dtype: of parameters and gradients.
        machine: the rates.
        parameters: elements of the model.
        rows: by shape.
        state_bytes: of optimizer state.
        flops: of the optimizer.
        mean_flops: the mean over the processes.
        balance: the most operations of an owner over the mean, or over the largest piece where that is more: what one
            owner has of a stack is a piece, and a matrix is one; 1 is the best.
        least_balance: no owners of whole matrices make it less.
        fetch_bytes: of gradients, or rows of momentum, sent or received, on the way to owners.
        delivery_bytes: of directions, or new weights, on the way back.
        exchange_seconds: of both.
        compute_seconds: of the operations.
        model_seconds: of the model's own step, 6 operations for each token and weight that it uses.
    """

    optimizer: str
    model: str
    mesh: Mesh
    expert_parallel: int
    dtype: str
    machine: Machine
    parameters: int
    rows: tuple[Row, ...]
    state_bytes: int
    flops: float
    mean_flops: float
    balance: float
    least_balance: float
    fetch_bytes: int
    delivery_bytes: int
    exchange_seconds: float
    compute_seconds: float
    model_seconds: float

    @property
    def share(self) -> float:
        """Of the model's own step: what the optimizer adds to it if nothing overlaps."""
        return (self.exchange_seconds + self.compute_seconds) / self.model_seconds

    @property
    def _fetched(self) -> str:
        kinds = {row.work: None for row in self.rows if row.work in ("rows", "owned")}
        words = {"rows": "the rows that are picked, in float32", "owned": f"{self.dtype} gradients"}
        return " and ".join(words[kind] for kind in kinds) or words["owned"]

    def __str__(self) -> str:
        header = ("parameters", "shape", "count", "worked on", "GFLOP each", "state MiB each")
        lines = in_columns([header, *map(_cells, self.rows)], right=(2, 4, 5))
        machine = self.machine
        return "\n".join(
            [
                *lines,
                "",
                f"{self.optimizer} on {self.model}, {self.parameters / 1e9:.4g} G parameters, "
                f"{prod(self.mesh)} ranks: {_replicas(self.mesh)}{self.mesh.shards} shards x {self.mesh.tensor} tensor "
                "parallel" + (f", experts over {self.expert_parallel}" if self.expert_parallel > 1 else ""),
                "Of the rank with the most, a step:",
                f"  state      {self.state_bytes / 2**30:10.4g} GiB",
                f"  operations {self.flops / 1e12:10.4g} TFLOP (mean {self.mean_flops / 1e12:.4g}; "
                f"balance of owners {self.balance:.2f}{_least(self)})",
                f"  fetch      {self.fetch_bytes / 2**20:10.4g} MiB of {self._fetched}",
                f"  delivery   {self.delivery_bytes / 2**20:10.4g} MiB of directions",
                f"Predicted: exchange {self.exchange_seconds * 1e3:.3g} ms at {machine.link:g} GB/s, operations "
                f"{self.compute_seconds * 1e3:.3g} ms at {machine.optimizer_tflops or machine.tflops:g} TFLOP/s; "
                f"{self.share:.1%} of the model's own {self.model_seconds * 1e3:.4g} ms "
                f"({machine.tokens:,} tokens at {machine.tflops:g} TFLOP/s)",
            ]
        )


def at_scale(
    model: str | Decoder,
    optimizer: str,
    mesh: str | tuple[int, ...],
    *,
    expert_parallel: int = 1,
    dtype: str = "float32",
    machine: Machine | None = None,
) -> Scale:
    """What a step of an optimizer costs a process of a mesh.

    Embeddings, heads, vectors and biases go to AdamW, where they lie. A matrix that is cut is owned by one process. Of
    a stack of experts that is cut between its matrices each process works on those that it has.

    Args:
        model: see `read_model`; or a model itself.
        optimizer: a registry name, upper or lower case, with its defaults.
        mesh: "SHARDSxTENSOR", such as "64x8": so many shards of FSDP2 times so many of tensor parallelism; "SHARDS"
            alone, without tensor parallelism; "REPLICASxSHARDSxTENSOR", such as "2x32x8": that so often (HSDP), and
            owners are chosen among all of them; or the numbers.
        expert_parallel: over how many processes the experts of a layer are spread, instead of tensor parallelism. FSDP2
            cuts the experts between matrices if that gives every process one, else their rows.
        dtype: of parameters and gradients, "float32" or "bfloat16".
        machine: rates; None: those of `Machine`.

    Raises:
        ValueError: an unknown name, a mesh or a degree that does not fit, or shards that do not divide
            (`Sharding.check`).

    Example:
        >>> tiny = Decoder(layers=2, width=64, heads=4, vocabulary=512)
        >>> found = at_scale(tiny, "muon", "4x2")
        >>> found.fetch_bytes, round(found.balance, 2)
        (71680, 1.23)
    """
    machine = machine or Machine()
    sizes, decoder, places = _placed(model, optimizer, mesh, expert_parallel, dtype)
    ledger = Ledger(prod(sizes), DTYPES[dtype])
    for place, owners in zip(places, owners_of(places), strict=True):
        ledger.add(place, owners)
    return _summary(
        ledger,
        optimizer=optimizer.lower(),
        model="own" if isinstance(model, Decoder) else model,
        mesh=sizes,
        expert_parallel=expert_parallel,
        dtype=dtype,
        machine=machine,
        parameters=sum(w.numel * w.number for w in decoder.weights()),
        rows=_grouped([_row(place) for place in places]),
        used=sum(w.numel * w.number * w.used for w in decoder.weights() if len(w.shape) > 1),
    )


def plan_at_scale(
    model: str | Decoder,
    optimizer: str,
    mesh: str | tuple[int, ...],
    *,
    expert_parallel: int = 1,
    dtype: str = "float32",
) -> WorkPlan:
    """Who works on each parameter of a model on a mesh, what travels for it, and why: as `optimizer.plan` says it.

    Arguments and errors are those of `at_scale`.

    Example:
        >>> tiny = Decoder(layers=2, width=64, heads=4, vocabulary=512)
        >>> plan_at_scale(tiny, "muon", "2x4x1")["0.q"].owners
        (6,)
    """
    places = _placed(model, optimizer, mesh, expert_parallel, dtype)[2]
    entries = [
        entry_of(f"{k}.{place.weight.name}", place.spread, place.update.needs, spans, DTYPES[dtype])
        for place, owners in zip(places, owners_of(places), strict=True)
        for k, spans in enumerate(owners or [[]] * place.weight.number)
    ]
    return WorkPlan(entries=tuple(entries))


def markdown(found: Iterable[Scale]) -> str:
    """A table of several, a line each."""
    header = (
        *("model", "optimizer", "ranks (shards x tensor)", "state", "operations", "balance", "fetch", "delivery"),
        *("exchange", "compute", "of the model's step"),
    )
    lines = [" | ".join(header), " | ".join(["---"] * 3 + ["---:"] * (len(header) - 3))]
    for s in found:
        experts = f", experts over {s.expert_parallel}" if s.expert_parallel > 1 else ""
        cells = (
            s.model,
            s.optimizer,
            f"{prod(s.mesh)} ({_replicas(s.mesh)}{s.mesh.shards} x {s.mesh.tensor}{experts})",
            f"{s.state_bytes / 2**30:.3g} GiB",
            f"{s.flops / 1e12:.3g} TFLOP",
            f"{s.balance:.2f}{_least(s)}",
            f"{s.fetch_bytes / 2**20:.0f} MiB",
            f"{s.delivery_bytes / 2**20:.0f} MiB",
            f"{s.exchange_seconds * 1e3:.1f} ms",
            f"{s.compute_seconds * 1e3:.1f} ms",
            f"{s.share:.1%}",
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


# --- how the parameters lie -------------------------------------------------------------------------------------------


def _placed(
    model: str | Decoder, optimizer: str, mesh: str | tuple[int, ...], expert_parallel: int, dtype: str
) -> tuple[Mesh, Decoder, list[Place]]:
    sizes = _mesh(mesh)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    decoder = model if isinstance(model, Decoder) else read_model(model)
    _check_experts(decoder, sizes.shards * sizes.tensor, expert_parallel)
    hidden, companion = Update(optimizer), Update(COMPANION)
    places = [
        Place.of(weight, hidden if weight.is_hidden else companion, sharding_of_weight(weight, sizes, expert_parallel))
        for weight in decoder.weights()
    ]
    return sizes, decoder, places


def _mesh(mesh: str | tuple[int, ...]) -> Mesh:
    sides = mesh.split("x") if isinstance(mesh, str) else [*map(str, mesh)]
    if not 1 <= len(sides) <= 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(
            f"mesh={mesh!r} is not SHARDSxTENSOR, as in 64x8, nor SHARDS alone, as in 64, nor "
            "REPLICASxSHARDSxTENSOR, as in 2x32x8"
        )
    numbers = [*map(int, sides)]
    if prod(numbers) > MOST_RANKS:
        raise ValueError(f"mesh={mesh!r} has {prod(numbers):,} ranks; at most {MOST_RANKS:,} are reckoned with")
    if len(numbers) == 3:
        return Mesh(*numbers)
    return Mesh(1, numbers[0], numbers[1] if len(numbers) == 2 else 1)


def _replicas(mesh: Mesh) -> str:
    return f"{mesh.replicas} replicas x " if mesh.replicas > 1 else ""


def _least(scale: Scale) -> str:
    """What whole matrices allow, where that is worth a word."""
    return f" (least {scale.least_balance:.2f})" if scale.least_balance > 1.05 else ""


def _check_experts(model: Decoder, ranks: int, degree: int) -> None:
    if degree == 1:
        return
    if degree < 1 or ranks % degree or not model.experts or model.experts % degree:
        raise ValueError(
            f"expert_parallel={degree} is not possible for {model.experts} experts on {ranks} ranks; it must divide "
            "both"
        )


def _row(place: Place) -> Row:
    weight, update = place.weight, place.update
    return Row(
        names=(weight.name,),
        shape=weight.shape,
        count=weight.number,
        work="local" if place.work in ("copies", "matrices") else place.work,
        flops=update.flops(weight.shape),
        state_bytes=update.state_bytes(weight.shape),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        ", ".join(row.names),
        "x".join(map(str, row.shape)),
        str(row.count),
        row.work,
        f"{row.flops / 1e9:.2f}",
        f"{row.state_bytes / 2**20:.2f}",
    )


def _grouped(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows that differ by their names alone are one."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.work), []).append(row)
    return tuple(
        Row(
            names=tuple(name for row in some for name in row.names),
            shape=some[0].shape,
            count=sum(row.count for row in some),
            work=some[0].work,
            flops=some[0].flops,
            state_bytes=some[0].state_bytes,
        )
        for some in found.values()
    )


def _summary(ledger: Ledger, *, used: float, **said: Any) -> Scale:
    machine: Machine = said["machine"]
    ranks = len(ledger.flops)
    flops, mean = float(ledger.flops.max()), float(ledger.flops.mean())
    fetch = round(float(torch.maximum(ledger.fetch_out, ledger.fetch_in).max()))
    delivery = round(float(torch.maximum(ledger.back_out, ledger.back_in).max()))
    least = max(float(ledger.owned.mean()), max(ledger.pieces, default=0))
    return Scale(
        **said,
        state_bytes=int(ledger.state.max()),
        flops=flops,
        mean_flops=mean,
        balance=float(ledger.owned.max()) / least if least else 1.0,
        least_balance=max(1.0, least_load(ledger.pieces, ranks) / least) if least else 1.0,
        fetch_bytes=fetch,
        delivery_bytes=delivery,
        exchange_seconds=(fetch + delivery) / (machine.link * 1e9),
        compute_seconds=flops / ((machine.optimizer_tflops or machine.tflops) * 1e12),
        model_seconds=6 * used * machine.tokens / (ranks * machine.tflops * 1e12),
    )
