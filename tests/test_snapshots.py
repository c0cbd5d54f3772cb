"""Which snapshots training can resume from."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffe_jacinto.caffemodel import hdf5
from caffe_jacinto.common.errors import UserError
from caffe_jacinto.engines.snapshots import (
    complete_snapshots,
    final_is_complete,
    is_marked_complete,
    iteration_of,
    mark_complete,
    start_point,
    survey,
)
from caffe_jacinto.prototxt.dialects import Dialect
from caffe_jacinto.prototxt.schema import messages
from caffe_jacinto.pruning.pruner import save_masks

SHAPES = ((4, 3, 3, 3), (4,))
WEIGHTS = {"conv": np.full(SHAPES[0], 0.5, np.float32)}


def write_pair(
    prefix: Path,
    iteration: int,
    *,
    dialect: Dialect = Dialect.BVLC,
    learned_net: str | None = None,
    state_iteration: int | None = None,
    history: tuple[tuple[int, ...], ...] = SHAPES,
) -> None:
    """The two files of a snapshot, as Caffe writes them."""
    model = Path(f"{prefix}_iter_{iteration}.caffemodel")
    net = messages(dialect).NetParameter(name="net")
    layer = net.layer.add(name="conv", type="Convolution")
    for shape in SHAPES:
        fill(layer.blobs.add(), shape)
    model.write_bytes(net.SerializeToString())
    state = messages(dialect).SolverState(
        iter=iteration if state_iteration is None else state_iteration,
        learned_net=f"elsewhere/{model.name}" if learned_net is None else learned_net,
    )
    for shape in history:
        fill(state.history.add(), shape)
    model.with_suffix(".solverstate").write_bytes(state.SerializeToString())


def fill(blob: object, shape: tuple[int, ...]) -> None:
    count = 1
    for dim in shape:
        count *= dim
    blob.shape.dim.extend(shape)  # type: ignore[attr-defined]
    blob.data.extend([0.5] * count)  # type: ignore[attr-defined]


def test_newest_first(tmp_path: Path) -> None:
    for iteration in (900, 1000, 5):
        write_pair(tmp_path / "a_b", iteration)
    write_pair(tmp_path / "a_b_c", 2000)
    found = complete_snapshots(tmp_path / "a_b", Dialect.BVLC)
    assert [snapshot.iteration for snapshot in found] == [1000, 900, 5]
    assert found[0].caffemodel == tmp_path / "a_b_iter_1000.caffemodel"
    assert found[0].solverstate == tmp_path / "a_b_iter_1000.solverstate"


def test_no_snapshots_and_no_folder(tmp_path: Path) -> None:
    assert complete_snapshots(tmp_path / "a", Dialect.BVLC) == []
    assert complete_snapshots(tmp_path / "none" / "a", Dialect.BVLC) == []


@pytest.mark.parametrize("extension", ["caffemodel", "solverstate"])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, extension: str, share: float
) -> None:
    folder = tmp_path_factory.getbasetemp()
    prefix = folder / f"cut_{extension}"
    write_pair(prefix, 10)
    write_pair(prefix, 20)
    file = Path(f"{prefix}_iter_20.{extension}")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    found = survey(prefix, Dialect.BVLC)
    assert [snapshot.iteration for snapshot in found.complete] == [10]
    ((iteration, reason),) = found.skipped
    assert iteration == 20
    assert str(file) in reason or "a different network" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ({"state_iteration": 19}, "records iteration 19, not 20"),
        ({"learned_net": "x/a_iter_10.caffemodel"}, "belongs to x/a_iter_10.caffemodel"),
        ({"history": ((4, 3, 3, 3),)}, "a different network"),
        ({"history": ((4, 3, 5, 5), (4,))}, "a different network"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, mistake: dict[str, object], reason: str) -> None:
    write_pair(tmp_path / "a", 20, **mistake)  # type: ignore[arg-type]
    found = survey(tmp_path / "a", Dialect.BVLC)
    assert not found.complete
    assert reason in found.skipped[0].reason


def test_one_file_of_two(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", 20)
    (tmp_path / "a_iter_20.solverstate").unlink()
    assert "a_iter_20.solverstate is missing" in survey(tmp_path / "a", Dialect.BVLC).skipped[0].reason


def test_adam_has_two_histories(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", 20, history=SHAPES * 2)
    assert complete_snapshots(tmp_path / "a", Dialect.BVLC)


def test_the_forks_weights_are_held_against_the_network_beside_them(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", 20, dialect=Dialect.CAFFE_JACINTO, history=(SHAPES[0],))
    assert complete_snapshots(tmp_path / "a", Dialect.CAFFE_JACINTO)
    layers = "".join(
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}"\n'
        f"  convolution_param {{ num_output: 4 kernel_size: 3 }} }}\n"
        for name, bottom in (("conv", "data"), ("later", "conv"))
    )
    data = 'input: "data" input_shape { dim: 1 dim: 3 dim: 9 dim: 9 }\n'
    (tmp_path / "train.prototxt").write_text(data + layers)
    found = survey(tmp_path / "a", Dialect.CAFFE_JACINTO)
    assert not found.complete
    assert "later: not in the weight file" in found.skipped[0].reason


def test_where_zeros_are_held_a_snapshot_needs_its_masks(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        write_pair(tmp_path / "a", iteration)
        save_masks(tmp_path / f"a_iter_{iteration}.solverstate", {}, 0.5, WEIGHTS)
    (tmp_path / "a_iter_30.masks.npz").unlink()
    damaged = tmp_path / "a_iter_40.masks.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    found = survey(tmp_path / "a", Dialect.BVLC)
    assert [snapshot.iteration for snapshot in found.complete] == [20, 10]
    assert "a_iter_40.masks.npz cannot be used" in found.skipped[0].reason
    assert "a_iter_30.masks.npz is missing" in found.skipped[1].reason


def test_where_weights_are_averaged_a_snapshot_needs_its_average(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        write_pair(tmp_path / "a", iteration)
        shutil.copy(
            tmp_path / f"a_iter_{iteration}.caffemodel", tmp_path / f"a_iter_{iteration}.ema.caffemodel"
        )
    (tmp_path / "a_iter_40.ema.caffemodel").unlink()  # the last iteration's weights are the average
    assert start_point(tmp_path / "a", Dialect.BVLC, 40, averaged_before=40).iteration == 40
    damaged = tmp_path / "a_iter_30.ema.caffemodel"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "a_iter_20.ema.caffemodel").unlink()
    found = start_point(tmp_path / "a", Dialect.BVLC, 50, averaged_before=50)
    assert found.iteration == 10
    assert [skipped.iteration for skipped in found.skipped] == [40, 30, 20]
    assert "a_iter_30.ema.caffemodel" in found.skipped[1].reason
    assert "a_iter_20.ema.caffemodel is missing" in found.skipped[2].reason
    # Up to an iteration before the end, its snapshot needs its average too.
    assert start_point(tmp_path / "a", Dialect.BVLC, 30, averaged_before=40).iteration == 10


def test_where_weights_are_averaged_none_without_its_average_is_usable(tmp_path: Path) -> None:
    for iteration in (10, 20):
        write_pair(tmp_path / "a", iteration)
    assert start_point(tmp_path / "a", Dialect.BVLC, 40).iteration == 20
    found = start_point(tmp_path / "a", Dialect.BVLC, 40, averaged_before=40)
    assert found.snapshot is None
    assert [skipped.iteration for skipped in found.skipped] == [20, 10]


def test_an_average_of_another_network_is_not_used(tmp_path: Path) -> None:
    net = messages(Dialect.BVLC).NetParameter(name="net")
    fill(net.layer.add(name="conv", type="Convolution").blobs.add(), (4, 3, 1, 1))
    for iteration, name in ((10, "conv"), (20, "other")):
        write_pair(tmp_path / "a", iteration)
        net.layer[0].name = name
        (tmp_path / f"a_iter_{iteration}.ema.caffemodel").write_bytes(net.SerializeToString())
    found = survey(tmp_path / "a", Dialect.BVLC, averaged_before=40)
    assert not found.complete
    assert "a_iter_20.ema.caffemodel: lacks layer conv" in found.skipped[0].reason
    assert "a_iter_10.ema.caffemodel: layer conv has other shapes than in" in found.skipped[1].reason


def test_where_masks_are_needed_none_without_them_is_usable(tmp_path: Path) -> None:
    for iteration in (10, 20):
        write_pair(tmp_path / "a", iteration)
    assert start_point(tmp_path / "a", Dialect.BVLC, 20).iteration == 20
    found = start_point(tmp_path / "a", Dialect.BVLC, 20, masks=True)
    assert found.snapshot is None
    assert [reason.rpartition("/")[2] for _, reason in found.skipped] == [
        f"a_iter_{iteration}.masks.npz is missing, which says which zeros are frozen"
        for iteration in (20, 10)
    ]


def test_masks_of_another_snapshot_are_passed_over(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        write_pair(tmp_path / "a", iteration)
        save_masks(tmp_path / f"a_iter_{iteration}.solverstate", {}, 0.5, WEIGHTS)
    model = tmp_path / "a_iter_20.caffemodel"
    half, other = struct.pack("<f", 0.5), struct.pack("<f", 0.25)
    model.write_bytes(model.read_bytes().replace(half, other, 1))
    (tmp_path / "a_iter_10.masks.npz").rename(tmp_path / "a_iter_30.masks.npz")
    write_pair(tmp_path / "a", 30)
    file = tmp_path / "a_iter_30.caffemodel"
    file.write_bytes(file.read_bytes().replace(half, other, 1))
    save_masks(tmp_path / "a_iter_10.solverstate", {}, 0.5, WEIGHTS)
    found = start_point(tmp_path / "a", Dialect.BVLC, 30, masks=True)
    assert found.iteration == 10
    reasons = dict(found.skipped)
    assert "a_iter_30.masks.npz is of a_iter_10, and does not belong to" in reasons[30]
    assert "a_iter_20.masks.npz is of other weights, and does not belong to" in reasons[20]


def test_masks_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have neither the snapshot's name nor its weights' digests."""
    frozen = np.ones(SHAPES[0], np.float32)
    for iteration, bits in ((10, frozen), (20, 0 * frozen), (30, frozen[:3])):
        write_pair(tmp_path / "a", iteration)
        np.savez(
            tmp_path / f"a_iter_{iteration}.masks.npz", factor=0.5, **{"frozen/conv": np.packbits(bits != 0)}
        )
    found = survey(tmp_path / "a", Dialect.BVLC, masks=True)
    assert [snapshot.iteration for snapshot in found.complete] == [10]
    assert "is of other weights" in found.skipped[0].reason
    assert "108 frozen weights are not zero" in found.skipped[1].reason


