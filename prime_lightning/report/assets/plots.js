// Curves, time per phase and benchmarks, by Plotly. Groups of runs that differ in the seed alone are a line and a band.
"use strict";
const COLOURS = { // Okabe and Ito's, brighter on a dark ground
  light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8d91", "#b8a800"],
  dark: ["#4aa8e8", "#f0b429", "#2cc295", "#e29cc4", "#8fd0f5", "#ff8136", "#b0b4ba", "#d8cc3c"],
};
const DASHES = ["solid", "dash", "dot"];
const AXES = { iterations: "iteration", rollouts: "rollouts sampled", tokens: "tokens sampled", seconds: "seconds" };
let axis = Object.keys(AXES).includes(memory.get("axis")) ? memory.get("axis") : "iterations";
const drawn = []; // [element, () => traces and layout]

const colour = (i) => COLOURS[root.dataset.theme][i % 8];
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const faint = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},0.18)`;
// Plotly reads a little HTML in its texts; names of runs and metrics are to stay text.
const plain = (text) => visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const xOf = (run, i) => (axis === "iterations" ? run.steps[i] : run.axes[axis][i]);

function seriesOf(group, name) {
  const members = group.runs.map((r) => DATA.runs[r]).filter((run) => run.metrics[name]);
  const at = new Map();
  for (const run of members) {
    run.metrics[name].forEach((y, i) => {
      if (y === null) return;
      if (!at.has(run.steps[i])) at.set(run.steps[i], []);
      at.get(run.steps[i]).push([xOf(run, i), y]);
    });
  }
  return [...at.entries()].sort((a, b) => a[0] - b[0])
    .filter(([, points]) => points.length === members.length) // where all seeds have a value
    .map(([step, points]) => {
      const ys = points.map((p) => p[1]);
      const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
      return { step, x: mean(points.map((p) => p[0])), y: mean(ys), low: Math.min(...ys), high: Math.max(...ys) };
    });
}

function curveTraces(names) {
  return DATA.groups.flatMap((group, g) => names.flatMap((name, n) => {
    const points = seriesOf(group, name);
    if (!points.length) return [];
    const x = points.map((p) => p.x);
    const many = group.runs.length > 1;
    const line = {
      x, y: points.map((p) => p.y), mode: points.length < 3 ? "lines+markers" : "lines", name: plain(group.name),
      line: { color: colour(g), width: 2, dash: DASHES[n % 3] }, customdata: points.map((p) => [p.step, p.low, p.high]),
      hovertemplate: `${plain(group.name)}${n ? ` (${plain(name)})` : ""}<br>iteration %{customdata[0]}: %{y:.4g}` +
        `${many ? "<br>%{customdata[1]:.4g} to %{customdata[2]:.4g}" : ""}<extra></extra>`,
    };
    if (!many) return [line];
    const band = {
      x: [...x, ...x.toReversed()], y: [...points.map((p) => p.high), ...points.map((p) => p.low).toReversed()],
      fill: "toself", fillcolor: faint(colour(g)), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
    };
    return [band, line];
  }));
}

function layout(extra = {}) {
  const ink = css("--soft");
  const ends = { gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return {
    margin: { l: 40, r: 8, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: "system-ui, sans-serif", size: 11, color: ink }, dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hoverlabel: { bgcolor: css("--card"), font: { color: css("--ink"), size: 12 }, bordercolor: css("--line"), align: "left" },
    xaxis: { ...ends, title: { text: AXES[axis], standoff: 4, font: { size: 11 } }, rangemode: "tozero" },
    yaxis: { ...ends, nticks: 6, exponentformat: "SI", minexponent: 4 }, ...extra,
  };
}

function guideOf(guide) {
  if (!guide) return {};
  const line = { color: css("--soft"), width: 1, dash: "dot" };
  const text = { text: plain(guide[1]), x: 1, xanchor: "right", xref: "paper", y: guide[0], yanchor: "bottom", showarrow: false };
  return {
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: guide[0], y1: guide[0], line }],
    annotations: [{ ...text, font: { size: 10, color: css("--soft") } }],
  };
}

function draw([plot, make]) {
  const { traces, extra } = make();
  const size = { width: plot.clientWidth, height: plot.clientHeight };
  Plotly.react(plot, traces, layout({ ...size, ...extra }), { displayModeBar: false });
}

function figure(title, caption, make, tall = false) {
  const plot = element("div", { className: "plot" });
  const made = element("figure", { className: tall ? "tall" : "" }, element("h3", { textContent: visible(title) }), plot);
  if (caption) made.append(element("figcaption", { textContent: visible(caption) }));
  plot.tabIndex = 0;
  plot.addEventListener("keydown", walk);
  plot.addEventListener("blur", () => Plotly.Fx.unhover(plot));
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", visible(`${title}. ${caption}`));
  drawn.push([plot, make]);
  return made;
}

// Values by keyboard: the arrow keys go from point to point.
function walk(event) {
  const plot = event.currentTarget;
  const curves = plot.data.map((trace, curveNumber) => ({ trace, curveNumber })).filter(({ trace }) => trace.hoverinfo !== "skip");
  const end = Math.max(...curves.map(({ trace }) => trace.x.length)) - 1;
  const at = Number(plot.dataset.at ?? (event.key === "ArrowLeft" ? end + 1 : -1));
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: end }[event.key];
  if (event.key === "Escape") Plotly.Fx.unhover(plot);
  if (to === undefined) return;
  event.preventDefault();
  const pointNumber = Math.min(Math.max(to, 0), end);
  plot.dataset.at = pointNumber;
  const here = curves.filter(({ trace }) => pointNumber < trace.x.length);
  Plotly.Fx.hover(plot, here.map(({ curveNumber }) => ({ curveNumber, pointNumber })));
  byId("spoken").textContent = `${AXES[axis]} ${number(here[0].trace.x[pointNumber], 4)}: ` +
    here.map(({ trace }) => `${trace.name} ${number(trace.y[pointNumber])}`).join(", ");
}

// First and last value, for those who do not see the curve.
function spoken(names) {
  return DATA.groups.map((group) => {
    const points = seriesOf(group, names[0]);
    return points.length ? `${group.name}: ${number(points[0].y)} to ${number(points.at(-1).y)}` : "";
  }).filter(Boolean).join("; ");
}

function panelFigure({ title, names, guide }) {
  const sides = names.slice(1).map((name, n) => `${["dashed", "dotted"][n] ?? "more"}: ${name}`).join(", ");
  const caption = [title === names[0] ? "" : names[0], sides].filter(Boolean).join("; ");
  const made = figure(title, caption, () => ({ traces: curveTraces(names), extra: guideOf(guide) }));
  made.querySelector(".plot").setAttribute("aria-label", visible(`${title}. ${spoken(names)}`));
  return made;
}

// Metrics that never change are a line of text.
function still({ names }) {
  const values = new Set(DATA.runs.flatMap((run) => names.flatMap((name) => run.metrics[name] ?? [])).filter((y) => y !== null));
  return values.size === 1 && DATA.runs.some((run) => run.steps.length > 2) ? [...values][0] : null;
}

function panelsElement(panels) {
  const moving = panels.filter((panel) => still(panel) === null);
  const made = element("div", {}, element("div", { className: "plots" }, ...moving.map(panelFigure)));
  const rest = panels.filter((panel) => still(panel) !== null).map((panel) => `${panel.names[0]} ${number(still(panel))}`);
  if (rest.length) made.append(element("p", { className: "still", textContent: visible(`Always the same: ${rest.join(", ")}.`) }));
  return made;
}

function folded(title, panels, key) {
  const made = element("details", { open: memory.get(key) === "open" }, element("summary", {}, title), panelsElement(panels));
  made.addEventListener("toggle", () => { if (!root.classList.contains("paper")) memory.set(key, made.open ? "open" : ""); drawAll(); });
  return made;
}

function sectionElement(section) {
  const heading = element("h2", { textContent: section.title });
  const help = element("p", { className: "help", textContent: section.help });
  const made = element("section", { id: section.id });
  made.setAttribute("aria-label", section.title);
  const [minor, major] = [section.panels.filter((p) => p.minor), section.panels.filter((p) => !p.minor)];
  made.append(heading, help, panelsElement(major));
  if (minor.length) made.append(folded(`${minor.length} more`, minor, `${section.id} more`));
  return made;
}

function phaseFigure(run) {
  const seconds = DATA.phases.map(([name]) => (run.metrics[name] ?? []).reduce((a, b) => a + (b ?? 0), 0));
  const all = seconds.reduce((a, b) => a + b, 0);
  const shares = DATA.phases.map(([, title], p) => [title, seconds[p]]).filter(([, spent]) => spent > 0)
    .map(([title, spent]) => `${title} ${Math.round((100 * spent) / all)} %`).join(", ");
  return figure(run.name, `${number(all)} s in all: ${shares}`, () => ({
    traces: DATA.phases.filter(([name]) => run.metrics[name]).map(([name, title]) => {
      const p = DATA.phases.findIndex((phase) => phase[0] === name);
      return {
        x: run.steps.map((_, i) => xOf(run, i)), y: run.metrics[name].map((y) => y ?? 0), name: plain(title), stackgroup: "all",
        line: { width: 0.5, color: colour(p), shape: "hvh" }, fillcolor: colour(p), hovertemplate: `${plain(title)} %{y:.3g} s<extra></extra>`,
      };
    }),
    extra: { showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "x unified", margin: { l: 40, r: 8, t: 8, b: 34 } },
  }), true);
}

// ---- tables

function table(target, head, rows) {
  const cell = (tag) => (content) => {
    const made = content instanceof Node ? element(tag, {}, content) : element(tag, { textContent: visible(String(content)) });
    if (tag === "th") made.scope = "col";
    if (made.textContent.length > 24) made.className = "long";
    return made;
  };
  target.replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map(cell("th")))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))),
  );
}

function runName(i) {
  const g = DATA.groups.findIndex((group) => group.runs.includes(i));
  const key = element("span", { className: "key" });
  key.style.setProperty("--light", COLOURS.light[g % 8]);
  key.style.setProperty("--dark", COLOURS.dark[g % 8]);
  return element("span", {}, key, visible(DATA.runs[i].name));
}

function runsTable() {
  const differing = Object.keys(DATA.runs[0].differs);
  const span = (run, name) => {
    const found = (run.metrics[name] ?? []).filter((y) => y !== null);
    return found.length ? `${number(found[0])} → ${number(found.at(-1))}` : "–";
  };
  const pass = (run) => ("pass1_before" in run.summary && "pass1_after" in run.summary
    ? `${number(run.summary.pass1_before)} → ${number(run.summary.pass1_after)}` : span(run, "val/pass1"));
  table(
    byId("runs-table"),
    ["run", "seed", "iterations", "rollouts", "tokens", "seconds", "pass@1", "training accuracy", ...differing],
    DATA.runs.map((run, i) => [
      runName(i), run.seed ?? "–", run.iterations,
      ...["rollouts", "tokens", "seconds"].map((name) => number(run.spent[name], 4)), pass(run), span(run, "rollout/accuracy"),
      ...differing.map((name) => String(run.differs[name] ?? "–").slice(0, 80)),
    ]),
  );
}

function interval(row, name) {
  const [low, high] = row.interval[name] ?? [];
  return number(row.metrics[name]) + (Number.isFinite(low) && Number.isFinite(high) ? ` [${number(low)}, ${number(high)}]` : "");
}

function benchmarkFigures(keys) {
  return keys.map(([benchmark, name]) => figure(`${benchmark}: ${name}`, DATA.benchmarks.some((b) => b.benchmark === benchmark && b.interval[name]) ? "95 % intervals" : "", () => ({
    traces: DATA.runs.flatMap((run, r) => {
      const rows = DATA.benchmarks.filter((b) => b.run === r && b.benchmark === benchmark && Number.isFinite(b.metrics[name]));
      if (!rows.length) return [];
      const g = DATA.groups.findIndex((group) => group.runs.includes(r));
      const place = (b) => { const i = run.steps.findIndex((s) => s >= b.iteration); return i < 0 ? xOf(run, run.steps.length - 1) : xOf(run, i); };
      const off = (b, k, sign) => (Number.isFinite(b.interval[name]?.[k]) ? sign * (b.interval[name][k] - b.metrics[name]) : 0);
      return [{
        x: rows.map((b) => (axis === "iterations" || !run.steps.length ? b.iteration : place(b))), y: rows.map((b) => b.metrics[name]), name: plain(run.name),
        mode: "lines+markers", cliponaxis: false, line: { color: colour(g), width: 2 },
        error_y: { type: "data", symmetric: false, array: rows.map((b) => off(b, 1, 1)), arrayminus: rows.map((b) => off(b, 0, -1)), thickness: 1 },
        hovertemplate: `${plain(run.name)}<br>%{y:.4g}<extra></extra>`,
      }];
    }),
    extra: {},
  })));
}

function startBenchmarks() {
  if (!DATA.benchmarks.length) return;
  byId("benchmarks").hidden = false;
  const rows = [];
  const keys = new Map();
  for (const b of DATA.benchmarks) for (const name of Object.keys(b.metrics)) keys.set(`${b.benchmark}\n${name}`, [b.benchmark, name]);
  for (const [benchmark, name] of keys.values()) {
    DATA.runs.forEach((_, r) => {
      const found = DATA.benchmarks.filter((b) => b.run === r && b.benchmark === benchmark && name in b.metrics)
        .sort((a, b) => a.iteration - b.iteration);
      if (!found.length) return;
      const [first, end] = [found[0], found.at(-1)];
      rows.push([
        runName(r), benchmark, name, end.problems ?? "–", end.samples ?? "–",
        found.length > 1 ? `${interval(first, name)} (iteration ${first.iteration})` : "–", `${interval(end, name)} (iteration ${end.iteration})`,
      ]);
    });
  }
  table(byId("benchmarks-table"), ["run", "benchmark", "metric", "problems", "samples", "first", "last"], rows);
  const several = [...keys.values()].filter(([benchmark, name]) =>
    new Set(DATA.benchmarks.filter((b) => b.benchmark === benchmark).map((b) => b.metrics[name]).filter(Number.isFinite)).size > 1);
  byId("benchmarks-plots").append(...benchmarkFigures(several));
}

function drawAll() {
  for (const found of drawn) if (found[0].offsetParent !== null) draw(found);
}

function startPlots() {
  runsTable();
  for (const section of DATA.sections) {
    const place = { learning: "curves-first", other: "curves-last" }[section.id] ?? "curves-rest";
    byId(place).append(sectionElement(section));
  }
  const timed = DATA.runs.filter((run) => DATA.phases.some(([name]) => run.metrics[name]));
  byId("time").hidden = !timed.length;
  byId("time-plots").append(...timed.slice(0, 12).map(phaseFigure));
  if (timed.length > 12) byId("time-help").textContent += ` The first 12 of ${timed.length} runs.`;
  startBenchmarks();
  choices(byId("axis"), "axis", [["iterations", "iterations"], ["rollouts", "rollouts"], ["tokens", "tokens"], ["seconds", "wall time"]], axis, (chosen) => {
    axis = chosen;
    drawAll();
  });
  byId("axis").hidden = !DATA.sections.length;
  const sections = [...document.querySelectorAll("main section")].filter((s) => !s.hidden);
  byId("nav").append(...sections.map((s) => element("a", { href: `#${s.id}`, textContent: s.querySelector("h2").textContent })));
  drawAll();
  document.addEventListener("theme", drawAll);
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawAll, 100); });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    drawAll();
  });
  addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
}
startPlots();
