"""QK-Clip: clipped heads reach the threshold, the others keep their weights; what is refused, and what is said."""

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from emerging_optimizers import Muon, QKClip, ScheduleFree, WeightAverage, create_optimizer, list_optimizers
from emerging_optimizers.linalg.rounding import join_bfloat16_
from emerging_optimizers.qk_clip import Heads
from emerging_optimizers.qk_clip.clip import UNDOES
from emerging_optimizers.qk_clip.logits import largest_logits
from emerging_optimizers.registry import entry
from tests.qk_clip.models import Fused, Grouped, batch, net

# A product of two factors that were rounded to float32 once each, and sums of a few terms: 1e-6.
RTOL = 1e-5
EXAMPLE = Path(__file__).parents[2] / "examples" / "qk_clip.py"


def seen(clip, model, *inputs):
    """The largest logits of a forward pass, which are not clipped."""
    threshold, clip.threshold = clip.threshold, 1e30
    model(*inputs)
    clip.step()
    clip.threshold = threshold
    return next(iter(clip.maxima().values()))


def between(values):
    """A threshold that some heads exceed and some do not."""
    low, high = sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]
    return (low + high) / 2


def self_attention(model):
    return lambda x: model(x, x, x)


MULTI_HEAD = {
    "packed": {},
    "without biases": {"bias": False},
    "a bias and a zero of keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("layer", [Grouped, Fused, *MULTI_HEAD], ids=str)
def test_clipped_heads_reach_the_threshold_and_the_others_stay(layer):
    if isinstance(layer, str):
        model = nn.MultiheadAttention(16, 4, batch_first=True, **MULTI_HEAD[layer])
        model, call = net(model)[0], self_attention
    else:
        model, call = net(layer())[0], lambda m: m
    run, x = call(model), batch()
    clip = QKClip(model)
    before = seen(clip, run, x)
    clip.threshold = between(before)
    weights = copy.deepcopy(model.state_dict())
    run(x)
    clip.step()
    after = seen(clip, run, x)
    assert after == pytest.approx([min(s, clip.threshold) for s in before], rel=RTOL)
    assert clip.events() == {"": [int(s > clip.threshold) for s in before]}
    size = 4
    for name, old in weights.items():  # queries come first where they are not alone
        if name in ("q_proj.weight", "q_proj.bias", "c_attn.weight", "c_attn.bias", "in_proj_weight", "in_proj_bias"):
            new = model.state_dict()[name]
            for head, s in enumerate(before):
                rows = slice(head * size, (head + 1) * size)
                assert torch.equal(new[rows], old[rows]) == (s <= clip.threshold), name
                if old.shape[0] == 48:
                    assert torch.equal(new[32:], old[32:])  # values
        elif name.startswith(("o_proj", "v_proj", "c_proj", "out_proj", "v_proj_weight", "bias_v")):
            assert torch.equal(model.state_dict()[name], old)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_shared_key_takes_what_all_its_heads_can_bear(alpha):
    model = net(Grouped())[0]
    clip = QKClip(model, threshold=10.0, alpha=alpha, measure=False)
    q, k = (p.detach().clone().view(-1, 4, 16) for p in (model.q_proj.weight, model.k_proj.weight))
    clip.observe(model, [40.0, 5.0, 20.0, 40.0])  # heads 0 and 1 share a key, 2 and 3 the other
    clip.step()
    factors_q = (model.q_proj.weight.view(-1, 4, 16) / q).mean((1, 2)).tolist()
    factors_k = (model.k_proj.weight.view(-1, 4, 16) / k).mean((1, 2)).tolist()
    shared = 0.5 ** (1 - alpha)
    assert factors_k == pytest.approx([1.0, shared], rel=RTOL)
    assert factors_q == pytest.approx([0.25, 1.0, 0.5 / shared, 0.25 / shared], rel=RTOL)
    assert max(factors_q + factors_k) <= 1 + RTOL
    assert clip.events() == {"": [1, 0, 1, 1]}


def test_masked_logits_do_not_count():
    q, k = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 5, 3)
    logits = 0.7 * q @ k.repeat_interleave(2, 1).mT
    mask = torch.rand(2, 1, 6, 5) < 0.5
    expected = logits.masked_fill(~mask, -math.inf).amax((0, 2, 3))
    assert torch.allclose(largest_logits(q, k, 0.7, mask), expected)
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.allclose(largest_logits(q, k, 0.7, numbers), expected)
    causal = logits.masked_fill(torch.ones(6, 5, dtype=torch.bool).triu(1), -math.inf).amax((0, 2, 3))
    assert torch.allclose(largest_logits(q, k, 0.7, is_causal=True), causal)


