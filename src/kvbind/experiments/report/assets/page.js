"use strict";
// Draws the charts of the page and runs its explorer. Claims, tables and texts stand in the page without it.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const root = document.documentElement;
const CONFIG = { displayModeBar: false, responsive: true };
const PLAIN = matchMedia("(pointer: coarse)").matches ? false : "zoom";  // a finger scrolls the page

// ---------------------------------------------------------------- colours

const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;

/** A colour of the style sheet as the theme has it, [r, g, b]. */
function rgb(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}

const css = (parts, alpha = 1) => `rgba(${parts.map(Math.round).join(",")},${alpha})`;
const between = (a, b, share) => a.map((x, i) => x + share * (b[i] - x));
const dark = () => rgb("paper")[0] < 128;

// viridis, without the end that is lost on the page's background
const SCALE = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"]
  .map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

/** The colour of a tone: a name of the style sheet, or a place on the ladder's scale. */
function colour(tone, alpha = 1) {
  if (typeof tone === "string") return css(rgb(tone), alpha);
  const place = (dark() ? 0.25 + 0.75 * tone : 0.82 * tone) * (SCALE.length - 1);
  const low = Math.min(Math.floor(place), SCALE.length - 2);
  return css(between(SCALE[low], SCALE[low + 1], place - low), alpha);
}

/** A layout in the page's own colours. */
function layout(more = {}) {
  const ink = css(rgb("ink")), muted = css(rgb("muted")), line = css(rgb("line")), paper = css(rgb("paper"));
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, tickfont: { color: muted }, automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: PLAIN, hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12.5, color: ink },
    margin: { l: 48, r: 12, t: 34, b: 44 },
    hoverlabel: { bgcolor: paper, bordercolor: muted, font: { color: ink, family: "system-ui, sans-serif" } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

/** A text as it is where Plotly reads markup. */
const safe = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const heading = (text) => ({ text: safe(text), x: 0, xref: "paper", xanchor: "left", font: { size: 13 } });
const title = (text) => ({ text: safe(text), font: { size: 12 } });

// ---------------------------------------------------------------- charts, by kind

const KINDS = {
  lines(chart) {
    const traces = chart.series.map((own) => ({
      type: "scatter", mode: chart.markers ? "lines+markers" : "lines", name: own.name, x: own.x, y: own.y,
      line: { color: colour(own.tone), width: 1.8, dash: own.dash ? "dash" : "solid" }, marker: { size: 6 },
      hovertemplate: "%{fullData.name}<br>%{x:.5~g}: %{y:.4~g}<extra></extra>",
    }));
    const yaxis = { title: title(chart.y), ...(chart.range ? { range: chart.range } : {}) };
    return [traces, layout({ title: heading(chart.title), xaxis: across(chart, {}), yaxis })];
  },

  dots(chart) {
    const places = chart.rows.map((_, i) => i);
    const traces = [];
    chart.series.forEach((own, number) => {
      const shown = colour(own.tone);
      if (number === 0 && chart.joined) {
        const rungs = places.filter((i) => i < chart.joined && own.x[i] !== null);
        traces.push({
          type: "scatter", mode: "lines", x: rungs.map((i) => own.x[i]), y: rungs, hoverinfo: "skip",
          line: { color: colour(own.tone, 0.5), width: 1.4 },
        });
      }
      const hollow = places.map((i) => own.hollow || chart.hollow.includes(i));
      traces.push({
        type: "scatter", mode: chart.digits === null ? "markers" : "markers+text", name: own.name, x: own.x, y: places,
        text: own.x.map((x) => (x === null || chart.digits === null ? "" : x.toFixed(chart.digits))), textposition: "top center",
        textfont: { size: 10.5, color: css(rgb("muted")) }, cliponaxis: false,
        marker: { size: 9, color: hollow.map((empty) => (empty ? css(rgb("paper")) : shown)), line: { color: shown, width: 1.8 } },
        error_x: own.errors ? { type: "data", array: own.errors.map((x) => x ?? 0), color: shown, thickness: 1.3, width: 3 } : undefined,
        customdata: chart.rows.map(safe), hovertemplate: "%{customdata}<br>%{fullData.name}: %{x:.4~g}<extra></extra>",
      });
    });
    return [traces, layout(rows(chart))];
  },

  bars(chart) {
    const traces = chart.series.map((own) => ({
      type: "bar", orientation: "h", name: own.name, x: own.x, y: chart.rows.map((_, i) => i), marker: { color: colour(own.tone) },
      customdata: chart.rows.map(safe), hovertemplate: "%{customdata}<br>%{fullData.name}: %{x:.4~g}<extra></extra>",
    }));
    return [traces, layout({ ...rows(chart), barmode: "group", bargap: 0.3 })];
  },

  points(chart) {
    const traces = chart.series.map((own) => ({
      type: "scatter", mode: "markers", name: own.name, x: own.x, y: own.y, hoverinfo: "name",
      marker: { size: 5, color: colour(own.tone, 0.7) },
    }));
    const bare = { showticklabels: false, ticks: "", zeroline: false, showgrid: false };
    return [traces, layout({ title: heading(chart.title), xaxis: bare, yaxis: bare, margin: { l: 8, r: 8, t: 34, b: 8 } })];
  },
};

/** Ticks of a logarithmic axis, by the orders of magnitude that its numbers span. */
function decades(chart) {
  const all = chart.series.flatMap((own) => own.x).filter((x) => x > 0);
  const span = Math.log10(Math.max(...all) / Math.min(...all));
  return span > 6 ? { dtick: 2, exponentformat: "e" } : { dtick: span > 2 ? 1 : "D2", exponentformat: "none" };
}

/** The horizontal axis: logarithmic, or as `plain` has it. */
function across(chart, plain) {
  return { title: title(chart.x), ...(chart.log ? { type: "log", ...decades(chart) } : plain) };
}

/** What charts share whose vertical axis names rows. */
function rows(chart) {
  const line = css(rgb("edge"));
  return {
    title: heading(chart.title),
    xaxis: across(chart, { nticks: 6 }),
    yaxis: {
      tickvals: chart.rows.map((_, i) => i), ticktext: chart.rows.map(safe), range: [chart.rows.length - 0.4, -0.75], showgrid: false,
      zeroline: false, fixedrange: true,
    },
    shapes: chart.limits.map((x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: line, width: 1, dash: "dash" } })),
  };
}

