// A network while it learns: every neuron, at any moment, with its own numbers.
// `mount(element, source)` draws it. `source` says where the numbers come from: a page asks the
// server that has sent it, a widget asks the kernel of its notebook.

const LEAST = 2 ** -53;
export const ACTIVATIONS = {
  relu: (z) => Math.max(z, 0),
  leaky_relu: (z) => Math.max(z, 0.01 * z),
  tanh: Math.tanh,
  sigmoid: (z) => Math.min(1 - LEAST, Math.max(LEAST, 1 / (1 + Math.exp(-z)))), // never 0 or 1
  gelu: (z) => (z / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (z + 0.044715 * z ** 3))),
  swish: (z) => z / (1 + Math.exp(-z)),
};

// The network's answer to one picture, layer by layer: what goes into each neuron and comes out.
// `known` has layer 1's z from before some of its rows were changed: only these are added up again.
export function forward(network, kinds, input, silent = new Set(), known = null) {
  const Z = [], A = [input];
  network.forEach(({ W, b, changed }, l) => {
    const before = A[l], n = b.length, width = before.length;
    const z = new Float64Array(n), a = new Float64Array(n), g = ACTIVATIONS[kinds[l]];
    for (let i = 0; i < n; i++) {
      let sum = b[i];
      if (known && l === 0 && !changed?.has(i)) sum = known[i];
      else for (let j = 0, at = i * width; j < width; j++, at++) sum += W[at] * before[j];
      z[i] = sum;
      a[i] = silent.has(`${l + 1}/${i}`) ? 0 : g(sum);
    }
    Z.push(z); A.push(a);
  });
  return { Z, A };
}

// W1, b1, W2, b2, ... as they lie one after the other.
export function unpack(buffer, sizes) {
  let at = 0;
  return sizes.slice(1).map((n, l) => {
    const W = new Float32Array(buffer, at, n * sizes[l]);
    const b = new Float32Array(buffer, at + 4 * n * sizes[l], n);
    at += 4 * n * (sizes[l] + 1);
    return { W, b };
  });
}

// A copy of the network with weights or biases set, or a neuron's weights scaled; as `snn replay --set`.
export function changedNetwork(network, changes) {
  const found = [...network];
  for (const { layer, neuron, weight, value } of changes) {
    const before = found[layer - 1], own = before.changed ? before
      : { W: Float64Array.from(before.W), b: Float64Array.from(before.b), changed: new Set() };
    const width = own.W.length / own.b.length, from = neuron * width;
    if (weight === "bias") own.b[neuron] = value;
    else if (weight === "scale") for (let j = from; j < from + width; j++) own.W[j] *= value;
    else own.W[from + weight] = value;
    own.changed.add(neuron);
    found[layer - 1] = own;
  }
  return found;
}

export function httpSource() {
  const token = new URLSearchParams(location.search).get("token") ?? "";
  const address = (path, query = {}) => `${path}?${new URLSearchParams({ token, ...query })}`;
  const checked = async (reply) => {
    if (!reply.ok) throw new Error(await reply.text());
    return reply;
  };
  const post = async (path, asked) =>
    (await checked(await fetch(address(path), { method: "POST", body: JSON.stringify(asked) }))).json();
  return {
    json: async (path, query) => (await checked(await fetch(address(path, query)))).json(),
    bytes: async (path, query) => (await checked(await fetch(address(path, query)))).arrayBuffer(),
    fork: (asked) => post("fork", asked),
    pace: (asked) => post("pace", asked),
    fault: (asked) => post("fault", asked),
    events: (tell) => {
      const stream = new EventSource(address("events"));
      stream.onmessage = (event) => tell(JSON.parse(event.data));
      return () => stream.close();
    },
  };
}

export function kernelSource(model) {
  let next = 0;
  const waiting = new Map();
  const listen = (content, buffers) => {
    const promise = waiting.get(content.id);
    waiting.delete(content.id);
    if (!promise) return;
    if (content.error) promise.reject(new Error(content.error));
    else promise.resolve(buffers?.length ? copy(buffers[0]) : content.value);
  };
  const copy = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
  model.on("msg:custom", listen);
  const ask = (path, query = {}) =>
    new Promise((resolve, reject) => {
      waiting.set(++next, { resolve, reject });
      model.send({ id: next, path, query });
    });
  return {
    json: ask, bytes: ask, fork: (asked) => ask("fork", asked),
    events: (tell) => {
      let going = true;
      const look = async () => {
        while (going) {
          const state = await ask("state");
          tell(state);
          if (!["waiting", "running", "computed again"].includes(state.state)) return;
          await new Promise((done) => setTimeout(done, 300));
        }
      };
      look();
      return () => { going = false; model.off("msg:custom", listen); };
    },
  };
}

const SVG = "http://www.w3.org/2000/svg";
function make(kind, attributes = {}, ...children) {
  const svg = ["svg", "g", "circle", "line", "path", "text", "rect", "title", "polyline"].includes(kind);
  const found = svg ? document.createElementNS(SVG, kind) : document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") found.style.cssText = value; // set so, it is allowed by a strict policy
    else if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else found.setAttribute(name, value);
  }
  found.append(...children);
  return found;
}
const digits = (x) => (x === null || x === undefined ? "–" : Math.abs(x) >= 1e-3 || x === 0 ? x.toFixed(Math.abs(x) < 10 ? 4 : 1) : x.toExponential(2));
const percent = (x) => `${Math.round(100 * x)} %`;
const SHOWN = 40; // neurons of a layer that are drawn

// The indices below n with the largest values, largest first; a sort of thousands would take longer than all else.
function largestOf(n, value, count) {
  const found = [];
  for (let j = 0; j < n; j++) {
    const v = value(j);
    if (found.length === count && v <= found[count - 1].v) continue;
    const place = found.findIndex((one) => one.v < v);
    found.splice(place < 0 ? found.length : place, 0, { j, v });
    found.length = Math.min(found.length, count);
  }
  return found.map(({ j }) => j);
}