def test_pieces_are_as_the_whole(monkeypatch):
    q, k = torch.randn(2, 4, 7, 3), torch.randn(2, 4, 7, 3)
    whole = [largest_logits(q, k, 1.0, is_causal=causal) for causal in (False, True)]
    monkeypatch.setattr("emerging_optimizers.qk_clip.logits.CHUNK_CPU", 2 * 4 * 7 * 2)
    monkeypatch.setattr("emerging_optimizers.qk_clip.logits.LEAST", 1)
    pieces = [largest_logits(q, k, 1.0, is_causal=causal) for causal in (False, True)]
    assert all(torch.allclose(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("masks", ["causal", "padding", "both", "float"])
def test_the_masks_of_multihead_attention(masks):
    model = net(nn.MultiheadAttention(16, 4, batch_first=True))[0]
    x, hidden = batch(2), torch.ones(8, 8, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 5:] = True
    given = {"attn_mask": hidden} if masks in ("causal", "both") else {}
    given |= {"key_padding_mask": padding} if masks in ("padding", "both") else {}
    if masks == "float":
        given = {"attn_mask": torch.zeros(8, 8).masked_fill(hidden, -torch.inf)}
    clip = QKClip(model)
    found = seen(clip, lambda x: model(x, x, x, **given), x)
    q, k, _ = (x @ model.in_proj_weight.T + model.in_proj_bias).view(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / 2
    if "attn_mask" in given:
        logits = logits.masked_fill(hidden, -torch.inf)
    if "key_padding_mask" in given:
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    assert found == pytest.approx(logits.amax((0, 2, 3)).tolist(), rel=RTOL)


def test_forward_passes_before_a_step_count_together():
    model = net(Grouped())[0]
    clip = QKClip(model, threshold=1e30)
    one, two = (seen(clip, model, batch(seed=seed)) for seed in (1, 2))
    model(batch(seed=1)), model(batch(seed=2))
    clip.step()
    assert clip.maxima()[""] == [max(pair) for pair in zip(one, two, strict=True)]


def test_a_pass_without_training_does_not_count():
    model = net(Grouped())[0]
    clip = QKClip(model)
    usual = seen(clip, model, batch())
    model.eval()(100 * batch())
    assert seen(clip, model.train(), batch()) == usual


def test_rows_of_the_batch_and_steps():
    model = net(Grouped())[0]
    first = seen(QKClip(model), model, batch()[:2])
    clip = QKClip(model, threshold=1e30, rows=2, every=2)
    model(batch()), clip.step()
    assert clip.maxima()[""] == [-math.inf] * 4
    model(batch()), clip.step()
    assert clip.maxima()[""] == first


def test_values_that_are_given_between_the_steps_that_clip_do_not_count():
    clip = QKClip(net(Grouped()), threshold=10.0, every=2, measure=False)
    for value in (50.0, 1.0):
        clip.observe("0", [value] * 4)
        clip.step()
    assert (clip.maxima(), clip.events()) == ({"0": [1.0] * 4}, {})


def test_modules_that_are_called_as_a_wrapper_calls_them():
    inner = nn.ModuleDict({"attention": Grouped(), "module": nn.ModuleDict({"attention": Grouped()})})
    assert [*QKClip(inner).maxima()] == ["attention", "module.attention"]
    assert [*QKClip(nn.ModuleDict({"module": inner})).maxima()] == ["attention", "module.attention"]


def test_gradients_and_outputs_are_those_without():
    model, other, x = net(Fused(), Grouped()), net(Fused(), Grouped()), batch()
    QKClip(model)
    for each in (model, other):
        each(x).square().mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_under_an_activation_checkpoint():
    model = net(Grouped())[0]
    clip = QKClip(model, threshold=1e30)
    checkpoint(model, batch(), use_reentrant=False).sum().backward()
    clip.step()
    assert clip.maxima()[""] == seen(clip, model, batch())


# Dynamo's, about what goes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_that_is_compiled():
    model = net(Grouped(), Fused())
    clip = QKClip(model, threshold=1e30)
    compiled = torch.compile(model, backend="eager")
    compiled(batch())
    clip.step()
    found = clip.maxima()
    model(batch()), clip.step()
    assert all(found[name] == pytest.approx(values, rel=RTOL) for name, values in clip.maxima().items())


def test_half_precision_is_rounded_once():
    model = net(Grouped())[0].to(torch.bfloat16)
    clip = QKClip(model, threshold=10.0, measure=False)
    before = model.q_proj.weight.detach().clone()
    clip.observe("", [20.0] * 4)
    clip.step()
    assert torch.equal(model.q_proj.weight, (before.float() * 0.5**0.5).bfloat16())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_clips_nothing(value):
    model = net(Grouped())[0]
    clip, before = QKClip(model, measure=False), copy.deepcopy(model.state_dict())
    clip.observe("", [value] * 4)
    if value == -math.inf:
        clip.observe("", [1.0] * 4)
    clip.step()
    assert clip.events() == {}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", list_optimizers())
def test_beside_every_optimizer(name):
    model = nn.Sequential(nn.Linear(16, 16), net(Grouped())[0], nn.Linear(16, 16))
    companion = {"companion_lr": 1e-7} if not entry(name).load().rule.__name__.startswith("AdamW") else {}
    optimizer = create_optimizer(name, model, lr=1e-7, **companion)
    clip = QKClip(model, threshold=1.0)
    routed = {p for group in optimizer.param_groups if group.get("algorithm") == name for p in group["params"]}
    if any(kind.__name__ in UNDOES for kind in entry(name).load().__mro__) and model[1].q_proj.weight in routed:
        with pytest.raises(ValueError, match=r"has 1\.q_proj\.weight and keeps .*would undo the clipping"):
            clip.attach(optimizer)
        return
    clip.attach(optimizer)
    largest = []
    for _ in range(3):
        model(batch()).square().mean().backward()
        optimizer.step()
        largest.append(max(clip.maxima()["1"]))
    assert largest[0] > 3
    assert largest[1:] == pytest.approx([1.0, 1.0], abs=1e-3)  # steps of 1e-7 move it no further


@pytest.mark.parametrize("clip_first", [True, False])
@pytest.mark.parametrize("layer", [ScheduleFree, lambda optimizer: WeightAverage(optimizer, 0.0)])
def test_averages_follow_what_was_clipped(layer, clip_first):
    """Schedule-free makes the weights anew out of z and x, and so would bring back what they were before the clip."""
    model = net(Grouped(), Grouped())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    clip = QKClip(model, threshold=5.0)
    if clip_first:
        clip.attach(optimizer)
        averaged = layer(optimizer)
    else:
        averaged = layer(optimizer)
        clip.attach(optimizer)
    largest = []
    for _ in range(4):
        model(batch()).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        largest.append(max(map(max, clip.maxima().values())))
        if len(largest) == 1:  # then the average is the weight itself
            assert all(torch.equal(p, optimizer.state[p]["average"]) for p in model.parameters())
    assert largest[0] > 500
    assert largest[1:] == pytest.approx([5.0] * 3, rel=1e-3)  # of steps, which are short
    averaged.eval()
    assert max(seen(clip, model, batch())) == pytest.approx(5.0, rel=1e-3)


def test_weights_that_keep_their_rounding_are_scaled_in_float32():
    model = net(Grouped()).bfloat16()
    optimizer = create_optimizer("adamw", model, lr=1e-3, weight_rounding="compensated")
    clip = QKClip(model, threshold=3.0, measure=False)

    def wide():
        x = torch.empty(16, 16)
        join_bfloat16_(x, model[0].q_proj.weight.detach(), optimizer.state[model[0].q_proj.weight]["weight_bits"])
        return x

    model(batch().bfloat16()).sum().backward()
    optimizer.step()
    before = wide()
    clip.attach(optimizer)
    clip.observe("0", [10.0] * 4)
    clip.step()
    torch.testing.assert_close(wide(), before * 0.3**0.5, rtol=1e-6, atol=0)
    assert torch.equal(model[0].q_proj.weight, wide().bfloat16())


def test_a_step_that_a_cuda_graph_records_is_refused(monkeypatch):
    """Without a GPU: the question is answered for it."""
    clip = QKClip(net(Grouped()), measure=False)
    clip.observe("0", [1.0] * 4)
    monkeypatch.setattr("emerging_optimizers.qk_clip.clip.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="recorded in a CUDA graph, which would repeat it without counting"):
        clip.step()
    assert clip.steps == 0


def test_attach_and_close():
    model = net(Grouped())
    optimizer = Muon([model[0].q_proj.weight], lr=0.01)
    clip = QKClip(model)
    clip.attach(optimizer)
    model(batch()).sum().backward()
    optimizer.step()
    assert clip.steps == 1
    clip.close()
    model(batch()).sum().backward()
    optimizer.step()
    assert clip.steps == 1


def test_a_checkpoint_goes_on(tmp_path):
    model = net(Grouped())
    clip = QKClip(model, threshold=1.0)
    model(batch()), clip.step()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    other = QKClip(net(Grouped()))
    other.load_state_dict(torch.load(tmp_path / "clip.pt", weights_only=True))
    assert (other.steps, other.events(), other.maxima()) == (1, clip.events(), clip.maxima())
    with pytest.raises(ValueError, match=r"the checkpoint has heads \{'0': 4\}, and this model \{'1': 4\}"):
        QKClip(nn.Sequential(nn.Identity(), Grouped())).load_state_dict(clip.state_dict())


def test_a_copy_of_the_model_is_not_looked_at():
    model = net(Grouped())
    clip = QKClip(model)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="is not copied with them; make another one for the copy, attach it"):
            copied((model, clip))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batch())
    with pytest.raises(ValueError, match="no attention module has run in training mode since the last step"):
        clip.step()


def test_given_projections():
    class Own(Fused):
        def forward(self, x):
            return self.c_proj(self.c_attn(x)[..., :16])

    model = net(Own())
    heads = Heads(4, query=("c_attn", 0), key=("c_attn", 16), head_dim=4)
    clip, before = QKClip(model, projections={"[0-9]": heads}, measure=False, threshold=1.0), model[0].c_attn.weight
    old = before.detach().clone()
    clip.observe("0", [4.0, 1.0, 1.0, 1.0])
    clip.step()
    factors = (before / old).mean(1)
    assert factors.tolist() == pytest.approx(([0.5] * 4 + [1.0] * 12) * 2 + [1.0] * 16, rel=RTOL)
    model = net(Own())
    clip = QKClip(model, projections={"0": heads})
    with pytest.raises(ValueError, match=r"0 has called neither .* use measure=False"):
        model(batch())
    assert not clip._sight.inside


def test_an_interrupt_inside_is_over_with_the_next_call():
    """Torch tells no hook of what is no `Exception`."""
    model = net(Grouped(), Grouped())
    clip, others = QKClip(model, threshold=1e30), torch.randn(1, 2, 3, 7)
    usual, run = seen(clip, model, batch()), model[1].forward

    def interrupted(x):
        raise KeyboardInterrupt

    for after in (lambda: model[0](batch()), model.eval, clip.step, clip.close):
        model[1].forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            model(batch())
        model[1].forward = run
        after()
        model(batch())
        assert not clip._sight.inside
        torch.nn.functional.scaled_dot_product_attention(others, others, others)  # in no module of this model
        model.train()
    assert seen(QKClip(model), model, batch()) == usual


class Asked(Grouped):
    """How attention is called is given."""

    def __init__(self, call):
        super().__init__(groups=4)
        self.call = call

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(-3, -2) for m in (self.q_proj, self.k_proj, self.v_proj))
        return self.call(q, k, v)


@pytest.mark.parametrize("softmax", [torch.softmax, torch.special.softmax, torch.nn.functional.softmax])
def test_a_softmax_by_any_name(softmax):
    model = net(Asked(lambda q, k, v: softmax(input=q @ k.mT / 2, dim=-1) @ v))
    fused = net(Asked(torch.nn.functional.scaled_dot_product_attention))
    assert seen(QKClip(model), model, batch()) == pytest.approx(seen(QKClip(fused), fused, batch()), rel=RTOL)


def test_several_axes_of_sequences():
    attend = torch.nn.functional.scaled_dot_product_attention
    x, mask = batch(6).unflatten(0, (2, 3)), torch.rand(3, 1, 8, 8) < 0.7
    model = net(Asked(lambda q, k, v: attend(q, k, v, mask)))
    found = seen(QKClip(model), model, x)
    alone = net(Asked(lambda q, k, v: attend(q, k, v, mask.repeat(2, 1, 1, 1))))
    assert found == pytest.approx(seen(QKClip(alone), alone, x.flatten(0, 1)), rel=RTOL)


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_masks_that_hold_no_numbers(bias):
    attend = torch.nn.functional.scaled_dot_product_attention
    model = net(Asked(lambda q, k, v: attend(q[:, :, -3:], k, v, bias(3, 8))))
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5 if bias is causal_lower_right else 0)
    plain = net(Asked(lambda q, k, v: attend(q[:, :, -3:], k, v, mask)))
    assert seen(QKClip(model), model, batch()) == seen(QKClip(plain), plain, batch())


