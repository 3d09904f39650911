// The explorer's browser side. The kernel (msnlan/correlation/views.py) sends the picture (`scene`) and, for each query pixel, the
// maps and numbers (`answer`); everything here draws them and sets the traits that say what is on show.

const RANKS = ["#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#FFFFFF"];  // Okabe and Ito
const QUANTITIES = { match: "match: the patch's weights", mixture: "mixture: what the pixel is made of" };
const WEIGHTINGS = { "": "its own", none: "none", uniform: "uniform", "top-k": "top-k", random: "random", shuffled: "its own, shuffled", "local window": "local window",
  softmax: "softmax", sparsemax: "soft threshold" };
const WHOLE = { "": "the query pixel", effective_keys: "whole picture: effective keys", entropy: "whole picture: entropy", distance: "whole picture: mean distance",
  best_distance: "whole picture: distance of best match", self_match: "whole picture: self-match", largest: "whole picture: largest weight",
  contribution: "whole picture: contribution" };
const LETTERS = "ABCDEF";  // of the pinned pixels
const HELP = "Arrow keys move the pixel (Shift: by ten), + \u2212 0 zoom, 1 to 8 jump to a match, P pins or unpins, Q the next pin, " +
  "M match or mixture, D the difference to the first map, O what comes out, E the largest error, Escape cancels.";
const DECADES = 4;         // that a logarithmic scale shows by itself, at most
const SCALES = [[0, "linear"], [-1, "logarithmic"], ...[2, 4, 8, 16, 32].map((n) => [n, `logarithmic, ${n} decades`])];
const TALLEST = 600;       // of a picture that fits, screen pixels
const LARGEST = 4096;      // side of a zoomed picture, screen pixels
const PART = 2 ** 20;      // bytes of an upload in one message
const FORMATS = { "pdf double": "PDF, two columns", "pdf single": "PDF, one column", "svg double": "SVG, two columns", "svg single": "SVG, one column" };
const ORDER = ["first", "second", "third", "fourth"];
const MORE = [230, 97, 1], LESS = [94, 60, 153];   // orange and purple, apart for every reader
const PHOTOS = "photographs", OWN = "your own";   // sets of pictures
const FILE = "\u2026";     // the list entry that asks for a weights file

function make(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.includes("-")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function labelled(text, control, more = "") {
  control.id = `mx-${Math.random().toString(36).slice(2)}`;
  return make("div", { className: `mx-field ${more}` }, make("label", { htmlFor: control.id }, text), control);
}

function fill(select, names, chosen, show = (n) => n) {
  const key = JSON.stringify(names.map((n) => [n, show(n)]));
  if (select.dataset.names !== key) {
    select.replaceChildren(...names.map((n) => make("option", { value: n, textContent: show(n) })));
    select.dataset.names = key;
  }
  select.value = chosen;
}

const floats = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const number = (x) => (x === 0 ? "0" : x >= 0.001 && x < 1e5 ? String(Number(x.toPrecision(3))) : x.toExponential(1));
const percent = (w) => (w < 1e-5 ? "< 0.001 %" : `${w >= 0.0995 ? (100 * w).toFixed(0) : number(100 * w)} %`);

// ---- pictures ------------------------------------------------------------------------------------------------------

function raster([height, width], colour) {
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [table, at, alpha = 255] = colour(i);
    image.data[4 * i] = table[at]; image.data[4 * i + 1] = table[at + 1]; image.data[4 * i + 2] = table[at + 2];
    image.data[4 * i + 3] = alpha;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const photograph = (scene) => { const p = bytes(scene.pixels); return raster(scene.size, (i) => [p, 3 * i]); };

function span(map, most, decades) {   // decades that the colours stand for; automatic: the larger half of the weights above 0
  if (decades >= 0) return decades;
  const above = map.filter((w) => w > 0).sort(), low = above.length ? above[Math.floor(above.length / 2)] : most;
  return clamp(Math.ceil(Math.log10(most / low)) || 1, 1, DECADES);
}

function level(weight, most, decades) {   // 0 ... 255: which colour shows a weight
  if (!(weight > 0) || !(most > 0)) return 0;
  const share = decades ? 1 + Math.log10(weight / most) / decades : weight / most;
  return Math.round(255 * clamp(share, 0, 1));
}

function heat(size, map, most, table, decades) {   // the smaller the weight, the more of the picture is seen; 0 hides nothing
  return raster(size, (i) => {
    const at = level(map[i], most, decades);
    return [table, 3 * at, map[i] > 0 ? Math.round(255 * Math.sqrt(at / 255)) : 0];
  });
}

function contrast(size, map, first, most) {   // more weight than the first map in orange, less in purple
  const table = [...MORE, ...LESS];
  return raster(size, (i) => {
    const d = map[i] - first[i];
    return [table, d > 0 ? 0 : 3, Math.round(255 * Math.sqrt(Math.min(1, Math.abs(d) / (most || 1))))];
  });
}

const largestOf = (map) => map.reduce((most, w) => Math.max(most, w), 0);

function outline(context, [top, left, height, width], colour, z, line = 2) {
  for (const [style, thick] of [["#000", line + 2], [colour, line]]) {
    context.strokeStyle = style; context.lineWidth = thick;
    context.strokeRect(left * z, top * z, width * z, height * z);
  }
}

function cross(context, [row, column], z) {
  const x = (column + 0.5) * z, y = (row + 0.5) * z, near = Math.max(4, 0.7 * z), far = near + 9;
  for (const [style, thick] of [["#000", 4], ["#FFF", 2]]) {
    context.strokeStyle = style; context.lineWidth = thick; context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + dx * near, y + dy * near); context.lineTo(x + dx * far, y + dy * far);
    }
    context.stroke();
  }
}

