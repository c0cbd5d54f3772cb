"""Recipes: what they hold, and the one line that each mistake gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.networks.registry import RECIPE_RULES
from caffe_jacinto.quantization.schemes import SCHEMES, chosen_scheme
from caffe_jacinto.recipes.load import BUILT_IN_FOLDER, built_in_recipes, load_recipe
from caffe_jacinto.recipes.model import Recipe

DIGITS = BUILT_IN_FOLDER / "demo_digits.toml"


def line_of(text: str, part: str) -> int:
    """The line, from 1, of the first line with ``part``."""
    return next(n for n, line in enumerate(text.split("\n"), start=1) if part in line)


def messages_of(path: Path | str, *overrides: str) -> list[str]:
    """The lines that loading this recipe fails with."""
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides, rules=RECIPE_RULES)
    lines = caught.value.lines()
    assert not any("\n" in line for line in lines)
    return lines


def message_of(path: Path | str, *overrides: str) -> str:
    """The one line that loading this recipe fails with."""
    (message,) = messages_of(path, *overrides)
    return message


def changed(folder: Path, old: str, new: str) -> Path:
    """The digits' recipe with one text replaced."""
    text = DIGITS.read_text()
    assert old in text
    path = folder / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_imagenet_recipe_holds_the_published_values() -> None:
    recipe = load_recipe("imagenet_jacintonet11")
    assert list(recipe.stages) == ["initial", "l1reg", "sparse", "finetune", "quantize"]
    assert (recipe.training.batch_size, recipe.training.iter_size) == (256, 2)
    initial, l1reg, sparse, finetune, quantize = recipe.stages.values()
    assert initial.solver and finetune.solver
    assert (initial.solver.max_iter, initial.solver.base_lr, initial.solver.lr_policy) == (
        320_000,
        0.1,
        "poly",
    )
    assert (initial.solver.regularization, initial.solver.weight_decay) == ("L2", 1e-4)
    for stage in (l1reg, sparse):
        assert (stage.solver.max_iter, stage.solver.base_lr) == (160_000, 0.01)
        assert (stage.solver.regularization, stage.solver.weight_decay) == ("L1", 1e-5)
    assert sparse.sparse is not None
    schedule = sparse.sparse
    assert (schedule.target, schedule.step_factor, schedule.step_iter, schedule.start_iter) == (
        0.8,
        0.01,
        1000,
        20_000,
    )
    assert (finetune.solver.max_iter, finetune.solver.base_lr, finetune.freeze_zeros) == (32_000, 1e-3, True)
    starts = [None, "initial", "l1reg", "sparse", "finetune"]
    assert [stage.start for stage in recipe.stages.values()] == starts
    assert quantize.quantize is not None and quantize.solver is None


def test_built_in_recipes_load_and_survive_json() -> None:
    assert {"imagenet_jacintonet11", "demo_digits"} <= set(built_in_recipes())
    for name in built_in_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    message = message_of("demo_digit")
    assert "did you mean demo_digits?" in message
    assert "imagenet_jacintonet11" in message
    assert "no such recipe file" in message_of("./mine.toml")