def test_a_prefix_of_any_characters_has_its_masks(tmp_path: Path) -> None:
    prefix = tmp_path / "a[1]*"
    write_pair(prefix, 2)
    write_pair(prefix, 20)
    save_masks(Path(f"{prefix}_iter_2.solverstate"), {}, 0.5, WEIGHTS)
    found = survey(prefix, Dialect.BVLC)
    assert [snapshot.iteration for snapshot in found.complete] == [2]
    assert "a[1]*_iter_20.masks.npz is missing" in found.skipped[0].reason


def test_a_stage_goes_on_from_its_newest_good_snapshot_and_names_the_newer_ones(tmp_path: Path) -> None:
    prefix = tmp_path / "a_7"
    for iteration in (5, 10, 20, 30, 40):
        write_pair(prefix, iteration)
    (tmp_path / "a_7_iter_5.solverstate").unlink()
    model = tmp_path / "a_7_iter_20.caffemodel"
    model.write_bytes(model.read_bytes().replace(struct.pack("<f", 0.5), struct.pack("<f", float("nan"))))
    (tmp_path / "a_7_iter_30.solverstate").unlink()
    found = start_point(prefix, Dialect.BVLC, 35)
    assert found.iteration == 10
    reasons = {skipped.iteration: skipped.reason for skipped in found.skipped}
    assert sorted(reasons) == [20, 30, 40]
    assert "not numbers" in reasons[20]
    assert "a_7_iter_30.solverstate is missing" in reasons[30]
    assert reasons[40] == "it is beyond iteration 35"
    nothing = start_point(tmp_path / "b", Dialect.BVLC, 35)
    assert (nothing.snapshot, nothing.iteration, nothing.skipped) == (None, 0, ())


