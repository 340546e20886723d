"""Training goes on here with the moments that another library's optimizer wrote."""

import errno
import io
import os
import pickle
import zipfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from emerging_optimizers import SOAP, AdamW, Lion, Muon, convert_state_dict, create_optimizer
from emerging_optimizers.converting import recognised
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.routing.torch_arguments import from_torch

M, N = 6, 4


def grads(step: int, p: torch.Tensor) -> torch.Tensor:
    return torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step))


def steps(optimizer: Any, params: list[Any], first: int, count: int = 5) -> None:
    for step in range(first, first + count):
        for k, p in enumerate(params):
            p.grad = grads(100 * k + step, p)
        optimizer.step()


def twins(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Any], list[Any]]:
    make = [torch.randn(s, dtype=dtype, generator=torch.Generator().manual_seed(k)) for k, s in enumerate(shapes)]
    return [torch.nn.Parameter(x.clone()) for x in make], [torch.nn.Parameter(x.clone()) for x in make]


def go_on(old: Any, new: Any, theirs: list[Any], mine: list[Any]) -> None:
    """Five steps of the old one; the new one takes over; five steps of each."""
    steps(old, theirs, 0)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    new.load_state_dict(convert_state_dict(old.state_dict(), new, mine))
    steps(old, theirs, 5)
    steps(new, mine, 5)


def test_adamw_of_torch():
    theirs, mine = twins((M, N), (N,))
    options = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1}
    go_on(torch.optim.AdamW(theirs, **options), AdamW(mine, **options), theirs, mine)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_muon_of_torch():
    """The momenta are the same; torch rounds its products to bfloat16, so the weights agree as those do."""
    theirs, mine = twins((M, N))
    old = torch.optim.Muon(theirs, lr=0.03)
    new = Muon(mine, **from_torch("muon", lr=0.03))
    go_on(old, new, theirs, mine)
    buffers = new.state[mine[0]]["momentum_buffer"], old.state[theirs[0]]["momentum_buffer"]
    torch.testing.assert_close(*buffers, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*(x[0] for x in (mine, theirs)), rtol=0, atol=5 * 0.03 * 0.05)


