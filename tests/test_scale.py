"""What is said of thousands of ranks: the shards are torch's, bytes and state are those of a count by hand."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import scale as benchmark
from emerging_optimizers import estimate
from emerging_optimizers.cost.ledger import Ledger, Mesh, Place, Update, owners_of, sharding_of_weight
from emerging_optimizers.cost.models import MODELS, Decoder, Weight, read_model
from emerging_optimizers.cost.scale import Machine, at_scale, markdown, plan_at_scale
from emerging_optimizers.distributed.dtensor import sharding_of
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.record import read_json

TINY = Decoder(layers=2, width=64, heads=4, vocabulary=512, hidden=160)
MIXTURE = Decoder(layers=3, width=32, heads=2, vocabulary=256, hidden=64, experts=8, experts_shared=1, dense_layers=1)


# --- models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2-small", 124_439_808),
        ("llama-7b", 6_738_415_616),
        ("llama-70b", 68_976_648_192),
        ("moe-256", 671_026_404_352),
    ],
)
def test_models_have_the_parameters_that_they_are_known_for(name: str, count: int) -> None:
    assert sum(w.numel * w.number for w in MODELS[name].weights()) == count


def test_a_model_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("layers = 2\nwidth = 64\nheads = 4\nvocabulary = 512\nhidden = 160\n")
    (tmp_path / "mine.json").write_text(json.dumps({"layers": 2, "width": 64, "heads": 4, "vocabulary": 512}))
    assert read_model(str(tmp_path / "mine.toml")) == TINY
    assert read_model(str(tmp_path / "mine.json")).hidden is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("layers = 2", "lacks width, heads, vocabulary"),
        ("layer = 2", "says 'layer'.* did you mean 'layers'"),
        ("layers = 2.5", "layers = 2.5; it must be a whole number"),
        ("gated = 1", "gated = 1; it must be true or false"),
        ("layers = ", "cannot be read"),
        ("layers=1\nwidth=10\nheads=3\nvocabulary=5", "width 10 cannot be split into 3"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=wrong):
        read_model(str(tmp_path / "mine.toml"))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'llama' is not one of gpt2-small, .* nor a \.json or \.toml file"):
        read_model("llama")


# --- shards -------------------------------------------------------------------------------------------


class Pile(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def test_the_shards_are_those_of_torch() -> None:
    """FSDP2 over tensor parallelism, and over expert parallelism, of modules on the meta device."""
    weights = MIXTURE.weights()
    dist.init_process_group("fake", rank=5, world_size=16, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (8, 2), mesh_dim_names=("dp", "tp"))
        ranks = {degree: (16 // degree, degree) for degree in (2, 8)}
        spread = {d: init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep")) for d, shape in ranks.items()}
        for weight in weights:
            p = nn.Parameter(torch.empty(weight.shape, device="meta"))
            if len(weight.shape) == 3:
                for degree, experts in spread.items():
                    module = Pile(
                        nn.Parameter(distribute_tensor(p, experts["ep"], [TorchShard(0)], src_data_rank=None))
                    )
                    axis = TorchShard(0 if len(p) >= 16 else 1)
                    fully_shard(module, mesh=experts["dp"], shard_placement_fn=lambda p, axis=axis: axis)
                    assert sharding_of("w", module.weight) == sharding_of_weight(weight, Mesh(1, 8, 2), degree)
            elif len(weight.shape) == 2 and weight.cut is not None:
                linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                style = RowwiseParallel() if weight.cut else ColwiseParallel()
                model = parallelize_module(nn.Sequential(linear), mesh["tp"], {"0": style}, src_data_rank=None)
                fully_shard(model, mesh=mesh["dp"])
                assert sharding_of("w", linear.weight) == sharding_of_weight(weight, Mesh(1, 8, 2), 1)
            else:
                module = Pile(nn.Parameter(distribute_tensor(p, mesh["tp"], [Replicate()], src_data_rank=None)))
                fully_shard(module, mesh=mesh["dp"])
                assert sharding_of("w", module.weight) == sharding_of_weight(weight, Mesh(1, 8, 2), 1)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


# --- bytes, state, operations -------------------------------------------------------------------------


def test_a_matrix_alone_is_fetched_and_delivered_once() -> None:
    size, ranks = 64 * 160, 32  # more ranks than matrices: each has one
    found = at_scale(TINY, "muon", (ranks,))
    assert found.fetch_bytes == found.delivery_bytes == 4 * size * (ranks - 1) // ranks
    assert at_scale(TINY, "muon", (ranks,), dtype="bfloat16").fetch_bytes == found.fetch_bytes // 2
    assert at_scale(TINY, "muon", (ranks // 4, 4)).fetch_bytes == found.fetch_bytes
    assert found.balance == 1.0
    one = at_scale(TINY, "muon", "1")
    assert (one.fetch_bytes, one.delivery_bytes, one.exchange_seconds) == (0, 0, 0.0)
    assert one.flops == pytest.approx(found.mean_flops * ranks)


def test_a_box_is_fetched_from_one_copy_and_delivered_to_all() -> None:
    weight = Weight("kv down", (8, 6), 1)  # rows over two shards, copies on two ranks of tensor parallelism
    ledger, place = (
        Ledger(4, torch.float32),
        Place.of(weight, Update("muon"), sharding_of_weight(weight, Mesh(1, 2, 2), 1)),
    )
    ledger.add(place, *owners_of([place]))
    assert ledger.fetch_out.tolist() == [0, 0, 96, 0]  # 24 numbers: rank 2 has the other half of the copy of rank 0
    assert ledger.fetch_in.tolist() == [96, 0, 0, 0]
    assert ledger.back_out.tolist() == [288, 0, 0, 0]
    assert ledger.back_in.tolist() == [0, 96, 96, 96]


@pytest.mark.parametrize(("mesh", "degree"), [("4x2", 1), ("4x2", 4), ("16x1", 4), ("8x2", 8)])
def test_what_is_sent_is_what_the_owners_lack(mesh: str, degree: int) -> None:
    """Against tensors of who has an element, for each matrix and each owner."""
    shards, tensor = map(int, mesh.split("x"))
    ranks = shards * tensor
    update = Update("soap")
    for weight in MIXTURE.weights():
        if not weight.is_hidden:
            continue
        sharding = sharding_of_weight(weight, Mesh(1, shards, tensor), degree)
        place = Place.of(weight, update, sharding)
        has = torch.zeros(ranks, *weight.shape, dtype=torch.bool)
        for rank in range(ranks):
            for box in sharding.boxes(divmod(rank, sharding.mesh[1])):
                has[(rank, *box.slices)] = True
        if place.work != "owned":
            assert (has.flatten(-2).sum(-1) % prod(weight.shape[-2:]) == 0).all()  # whole matrices
            continue
        ledger = Ledger(ranks, torch.float32)
        place = place._replace(weight=weight._replace(number=1))
        ledger.add(place, *owners_of([place]))
        owners = (ledger.flops > 0).nonzero().flatten().tolist()
        each = -(-(weight.shape[0] if len(weight.shape) == 3 else 1) // ranks)
        for k, owner in enumerate(owners):
            mine = has[:, k * each : (k + 1) * each] if len(weight.shape) == 3 else has
            others = [rank for rank in range(ranks) if rank != owner]
            lacks = mine[0].numel() - int(mine[owner].sum())
            assert ledger.fetch_in[owner] == 4 * lacks
            assert ledger.back_out[owner] == 4 * mine[others].sum()
        assert ledger.fetch_in.sum() == ledger.fetch_out.sum()
        assert ledger.back_in.sum() == ledger.back_out.sum()


def test_replicas_share_the_owners_and_each_gets_what_becomes_of_a_matrix() -> None:
    one, two = (at_scale(TINY, "muon", mesh) for mesh in ("4x1", "2x4x1"))
    assert two.flops == pytest.approx(0.6 * one.flops)  # 14 matrices: what is largest leaves it no half
    plan = plan_at_scale(TINY, "muon", "2x4x1")
    assert {rank for entry in plan for rank in entry.owners} == set(range(8))
    assert plan.balance(tuple(range(8))) == pytest.approx(two.balance)
    q = plan["0.q"]
    assert (q.fetched, q.delivered) == (4 * 64 * 64 * 3 // 4, 4 * 64 * 64 * 7 // 4)
    assert str(two).splitlines()[-7].endswith("8 ranks: 2 replicas x 4 shards x 1 tensor parallel")


def test_experts_that_lie_whole_move_nothing() -> None:
    found = at_scale(MIXTURE, "muon", "8", expert_parallel=4)
    assert {row.work for row in found.rows if len(row.shape) == 3} == {"local"}
    assert found.fetch_bytes < at_scale(MIXTURE, "muon", "4x2").fetch_bytes
    cut = at_scale(MIXTURE, "muon", "16", expert_parallel=4)  # two ranks for each expert
    assert {row.work for row in cut.rows if len(row.shape) == 3} == {"owned"}


def test_large_matrices_do_not_come_on_top_of_many_experts() -> None:
    """1,024 experts' matrices, and ten of 21 times their work."""
    model = Decoder(layers=2, width=256, heads=1, vocabulary=8, hidden=64, experts=256, gated=False)
    found = at_scale(model, "muon", "128x4")
    assert found.balance < 1.05


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo", "psgd_pro", "rekls", "adamw", "spel"])
def test_the_state_is_that_of_an_estimate(name: str) -> None:
    shapes = [(48, 80), (32, 32)]
    said = estimate([nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes], name, seconds=False)
    assert sum(Update(name).state_bytes(shape) for shape in shapes) == said.state_bytes


