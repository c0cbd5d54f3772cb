"""The page of a report: what it is made of, and what a browser shows of it."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from hypothesis import given
from hypothesis import strategies as st
from log_text import GIGAMACS, Log, whole_stage

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.logs import page_content, tables
from caffe_jacinto.logs.discover import find_runs
from caffe_jacinto.logs.history import Buckets, thinned
from caffe_jacinto.logs.page import State, write_page
from caffe_jacinto.logs.stage import StageLog
from caffe_jacinto.report import main


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def nothing_is_loaded(request: pytest.FixtureRequest) -> Iterator[None]:
    """No page has an error in a script, is refused anything, or asks for more than itself."""
    yield
    if "browser" in request.fixturenames:
        used: Browser = request.getfixturevalue("browser")
        assert used.errors == []
        assert [url for url in used.requests if not re.fullmatch(r"file://.*\.html", url)] == []


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def page(*paths: Path, to: Path) -> Path:
    assert main([*map(str, paths), "--html", str(to)]) == 0
    return to


def sparse_stage(*fractions: float) -> Log:
    """A training of 40 iterations for each of the fractions, which the listings state."""
    log = Log().start(max_iter=40 * len(fractions)).test(0, 0.75, 0.95, 0.7)
    for number, fraction in enumerate(fractions):
        log.iterate(40 * number, 40 * number + 30).sparsity(fraction, 0.1)
    last = 40 * len(fractions)
    return log.done(last).test(last, 0.7, 0.9, 0.75).end()


A_TEST = Log().line("caffe.cpp", "Use CPU.").net("TEST", 50).line("caffe.cpp", "Running for 2 iterations.")
for result in ("Loss: 0.5", "loss = 0.5 (* 1 = 0.5 loss)", "nearly right = 0.9", "right = 0.8"):
    A_TEST.line("caffe.cpp", result)


def a_run(folder: Path) -> Path:
    write(folder / "initial" / "run.log", whole_stage().text)
    write(folder / "sparse" / "run.log", sparse_stage(0.1, 0.4, 0.805).text)
    write(folder / "test" / "run.log", A_TEST.text)
    return folder


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), most=st.integers(2, 20))
def test_a_thinned_curve_keeps_its_extremes_and_its_mean(values: list[float], most: int) -> None:
    curve = Buckets(most)
    for iteration, value in enumerate(values):
        curve.add(iteration, value)
    for found in (curve.all(), thinned(curve.all(), 3)):
        assert len(found) <= most
        assert sum(bucket.points for bucket in found) == len(values)
        assert min(bucket.low for bucket in found) == min(values)
        assert max(bucket.high for bucket in found) == max(values)
        assert sum(bucket.total for bucket in found) == pytest.approx(sum(values), abs=1e-3)
        assert (found[0].first, found[-1].last) == (0, len(values) - 1)
        for before, after in itertools.pairwise(found):
            assert before.last + 1 == after.first
        for bucket in found:
            inside = values[int(bucket.first) : int(bucket.last) + 1]
            assert (bucket.low, bucket.high) == (min(inside), max(inside))


def test_a_curve_of_few_points_has_each_of_them() -> None:
    curve = Buckets(10)
    for iteration in range(0, 100, 10):
        curve.add(iteration, iteration / 7)
    assert [(bucket.first, bucket.mean, bucket.points) for bucket in curve.all()] == [
        (iteration, iteration / 7, 1) for iteration in range(0, 100, 10)
    ]


def test_a_resumed_stage_replaces_what_lay_beyond_and_the_pause_takes_no_time() -> None:
    log = Log().start(max_iter=60)
    log.test(0, 0.1, 0.5, 2.3).iterate(0, 40).test(40, 0.3, 0.6, 2.0)
    log.second += 3600
    log.start(max_iter=60).line("caffe.cpp", "Resuming from a/b_iter_20.solverstate")
    log.iterate(20, 50).test(60, 0.7, 0.9, 1.0).end()
    stage = StageLog(history=True)
    stage.feed(log.text.encode())
    stage.close()
    history = stage.history
    assert history is not None
    assert [bucket.first for bucket in history.loss.all()] == [0, 10, 20, 30, 40, 50]
    top1 = [(bucket.first, bucket.mean) for bucket in history.outputs["right"].all()]
    assert top1 == [(0, 0.1), (40, 0.3), (60, 0.7)]
    assert history.losses == {"loss"}
    seconds = list(history.seconds(None))
    assert [iteration for iteration, _ in seconds] == [0, 10, 20, 30, 40, 50, 60]
    assert seconds[-1][1] == pytest.approx(5 + 20, abs=1)


def test_sparsity_by_layer_stands_at_the_iteration_that_follows_it_in_the_log() -> None:
    log = Log().start(max_iter=40).iterate(0, 10).sparsity(0.25, 0.1).iterate(20, 30).sparsity(0.5, 0.1)
    log.line("solver.cpp", "Snapshotting to binary proto file a/b_iter_40.caffemodel").end()
    stage = StageLog(history=True)
    stage.feed(log.text.encode())
    stage.close()
    history = stage.history
    assert history is not None
    found = [(listing.iteration, listing.layers["conv"]) for listing in history.listings]
    assert found == [(20, 0.25), (40, 0.5)]
    assert [(bucket.first, bucket.mean) for bucket in history.sparsity.all()] == found


def test_a_caffe_test_lies_where_the_stage_before_it_ends(tmp_path: Path) -> None:
    """Of a file with several processes; not at the end of all."""
    first = whole_stage().text.replace('"a/b"', '"out/initial/b"')
    last = whole_stage().text.replace('"a/b"', '"out/sparse/b"').replace("I0815", "I0816")
    later = A_TEST.text.replace("right = 0.8", "right = 0.7").replace("I0815", "I0816")
    path = write(tmp_path / "a.log", first + A_TEST.text + last + later.replace("10:00:0", "11:00:0"))
    (run,), _ = find_runs([path], history=True)
    assert [stage.name for stage in run.stages] == ["initial", "test", "sparse", "test 2"]
    assert page_content.curves([run])[0]["tested"] == [(1, 0.8), (2, 0.7)]
    drawn = main([str(path), "--plot", str(tmp_path / "a.svg")])
    assert (drawn, (tmp_path / "a.svg").read_text().count("top-1, caffe test")) == (0, 1)


@pytest.mark.caffe
def test_many_notes_do_not_fill_the_page(browser: Browser, tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / "runs" / f"{number:02d}.log", Log().start().iterate(0, 10).text)
    browser.open(page(tmp_path / "runs", to=tmp_path / "page.html"))
    notes = [f"{number:02d} train: no accuracy: the log has no complete test" for number in range(20)]
    assert texts(browser, "#notes p") == notes
    assert texts(browser, "#notes > p") == notes[:12]
    assert texts(browser, "#notes summary") == ["8 more"]


@pytest.mark.caffe
def test_caffe_tests_are_in_the_chart(browser: Browser, tmp_path: Path) -> None:
    a_run(tmp_path / "digits")
    browser.open(page(tmp_path / "digits", to=tmp_path / "page.html"))
    assert hover(browser, "accuracy", 0.995)["caffe test, top-1"] == "80.00 %"


def test_of_a_detector_the_mean_comes_first(tmp_path: Path) -> None:
    """Its curve is there however many classes come before it in the log."""
    log = Log().start()
    for iteration in (10, 20):
        log.line("solver.cpp", f"Iteration {iteration}, Testing net (#0)")
        for number in range(1, 201):
            log.line("solver.cpp", f"class AP {number}: 0.5", seconds=0)
        log.line("solver.cpp", f"Test net output mAP #0: map = 0.0{iteration}").iterate(iteration, iteration)
    (run,), _ = find_runs([write(tmp_path / "a.log", log.end().text)], history=True)
    (drawn,) = page_content.curves([run])
    curves = [curve for curve in drawn["stages"][0]["curves"] if curve["panel"] == "accuracy"]
    assert [curve["name"] for curve in curves[:2]] == ["mAP", "class AP 1"]
    assert (curves[0]["x"], curves[0]["y"]) == ([10, 20], [0.01, 0.02])
    assert ("mAP", "2.00 %") in [(card.label, card.value) for card in page_content.cards(run)]
    assert [table.title for table in tables.tables([run])] == ["a", "Results"]
    (run,), _ = find_runs([write(tmp_path / "cut.log", log.text.replace("Initializing net", "A net"))])
    assert [table.title for table in tables.tables([run])] == ["cut"]


# --- what a browser shows -------------------------------------------------------------------------------


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
    )
    return found


def hover(browser: Browser, panel: str, fraction: float) -> dict[str, str]:
    """What the tip says at this fraction of a chart's width: the heading as ``at``, then values by name."""
    left, top, width, height = browser.box(f"#panel-{panel} .u-over")
    browser.mouse("mouseMoved", left + 2, top + height / 2)
    browser.mouse("mouseMoved", left + fraction * width, top + height / 2)
    browser.wait_for(f"!document.querySelector('#panel-{panel} .tip').hidden")
    found: dict[str, str] = browser.value(
        f"(() => {{ const tip = document.querySelector('#panel-{panel} .tip');"
        "const rows = [...tip.querySelectorAll('div')].map((row) => [row.querySelector('span').textContent,"
        "row.querySelector('em')?.textContent]);"
        "return {at: tip.querySelector('b').textContent, ...Object.fromEntries(rows)}; })()"
    )
    return found