def test_overrides_are_toml_values_and_a_bare_word_is_text() -> None:
    recipe = load_recipe(
        "demo_digits",
        [
            "stages.initial.solver.max_iter=1000",
            "network.strides=[2, 2, 2, 2, 2]",
            "data.train_lmdb=some/lmdb",
            'data.val_lmdb="a \\"quoted\\" name"',
            "stages.l1reg.start=",
            "stages.l1reg.weights=my.caffemodel",
        ],
    )
    assert recipe.stages["initial"].solver.max_iter == 1000
    assert recipe.network.strides == (2, 2, 2, 2, 2)
    assert recipe.data.train_lmdb == "some/lmdb"
    assert recipe.data.val_lmdb == 'a "quoted" name'
    assert (recipe.stages["l1reg"].start, recipe.stages["l1reg"].weights) == (None, "my.caffemodel")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("max_iter = 200", "max_itr = 200", ["stages.initial.solver", "max_iter"]),
        ("max_iter = 200", 'max_iter = "200"', ["stages.initial.solver.max_iter", "whole number"]),
        ("max_iter = 200", "max_iter = 200.5", ["stages.initial.solver.max_iter", "200.5"]),
        ("base_lr = 0.05", "base_lr = nan", ["stages.initial.solver.base_lr", "finite"]),
        ("mirror = false", "mirror = 0", ["data.mirror", "true or false"]),
        ("mirror = false", "miror = false", ["data.miror", "did you mean mirror?", "num_classes"]),
        ("strides = [1, 2", "strides = [1, 'x'", ["network.strides[1]", "whole number"]),
        ('start = "l1reg"', 'start = "l2reg"', ["stages.sparse.start", "l2reg", "initial, l1reg"]),
        ('start = "initial"', 'start = "finetune"', ["stages.l1reg.start", "no earlier stage"]),
        ('dataset = "digits"', 'dataset = "../digits"', ["data.dataset", "cannot name a file"]),
        ('regularization = "L2"', 'regularization = "L3"', ["regularization", "L1, L2"]),
        ("target = 0.8", "target = 80", ["stages.sparse.sparse.target", "less than 1"]),
        ("start_iter = 10", "start_iter = 300", ["stages.sparse.sparse.start_iter", "max_iter 300"]),
        ("freeze_zeros = true", "freeze_zeroes = true", ["stages.finetune", "did you mean freeze_zeros?"]),
        ("num_classes = 10", "num_classes = 1", ["data.num_classes", "2 or more"]),
        ("batch_size = 64", "batch_size = 64\ngpus = [0, 0]", ["training.gpus", "twice"]),
    ],
)
def test_a_mistake_is_one_line_with_file_line_field_and_remedy(
    tmp_path: Path, old: str, new: str, says: list[str]
) -> None:
    path = changed(tmp_path, old, new)
    message = message_of(path)
    line = line_of(path.read_text(), new.split("\n")[-1])
    assert message.startswith(f"{path}:{line}: ")
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[data]\nx = \n", 2, "not TOML"),
        ("[data]\nx = 1\nx = 2\n", 3, "not TOML"),
        ('[data]\nx = """\nnever ends\n', 3, "not TOML"),
        ("", 1, "data: missing"),
        ("stages = 1\n", 1, "stages: is 1; give a table"),
        ('[data]\ntext = """\n[network]\n"""\nx = 1\n', 2, "data.text: no such key"),
        ("[data]\n\n[data.inner]\n'k' = 1\n", 3, "data.inner: no such key"),
    ],
)
def test_lines_are_found_in_odd_files(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    messages = messages_of(path)
    assert any(message.startswith(f"{path}:{line}: ") and says in message for message in messages)


def test_a_missing_field_names_the_line_of_its_table(tmp_path: Path) -> None:
    path = changed(tmp_path, "max_iter = 200\n", "")
    line = line_of(path.read_text(), "[stages.initial.solver]")
    said = f"{path}:{line}: stages.initial.solver.max_iter: missing; add it"
    assert message_of(path) == said
    path.write_text(re.sub(r"(?m)^(base_lr|weight_decay) = .*\n", "", path.read_text()))
    found = messages_of(path)
    assert (found[0], len(found)) == (f"{said}, and base_lr, weight_decay", 4)  # a line for each stage


FIRST_TRY = """\
[data]
dataset = "my flowers"
train_lmdb = "data/train_lmdb"
num_classes = "5"
crop_size = 56

[network]
name = "jacintonet"
strides = [2, 2]
frozen = ["conv1a", "conv1a"]

[stages.initial]
max_iter = 1000
base_lr = 0.1
weight_decay = 1e-4

[stages.sparse]
start = "inital"
target = 0.8

[stages.sparse.solver]
max_itr = 1000
base_lr = 0.1
lr_policy = "step"
"""


def test_all_mistakes_of_all_sections_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FIRST_TRY)
    expected = [
        ("[data]", "training: missing; add [training] with batch_size"),
        ("[data]", "data.val_lmdb: missing; add it"),
        ("dataset", 'data.dataset: the text "my flowers" cannot name a file'),
        ("num_classes", 'data.num_classes: is the text "5"; give a whole number'),
        ("crop_size", "data.crop_size: belongs in [network]; move it there"),
        ("name =", "network.name: jacintonet: no such network; did you mean jacintonet11?"),
        ("frozen", "network.frozen: ['conv1a', 'conv1a'] names a layer twice"),
        ("[stages.initial]", "stages.initial: network.frozen keeps conv1a, conv1a as they are at the start"),
        (
            "max_iter",
            "stages.initial.max_iter: belongs in [stages.initial.solver]; move it there, and base_lr",
        ),
        ("start =", 'stages.sparse.start: no earlier stage produces the weights of "inital"'),
        ("target", "stages.sparse.target: belongs in [stages.sparse.sparse]; move it there"),
        ("[stages.sparse.solver]", "stages.sparse.solver.weight_decay: missing; add it"),
        ("max_itr", "stages.sparse.solver.max_itr: no such key; did you mean max_iter?"),
        ("lr_policy", 'stages.sparse.solver.lr_policy: "step" needs gamma and stepsize; add'),
    ]
    found = messages_of(path)
    assert len(found) == len(expected), "\n".join(found)
    for message, (part, says) in zip(found, expected, strict=True):
        assert message.startswith(f"{path}:{line_of(FIRST_TRY, part)}: {says}")


