"use strict";
// Text of the model reaches the page through textContent and setAttribute only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = id => document.getElementById(id);
  const spans = [...document.querySelectorAll(".tok")];
  const panel = byId("panel"), map = byId("map"), labels = byId("labels"), counts = byId("counts");
  const STATES = ["gone before", "given up here", "kept for its score", "one of the first, always kept", "one of the last, always kept"];
  let event = null, chosen = 0, at = 0;

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }
  const float = new Float32Array(1), word = new Uint32Array(float.buffer);
  function figure(value) {
    if (!Number.isFinite(value)) return "-";
    const size = Math.abs(value);
    return value === 0 ? "0" : size >= 1000 || size < 0.001 ? value.toExponential(1).replace("e-", "e−").replace("e+", "e")
      : value.toPrecision(3);
  }

  // ---- an event
  function open(index) {
    const raw = data.events[index];
    if (!raw.open) {
      const rows = raw.layers.length * raw.heads;
      raw.states = bytes(raw.states);
      raw.ranks = new Uint16Array(bytes(raw.ranks).buffer);
      raw.scores = new Uint16Array(bytes(raw.scores).buffer);
      raw.rows = rows;
      raw.keepers = new Uint32Array(raw.n);
      raw.kept = new Uint32Array(rows);
      raw.competing = new Uint32Array(rows);
      raw.best = new Uint32Array(rows);  // how many of those that compete are kept
      for (let row = 0, i = 0; row < rows; row++) {
        for (let t = 0; t < raw.n; t++, i++) {
          const state = raw.states[i];
          if (state >= 2) { raw.keepers[t]++; raw.kept[row]++; }
          if (raw.ranks[i]) { raw.competing[row]++; if (state === 2) raw.best[row]++; }
        }
      }
      raw.open = true;
    }
    event = raw;
    at = index;
    [...byId("events").querySelectorAll("button")].forEach((b, i) => b.setAttribute("aria-pressed", String(i === index)));
    spans.forEach((span, t) => {
      const share = t < event.n ? event.keepers[t] / event.rows : 0;
      span.style.setProperty("--s", share.toFixed(3));
      span.classList.toggle("after", t >= event.n);
      span.classList.toggle("none", t < event.n && !event.keepers[t]);
    });
    const low = Math.min(...event.kept), high = Math.max(...event.kept);
    const each = low === high ? count(low) : `${count(low)} to ${count(high)}`;
    const gone = event.keepers.filter(k => !k).length;
    const had = event.attention === null ? "" : ` What was kept had ${(100 * event.attention).toFixed(1)} % of the attention that was ranked.`;
    byId("told").textContent = `After ${count(event.n)} tokens each of ${event.layers.length} layers × ${event.heads} heads keeps ${each}; ` +
      `${count(gone)} tokens are kept by none.${had}` + (data.unit ? ` Score: ${data.unit}.` : "");
    paint();
    choose(Math.min(chosen, spans.length - 1));
  }
  const layerOf = row => event.layers[Math.floor(row / event.heads)];
  const headOf = row => row % event.heads;
  function scoreOf(i) {
    word[0] = event.scores[i] << 16;
    return float[0];
  }
  function why(row, t) {
    const i = row * event.n + t, state = event.states[i];
    if (state === 0) return STATES[0];
    const rank = event.ranks[i];
    if (!rank) return STATES[state];
    return `${STATES[state]}: ${figure(scoreOf(i))}, rank ${count(rank)} of ${count(event.competing[row])}, ${count(event.best[row])} stay`;
  }

  // ---- the map: a row for each layer and head, a column for each token, or a few of them
  let height = 4, width = 1, gap = 1;
  const top = row => row * height + Math.floor(row / event.heads) * gap;
  function colour(name) {
    const probe = make("canvas", {width: 1, height: 1}).getContext("2d");
    probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    probe.fillRect(0, 0, 1, 1);
    return probe.getImageData(0, 0, 1, 1).data;
  }
  function paint() {
    const rows = event.rows, ratio = Math.min(2, devicePixelRatio || 1), zoom = +byId("zoom").value;
    gap = event.layers.length > 1 ? 2 : 0;
    height = Math.max(3, Math.min(14, Math.floor(460 / rows)));
    const tall = top(rows - 1) + height;
    const label = 34, side = 52;
    const room = Math.max(120, document.querySelector(".frame").clientWidth - label - side);
    const wide = zoom ? Math.min(16000, zoom * event.n) : room;
    width = wide / event.n;
    map.width = Math.round(wide * ratio); map.height = Math.round(tall * ratio);
    map.style.width = wide + "px"; map.style.height = tall + "px";
    const pen = map.getContext("2d"), paper = colour("--card"), tints = ["--card", "--s1", "--s2", "--s3", "--s4"].map(colour);
    const image = pen.createImageData(map.width, map.height), out = image.data;
    for (let p = 0; p < out.length; p += 4) { out[p] = paper[0]; out[p + 1] = paper[1]; out[p + 2] = paper[2]; out[p + 3] = 255; }
    const sum = [0, 0, 0];
    for (let row = 0; row < rows; row++) {
      const from = Math.round(top(row) * ratio), to = Math.max(from + 1, Math.round((top(row) + height) * ratio) - (height > 5 ? 1 : 0));
      const most = Math.max(1, event.best[row]);
      for (let x = 0; x < map.width; x++) {
        const first = Math.floor(x * event.n / map.width), last = Math.max(first + 1, Math.floor((x + 1) * event.n / map.width));
        sum[0] = sum[1] = sum[2] = 0;
        for (let t = first; t < last; t++) {
          const i = row * event.n + t, state = event.states[i], tint = tints[state];
          const alpha = state === 2 ? 1 - 0.6 * Math.min(1, (event.ranks[i] - 1) / most) : 1;
          for (let c = 0; c < 3; c++) sum[c] += alpha * tint[c] + (1 - alpha) * paper[c];
        }
        for (let y = from; y < to; y++) {
          const p = 4 * (y * map.width + x);
          for (let c = 0; c < 3; c++) out[p + c] = sum[c] / (last - first);
        }
      }
    }
    pen.putImageData(image, 0, 0);
    const soft = getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
    for (const [canvas, size] of [[labels, label], [counts, side]]) {
      canvas.width = Math.round(size * ratio); canvas.height = map.height;
      canvas.style.width = size + "px"; canvas.style.height = tall + "px";
    }
    const left = labels.getContext("2d"), right = counts.getContext("2d");
    for (const p of [left, right]) { p.scale(ratio, ratio); p.fillStyle = soft; p.font = "10px system-ui, sans-serif"; p.textBaseline = "middle"; }
    left.textAlign = "right";
    const block = event.heads * height + gap, step = Math.ceil(11 / block);
    event.layers.forEach((layer, place) => {
      if (place % step === 0) left.fillText(layer, label - 6, top(place * event.heads) + Math.max(5, (block - gap) / 2));
    });
    const most = Math.max(1, ...event.kept);
    right.globalAlpha = 0.5;
    for (let row = 0; row < rows; row++) right.fillRect(6, top(row) + 0.5, 20 * event.kept[row] / most, Math.max(1, height - 1));
    right.globalAlpha = 1;
    event.layers.forEach((layer, place) => {
      const own = event.kept.subarray(place * event.heads, (place + 1) * event.heads);
      const mean = own.reduce((a, b) => a + b, 0) / own.length;
      if (place % step === 0) right.fillText(count(Math.round(mean)), 29, top(place * event.heads) + Math.max(5, (block - gap) / 2));
    });
    mark();
  }
  function place(pointer) {
    const box = map.getBoundingClientRect();
    const t = Math.max(0, Math.min(event.n - 1, Math.floor((pointer.clientX - box.left) / width)));
    const y = pointer.clientY - box.top;
    let row = 0;
    while (row + 1 < event.rows && top(row + 1) <= y) row++;
    return [row, t];
  }
  function point(pointer) {
    const [row, t] = place(pointer);
    byId("read").textContent = `layer ${layerOf(row)}, head ${headOf(row)}, token ${t} ${data.names[t]}: ${why(row, t)}`;
    byId("row").style.display = "block";
    byId("row").style.top = top(row) + height / 2 + "px";
  }
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", pointer => { point(pointer); choose(place(pointer)[1]); });
  map.addEventListener("pointerleave", () => { byId("row").style.display = "none"; });
  function mark() {
    const line = byId("column");
    line.style.display = chosen < event.n ? "block" : "none";
    line.style.left = (chosen + 0.5) * width + "px";
  }

  // ---- the panel: one token in all layers and heads
  function show(t) {
    const keep = panel.scrollTop;
    const back = make("button", {type: "button", "aria-label": "token before"}, "‹");
    const on = make("button", {type: "button", "aria-label": "next token"}, "›");
    back.onclick = () => choose(chosen - 1);
    on.onclick = () => choose(chosen + 1);
    const head = make("div", {class: "head"}, make("code", {}, data.names[t]),
      make("span", {class: "at"}, `token ${t} of ${data.names.length}` + (t >= data.prompt ? ", generated" : "")), back, on);
    if (t >= event.n) {
      panel.replaceChildren(head, make("p", {class: "note"}, "It came after this event."));
      return;
    }
    const states = [0, 0, 0, 0, 0];
    let best = Infinity, total = 0, ranked = 0;
    for (let row = 0; row < event.rows; row++) {
      const i = row * event.n + t;
      states[event.states[i]]++;
      if (event.ranks[i]) { best = Math.min(best, event.ranks[i]); total += event.ranks[i]; ranked++; }
    }
    const list = make("dl", {class: "stats"});
    for (const [name, value] of [["kept by", `${event.keepers[t]} of ${event.rows}`], ["for its score", states[2]],
      ["best rank", ranked ? count(best) : "-"], ["mean rank", ranked ? count(Math.round(total / ranked)) : "-"]])
      list.append(make("div", {}, make("dt", {}, name), make("dd", {}, String(value))));
    panel.replaceChildren(head, list, make("h2", {}, "Layers from above, a column a head"), cells(t), make("p", {class: "note cell"}, "Point at a square."));
    panel.scrollTop = keep;
  }
  function cells(t) {
    const L = event.layers.length, H = event.heads, W = 360, left = 24;
    const columns = Math.max(1, Math.min(Math.ceil(L / 10), Math.floor(W / (left + 8 * H))));
    const per = Math.ceil(L / columns), part = W / columns, w = Math.min(26, (part - left - 8) / H), h = 13;
    const svg = draw("svg", {viewBox: `0 0 ${W} ${per * (h + 2) + 2}`, class: "cells", role: "img", "aria-label": "Which layers and heads keep the token"});
    for (let row = 0; row < event.rows; row++) {
      const layer = Math.floor(row / H), x = Math.floor(layer / per) * part, y = (layer % per) * (h + 2) + 1, i = row * event.n + t;
      if (row % H === 0) svg.append(draw("text", {x: x + left - 4, y: y + h - 3, "text-anchor": "end"}, event.layers[layer]));
      const alpha = event.states[i] === 2 ? 1 - 0.6 * Math.min(1, (event.ranks[i] - 1) / Math.max(1, event.best[row])) : 1;
      const cell = draw("rect", {x: x + left + headOf(row) * w, y, width: w - 2, height: h, rx: 2, class: "s" + event.states[i], "fill-opacity": alpha.toFixed(2)});
      const told = `layer ${layerOf(row)}, head ${headOf(row)}: ${why(row, t)}`;
      cell.append(draw("title", {}, told));
      cell.addEventListener("pointerenter", () => { panel.querySelector(".cell").textContent = told; });
      svg.append(cell);
    }
    return svg;
  }

  // ---- choosing a token
  function choose(index, focus) {
    if (!spans.length) return;
    index = Math.max(0, Math.min(spans.length - 1, index));
    spans[chosen].setAttribute("aria-selected", "false");
    spans[chosen].tabIndex = -1;
    chosen = index;
    spans[chosen].setAttribute("aria-selected", "true");
    spans[chosen].tabIndex = 0;
    if (focus) spans[chosen].focus();
    mark();
    show(chosen);
  }
  const text = byId("text");
  text.addEventListener("click", pressed => {
    const span = pressed.target.closest(".tok");
    if (span) choose(+span.dataset.i, true);
  });
  text.addEventListener("keydown", pressed => {
    const to = {ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: spans.length - 1}[pressed.key];
    if (to === undefined || pressed.ctrlKey || pressed.metaKey || pressed.altKey) return;
    pressed.preventDefault();
    choose(to, true);
  });

  // ---- events, width, light and dark
  const nav = byId("events"), told = nav.textContent;
  nav.replaceChildren(...(data.events.length > 1 ? data.events.map((one, i) => {
    const button = make("button", {type: "button", "aria-pressed": "false"}, `event ${one.number}, ${count(one.n)} tokens`);
    button.onclick = () => open(i);
    return button;
  }) : []), told);
  byId("zoom").onchange = paint;
  addEventListener("resize", () => paint());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint());
  byId("theme").onclick = () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    paint();
  };
  // the token that most heads keep for its score is worth a first look
  open(0);
  let first = 0, most = -1;
  for (let t = 0; t < event.n; t++) {
    let score = 0;
    for (let row = 0; row < event.rows; row++) score += event.states[row * event.n + t] === 2 ? 1 : 0;
    if (score > most) { most = score; first = t; }
  }
  choose(first);
})();