def test_hdf5_files_have_their_layers_in_any_order(tmp_path: Path) -> None:
    """Groups of a large file are not always where those before them end."""
    shapes = {"first": (4, 3), "second": (2, 4), "third": (5, 2)}
    blobs = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for iteration, missing in ((10, ""), (20, "first")):
        weights = tmp_path / f"a_iter_{iteration}.caffemodel.h5"
        hdf5.write_weights(weights, {name: {0: blobs[name]} for name in ("third", "first", "second")})
        hdf5.write_state(
            tmp_path / f"a_iter_{iteration}.solverstate.h5",
            iteration=iteration,
            current_step=0,
            learned_net=weights.name,
            history=[blob for name, blob in blobs.items() if name != missing],
            own={},
        )
    found = survey(tmp_path / "a", Dialect.BVLC)
    assert [snapshot.caffemodel.name for snapshot in found.complete] == ["a_iter_10.caffemodel.h5"]
    assert [skipped.iteration for skipped in found.skipped] == [20]
    assert final_is_complete(tmp_path / "a_iter_10.caffemodel.h5", Dialect.BVLC)


def test_final_weights(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", 20)
    assert final_is_complete(tmp_path / "a_iter_20.caffemodel", Dialect.BVLC)
    assert not final_is_complete(tmp_path / "a_iter_30.caffemodel", Dialect.BVLC)
    assert iteration_of(Path("x/a_iter_7_iter_20.caffemodel")) == 20
    with pytest.raises(UserError, match="not named as a snapshot"):
        iteration_of(Path("other.caffemodel"))


def test_the_completion_record_is_of_exactly_these_weights(tmp_path: Path) -> None:
    final = tmp_path / "a_iter_20.caffemodel"
    write_pair(tmp_path / "a", 20)
    assert not is_marked_complete(final)
    mark_complete(final, 30)
    assert is_marked_complete(final)
    final.write_bytes(final.read_bytes() + b"x")
    assert not is_marked_complete(final)
    for broken in ("", "[]", '{"sha256": 1}', "{"):
        (tmp_path / "a_iter_20.handover.json").write_text(broken)
        assert not is_marked_complete(final)
