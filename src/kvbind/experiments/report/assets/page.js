"use strict";
// Runs the explorer, and keeps the theme. Claims, tables and charts stand in the page without it.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const root = document.documentElement;

// ---------------------------------------------------------------- what is chosen

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
const direction = () => document.querySelector('[name="direction"]:checked').value;

/** What a token is called. */
function token(i) {
  const example = model().example;
  if (example.kind === "text") return `${i} “${visible(example.tokens[i])}”`;
  const [height, width] = example.grid, inside = i % (height * width);
  const panel = example.panels[Math.floor(i / (height * width))].caption;
  return `${i}, ${panel}, row ${Math.floor(inside / width)}, column ${inside % width}`;
}

// ---------------------------------------------------------------- the choice in the address

/** Write the choice into the page's address, by names, which stay what they are when results are added. */
function tell() {
  const words = new URLSearchParams({
    model: model().title, row: row().name, layer: row().layers[chosen.layer].name, head: look().name, token: chosen.query, show: direction(),
  });
  history.replaceState(null, "", `#${words}`);
}

/** Take the choice that the address names; what it does not name, or names wrongly, stays. */
function heed() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (!words.has("model")) return false;
  const at = (list, key, name) => Math.max(list.findIndex((one) => one[name] === words.get(key)), 0);
  chosen.model = at(data.explorer, "model", "title");
  chosen.row = at(model().rows, "row", "name");
  chosen.layer = at(row().layers, "layer", "name");
  chosen.head = at(row().layers[chosen.layer].heads, "head", "name");
  const query = Number.parseInt(words.get("token"), 10);
  chosen.query = query >= 0 ? Math.min(query, look().size - 1) : null;
  const way = document.querySelector(`[name="direction"][value="${words.get("show") === "column" ? "column" : "row"}"]`);
  way.checked = true;
  return true;
}

// ---------------------------------------------------------------- colours and charts

const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;

/** A colour of the style sheet as the theme has it, [r, g, b]. */
function rgb(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}

const css = (parts, alpha = 1) => `rgba(${parts.map(Math.round).join(",")},${alpha})`;

const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").body.firstChild.namespaceURI;

/** An element of SVG. */
function mark(name, attributes = {}, ...inside) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

const label = (x, y, text, anchor = "start", kind = "tick") => mark("text", { x, y, "text-anchor": anchor, class: kind }, text);

/** Numbers to places along an axis, with round ticks. */
function axis(values, start, end, count = 5) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low) * 0.05 || Math.abs(low) * 0.1 || 0.5;
  [low, high] = [low - room, high + room];
  const place = (x) => start + ((x - low) / (high - low)) * (end - start);
  const unit = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = [1, 2, 5, 10].map((x) => x * unit).find((x) => (high - low) / x <= count);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) {
    const x = i * step;
    ticks.push([place(x), Math.abs(x) >= 1e5 ? x.toExponential(1) : x.toFixed(Math.min(digits, 6))]);
  }
  return { place, ticks };
}

/** A chart of lines with points between two axes. */
function lines(series, { x, y, width, height, whole = false }) {
  const [left, right, top, bottom] = [54, 10, 24, 40];
  const xs = series.flatMap((one) => one.x), ys = series.flatMap((one) => one.y).filter((value) => value !== null);
  const across = axis(xs, left, width - right, width < 250 ? 3 : 6), down = axis(ys.length ? ys : [0], height - bottom, top);
  const made = mark("svg", { class: "chart", viewBox: `0 0 ${width} ${height}` });
  for (const [place, text] of down.ticks) made.append(mark("path", { class: "grid", d: `M${left} ${place}H${width - right}` }), label(left - 7, place + 4, text, "end"));
  for (const [place, text] of across.ticks) if (!whole || !text.includes(".")) made.append(mark("path", { class: "grid", d: `M${place} ${top}V${height - bottom + 4}` }), label(place, height - bottom + 18, text, "middle"));
  made.append(label(0, 12, y, "start", "axis"), label((left + width - right) / 2, height - 4, x, "middle", "axis"));
  for (const one of series) {
    const points = one.x.map((value, i) => [value, one.y[i]]).filter(([, value]) => value !== null).map(([a, b]) => [across.place(a), down.place(b), a, b]);
    const group = mark("g", { style: `color:var(--${one.tone})` });
    if (points.length) group.append(mark("path", { class: "line", d: `M${points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}`, ...(one.dash ? { "stroke-dasharray": "6 3" } : {}) }));
    for (const [a, b, p, q] of points) group.append(mark("circle", { cx: a, cy: b, r: 3, fill: "currentColor" }, mark("title", {}, `${one.name}, ${p}: ${short(q)}`)));
    made.append(group);
  }
  return made;
}