def zoom(browser: Browser, begin: float, end: float) -> None:
    """Drag over a part of the first chart, as fractions of its width."""
    left, top, width, height = browser.box("#panel-loss .u-over")
    moves = [("mouseMoved", begin), ("mousePressed", begin), ("mouseMoved", end), ("mouseReleased", end)]
    for number, (kind, at) in enumerate(moves):
        button = {"button": "left", "buttons": 1, "clickCount": 1} if number else {}
        browser.mouse(kind, left + at * width, top + height / 2, **button)
    browser.wait_for("![...document.querySelectorAll('#controls button')].pop().disabled")


@pytest.mark.caffe
def test_every_figure_of_the_json_stands_in_the_page(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path / "runs" / "first"), a_run(tmp_path / "runs" / "second")]
    write(runs[1] / "initial" / "run.log", Log().start().iterate(0, 20).text)  # still running
    browser.open(page(tmp_path / "runs", to=tmp_path / "page.html"))
    capsys.readouterr()
    main([str(tmp_path / "runs"), "--format", "json"])
    expected = json.loads(capsys.readouterr().out)["runs"]
    tables: list[list[list[str]]] = browser.value(
        "[...document.querySelectorAll('table.figures')].map((table) =>"
        "[...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent)))"
    )
    assert len(tables) == len(expected) == 2
    for run, (heading, *rows) in zip(expected, tables, strict=True):
        assert heading[1:] == [stage["name"] for stage in run["stages"]]
        shown = {name: cells for name, *cells in rows}
        for number, stage in enumerate(run["stages"]):
            outputs = {f"outputs: {name}": value for name, value in stage.pop("outputs").items()}
            stage.pop("notes", None)  # at the top of the page
            for name, value in (stage | outputs).items():
                if name == "name":
                    continue
                text = value if isinstance(value, str) else json.dumps(value)
                assert shown[name][number] == ("-" if value is None else text)
    assert texts(browser, "#results tbody tr:first-child th") == ["first, initial"]
    assert texts(browser, "#results tbody tr:first-child td") == ["75.00 %", "95.00 %", "3.79e-05", "-"]
    assert "initial (unfinished)" in texts(browser, "#stages tr.unfinished th")