const drawn = new Map();  // the page's charts that came into view, by their elements

function draw(place) {
  const chart = data.charts[place.dataset.chart];
  place.classList.toggle("tall", chart.rows !== undefined && chart.rows.length > 14);
  const [traces, shape] = KINDS[chart.kind](chart);
  const hidden = hiddenNames(place.closest(".group"));
  for (const trace of traces) {
    if (hidden.has(trace.name)) trace.visible = false;
    if (trace.name !== undefined) trace.name = safe(trace.name);
  }
  drawn.set(place, Plotly.react(place, traces, shape, CONFIG));
}

const hiddenNames = (group) =>
  new Set([...group.querySelectorAll('.legend [aria-pressed="false"]')].map((button) => button.dataset.name));

/** One legend for all charts of a group, of buttons that a keyboard reaches. */
function legend(group) {
  const own = [...group.querySelectorAll(".plot")];
  const series = new Map();
  for (const place of own) for (const one of data.charts[place.dataset.chart].series) series.set(one.name, one);
  const list = group.querySelector(".legend");
  if (own.every((place) => data.charts[place.dataset.chart].series.length < 2)) return list.remove();
  for (const [name, one] of series) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", innerHTML: '<svg viewBox="0 0 24 10" aria-hidden="true"></svg>' });
    button.append(name);
    button.dataset.name = name;
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
      own.forEach((place) => drawn.has(place) && draw(place));
    });
    const item = document.createElement("li");
    item.append(button);
    list.append(item);
  }
  paintLegend(group);
}

function paintLegend(group) {
  for (const button of group.querySelectorAll(".legend button")) {
    const charts = [...group.querySelectorAll(".plot")].map((place) => data.charts[place.dataset.chart]);
    const chart = charts.find((own) => own.series.some((one) => one.name === button.dataset.name));
    const one = chart.series.find((own) => own.name === button.dataset.name);
    const stroke = `stroke="${colour(one.tone)}"`, fill = one.hollow ? "" : `fill="${colour(one.tone)}"`;
    button.querySelector("svg").innerHTML = {
      lines: `<line x1="0" y1="5" x2="24" y2="5" stroke-width="3" ${stroke} ${one.dash ? 'stroke-dasharray="6 3"' : ""}/>`,
      bars: `<rect x="4" y="1" width="16" height="8" ${fill}/>`,
    }[chart.kind] ?? `<circle cx="12" cy="5" r="3.8" stroke-width="1.6" ${stroke} ${fill}/>`;
  }
}