function tag(context, text, x, y, colour) {   // the rank beside a box
  context.font = "bold 12px sans-serif"; context.textBaseline = "bottom";
  context.lineWidth = 3; context.strokeStyle = "#000"; context.strokeText(text, x, y);
  context.fillStyle = colour; context.fillText(text, x, y);
}

function paint(context, show, z) {   // a panel's picture at z screen pixels a pixel
  const [height, width] = show.size;
  context.imageSmoothingEnabled = false;
  if (show.contrast) context.filter = "grayscale(1)";      // so that orange and purple are the difference's
  context.drawImage(show.picture, 0, 0, width * z, height * z);
  context.filter = "none";
  context.globalAlpha = show.opacity;
  context.drawImage(show.heat, 0, 0, width * z, height * z);
  context.globalAlpha = 1;
  show.matches.forEach((m, i) => outline(context, m.box, RANKS[i], z, m.weight < 0.01 * show.largest ? 1 : 2));
  show.matches.forEach((m, i) => tag(context, i + 1, clamp(m.box[1] * z + 2, 0, width * z - 12),
    clamp(m.box[0] * z - 2, 12, height * z), RANKS[i]));
  (show.pins || []).forEach((pin, i) => {
    const colour = RANKS[(i + 1) % RANKS.length], [top, left, high, wide] = pin.query;
    context.save(); context.setLineDash([4, 3]);
    pin.matches.forEach((m) => outline(context, m.box, colour, z, 1));
    context.restore();
    outline(context, pin.query, colour, z, 2);
    tag(context, LETTERS[i], (left + wide / 2) * z - 4, (top + high / 2) * z + 7, colour);
  });
  outline(context, show.query, "#FFF", z, 1);
  cross(context, show.point, z);
  if (show.hover) ring(context, show.hover, z);
  if (show.untrained) banner(context, "UNTRAINED: random weights", width * z);
}

function ring(context, [row, column], z) {   // where the pointer is, in the other panel too
  context.strokeStyle = "#FFF"; context.lineWidth = 1; context.setLineDash([2, 2]);
  context.strokeRect(column * z - 3, row * z - 3, z + 6, z + 6); context.setLineDash([]);
}

function banner(context, text, width) {   // what no reader of the picture may miss
  context.save();
  const size = clamp(width / 18, 9, 16);
  context.font = `bold ${size}px sans-serif`; context.textBaseline = "middle";
  context.fillStyle = "rgba(0, 0, 0, 0.75)"; context.fillRect(0, 0, width, 1.6 * size);
  context.fillStyle = "#FFF"; context.fillText(text, 0.4 * size, 0.85 * size, width - 0.8 * size);
  context.restore();
}

function enlarge(context, show, box, colour, side, x0 = 0, y0 = 0) {   // a patch with what lies around it
  const [top, left, height, width] = box, reach = Math.max(12, 3 * Math.max(height, width)), z = side / reach;
  const y = top + (height - reach) / 2, x = left + (width - reach) / 2;
  context.save();
  context.translate(x0, y0); context.beginPath(); context.rect(0, 0, side, side); context.clip();
  context.fillStyle = "#808080"; context.fillRect(0, 0, side, side);
  context.imageSmoothingEnabled = false;
  context.translate(-x * z, -y * z);
  context.drawImage(show.picture, 0, 0, show.size[1] * z, show.size[0] * z);
  outline(context, box, colour, z);
  context.restore();
}

function signs(context, width, height, x0 = 0, y0 = 0) {   // the colours of a difference, less to more
  for (let i = 0; i < width; i++) {
    const t = 2 * i / (width - 1) - 1, [r, g, b] = t > 0 ? MORE : LESS;
    context.fillStyle = "#FFF"; context.fillRect(x0 + i, y0, 1, height);
    context.fillStyle = `rgba(${r},${g},${b},${Math.sqrt(Math.abs(t))})`; context.fillRect(x0 + i, y0, 1, height);
  }
}

const colours = (show, context, table, width, height, x0 = 0, y0 = 0) => show.contrast ? signs(context, width, height, x0, y0) : legend(context, table, width, height, x0, y0);

function legend(context, table, width, height, x0 = 0, y0 = 0) {
  for (let i = 0; i < width; i++) {
    const at = 3 * Math.round((255 * i) / (width - 1));
    context.fillStyle = `rgb(${table[at]},${table[at + 1]},${table[at + 2]})`;
    context.fillRect(x0 + i, y0, 1, height);
  }
}

const ends = (show) => show.contrast ? [`\u2212${number(show.contrast)}`, `+${number(show.contrast)} against the first map`] : show.whole ? ["0", `${show.whole.name} ${number(show.most)}`] : [show.decades ? `\u2264 ${number(show.most / 10 ** show.decades)}` : "0", `weight ${number(show.most)}`];

const facts = (show) => [
  ["Largest weight of a key", number(show.largest)],
  ["Effective keys", `${number(show.effective_keys)} of ${show.keys}`],
  ...(show.beside ? [["Keys in the padding", String(show.beside)]] : []),
  ["Entropy", `${number(show.entropy)} nats`],
  ["Mean distance", `${number(show.distance)} px`],
  ...(show.quantity === "mixture" ? [["Sum of the mixture", number(show.share)]]
    : show.share < 0.9995 ? [["Share of this level", percent(show.share)]] : []),
];

const place = ([top, left, height, width]) =>
  `row ${Math.floor(top + height / 2)}, col ${Math.floor(left + width / 2)}`;

// ---- one panel -----------------------------------------------------------------------------------------------------

