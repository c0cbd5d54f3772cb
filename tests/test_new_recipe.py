"""`train --new`: a recipe for a data set, which loads, fits the images, and trains as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_records import datum_of, encoded, noise, write_lmdb

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.networks.stage_files import check_crop, network_of
from caffe_jacinto.recipes.load import load_recipe
from caffe_jacinto.recipes.model import QuantizeSettings, Recipe
from caffe_jacinto.recipes.suggest import DataSet, crop_for, last_map, strides_for, suggest, val_batch_for
from caffe_jacinto.train import main as train


def data_set(**changes: Any) -> DataSet:
    values: dict[str, Any] = {
        "name": "flowers", "train_lmdb": "data/train", "val_lmdb": "data/val", "classes": 5,
        "class_names": (), "train_images": 4000, "val_images": 1000,
        "smallest": (64, 64), "largest": (64, 64),
    }  # fmt: skip
    return DataSet(**(values | changes))


def loaded(data: DataSet, folder: Path) -> Recipe:
    path = folder / "new.toml"
    path.write_text(suggest(data, path).text, encoding="utf-8")
    return load_recipe(str(path), rules=RECIPE_RULES)


def lmdb_of(folder: Path, labels: list[int], side: int = 32, channels: int = 3, names: str = "") -> str:
    """An LMDB with an image of noise for each label; ``names`` is its labels.txt."""
    folder.mkdir(parents=True)
    image = encoded(noise(side, side, channels), ".png")
    write_lmdb(folder, [datum_of(image, label) for label in labels])
    if names:
        (folder / "labels.txt").write_text(names)
    return str(folder)


def new(path: Path | str, train_lmdb: str, val_lmdb: str) -> int:
    return train(["--new", str(path), "--train-lmdb", train_lmdb, "--val-lmdb", val_lmdb])


def refused(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        new(*arguments)
    return caught.value.lines()


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30)
SIDES = st.integers(3, 600)


@settings(max_examples=150)
@given(
    train_images=st.integers(1, 3_000_000),
    val_images=st.integers(1, 100_000),
    classes=st.integers(2, 2000),
    sides=st.tuples(SIDES, SIDES, SIDES, SIDES),
    lmdb=TEXT,
    names=st.lists(TEXT, max_size=12),
)
@example(4, 1, 2, (3, 3, 3, 3), 'x"\n[data]\n', ["\n[stages.evil]", "{{ 7 * 7 }}", '"', "\x1b[31m"])
def test_any_data_set_gets_a_recipe_that_fits_it(
    tmp_path_factory: pytest.TempPathFactory,
    train_images: int,
    val_images: int,
    classes: int,
    sides: tuple[int, int, int, int],
    lmdb: str,
    names: list[str],
) -> None:
    data = data_set(
        train_images=train_images,
        val_images=val_images,
        classes=classes,
        class_names=tuple(names),
        train_lmdb=lmdb,
        smallest=(min(sides), sorted(sides)[1]),
        largest=(max(sides), max(sides)),
    )
    recipe = loaded(data, tmp_path_factory.mktemp("new"))
    assert (recipe.data.train_lmdb, recipe.data.num_classes) == (lmdb, classes)
    assert list(recipe.stages) == ["initial", "l1reg", "sparse", "finetune", "quantize"]
    crop = recipe.network.crop_size
    assert 0.7 * min(sides) <= crop <= min(sides)
    check_crop(network_of(recipe))
    batch, passes = recipe.training.batch_size, recipe.training.iter_size
    assert batch <= max(train_images, 2)
    assert batch % passes == 0
    assert recipe.training.val_batch_size <= max(val_images, 1)
    for stage in recipe.stages.values():
        solver = stage.solver
        if solver is None:
            assert (stage.start, stage.quantize) == ("finetune", QuantizeSettings())
            continue
        assert 1 <= solver.display <= solver.max_iter
        assert solver.snapshot == solver.test_interval <= solver.max_iter
        assert solver.max_iter % solver.test_interval == 0 or solver.test_interval == 10_000
    sparse = recipe.stages["sparse"]
    assert sparse.sparse is not None
    # The factor passes the target well before the stage ends, and the network has time to recover.
    steps = sparse.sparse.target / sparse.sparse.step_factor
    assert sparse.sparse.start_iter + steps * sparse.sparse.step_iter < 0.75 * sparse.solver.max_iter


def test_for_imagenet_it_is_the_published_training(tmp_path: Path) -> None:
    imagenet = data_set(
        classes=1000, train_images=1_281_167, val_images=50_000, smallest=(256, 256), largest=(256, 256)
    )
    found, published = loaded(imagenet, tmp_path), load_recipe("imagenet_jacintonet11")
    assert found.network == published.network
    assert found.training == published.training
    assert found.stages["quantize"] == published.stages["quantize"]
    for name, stage in published.stages.items():
        ours, theirs = found.stages[name].solver, stage.solver
        if theirs is None:
            continue
        assert (ours.max_iter, ours.base_lr, ours.lr_policy, ours.weight_decay, ours.regularization) == (
            *(theirs.max_iter, theirs.base_lr, theirs.lr_policy, theirs.weight_decay, theirs.regularization),
        )
        assert (found.stages[name].start, found.stages[name].freeze_zeros) == (
            stage.start,
            stage.freeze_zeros,
        )
    ours_sparse, theirs_sparse = found.stages["sparse"].sparse, published.stages["sparse"].sparse
    assert ours_sparse is not None
    assert theirs_sparse is not None
    assert ours_sparse.model_copy(update={"display": 1000}) == theirs_sparse


@pytest.mark.parametrize(
    ("side", "crop", "strides", "left"),
    [
        (256, 224, (2, 2, 2, 2, 2), 7),
        (128, 112, (2, 2, 2, 2, 2), 4),
        (64, 56, (1, 2, 2, 2, 2), 4),
        (32, 28, (1, 2, 2, 2, 1), 4),
        (28, 24, (1, 2, 2, 2, 1), 3),
        (16, 16, (1, 2, 2, 1, 1), 4),
        (3, 3, (1, 1, 1, 1, 1), 3),
    ],
)
def test_crop_and_strides_follow_the_images(
    side: int, crop: int, strides: tuple[int, ...], left: int
) -> None:
    assert (crop_for(side), strides_for(crop), last_map(crop, strides)) == (crop, strides, left)


@given(st.integers(1, 1_000_000))
def test_a_test_counts_each_image_once_where_a_batch_allows_it(images: int) -> None:
    batch = val_batch_for(images)
    assert 1 <= batch <= min(images, 100)
    assert images % batch == 0 or all(images % other for other in range(10, 101))


def test_it_says_what_it_read_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [3, 1, 0, 2] * 30
    names = "cat\ndog\nowl\nfox\n"
    lmdbs = [lmdb_of(tmp_path / f"pets_{part}_lmdb", labels, names=names) for part in ("train", "val")]
    path = tmp_path / "my pets.toml"
    assert new(path, *lmdbs) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: a recipe for 120 images of 4 classes: jacintonet11 with crops of 28x28")
    assert f"python -m caffe_jacinto.train '{path}' --dry-run" in said
    assert "few to start from random weights" in said
    text = path.read_text()
    assert "120 training and 120 validation images, 32x32 pixels" in text
    assert "4 classes (cat, dog, owl, fox)" in text
    recipe = load_recipe(str(path))
    assert (recipe.data.dataset, recipe.data.num_classes) == ("pets", 4)
    assert [recipe.data.train_lmdb, recipe.data.val_lmdb] == lmdbs
    assert recipe.network.crop_size == 28


def test_without_class_names_every_label_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The highest one stands in a single record in the middle, which a sample would miss."""
    labels = [0, 1] * 1000
    labels[1201] = 6
    lmdbs = [lmdb_of(tmp_path / "train", labels), lmdb_of(tmp_path / "val", [0, 1, 2] * 10)]
    assert new(tmp_path / "animals.toml", *lmdbs) == 0
    recipe = load_recipe(str(tmp_path / "animals.toml"))
    assert recipe.data.num_classes == 7
    assert recipe.data.dataset == "animals"  # "train" says nothing