/** Whether a group has charts of numbers, and not of places alone, whose axes mean nothing. */
const hasNumbers = (details) =>
  [...details.parentElement.querySelectorAll(".plot")].some((place) => data.charts[place.dataset.chart].kind !== "points");

/** A group's numbers as tables, made when they are first asked for. */
function numbers(details) {
  if (details.children.length > 1) return;
  for (const place of details.parentElement.querySelectorAll(".plot")) {
    const chart = data.charts[place.dataset.chart];
    const keys = chart.rows ?? [...new Set(chart.series.flatMap((own) => own.x))].sort((a, b) => a - b);
    const named = chart.rows !== undefined;
    if (chart.kind === "points") continue;
    const table = document.createElement("table");
    table.createCaption().textContent = `${chart.title}: ${named ? chart.x : `${chart.y} by ${chart.x}`}`;
    const head = table.createTHead().insertRow();
    for (const name of [named ? "" : chart.x, ...chart.series.map((own) => own.name)]) {
      head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: name }));
    }
    const body = table.createTBody();
    keys.forEach((key, i) => {
      const row = body.insertRow();
      row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: key }));
      for (const own of chart.series) {
        const value = named ? own.x[i] : own.y[own.x.indexOf(key)];
        row.insertCell().textContent = value === null || value === undefined ? "–" : value;
      }
    });
    const wide = Object.assign(document.createElement("div"), { className: "wide", tabIndex: 0 });
    wide.setAttribute("role", "region");
    wide.setAttribute("aria-label", table.caption.textContent);
    wide.append(table);
    details.append(wide);
  }
}

// ---------------------------------------------------------------- explorer

const chosen = { model: 0, row: 0, layer: 0, head: 0, query: null };
const cache = new Map();

/** Weights of -127 to 127 as they are kept, [n][n]; the weight is most * sign(c) * (c / 127)^2. */
function codes(look) {
  if (!cache.has(look)) {
    const bytes = Uint8Array.from(atob(look.codes), (letter) => letter.charCodeAt(0));
    const flat = new Int8Array(bytes.buffer);
    cache.set(look, Array.from({ length: look.size }, (_, i) => flat.subarray(i * look.size, (i + 1) * look.size)));
  }
  return cache.get(look);
}

const weight = (look, code) => Math.sign(code) * look.most * (code / 127) ** 2;
const short = (x) => (x === null ? "without bound" : x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e4 ? x.toExponential(1) : String(Number(x.toPrecision(2))));
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[\0-\x1f]/g, "•");
const model = () => data.explorer[chosen.model];
const row = () => model().rows[chosen.row];
const look = () => row().layers[chosen.layer].heads[chosen.head];

/** What a token is called. */
function token(i) {
  const example = model().example;
  if (example.kind === "text") return `${i} “${visible(example.tokens[i])}”`;
  const [height, width] = example.grid, inside = i % (height * width);
  const panel = example.panels[Math.floor(i / (height * width))].caption;
  return `${i}, ${panel}, row ${Math.floor(inside / width)}, column ${inside % width}`;
}

/** Give a select its options, and keep the choice where there still is one. */
function fill(select, names, at, group = () => null) {
  select.replaceChildren();
  names.forEach((name, i) => {
    const option = new Option(name, i);
    const label = group(i);
    if (!label) return select.append(option);
    let own = [...select.children].find((child) => child.label === label);
    if (!own) select.append((own = Object.assign(document.createElement("optgroup"), { label })));
    own.append(option);
  });
  select.value = at;
  select.disabled = names.length < 2;
}

/** Take a choice, and what of the others it leaves possible. */
function choose(key, value) {
  const before = { row: row().name, layer: chosen.layer, head: look().name };
  chosen[key] = value;
  if (key === "model") {
    chosen.row = Math.max(model().rows.findIndex((one) => one.name === before.row), 0);
    chosen.query = null;
  }
  chosen.layer = Math.min(key === "layer" ? value : before.layer, row().layers.length - 1);
  if (key !== "head") chosen.head = Math.max(row().layers[chosen.layer].heads.findIndex((one) => one.name === before.head), 0);
  explore();
}