class Panel {
  constructor(app, index) {
    Object.assign(this, { app, index });
    const choose = (what) => make("select", { onchange: (e) => this.choose(what, e.target.value) });
    this.model = choose("model"); this.layer = choose("layer"); this.branch = choose("branch");
    this.path = make("input", { type: "text", placeholder: "weights.safetensors", spellcheck: false,
      onkeydown: (e) => { if (e.key === "Enter") this.open(); } });
    this.file = make("div", { className: "mx-row", hidden: true }, labelled("Weights file on the kernel's machine", this.path, "mx-wide"),
      make("button", { type: "button", textContent: "Open", onclick: () => this.open() }));
    this.canvas = make("canvas", { tabIndex: 0, role: "application", className: "mx-picture", "aria-label": "a map that is not shown",
      onkeydown: (e) => app.key(e), onpointerdown: (e) => this.point(e, true), onpointermove: (e) => this.point(e, false),
      onpointerleave: () => app.hover(null) });
    this.stage = make("div", { className: "mx-stage" }, this.canvas);
    this.bar = make("canvas", { width: 160, height: 10, className: "mx-bar", role: "img", "aria-label": "colours of the weights" });
    this.low = make("span"); this.high = make("span");
    this.under = make("div", { className: "mx-under" }, "\u00a0");
    this.patches = make("div", { className: "mx-patches", role: "list", "aria-label": "query patch and matched patches" });
    this.numbers = make("dl", { className: "mx-numbers" });
    this.pins = make("div", { className: "mx-pins" });
    this.results = make("div", { className: "mx-results", hidden: true });
    this.body = make("div", { className: "mx-body" },
      make("div", {}, this.stage, make("div", { className: "mx-legend" }, this.low, this.bar, this.high), this.under),
      make("div", {}, this.patches, this.pins, this.numbers));
    const name = ORDER[index];
    this.node = make("section", { className: "mx-panel", "aria-label": `${name} map` },
      make("div", { className: "mx-choices" }, labelled("Model", this.model), labelled("Layer", this.layer), labelled("Branch", this.branch)),
      this.file, this.body, this.results);
  }

  choose(what, value) {
    this.file.hidden = !(what === "model" && value === FILE);
    if (!this.file.hidden) return this.path.focus();
    this.app.panel(this.index, { [what]: value });
  }

  open() { if (this.path.value.trim()) this.app.panel(this.index, { model: this.path.value.trim() }); }

  position(event) {
    const box = this.canvas.getBoundingClientRect(), [height, width] = this.show.size;
    return [clamp(Math.floor((event.clientY - box.top) * height / box.height), 0, height - 1),
      clamp(Math.floor((event.clientX - box.left) * width / box.width), 0, width - 1)];
  }

  point(event, pressed) {
    if (!this.show) return;
    const at = this.position(event);
    this.app.hover(at);
    if (pressed) this.canvas.setPointerCapture(event.pointerId);
    if (pressed || event.buttons & 1 || this.app.follow.checked) this.app.look(at, pressed);
  }

  readout() {   // the weight under the pointer, of the map that is on show
    const at = this.app.pointer, [height, width] = this.show.size;
    const there = at && at[0] < height && at[1] < width;
    const first = this.app.panels[0].map, i = there ? at[0] * width + at[1] : 0, d = there ? this.map[i] - first[i] : 0;
    this.under.textContent = there && this.show.contrast ? `row ${at[0]}, column ${at[1]}: ${number(this.map[i])}, ${d < 0 ? "\u2212" : "+"}${number(Math.abs(d))} against the first` : there ? `row ${at[0]}, column ${at[1]}: ${this.show.whole ? this.show.whole.name : "weight"} ${number(this.map[at[0] * width + at[1]])}` : "\u00a0";
  }

  update(state) {
    const { options, scene } = state, panel = state.panels[this.index], layers = scene.layers[this.index], answer = state.answer.panels[this.index];
    if (!layers || !answer) return;   // of a panel that is asked for, one can arrive before the other
    fill(this.model, [...options.models, FILE], panel.model, (n) => (n === FILE ? "Weights file \u2026" : n));
    fill(this.layer, layers.map((l) => l[0]), panel.layer);
    fill(this.branch, (layers.find((l) => l[0] === panel.layer) || [0, []])[1], panel.branch);
    this.file.hidden = true;
    const { map, largest, ...found } = answer;
    this.table = bytes(options.palettes[state.palette]);
    const most = this.app.shared.checked ? Math.max(...this.app.panels.slice(0, state.panels.length).map((p) => p.largestHere || 0)) : this.largestHere;
    this.show = { ...found, largest, most, size: scene.size, picture: state.photograph, point: state.point,
      opacity: state.opacity, untrained: scene.untrained[this.index], quantity: state.quantity, decades: found.whole ? 0 : span(this.map, most, state.decades), hover: this.app.pointer, title: `${panel.model}, ${panel.layer}, ${panel.branch}, ${state.quantity}` };
    const first = this.app.panels[0].map;
    if (state.difference && this.index && first.length === this.map.length) {
      this.show.contrast = this.map.reduce((far, w, i) => Math.max(far, Math.abs(w - first[i])), 0);
      this.show.title += ", minus the first";
      this.show.heat = contrast(scene.size, this.map, first, this.show.contrast);
    } else this.show.heat = heat(scene.size, this.map, most, this.table, this.show.decades);
    this.canvas.setAttribute("aria-label", `Map of ${this.show.title} for row ${state.point[0]}, column ${state.point[1]}. ` +
      "Arrow keys move the pixel, with Shift by ten; plus, minus and zero zoom.");
    this.sum = state.quantity === "mixture" ? found.share || 1 : 1;     // parts of a mixture are parts of its sum
    this.list(); this.draw(); this.readout(); this.outcome(state);
  }

  take(found) { this.map = floats(found.whole ? found.whole.map : found.map); this.largestHere = largestOf(this.map); }