def test_a_threshold_that_is_next_to_nothing():
    model = net(Grouped())
    clip = QKClip(model, threshold=1e-300, measure=False)
    clip.observe("0", [10.0] * 4)
    clip.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_fails_inside_stays_what_it_was():
    model = net(Grouped())
    clip = QKClip(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 3, 5))
    assert seen(clip, model, batch())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0\.0 in its arguments is not allowed; give a finite number > 0"),
        ({"alpha": 1.5}, r"alpha=1\.5 in its arguments is not allowed; give a number in \[0, 1\]"),
        ({"every": 0}, "every=0"),
        ({"rows": 0}, "rows=0"),
        ({"heads": 3}, r"3 heads do not make up the 16 rows of queries"),
        ({"projections": {"x": Heads(4, "q_proj", "k_proj")}}, "'x', which is the path of no module"),
        ({"projections": {"0": Heads(4, "wq", "k_proj")}}, "has no layer 'wq'; it has q_proj, k_proj"),
        ({"projections": {"0": Heads(3, "q_proj", "k_proj")}}, "do not fit|are not the 16 rows"),
        (
            {"projections": dict.fromkeys(("[0-9]", "0"), Heads(4, "q_proj", "k_proj"))},
            "a pattern before it both match 0",
        ),
        (
            {"projections": {"0": Heads(2, ("q_proj", 0), ("q_proj", 4), head_dim=4)}},
            "rows 0 to 8 of q_proj are given for queries, and 4 to 12 for keys; a row cannot be both",
        ),
        ({"alpha": True}, "alpha=True"),
    ],
)
def test_refused_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        QKClip(net(Grouped()), **given)