@pytest.mark.caffe
def test_hovering_zooming_and_switching(browser: Browser, tmp_path: Path) -> None:
    made = page(a_run(tmp_path / "digits"), to=tmp_path / "page.html")
    browser.open(made)
    assert texts(browser, "h1") == ["digits"]
    assert texts(browser, "#panels h3") == ["Loss", "Accuracy, %", "Learning rate", "Sparsity, %"]
    # 40 iterations, then 120: iteration 20 of the first stage lies at an eighth, 80 of the second at 3/4
    left, _, width, _ = browser.box("#panel-loss .u-over")
    from_left, _, of_all, _ = browser.box("#panel-loss .chart")
    assert from_left + of_all - left - width >= 18  # half of the last label has room
    tip = hover(browser, "accuracy", 20 / 160)
    assert tip == {"at": "initial, iteration 20", "top-1": "60.00 %", "top-5": "90.00 %"}
    assert hover(browser, "loss", 10 / 160)["training loss"] == f"{2 / 11:.5g}"
    assert hover(browser, "sparsity", 0.99)["sparsity"] == "80.50 %"
    browser.click("#panel-accuracy .chips button[title=top-5]")
    assert hover(browser, "accuracy", 20 / 160) == {"at": "initial, iteration 20", "top-1": "60.00 %"}
    # a part that is dragged over fills the width of every chart
    zoom(browser, 0.5, 0.75)
    assert hover(browser, "rate", 0.02)["at"] == "sparse, iteration 40"
    # what was chosen outlives a reload
    browser.value("sessionStorage.length")
    browser.open(made)
    assert hover(browser, "rate", 0.02)["at"] == "sparse, iteration 40"
    assert "top-5" not in hover(browser, "accuracy", 0.5)
    browser.click("#panel-loss .u-over", clicks=2)
    browser.wait_for("[...document.querySelectorAll('#controls button')].pop().disabled")
    assert hover(browser, "rate", 0.02)["at"] == "initial, iteration 0"
    browser.click("#controls .segments button:last-child")
    assert hover(browser, "rate", 0.8)["at"].startswith("sparse")