  outcome(state) {   // what comes out: pictures beside one another, each a window on the same place
    const found = state.outcomes && (state.results.panels || [])[this.index];
    this.results.hidden = !found;
    if (!found) return;
    const [height, width] = found.size, pixels = (b) => { const p = bytes(b); return raster(found.size, (i) => [p, 3 * i]); };
    const map = (b) => { const m = floats(b), most = Math.max(largestOf(m), 1e-9);
      return [raster(found.size, (i) => [this.table, 3 * Math.round(255 * m[i] / most)]), most]; };
    const db = (x) => (x > 99 ? "identical" : `${x.toFixed(2)} dB`), score = found.scores, items = [];
    items.push(["Output", pixels(found.plain), score.plain === undefined ? "truth unknown" : `PSNR ${db(score.plain)}`]);
    if (found.changed) {
      const change = score.change === undefined ? db(score.between) + " from the output" : `${db(score.changed)}, change ${score.change < 0 ? "\u2212" : "+"}${Math.abs(score.change).toFixed(3)} dB`;
      items.push(["With other weights", pixels(found.changed), change]);
      const [picture, most] = map(found.difference);
      items.push(["Difference", picture, `0 \u2026 ${number(most)} grey levels`]);
    }
    if (found.truth) {
      items.push(["Truth (HR)", pixels(found.truth), `${width} x ${height}`]);
      const [picture, most] = map(found.error);
      items.push([found.changed ? "Error with other weights" : "Error", picture, `0 \u2026 ${number(most)} grey levels`]);
    }
    const side = 168, ratio = width / state.scene.size[1];
    this.results.replaceChildren(...items.map(([name, picture, caption]) => {
      const canvas = make("canvas", { width: side, height: side, className: "mx-result", role: "img", tabIndex: 0, "aria-label": `${name}: ${caption}`,
        onkeydown: (e) => this.app.key(e) });
      const zoomed = state.zoom && this.z > this.fitting(), reach = zoomed ? Math.max(8, 400 / this.z) * ratio : Math.max(height, width);
      const centre = (n, at) => clamp((at + 0.5) * ratio - reach / 2, 0, Math.max(0, n - reach));
      const y = centre(height, state.point[0]), x = centre(width, state.point[1]), z = side / reach, context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.translate(-x * z, -y * z); context.drawImage(picture, 0, 0, width * z, height * z);
      cross(context, state.point, z * ratio);
      canvas.addEventListener("pointerdown", (e) => { const box = canvas.getBoundingClientRect();
        this.app.look([Math.floor((y + (e.clientY - box.top) / box.height * reach) / ratio), Math.floor((x + (e.clientX - box.left) / box.width * reach) / ratio)], true); });
      return make("figure", {}, canvas, make("figcaption", {}, make("span", {}, name), make("span", {}, caption)));
    }));
    if (found.worst) this.results.append(make("button", { type: "button", textContent: "Go to the largest error", onclick: () => this.app.look(found.worst, true) }));
    if (found.note) this.results.append(make("p", { className: "mx-note" }, found.note));
  }

  fitting() {   // screen pixels a pixel, so that all is seen
    const [height, width] = this.show.size, columns = getComputedStyle(this.body).gridTemplateColumns.split(" ").length;
    const room = (this.body.clientWidth || 480) - 10 - (columns > 1 ? 280 : 0);
    const z = Math.min(Math.max(room, 64) / width, TALLEST / height, 48);
    return z > 2 ? Math.floor(z) : z;
  }

  draw(reveal = true) {
    if (!this.show) return;
    const [height, width] = this.show.size, dense = window.devicePixelRatio || 1;
    this.z = this.app.state.zoom ? clamp(this.app.state.zoom, 0.1, LARGEST / Math.max(height, width)) : this.fitting();
    this.canvas.width = Math.max(1, Math.round(width * this.z * dense));
    this.canvas.height = Math.max(1, Math.round(height * this.z * dense));
    this.canvas.style.width = `${width * this.z}px`; this.canvas.style.height = `${height * this.z}px`;
    const context = this.canvas.getContext("2d");
    context.scale(dense, dense);
    paint(context, this.show, this.z);
    if (reveal) this.reveal();
  }

  reveal() {   // scroll a zoomed picture to the query
    const { stage, z } = this, [row, column] = this.show.point;
    for (const [side, start, at] of [["clientHeight", "scrollTop", row * z], ["clientWidth", "scrollLeft", column * z]]) {
      if (at < stage[start] + 16 || at > stage[start] + stage[side] - 16) stage[start] = at - stage[side] / 2;
    }
  }