def test_the_command_shows_each_mistake_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FIRST_TRY)
    command = [sys.executable, "-m", "caffe_jacinto.train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines == [f"caffe_jacinto.train: error: {message}" for message in messages_of(path)]


@given(st.data())
@settings(max_examples=60)
def test_two_mistakes_in_different_keys_are_both_reported(data: st.DataObject) -> None:
    """Each key of the digits' recipe set to a table, which none of them may be, beside another one."""
    keys = data.draw(
        st.lists(
            st.sampled_from(sorted(leaves(load_recipe("demo_digits").model_dump()))),
            min_size=2,
            max_size=2,
            unique=True,
        )
    )
    found = messages_of("demo_digits", *(f"{key}={{}}" for key in keys))
    for key in keys:
        said = [message for message in found if message.startswith(f"override {key}={{}}: {key}: ")]
        assert len(said) == 1
        assert "an empty table" in said[0]


def leaves(table: dict[str, Any], above: str = "") -> Iterator[str]:
    """The dotted keys of all values that are not tables and have one."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        elif value is not None:
            yield f"{above}{key}"


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        (
            ["pattern=2:4"],
            "target",
            "0.8 is more than the 0.5 that the pattern 2:4 makes zero; set target = 0.5",
        ),
        (["pattern=1:3", "target=0.7"], "target", "0.7 is more than the 0.6667 .* set target = 0.666$"),
        (["regrow_fraction=0.2"], "regrow_fraction", 'no effect without method = "rigl"; add that'),
        (["pattern=1:8", "method=rigl"], "pattern", "moves weights out of the pattern 1:8; remove one"),
        (
            ["method=rigl", "start_iter=50", "regrow_until=0.01"],
            "regrow_until",
            r"0.01 of max_iter \d+ is not above start_iter 50, so no weight would change places",
        ),
        (["pattern=1:8", "by=layer"], "by", "the pattern 1:8 prunes each 8 input channels by themselves"),
        (["pattern=1:8", "targets={conv1a=0.5}"], "targets", "choose with layers or skip"),
        (["schedule=cubic", "start_factor=0.8"], "start_factor", "0.8 is not below 0.8; make it smaller"),
    ],
)
def test_pruning_settings_that_do_not_go_together(settings: list[str], field: str, says: str) -> None:
    message = message_of("demo_digits", *(f"stages.sparse.sparse.{setting}" for setting in settings))
    assert re.search(rf"stages\.sparse\.sparse\.{field}: .*{says}", message)


def test_a_stage_counts_inner_products_where_the_one_that_it_continues_prunes_them() -> None:
    sparse = "stages.sparse.sparse.inner_products=true"
    recipe = load_recipe("demo_digits", [sparse])
    assert [name for name in recipe.stages if recipe.counts_inner_products(name)] == ["sparse", "finetune"]
    recipe = load_recipe("demo_digits")
    assert not any(recipe.counts_inner_products(name) for name in recipe.stages)
    alone = ["stages.finetune.start=", "stages.finetune.weights=sparse.caffemodel"]
    recipe = load_recipe("demo_digits", [sparse, *alone])
    assert not recipe.counts_inner_products("finetune")
    recipe = load_recipe("demo_digits", [*alone, "stages.finetune.freeze_inner_products=true"])
    assert recipe.counts_inner_products("finetune")


@pytest.mark.parametrize(
    ("key", "table"),
    [
        *(
            (key, "stages.NAME.solver")
            for key in ("max_iter", "base_lr", "weight_decay", "lr_policy", "type")
        ),
        *((key, "stages.NAME.sparse") for key in ("target", "start_iter", "step_iter", "by")),
    ],
)
def test_a_key_below_the_stage_is_pointed_to_its_table(key: str, table: str) -> None:
    (message,) = messages_of("demo_digits", f"stages.initial.{key}=1")
    home = table.replace("NAME", "initial")
    assert (
        message
        == f"override stages.initial.{key}=1: stages.initial.{key}: belongs in [{home}]; move it there"
    )


def test_a_network_that_cannot_be_built_is_a_mistake_of_its_line(tmp_path: Path) -> None:
    path = changed(tmp_path, "strides = [1, 2, 2, 2, 2]", "strides = [1, 2]")
    line = line_of(path.read_text(), "strides")
    assert message_of(path).startswith(
        f"{path}:{line}: network.strides: strides 1,2: jacintonet11 takes five"
    )


def test_the_least_that_a_recipe_needs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[data]\ndataset = "a"\ntrain_lmdb = "t"\nval_lmdb = "v"\nnum_classes = 2\n'
        '[network]\nname = "jacintonet11"\ncrop_size = 32\n[training]\nbatch_size = 8\n'
        "[stages.a.solver]\nmax_iter = 205\nbase_lr = 0.1\nweight_decay = 0.0\n"
    )
    recipe = load_recipe(str(path))
    solver = recipe.stages["a"].solver
    assert (recipe.training.iter_size, solver.regularization) == (1, "L2")
    assert (solver.test_interval, solver.snapshot) == (21, 21)  # a tenth, rounded up
    key = "stages.a.solver"
    longer = load_recipe(str(path), [f"{key}.max_iter=320000"]).stages["a"].solver
    assert (longer.test_interval, longer.snapshot) == (10_000, 10_000)
    tested = (
        load_recipe(str(path), [f"{key}.max_iter=320000", f"{key}.test_interval=3000"]).stages["a"].solver
    )
    assert (tested.test_interval, tested.snapshot) == (3000, 12_000)  # a snapshot falls on a test
    again = load_recipe("demo_digits", ["stages.initial.solver.snapshot="]).stages["initial"].solver
    assert (again.test_interval, again.snapshot) == (100, 100)


def quantizing(folder: Path, quantize: str, more: str = "") -> Path:
    """The digits' recipe with a stage that quantizes its result."""
    path = folder / "mine.toml"
    text = DIGITS.read_text() + f'\n[stages.eight]\nstart = "finetune"\n{more}\n'
    path.write_text(f"{text}\n[stages.eight.quantize]\n{quantize}\n")
    return path


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        (
            {"quantize.scheme": "caffe_jacinto"},
            "quantize.scheme",
            'tests only; train with "processor" or "power2"',
        ),
        ({"quantize.bias_correction": "true"}, "quantize.bias_correction", "corrects the biases by itself"),
        ({"quantize.sensitivity": "true"}, "quantize.sensitivity", "only a stage without a solver has it"),
        ({"quantize.batch": "10"}, "quantize.batch", "only a stage without a solver has it"),
        ({"quantize.settle_iter": "61"}, "quantize.settle_iter", "61 is above the stage's max_iter 60"),
        ({"quantize.freeze_bn_iter": "-1"}, "quantize.freeze_bn_iter", "is -1; give 0 or more"),
        ({"quantize.bits": "4", "start": ""}, "start", "begins with trained weights; name their stage"),
        (
            {"quantize.bits": "4", "solver.ema_decay": "0.9"},
            "solver.ema_decay",
            "of other weights than their",
        ),
        ({"quantize.bits": "4", "sparse.start_iter": "1"}, "sparse", "prune in an earlier one"),
    ],
)
def test_what_does_not_go_with_training_in_quantized_values(
    settings: dict[str, str], field: str, says: str
) -> None:
    freeze = [] if "sparse.start_iter" in settings or "start" in settings else ["freeze_zeros=true"]
    overrides = [f"{key}={value}" for key, value in settings.items()]
    overrides += freeze or ["freeze_zeros=false"]
    with pytest.raises(UserError) as error:
        load_recipe(
            "demo_digits", [f"stages.finetune.{setting}" for setting in overrides], rules=RECIPE_RULES
        )
    assert any(f"stages.finetune.{field}" in line and says in line for line in error.value.lines()), (
        error.value
    )