def test_the_example_runs(tmp_path):
    words = [sys.executable, str(EXAMPLE), "--steps", "3", "--no-picture"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.count("largest logit") == 2


def test_a_model_without_attention_is_told_what_was_looked_for():
    with pytest.raises(
        ValueError, match=r"Sequential has no attention module .*MultiheadAttention; layers q_proj/k_proj"
    ):
        QKClip(nn.Sequential(nn.Linear(3, 3)))


def test_refused_values():
    clip = QKClip(net(Grouped()))
    with pytest.raises(ValueError, match=r"'attn' is no attention module; known are 0"):
        clip.observe("attn", [1.0] * 4)
    with pytest.raises(ValueError, match="the logits of 3 heads of 0 were seen or given, and it has 4"):
        clip.observe("0", [1.0] * 3)
    for wrong in ("abc", None):
        with pytest.raises(TypeError, match=f"maxima_H={wrong!r} is not allowed; give a number for each query head"):
            clip.observe("0", wrong)
    with pytest.raises(ValueError, match="the logits of 3 heads of the model itself were"):
        QKClip(Grouped()).observe("", [1.0] * 3)
    with pytest.raises(ValueError, match="the checkpoint has no maxima, clips; give what state_dict"):
        clip.load_state_dict({"steps": 7})
    saved = clip.state_dict()
    for wrong in (
        {"steps": "7"}, {"steps": -1}, {"maxima": None}, {"maxima": {}}, {"clips": {"0": [1, 2, 3, 4]}},
        {"maxima": {"0": torch.zeros(3)}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"the checkpoint has (no|heads)"):
            clip.load_state_dict({**saved, "steps": 5, **wrong})
    with pytest.raises(TypeError, match="the checkpoint is a NoneType; give what state_dict"):
        clip.load_state_dict(None)
    assert clip.steps == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": 0}, r"Heads: heads=0 in its arguments is not allowed; give an integer >= 1"),
        ({"query": ("q_proj", -1)}, r"query=\('q_proj', -1\) .* or \(name, first row\)"),
        ({"key": 3}, "key=3"),
        ({"key": ()}, r"key=\(\)"),
        ({"key_heads": 0}, "key_heads=0"),
        ({"head_dim": 1.5}, r"head_dim=1\.5"),
    ],
)
def test_refused_heads(given, message):
    with pytest.raises(ValueError, match=message):
        Heads(**{"heads": 4, "query": "q_proj", "key": "k_proj", **given})