class Soap(torch.optim.Optimizer):
    """SOAP as its paper says, in the layout of its authors' code: lists, moments in the eigenbasis, no first step."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self._one(p, self.state[p], group)

    @torch.no_grad()
    def _one(self, p: Any, s: Any, group: Any) -> None:
        share, (b1, b2) = 1 - group["shampoo_beta"], group["betas"]
        grams = [p.grad @ p.grad.mT, p.grad.mT @ p.grad]
        if not s:
            s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            s.update(GG=[share * g for g in grams], precondition_frequency=1, shampoo_beta=0.9)
            s["Q"] = [torch.linalg.eigh(g).eigenvectors.flip(-1) for g in s["GG"]]
            return
        s["step"] += 1
        turned = s["Q"][0].mT @ p.grad @ s["Q"][1]
        s["exp_avg"].lerp_(turned, 1 - b1)
        s["exp_avg_sq"].lerp_(turned.square(), 1 - b2)
        m, v = s["exp_avg"] / (1 - b1 ** s["step"]), s["exp_avg_sq"] / (1 - b2 ** s["step"])
        p.sub_(group["lr"] * s["Q"][0] @ (m / (v.sqrt() + group["eps"])) @ s["Q"][1].mT)
        s["GG"] = [g.lerp(new, share) for g, new in zip(s["GG"], grams, strict=True)]


def soap_of_others() -> tuple[Any, list[Any], list[Any]]:
    theirs, mine = twins((M, N))
    old = Soap(theirs, {"lr": 0.01, "betas": (0.8, 0.9), "shampoo_beta": 0.9, "eps": 1e-8, "weight_decay": 0.0})
    return old, theirs, mine


def test_soap_of_its_authors():
    old, theirs, mine = soap_of_others()
    steps(old, theirs, 0)
    new = SOAP(mine, lr=0.01)
    assert recognised(old.state_dict()) == "nikhilvyas-soap"
    new.load_state_dict(convert_state_dict(old.state_dict(), new))
    state, saved = new.state[mine[0]], old.state[theirs[0]]
    for key, value in (("L", saved["GG"][0]), ("Q_R", saved["Q"][1]), ("exp_avg", saved["exp_avg"])):
        assert torch.equal(state[key], value)
    assert int(state["step"]) == 4
    steps(new, mine, 5)
    assert mine[0].isfinite().all()


def test_soap_with_the_moment_in_the_parameters_own_space():
    old, theirs, mine = soap_of_others()
    steps(old, theirs, 0)
    s = old.state[theirs[0]]
    wanted = s["exp_avg"].clone()
    s["exp_avg"] = s["Q"][0] @ wanted @ s["Q"][1].mT
    old.param_groups[0]["warmup_steps"] = 1
    new = SOAP(mine, lr=0.01)
    made = convert_state_dict(old.state_dict(), new)
    torch.testing.assert_close(made["state"][0]["exp_avg"], wanted, rtol=1e-12, atol=1e-12)


def muon_and_adam(theirs: list[Any]) -> dict[str, Any]:
    """As MuonWithAuxAdam writes it."""
    muon = {"momentum_buffer": torch.randn(M, N)}
    adam = {"exp_avg": torch.randn(N), "exp_avg_sq": torch.rand(N), "step": 7}
    groups = [
        {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False, "params": [0]},
        {"lr": 0.02, "momentum": 0.95, "weight_decay": 0, "use_muon": True, "params": [1]},
    ]
    return {"state": {0: adam, 1: muon}, "param_groups": groups}


def test_both_of_keller_jordans_into_one_optimizer_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(N, M), torch.nn.Linear(M, 3))
    optimizer = create_optimizer("muon", model)
    hidden = model[0].weight
    bias = torch.nn.Parameter(torch.zeros(N))
    saved = muon_and_adam([])
    with pytest.warns(UserWarning, match="parameter 0, which the new optimizer does not have"):
        made = convert_state_dict(saved, optimizer, [{"params": [bias]}, {"params": hidden}])
    optimizer.load_state_dict(made)
    assert torch.equal(optimizer.state[hidden]["momentum_buffer"], saved["state"][1]["momentum_buffer"])


def test_the_first_moment_becomes_a_momentum_and_what_is_dropped_is_told():
    model = torch.nn.Sequential(torch.nn.Linear(N, M), torch.nn.Linear(M, 3))
    old = torch.optim.AdamW(model.parameters())
    steps(old, [*model.parameters()], 0)
    new = create_optimizer("muon", model)
    with pytest.warns(UserWarning, match=r"exp_avg_sq of parameter '0.weight'"):
        new.load_state_dict(convert_state_dict(old.state_dict(), new, model.named_parameters()))
    for p in model.parameters():
        key = "momentum_buffer" if "momentum_buffer" in new.state[p] else "exp_avg"
        assert torch.equal(new.state[p][key], old.state[p]["exp_avg"])
    steps(new, [*model.parameters()], 5, 1)


@pytest.mark.parametrize(
    ("change", "to", "said"),
    [
        (lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(M, N)), AdamW, "max_exp_avg_sq of parameter 0"),
        (lambda s: s["state"][0].pop("exp_avg_sq"), AdamW, "exp_avg_sq of parameter 0"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(N, M)), Lion, "has shape"),
        (lambda s: None, SOAP, "L, Q_L, Q_R, R of parameter 0"),
        (lambda s: s["param_groups"][0]["params"].append(1), AdamW, "1 parameters are given, and the checkpoint has 2"),
        (lambda s: s.pop("state"), AdamW, "this is no state_dict"),
        (lambda s: s["state"].clear() or s["param_groups"][0].pop("amsgrad"), AdamW, "no state"),
    ],
)
def test_what_cannot_be_converted_is_named(change, to, said):
    theirs, mine = twins((M, N))
    old = torch.optim.AdamW(theirs)
    steps(old, theirs, 0, 1)
    saved = old.state_dict()
    change(saved)
    with pytest.raises(ValueError, match=said):
        convert_state_dict(saved, to(mine, lr=0.1))


def test_sources_and_optimizers_that_are_none():
    theirs, mine = twins((M, N))
    old = torch.optim.SGD(theirs, momentum=0.9)
    steps(old, theirs, 0, 1)
    with pytest.raises(ValueError, match="a sum and no average"):
        convert_state_dict(old.state_dict(), Muon(mine, lr=0.1))
    with pytest.raises(ValueError, match=r"source='torch\.adam' is not one of"):
        convert_state_dict(old.state_dict(), Muon(mine, lr=0.1), source="torch.adam")
    with pytest.raises(TypeError, match="SGD is not an optimizer of emerging_optimizers"):
        convert_state_dict(old.state_dict(), old)


def test_a_file(tmp_path, capsys):
    theirs, mine = twins((M, N))
    old = torch.optim.Muon(theirs, lr=0.03)
    steps(old, theirs, 0)
    torch.save({"optimizer": old.state_dict()}, tmp_path / "old.pt")
    main(
        ["convert", str(tmp_path / "old.pt"), "--entry", "optimizer", "--to", "muon", "--out", str(tmp_path / "new.pt")]
    )
    assert "the state of 1 parameters, for muon" in capsys.readouterr().out
    new = Muon(mine, lr=1.0)
    new.load_state_dict(torch.load(tmp_path / "new.pt", weights_only=True))
    assert torch.equal(new.state[mine[0]]["momentum_buffer"], old.state[theirs[0]]["momentum_buffer"])
    assert new.param_groups[0].items() >= {"lr": 0.03, "scale_mode": "shape_scaling", "nesterov": True}.items()


def heavyball(function: str, count: int, **entries: Any) -> dict[str, Any]:
    """The layout of heavyball 3.2.1: entries of a piece of the parameter, under the name of the function."""
    named = {f"{function}_{key}_{2 + (key in 'GGQ')}": value for key, value in entries.items()}
    group = {"lr": 0.03, "betas": [0.8, 0.9], "shampoo_beta": 0.7, "weight_decay": 0.1, "warmup_steps": 0}
    group |= {"is_preconditioning": False, "step_count": torch.tensor(count), "mars": False, "ecc": None}
    state = {0: {0: {"step": torch.tensor(count), "is_initialized": {0}, **named}}}
    return {"state": state, "param_groups": [group | {"params": [0]}], "heavyball": {"inner_group": {}}}


def test_heavyballs_adamw():
    """Its averages are debiased: they are those of Adam, divided by 1 - beta**t."""
    theirs, mine = twins((M, N))
    old = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.9), weight_decay=0.1)
    steps(old, theirs, 0)
    state = old.state[theirs[0]]
    debiased = {"exp_avg": state["exp_avg"] / (1 - 0.8**5), "exp_avg_sq": state["exp_avg_sq"] / (1 - 0.9**5)}
    saved = heavyball("update_by_adam", 5, **debiased)
    new = AdamW(mine, lr=0.03, betas=(0.8, 0.9), weight_decay=0.1)
    assert recognised(saved) == "heavyball"
    new.load_state_dict(convert_state_dict(saved, new))
    with torch.no_grad():
        mine[0].copy_(theirs[0])
    steps(old, theirs, 5)
    steps(new, mine, 5)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-12, atol=1e-13)


def soap_of_heavyball() -> tuple[dict[str, Any], dict[str, Any]]:
    """SOAP's entries after six gradients, the first of which is for the factors alone; and those of its authors."""
    old, theirs, _ = soap_of_others()
    steps(old, theirs, 0, 6)
    s = old.state[theirs[0]]
    whole = [x[None] / (1 - 0.7**6) for x in s["GG"]]
    moments = {"exp_avg": s["exp_avg"][None] / (1 - 0.8**5), "exp_avg_sq": s["exp_avg_sq"][None] / (1 - 0.9**5)}
    return heavyball("scale_by_soap", 6, **moments, GG=whole, Q=[q[None] for q in s["Q"]]), s