function explore() {
  const own = model(), line = row();
  fill(byId("model"), data.explorer.map((one) => one.title), chosen.model, (i) => data.explorer[i].group);
  fill(byId("row"), own.rows.map((one) => one.label), chosen.row);
  fill(byId("layer"), line.layers.map((one) => one.name), chosen.layer);
  fill(byId("head"), line.layers[chosen.layer].heads.map((one) => one.name), chosen.head);
  byId("about").textContent = line.found ? `${own.about} This one: ${line.found}.` : own.about;
  const parallel = line.obstacle === null ? "parallel form: yes" : `parallel form: no, ${line.obstacle}`;
  byId("spec").textContent = `${line.spec} — ${parallel}`;
  const size = look().size;
  chosen.query = Math.min(chosen.query ?? Math.floor(size * 0.8), size - 1);
  byId("query").max = size - 1;
  drawMatrix();
  drawLoss();
  drawQuery();
}

/** What depends on the chosen token. */
function drawQuery() {
  byId("query").value = chosen.query;
  byId("unit").textContent = model().example.unit;
  byId("chosen").textContent = token(chosen.query);
  Plotly.relayout("matrix", { shapes: queryLine() });
  drawPoints();
  drawReading();
}

const direction = () => document.querySelector('[name="direction"]:checked').value;

function queryLine() {
  const [low, high, line] = [chosen.query - 0.5, chosen.query + 0.5, { color: css(rgb("ink")), width: 1 }];
  const across = direction() === "row" ? { x0: -0.5, x1: look().size - 0.5, y0: low, y1: high } : { y0: -0.5, y1: look().size - 0.5, x0: low, x1: high };
  return [{ type: "rect", ...across, line }];
}

function drawMatrix() {
  const own = look(), z = codes(own).map((line) => Array.from(line, (code) => code / 127));
  const names = z.map((_, i) => safe(token(i))), unit = model().example.unit;
  const text = codes(own).map((line, t) => Array.from(line, (code, i) => `output at ${names[t]}<br>value of ${names[i]}<br>${short(weight(own, code))}`));
  const shades = [[0, css(rgb("blue"))], [0.5, css(rgb("paper"))], [1, css(rgb("orange"))]];
  const ticks = [-1, -0.5, 0, 0.5, 1];
  const axis = { showgrid: false, zeroline: false, nticks: 6, constrain: "domain", range: [-0.5, own.size - 0.5] };
  const trace = {
    type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", zmin: -1, zmax: 1, colorscale: shades,
    colorbar: {
      thickness: 9, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map((x) => short(Math.sign(x) * own.most * x * x)), tickfont: { size: 11 },
      len: 0.9,
    },
  };
  const shape = layout({
    margin: { l: 44, r: 8, t: 8, b: 44 }, dragmode: false, shapes: queryLine(),
    xaxis: { ...axis, title: title(`${unit} that wrote`) },
    yaxis: { ...axis, title: title(`${unit} that reads`), range: [own.size - 0.5, -0.5], scaleanchor: "x", constraintoward: "top" },
  });
  Plotly.react("matrix", [trace], shape, CONFIG);
  byId("matrix").setAttribute("aria-label", `Token-mixing weights of ${own.size} rows, up to ${short(own.most)} in size. ${row().label}.`);
}

function drawPoints() {
  const own = look(), at = chosen.query, cells = own.q[0].map((_, i) => i);
  const set = (name, tone, [x, y], symbol, places) => ({
    type: "scatter", mode: "markers", name, x, y, text: places.map((i) => safe(token(i))), marker: { color: colour(tone, 0.75), size: 7, symbol },
    hovertemplate: `${name} of %{text}<extra></extra>`,
  });
  const ring = {
    type: "scatter", mode: "markers", x: [own.q[0][at]], y: [own.q[1][at]], hoverinfo: "skip", showlegend: false,
    marker: { size: 15, color: "rgba(0,0,0,0)", line: { color: css(rgb("ink")), width: 2 } },
  };
  const share = (i) => title(`component ${i + 1} (${Math.round(100 * own.shares[i])}% of the variance)`);
  const shape = layout({
    showlegend: true, legend: { orientation: "h", x: 0, y: 1.12 }, margin: { l: 48, r: 8, t: 30, b: 44 }, dragmode: PLAIN,
    xaxis: { title: share(0) }, yaxis: { title: share(1) },
  });
  Plotly.react("points", [set("queries", "blue", own.q, "circle", cells), set("keys", "orange", own.k, "diamond-open", own.k_at), ring], shape, CONFIG);
  byId("points").setAttribute("aria-label", `Effective queries and keys on two principal components, ${Math.round(100 * (own.shares[0] + own.shares[1]))}% of their variance.`);
}

