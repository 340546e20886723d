"""The gallery: its recipes, what it refuses, and a few steps of every item."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emerging_optimizers import plan_parameters
from emerging_optimizers.cli import UsageError
from emerging_optimizers.lab import tasks
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.gallery import (
    ITEMS,
    SEEDS,
    GalleryConfig,
    GalleryResult,
    Recipe,
    Trial,
    best,
    make_optimizer,
    measured,
    run_gallery,
    train,
    trials,
)
from emerging_optimizers.lab.images import Images, load_images
from emerging_optimizers.lab.record import json_bytes, read_json
from emerging_optimizers.lab.views.gallery import gallery_view

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(lr=0.01, companion_lr=0.002, beta1=0.9, beta2=0.99, weight_decay=0.1, warmup=0.5)


def drawn(size: int, count: int = 90) -> Images:
    draw = np.random.default_rng(0)
    return Images.of("drawn", draw.random((count, size, size)), draw.integers(3, size=count))


@pytest.fixture
def without_packages(monkeypatch):
    """Data that nothing must be installed for, and a model to adapt that has hardly been trained."""
    monkeypatch.setattr(tasks, "digits", lambda: drawn(8))
    monkeypatch.setattr(tasks, "mnist", lambda: drawn(28))
    monkeypatch.setattr(tasks, "HELD_OUT_WINDOWS", 8)
    monkeypatch.setattr(tasks, "BASE_STEPS", 2)


@pytest.mark.parametrize("name", ITEMS)
def test_every_optimizer_of_an_item_trains_it(name, without_packages):
    task, item = tasks.OPEN[name](None), ITEMS[name]
    runs = [train(task, item, optimizer, RECIPE, 0, 1) for optimizer in item.optimizers]
    assert all(map(math.isfinite, (loss for run in runs for loss in run.losses)))
    assert len({run.losses[-1] for run in runs}) == len(runs)
    assert {run.parameters for run in runs} == {runs[0].parameters}
    routes = plan_parameters(task.make(0), item.others[0])
    assert item.only_matrices == (not any(route.optimizer == "adamw" for route in routes))


@pytest.mark.parametrize("name", ITEMS)
def test_no_optimizer_of_an_item_has_had_more_trials_than_adamw(name):
    tried = trials(name)
    assert {*tried} == {*ITEMS[name].optimizers}
    assert len({len(tried[other]) for other in ITEMS[name].others}) == 1
    assert max(map(len, tried.values())) == len(tried["adamw"])
    for rows in tried.values():
        assert all("0" in row.losses and not {*row.losses} & {*map(str, SEEDS)} for row in rows)
        assert math.isfinite(min(row.losses["0"] for row in rows))


def test_the_recipe_is_the_best_of_those_that_ran_with_two_seeds():
    rows = [
        Trial(recipe=RECIPE, losses={"0": 1.0}),
        Trial(recipe=(wanted := Recipe(**{**vars(RECIPE), "lr": 0.1})), losses={"0": 1.2, "4": 1.3}),
        Trial(recipe=RECIPE, losses={"0": 1.1, "4": math.inf}),
    ]
    assert best(rows) is wanted


@pytest.mark.parametrize("optimizer", ITEMS["gpt"].optimizers)
def test_adamw_has_two_rates_cut_where_those_of_the_others_are(optimizer):
    model = tasks.OPEN["gpt"](None).make(0)
    groups = make_optimizer(ITEMS["gpt"], optimizer, model, RECIPE).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    fast = {name for name, p in model.named_parameters() if rates[id(p)] == RECIPE.lr}
    assert fast == {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")}
    assert {*rates.values()} == {RECIPE.lr, RECIPE.companion_lr}
    assert {group["betas"][1] for group in groups if "betas" in group} == {RECIPE.beta2}


def test_a_result_is_what_its_file_says_and_shows_medians_and_bands():
    result = run_gallery(GalleryConfig(item="physics", steps=3))
    assert GalleryResult.from_json(result.to_json()) == result
    assert result.steps == measured(3) == (1, 2, 3)
    figure = gallery_view(result).parts[0]
    (panel,) = figure.views[""]
    for curve in panel.curves:
        losses = [run.losses for run in result.of(curve.key)]
        low, high = curve.band
        assert all(a <= y <= b for a, y, b in zip(low, curve.y, high, strict=True))
        assert (low[-1], high[-1]) == (min(x[-1] for x in losses), max(x[-1] for x in losses))


def test_a_loss_that_is_not_finite_is_infinite_in_the_file_and_after_it():
    result = run_gallery(GalleryConfig(item="physics", steps=1))
    lost = result.to_json()
    lost["runs"][0]["losses"] = [None]
    again = GalleryResult.from_json(lost)
    assert again.runs[0].losses == (math.inf,)
    assert json_bytes(again.to_json()) == json_bytes(lost)
    assert gallery_view(again).tables


@pytest.mark.parametrize("name", ITEMS)
def test_the_page_has_the_tables_of_the_stored_runs_which_had_the_recipes_of_the_trials(name):
    result = GalleryResult.from_json(read_json(ROOT / "benchmarks" / "results" / "gallery" / f"{name}.json"))
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert all(table.markdown() in page for table in gallery_view(result).tables)
    assert dict(result.recipes) == {optimizer: best(rows) for optimizer, rows in trials(name).items()}
    assert f"images/gallery/{name}.png" in page


# ---- files of the user's ---------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_an_array_file_are_read(tmp_path):
    pixels = (255 * torch.rand(60, 40, 50, 3)).byte().numpy()
    for k, picture in enumerate(pixels):
        (tmp_path / "pictures" / f"class {k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"class {k % 2}" / f"{k}.png")
    folder = load_images(str(tmp_path / "pictures"))
    assert folder.images_BCHW.shape == (60, 3, 32, 32)
    assert folder.classes == 2
    np.savez(tmp_path / "some.npz", images=pixels[..., 0])
    arrays = load_images(str(tmp_path / "some.npz"))
    assert arrays.images_BCHW.shape == (60, 1, 40, 50)
    assert (arrays.images_BCHW.min(), arrays.images_BCHW.max(), arrays.classes) == (0, 1, 0)
    task = tasks.OPEN["vit"](str(tmp_path / "pictures"))
    assert train(task, ITEMS["vit"], "muon", RECIPE, 0, 1).losses[0] < math.inf
    assert tasks.OPEN["autoencoder"](str(tmp_path / "some.npz")).held_out()[0].shape == (20, 1, 14, 14)
    with pytest.raises(UsageError, match="does not have two classes"):
        tasks.OPEN["vit"](str(tmp_path / "some.npz"))


ARRAYS = {
    "cannot be read": None,
    "name the array `images`": {"x": np.zeros(3)},
    "must be \\(images, height, width\\)": {"images": np.zeros((60, 2))},
    "one for each of 60 images": {"images": np.random.rand(60, 8, 8), "labels": np.zeros(3)},
    "values that are not finite, or one value only": {"images": np.zeros((60, 8, 8))},
    "holds 5 images; give at least 60": {"images": np.random.rand(5, 8, 8)},
}


@pytest.mark.parametrize("said", ARRAYS)
def test_arrays_that_are_no_images_are_refused(said, tmp_path):
    path = tmp_path / "some.npz"
    if ARRAYS[said] is None:
        path.write_text("no arrays")
    else:
        np.savez(path, **ARRAYS[said])
    with pytest.raises(UsageError, match=said):
        load_images(str(path))


@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_an_array_file_of_which_a_part_is_missing_is_refused(left, tmp_path):
    np.savez(tmp_path / "some.npz", images=np.random.rand(60, 8, 8))
    whole = (tmp_path / "some.npz").read_bytes()
    (tmp_path / "some.npz").write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UsageError, match="cannot be read"):
        load_images(str(tmp_path / "some.npz"))


def test_an_array_file_with_a_changed_byte_and_one_array_alone_are_refused(tmp_path):
    np.savez(tmp_path / "some.npz", images=np.random.rand(60, 8, 8))
    content = bytearray((tmp_path / "some.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "some.npz").write_bytes(content)
    np.save(tmp_path / "some.npy", np.random.rand(60, 8, 8))
    for path in ("some.npz", "some.npy"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_images(str(tmp_path / path))
    with pytest.raises(UsageError, match="no such file or folder"):
        load_images(str(tmp_path / "nowhere"))


def test_pictures_of_every_mode_and_size_are_read_and_those_of_16_bits_are_not_white(tmp_path):
    grey = np.linspace(0, 65535, 40 * 50).astype("uint16").reshape(40, 50)
    eight = Image.fromarray((grey // 257).astype("uint8"))
    Image.fromarray(grey).save(tmp_path / "0.png")
    for k, mode in enumerate(["L", "RGB", "RGBA", "P", "LA", "1"], start=1):
        eight.convert(mode).save(tmp_path / f"{k}.png")
    for k in range(7, 60):
        eight.resize((k, 100 - k)).save(tmp_path / f"{k}.{'png' if k % 2 else 'JPG'}")
    images = load_images(str(tmp_path))
    assert images.images_BCHW.shape == (60, 3, 32, 32)
    means = images.images_BCHW.mean((1, 2, 3))
    assert ((means > 0.3) & (means < 0.7)).all()


@pytest.mark.parametrize("left", [0, 20, 400])
def test_a_picture_that_is_damaged_is_named(left, tmp_path):
    picture = Image.fromarray((255 * torch.rand(40, 50, 3)).byte().numpy())
    for k in range(2):
        picture.save(tmp_path / f"{k}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:left])
    with pytest.raises(UsageError, match=r"1\.png cannot be read as a picture .*take it out"):
        load_images(str(tmp_path))


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no picture under it"):
        load_images(str(tmp_path))


def test_a_text_of_other_characters_is_refused_for_what_is_adapted(tmp_path):
    (tmp_path / "text").write_text("ыъэ, " * 1000)
    with pytest.raises(UsageError, match="knows 40% of the characters of"):
        tasks.in_characters_of(tasks.load_text(None, 64), tasks.load_text(str(tmp_path / "text"), 64))


def test_lora_adapts_a_model_of_each_seed_to_what_it_can_read_of_the_users_text(tmp_path, without_packages):
    (tmp_path / "text").write_text("aыb" * 1000)
    task = tasks.OPEN["lora"](str(tmp_path / "text"))
    known = tasks.load_text(None, 64).vocabulary
    assert {*task.batch(0, 1)[0].flatten().tolist()} == {known.index("a"), known.index("b")}
    ours, other = (dict(task.make(seed).named_parameters()) for seed in (0, 1))
    assert all(p.requires_grad == (".lora_" in name) for name, p in ours.items())
    assert not torch.equal(ours["head.weight"], other["head.weight"])
    assert torch.equal(ours["head.weight"], dict(task.make(0).named_parameters())["head.weight"])


def test_a_models_own_draws_leave_those_of_others_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    with tasks.draws_of(1):
        torch.rand(1)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "there is no item 'nonsense' in the gallery; it has gpt"),
        (["autoencoder", "--text", "x"], "--text is not for autoencoder; it takes --images"),
        (["Physics", "--images", "x"], "--images is not for physics; it takes no files"),
        (["gpt", "--text", "/nowhere"], "/nowhere"),
        (["gpt", "--steps", "0"], "--steps is 0"),
        (["--text", "x"], "--text is not for the list of items"),
    ],
)
def test_a_request_that_cannot_be_met_ends_with_status_2(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["gallery", *words, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_without_an_item_the_items_are_listed(capsys):
    main(["gallery"])
    out = capsys.readouterr().out
    assert all(name in out for name in ITEMS)


@pytest.mark.slow  # a whole item, at its full length
def test_the_command_leaves_figure_and_tables(tmp_path):
    main(["gallery", "physics", "--out", str(tmp_path / "out")])
    assert {"gallery.png", "tables.md", "result.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