def test_heavyballs_soap():
    saved, wanted = soap_of_heavyball()
    new = SOAP(twins((M, N))[1], lr=0.01)
    state = convert_state_dict(saved, new)["state"][0]
    pairs = {"L": wanted["GG"][0], "R": wanted["GG"][1], "Q_L": wanted["Q"][0], "Q_R": wanted["Q"][1]}
    for key, value in {**pairs, "exp_avg": wanted["exp_avg"], "exp_avg_sq": wanted["exp_avg_sq"]}.items():
        torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-13)
    assert state["step"] == wanted["step"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["param_groups"][0].pop("step_count"), "is of heavyball 2, which is not converted"),
        (lambda s: s["param_groups"][0].update(mars=True), "mars=True of heavyball"),
        (lambda s: s["state"][0].update({1: {}}), "keeps parameter 0 of shape .* in 2 pieces"),
        (lambda s: s["state"][0][0].update(scale_by_laprop_exp_avg_0=1), "only that of its AdamW .update_by_adam"),
        (lambda s: s["state"][0][0].update(unknown=1), "only that of its AdamW .update_by_adam"),
        (lambda s: s["state"][0][0].pop("update_by_adam_exp_avg_sq_2"), "exp_avg_sq of parameter 0"),
        (lambda s: s["state"].update({0: 5}), "the state of parameter 0 of shape .* is int in the checkpoint"),
        (lambda s: s.pop("heavyball"), "of heavyball before 2"),
    ],
)
def test_what_is_not_converted_of_heavyball_is_named(change, said):
    saved = heavyball("update_by_adam", 3, exp_avg=torch.ones(M, N), exp_avg_sq=torch.ones(M, N))
    change(saved)
    with pytest.raises(ValueError, match=said):
        convert_state_dict(saved, AdamW(twins((M, N))[0], lr=0.1))


