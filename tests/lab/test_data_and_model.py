"""The data and the initial weights depend on the seed alone."""

import pytest
import torch

from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.train import make_model


def test_the_default_text_is_split_once_and_covers_its_vocabulary():
    text = load_text(None, context=64)
    assert len(text) > 300_000  # its wording, and so its length, differs between versions of Python
    assert len(text.validation) == len(text) // 10
    assert text.vocabulary == "".join(sorted(set(text.vocabulary)))
    assert int(torch.cat([text.train, text.validation]).max()) == len(text.vocabulary) - 1


def test_a_batch_is_a_function_of_seed_and_step():
    text = load_text(None, context=16)
    first = text.batch(seed=3, step=5, batch=4, context=16)
    text.batch(seed=3, step=6, batch=4, context=16)
    again = text.batch(seed=3, step=5, batch=4, context=16)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(first[0], text.batch(seed=seed, step=step, batch=4, context=16)[0])
    inputs, targets = first
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_held_out_windows_reach_from_the_first_to_the_last_character(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcdefghij" * 17, encoding="utf-8")
    text = load_text(str(path), context=16)
    assert len(text.validation) == 17
    inputs, targets = text.held_out(count=8, context=16)
    assert torch.equal(inputs, text.validation[None, :-1])  # there is only one place to begin
    assert torch.equal(targets, text.validation[None, 1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc" * 10, r"its length is 30 characters, and a context of 16 needs 170"),
        (b"\xff\xfe\xfa" * 100, r"--text .* is not text in UTF-8: byte 0 cannot be read"),
        ("Stra\xdfe".encode("latin-1"), r"byte 4 cannot be read.* iconv"),
        (b"a" * 1000, r"repeats one character"),
        (None, r"--text .*No such file"),
    ],
)
def test_a_text_that_cannot_be_learned_says_why(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_text(str(path), context=16)


def test_the_default_model_has_the_size_of_the_documentation():
    text = load_text(None, context=64)
    model = make_model(TrainConfig(), text)
    without_vocabulary = 822_144 - 2 * 103 * 128
    assert sum(p.numel() for p in model.parameters()) == without_vocabulary + 2 * len(text.vocabulary) * 128


def test_initial_weights_are_a_function_of_the_seed(tiny):
    text = load_text(None, tiny.context)
    torch.manual_seed(1)
    first = make_model(tiny, text).state_dict()
    torch.manual_seed(2)
    second = make_model(tiny, text).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_model(TrainConfig(seed=1), text).state_dict()
    assert first["token.weight"][0, 0] != other["token.weight"][0, 0]


def test_the_model_does_not_see_the_future(tiny):
    text = load_text(None, tiny.context)
    model = make_model(tiny, text)
    ids, _ = text.held_out(1, tiny.context)
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % len(text.vocabulary)
    torch.testing.assert_close(model(ids)[:, :8], model(changed)[:, :8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 5}, "--warmup 10 leaves nothing"),
        ({"width": 30}, "--width 30 cannot be split"),
        ({"optimizers": ("adamw", "adamw")}, "each optimizer once"),
        ({"lr": {"lion": 1e-3}}, "--lr names lion"),
    ],
)
def test_a_job_that_cannot_run_says_why(arguments, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**arguments)