def test_what_is_of_another_kind_is_named():
    with pytest.raises(TypeError, match="model is a NoneType; give the module"):
        QKClip(None)
    for wrong in ([1], {"0": "q_proj"}):
        with pytest.raises(TypeError, match="is not allowed; give a dictionary from paths of modules to `Heads`"):
            QKClip(net(Grouped()), projections=wrong)
    model = net(Grouped())
    clip, optimizer = QKClip(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a list; give the torch optimizer"):
        clip.attach([optimizer])
    with pytest.raises(TypeError, match=r"optimizer is a Wrapper; give .* not what wraps it"):
        clip.attach(object.__new__(type("Wrapper", (torch.optim.Optimizer,), {})))  # accelerate's has no hooks
    clip.attach(optimizer)
    with pytest.raises(ValueError, match=r"after the steps of a SGD already, .* make a new one"):
        clip.attach(optimizer)


@pytest.mark.parametrize("name", ["q_norm", "qk_norm", "norm_k", "query_layernorm", "k_rms_norm", "ln_q"])
def test_a_norm_behind_a_projection_is_left_alone(name):
    model = net(Grouped(), Grouped())
    model[1].add_module(name, nn.RMSNorm(4))
    with pytest.warns(UserWarning, match=rf"leaves modules alone: 1: it normalises queries or keys .*\({name}\)"):
        clip = QKClip(model)
    assert [*clip.skipped] == ["1"]
    with pytest.raises(
        ValueError, match=r"no attention module whose heads could be clipped; the model itself: it normalises"
    ):
        QKClip(model[1])


def test_two_modules_that_share_a_projection():
    model = net(Grouped(), Grouped())
    model[1].k_proj = model[0].k_proj
    with pytest.raises(ValueError, match=r"0 and 1 share 1\.k_proj\.weight"):
        QKClip(model)


def test_keys_and_values_of_another_width():
    """Then the three projections are parameters of their own."""
    model = nn.MultiheadAttention(16, 4, batch_first=True, kdim=8, vdim=12)
    x, key, value = batch(), torch.randn(3, 5, 8), torch.randn(3, 5, 12)
    x = x[:1].expand(3, *x.shape[1:])
    clip = QKClip(model)
    before = seen(clip, model, x, key, value)
    weights = model(x, key, value, average_attn_weights=False)[1]
    q, k = model.q_proj_weight, model.k_proj_weight
    b_q, b_k, _ = model.in_proj_bias.chunk(3)
    heads_q, heads_k = ((y @ w.T + b).unflatten(-1, (4, 4)).transpose(1, 2) for y, w, b in ((x, q, b_q), (key, k, b_k)))
    logits = heads_q @ heads_k.mT / 2
    torch.testing.assert_close(logits.softmax(-1), weights)
    assert before == pytest.approx(logits.amax((0, 2, 3)).tolist(), rel=RTOL)
    clip.threshold = between(before)
    model(x, key, value)
    clip.step()
    assert seen(clip, model, x, key, value) == pytest.approx([min(s, clip.threshold) for s in before], rel=RTOL)


def test_a_sequence_without_a_batch_is_looked_at():
    model = net(nn.MultiheadAttention(16, 4))[0]
    x = batch()[0]
    clip = QKClip(model)
    alone = seen(clip, self_attention(model), x)
    assert alone == pytest.approx(seen(clip, self_attention(model), x[:, None]), rel=RTOL)


def test_logits_of_nothing_and_of_numbers_that_would_overflow():
    assert largest_logits(torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4), 1.0).tolist() == [-math.inf] * 2
    large = torch.full((1, 1, 1, 4), 200.0, dtype=torch.float16)
    assert largest_logits(large, large, 1.0).tolist() == [160000.0]