def test_only_a_stage_that_trains_has_ranges_that_settle(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"quantize\.settle_iter: only a stage with a solver has it; remove it"
    ):
        load_recipe(str(quantizing(tmp_path, "settle_iter = 3")), rules=RECIPE_RULES)


def test_a_stage_without_a_solver_quantizes_an_earlier_one(tmp_path: Path) -> None:
    path = quantizing(tmp_path, 'scheme = "power2"\nbits_of = { fc10 = 16 }')
    recipe = load_recipe(str(path), rules=RECIPE_RULES)
    stage = recipe.stages["eight"]
    assert (stage.solver, stage.max_iter, stage.start) == (None, 0, "finetune")
    assert stage.quantize is not None
    assert (stage.quantize.scheme, stage.quantize.bits, stage.quantize.batches) == ("power2", None, 50)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    defaults = load_recipe(str(quantizing(tmp_path, "")), rules=RECIPE_RULES).stages["eight"].quantize
    assert defaults is not None
    assert chosen_scheme(defaults.model_dump()) == SCHEMES["processor"]


@pytest.mark.parametrize(
    ("quantize", "more", "field", "says"),
    [
        ('scheme = "prozessor"', "", ".quantize.scheme", "did you mean processor?"),
        ("bits = 17", "", ".quantize.bits", "is 17; give 16 or less"),
        ("bias_bits = 1", "", ".quantize.bias_bits", "is 1; give 2 or more"),
        ("bits_of = { fc10 = 1 }", "", ".quantize.bits_of.fc10", "is 1; give 2 or more"),
        ('ranges = "mean"', "", ".quantize.ranges", "known: minmax, percentile, mse"),
        ("percentile = 50", "", ".quantize.percentile", "give more than 50"),
        ("percentile = 99", "", ".quantize.percentile", "only ranges by percentile have one"),
        ("batches = 0", "", ".quantize.batches", "is 0; give 1 or more"),
        ('scheme = "caffe_jacinto"\nranges = "mse"', "", ".quantize.ranges", "has ranges of its own; leave"),
        ('keep_float = ["a", "a"]', "", ".quantize.keep_float", "has a name twice"),
        ('keep_float = ["a"]\nbits_of = { a = 4 }', "", ".quantize.bits_of", "a is in keep_float, too"),
        ("", 'teacher = "initial"', ".teacher", "a stage without a solver quantizes a trained network"),
        ("", "distill = true", ".distill", "a stage without a solver quantizes a trained network"),
        ("", "freeze_zeros = true", ".freeze_zeros", "a stage without a solver quantizes a trained network"),
        ("", "bits = 8", ".bits", "belongs in [stages.eight.quantize]; move it there"),
    ],
)
def test_mistakes_of_a_stage_that_quantizes(
    tmp_path: Path, quantize: str, more: str, field: str, says: str
) -> None:
    message = message_of(quantizing(tmp_path, quantize, more))
    assert f": stages.eight{field}: " in message
    assert says in message