def test_it_never_overwrites(tmp_path: Path) -> None:
    lmdb = lmdb_of(tmp_path / "lmdb", [0, 1] * 20)
    path = tmp_path / "mine.toml"
    path.write_text("precious")
    (tmp_path / "link.toml").symlink_to("nowhere.toml")
    for name in ("mine.toml", "link.toml"):
        (message,) = refused(str(tmp_path / name), lmdb, lmdb)
        assert "exists already and is left as it is" in message
    assert path.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "lmdb", "mine.toml"]


def test_all_that_is_wrong_with_the_data_is_said_before_anything_is_written(tmp_path: Path) -> None:
    gray = lmdb_of(tmp_path / "gray", [0, 1] * 20, channels=1)
    one = lmdb_of(tmp_path / "one", [0] * 20)
    here = lmdb_of(tmp_path / "here", [0, 1] * 20, names="cat\ndog\n")
    swapped = lmdb_of(tmp_path / "swapped", [0, 1] * 20, names="dog\ncat\n")
    beyond = lmdb_of(tmp_path / "beyond", [0, 7] * 20)
    path = str(tmp_path / "x.toml")
    missing = refused(path, "no/lmdb", gray)
    assert len(missing) == 2
    assert "LMDB no/lmdb does not exist" in missing[0]
    assert "1 channel, and the network takes 3" in missing[1]
    assert "have label 0; a classifier needs two classes" in refused(path, one, one)[0]
    assert "name different classes" in refused(path, here, swapped)[0]
    assert "label 7, but the network has 2 classes" in refused(path, here, beyond)[0]
    assert "the name of a recipe ends in .toml; use " in refused(path.removesuffix(".toml"), here, here)[0]
    assert "its folder" in refused(str(tmp_path / "no" / "x.toml"), here, here)[0]
    assert not Path(path).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--new", "x.toml"],
        ["--new", "x.toml", "--train-lmdb", "a"],
        ["--new", "x.toml", "--train-lmdb", "a", "--val-lmdb", "b", "--dry-run"],
        ["--new", "x.toml", "--train-lmdb", "a", "--val-lmdb", "b", "--set", "data.mirror=false"],
        ["--new", "x.toml", "--train-lmdb", "a", "--val-lmdb", "b", "--gpus", ""],
        ["--new", "x.toml", "demo_digits", "--train-lmdb", "a", "--val-lmdb", "b"],
    ],
)
def test_it_takes_two_lmdbs_and_nothing_else(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"takes --train-lmdb DIR and --val-lmdb DIR|give one of RECIPE"):
        train(arguments)