def test_laws_that_read_the_weight_fetch_it_too() -> None:
    plain, whole = (at_scale(TINY, name, "32") for name in ("muon", "spel"))
    assert whole.fetch_bytes == 2 * plain.fetch_bytes
    assert whole.delivery_bytes == plain.delivery_bytes


def test_times_follow_from_the_rates() -> None:
    machine = Machine(link=10.0, tflops=100.0, optimizer_tflops=20.0, tokens=1000)
    found = at_scale(TINY, "muon", "4", machine=machine)
    used = sum(w.numel * w.number for w in TINY.weights() if len(w.shape) == 2 and w.name != "embedding")
    assert found.model_seconds == pytest.approx(6 * used * 1000 / (4 * 100e12))
    assert found.exchange_seconds == pytest.approx((found.fetch_bytes + found.delivery_bytes) / 10e9)
    assert found.compute_seconds == pytest.approx(found.flops / 20e12)
    assert found.share == pytest.approx((found.exchange_seconds + found.compute_seconds) / found.model_seconds)


# --- requests and answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"mesh": "8y8"}, "mesh='8y8' is not SHARDSxTENSOR"),
        ({"mesh": "2x2x2x2"}, "is not SHARDSxTENSOR.*nor REPLICASxSHARDSxTENSOR"),
        ({"mesh": "0"}, "is not SHARDSxTENSOR"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"expert_parallel": 3}, "expert_parallel=3 is not possible for 8 experts on 8 ranks"),
        ({"optimizer": "muno"}, "muno"),
        ({"model": "gpt2-small", "mesh": "3x2"}, "embedding: FSDP2 over 3 .* make its size 50257 divisible by 2"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(changes: dict[str, object], wrong: str) -> None:
    asked: dict[str, object] = {"model": MIXTURE, "optimizer": "muon", "mesh": "8", **changes}
    with pytest.raises(ValueError, match=wrong):
        at_scale(**asked)


def test_a_rate_is_positive() -> None:
    with pytest.raises(ValueError, match=r"link=0 is not allowed"):
        Machine(link=0)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers": 2, "width": 64, "heads": 4, "vocabulary": 512}))
    main(["estimate", "soap", "--model", str(path), "--mesh", "4x2", "--link", "25"])
    shown = capsys.readouterr().out
    assert "q, o, k, v" in shown
    assert "8 ranks: 4 shards x 2 tensor parallel" in shown
    assert "at 25 GB/s" in shown
    with pytest.raises(SystemExit, match="--model and --mesh belong together"):
        main(["estimate", "--mesh", "8x8"])
    with pytest.raises(SystemExit, match="mesh='8:8' is not"):
        main(["estimate", "--model", "llama-7b", "--mesh", "8:8"])


def test_the_command_that_shows_owners(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "soap", "--model", "llama-7b", "--mesh", "8x8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("*.q  32 x")
    assert "balance 1.14. Whole matrices cannot be shared out below 1.14." in lines[-2]
    with pytest.raises(SystemExit, match="mesh='8:8' is not"):
        main(["plan", "--mesh", "8:8"])


def test_the_saved_table_is_what_is_counted_now() -> None:
    saved = [benchmark.restored(row) for row in read_json(benchmark.OUT)]
    (known,) = (s for s in saved if (s.model, s.optimizer, s.mesh) == ("llama-7b", "soap", (1, 8, 8)))
    assert known == at_scale("llama-7b", "soap", "8x8", machine=known.machine)
    assert len(markdown(saved).splitlines()) == 2 + 2 * len(benchmark.CASES)


def test_4096_ranks_take_seconds() -> None:
    found = at_scale("llama-70b", "muon", "512x8")
    assert found.balance == 1.0  # more ranks than matrices
    assert found.fetch_bytes == 4 * 28672 * 8192 * 4095 // 4096