/** A legend of marks beside their names. */
function names(entries) {
  const list = Object.assign(document.createElement("ul"), { className: "legend" });
  for (const [name, tone, drawn] of entries) {
    const item = document.createElement("li"), own = document.createElement("label");
    own.append(mark("svg", { viewBox: "0 0 24 10", "aria-hidden": "true", style: `color:var(--${tone})` }, drawn), name);
    item.append(own);
    list.append(item);
  }
  return list;
}

// ---------------------------------------------------------------- the explorer

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
  tell();
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
  const [line, at, thick] = [byId("matrix").querySelector("i"), `${(100 * chosen.query) / look().size}%`, `${100 / look().size}%`];
  Object.assign(line.style, direction() === "row" ? { left: 0, width: "100%", top: at, height: thick } : { top: 0, height: "100%", left: at, width: thick });
  drawPoints();
  drawReading();
}

/** A choice of a token. */
function pickToken(i) {
  chosen.query = i;
  drawQuery();
  tell();
}

function drawMatrix() {
  const own = look(), all = codes(own), canvas = byId("matrix").querySelector("canvas");
  Object.assign(canvas, { width: own.size, height: own.size });
  const tones = [rgb("blue"), rgb("orange")], pixels = new ImageData(own.size, own.size);
  all.forEach((line, t) => line.forEach((code, i) => {
    pixels.data.set([...tones[Number(code > 0)], 255 * Math.abs(code / 127)], 4 * (t * own.size + i));
  }));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  byId("pointed").textContent = "Point at a cell to read its weight.";
  byId("matrix").setAttribute("aria-label", `Token-mixing weights of ${own.size} rows, up to ${short(own.most)} in size. ${row().label}.`);
}

/** The row and column of the matrix under a pointer. */
function cellAt(event) {
  const box = byId("matrix").querySelector("canvas").getBoundingClientRect(), size = look().size;
  const at = (x, low, length) => Math.min(Math.max(Math.floor((size * (x - low)) / length), 0), size - 1);
  return [at(event.clientY, box.top, box.height), at(event.clientX, box.left, box.width)];
}

function drawPoints() {
  const own = look(), side = 300, places = (set) => set[0].map((x, i) => [x, set[1][i]]);
  const queries = places(own.q), keys = places(own.k), every = [...queries, ...keys];
  const across = axis(every.map(([x]) => x), 14, 426), down = axis(every.map(([, y]) => y), side - 30, 22);
  const made = mark("svg", { class: "chart", viewBox: `0 0 440 ${side}`, role: "img" });
  made.append(mark("rect", { class: "frame", x: 0.5, y: 18, width: 439, height: side - 44 }));
  const set = (points, tone, name, shape, at) => mark("g", { style: `color:var(--${tone})` }, ...points.map(([x, y], i) => {
    const drawn = shape(across.place(x), down.place(y));
    drawn.append(mark("title", {}, `${name} of ${token(at[i])}`));
    return drawn;
  }));
  const circle = (x, y, r = 3.4) => mark("circle", { cx: x, cy: y, r, fill: "currentColor", opacity: 0.75 });
  const diamond = (x, y) => mark("path", { class: "line", d: `M${x - 4.4} ${y}l4.4 -4.4 4.4 4.4 -4.4 4.4z` });
  const ring = mark("circle", { cx: across.place(queries[chosen.query][0]), cy: down.place(queries[chosen.query][1]), r: 7.5, fill: "none", stroke: "var(--ink)", "stroke-width": 2 });
  const share = (i) => `component ${i + 1}, ${Math.round(100 * own.shares[i])}% of the variance`;
  made.append(set(keys, "orange", "key", diamond, own.k_at), set(queries, "blue", "query", circle, queries.map((_, i) => i)), ring,
    label(0, 12, share(1), "start", "axis"), label(440, side - 8, share(0), "end", "axis"));
  made.setAttribute("aria-label", `Effective queries and keys on two principal components, ${Math.round(100 * (own.shares[0] + own.shares[1]))}% of their variance.`);
  byId("points").replaceChildren(names([["queries", "blue", circle(12, 5)], ["keys", "orange", diamond(12, 5)]]), made);
}