  list() {
    const bar = this.bar.getContext("2d");
    bar.clearRect(0, 0, 160, 10); colours(this.show, bar, this.table, 160, 10);
    [this.low.textContent, this.high.textContent] = ends(this.show);
    let sum = 0;
    const patch = (box, colour, ...captions) => {
      const canvas = make("canvas", { width: 96, height: 96, style: `border-color: ${colour}` });
      enlarge(canvas.getContext("2d"), this.show, box, colour, 96);
      const go = make("button", { type: "button", className: "mx-go", "aria-label": `go to ${captions[0]}`,
        onclick: () => this.app.look([box[0] + box[2] / 2 - 0.5, box[1] + box[3] / 2 - 0.5], true) }, canvas);
      return make("figure", { role: "listitem" }, go, make("figcaption", {}, ...captions.filter(Boolean).map((c) => make("span", {}, c))));
    };
    this.patches.replaceChildren(patch(this.show.query, "#FFFFFF", "query", place(this.show.query)),
      ...this.show.matches.map((m, i) => { sum += m.weight / this.sum;
        return patch(m.box, RANKS[i], `${i + 1}: ${percent(m.weight / this.sum)}`, i ? `sum ${percent(sum)}` : "", place(m.box),
          m.unlike === undefined ? "" : `truth differs ${number(m.unlike)}`); }));
    this.pins.replaceChildren(...(this.show.pins || []).map((pin, i) => make("button", { type: "button", style: `border-color: ${RANKS[(i + 1) % RANKS.length]}`,
      onclick: () => this.app.look(this.app.state.pins[i], true) },
      `${LETTERS[i]}: ${place(pin.query)}, ${number(pin.effective_keys)} keys, ${number(pin.distance)} px`)));
    this.numbers.replaceChildren(...[...facts(this.show), ["Answered in", `${this.show.ms.toFixed(0)} ms`]]
      .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }
}

// ---- the view as one picture ---------------------------------------------------------------------------------------

function exported(panels, state) {
  const wide = 512, patch = 72, gap = 16, [height, width] = state.scene.size;
  const z = Math.min(wide / width, wide / height), tall = Math.ceil(height * z);
  const canvas = make("canvas", { width: panels.length * (wide + gap) + gap, height: tall + 232 });
  const context = canvas.getContext("2d");
  context.fillStyle = "#FFF"; context.fillRect(0, 0, canvas.width, canvas.height);
  panels.forEach(({ show, table, sum }, i) => {
    const write = (text, x, y, font = "13px sans-serif") => {
      context.font = font; context.fillStyle = "#111"; context.textBaseline = "alphabetic"; context.fillText(text, x, y, wide);
    };
    context.save();
    context.translate(gap + i * (wide + gap), 0);
    write(show.title, 0, 22, "bold 13px sans-serif");
    write(`${state.picture}, row ${show.point[0]}, column ${show.point[1]}`, 0, 42);
    context.save();
    context.translate(0, 52); context.beginPath(); context.rect(0, 0, width * z, height * z); context.clip();
    paint(context, show, z);
    context.restore();
    colours(show, context, table, 160, 10, 0, tall + 60);
    write(ends(show).join(" \u2026 "), 170, tall + 70);
    [{ box: show.query }, ...show.matches.slice(0, 6)].forEach((m, j) => {
      enlarge(context, show, m.box, j ? RANKS[j - 1] : "#FFF", patch - 4, j * patch, tall + 80);
      write(j ? `${j}: ${percent(m.weight / sum)}` : "query", j * patch, tall + 80 + patch + 10, "11px sans-serif");
    });
    facts(show).forEach(([name, value], j) =>
      write(`${name}: ${value}`, (j % 2) * (wide / 2), tall + 80 + patch + 36 + 20 * Math.floor(j / 2)));
    context.restore();
  });
  return canvas;
}

// ---- the whole -----------------------------------------------------------------------------------------------------

class App {
  constructor(model, el) {
    Object.assign(this, { model, asked: 0, aim: null, next: null, pointer: null });
    const set = (name, value) => this.set(name, value);
    const button = (text, label, act) => make("button", { type: "button", textContent: text, "aria-label": label, title: label, onclick: act });
    const coordinate = (axis) => make("input", { type: "number", min: 0, onchange: (e) => {
      const point = [...this.state.point]; point[axis] = Number(e.target.value); this.look(point, true); } });
    this.sets = make("select", { onchange: (e) => this.ask("picture", this.groups()[e.target.value][0]) });
    this.pictures = make("select", { onchange: (e) => this.ask("picture", e.target.value) });
    this.upload = make("input", { type: "file", accept: "image/*", hidden: true, onchange: (e) => { this.take(e.target.files[0]); e.target.value = ""; } });
    this.sides = make("select", { onchange: (e) => this.ask("side", Number(e.target.value)) });
    this.row = coordinate(0); this.column = coordinate(1);
    this.compare = make("select", { onchange: (e) => this.arrange(Number(e.target.value)) });
    this.contrast = make("input", { type: "checkbox", onchange: (e) => set("difference", e.target.checked) });
    this.format = make("select");
    this.follow = make("input", { type: "checkbox" });
    this.count = make("input", { type: "number", min: 1, max: RANKS.length,
      onchange: (e) => this.ask("matches", clamp(Math.round(Number(e.target.value)) || 1, 1, RANKS.length)) });
    this.quantity = make("select", { onchange: (e) => this.ask("quantity", e.target.value) });
    this.whole = make("select", { onchange: (e) => this.ask("whole", e.target.value) });
    this.apart = make("input", { type: "number", min: 0, max: 64, onchange: (e) => this.ask("apart", clamp(Math.round(Number(e.target.value)) || 0, 0, 64)) });
    this.shared = make("input", { type: "checkbox", checked: true, onchange: () => this.update() });
    this.fit = make("select", { onchange: (e) => this.ask("fit", e.target.value) });
    this.small = make("select", { onchange: (e) => this.ask("scale", Number(e.target.value)) });
    const edge = (axis) => make("input", { type: "number", min: 0, onchange: (e) => {
      const corner = [...this.state.corner]; corner[axis] = Math.max(0, Math.round(Number(e.target.value)) || 0); this.ask("corner", corner); } });
    this.top = edge(0); this.left = edge(1);
    this.outcomes = make("input", { type: "checkbox", onchange: (e) => this.ask("outcomes", e.target.checked) });
    this.weighting = make("select", { onchange: () => this.alter() });
    this.extent = make("input", { type: "number", min: 1, max: 999, value: 4, onchange: () => this.alter() });
    this.temperature = make("input", { type: "number", min: 0.01, step: 0.1, value: 1, onchange: () => this.alter() });
    this.where = make("select", { onchange: () => this.alter() });
    this.sessionFile = make("input", { type: "file", accept: ".json", hidden: true, onchange: (e) => { this.open(e.target.files[0]); e.target.value = ""; } });
    this.stop = make("button", { type: "button", textContent: "Cancel", hidden: true, onclick: () => this.cancel() });
    this.palette = make("select", { onchange: (e) => set("palette", e.target.value) });
    this.opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: (e) => set("opacity", Number(e.target.value)) });
    this.scale = make("select", { onchange: (e) => set("decades", Number(e.target.value)) });
    this.factor = make("output", { className: "mx-factor" });
    this.notice = make("p", { className: "mx-notice", role: "status" });
    this.problem = make("p", { className: "mx-problem", role: "alert", hidden: true });
    this.busy = make("p", { className: "mx-busy", role: "status" });
    this.code = make("pre", { className: "mx-code", tabIndex: 0, "aria-label": "code cell for this view" });
    this.copied = make("span", { role: "status" });
    this.panels = ORDER.map((_, i) => new Panel(this, i));
    const check = (text, control) => make("label", { className: "mx-check" }, control, make("span", {}, text));
    this.root = make("div", { className: "msnlan-explorer", "data-lm-suppress-shortcuts": "true" },
      make("div", { className: "mx-row" }, labelled("Set", this.sets), labelled("Picture", this.pictures), this.upload,
        button("Upload \u2026", "Upload a picture of your own", () => this.upload.click()), labelled("Longest side", this.sides),
        labelled("Make it small", this.fit), labelled("By", this.small), this.cornerFields = make("div", { className: "mx-pair" }, labelled("Crop row", this.top), labelled("Crop column", this.left)), labelled("Row", this.row), labelled("Column", this.column),
        labelled("Maps", this.compare), check("Follow the pointer", this.follow)),
      this.more = make("details", { className: "mx-more", open: (el.clientWidth || window.innerWidth) > 640 }, make("summary", {}, "Map, figures, other weights, sessions"),
      make("div", { className: "mx-row" }, labelled("Map of", this.quantity), labelled("Overlay", this.whole), labelled("Colours", this.palette), labelled("Opacity of the map", this.opacity),
        labelled("Scale", this.scale), labelled("Matches", this.count), labelled("Apart (px)", this.apart), this.sharedField = check("One colour scale", this.shared), this.contrastField = check("Difference to the first", this.contrast),
        make("div", { className: "mx-zoom", role: "group", "aria-label": "zoom" }, button("\u2212", "Zoom out", () => this.enlarge(-1)),
          this.factor, button("+", "Zoom in", () => this.enlarge(1)), button("Fit", "Fit the picture", () => set("zoom", 0))),
        button("Save PNG", "Save this view as PNG", () => this.save()),
        labelled("Figure for a paper", this.format), button("Save figure", "Save the maps as a figure in vectors", () => this.figure())),
      make("div", { className: "mx-row" }, check("What comes out", this.outcomes), labelled("Weights", this.weighting), this.extentField = labelled("Keys", this.extent),
        labelled("Temperature", this.temperature), labelled("In", this.where), button("Pin", "Pin this pixel, or take its pin away", () => this.pin()),
        button("Save session", "Save all choices as a small file", () => this.saveSession()), button("Load \u2026", "Load a session", () => this.sessionFile.click()), this.sessionFile,
        button("Copy link", "Copy a link to this view", () => this.link()))),
      this.problem, make("div", { className: "mx-lines" }, make("p", { title: HELP, tabIndex: 0, "aria-label": HELP }, "Click a pixel, or use the keyboard (?)."), this.notice, this.busy, this.stop),
      make("div", { className: "mx-panels" }, ...this.panels.map((p) => p.node)),
      make("details", { className: "mx-cell" }, make("summary", {}, "Code cell for this view"), this.code,
        make("div", { className: "mx-row" }, button("Copy", "Copy the code cell", () => this.copy()), this.copied)));
    el.append(this.root);
    this.listen();
  }

  get state() { return this.current; }

  groups() {   // set -> its pictures; names of a set's pictures begin with the set's
    const { pictures, sets } = this.model.get("options"), out = {};
    for (const name of pictures) (out[sets[name] || OWN] ||= []).push(name);
    return out;
  }

  get waiting() { return this.asked > (this.model.get("answer").asked || 0); }

  listen() {
    const names = ["picture", "side", "point", "panels", "matches", "quantity", "opacity", "palette", "decades", "zoom", "options",
      "fit", "scale", "corner", "pins", "apart", "whole", "outcomes", "change", "difference", "results", "answer", "problem", "busy", "code", "scene"];
    this.read = () => Object.fromEntries(names.map((n) => [n, this.model.get(n)]));
    const pairs = names.map((n) => [`change:${n}`, () => this.changed(n)]);
    pairs.forEach(([event, act]) => this.model.on(event, act));
    const received = (content, buffers) => this.received(content, buffers);
    this.model.on("msg:custom", received);
    const observer = new ResizeObserver(() => this.panels.forEach((p) => p.draw()));
    observer.observe(this.root);
    this.close = () => { pairs.forEach(([event, act]) => this.model.off(event, act)); this.model.off("msg:custom", received); observer.disconnect(); };
    this.clock = setInterval(() => { if (this.since) this.say(); }, 500);
    const before = this.close;
    this.close = () => { before(); clearInterval(this.clock); };
    this.update();
    const wanted = /[#&]msnlan=([^&]+)/.exec(location.hash);
    if (wanted) { try { this.send({ kind: "session", session: JSON.parse(decodeURIComponent(wanted[1])) }); } catch { this.send({ kind: "session", session: null }); } }
  }

  changed(name) {
    if (name === "answer" && !this.waiting) this.aim = null;
    if (name === "busy" || name === "problem") return this.say();
    if (!this.due) this.due = requestAnimationFrame(() => { this.due = 0; this.update(); });
  }

  say() {
    const problem = this.model.get("problem"), busy = this.model.get("busy") || (this.waiting ? "Working" : "");
    this.problem.textContent = problem; this.problem.hidden = !problem;
    this.since = busy ? this.since || Date.now() : 0;
    const seconds = this.since ? Math.floor((Date.now() - this.since) / 1000) : 0;
    this.busy.textContent = busy && `${busy} \u2026${seconds ? ` ${seconds} s` : ""}`;
    this.stop.hidden = !seconds;
    this.root.setAttribute("aria-busy", String(Boolean(busy)));
  }

  update() {
    const state = this.read();
    if (!state.scene.size || !state.answer.panels || !state.options.pictures.includes(state.picture)) return;   // the rest is on its way
    state.photograph = this.seen === state.scene ? this.current.photograph : photograph(state.scene);
    this.seen = state.scene; this.current = state;
    const { options, panels } = state;
    const groups = this.groups(), set = Object.keys(groups).find((g) => groups[g].includes(state.picture));
    fill(this.sets, Object.keys(groups), set); fill(this.pictures, groups[set], state.picture, (n) => (set === PHOTOS ? n : set === OWN ? n.split(/[\\/]/).pop() : n.slice(set.length + 1)));
    fill(this.fit, ["reduce", "crop"], state.fit, (n) => (n === "crop" ? "native crop" : "reduced"));
    fill(this.small, [0, 1, 2, 3, 4], state.scale, (n) => (n ? `x1/${n}` : "as the network"));
    this.cornerFields.hidden = state.fit !== "crop"; [this.top.value, this.left.value] = state.corner;
    fill(this.whole, Object.keys(WHOLE), state.whole, (n) => WHOLE[n]);
    this.apart.value = state.apart; this.outcomes.checked = state.outcomes;
    const { weighting = "", k, radius, temperature = 1, where = "branch" } = state.change;
    fill(this.weighting, Object.keys(WEIGHTINGS), weighting === "own" ? "" : weighting, (n) => {
      const own = state.scene.weightings.flat();
      return WEIGHTINGS[n] + ((n === "softmax" || n === "sparsemax") && !own.includes(n) ? " (counterfactual)" : ""); });
    fill(this.where, ["branch", "layer", "network"], where, (n) => (n === "network" ? "all layers" : `this ${n}`));
    this.temperature.value = temperature; this.extentField.hidden = !["top-k", "random", "local window"].includes(weighting);
    this.extentField.firstChild.textContent = weighting === "local window" ? "Radius" : "Keys";
    if (k || radius) this.extent.value = k || radius;
    fill(this.sides, [...new Set([...options.sides, state.side])], state.side, (s) => `${s} px`);
    fill(this.scale, [...new Set([...SCALES.map((s) => s[0]), state.decades])], state.decades,
      (n) => (SCALES.find((s) => s[0] === n) || [0, `logarithmic, ${n} decades`])[1]);
    fill(this.quantity, Object.keys(QUANTITIES), state.quantity, (n) => QUANTITIES[n]);
    fill(this.palette, Object.keys(options.palettes), state.palette);
    [this.row.value, this.column.value] = state.point;
    [this.row.max, this.column.max] = state.scene.size.map((n) => n - 1);
    fill(this.compare, ORDER.map((_, i) => i + 1), panels.length); this.contrast.checked = state.difference; this.contrastField.hidden = this.sharedField.hidden = panels.length < 2;
    fill(this.format, Object.keys(FORMATS), this.format.value || "pdf double", (n) => FORMATS[n]);
    this.count.value = state.matches; this.opacity.value = state.opacity;
    this.notice.textContent = state.scene.notice; this.code.textContent = state.code;
    this.root.classList.toggle("mx-two", panels.length > 1); this.root.classList.toggle("mx-three", panels.length === 3);
    this.panels.forEach((p, i) => { p.node.hidden = i >= panels.length; });
    if (state.answer.panels.length === panels.length) state.answer.panels.forEach((found, i) => { this.panels[i].take(found); });
    if (state.answer.panels.length === panels.length) this.panels.slice(0, panels.length).forEach((p) => p.update(state));
    this.factor.textContent = state.zoom ? `${number(state.zoom)}\u00d7` : "fit";
    this.say();
    this.root.dataset.count = state.answer.count;
    if (this.next && !this.waiting) { const point = this.next; this.next = null; this.look(point); }
  }

  hover(at) {   // the same pixel in all panels
    this.pointer = at;
    this.panels.filter((p) => p.show && !p.node.hidden).forEach((p) => { p.show.hover = at; p.readout(); if (this.state.panels.length > 1) p.draw(false); });
  }

  alter() {   // other weights, as the controls say
    const weighting = this.weighting.value, temperature = Number(this.temperature.value) || 1, extent = Math.max(1, Math.round(Number(this.extent.value)) || 1);
    const change = { weighting: weighting || "own", where: this.where.value };
    if (temperature !== 1) change.temperature = temperature;
    if (weighting === "top-k" || weighting === "random") change.k = extent;
    if (weighting === "local window") change.radius = extent;
    if (!this.state.outcomes) this.ask("outcomes", true);
    this.ask("change", weighting || temperature !== 1 ? change : {});
  }

  pin() {
    const { pins, point } = this.state, at = pins.findIndex((p) => p[0] === point[0] && p[1] === point[1]);
    this.ask("pins", at >= 0 ? pins.filter((_, i) => i !== at) : [...pins, point].slice(-LETTERS.length));
  }

  cancel() { this.model.send({ kind: "cancel", asked: this.asked }); }

  session() {
    const names = ["picture", "panels", "point", "side", "matches", "quantity", "opacity", "palette", "decades", "zoom", "scale", "fit", "corner", "pins", "apart", "whole",
      "outcomes", "change", "difference"];
    return { msnlan: "explorer 1", ...Object.fromEntries(names.map((n) => [n, this.model.get(n)])) };
  }

  saveSession() {
    const url = URL.createObjectURL(new Blob([JSON.stringify(this.session(), null, 1)], { type: "application/json" }));
    make("a", { href: url, download: "attention-session.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  async open(file) {
    if (!file) return;
    let session = null;
    try { session = JSON.parse(await file.text()); } catch { /* the kernel says that it is none */ }
    this.send({ kind: "session", session });
  }

  async link() {
    const url = `${location.href.split("#")[0]}#msnlan=${encodeURIComponent(JSON.stringify(this.session()))}`;
    try { await navigator.clipboard.writeText(url); } catch { location.hash = url.split("#")[1]; }
  }

  set(name, value) { this.model.set(name, value); this.model.save_changes(); }

  ask(name, value) {   // what the kernel must answer: as a message, in order, so that no answer to an earlier one replaces it
    if (!this.waiting && this.model.get(name) === value) return;
    this.send({ kind: "ask", name, value });
  }

  send(content, buffers) {
    this.asked = Math.max(this.asked, this.model.get("answer").asked || 0) + 1;
    this.model.send({ ...content, asked: this.asked }, undefined, buffers);
    setTimeout(() => { if (this.waiting) this.say(); }, 300);
  }

  look(point, now = false) {   // while an answer is due only the latest of many moves is kept
    const [height, width] = this.state.scene.size;
    const at = [clamp(Math.round(point[0]) || 0, 0, height - 1), clamp(Math.round(point[1]) || 0, 0, width - 1)];
    if (this.waiting && !now) { this.next = at; return; }
    this.next = null;
    const [row, column] = this.aim || this.model.get("point");
    if (at[0] === row && at[1] === column) return;
    this.aim = at;
    this.ask("point", at);
  }

  key(event) {
    const step = event.shiftKey ? 10 : 1, [row, column] = this.next || this.aim || this.model.get("point");
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) this.look([row + moves[event.key][0], column + moves[event.key][1]]);
    else if (event.key === "+" || event.key === "=") this.enlarge(1);
    else if (event.key === "-") this.enlarge(-1);
    else if (event.key === "0") this.set("zoom", 0);
    else if (event.key === "Escape") this.cancel();
    else if (/^[1-8]$/.test(event.key)) { const m = this.panels[0].show.matches[event.key - 1]; if (m) this.look([m.box[0] + m.box[2] / 2 - 0.5, m.box[1] + m.box[3] / 2 - 0.5], true); }
    else if (event.key === "p") this.pin();
    else if (event.key === "q") { const { pins, point } = this.state; if (pins.length) this.look(pins[(pins.findIndex((p) => p[0] === point[0] && p[1] === point[1]) + 1) % pins.length], true); }
    else if (event.key === "m") this.ask("quantity", this.state.quantity === "match" ? "mixture" : "match");
    else if (event.key === "d") this.set("difference", !this.state.difference);
    else if (event.key === "o") this.ask("outcomes", !this.state.outcomes);
    else if (event.key === "e") { const worst = ((this.state.results.panels || [])[0] || {}).worst; if (worst) this.look(worst, true); }
    else return;
    event.preventDefault(); event.stopPropagation();
  }

  enlarge(step) {
    const z = this.panels[0].z || 1, most = Math.max(1, Math.min(64, Math.floor(LARGEST / Math.max(...this.state.scene.size))));
    this.set("zoom", clamp(step > 0 ? Math.floor(z) + 1 : Math.ceil(z) - 1, 1, most));
  }

  panel(index, change) { this.send({ kind: "ask", name: "panel", index, value: change }); }

  arrange(n) {   // n maps: those there are, then the next branches and layers of the first
    const { panels, scene } = this.state, [first] = panels;
    const all = scene.layers[0].flatMap(([layer, branches]) => branches.map((branch) => ({ ...first, layer, branch })));
    const at = all.findIndex((p) => p.layer === first.layer && p.branch === first.branch), same = (p, q) => JSON.stringify(p) === JSON.stringify(q);
    const next = [...all.slice(at + 1), ...all.slice(0, at)].filter((p) => !panels.some((q) => same({ ...first, ...q }, p)));
    const more = Array.from({ length: n }, (_, i) => panels[i] || next[i - panels.length] || first);
    this.ask("panels", more.slice(0, n));
  }

  figure() {
    const [format, width] = this.format.value.split(" ");
    this.send({ kind: "figure", format, width, shared: this.shared.checked });
  }

  received(content, buffers) {   // a figure's file
    if (content.kind !== "file") return;
    const url = URL.createObjectURL(new Blob([buffers[0]]));
    make("a", { href: url, download: `${this.stem()}.${content.format}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  stem() { return [this.state.picture.replace(/.*[\\/]/, "").replace(/[^\w.-]+/g, "-"), ...this.state.point].join("-"); }

  async take(file) {
    if (!file) return;
    const parts = Math.max(1, Math.ceil(file.size / PART));
    if (file.size > 200 * 2 ** 20) { this.problem.textContent = `${file.name} has more than 200 MB`; this.problem.hidden = false; return; }
    for (let part = 0; part < parts; part++) {
      const buffer = await file.slice(part * PART, (part + 1) * PART).arrayBuffer();
      this.send({ kind: "upload", name: file.name, part, parts }, [buffer]);
    }
  }

  save() {
    const shown = this.panels.slice(0, this.state.panels.length);
    exported(shown, this.state).toBlob((blob) => {
      const url = URL.createObjectURL(blob);
      make("a", { href: url, download: `${this.stem()}.png` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    });
  }

  async copy() {
    try { await navigator.clipboard.writeText(this.state.code); this.copied.textContent = "Copied."; }
    catch { getSelection().selectAllChildren(this.code); this.copied.textContent = "Selected: press Ctrl+C."; }
    setTimeout(() => { this.copied.textContent = ""; }, 3000);
  }
}

export default {
  render({ model, el }) { const app = new App(model, el); return () => app.close(); },
};