function drawLoss() {
  const own = look(), one = own.after.length === 1;
  const trace = (name, tone, y, dash) => ({
    type: "scatter", mode: "lines+markers", name, x: y.map((_, i) => i), y, line: { color: colour(tone), width: 1.6, dash }, marker: { size: 5 },
    hovertemplate: `${name}: %{y:.4~g}<extra></extra>`,
  });
  const steps = {
    type: "scatter", mode: "lines+markers", name: "by steps", x: own.steps.map((x) => x[0]), y: own.steps.map((x) => x[1]),
    xaxis: one ? "x" : "x2", yaxis: one ? "y" : "y2", line: { color: colour("green"), width: 1.6 }, marker: { size: 6, symbol: "square" },
    hovertemplate: "after %{x} step(s): %{y:.4~g}<extra></extra>",
  };
  const chunks = [trace("before the chunk's update", "orange", own.before, "dash"), trace("after it", "blue", own.after)];
  const base = layout({
    showlegend: !one, legend: { orientation: "h", x: 0, y: 1.14 }, margin: { l: 56, r: 8, t: 30, b: 44 },
    xaxis: { title: title(one ? "steps of the inner loop" : "chunk"), domain: one ? [0, 1] : [0, 0.6] }, yaxis: { title: title("inner loss") },
  });
  if (!one) {
    base.xaxis2 = { ...base.xaxis, title: title("steps"), domain: [0.76, 1] };
    base.yaxis2 = { ...base.yaxis, title: undefined, anchor: "x2" };
  }
  Plotly.react("loss", [...(one ? [] : chunks), steps], base, CONFIG);
  const sides = `${short(own.steps[0][1])} with no step, ${short(own.steps.at(-1)[1])} with ${own.steps.at(-1)[0]}`;
  byId("loss").setAttribute("aria-label", `Inner loss: ${sides}.`);
  byId("loss-caption").textContent = one
    ? `The mean over all writing tokens, by the number of steps that write them: ${sides}.`
    : `Left, of each chunk's own tokens, before and after the update that they make. Right, with other numbers of steps, averaged over chunks: ${sides}.`;
}

/** The chosen token's row or column over the text or the picture itself. */
function drawReading() {
  const own = look(), all = codes(own), example = model().example, place = byId("reading");
  const line = direction() === "row" ? Array.from(all[chosen.query]) : all.map((one) => one[chosen.query]);
  const most = Math.max(...line.map(Math.abs)) || 1;
  const shade = (code, alpha) => css(rgb(code < 0 ? "blue" : "orange"), alpha * Math.abs(code) / most);
  if (example.kind === "text") {
    const box = Object.assign(document.createElement("p"), { className: "tokens" });
    example.tokens.forEach((text, i) => {
      const span = Object.assign(document.createElement("span"), { textContent: visible(text).replaceAll("↵", "↵\n") });
      span.style.background = shade(line[i], 0.65);
      span.title = `${token(i)}: ${short(weight(own, line[i]))}`;
      span.dataset.token = i;
      span.classList.toggle("chosen", i === chosen.query);
      box.append(span, example.spaced ? " " : "");
    });
    const top = place.firstChild?.scrollTop ?? 0;
    place.replaceChildren(box);
    box.scrollTop = top;
  } else {
    const panels = Object.assign(document.createElement("div"), { className: "panels" });
    const [height, width] = example.grid, count = height * width, few = example.panels.length < 3;
    example.panels.forEach((panel, p) => {
      const figure = document.createElement("figure");
      const side = few ? 168 : 84, scale = side / Math.max(height, width);
      const [picture, heat] = [0, 1].map(() => Object.assign(document.createElement("canvas"), { width: width * scale * 2, height: height * scale * 2 }));
      for (const canvas of [picture, heat]) {
        canvas.style.width = `${width * scale}px`;
        canvas.dataset.first = p * count;
      }
      heat.getContext("2d").scale(2 * scale, 2 * scale);
      for (let i = 0; i < count; i++) {
        heat.getContext("2d").fillStyle = shade(line[p * count + i], 1);
        heat.getContext("2d").fillRect(i % width, Math.floor(i / width), 1, 1);
      }
      const pen = picture.getContext("2d");
      pen.imageSmoothingEnabled = false;
      const outline = () => {
        const inside = chosen.query - p * count;
        if (inside < 0 || inside >= count) return;
        for (const canvas of [picture, heat]) {
          const ink = canvas.getContext("2d");
          ink.setTransform(2 * scale, 0, 0, 2 * scale, 0, 0);
          ink.strokeStyle = canvas === heat ? css(rgb("ink")) : css(rgb("orange"));
          ink.lineWidth = 3 / (2 * scale);
          ink.strokeRect((inside % width) + 0.05, Math.floor(inside / width) + 0.05, 0.9, 0.9);
        }
      };
      image(panel).then((loaded) => {
        pen.drawImage(loaded, 0, 0, picture.width, picture.height);
        outline();
      });
      const caption = Object.assign(document.createElement("figcaption"), { textContent: panel.caption });
      figure.append(picture, heat, caption);
      panels.append(figure);
    });
    place.replaceChildren(panels);
  }
}

