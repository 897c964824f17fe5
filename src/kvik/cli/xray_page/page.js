"use strict";
// Text of the model reaches the page through textContent and setAttribute only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const spans = [...document.querySelectorAll(".tok")];
  const panel = document.getElementById("panel");
  const here = document.getElementById("here");
  const TITLES = {
    logits: "model", greedy: "greedy", temperature: "temperature", top_k: "top-k", top_p: "top-p", min_p: "min-p",
    typical_p: "typical", epsilon_cutoff: "epsilon", eta_cutoff: "eta", top_n_sigma: "top-n-sigma", xtc: "XTC",
    logit_bias: "bias", banned: "banned", grammar: "grammar", repetition_penalty: "repetition", dry: "DRY",
    presence_penalty: "presence", frequency_penalty: "frequency", no_repeat_ngram_size: "no repeat",
  };
  let chosen = 0, stage = null;

  const title = name => TITLES[name] || name;
  function percent(p) {
    if (p === 0) return "0";
    const v = 100 * p;
    if (v < 0.001) return v.toExponential(0).replace("e-", "e−") + " %";
    return (v >= 99.95 && v < 100 ? ">99.9" : v >= 10 ? v.toFixed(1) : v >= 1 ? v.toFixed(2) : v.toPrecision(2)) + " %";
  }

  // ---- the panel
  function show(index) {
    const one = data.tokens[index];
    const keep = panel.scrollTop;
    const stats = [["probability", percent(one.p)], ["rank", count(one.rank)], ["entropy", one.h.toFixed(2) + " bits"],
      ["nucleus at " + one.np, count(one.n)]];
    const back = make("button", {type: "button", "aria-label": "token before"}, "‹");
    const on = make("button", {type: "button", "aria-label": "next token"}, "›");
    back.onclick = () => choose(chosen - 1);
    on.onclick = () => choose(chosen + 1);
    const list = make("dl", {class: "stats"});
    for (const [name, value] of stats) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    panel.replaceChildren(
      make("div", {class: "head"}, make("code", {}, data.names[one.t]),
        make("span", {class: "at"}, `token ${index + 1} of ${data.tokens.length}`), back, on),
      list, make("h2", {}, "What it was chosen from, stage by stage"), stagesOf(one), make("p", {class: "note"}),
      make("ol", {class: "rows"}), make("p", {class: "more"}), make("h2", {}, "The same logits at other temperatures"),
      sweepOf(one), make("p", {class: "note temperature"}),
    );
    bars(one);
    panel.scrollTop = keep;
  }

  function stagesOf(one) {
    const set = make("fieldset", {class: "stages", "aria-label": "Stage"});
    const names = one.stages.map(s => s[0]);
    const at = stage !== null && names.includes(stage) ? names.indexOf(stage) : names.length - 1;
    one.stages.forEach(([name, kept], i) => {
      const input = make("input", {type: "radio", name: "stage", value: i});
      input.checked = i === at;
      input.onchange = () => { stage = i === names.length - 1 ? null : name; bars(one); };
      set.append(make("label", {}, input, title(name), make("span", {}, count(kept))));
    });
    return set;
  }

  function bars(one) {
    const at = +panel.querySelector("input:checked").value;
    const [name, kept, removed, mass] = one.stages[at];
    const top = Math.max(...one.best.flatMap(b => b[2]));
    const rows = one.best.map(([token, gone, shares], i) => {
      const share = shares[at], out = share === 0 && at > 0;
      const rail = make("span", {class: "rail"},
        make("span", {class: "ghost", style: `width:${100 * shares[0] / top}%`}));
      if (out) rail.append(make("span", {class: "why"}, "removed by " + title(gone)));
      else rail.append(make("span", {class: "fill", style: `width:${100 * share / top}%`}));
      const dot = make("span", {class: "dot", style: `background:var(--c${Math.min(i, 6)})`});
      return make("li", {class: (out ? "gone " : "") + (token === one.t ? "drawn" : "")}, dot,
        make("code", {title: data.names[token]}, data.names[token]), rail,
        make("span", {class: "num"}, percent(out ? shares[0] : share)));
    });
    panel.querySelector(".rows").replaceChildren(...rows);
    const said = at === 0 ? `${count(kept)} tokens, as the model gives them`
      : removed ? `${title(name)} removed ${count(removed)} ${removed === 1 ? "token" : "tokens"} (${percent(mass)}); ${count(kept)} left`
      : `${title(name)} removed no token; ${count(kept)} left`;
    panel.querySelector(".note").textContent = said;
    panel.querySelector(".more").replaceChildren(
      make("i", {class: "swatch drawn"}), `drawn, ${percent(one.best.find(b => b[0] === one.t)[2][at])} here`,
      make("i", {class: "swatch"}), "others", make("i", {class: "swatch pale"}), "by the model alone");
  }

  // ---- temperature sweep: layers of probability, the best tokens from below
  function sweepOf(one) {
    const W = 390, H = 150, L = 4, R = 4, T = 6, B = 20;
    const svg = draw("svg", {viewBox: `0 0 ${W} ${H}`, class: "sweep", role: "img",
      "aria-label": "Probabilities of the best tokens at temperatures from 0.1 to 2"});
    const temps = one.sweep.map(s => s[0]);
    const x = t => L + (W - L - R) * (t - temps[0]) / (temps[temps.length - 1] - temps[0]);
    const y = v => T + (H - T - B) * (1 - v);
    const shown = one.best.length;
    svg.append(draw("rect", {x: L, y: T, width: W - L - R, height: H - T - B, fill: "var(--rest)"}));
    let below = temps.map(() => 0);
    const labels = [];
    for (let k = 0; k < shown; k++) {
      const above = below.map((v, i) => Math.min(1, v + one.sweep[i][3][k]));
      const points = [...temps.map((t, i) => `${x(t)},${y(above[i])}`),
        ...temps.map((t, i) => `${x(t)},${y(below[i])}`).reverse()];
      const me = one.best[k][0] === one.t;
      svg.append(draw("polygon", {points: points.join(" "), fill: `var(--c${Math.min(k, 6)})`, class: "layer" + (me ? " me" : "")}));
      let best = 0;
      temps.forEach((t, i) => { if (one.sweep[i][3][k] > one.sweep[best][3][k]) best = i; });
      const height = (H - T - B) * one.sweep[best][3][k];
      if (height > 14 && k < 6) labels.push([x(temps[best]), y((above[best] + below[best]) / 2), data.names[one.best[k][0]]]);
      below = above;
    }
    const taken = [];
    for (const [lx, ly, text] of labels) {
      const cut = text.length > 14 ? text.slice(0, 13) + "…" : text, half = cut.length * 3.4 + 4;
      const cx = Math.min(W - R - half, Math.max(L + half, lx));
      if (taken.some(([tx, ty, th]) => Math.abs(tx - cx) < th + half && Math.abs(ty - ly) < 14)) continue;
      taken.push([cx, ly, half]);
      svg.append(draw("text", {x: cx, y: ly + 4, class: "name", "text-anchor": "middle"}, cut));
    }
    for (const t of [0.1, 0.5, 1, 1.5, 2]) {
      svg.append(draw("text", {x: x(t), y: H - 5, "text-anchor": t === 0.1 ? "start" : t === 2 ? "end" : "middle"}, t === 1 ? "1 (as it is)" : t));
    }
    const cursor = draw("line", {class: "cursor", y1: T, y2: H - B});
    svg.append(cursor);
    const point = i => {
      cursor.setAttribute("x1", x(temps[i]));
      cursor.setAttribute("x2", x(temps[i]));
      const [t, entropy, nucleus, shares] = one.sweep[i];
      const line = panel.querySelector(".temperature");
      const best = `${data.names[one.best[0][0]]} ${percent(shares[0])}`;
      if (line) line.textContent = `at ${t}: ${best}, entropy ${entropy.toFixed(2)} bits, nucleus ${count(nucleus)} tokens`;
    };
    const nearest = event => {
      const box = svg.getBoundingClientRect();
      const px = (event.clientX - box.left) / box.width * W;
      let best = 0;
      temps.forEach((t, i) => { if (Math.abs(x(t) - px) < Math.abs(x(temps[best]) - px)) best = i; });
      point(best);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    const own = temps.indexOf(data.temperature);
    queueMicrotask(() => point(own >= 0 ? own : Math.max(0, temps.indexOf(1))));
    return svg;
  }

  // ---- choosing a token
  function choose(index, focus) {
    index = Math.max(0, Math.min(spans.length - 1, index));
    if (!spans.length) return;
    spans[chosen].setAttribute("aria-selected", "false");
    spans[chosen].tabIndex = -1;
    chosen = index;
    const span = spans[chosen];
    span.setAttribute("aria-selected", "true");
    span.tabIndex = 0;
    if (focus) span.focus({preventScroll: false});
    here.setAttribute("x", chosen);
    show(chosen);
  }
  function line(step) {  // the token nearest in the line above or below
    const now = spans[chosen].getBoundingClientRect();
    let best = chosen, distance = Infinity;
    spans.forEach((span, i) => {
      const box = span.getBoundingClientRect();
      const rows = (box.top - now.top) * step;
      if (rows <= now.height / 2) return;
      const far = rows * 10 + Math.abs(box.left - now.left);
      if (far < distance) { distance = far; best = i; }
    });
    return best;
  }
  const text = document.getElementById("text");
  text.addEventListener("click", event => {
    const span = event.target.closest(".tok");
    if (span) { pinned = true; choose(+span.dataset.i, true); }
  });
  let pinned = false;
  if (matchMedia("(hover: hover)").matches) {
    text.addEventListener("mouseover", event => {
      const span = event.target.closest(".tok");
      if (span && !pinned) choose(+span.dataset.i);
    });
    text.addEventListener("mouseleave", () => { pinned = false; });
  }
  text.addEventListener("keydown", event => {
    const to = {ArrowRight: () => chosen + 1, ArrowLeft: () => chosen - 1, ArrowDown: () => line(1), ArrowUp: () => line(-1),
      Home: () => 0, End: () => spans.length - 1}[event.key];
    if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pinned = true;
    choose(to(), true);
  });
  const pulse = document.querySelector(".pulsebars");
  const along = event => {
    const box = pulse.getBoundingClientRect();
    choose(Math.floor((event.clientX - box.left) / box.width * spans.length));
  };
  pulse.addEventListener("pointermove", along);
  pulse.addEventListener("pointerdown", along);

  // ---- the beam tree
  const boxes = [...document.querySelectorAll(".tree .node")].sort((a, b) => a.dataset.node - b.dataset.node);
  function beam(index, mark = true) {
    const [, total, score, path] = data.nodes[index];
    boxes.forEach(box => box.classList.remove("on"));
    if (mark) path.forEach(at => boxes[at].classList.add("on"));
    const words = path.map(at => data.names[data.nodes[at][0]]).join("").replaceAll("␣", " ");
    const end = score === null ? "" : `, ended with score ${score}`;
    document.getElementById("beam").replaceChildren(make("b", {}, words), ` — log-probability ${total}${end}`);
  }
  boxes.forEach((box, index) => {
    box.addEventListener("pointerenter", () => beam(index));
    box.addEventListener("click", () => beam(index));
    box.addEventListener("focus", () => beam(index));
    box.addEventListener("keydown", event => {
      const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
      const path = data.nodes[index][3];
      let to = null;
      if (step) to = boxes[index + step];
      if (event.key === "ArrowLeft" && path.length > 1) to = boxes[path[path.length - 2]];
      if (event.key === "ArrowRight") to = boxes[data.nodes.findIndex(n => n[3].length > 1 && n[3][n[3].length - 2] === index)];
      if (!to) return;
      event.preventDefault();
      to.focus();
    });
  });
  const answer = boxes.filter(box => box.classList.contains("best"));
  if (boxes.length) {
    (answer[0] || boxes[0]).setAttribute("tabindex", "0");
    if (answer.length) beam(boxes.indexOf(answer[answer.length - 1]), false);
  }

  // ---- light and dark
  document.getElementById("theme").onclick = () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };

  // the most open choice is worth a first look
  let first = 0;
  data.tokens.forEach((one, i) => { if (one.h > data.tokens[first].h) first = i; });
  if (spans.length) choose(first);
  else panel.replaceChildren(make("p", {}, "No token was generated."));
})();