@pytest.mark.parametrize("key", ["caution", "cautious_weight_decay"])
def test_options_of_heavyball_that_change_the_law_are_refused(key, tmp_path, capsys):
    saved, _ = soap_of_heavyball()
    saved["param_groups"][0][key] = True
    torch.save(saved, tmp_path / "old.pt")
    assert f"{key}=True of the checkpoint's groups is not possible here" in refused(tmp_path / "old.pt", "soap", capsys)


def test_a_file_of_heavyballs_soap(tmp_path, capsys):
    saved, wanted = soap_of_heavyball()
    torch.save(saved, tmp_path / "old.pt")
    main(["convert", str(tmp_path / "old.pt"), "--to", "soap", "--out", str(tmp_path / "new.pt")])
    new = SOAP(twins((M, N))[0], lr=1.0)
    new.load_state_dict(torch.load(tmp_path / "new.pt", weights_only=True))
    assert new.param_groups[0].items() >= {"lr": 0.03, "betas": (0.8, 0.9), "shampoo_beta": 0.7}.items()
    (state,) = new.state.values()
    assert torch.equal(state["Q_L"], wanted["Q"][0])


def refused(path: Any, to: str, capsys: Any, *more: str) -> str:
    """What `eopt convert` says of a file that it does not convert: a sentence or two, exit status 2, no file."""
    out = path.parent / "refused.pt"
    with pytest.raises(SystemExit) as end:
        main(["convert", str(path), "--to", to, "--out", str(out), *more])
    assert end.value.code == 2
    assert not out.exists()
    said = capsys.readouterr().err
    assert said.startswith("eopt: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert len(said) < 400
    return said


def a_file(kind: str, path: Any) -> None:
    """Files that are no checkpoint of torch.save, or not of an optimizer."""
    model = torch.nn.Linear(N, M)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(optimizer, [*model.parameters()], 0, 1)
    whole = io.BytesIO()
    torch.save(optimizer.state_dict(), whole)
    old = io.BytesIO()
    torch.save(optimizer.state_dict(), old, _use_new_zipfile_serialization=False)
    flipped = bytearray(whole.getvalue())
    exp_avg = optimizer.state[model.weight]["exp_avg"]
    flipped[whole.getvalue().index(exp_avg.numpy().tobytes())] ^= 1
    raw = {
        "empty": b"",
        "short": whole.getvalue()[: len(flipped) // 2],
        "nearly whole": whole.getvalue()[:-3],
        "flipped": bytes(flipped),
        "old and short": old.getvalue()[: len(old.getvalue()) // 2],
        "text": b"hello\nworld",
        "pickle": pickle.dumps(model.weight.detach().numpy()),
    }
    saved = {
        "model": model.state_dict(),
        "whole model": model,
        "list": [1, 2],
        "nothing": {},
        "flattened": {"state.weight.step": 1, "param_groups.weight.lr": 0.1},
        "damaged state": {"state": {0: 5}, "param_groups": [{"params": [0], "betas": (0.9, 0.9), "amsgrad": False}]},
        "no shape": {"state": {0: {"exp_avg": 1}}, "param_groups": [{"params": [0], "ns_coefficients": 3}]},
    }
    if kind in raw:
        path.write_bytes(raw[kind])
    elif kind == "folder":
        path.mkdir()
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=path, no_dist=True)
    elif kind == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "absent":
        pass
    else:
        torch.save(saved[kind], path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty"),
        ("short", "is damaged: it is cut short"),
        ("nearly whole", "is damaged: it is cut short"),
        ("flipped", "is damaged: the checksum of"),
        ("old and short", "is damaged, or no file of torch.save"),
        ("text", "is damaged, or no file of torch.save"),
        ("pickle", "it is no file of torch.save, or has more than tensors"),
        ("model", "is no state_dict of an optimizer, its keys are weight, bias; give --entry"),
        ("whole model", "which is not unpickled"),
        ("list", "has a list, and no state_dict of an optimizer"),
        ("nothing", "its keys are none"),
        ("flattened", "is flattened (flatten_optimizer_state_dict=True)"),
        ("damaged state", "the state of parameter 0 is int in the checkpoint, no dict; it is damaged"),
        ("no shape", "has neither exp_avg nor momentum_buffer"),
        ("folder", "is a folder, as torch.distributed.checkpoint writes"),
        ("archive", "is an archive with other files"),
        ("absent", "No such file"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_file_that_is_no_checkpoint_is_named(kind, words, tmp_path, capsys):
    a_file(kind, tmp_path / "other.pt")
    assert words in refused(tmp_path / "other.pt", "adamw", capsys)


def test_what_is_asked_for_beside_the_file(tmp_path, capsys):
    a_file("model", tmp_path / "model.pt")
    assert "has no such entry" in refused(tmp_path / "model.pt", "adamw", capsys, "--entry", "optimizer")
    both = tmp_path / "both.pt"
    torch.save(muon_and_adam([]), both)
    assert "make both with create_optimizer" in refused(both, "muon", capsys)
    (tmp_path / "there.pt").touch()
    with pytest.raises(SystemExit) as end:
        main(["convert", str(both), "--to", "muon", "--out", str(tmp_path / "there.pt")])
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, capsys, monkeypatch):
    theirs, _ = twins((M, N))
    old = torch.optim.Muon(theirs, lr=0.03)
    steps(old, theirs, 0)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    (tmp_path / "new.pt").write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "old.pt"), "--to", "muon", "--out", str(tmp_path / "new.pt"), "--overwrite"])
    assert end.value.code == 1
    assert "new.pt cannot be written (No space left on device); free some space there" in capsys.readouterr().err
    assert (tmp_path / "new.pt").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt", "old.pt"]


class Anything:
    """What weights_only does not unpickle."""


def test_a_file_with_code_in_it(tmp_path, capsys):
    torch.save({"state": Anything()}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "bad.pt"), "--to", "muon", "--out", str(tmp_path / "new.pt")])
    assert end.value.code == 2
    assert "is not unpickled" in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()