// A picture of numbers, orange below zero and blue above; three of them are a pixel.
function weightPicture(canvas, values, edge) {
  canvas.width = canvas.height = edge;
  const image = new ImageData(edge, edge);
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  for (let pixel = 0; pixel < edge * edge; pixel++) {
    const sum = (values[3 * pixel] + values[3 * pixel + 1] + values[3 * pixel + 2]) / 3 / (largest || 1);
    const strength = Math.min(1, Math.abs(sum) * 1.6), colour = sum > 0 ? [20, 98, 138] : [194, 65, 12];
    for (let c = 0; c < 3; c++) image.data[4 * pixel + c] = 255 + (colour[c] - 255) * strength;
    image.data[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showPicture(canvas, pixels, edge) {
  canvas.width = canvas.height = edge;
  const image = new ImageData(edge, edge);
  for (let i = 0; i < edge * edge; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export async function mount(element, source) {
  element.classList.add("live");
  const run = await source.json("run");
  const pictures = new Uint8Array(await source.bytes("pictures"));
  const mean = run.mean ? new Float32Array(await source.bytes("mean")) : null;
  const inputs = run.sizes[0], layers = run.sizes.length - 1;
  const prepare = (pixels) => Float32Array.from(pixels, (value, i) => value / 255 - (mean ? mean[i] : 0));
  const test = run.labels.map((label, i) => {
    const pixels = pictures.subarray(i * inputs, (i + 1) * inputs);
    return { name: `test picture ${i}`, label, pixels, input: prepare(pixels) };
  });
  const view = {
    epoch: 0, following: true, playing: false, picture: test[0], chosen: { layer: 1, neuron: 0 },
    pixel: null, gradient: null, calls: null,
    silent: new Set(), changes: new Map(), state: { frames: [], costs: [], steps: [] }, network: null, first: null, fork: null,
  };
  const known = new Map(); // frames by epoch
  async function frameAt(epoch) {
    if (!known.has(epoch)) {
      if (known.size > 60) known.delete(known.keys().next().value);
      known.set(epoch, unpack(await source.bytes("frame", { epoch }), run.sizes));
    }
    return known.get(epoch);
  }

  // What stands where
  const at = {};
  const part = (name, kind, attributes = {}, ...children) => (at[name] = make(kind, attributes, ...children));
  const numberPicture = (name) => make("canvas", { style: "width: 128px; height: 128px", role: "img", "aria-label": name });
  const pressed = (button, on) => button.setAttribute("aria-pressed", String(on));
  element.replaceChildren(
    make("div", { class: "head" },
      make("h1", {}, `Run ${run.name}`),
      part("news", "p", { class: "soft", role: "status" }, "Waiting for the first epoch."),
      make("div", { class: "bar" },
        part("play", "button", { type: "button", "aria-pressed": "false", onclick: play }, "Play"),
        make("button", { type: "button", onclick: () => move(-1), "aria-label": "one frame back" }, "◀"),
        make("button", { type: "button", onclick: () => move(1), "aria-label": "one frame on" }, "▶"),
        part("slider", "input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "epoch", oninput: slide }),
        part("epoch", "output", {}, "epoch 0"),
        part("follow", "button", { type: "button", "aria-pressed": "true", onclick: follow }, "Follow"),
      ),
      part("pace", "div", { class: "bar", role: "group", "aria-label": "pace of the training", hidden: "" },
        part("hold", "button", { type: "button", "aria-pressed": "false", onclick: () => setPace(at.hold.getAttribute("aria-pressed") === "true" ? "release" : "hold") }, "Hold the training"),
        make("span", { class: "soft" }, "go on by a"),
        ...["neuron", "layer", "mini-batch", "epoch"].map((unit) => make("button", { type: "button", onclick: () => setPace("step", unit) }, unit)),
        make("label", { class: "soft" }, "slow motion ",
          part("motion", "select", { onchange: slowMotion },
            ...[[0, "off"], [1, "1 neuron a second"], [5, "5 a second"], [20, "20 a second"]].map(([value, name]) => make("option", { value }, name)))))),
    make("div", { class: "stack" },
    make("section", { class: "card", "aria-label": "the network" },
      part("answer", "h2", {}, "The network"),
      part("drawing", "div"),
      make("p", { class: "soft" },
        make("span", { class: "key" }, make("i", { style: "background: var(--for)" }), "activation or weight above zero"),
        make("span", { class: "key" }, make("i", { style: "background: var(--against)" }), "below zero (for a sigmoid, below one half)"),
        make("span", { class: "key" }, make("i", { style: "border: 3px solid var(--forward)" }), "forward step finished"),
        make("span", { class: "key" }, make("i", { style: "border: 3px solid var(--backward)" }), "backward step finished"))),
    make("section", { class: "card", "aria-label": "pictures" },
      make("h2", {}, "A picture goes through the network"),
      part("thumbs", "div", { class: "thumbs" }),
      make("p", {}, make("label", { class: "file" }, "Your own picture …",
        make("input", { type: "file", accept: "image/*", onchange: ownPicture })))),
    make("section", { class: "card", "aria-label": "cost" },
      make("h2", {}, "Cost of each epoch"),
      part("chart", "div", { class: "chart" }),
      part("table", "p", { class: "soft" })),
    make("section", { class: "card", "aria-label": "timeline" },
      part("timelineTitle", "h2", {}, "A bar per Lambda invocation"),
      part("timeline", "div", { onclick: openCall }),
      part("call", "p", { class: "call-told" }),
      part("calls", "p", { class: "soft" }),
      part("callKeys", "p", { class: "soft" },
        make("span", { class: "key" }, make("i", { style: "background: var(--forward)" }), "forward"),
        make("span", { class: "key" }, make("i", { style: "background: var(--backward)" }), "backward"),
        make("span", { class: "key" }, make("i", { style: "background: var(--soft)" }), "neither, or both"),
        make("span", { class: "key" }, make("i", { style: "border: 2px dashed var(--soft)" }), "begun, not finished"),
        make("span", { class: "key" }, make("i", { style: "border: 2px solid var(--ink)" }), "more than one attempt")))),
    make("section", { class: "card", "aria-label": "the chosen neuron" },
      part("neuron", "h2", {}),
      part("weights", "div", { class: "sheet" },
        make("figure", {}, pixels(numberPicture("its weights as a picture")), make("figcaption", {}, "weights: one for each colour of each pixel")),
        make("figure", {}, pixels((at.change = numberPicture("the change of its weights since the first frame"))), make("figcaption", {}, "what the training has changed in them"))),
      make("h3", {}, "Forward"), part("z", "p"), part("a", "p"),
      make("details", {}, part("termsTitle", "summary", { class: "soft" }),
        make("table", {}, make("thead", {}, make("tr", {}, ...["input", "w", "a before", "w · a"].map((x) => make("th", { scope: "col" }, x)))), part("terms", "tbody"))),
      part("pixel", "div"), make("h3", {}, "Backward"), part("back", "div"),
      part("gradient", "figure", {}, pixels(numberPicture("the gradient of its weights as a picture")), make("figcaption", {}, "dw: how the cost changes with each weight")),
      make("h3", {}, "Its Lambda"), part("own", "div"), part("faultHint", "p", { class: "soft" }),
      part("faults", "div", { class: "bar", role: "group", "aria-label": "what happens to its next invocation" },
        ...[["delay", "Delay it"], ["duplicate", "Deliver it twice"], ["kill", "Kill it"]].map(([kind, name]) => make("button", { type: "button", onclick: () => askFault(kind) }, name))),
      part("struck", "div", { class: "soft struck", role: "status" }), part("barriers", "div"),
      part("whatIf", "div", { class: "whatif" })),
  );
  test.slice(0, 24).forEach((picture) => {
    const canvas = make("canvas", { "aria-hidden": "true", style: "width: 40px; height: 40px" });
    showPicture(canvas, picture.pixels, run.size);
    picture.button = make("button", {
      type: "button", "aria-label": `${picture.name}, ${run.classes[picture.label]}`,
      "aria-pressed": "false", onclick: () => choosePicture(picture),
    }, canvas);
    at.thumbs.append(picture.button);
  });

  // Moments
  function frames() { return view.state.frames.map((frame) => frame.epoch); }
  let loading = null;
  async function go(epoch) {
    const all = frames();
    if (!all.length) return;
    view.epoch = all.reduce((best, e) => (Math.abs(e - epoch) < Math.abs(best - epoch) ? e : best), all[0]);
    at.slider.value = view.epoch;
    at.epoch.textContent = `epoch ${view.epoch} of ${Math.max(view.epoch, ...all)}`;
    at.slider.setAttribute("aria-valuetext", at.epoch.textContent);
    await (loading ??= load(all[0]).finally(() => { loading = null; }));
  }
  // One frame at a time: while it comes, a newer one may be wanted.
  async function load(first) {
    for (let loaded = null; loaded !== view.epoch;) {
      loaded = view.epoch;
      const [network, begun] = [await frameAt(loaded), await frameAt(first)];
      Object.assign(view, { network, first: begun });
      draw();
    }
  }
  function move(by) {
    const all = frames(), now = all.indexOf(view.epoch);
    setFollow(false);
    go(all[Math.max(0, Math.min(all.length - 1, now + by))]);
  }
  function slide() { setFollow(false); go(Number(at.slider.value)); }
  function setFollow(on) { view.following = on; pressed(at.follow, on); }
  function follow() { setFollow(!view.following); if (view.following) go(Math.max(0, ...frames())); }
  function play() {
    view.playing = !view.playing;
    pressed(at.play, view.playing);
    if (!view.playing) return;
    setFollow(false);
    const all = frames();
    if (view.epoch === all.at(-1)) go(all[0]);
    const tick = async () => {
      if (!view.playing) return;
      const list = frames(), now = list.indexOf(view.epoch);
      if (now >= list.length - 1) { view.playing = false; pressed(at.play, false); return; }
      await go(list[now + 1]);
      setTimeout(tick, 120);
    };
    setTimeout(tick, 120);
  }

  // The training's pace: messages wait in the queue until they may go on
  async function setPace(what, unit) {
    if (what !== "step" || unit !== "neuron") at.motion.value = 0;
    if (what !== "release") setFollow(true);
    try {
      showHeld((await source.pace({ do: what, ...(unit ? { unit } : {}) })).held);
    } catch (error) { at.news.textContent = error.message; }
  }
  function showHeld(held) {
    pressed(at.hold, held);
    at.hold.textContent = held ? "Let it go on" : "Hold the training";
  }
  async function slowMotion() {
    const perSecond = Number(at.motion.value);
    if (!perSecond) return setPace("release");
    while (Number(at.motion.value) === perSecond && view.state.state === "running") {
      await Promise.all([setPace("step", "neuron"), new Promise((done) => setTimeout(done, 1000 / perSecond))]);
    }
  }

  // What was chosen
  function choosePicture(picture) { view.picture = picture; draw(); }
  async function ownPicture(event) {
    const file = event.target.files[0];
    if (!file) return;
    try {
      const bitmap = await createImageBitmap(file);
      const edge = Math.min(bitmap.width, bitmap.height), canvas = make("canvas");
      canvas.width = canvas.height = run.size;
      canvas.getContext("2d").drawImage(bitmap, (bitmap.width - edge) / 2, (bitmap.height - edge) / 2, edge, edge, 0, 0, run.size, run.size);
      const rgba = canvas.getContext("2d").getImageData(0, 0, run.size, run.size).data;
      const pixels = Uint8Array.from({ length: inputs }, (_, i) => rgba[4 * Math.floor(i / 3) + (i % 3)]);
      choosePicture({ name: file.name, label: null, pixels, input: prepare(pixels) });
    } catch { at.news.textContent = `${file.name} is not a picture that this browser can read.`; }
  }
  function choose(layer, neuron) { view.chosen = { layer, neuron }; draw(); }
  function choosePixel(row, column) {
    const middle = (i) => `${(100 * (i + 0.5)) / run.size}%`;
    view.pixel = { row, column };
    element.style.setProperty("--pixel-row", middle(row));
    element.style.setProperty("--pixel-column", middle(column));
    draw();
  }
  function silence() {
    const name = `${view.chosen.layer}/${view.chosen.neuron}`;
    if (!view.silent.delete(name)) view.silent.add(name);
    view.fork = view.refused = null;
    draw();
  }
  function setWeight(weight, value) {
    const { layer, neuron } = view.chosen, name = `${layer}/${neuron}/${weight}`;
    if (Number.isFinite(value)) view.changes.set(name, { layer, neuron, weight, value });
    else view.changes.delete(name);
    view.fork = view.refused = null;
    draw();
  }
  function asItWas() {
    view.silent.clear();
    view.changes.clear();
    view.fork = view.refused = null;
    draw();
    at.whatIf.querySelector("button").focus();
  }

  // The network as a drawing
  function draw() {
    if (!view.network) return;
    element.dataset.layer = view.chosen.layer;
    view.shown = changedNetwork(view.network, view.changes.values());
    const { A, Z } = forward(view.shown, run.activations, view.picture.input, view.silent);
    drawNetwork(A);
    drawPanel(A, Z);
    drawChart();
    drawTimeline();
    test.slice(0, 24).forEach((picture) => pressed(picture.button, picture === view.picture));
    const p = A[layers][0], says = run.classes[p >= 0.5 ? 1 : 0];
    const truth = view.picture.label === null ? "" : `, and it is ${run.classes[view.picture.label]}`;
    at.answer.textContent = `${view.picture.name}: ${percent(p)} ${run.classes[1]}. The network says ${says}${truth}.`;
  }
  function place(layer, neuron) {
    const n = Math.min(run.sizes[layer], SHOWN), x = 150 + (layer - 1) * (430 / Math.max(1, layers - 1));
    return { x: layers === 1 ? 365 : x, y: 20 + (neuron + 0.5) * (340 / n) };
  }
  function finished(layer, neuron) {
    let light = "";
    for (const steps of view.state.steps ?? []) {
      const has = (direction) => steps.some((step) => {
        const [who, way, l, first] = step.split("/");
        return who === "NeuronLambda" && (way === "network" || (way === direction && Number(l) === layer &&
          (run.granularity === "layer" || Number(first) === neuron)));
      });
      if (has("backward")) return "backward";
      if (has("forward")) light = "forward";
    }
    return light;
  }
  // It is built once and only coloured afterwards: what is replaced while a finger is down can't be clicked.
  function buildNetwork() {
    const svg = make("svg", { viewBox: "0 0 620 390", role: "group", "aria-label": "neurons, layer by layer" });
    const canvas = make("canvas", { style: "width: 110px; height: 110px", role: "img" });
    const drawn = (layer) => [...Array(Math.min(run.sizes[layer], SHOWN)).keys()];
    const edges = [], nodes = [];
    for (let layer = 2; layer <= layers; layer++) for (const i of drawn(layer)) for (const j of drawn(layer - 1)) {
      const from = place(layer - 1, j), to = place(layer, i);
      const line = make("line", { class: "edge", x1: from.x, y1: from.y, x2: to.x, y2: to.y });
      edges.push({ line, layer, i, j });
      svg.append(line);
    }
    for (let layer = 1; layer <= layers; layer++) {
      const { x: column } = place(layer, 0), radius = Math.min(9, 100 / drawn(layer).length + 1);
      svg.append(make("text", { x: column, y: 10, "text-anchor": "middle", class: "soft" }, `${run.activations[layer - 1]} · ${run.sizes[layer]}`));
      for (const i of drawn(layer)) {
        const { x, y } = place(layer, i), title = make("title"), circle = make("circle", { cx: x, cy: y, r: radius });
        const node = make("g", { role: "button", "data-node": `${layer}/${i}`, onclick: () => choose(layer, i), onkeydown: (event) => steer(event, layer, i) },
          make("circle", { class: "light", cx: x, cy: y, r: radius + 2 }), circle, title);
        nodes.push({ node, circle, title, layer, i });
        svg.append(node);
      }
      if (run.sizes[layer] > SHOWN) svg.append(make("text", { x: column, y: 385, "text-anchor": "middle", class: "soft" }, `${run.sizes[layer] - SHOWN} more`));
    }
    at.drawing.replaceChildren(make("div", { class: "sheet flow" }, make("figure", {}, pixels(canvas), make("figcaption", {}, `${run.size}×${run.size}×3 numbers`)), svg));
    return { canvas, edges, nodes };
  }
  let network = null; // the drawing, once it is built
  function drawNetwork(A) {
    network ??= buildNetwork();
    const { layer: l, neuron: n } = view.chosen, largest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-9);
    showPicture(network.canvas, view.picture.pixels, run.size);
    network.canvas.setAttribute("aria-label", view.picture.name);
    const most = view.shown.map(({ W }, index) => (index ? largest(W) : 0));
    for (const { line, layer, i, j } of network.edges) {
      const w = view.shown[layer - 1].W[i * run.sizes[layer - 1] + j], strength = Math.abs(w) / most[layer - 1];
      const mine = (layer === l && i === n) || (layer - 1 === l && j === n);
      line.setAttribute("stroke", w > 0 ? "var(--for)" : "var(--against)");
      line.setAttribute("stroke-width", 0.5 + 2.5 * strength);
      line.setAttribute("stroke-opacity", mine ? 0.9 : 0.12 + 0.25 * strength);
    }
    const hit = new Map(underWay().map((fault) => [`${fault.layer}/${fault.neuron}`, fault.kind === "kill" ? "killed" : "delayed"]));
    const scales = A.map((values, layer) => (layer && run.activations[layer - 1] !== "sigmoid" ? largest(values) : 0.5));
    for (const { node, circle, title, layer, i } of network.nodes) {
      const a = A[layer][i], name = `${layer}/${i}`, centre = run.activations[layer - 1] === "sigmoid" ? a - 0.5 : a;
      const lit = finished(layer, i), chosen = layer === l && i === n, silent = view.silent.has(name);
      node.setAttribute("class", ["node", lit, chosen && "chosen", silent && "silent", hit.has(name) && "hit"].filter(Boolean).join(" "));
      node.setAttribute("tabindex", chosen ? 0 : -1);
      node.setAttribute("aria-pressed", String(chosen));
      node.setAttribute("aria-label", `neuron ${i} of layer ${layer}, activation ${digits(a)}${lit ? `, ${lit} step finished` : ""}${silent ? ", silenced" : ""}${hit.has(name) ? `, its invocation is ${hit.get(name)}` : ""}`);
      circle.style.fill = `color-mix(in srgb, ${centre >= 0 ? "var(--for)" : "var(--against)"} ${Math.round(100 * Math.min(1, Math.abs(centre) / scales[layer]))}%, var(--card))`;
      title.textContent = `neuron ${i} of layer ${layer}: a = ${digits(a)}`;
    }
  }
  function steer(event, layer, i) {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(layer, i); }
    if (!moves[event.key]) return;
    event.preventDefault();
    const l = Math.max(1, Math.min(layers, layer + moves[event.key][0]));
    const j = Math.max(0, Math.min(Math.min(run.sizes[l], SHOWN) - 1, i + moves[event.key][1]));
    choose(l, j);
    at.drawing.querySelector(`[data-node="${l}/${j}"]`)?.focus();
  }

  // One neuron
  const before = new WeakMap(); // what a network, as it was, says to the test pictures
  function testAnswers() {
    if (!before.has(view.network)) before.set(view.network, test.map((picture) => forward(view.network, run.activations, picture.input)));
    const plain = before.get(view.network);
    const now = test.map((picture, i) => forward(view.shown, run.activations, picture.input, view.silent, plain[i].Z[0]));
    return [plain, now].map((all) => all.map(({ A }) => A[layers][0]));
  }
  function testCost(answers) {
    return answers.reduce((sum, p, i) => sum - Math.log(run.labels[i] ? p : 1 - p), 0) / answers.length;
  }
  function drawPanel(A, Z) {
    const { layer, neuron } = view.chosen, width = run.sizes[layer - 1];
    const { W, b } = view.shown[layer - 1], row = W.subarray(neuron * width, (neuron + 1) * width);
    const before = A[layer - 1], z = Z[layer - 1][neuron], a = A[layer][neuron], silenced = view.silent.has(`${layer}/${neuron}`);
    at.neuron.textContent = `Neuron ${neuron} of layer ${layer}`;
    at.weights.hidden = layer !== 1;
    if (layer === 1) {
      const first = view.first[0].W.subarray(neuron * width, (neuron + 1) * width);
      weightPicture(at.weights.querySelector("canvas"), row, run.size);
      weightPicture(at.change, row.map((w, i) => w - first[i]), run.size);
    }
    at.z.textContent = `z = Σ w·a + b = ${digits(z - b[neuron])} + ${digits(b[neuron])} = ${digits(z)}`;
    at.a.textContent = `a = ${run.activations[layer - 1]}(z) = ${digits(a)}${silenced ? ", silenced" : ""}`;
    at.termsTitle.textContent = `the largest of its ${width.toLocaleString("en")} terms`;
    const cells = (j) => [j, digits(row[j]), digits(before[j]), digits(row[j] * before[j])].map((x) => make("td", {}, String(x)));
    at.terms.replaceChildren(...largestOf(width, (j) => Math.abs(row[j] * before[j]), 6).map((j) => make("tr", {}, ...cells(j))));
    drawPixel(layer, neuron, row, before);
    drawBackward(layer, neuron, width);
    drawLambda(layer, neuron);
    drawWhatIf(layer, neuron, width, silenced);
  }

  // One pixel: three of the weights of a neuron of layer 1
  const COLOURS = ["red", "green", "blue"];
  // A picture on which a pixel is chosen; its mark stands where `choosePixel` says.
  function pixels(canvas) {
    const pick = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect(), index = (x) => Math.max(0, Math.min(run.size - 1, Math.floor(run.size * x)));
      choosePixel(index((clientY - box.top) / box.height), index((clientX - box.left) / box.width));
    };
    return make("div", { class: "pixels", onclick: pick }, canvas, make("i", { class: "mark" }));
  }
  function buildPixel() {
    const where = (name) => make("input", {
      type: "number", min: 0, max: run.size - 1, step: 1, "aria-label": `${name} of the pixel`,
      oninput: ({ target }) => { if (target.checkValidity() && target.value) choosePixel(...["row", "column"].map((axis) => (axis === name ? target.valueAsNumber : view.pixel[axis]))); },
    });
    const found = { row: where("row"), column: where("column"), table: make("tbody"), knobs: COLOURS.map((colour) => knob(null, colour, `${colour} weight of the pixel`)) };
    at.pixel.replaceChildren(make("h3", {}, "One pixel"),
      make("p", { class: "pixel" }, make("label", {}, "row ", found.row), make("label", {}, "column ", found.column), make("span", { class: "soft" }, "or click into a picture")),
      make("table", {}, make("thead", {}, make("tr", {}, ...["", "w", "pixel", "a", "w · a", "dw"].map((x) => (x ? make("th", { scope: "col" }, x) : make("td"))))), found.table),
      make("div", { class: "knobs", role: "group", "aria-label": "weights of the pixel" }, ...found.knobs.map(({ line }) => line)));
    return found;
  }
  let pixel = null; // what stands there, once a neuron of layer 1 was chosen
  function drawPixel(layer, neuron, weights, input) {
    at.pixel.hidden = layer !== 1;
    if (layer !== 1) return;
    pixel ??= buildPixel();
    const first = 3 * (view.pixel.row * run.size + view.pixel.column);
    for (const axis of ["row", "column"]) if (document.activeElement !== pixel[axis]) pixel[axis].value = view.pixel[axis];
    const dw = view.gradient?.of === `1/${neuron}` ? view.gradient.dw : null;
    const line = (name, ...cells) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((x) => make("td", {}, x)));
    let sum = 0;
    pixel.table.replaceChildren(...COLOURS.map((colour, c) => {
      const j = first + c, w = weights[j], a = input[j];
      sum += w * a;
      return line(colour, digits(w), String(view.picture.pixels[j]), digits(a), digits(w * a), digits(dw?.[j]));
    }), line("together", "", "", "", digits(sum), ""));
    pixel.knobs.forEach((row, c) => { row.weight = first + c; showKnob(row, 1, neuron, weights.length); });
  }
  // The run's own numbers, whatever is changed here. One question at a time: while a run goes on, the newest
  // epoch is another one before an answer has come.
  let answered = "", asking = false;
  async function drawBackward(layer, neuron, width) {
    const wanted = () => `${view.epoch}/${view.chosen.layer}/${view.chosen.neuron}`, mine = wanted();
    if (at.back.dataset.of !== `${layer}/${neuron}`) {
      at.back.replaceChildren(make("p", { class: "soft" }, "…"));
      at.back.dataset.of = `${layer}/${neuron}`;
      at.gradient.hidden = true;
      answered = "";
    }
    if (mine === answered || asking) return;
    asking = true;
    let found, refused;
    try { found = await source.json("neuron", { epoch: view.epoch, batch: 0, layer, neuron }); } catch (error) { refused = error.message; }
    asking = false;
    const chosen = view.chosen.layer === layer && view.chosen.neuron === neuron;
    if (chosen && found) showBackward(found, layer, neuron, width);
    if (chosen && refused) at.back.replaceChildren(make("p", { class: "soft" }, refused));
    if (chosen && found) answered = mine;
    if (mine !== wanted()) drawBackward(view.chosen.layer, view.chosen.neuron, run.sizes[view.chosen.layer - 1]);
  }
  function showBackward(found, layer, neuron, width) {
    const dw = new Float32Array(Uint8Array.from(atob(found.dw), (c) => c.charCodeAt(0)).buffer);
    const open = found.dz.filter((x) => x !== 0).length, k = Math.max(0, found.dz.findIndex((x) => x !== 0));
    at.back.replaceChildren(
      make("p", {}, `In mini-batch 0, ${found.images} images, cost ${digits(found.cost)}:`),
      make("p", {}, `image ${k + 1}: da = ${digits(found.da[k])} → dz = da · g′(z) = ${digits(found.dz[k])}`),
      make("p", {}, `its gradient reaches ${open} of ${found.images} images${open ? "" : ": for these the neuron is dead, it learns nothing"}; db = ${digits(found.db)}`));
    at.gradient.hidden = layer !== 1;
    if (layer > 1) {
      at.back.append(make("p", { class: "soft" }, `largest |dw| ${digits(dw.reduce((m, x) => Math.max(m, Math.abs(x)), 0))} of ${width}`));
      return;
    }
    weightPicture(at.gradient.querySelector("canvas"), dw, run.size);
    view.gradient = { of: `${layer}/${neuron}`, dw };
    drawPixel(layer, neuron, view.shown[0].W.subarray(neuron * width, (neuron + 1) * width), view.picture.input);
  }

  // Its Lambda, and what may happen to it
  const underWay = () => (view.state.faults ?? []).filter(({ stage }) => stage === "struck");
  const canBreak = () => Boolean(run.paced && source.fault && ["waiting", "running"].includes(view.state.state));
  async function askFault(kind) {
    try { await source.fault({ kind, ...view.chosen }); } catch (error) { at.news.textContent = error.message; }
  }
  // What has become of a fault, and the seconds that are left: these are not read aloud again and again.
  function faultInWords({ kind, layer, neuron, stage, step, batch, epoch, attempts, left }) {
    const name = { delay: "Delay", duplicate: "Second delivery", kill: "Kill" }[kind];
    if (stage === "asked") return [`${name}: waits for the next invocation of neuron ${neuron} of layer ${layer}.`];
    const call = `${step} of mini-batch ${batch}, epoch ${epoch + 1}.`;
    if (kind === "duplicate") return [`Delivered twice: ${call} ` + (stage === "struck" ? "It is under way." : attempts > 1 ? `The ledger has ${attempts} attempts, and one result.` : "The second found the work done, and changed nothing.")];
    if (kind === "delay") return stage === "over" ? [`Delayed: ${call} It came late, and the barrier waited.`]
      : [`Delayed: ${call} The barrier waits.`, left ? `It comes in ${left} s.` : "It is due."];
    const killed = `Killed: ${call} The worker process was killed with it in hand, before it had computed anything. Another process takes its place, and does again what else was in its hand; but this message is lost.`;
    return stage === "over" ? [`${killed} The watchdog found that the run stood still, and sent it again.`]
      : [killed, left === null ? "The training is held: the watchdog looks when it goes on, or while a step waits for this neuron." : `Waiting for the watchdog, ${left} s.`];
  }
  function drawLambda(layer, neuron) {
    const whole = { neuron: "", layer: " One Lambda computes the whole layer.", network: " One Lambda computes the whole network for a mini-batch." }[run.granularity];
    drawOwn(layer, neuron);
    at.faults.hidden = !canBreak();
    at.faultHint.hidden = !source.fault;
    at.faultHint.textContent = canBreak() ? `What shall happen to its next invocation? The run's weights stay the same, to the byte.${whole}`
      : "While snn train --live trains a run, this Lambda can be delayed, delivered twice or killed here.";
    const lines = (view.state.faults ?? []).slice(-4).map(faultInWords), text = JSON.stringify(lines);
    if (at.struck.dataset.text !== text) at.struck.replaceChildren(...lines.map(([said, left]) => make("p", {}, `${said} `, ...(left ? [make("span", { "aria-hidden": "true" }, left)] : []))));
    at.struck.dataset.text = text;
    drawBarriers();
  }
  // The barrier that a mini-batch waits at: who has joined it, of how many.
  function barrierOf(batch) {
    const all = Array.from({ length: layers }, (_, l) => l + 1), size = (layer) => (run.granularity === "layer" ? 1 : run.sizes[layer]);
    const order = [...all.map((layer) => ["forward", layer]), ...all.reverse().map((layer) => ["backward", layer])];
    for (const [way, layer] of order) {
      const joined = new Set(view.state.steps[batch].map((step) => step.split("/")).filter(([who, w, l]) => who === "NeuronLambda" && w === way && Number(l) === layer).map(([, , , first]) => Number(first)));
      if (joined.size < size(layer)) return { batch, way, layer, joined, of: size(layer) };
    }
    return null;
  }
  function drawBarriers() {
    const steps = view.state.steps ?? [], now = view.state.epoch + 1;
    const hit = underWay().filter(({ epoch, batch }) => epoch === now && batch < steps.length).map(({ batch }) => batch);
    const begun = view.state.held ? [...steps.keys()].filter((batch) => steps[batch].length) : [];
    const shown = run.granularity === "network" ? [] : [...new Set([...hit, ...begun])].slice(0, 4).map(barrierOf).filter(Boolean);
    at.barriers.replaceChildren(...shown.map(({ batch, way, layer, joined, of }) => {
      const missing = [...Array(of).keys()].filter((i) => !joined.has(i));
      const who = run.granularity === "layer" ? "the layer's Lambda" : missing.length === 1 ? `neuron ${missing[0]}` : missing.length <= 8 ? `neurons ${missing.join(", ")}` : `${missing.length} neurons`;
      const dots = [...Array(Math.min(of, SHOWN)).keys()].map((i) => make("i", { class: joined.has(i) ? way : "missing" }));
      return make("p", { class: "barrier" }, `Barrier of layer ${layer}, ${way}, mini-batch ${batch}: ${joined.size} of ${of} ${of === 1 ? "has" : "have"} joined, missing: ${who}.`,
        make("span", { class: "dots", "aria-hidden": "true" }, ...dots));
    }));
  }
  // Its invocations of the epoch on show, as the ledger has them.
  function drawOwn(layer, neuron) {
    const { epoch, calls } = view.calls ?? { calls: [] };
    const mine = calls.filter(({ who, way, layer: l, first }) => who === "NeuronLambda" && (way === "network" || (l === layer && (run.granularity === "layer" || first === neuron))));
    const ways = run.granularity === "network" ? ["network"] : ["forward", "backward"];
    const cell = (call) => (call ? `${micros(call.took)}${call.attempts > 1 ? `, ${call.attempts} attempts` : ""}` : "–");
    const rows = [...new Set(mine.map(({ batch }) => batch))].map((batch) => make("tr", {}, make("th", { scope: "row" }, `mini-batch ${batch}`),
      ...ways.map((way) => make("td", {}, cell(mine.find((call) => call.batch === batch && call.way === way))))));
    at.own.replaceChildren(...(rows.length ? [make("p", {}, `Its invocations in epoch ${epoch + 1}${view.calls.open ? ", which is under way" : ""}:`),
      make("table", {}, make("thead", {}, make("tr", {}, make("td"), ...ways.map((way) => make("th", { scope: "col" }, way)))), make("tbody", {}, ...rows))] : []));
  }

  // A thought experiment
  let knobs = { of: "" }; // what can be turned at the chosen neuron, and the neuron
  function knob(weight, short, name) {
    const range = make("input", { type: "range", "aria-label": name, oninput: () => setWeight(found.weight, range.valueAsNumber) });
    const number = make("input", { type: "number", step: "any", "aria-label": `${name.split(", from")[0]}, as a number`, oninput: () => setWeight(found.weight, number.valueAsNumber) });
    const found = { weight, range, number, line: make("div", { class: "knob" }, make("span", { "aria-hidden": "true" }, short), range, number) };
    return found;
  }
  function buildWhatIf(layer, neuron, width) {
    const { W } = view.network[layer - 1], row = W.subarray(neuron * width, (neuron + 1) * width);
    const largest = layer === 1 ? [] : largestOf(width, (j) => Math.abs(row[j]), SHOWN);
    const weights = layer === 1 ? ["bias", "scale"] : ["bias", ...largest.sort((i, j) => i - j)];
    knobs = { of: `${layer}/${neuron}`, rows: weights.map((weight) => {
      if (weight === "bias") return knob(weight, "b", "bias");
      if (weight === "scale") return knob(weight, "all w ×", "all weights, times");
      return knob(weight, `w${weight}`, `weight ${weight}, from neuron ${weight} of layer ${layer - 1}`);
    }) };
    knobs.silence = make("button", { type: "button", onclick: silence });
    knobs.result = make("p", { role: "status" });
    knobs.thumbs = make("div", { class: "thumbs" });
    knobs.trainOn = make("button", { type: "button", onclick: trainOn }, "Train on from here, with and without");
    knobs.asItWas = make("button", { type: "button", onclick: asItWas }, "All as it was");
    knobs.after = make("p", { class: "soft after", role: "status" });
    const more = width - SHOWN;
    at.whatIf.replaceChildren(make("h3", {}, "What if?"), knobs.silence,
      make("div", { class: "knobs", role: "group", "aria-label": `weights of neuron ${neuron} of layer ${layer}` }, ...knobs.rows.map(({ line }) => line)),
      ...(layer > 1 && more > 0 ? [make("p", { class: "soft" }, `Its ${SHOWN} largest weights; ${more} more are smaller.`)] : []),
      knobs.result, knobs.thumbs, make("div", { class: "bar" }, knobs.trainOn, knobs.asItWas), knobs.after);
  }
  function showKnob({ weight, range, number, line }, layer, neuron, width) {
    const { W, b } = view.network[layer - 1], row = W.subarray(neuron * width, (neuron + 1) * width);
    const change = view.changes.get(`${layer}/${neuron}/${weight}`);
    const value = change?.value ?? (weight === "scale" ? 1 : weight === "bias" ? b[neuron] : row[weight]);
    let reach = 2;
    if (weight !== "scale") {
      const largest = row.reduce((m, w) => Math.max(m, Math.abs(w)), 0), mine = Math.abs(b[neuron]);
      const wanted = layer > 1 ? Math.max(0.5, 1.5 * largest, 1.5 * mine) : weight === "bias" ? Math.max(0.5, 1.5 * mine) : 8 * largest || 0.5;
      reach = 2 ** Math.ceil(Math.log2(wanted)); // one of thousands of weights must go far to be felt
    }
    line.classList.toggle("changed", Boolean(change));
    Object.assign(range, { min: -reach, max: reach, step: reach / 128 });
    if (document.activeElement !== range) range.value = value;
    range.setAttribute("aria-valuetext", digits(value));
    if (document.activeElement !== number || !change && number.value !== "") number.value = Number(value.toPrecision(5));
  }
  const inWords = ({ layer, neuron, weight, value }) => {
    const which = `of neuron ${neuron} of layer ${layer}`;
    if (weight === undefined) return `neuron ${neuron} of layer ${layer} silenced`;
    if (weight === "scale") return `all weights ${which} times ${digits(value)}`;
    const { W, b } = view.network[layer - 1], width = run.sizes[layer - 1];
    return weight === "bias" ? `the bias ${which} at ${digits(value)} instead of ${digits(b[neuron])}`
      : `weight ${weight} ${which} at ${digits(value)} instead of ${digits(W[neuron * width + weight])}`;
  };
  function allChanges() {
    const silent = [...view.silent].map((name) => { const [layer, neuron] = name.split("/").map(Number); return { layer, neuron }; });
    return [...silent, ...view.changes.values()];
  }
  function drawWhatIf(layer, neuron, width, silenced) {
    if (knobs.of !== `${layer}/${neuron}`) buildWhatIf(layer, neuron, width);
    pressed(knobs.silence, silenced);
    knobs.silence.hidden = layer === layers; // nobody listens to the answer but us
    knobs.silence.textContent = silenced ? "Let it speak again" : "Silence this neuron";
    for (const row of knobs.rows) showKnob(row, layer, neuron, width);
    const changes = allChanges(), none = !changes.length;
    knobs.trainOn.hidden = knobs.asItWas.hidden = knobs.thumbs.hidden = none;
    const after = view.fork ? `After ${view.fork.with.costs.length} epochs the cost is ${digits(view.fork.with.costs.at(-1))} with the change, ${digits(view.fork.without.costs.at(-1))} without it.` : "";
    knobs.after.textContent = view.refused ?? after;
    if (none) {
      knobs.result.textContent = "";
      knobs.thumbs.replaceChildren();
      return;
    }
    const [plain, answers] = testAnswers(), cost = testCost(answers), was = testCost(plain);
    const flipped = test.filter((_, i) => plain[i] >= 0.5 !== answers[i] >= 0.5);
    const words = changes.length > 3 ? `${changes.length} changes` : changes.map(inWords).join(" and ");
    const by = Number.isFinite(cost - was) ? ` (${cost < was ? "−" : "+"}${digits(Math.abs(cost - was))})` : "";
    const said = `A thought experiment, which the run knows nothing of: with ${words}, the cost on the test pictures is ${digits(cost)} instead of ${digits(was)}${by}, and ${flipped.length} of ${test.length} answers change${flipped.length ? ":" : "."}`;
    if (knobs.result.textContent !== said) knobs.result.textContent = said;
    knobs.thumbs.dataset.flipped = flipped.length;
    const which = flipped.slice(0, 24).map((picture) => picture.name).join();
    if (knobs.thumbs.dataset.which === which && knobs.thumbs.childElementCount) return;
    knobs.thumbs.dataset.which = which;
    knobs.thumbs.replaceChildren(...flipped.slice(0, 24).map((picture) => {
      const says = run.classes[answers[test.indexOf(picture)] >= 0.5 ? 1 : 0];
      const canvas = make("canvas", { style: "width: 40px; height: 40px", role: "img", "aria-label": `${picture.name}, ${run.classes[picture.label]}, would be called ${says}` });
      showPicture(canvas, picture.pixels, run.size);
      return canvas;
    }));
  }
  async function trainOn() {
    const changes = allChanges(), asked = { epoch: view.epoch, epochs: 50 };
    view.fork = view.refused = null;
    knobs.trainOn.setAttribute("aria-busy", "true");
    knobs.after.textContent = "Training on …";
    try {
      view.fork = { with: await source.fork({ ...asked, changes }), without: await source.fork({ ...asked, changes: [] }) };
    } catch (error) { view.refused = `Refused: ${error.message}.`; }
    knobs.trainOn.removeAttribute("aria-busy");
    draw();
  }

  // Cost
  function drawChart() {
    const costs = view.state.costs ?? [], measured = view.state.frames;
    const values = [...costs, ...measured.map((frame) => frame.cost), ...(view.fork ? [...view.fork.with.costs, ...view.fork.without.costs] : [])].filter((x) => x > 0);
    if (!values.length) return;
    const low = Math.log(Math.min(...values)), high = Math.log(Math.max(...values)), last = Math.max(1, costs.length, view.fork ? view.fork.with.epoch + view.fork.with.costs.length : 0);
    const X = (epoch) => 46 + 540 * (epoch / last), Y = (cost) => 12 + 168 * (1 - (Math.log(cost) - low) / (high - low || 1));
    const line = (points, colour, dash = "") => make("polyline", { points: points.filter(([, c]) => c > 0).map(([e, c]) => `${X(e).toFixed(1)},${Y(c).toFixed(1)}`).join(" "), fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dash });
    const every = Math.max(1, Math.floor(costs.length / 400));
    const svg = make("svg", { viewBox: "0 0 600 212", role: "img", "aria-label": `cost of ${costs.length} epochs, the newest ${digits(costs.at(-1))}` },
      line(costs.map((cost, epoch) => [epoch + 1, cost]).filter((_, i) => i % every === 0), "var(--ink)"),
      line(measured.map((frame) => [frame.epoch, frame.cost]), "var(--for)"),
      make("line", { x1: X(view.epoch), x2: X(view.epoch), y1: 8, y2: 184, stroke: "var(--soft)", "stroke-dasharray": "3 3" }),
      make("text", { x: 40, y: Y(Math.exp(high)) + 4, "text-anchor": "end" }, digits(Math.exp(high))),
      make("text", { x: 40, y: Y(Math.exp(low)) + 4, "text-anchor": "end" }, digits(Math.exp(low))),
      make("text", { x: 46, y: 202, class: "soft" }, "epoch 0"), make("text", { x: 586, y: 202, "text-anchor": "end", class: "soft" }, `epoch ${last}`));
    if (view.fork) for (const [name, colour] of [["with", "var(--for)"], ["without", "var(--ink)"]]) {
      const { epoch, costs: after } = view.fork[name];
      svg.append(line(after.map((cost, i) => [epoch + i + 1, cost]), colour, "5 3"));
    }
    const now = measured.find((frame) => frame.epoch === view.epoch);
    at.chart.replaceChildren(svg);
    at.table.textContent = `blue: test pictures, the other line: training${view.fork ? ", dashed: trained on from here with the change (blue) and without it" : ""}. ` +
      (now ? `At epoch ${now.epoch} the cost on the test pictures is ${digits(now.cost)}, and ${percent(now.accuracy)} of them are answered rightly.` : "");
  }

  // Timeline
  let drawn = {};
  async function drawTimeline() {
    const open = view.state.state === "running" && view.epoch === Math.max(...frames()) && (view.state.steps ?? []).some((steps) => steps.length);
    const epoch = open ? view.epoch : view.epoch - 1; // the one that has led to what is on show
    if (drawn.epoch === epoch && drawn.state === view.state) return;
    const mine = drawn = { epoch, state: view.state };
    const { rows } = epoch < 0 ? { rows: [] } : await source.json("invocations", { epoch }).catch(() => ({}));
    if (mine !== drawn || !rows) return; // something newer was asked for, or the run's end has closed the server
    at.timelineTitle.textContent = epoch < 0 ? "A bar per Lambda invocation" : `A bar per Lambda invocation of epoch ${epoch + 1}${open ? ", which is under way" : ""}`;
    const calls = placed(rows), text = JSON.stringify(rows);
    view.calls = { epoch, open, calls };
    drawOwn(view.chosen.layer, view.chosen.neuron);
    at.calls.textContent = calls.length ? summary(epoch, calls)
      : epoch < 0 ? "Before the first epoch nothing is invoked." : view.state.invocations ? "The ledger has nothing of this epoch any more."
      : "This run is computed again here, without Lambda; the ledger is on the parameter server while it runs.";
    at.timeline.hidden = at.call.hidden = at.callKeys.hidden = !calls.length;
    if (calls.length && at.timeline.dataset.rows !== text) drawCalls(calls, at.calls.textContent);
    at.timeline.dataset.rows = text;
  }
  // Where the bars stand: a step begins after the slowest of the step before it.
  function placed(rows) {
    const calls = rows.map(([batch, step, attempts, took]) => {
      const [who, way, l, first] = step.split("/"), layer = Number(l), after = who === "TrainerLambda" ? 1 : 0;
      const order = way === "forward" ? 2 * layer + after : way === "backward" ? 2 * (2 * layers - layer + 1) + after : way === "next" ? Infinity : 0;
      return { batch, step, who, way, layer, first: Number(first), attempts, took, order };
    }).sort((a, b) => (a.batch < 0) - (b.batch < 0) || a.batch - b.batch || a.order - b.order || a.first - b.first);
    let latest = 0;
    for (const batch of new Set(calls.map((call) => call.batch))) {
      const own = calls.filter((call) => call.batch === batch);
      let start = batch < 0 && own[0].way === "next" ? latest : 0;
      for (const order of new Set(own.map((call) => call.order))) {
        const stage = own.filter((call) => call.order === order);
        stage.forEach((call, lane) => Object.assign(call, { start, lane, lanes: stage.length }));
        start += Math.max(...stage.map(({ took }) => took ?? 0));
      }
      latest = Math.max(latest, start);
    }
    return calls;
  }
  const micros = (took) => (took === null ? "not finished" : `${took.toLocaleString("en")} µs`);
  const told = ({ batch, step, attempts, took }) => `${step}${batch < 0 ? "" : ` of mini-batch ${batch}`}: ${micros(took)}, ${attempts} attempt${attempts === 1 ? "" : "s"}`;
  function summary(epoch, calls) {
    const finished = calls.filter(({ took }) => took !== null), again = calls.filter(({ attempts }) => attempts > 1);
    const slowest = finished.reduce((a, b) => (b.took > (a?.took ?? -1) ? b : a), null);
    const batches = new Set(calls.map(({ batch }) => batch).filter((batch) => batch >= 0)).size;
    return `Epoch ${epoch + 1}, ${batches} of ${run.batches} mini-batches: ${calls.length} invocations, ${finished.length} finished, ${again.length} with more than one attempt (duplicates, or tried again)` +
      (slowest ? `; the longest was ${told(slowest)}` : "") +
      ". Lengths are the ledger's. It does not know how long a message waits, so that each step is drawn right after the slowest of the one before.";
  }
  const openNeuron = ({ who, layer, first }) => { if (who === "NeuronLambda" && layer) choose(layer, first); };
  function openCall({ clientX, clientY }) { // the bar below, also if it was drawn anew since the finger came down
    const bar = document.elementFromPoint(clientX, clientY)?.closest("[data-call]");
    const call = bar && view.calls.calls.find(({ batch, step }) => `${batch}/${step}` === bar.dataset.call);
    if (call) openNeuron(call);
  }
  function drawCalls(calls, label) {
    const focus = document.activeElement?.dataset?.call;
    const width = Math.max(280, at.timeline.clientWidth || 560), left = 62;
    const batches = [...new Set(calls.map(({ batch }) => batch))], high = batches.length <= 2 ? 90 : batches.length <= 5 ? 54 : 30;
    const low = 14, height = (batch) => (batch < 0 ? low : high); // the epoch's own row has at most two bars
    const total = Math.max(1, ...calls.map(({ start, took }) => start + (took ?? 0))), X = (t) => left + (width - left - 8) * (t / total);
    const name = ({ batch, step }) => `${batch}/${step}`;
    const entry = calls.find((call) => name(call) === view.call) ?? calls[0];
    const svg = make("svg", { viewBox: `0 0 ${width} ${batches.reduce((sum, batch) => sum + height(batch) + 6, 0) + 18}`, role: "listbox", "aria-label": label });
    batches.forEach((batch, row) => svg.append(make("text", { x: 0, y: row * (high + 6) + height(batch) / 2 + 4, "aria-hidden": "true" }, batch < 0 ? "epoch" : `batch ${batch}`)));
    const tell = (call) => { at.call.textContent = told(call); };
    const show = (call) => {
      view.call = name(call);
      for (const one of svg.querySelectorAll("[data-call]")) {
        one.setAttribute("tabindex", one.dataset.call === view.call ? 0 : -1);
        one.setAttribute("aria-selected", String(one.dataset.call === view.call));
      }
      tell(call);
    };
    const step = (event, call) => {
      const here = calls.indexOf(call), row = batches.indexOf(call.batch);
      const beside = (by) => calls.find((one) => one.batch === batches[row + by] && one.step === call.step);
      const next = { ArrowRight: calls[here + 1], ArrowLeft: calls[here - 1], ArrowDown: beside(1), ArrowUp: beside(-1), Home: calls[0], End: calls.at(-1) };
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openNeuron(call); }
      if (!(event.key in next)) return;
      event.preventDefault();
      if (next[event.key]) svg.querySelector(`[data-call="${name(next[event.key])}"]`).focus();
    };
    for (const call of calls) {
      const thick = height(call.batch) / call.lanes, y = batches.indexOf(call.batch) * (high + 6) + call.lane * thick;
      const kind = ["forward", "backward"].includes(call.way) ? call.way : "neither";
      svg.append(make("g", {
        class: `call ${kind} ${call.took === null ? "open" : ""} ${call.attempts > 1 ? "again" : ""}`, role: "option", "data-call": name(call),
        "aria-label": told(call), "aria-selected": String(call === entry), tabindex: call === entry ? 0 : -1,
        onpointerenter: () => tell(call), onfocus: () => show(call), onkeydown: (event) => step(event, call),
      }, make("rect", { x: X(call.start), y, height: Math.max(1, thick - (thick > 4 ? 1 : 0.3)), width: call.took === null ? 8 : Math.max(1.5, X(call.took) - left - 0.5) }), make("title", {}, told(call))));
    }
    const bottom = batches.reduce((sum, batch) => sum + height(batch) + 6, 0) + 12;
    svg.append(make("text", { x: left, y: bottom, "aria-hidden": "true" }, "0 µs"), make("text", { x: width - 8, y: bottom, "text-anchor": "end", "aria-hidden": "true" }, `${total.toLocaleString("en")} µs`));
    at.timeline.replaceChildren(svg);
    tell(entry);
    if (focus) svg.querySelector(`[data-call="${focus}"]`)?.focus();
  }

  // News
  choosePixel(Math.floor(run.size / 2), Math.floor(run.size / 2));
  const hear = (state) => {
    view.state = state;
    element.dataset.state = state.state;
    if (document.hidden) return; // nobody sees it
    at.pace.hidden = !(run.paced && source.pace && ["waiting", "running"].includes(state.state));
    showHeld(Boolean(state.held));
    const all = frames(), newest = Math.max(0, ...all);
    at.slider.max = newest;
    const total = Object.values(state.invocations ?? {}).reduce((sum, n) => sum + n, 0);
    at.news.textContent = `${state.state[0].toUpperCase()}${state.state.slice(1)}, ${state.epoch + 1} of at most ${run.epochs} epochs` +
      (total ? `, ${total.toLocaleString("en")} invocations, ${state.duplicates} duplicates` : "") + (state.reason ? `: ${state.reason}` : "") + ".";
    if (view.following || !view.network) go(newest);
    else if (view.network) draw();
  };
  document.addEventListener("visibilitychange", () => { if (view.state.state) hear(view.state); });
  return source.events(hear);
}

// In a notebook (anywidget) and as a page
export default {
  render({ model, el }) {
    const place = document.createElement("div");
    el.append(place);
    const mounted = mount(place, kernelSource(model));
    return () => mounted.then((stop) => stop());
  },
};
const page = typeof document !== "undefined" && document.querySelector("main#live");
if (page) mount(page, httpSource()).catch((error) => { page.textContent = error.message; });
