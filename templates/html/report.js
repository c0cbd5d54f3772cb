// The page of a report: its curves (uPlot), the pruning over time, and what the reader has chosen to see.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.runs.length > 1;
  const PANELS = [
    { key: "loss", title: "Loss", canBeLog: true },
    { key: "accuracy", title: "Accuracy, %", percent: true },
    { key: "other", title: "Other outputs of the tests" },
    { key: "rate", title: "Learning rate", canBeLog: true },
    { key: "sparsity", title: "Sparsity, %", percent: true },
  ];
  const COLOURS = 8, SHOWN_OUTPUTS = 6, SHOWN_RUNS = 12, TIP_ROWS = 14;
  const SMOOTHED_FROM = 40, MARKED_BELOW = 25; // as in the plot: logs/plot.py
  const TRAINING_LOSS = "training loss";
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [1, 4]];

  // --- what the reader has chosen; it outlives a reload -----------------------------------------------------------

  const KEY = "caffe_jacinto " + location.pathname;
  const state = { runs: {}, outputs: {}, smooth: 3, time: false, log: {}, zoom: null, pruned: null, at: null, only: false };
  try {
    Object.assign(state, JSON.parse(sessionStorage.getItem(KEY)));
  } catch { /* nothing is kept in this browser */ }
  function keep() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(state));
    } catch { /* as above */ }
  }

  // --- elements ---------------------------------------------------------------------------------------------------

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children);
    return made;
  }
  function drawing(name, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function swatch(colour, dash = []) {
    const line = drawing("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash.join(" ") });
    return drawing("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
  }
  function chip(text, mark, pressed, click) {
    return element("button", { type: "button", "aria-pressed": String(pressed), title: text, onclick: click }, mark, element("span", {}, text));
  }
  const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- numbers ----------------------------------------------------------------------------------------------------

  const whole = (value) => Math.round(value).toLocaleString("en-US");
  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    return size >= 1e4 ? +(value / 1e3).toPrecision(4) + "k" : String(+value.toPrecision(4));
  }
  const figure = (value, percent) => percent ? value.toFixed(2) + " %" : String(+value.toPrecision(5));
  const isRound = (value) => [1, 2, 5].includes(+(value / 10 ** Math.floor(Math.log10(value) + 1e-9)).toPrecision(6));
  function clock(seconds) {
    const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
    return s < 3600 ? `${Math.floor(s / 60)}:${two(s % 60)} min` : `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)} h`;
  }
  function nearest(sorted, wanted) {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= wanted) low = middle; else high = middle;
    }
    return Math.abs(sorted[low] - wanted) <= Math.abs(sorted[high] - wanted) ? low : high;
  }
  function secondsAt(stage, iteration) {
    const [at, seconds] = stage.times;
    if (at.length < 2) return stage.seconds * iteration / Math.max(stage.end - stage.start, 1);
    let i = 1;
    let low = 1, high = at.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (at[middle] < iteration) low = middle + 1; else high = middle;
    }
    i = low;
    const slope = (seconds[i] - seconds[i - 1]) / (at[i] - at[i - 1]);
    return Math.min(Math.max(seconds[i] + slope * (iteration - at[i]), 0), Math.max(stage.seconds, seconds[seconds.length - 1]));
  }
  // The mean over a window of `percent` of the points around each.
  function smoothed(values, percent) {
    const half = Math.max(2, Math.floor(values.length * percent / 200));
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    return values.map((_, at) => {
      const from = Math.max(0, at - half), to = Math.min(values.length, at + half + 1);
      return (sums[to] - sums[from]) / (to - from);
    });
  }

  // --- curves -----------------------------------------------------------------------------------------------------

  const names = {}; // panel -> names of its curves, in order
  for (const panel of PANELS) {
    names[panel.key] = [...new Set(data.runs.flatMap((run) => run.stages.flatMap((stage) =>
      stage.curves.filter((curve) => curve.panel === panel.key).map((curve) => curve.name))))];
  }
  if (names.accuracy.length && data.runs.some((run) => run.tested.length)) names.accuracy.push("caffe test, top-1");
  const runIsShown = (number) => state.runs[number] ?? number < SHOWN_RUNS;
  const outputIsShown = (panel, name) => state.outputs[panel + " " + name] ?? names[panel].indexOf(name) < SHOWN_OUTPUTS;
  const colourName = (panel, run, name) => "--c" + (several ? run : names[panel].indexOf(name)) % COLOURS;
  const dashOf = (panel, name) => several ? DASHES[names[panel].indexOf(name) % DASHES.length] : [];

  const spanOf = (run) => {
    const last = run.stages[run.stages.length - 1];
    return last === undefined ? 0 : state.time ? last.begun + last.seconds : last.end;
  };
  const shownRuns = () => data.runs.map((run, number) => [run, number]).filter(([, number]) => runIsShown(number));
  const fullRange = () => [0, Math.max(1, ...shownRuns().map(([run]) => spanOf(run)))];
  const place = (stage, iteration) => state.time ? stage.begun + secondsAt(stage, iteration) : stage.start + iteration;

  // The lines of a panel: each a curve of a stage, in its place on the common axis.
  function linesOf(panel) {
    const lines = [], scale = panel.percent ? 100 : 1;
    for (const [run, number] of shownRuns()) {
      const last = {};
      for (const stage of run.stages) {
        for (const curve of stage.curves) {
          if (curve.panel !== panel.key || !outputIsShown(panel.key, curve.name)) continue;
          const line = {
            run: number, name: curve.name, stage, at: curve.x, marked: curve.x.length === 1,
            x: curve.x.map((iteration) => place(stage, iteration)), y: curve.y.map((value) => scale * value),
            low: curve.low?.map((value) => scale * value), high: curve.high?.map((value) => scale * value),
            smooth: curve.name === TRAINING_LOSS && curve.y.length >= SMOOTHED_FROM && state.smooth > 0,
          };
          if (curve.name !== TRAINING_LOSS && panel.key !== "rate") {
            line.marked = line.x.length < MARKED_BELOW;
            line.from = last[curve.name]; // a stage begins with the network that the one before ends with
            last[curve.name] = [line.x[line.x.length - 1], line.y[line.y.length - 1]];
          }
          for (let i = 1; i < line.x.length; i++) { // a clock that stands still
            if (line.x[i] <= line.x[i - 1]) line.x[i] = line.x[i - 1] + 1e-6;
          }
          lines.push(line);
        }
      }
      const tested = "caffe test, top-1";
      for (const [before, top1] of panel.key === "accuracy" && outputIsShown("accuracy", tested) ? run.tested : []) {
        const stage = run.stages[Math.max(before - 1, 0)], end = before > 0 ? stage.end - stage.start : 0;
        if (stage === undefined) continue;
        const x = before === 0 ? 0 : state.time ? stage.begun + stage.seconds : stage.end;
        lines.push({ run: number, name: tested, stage, at: [end], x: [x], y: [100 * top1], marked: true, big: true });
      }
    }
    return lines;
  }

  // uPlot's series and aligned data for the lines.
  function seriesOf(panel, lines) {
    const tables = [], series = [{}], bands = [], owners = [null];
    for (const line of lines) {
      const stroke = shade(colourName(panel.key, line.run, line.name)), dash = dashOf(panel.key, line.name);
      const main = line.smooth ? smoothed(line.y, state.smooth) : line.y;
      const before = line.from !== undefined && line.from[0] < line.x[0] ? [line.from] : [];
      const x = [...before.map(([at]) => at), ...line.x];
      const table = [x, [...before.map(([, value]) => value), ...main]];
      const size = line.big ? 10 : line.marked ? 6 : 0;
      line.main = main;
      series.push({ stroke, dash, width: 2, points: { show: size > 0, size, fill: stroke, stroke } });
      owners.push(line);
      if (line.high !== undefined && before.length === 0) {
        table.push(line.high, line.low);
        const at = series.length;
        series.push({ stroke: "transparent", width: 0, points: { show: false } }, { stroke: "transparent", width: 0, points: { show: false } });
        bands.push({ series: [at, at + 1], fill: stroke + "50" });
        owners.push(null, null);
      } else if (line.smooth) {
        table.push(line.y);
        series.push({ stroke: stroke + "48", width: 1, points: { show: false } });
        owners.push(null);
      }
      tables.push(table);
    }
    const joined = tables.length ? uPlot.join(tables) : [[]];
    const index = new Map(joined[0].map((x, at) => [x, at]));
    for (const line of lines) line.index = line.x.map((x) => index.get(x));
    return { series, bands, owners, joined };
  }

  // The values in view; of a loss not its few highest, which a training begins with.
  function heightOf(panel, lines, from, to) {
    if (panel.key === "sparsity") return [0, 100];
    const isLog = state.log[panel.key];
    let values = [];
    for (const line of lines) {
      for (let i = 0; i < line.x.length; i++) {
        if (line.x[i] >= from && line.x[i] <= to && !(isLog && line.y[i] <= 0)) values.push(line.y[i]);
      }
    }
    if (!values.length) return isLog ? [0.001, 1] : [0, 1];
    values.sort((a, b) => a - b);
    let low = values[0], high = values[values.length - 1];
    if (panel.key === "loss") high = values[values.length - 1 - Math.floor(values.length / 200)];
    if (isLog) return [low / 1.15, high * 1.15];
    if (panel.key === "rate") low = Math.min(0, low);
    const gap = 0.06 * ((high - low) || Math.abs(high) || 1);
    low = panel.key === "rate" ? low : low - gap;
    if (panel.percent) return [Math.max(0, low), Math.min(100.5, high + gap)];
    return [panel.key === "loss" && low < 0 && values[0] >= 0 ? 0 : low, high + gap];
  }

  const charts = [];
  let zooming = false;

  function build(panel) {
    const lines = linesOf(panel), { series, bands, owners, joined } = seriesOf(panel, lines);
    const first = charts.find((chart) => chart.lines?.length) === undefined;
    const soft = shade("--soft"), grid = shade("--line"), font = "12px system-ui, sans-serif";
    const tip = element("div", { class: "tip", hidden: true });
    const axis = { stroke: soft, font, grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    const chart = { panel, lines, view: fullRange() };
    const options = { // the padding on the right holds half of the last label
      width: panel.box.clientWidth || 600, height: panel.key === "loss" || panel.key === "accuracy" ? 250 : 170,
      padding: [first ? 24 : 8, state.time ? 32 : 20, 0, 0], legend: { show: false }, series, bands,
      scales: {
        x: { time: false, range: (u, min, max) => (chart.view = viewOf(u, min, max)) },
        y: { distr: state.log[panel.key] ? 3 : 1, range: () => heightOf(panel, lines, ...chart.view) },
      },
      axes: [
        { ...axis, size: 32, space: 70, values: (u, splits) => splits.map((value) => value === null ? "" : state.time ? clock(value) : short(value)) },
        { ...axis, size: 58, space: 32, values: (u, splits) => splits.map((value) => value === null || (state.log[panel.key] && !isRound(value)) ? "" : short(value)) },
      ],
      cursor: {
        sync: { key: "x", scales: ["x", null] }, drag: { x: true, y: false },
        y: false,
        points: { size: 8, show: (u, at) => owners[at] !== null },
        dataIdx: (u, at, index, x) => {
          const line = owners[at];
          if (!line || !inReach(u, line, x)) return null;
          return line.index[nearest(line.x, x)];
        },
      },
      hooks: {
        setCursor: [(u) => showTip(u, tip, chart)],
        setScale: [(u, key) => { if (key === "x") follow(u, chart); }],
        drawAxes: [(u) => drawStages(u, first)],
      },
    };
    chart.plot = new uPlot(options, joined, panel.box);
    chart.plot.over.append(tip);
    chart.plot.over.addEventListener("mouseleave", () => { tip.hidden = true; });
    charts.push(chart);
  }

  // The range of the horizontal axis: what the reader has zoomed to, or everything.
  function viewOf(u, min, max) {
    const xs = u.data[0];
    return min === null || !xs.length || (min <= xs[0] && max >= xs[xs.length - 1]) ? fullRange() : [min, max];
  }

  function inReach(u, line, x) {
    const reach = 12 * (u.scales.x.max - u.scales.x.min) / Math.max(u.over.clientWidth, 1);
    return x >= line.x[0] - reach && x <= line.x[line.x.length - 1] + reach;
  }

  // A zoom in one chart is a zoom in all.
  function follow(u, chart) {
    if (zooming || chart.plot === undefined) return;
    zooming = true;
    const { min, max } = u.scales.x, [from, to] = fullRange();
    state.zoom = min <= from && max >= to ? null : [min, max];
    for (const other of charts) {
      if (other.plot !== u) other.plot.setScale("x", { min, max });
    }
    queueMicrotask(() => { zooming = false; });
    controls.reset.disabled = state.zoom === null;
    keep();
  }

  function showTip(u, tip, chart) {
    const { left } = u.cursor;
    if (left === undefined || left < 0 || !u.over.matches(":hover")) {
      tip.hidden = true;
      return;
    }
    const x = u.posToVal(left, "x"), rows = new Map();
    for (const line of chart.lines) {
      if (!inReach(u, line, x)) continue;
      const at = nearest(line.x, x), key = line.run + " " + line.name, away = Math.abs(line.x[at] - x);
      if (!rows.has(key) || rows.get(key).away > away) rows.set(key, { line, at, away });
    }
    if (!rows.size) {
      tip.hidden = true;
      return;
    }
    const found = [...rows.values()], close = found.reduce((a, b) => b.away < a.away ? b : a);
    const where = `iteration ${whole(close.line.at[close.at])}`;
    const head = several ? (state.time ? clock(x) : `iteration ${whole(x)}`) : `${close.line.stage.name}, ${where}`;
    tip.replaceChildren(element("b", {}, head), ...found.slice(0, TIP_ROWS).map(({ line, at }) => {
      const mark = swatch(shade(colourName(chart.panel.key, line.run, line.name)), dashOf(chart.panel.key, line.name));
      const label = several ? `${data.runs[line.run].name}: ${line.name}` : line.name;
      let text = figure(line.main[at], chart.panel.percent);
      if (line.low !== undefined) text += ` (${figure(line.low[at], chart.panel.percent)} to ${figure(line.high[at], chart.panel.percent)})`;
      else if (line.smooth) text += ` (${figure(line.y[at], chart.panel.percent)})`;
      return element("div", {}, mark, element("span", {}, label), element("em", {}, text));
    }));
    if (found.length > TIP_ROWS) tip.append(element("div", {}, element("span", {}, `and ${found.length - TIP_ROWS} more`)));
    tip.hidden = false;
    const room = u.over.clientWidth - tip.offsetWidth;
    tip.style.left = Math.max(0, Math.min(room, left + 16 > room ? left - tip.offsetWidth - 16 : left + 16)) + "px";
  }

  // A line where each stage begins and, for one run, its name above.
  function drawStages(u, named) {
    const shown = shownRuns(), { ctx, bbox } = u, ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.lineWidth = ratio;
    for (const [run, number] of shown) {
      for (const stage of run.stages) {
        const begin = state.time ? stage.begun : stage.start, end = state.time ? stage.begun + stage.seconds : stage.end;
        const left = Math.max(u.valToPos(begin, "x", true), bbox.left);
        const right = Math.min(u.valToPos(end, "x", true), bbox.left + bbox.width);
        if (right <= bbox.left || left >= bbox.left + bbox.width) continue;
        if (begin > u.scales.x.min) {
          ctx.strokeStyle = shown.length > 1 ? shade("--c" + number % COLOURS) + "90" : shade("--soft") + "90";
          ctx.setLineDash([4 * ratio, 3 * ratio]);
          ctx.beginPath();
          ctx.moveTo(left, bbox.top);
          ctx.lineTo(left, bbox.top + bbox.height);
          ctx.stroke();
        }
        if (named && shown.length === 1) {
          ctx.font = `600 ${12 * ratio}px system-ui, sans-serif`;
          ctx.fillStyle = shade("--soft");
          ctx.textAlign = "center";
          ctx.textBaseline = "bottom";
          if (ctx.measureText(stage.name).width < right - left - 4 * ratio) ctx.fillText(stage.name, (left + right) / 2, bbox.top - 6 * ratio);
        }
      }
    }
    ctx.restore();
  }

  function redraw() {
    const zoom = state.zoom;
    for (const chart of charts.splice(0)) chart.plot.destroy();
    zooming = true;
    for (const panel of PANELS) {
      if (panel.box) build(panel);
    }
    zooming = false;
    if (zoom !== null && charts.length) charts[0].plot.setScale("x", { min: zoom[0], max: zoom[1] });
    controls.reset.disabled = zoom === null;
    chips();
    keep();
  }

  const controls = {};
  function chips() {
    if (several) {
      document.getElementById("runs").replaceChildren(...data.runs.map((run, number) => chip(
        run.name, swatch(shade("--c" + number % COLOURS)), runIsShown(number), (event) => {
          if (event.shiftKey) data.runs.forEach((_, other) => { state.runs[other] = other === number; });
          else state.runs[number] = !runIsShown(number);
          redraw();
        })));
    }
    for (const panel of PANELS) {
      if (!panel.box || names[panel.key].length < 2) continue;
      panel.chips.replaceChildren(...names[panel.key].map((name, at) => {
        const colour = several ? shade("--soft") : shade(colourName(panel.key, 0, name));
        return chip(name, swatch(colour, dashOf(panel.key, name)), outputIsShown(panel.key, name), () => {
          state.outputs[panel.key + " " + name] = !outputIsShown(panel.key, name);
          redraw();
        });
      }));
    }
  }

  function setUpCurves() {
    const box = document.getElementById("panels");
    if (box === null) return;
    for (const panel of PANELS) {
      if (!names[panel.key].length) continue;
      panel.box = element("div", { class: "chart", role: "img", "aria-label": panel.title });
      panel.chips = element("div", { class: "chips", role: "group", "aria-label": panel.title });
      const head = element("div", { class: "panel-head" }, element("h3", {}, panel.title), panel.chips);
      if (panel.canBeLog) {
        const input = element("input", { type: "checkbox", onchange: () => { state.log[panel.key] = input.checked; redraw(); } });
        input.checked = Boolean(state.log[panel.key]);
        head.append(element("label", { class: "check" }, input, "logarithmic"));
      }
      box.append(element("div", { class: "panel", id: "panel-" + panel.key }, head, panel.box));
    }
    const amount = element("output", {}, state.smooth + " %");
    const smooth = element("input", { type: "range", min: 0, max: 20, step: 1, "aria-label": "Smoothing of the training loss",
      oninput: () => { state.smooth = +smooth.value; amount.textContent = state.smooth + " %"; redraw(); } });
    smooth.value = state.smooth;
    const axes = [["Iterations", false], ["Time", true]].map(([text, time]) => element("button", {
      type: "button", "aria-pressed": String(state.time === time), onclick: () => {
        if (state.time === time) return;
        state.time = time;
        state.zoom = null;
        axes.forEach((button, at) => button.setAttribute("aria-pressed", String(time === (at === 1))));
        redraw();
      } }, text));
    controls.reset = element("button", { type: "button", onclick: () => { state.zoom = null; redraw(); } }, "Reset zoom");
    document.getElementById("controls").append(
      element("label", {}, "Smoothing", smooth, amount),
      element("span", { class: "segments", role: "group", "aria-label": "Horizontal axis" }, ...axes), controls.reset);
    if (data.runs.some((run) => run.stages.some((stage) => stage.curves.some((curve) => curve.of)))) {
      document.getElementById("thinned").textContent =
        "Of curves with very many points, the line shows the mean of neighbours, and the band their lowest and highest value.";
    }
    redraw();
    let width = box.clientWidth;
    new ResizeObserver(() => {
      if (box.clientWidth === width) return;
      width = box.clientWidth;
      for (const { plot, panel } of charts) plot.setSize({ width: panel.box.clientWidth, height: plot.height });
    }).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    matchMedia("print").addEventListener("change", redraw);
  }

  // --- pruning ----------------------------------------------------------------------------------------------------

  function setUpPruning() {
    const box = document.getElementById("layers");
    if (box === null) return;
    const found = data.runs.flatMap((run) => run.pruning.map((pruning) => (
      { label: several ? `${run.name}, ${pruning.stage}` : pruning.stage, pruning })));
    const pick = element("select", { "aria-label": "Stage", onchange: () => show(+pick.value) },
      ...found.map(({ label }, at) => element("option", { value: at }, label)));
    document.getElementById("pruned-stage").append(found.length > 1 ? pick : found[0].label);
    const slider = document.getElementById("pruned-at");
    const kept = found.findIndex(({ label }) => label === state.pruned);
    show(kept >= 0 ? kept : longest(found), true);

    function longest(all) {
      return all.reduce((best, one, at) => one.pruning.at.length >= all[best].pruning.at.length ? at : best, 0);
    }
    function show(number, again = false) {
      const { label, pruning } = found[number], last = pruning.at.length - 1;
      pick.value = number;
      if (!again) state.at = null;
      state.pruned = label;
      const where = element("output", {});
      const range = element("input", { type: "range", min: 0, max: last, step: 1, "aria-label": "Iteration",
        oninput: () => { state.at = +range.value === last ? null : pruning.at[+range.value]; at(+range.value); keep(); } });
      slider.replaceChildren(range, where);
      slider.hidden = last === 0;
      const rows = pruning.layers.map((layer, row) => {
        const fill = drawing("rect", { class: "fill", height: 8, width: 0 });
        const bar = drawing("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
          drawing("rect", { class: "rail", width: 100, height: 8 }), fill);
        const begin = pruning.at[0], span = Math.max(pruning.at[last] - begin, 1);
        const points = pruning.sparsity[row].map((value, i) => [100 * (pruning.at[i] - begin) / span, 100 - 100 * (value ?? 0)]);
        const mark = drawing("line", { y1: 0, y2: 100 });
        const course = drawing("svg", { class: "course", viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
          drawing("path", { d: "M" + points.map(([x, y]) => x.toFixed(2) + " " + y.toFixed(1)).join("L") }), mark);
        const text = element("output", {});
        return { fill, text, mark, points, node: element("div", { class: "layer" }, element("span", {}, layer), bar, text, last > 0 ? course : "") };
      });
      box.replaceChildren(...rows.map((row) => row.node));
      const start = state.at === null ? last : nearest(pruning.at, state.at);
      range.value = start;
      at(start);
      keep();

      function at(index) {
        where.textContent = `iteration ${whole(pruning.at[index])}`;
        rows.forEach((row, number) => {
          const value = pruning.sparsity[number][index];
          row.fill.setAttribute("width", (100 * (value ?? 0)).toFixed(2));
          row.text.textContent = value === null ? "-" : (100 * value).toFixed(1) + " %";
          row.mark.setAttribute("x1", row.points[index][0]);
          row.mark.setAttribute("x2", row.points[index][0]);
        });
      }
    }
  }

  // --- settings, and a page that follows a training ---------------------------------------------------------------

  function setUpSettings() {
    const only = document.getElementById("only"), found = document.querySelectorAll(".settings");
    if (only === null || document.querySelector(".settings .differs") === null) return;
    const box = only.querySelector("input");
    const apply = () => found.forEach((table) => table.classList.toggle("only", box.checked));
    box.checked = state.only;
    box.addEventListener("change", () => { state.only = box.checked; apply(); keep(); });
    only.hidden = false;
    apply();
  }

  function setUpReload() {
    if (!data.reload) return;
    let touched = 0;
    for (const name of ["pointermove", "pointerdown", "keydown", "wheel"]) addEventListener(name, () => { touched = Date.now(); }, { passive: true });
    const again = () => Date.now() - touched < 4000 ? setTimeout(again, 1000) : location.reload();
    setTimeout(again, 1000 * data.reload);
    const shown = document.getElementById("written"), ago = element("span", {});
    shown.after(ago);
    const say = () => {
      const seconds = Math.max(0, Math.round(Date.now() / 1000 - data.written));
      ago.textContent = seconds < 90 ? `, ${seconds} s ago` : `, ${clock(seconds)} ago`;
    };
    say();
    setInterval(say, 1000);
  }

  setUpCurves();
  setUpPruning();
  setUpSettings();
  setUpReload();
  requestAnimationFrame(() => setTimeout(() => {
    document.documentElement.dataset.drawn = Math.round(performance.now()); // ms since the page was asked for
  }));
})();