@pytest.mark.caffe
def test_pruning_by_layer_over_time(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(a_run(tmp_path / "digits"), to=tmp_path / "page.html"))
    assert texts(browser, ".layer > span") == ["conv"]
    assert texts(browser, ".layer output") == ["80.5 %"]
    browser.value(
        "(() => { const range = document.querySelector('#pruned-at input');"
        "range.value = 0; range.dispatchEvent(new Event('input')); })()"
    )
    assert texts(browser, ".layer output") == ["10.0 %"]
    assert texts(browser, "#pruned-at output") == ["iteration 40"]
    # 16 x 3 x 3 x 3 weights at 8 x 8 positions
    (cells,) = browser.value(
        "[...document.querySelectorAll('.costs tbody tr')].slice(0, 1).map((row) =>"
        "[...row.cells].map((cell) => cell.textContent.trim()))"
    )
    assert cells[0] == "conv" and cells[3:5] == ["448", "0.0276"] and cells[-2:] == ["80.6 %", "0.00538"]


@pytest.mark.caffe
def test_settings_that_differ_are_marked(browser: Browser, tmp_path: Path) -> None:
    first, second = whole_stage().text, whole_stage().text.replace("base_lr: 0.01", "base_lr: 0.02")
    write(tmp_path / "logs" / "one_train.log", first)
    write(tmp_path / "logs" / "two_train.log", second)
    browser.open(page(tmp_path / "logs", to=tmp_path / "page.html"))
    assert texts(browser, ".settings thead th") == ["Setting", "one", "two"]
    assert texts(browser, ".settings .differs > *") == ["base_lr", "0.01", "0.02"]
    browser.click("#only input")
    shown = "[...document.querySelectorAll('.settings tbody tr')].filter((row) => row.offsetHeight).length"
    assert browser.value(shown) == 1
    # two runs on one sheet: each can be switched off
    assert hover(browser, "accuracy", 0.5)["two: top-1"] == "60.00 %"
    browser.click("#runs button:last-child")
    assert set(hover(browser, "accuracy", 0.5)) == {"at", "one: top-1", "one: top-5"}