def test_a_stage_that_quantizes_needs_a_trained_one_and_gives_no_weights(tmp_path: Path) -> None:
    path = quantizing(tmp_path, "")
    assert "stages.eight.start: missing; name the stage" in message_of(path, "stages.eight.start=")
    path.write_text(path.read_text() + '[stages.nine]\nstart = "eight"\nquantize = {}\n')
    assert 'no earlier stage produces the weights of "eight"' in message_of(path)
    text = DIGITS.read_text()
    path.write_text(text[: text.index("[stages.")] + '[stages.eight]\nstart = "a"\nquantize = {}\n')
    assert any("stages: none of them has a solver" in message for message in messages_of(path))


def test_a_stage_with_neither_solver_nor_quantize_lacks_a_solver(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    said = "stages.initial.solver: missing; add [stages.initial.solver] with max_iter, base_lr, weight_decay"
    path.write_text(DIGITS.read_text() + "[stages.more]\nfreeze_zeros = false\n")
    assert message_of(path).endswith(said.replace("initial", "more"))


def test_not_utf8_and_not_a_file(tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in message_of(path)
    assert "cannot be read: Is a directory" in message_of(f"{tmp_path}/")
    assert "cannot be read: File name too long" in message_of(f"./{'a' * 300}.toml")
    assert "the built-in recipe is called demo_digits" in message_of("demo_digits.toml")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000 + "]" * 5000])