const images = new Map();

/** A panel's picture, decoded once. */
function image(panel) {
  if (!images.has(panel)) {
    const loaded = new Image();
    loaded.src = panel.source;
    images.set(panel, loaded.decode().then(() => loaded));
  }
  return images.get(panel);
}

function pick(event) {
  const at = event.target;
  if (at.dataset.token !== undefined) chosen.query = Number(at.dataset.token);
  else if (at.dataset.first !== undefined) {
    const [height, width] = model().example.grid, box = at.getBoundingClientRect();
    const [y, x] = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    chosen.query = Number(at.dataset.first) + Math.floor(y * height) * width + Math.min(Math.floor(x * width), width - 1);
  } else return;
  drawQuery();
}

// ---------------------------------------------------------------- theme, filter, start

function keep(name, value) {
  try { localStorage.setItem(name, value); } catch { /* a page from a file may have no storage */ }
}

function kept(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function applyTheme(name) {
  if (name === "auto") delete root.dataset.theme;
  else root.dataset.theme = name;
}

function repaint() {
  document.querySelectorAll(".group").forEach(paintLegend);
  for (const place of drawn.keys()) draw(place);
  if (exploring) explore();
}

/** Plotly, from the compressed script inside the page. */
async function unpack() {
  const bytes = Uint8Array.from(atob(byId("library").textContent), (letter) => letter.charCodeAt(0));
  const code = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = code;
  document.head.append(script);
}

let exploring = false;

function startExplorer() {
  for (const key of ["model", "row", "layer", "head"]) byId(key).addEventListener("change", (event) => choose(key, Number(event.target.value)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("input", (event) => { chosen.query = Number(event.target.value); drawQuery(); });
  byId("direction").addEventListener("change", drawQuery);
  byId("reading").addEventListener("click", pick);
  exploring = true;
  explore();
  byId("matrix").on("plotly_click", (event) => {
    chosen.query = event.points[0][direction() === "row" ? "y" : "x"];
    drawQuery();
  });
}

async function start() {
  applyTheme(kept("kvbind-theme") ?? "auto");
  document.querySelector(`[name="theme"][value="${kept("kvbind-theme") ?? "auto"}"]`).checked = true;
  byId("theme").addEventListener("change", (event) => {
    keep("kvbind-theme", event.target.value);
    applyTheme(event.target.value);
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  byId("filter").addEventListener("change", (event) => {
    for (const claim of document.querySelectorAll("#claims li")) claim.hidden = event.target.value !== "all" && !claim.classList.contains(event.target.value);
    for (const part of document.querySelectorAll("#claims .part, .ruling")) part.hidden = !part.querySelector("li:not([hidden])");
  });
  document.querySelectorAll(".group").forEach(legend);
  document.querySelectorAll(".numbers").forEach((details) => hasNumbers(details) || details.remove());
  document.querySelectorAll(".numbers").forEach((details) => details.addEventListener("toggle", () => numbers(details)));

  await unpack();
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      if (entry.target.id === "explorer") startExplorer();
      else draw(entry.target);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot[data-chart], #explorer").forEach((place) => seen.observe(place));
  root.dataset.ready = "yes";
}

start();