class Latent(nn.Module):
    """Queries and keys as DeepSeek's latent attention makes them: 2 heads of 3 + 1 rows, values of 5."""

    def __init__(self, q_rows=8, kv_rows=16, **layers):
        super().__init__()
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 3, 1, 5
        self.q_b_proj, self.kv_b_proj = nn.Linear(4, q_rows), nn.Linear(4, kv_rows)
        for name, layer in layers.items():
            setattr(self, name, layer)


class Few(nn.Module):
    """Separate projections of three heads that have no number."""

    def __init__(self, **numbers):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 12), nn.Linear(4, 12)
        for name, number in numbers.items():
            setattr(self, name, number)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Latent(q_b_proj=None), "it has kv_b_proj, and none of"),
        (Latent(q_rows=9), "q_b_proj has 9 rows and kv_b_proj 16, which 3 . 1 for a query"),
        (Latent(kv_rows=15), "q_b_proj has 8 rows and kv_b_proj 15"),
        (Latent(q_b_proj=nn.Embedding(2, 3), qk_nope_head_dim=0), "q_b_proj has 2 rows and kv_b_proj 16, which 0 . 1"),
        (Few(), "how many heads it has is not known: none of"),
        (Few(num_heads=5), "5 heads do not make up the 12 rows of queries"),
        (Few(num_heads=3, head_dim=5), "3 heads of 5 do not make up the 12 rows of queries"),
        (Few(num_heads=3, k_proj=nn.LayerNorm(3)), "k_proj is a LayerNorm, whose weight is not one matrix"),
        (Few(num_heads=3, k_proj=nn.Linear(4, 10)), "3 query heads and 2 key heads of 4 rows do not fit"),
        (Few(num_heads=2, k_proj=nn.Linear(4, 15)), "2 key heads of 6 rows are not the 15 rows of k_proj"),
    ],
)
def test_attention_whose_heads_do_not_fit_is_told_why(module, words):
    with pytest.raises(ValueError, match=words):
        QKClip(nn.Sequential(module))