def test_a_value_beyond_the_toml_parser_is_a_mistake_too(tmp_path: Path, value: str) -> None:
    path = changed(tmp_path, "max_iter = 200", f"max_iter = {value}")
    assert message_of(path).startswith(f"{path}: a value that a recipe cannot have: ")
    assert "give a whole number" in message_of("demo_digits", f"stages.initial.solver.max_iter={value}")


def test_an_override_makes_no_stage_by_a_misspelt_name() -> None:
    message = message_of("demo_digits", "stages.intial.solver.max_iter=3")
    assert message == (
        "override stages.intial.solver.max_iter=3: no such stage intial; did you mean initial? "
        "known: initial, l1reg, sparse, finetune, quantize"
    )


def test_an_empty_text_takes_any_optional_setting_away() -> None:
    alexnet = load_recipe(
        "imagenet_bvlc_alexnet",
        [
            *(
                "data.mean_file=",
                "network.strides=",
                "stages.initial.sparse=",
                "stages.initial.solver.stepsize=",
            ),
            *("stages.initial.solver.gamma=", "stages.initial.solver.lr_policy=fixed"),
            "stages.initial.solver.clip_gradients=",
        ],
    )
    solver = alexnet.stages["initial"].solver
    assert (solver.gamma, solver.stepsize, solver.clip_gradients) == (None, None, None)
    assert (alexnet.data.mean_file, alexnet.network.strides) == (None, None)
    assert load_recipe("demo_digits", ["stages.sparse.sparse="]).stages["sparse"].sparse is None


def test_an_empty_text_takes_a_stage_away() -> None:
    assert list(load_recipe("demo_digits", ["stages.quantize="]).stages) == [
        *("initial", "l1reg", "sparse", "finetune"),
    ]
    assert 'no earlier stage produces the weights of "l1reg"' in message_of("demo_digits", "stages.l1reg=")
    assert message_of("demo_digits", "stages.quantise=") == (
        "override stages.quantise=: no such stage quantise; did you mean quantize? "
        "known: initial, l1reg, sparse, finetune, quantize"
    )
    assert "stages is a value, so nothing is below it" in message_of(
        "demo_digits", "stages=3", "stages.quantize="
    )


def test_an_override_sets_one_value() -> None:
    """A newline in it begins no second TOML statement."""
    assert "give a whole number" in message_of("demo_digits", "stages.initial.solver.max_iter=3\nx=2")
    assert load_recipe("demo_digits", ["data.train_lmdb=a\nb=2"]).data.train_lmdb == "a\nb=2"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.initial.solver.max_itr=1", "did you mean max_iter?"),
        ("stages.initial.solver.max_iter=many", 'the text "many"'),
        ("stages.initial.solver.max_iter", "KEY.KEY=VALUE"),
        ("=5", "KEY.KEY=VALUE"),
        ("a b=5", "KEY.KEY=VALUE"),
        ("#x=1", "KEY.KEY=VALUE"),
        ("[x]#=1", "KEY.KEY=VALUE"),
        ("data.dataset.name=5", "data.dataset is a value"),
        ("stages.l1reg.weights=x.caffemodel", "not from both"),
        ("stages.initial.freeze_zeros=true", "no zeros"),
        ("stages.sparse.freeze_zeros=true", "freezes its zeros itself"),
        ("stages.initial.solver.lr_policy=step", "needs gamma and stepsize"),
        ("stages.initial.solver.gamma=-0.1", '-0.1 is not above 0; only that of "sigmoid" may be negative'),
        ("stages.initial.solver.gamma=0", "solver.gamma: 0 is not above 0"),
        ("stages.initial.solver.lr_policy=one_cycle", "needs warmup_iter; add to the solver, for example,"),
        ("stages.sparse.teacher=dense", '"dense" is not an earlier stage (earlier stages: initial, l1reg)'),
        ("stages.initial.teacher=initial", '"initial" is not an earlier stage (there is no earlier stage)'),
        ("stages.sparse.teacher_prototxt=x", "no effect without teacher; add it, or remove this"),
        ("stages.sparse.temperature=2.0", "no effect without distill = true or a teacher"),
        ("stages.sparse.teacher_weight=0.7", "no effect without distill = true or a teacher"),
        ("data.crop_max_aspect=2.0", "no effect without crop_min_area; add it, or remove this"),
        ("stages.initial.distill=true", "no dense network is trained before this stage; set `start` or"),
        ("stages.initial.solver.warmup_iter=200", "200 is not below the stage's max_iter 200; make it"),
        (
            "stages.initial.solver.image_sizes=[[0, 16], [9]]",
            "[9] is not an iteration and the size from there",
        ),
        (
            "stages.initial.solver.image_sizes=[[0, 16], [0, 32]]",
            "the iterations 0, 0 do not grow; name them",
        ),
        (
            "stages.initial.solver.image_sizes=[[0, 9], [200, 32]]",
            "200 is not below the stage's max_iter 200",
        ),
        ("stages.initial.solver.lr_policy=stepp", "did you mean step?"),
        ("stages.initial.solver.type=AdaGrad", "momentum"),
        ("stages.initial.solver.rms_decay=0.9", 'no effect with type "SGD", only with RMSProp; remove it'),
        ("stages.initial.solver.momentum2=1.0", "less than 1"),
        ("stages.initial.solver.delta=0.0", "more than 0"),
        ("stages={}", "at least one stage"),
        ("network.strides=2", "a list"),
        ("stages.sparse.sparse.pattern=4:2", 'give "n:m" with n below m'),
        ("stages.sparse.sparse.targets.conv1a=2", "more than 0 and less than 1"),
        ("stages.sparse.sparse.schedule=cube", "did you mean cubic?"),
        ("stages.sparse.sparse.skip=['a','a']", "has a name twice"),
        ("stages.sparse.freeze_inner_products=true", "no effect without freeze_zeros"),
        ("stages.initial.solver.base_lr=1e39", "or less"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override: str, says: str) -> None:
    message = message_of("demo_digits", override)
    assert message.startswith(f"override {override}: ")
    assert says in message