HOSTILE = "<script>window.hurt=1<script>\"'><img src=x onerror=window.hurt=2>=cmd|' C calc'!A0&lt;"


@pytest.mark.caffe
def test_a_hostile_name_or_line_stays_text(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = f"=1+1{HOSTILE}</script><script>window.hurt=3</script>"
    text = (
        sparse_stage(0.1, 0.5).text.replace("right", bad).replace('name: "conv"', f"name: '{HOSTILE[:16]}'")
    )
    text = text.replace('"a/b"', json.dumps(bad)).replace("conv_param", f"{HOSTILE[:16]}_param")
    log = Log().line("net.cpp", f"Check failed: {bad}", level="F")
    folder = tmp_path / f"={HOSTILE}"
    write(folder / "initial" / "run.log", text)
    write(folder / "sparse" / "run.log", whole_stage().text + log.text)
    browser.open(page(folder, to=tmp_path / "page.html"))
    assert browser.value("window.hurt === undefined && document.images.length === 0")
    assert texts(browser, "h1") == [f"={HOSTILE}"]
    assert texts(browser, "#notes .fatal") == [f"sparse stopped: Check failed: {bad}"]
    assert bad in texts(browser, "#settings td")
    assert f"outputs: {bad}" in texts(browser, ".figures th")
    assert HOSTILE[:16] in texts(browser, ".costs th")
    assert HOSTILE[:16] in texts(browser, ".layer > span")
    assert hover(browser, "accuracy", 0.5)
    assert browser.value("window.hurt === undefined")
    capsys.readouterr()
    main([str(folder), "--format", "csv"])
    cells = [cell for line in capsys.readouterr().out.splitlines() for cell in line.split(",")]
    assert any(HOSTILE[:16] in cell for cell in cells)
    assert not [cell for cell in cells if cell.strip('"')[:1] in ("=", "@", "+")]
    main([str(folder), "--format", "markdown"])
    found = capsys.readouterr().out
    assert "\\<script\\>" in found and not re.search(r"(?<!\\)<", found)


@pytest.mark.caffe
@pytest.mark.parametrize("number", ["nan", "inf", "-1e308", "1e308", "1e-308"])
def test_a_page_is_drawn_whatever_the_numbers_are(browser: Browser, tmp_path: Path, number: str) -> None:
    text = sparse_stage(0.1, 0.4).text
    text = re.sub(r"(loss|lr|right) = [\d.e-]+", rf"\1 = {number}", text)
    text = re.sub(r"(_param_0)\([\d.]+\)", rf"\1({number})", text)
    write(tmp_path / "x" / "initial" / "run.log", text * 2)
    write(tmp_path / "x" / "test" / "run.log", re.sub(r"right = [\d.]+", f"right = {number}", A_TEST.text))
    browser.open(page(tmp_path / "x", to=tmp_path / "page.html"))
    assert "initial" in texts(browser, "#stages tbody th")


@pytest.mark.caffe
def test_a_page_of_320000_iterations_is_small_and_drawn_within_a_second(
    browser: Browser, tmp_path: Path
) -> None:
    log = Log().start(max_iter=320_000)
    lines = []
    for at in range(0, 320_000, 20):
        stamp = f"I0816 {at // 20_000:02d}:{at // 400 % 50:02d}:{at % 400 / 10:09.6f}  8764"
        loss = 98.5 if at == 123_460 else 1 + 2000 / (1000 + at)
        if at % 2000 == 0:
            lines.append(f"{stamp} solver.cpp:1] Iteration {at}, Testing net (#0)")
            lines.append(f"{stamp} solver.cpp:1]     Test net output #2: right = {at / 400_000}")
        lines.append(f"{stamp} solver.cpp:1] Iteration {at} (9 iter/s, 2s/20 iters), loss = {loss:g}")
        lines.append(f"{stamp} solver.cpp:1]     Train net output #0: loss = {loss:g} (* 1 = {loss:g} loss)")
        lines.append(f"{stamp} sgd_solver.cpp:1] Iteration {at}, lr = {0.1 * (1 - at / 320_000):g}")
    end = Log("0817").done(320_000).test(320_000, 0.8, 0.95, 0.625).end()
    text = log.text + "\n".join(lines) + "\n" + end.text
    write(tmp_path / "long_train.log", text)
    made = page(tmp_path / "long_train.log", to=tmp_path / "page.html")
    assert made.stat().st_size < 3_000_000
    times = []
    for _ in range(3):
        browser.open(made)
        times.append(int(browser.value("document.documentElement.dataset.drawn")))
    assert min(times) < 1000
    # one loss of 16,000 is far above the others: it is shown although it was joined with its neighbours
    assert hover(browser, "accuracy", 0.999)["top-1"] == "80.00 %"
    zoom(browser, 0.35, 0.4)
    near = (
        (at / 320_000 - 0.35) / (0.4 - 0.35) for at in range(123_100, 123_800, 40)
    )  # pixels are 290 apart
    assert any(hover(browser, "loss", place)["training loss"].endswith(" to 98.5)") for place in near)


@pytest.mark.caffe
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    browser.open(page(a_run(tmp_path / "digits"), to=tmp_path / "page.html"), width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(14, 18, 23)") is dark
    picture = tmp_path / "page.png"
    browser.picture(picture)
    assert picture.stat().st_size > 20_000


@pytest.mark.caffe
def test_a_page_left_open_follows_the_training(browser: Browser, tmp_path: Path) -> None:
    log = write(tmp_path / "digits" / "initial" / "run.log", Log().start().test(0, 0.1, 0.5, 2.3).text)
    made = tmp_path / "digits" / "report.html"

    def train(text: str, state: State) -> None:
        log.write_text(text)
        write_page(find_runs([tmp_path / "digits"], history=True)[0], made, state=state)

    train(log.read_text(), State("initial is running", reload=1))
    browser.open(made)
    assert texts(browser, "#state") == ["initial is running"]
    assert "initial (unfinished)" in texts(browser, "#stages tr.unfinished th")
    browser.value("(window.mark = 1, scrollTo(0, 100))")
    train(whole_stage().text, State("initial failed", None, "initial failed: <b>the disk</b> is full"))
    browser.wait_for("window.mark === undefined && document.documentElement?.dataset.drawn")
    assert texts(browser, "#state") == ["initial failed"]
    assert texts(browser, "#notes .fatal") == ["initial failed: <b>the disk</b> is full"]
    assert texts(browser, "#stages tbody th")[0] == "initial"
    browser.value("window.mark = 1")
    time.sleep(1.5)  # longer than until the reload that there was
    assert browser.value("window.mark") == 1


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    log = write(tmp_path / "x_train.log", whole_stage().text)
    with pytest.raises(UserError, match=r"--html .*: the name must end in \.html or \.htm"):
        main([str(log), "--html", str(tmp_path / "page.pdf")])
    with pytest.raises(UserError, match=r"--html .*cannot be written: No such file"):
        main([str(log), "--html", str(tmp_path / "missing" / "page.html")])


def test_a_log_without_training_has_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "x_train.log", Log().start().text)
    text = page(log, to=tmp_path / "page.html").read_text()
    assert "<h2>Curves" not in text and "<h2>Pruning" not in text and "unfinished" in text


def test_the_cost_of_a_tiny_network_is_not_rounded_to_nothing(tmp_path: Path) -> None:
    shown = page(write(tmp_path / "tiny.log", whole_stage().text), to=tmp_path / "page.html").read_text()
    (total,) = re.findall(r"([\d.e-]+) GigaMACs for one crop, [\d.]+ million", shown)
    costs = shown[shown.index("Cost by layer") :]
    layers = [float(cell) for cell in re.findall(r"<td>([\d.e-]+)</td>\n<td class=.wide.>", costs)]
    assert float(total) == pytest.approx(GIGAMACS, rel=0.005)
    assert sum(layers) == pytest.approx(1000 * GIGAMACS, rel=0.005)