function drawLoss() {
  const own = look(), one = own.after.length === 1, count = (values) => values.map((_, i) => i);
  const steps = { name: "by steps", tone: "green", x: own.steps.map((x) => x[0]), y: own.steps.map((x) => x[1]) };
  const place = byId("loss"), sides = `${short(own.steps[0][1])} with no step, ${short(own.steps.at(-1)[1])} with ${own.steps.at(-1)[0]}`;
  const right = lines([steps], { x: "steps of the inner loop", y: "inner loss", width: one ? 440 : 440, height: one ? 260 : 200, whole: true });
  place.replaceChildren();
  if (!one) {
    const chunks = [
      { name: "before the chunk's update", tone: "orange", dash: true, x: count(own.before), y: own.before },
      { name: "after it", tone: "blue", x: count(own.after), y: own.after },
    ];
    const stroke = (dash) => mark("path", { d: "M0 5H24", "stroke-width": 3, ...(dash ? { "stroke-dasharray": "6 3" } : {}) });
    place.append(names(chunks.map((line) => [line.name, line.tone, stroke(line.dash)])), lines(chunks, { x: "chunk", y: "inner loss", width: 440, height: 220, whole: true }));
  }
  place.append(right);
  for (const chart of place.querySelectorAll(".chart")) {
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `Inner loss: ${sides}.`);
  }
  byId("loss-caption").textContent = one
    ? `The mean over all writing tokens, by the number of steps that write them: ${sides}.`
    : `Above, of each chunk's own tokens, before and after the update that they make. Below, with other numbers of steps, averaged over chunks: ${sides}.`;
}

/** The chosen token's row or column over the text or the picture itself. */
function drawReading() {
  const own = look(), all = codes(own), example = model().example, place = byId("reading");
  const line = direction() === "row" ? Array.from(all[chosen.query]) : all.map((one) => one[chosen.query]);
  const most = Math.max(...line.map(Math.abs)) || 1;
  const share = (code, alpha) => (alpha * Math.abs(code)) / most;
  if (example.kind === "text") {
    const box = Object.assign(document.createElement("p"), { className: "tokens" });
    example.tokens.forEach((text, i) => {
      const span = Object.assign(document.createElement("span"), { textContent: visible(text).replaceAll("↵", "↵\n") });
      span.style.background = `color-mix(in srgb, var(--${line[i] < 0 ? "blue" : "orange"}) ${(100 * share(line[i], 0.65)).toFixed(1)}%, transparent)`;
      span.title = `${token(i)}: ${short(weight(own, line[i]))}`;
      span.dataset.token = i;
      span.classList.toggle("chosen", i === chosen.query);
      box.append(span, example.spaced ? " " : "");
    });
    const top = place.firstChild?.scrollTop ?? 0;
    place.replaceChildren(box);
    box.scrollTop = top;
    return;
  }
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
      const code = line[p * count + i];
      heat.getContext("2d").fillStyle = css(rgb(code < 0 ? "blue" : "orange"), share(code, 1));
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

/** The token of a place in a text or picture. */
function pick(event) {
  const at = event.target;
  if (at.dataset.token !== undefined) return pickToken(Number(at.dataset.token));
  if (at.dataset.first === undefined) return;
  const [height, width] = model().example.grid, box = at.getBoundingClientRect();
  const [y, x] = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
  const inside = Math.min(Math.floor(y * height), height - 1) * width + Math.min(Math.floor(x * width), width - 1);
  pickToken(Number(at.dataset.first) + inside);
}

// ---------------------------------------------------------------- theme and start

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

/** What is drawn on canvas, in the colours of another theme. */
function repaint() {
  if (!data.explorer.length) return;
  drawMatrix();
  drawReading();
}

function startExplorer() {
  for (const key of ["model", "row", "layer", "head"]) byId(key).addEventListener("change", (event) => choose(key, Number(event.target.value)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("input", (event) => pickToken(Number(event.target.value)));
  byId("direction").addEventListener("change", () => { drawQuery(); tell(); });
  byId("reading").addEventListener("click", pick);
  byId("matrix").addEventListener("pointermove", (event) => {
    const [t, i] = cellAt(event), own = look();
    byId("pointed").textContent = `Output at ${token(t)}, value of ${token(i)}: ${short(weight(own, codes(own)[t][i]))}`;
  });
  byId("matrix").addEventListener("click", (event) => pickToken(cellAt(event)[direction() === "row" ? 0 : 1]));
  const named = heed();
  explore();
  if (named) byId("explorer").scrollIntoView({ behavior: "instant" });
  addEventListener("hashchange", () => { if (heed()) explore(); });
}

function start() {
  const theme = kept("kvbind-theme") ?? "auto";
  applyTheme(theme);
  document.querySelector(`[name="theme"][value="${theme}"]`).checked = true;
  byId("theme").addEventListener("change", (event) => {
    keep("kvbind-theme", event.target.value);
    applyTheme(event.target.value);
    repaint();
  });
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", repaint);
  if (data.explorer.length) startExplorer();
  else byId("explorer").hidden = true;
  root.dataset.ready = "yes";
}

start();