@pytest.mark.parametrize("name", ["test", "Test", "Initial", "../up", "a.b", "a b", ".hidden"])
def test_a_stage_name_that_makes_a_bad_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.toml"
    solver = 'max_iter=1, base_lr=1, weight_decay=0, regularization="L2", test_interval=1, snapshot=1'
    path.write_text(DIGITS.read_text() + f"\n[stages.{json.dumps(name)}]\nsolver = {{{solver}}}\n")
    line = line_of(path.read_text(), f"[stages.{json.dumps(name)}]")
    assert message_of(path).startswith(f"{path}:{line}: stages.")


@settings(max_examples=50)
@given(st.text(max_size=40))
@example("a\nb=1")
@example('"\\n\u2028".x=1')
def test_any_override_text_is_applied_or_refused_in_one_line(text: str) -> None:
    try:
        load_recipe("demo_digits", [text])
    except UserError as error:
        assert "\n" not in str(error)


def test_the_guide_names_every_built_in_recipe() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert {name for name in built_in_recipes() if f"| `{name}` |" not in guide} == set()


def test_the_guide_names_every_key_with_its_default() -> None:
    from caffe_jacinto.recipes import model

    guide = Path(__file__).parents[1] / "docs" / "recipes.md"
    rows: dict[str, str] = {}
    section = ""
    for line in guide.read_text().split("\n"):
        if line.startswith("#"):
            section = line.strip("# `")
        elif line.startswith("| `"):
            names, shown = (cell.split(", ") for cell in line.split("|")[1:3])
            for name, default in zip(names, shown * len(names), strict=False):
                rows[f"{section} {name.strip(' `')}"] = default.strip(" `")
    tables = {
        "[data]": model.DataSettings,
        "[network]": model.NetworkSettings,
        "[training]": model.TrainingSettings,
        "[stages.NAME]": model.Stage,
        "[stages.NAME.solver]": model.SolverSettings,
        "[stages.NAME.sparse]": model.SparseSettings,
        "[stages.NAME.quantize]": model.QuantizeSettings,
    }
    computed = {
        "test_interval": "max_iter / 10",
        "snapshot": "max_iter / 10",
    }

    def shown_default(name: str, field: FieldInfo) -> str:
        if field.default_factory is not None:
            return computed[name]
        return "" if field.is_required() or field.default is None else json.dumps(field.default)

    expected = {
        f"{table} {name}": shown_default(name, field)
        for table, described in tables.items()
        for name, field in described.model_fields.items()
    }
    assert {name: shown for name, shown in rows.items() if name.startswith("[")} == expected
