"use strict";

/* The playground: builds its controls once, and draws the tables anew after every change. Words are
   in words.js, arithmetic in numbers.js. */
(() => {
  const root = document.querySelector(".playground");
  const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";

  const MOST_KEYS = 16;
  const REACH = { fp16: 20, bf16: 120, fp32: 120 }; // of the bars, above and below 0

  // Keys all of one score, one of another, ...
  const repeat = (...runs) => runs.flatMap(([count, number]) => Array(count).fill(number));
  const PRESETS = {
    presetOrdinary: { type: "fp16", scores: [1, -2, 3.5, 0, 5, -1, 2, 4] },
    presetTooLarge: { type: "fp16", scores: [8, 12.5, 3, 11, 14, 9, 2, 10] },
    presetTooLow: { type: "fp16", scores: [-18, -20, -19, -22, -18.5, -21, -19.5, -20] },
    presetSum: { type: "fp16", scores: [10, 10.5, 10, 10.5, 10, 10.5, 10, 10.5] },
    presetRising: { type: "fp16", scores: [-3, -2.5, -1, 0, 1, 2.5, 3, 4], size: 2 },
    presetFalling: { type: "fp16", scores: [4, 3, 2.5, 1, 0, -1, -2.5, -3], size: 2 },
    presetStall: { type: "bf16", scores: repeat([1, 0], [15, -6]), size: 1 },
    presetMasked: { type: "fp16", scores: [...repeat([4, -Infinity]), 2, 3, 1, 2.5], size: 2 },
    presetNothing: { type: "fp16", scores: repeat([8, -Infinity]) },
  };

  const now = { kept: "same", orderName: "orderForward" };

  function word(name, fill = {}) {
    return PLAYGROUND_WORDS[name][language].replace(/\{(\w+)\}/g, (_, field) => fill[field]);
  }

  function show(x) {
    if (!Number.isFinite(x)) return Number.isNaN(x) ? "NaN" : x > 0 ? "inf" : "-inf";
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(2);
    return String(Number(x.toPrecision(5)));
  }

  function parsed(text) {
    const plain = text.trim().replace(/^[\u2212\uff0d]/, "-").toLowerCase();
    if (plain === "-inf") return -Infinity;
    return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/.test(plain) ? Number(plain) : NaN;
  }

  // --- Pieces of the page -------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, content] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), content);
      else made.setAttribute(name, content);
    }
    made.append(...children);
    return made;
  }

  /* A group of radio buttons; `options` are pairs of a value and its words. */
  function choice(name, options, chosen, onchange) {
    const buttons = options.map(([value, words]) => {
      const button = element("input", { type: "radio", name, value });
      button.checked = value === chosen;
      button.addEventListener("change", () => onchange(value));
      return element("label", {}, button, " ", words);
    });
    return element("fieldset", { class: "choice" }, element("legend", {}, word(name)), ...buttons);
  }

  /* A cell with a number, marked where it is not finite. */
  function cell(x) {
    const attributes = Number.isNaN(x) || x === Infinity ? { class: "broken" } : {};
    return element("td", attributes, show(x));
  }

  const scrolls = { class: "scroll", tabindex: "0" };
  const heading = (words, attributes = {}) => element("th", { scope: "col", ...attributes }, words);
  const rowHeading = (...words) => element("th", { scope: "row" }, ...words);
  const row = (...cells) => element("tr", {}, ...cells);

  /* A table that scrolls in itself, also by the keyboard; its caption stays. */
  function table(name, caption, heads, rows) {
    const id = `${name}-caption`;
    const parts = [element("thead", {}, ...heads), element("tbody", {}, ...rows)];
    const made = element("table", { "aria-labelledby": id }, ...parts);
    const region = element("div", { ...scrolls, role: "region", "aria-labelledby": id }, made);
    places[name].replaceChildren(element("p", { id }, caption), region);
  }

  const places = {};
  /* A place that is drawn anew after every change. */
  function place(name, tag = "div", attributes = {}) {
    places[name] = element(tag, attributes);
    return places[name];
  }

  // --- Controls -----------------------------------------------------------------------------

  function controls() {
    const option = (name) => element("option", { value: name }, word(name));
    const options = Object.keys(PRESETS).map(option);
    const start = element("select", { onchange: () => begin(start.value) }, ...options);
    return [
      element(
        "div",
        { class: "row" },
        element("label", {}, word("startFrom"), " ", start),
        place("type"),
      ),
      element("h2", {}, word("scoresTitle")),
      element("p", { id: "scores-help" }, word("scoresHelp")),
      place("keys", "div", { ...scrolls, role: "group", "aria-label": word("scoresTitle") }),
      element(
        "div",
        { class: "row" },
        element("button", { type: "button", onclick: () => resize(1) }, word("addKey")),
        element("button", { type: "button", onclick: () => resize(-1) }, word("removeKey")),
        place("limits", "span", { class: "limits" }),
      ),
      element("h2", {}, word("softmaxTitle")),
      place("verdict", "div", { role: "status" }),
      place("softmax"),
      element("h2", {}, word("onlineTitle")),
      element("div", { class: "row" }, place("size"), place("kept")),
      place("order"),
      place("moved", "p", { role: "status" }),
      place("states"),
      element("h2", {}, word("orderTitle")),
      place("orders"),
      place("same", "p", { role: "status" }),
    ];
  }

  function begin(name) {
    const { type, scores, size = 3 } = PRESETS[name];
    Object.assign(now, { type, size, scores: [...scores], values: scores.map((_, j) => j + 1) });
    now.orderName = "orderForward";
    build();
  }

  function resize(change) {
    const count = Math.min(Math.max(now.scores.length + change, 1), MOST_KEYS);
    now.scores = Array.from({ length: count }, (_, j) => now.scores[j] ?? 0);
    now.values = Array.from({ length: count }, (_, j) => now.values[j] ?? j + 1);
    build();
  }

  /* Controls whose number depends on the state: one bar a key, and what the presets set. */
  function build() {
    now.size = Math.min(now.size, now.scores.length);
    arrange(now.orderName === "orderOwn" ? "orderForward" : now.orderName);
    const types = Object.keys(numbers.TYPES).map((type) => [type, type]);
    const setType = (type) => ((now.type = type), build());
    places.type.replaceChildren(choice("type", types, now.type, setType));
    const kept = [["same", word("stateSame")], ["wide", word("stateWide")]];
    places.kept.replaceChildren(choice("state", kept, now.kept, (k) => ((now.kept = k), draw())));
    places.keys.replaceChildren(...keys());
    places.size.replaceChildren(sizes());
    draw();
  }

  function sizes() {
    const limits = { type: "range", min: 1, max: now.scores.length, value: now.size };
    const shown = element("output", {}, String(now.size));
    const slider = element("input", limits);
    slider.addEventListener("input", () => {
      now.size = Number(slider.value);
      shown.textContent = slider.value;
      arrange(now.orderName === "orderOwn" ? "orderForward" : now.orderName);
      draw();
    });
    return element("label", {}, word("blockSize"), " ", slider, " ", shown);
  }

  function keys() {
    const reach = REACH[now.type];
    const limits = numbers.limits(now.type);
    const line = (at, kind) => {
      const style = `top: ${(50 * (reach - at)) / reach}%`;
      return element("div", { class: `line ${kind}`, style }, element("span", {}, show(at)));
    };
    const lines = [line(limits.above, "above"), line(0, "zero"), line(limits.below, "below")];
    const columns = now.scores.map((_, j) => keyColumn(j, reach));
    const names = ["key", "score", "value"].map((name) => element("span", {}, word(name)));
    const legend = element("div", { class: "names", "aria-hidden": "true" }, ...names);
    const told = { type: now.type, above: show(limits.above), below: show(limits.below) };
    places.limits.textContent = word("limits", told);
    const chart = element("div", { class: "lines", "aria-hidden": "true" }, ...lines);
    return [element("div", { class: "keys" }, legend, chart, ...columns)];
  }

  function keyColumn(j, reach) {
    const key = { key: j + 1 };
    const attributes = { type: "range", min: -reach, max: reach, step: 0.5 };
    const names = { "aria-label": word("scoreOf", key), "aria-orientation": "vertical" };
    const bar = element("input", { ...attributes, ...names, "aria-describedby": "scores-help" });
    const fill = element("div", { class: "fill" });
    bar.addEventListener("input", () => setScore(Number(bar.value)));
    const text = (label, content, set) => {
      const field = element("input", { type: "text", inputmode: "text", "aria-label": label });
      field.value = show(content);
      field.addEventListener("input", () => {
        const number = parsed(field.value);
        field.setAttribute("aria-invalid", String(Number.isNaN(number)));
        field.title = Number.isNaN(number) ? word("notANumber") : "";
        if (!Number.isNaN(number)) set(number);
      });
      return field;
    };
    const score = text(word("scoreTyped", key), now.scores[j], (s) => setScore(s, false));
    const value = text(word("valueOf", key), now.values[j], (v) => {
      if (v === -Infinity) return;
      now.values[j] = v;
      draw();
    });

    function setScore(s, retype = true) {
      now.scores[j] = s;
      if (retype) score.value = show(s);
      if (retype) score.setAttribute("aria-invalid", "false");
      update();
      draw();
    }

    function update() {
      const s = numbers.round(now.type, now.scores[j]);
      const e = numbers.round(now.type, Math.exp(s));
      const none = s === -Infinity ? "masked" : "underflows";
      const trouble = e === Infinity ? "overflows" : e === 0 ? none : "";
      const height = Math.min(Math.max(s, -reach), reach) / reach; // of half the chart
      fill.style.top = `${50 - 50 * Math.max(height, 0)}%`;
      fill.style.height = `${50 * Math.abs(height)}%`;
      fill.className = `fill ${trouble}`;
      bar.value = String(s);
      const told = trouble ? word("trouble", { score: show(s), trouble: word(trouble) }) : show(s);
      bar.setAttribute("aria-valuetext", told);
    }

    update();
    const number = element("span", { class: "number", "aria-hidden": "true" }, String(j + 1));
    const whole = element("div", { class: "bar" }, fill, bar);
    return element("div", { class: "key" }, whole, number, score, value);
  }

  // --- Order of the blocks ------------------------------------------------------------------

  /* Blocks of `now.size` keys, from left to right. */
  function blocks() {
    const count = Math.ceil(now.scores.length / now.size);
    const all = now.scores.map((_, j) => j);
    return Array.from({ length: count }, (_, b) => all.slice(b * now.size, (b + 1) * now.size));
  }

  const ORDERS = ["orderForward", "orderBackward", "orderLargest", "orderSmallest"];

  /* The block numbers in a named order. */
  function ordered(name) {
    const all = blocks().map((_, b) => b);
    const largest = blocks().map((keys) => Math.max(...keys.map((j) => now.scores[j])));
    const higher = (a, b) => (largest[a] === largest[b] ? a - b : largest[b] - largest[a]);
    if (name === "orderBackward") return all.reverse();
    if (name === "orderLargest") return all.sort(higher);
    if (name === "orderSmallest") return all.sort((a, b) => higher(b, a));
    if (name !== "orderShuffle") return all;
    for (let b = all.length - 1; b > 0; b--) {
      const other = Math.floor(Math.random() * (b + 1));
      [all[b], all[other]] = [all[other], all[b]];
    }
    return all;
  }

  function arrange(name) {
    now.orderName = name;
    now.order = ordered(name);
  }

  /* Exchange the block at a step with the one before it. */
  function exchange(step, moved) {
    const { order } = now;
    [order[step - 1], order[step]] = [order[step], order[step - 1]];
    now.orderName = "orderOwn";
    draw();
    const fill = { block: moved + 1, step: order.indexOf(moved) + 1, steps: order.length };
    places.moved.textContent = word("blockMoved", fill);
  }

  function drawOrder() {
    const steps = now.order.length;
    const chips = now.order.map((block, step) => {
      const move = (name, sign, enabled, from) => {
        const label = word(name, { block: block + 1 });
        const again = `${name}-${block}`;
        const attributes = { type: "button", "aria-label": label, title: label };
        const button = element("button", attributes, sign);
        button.dataset.again = again;
        button.disabled = !enabled;
        button.addEventListener("click", () => {
          exchange(from, block);
          const other = `${name === "earlier" ? "later" : "earlier"}-${block}`;
          const find = (which) => places.order.querySelector(`[data-again="${which}"]:enabled`);
          (find(again) ?? find(other))?.focus();
        });
        return button;
      };
      const shade = { class: `shade-${block % 8}` };
      const name = element("span", shade, word("block", { block: block + 1 }));
      return element(
        "li",
        {},
        move("earlier", "\u25c0", step > 0, step),
        name,
        move("later", "\u25b6", step < steps - 1, step + 1),
      );
    });
    const buttons = [...ORDERS, "orderShuffle"].map((name) => {
      const attributes = { type: "button", "aria-pressed": String(name === now.orderName) };
      const button = element("button", attributes, word(name));
      button.dataset.again = name;
      button.addEventListener("click", () => {
        arrange(name);
        draw();
        places.order.querySelector(`[data-again="${name}"]`).focus();
      });
      return button;
    });
    places.order.replaceChildren(
      element("div", { class: "row", role: "group", "aria-label": word("order") }, ...buttons),
      element("ol", { class: "blocks", "aria-label": word("order") }, ...chips),
    );
  }

  // --- The three topics ---------------------------------------------------------------------

  /* Scores and values as numbers of the type. */
  function inputs() {
    const rounded = (items) => items.map((x) => numbers.round(now.type, x));
    return { scores: rounded(now.scores), values: rounded(now.values) };
  }

  const error = (weights, exact) =>
    weights.reduce((most, w, j) => Math.max(most, Math.abs(w - exact[j])), 0);

  function drawSoftmax() {
    const { type } = now;
    const { scores, values } = inputs();
    const naive = numbers.softmax(type, scores, false);
    const safe = numbers.softmax(type, scores, true);
    const exact = numbers.exact(scores, values);
    const rows = scores.map((s, j) =>
      row(
        rowHeading(String(j + 1)),
        cell(s),
        ...[naive, safe].flatMap((f) => [cell(f.exponentials[j]), cell(f.weights[j])]),
        cell(exact.weights[j]),
      ),
    );
    const sums = [naive, safe].flatMap((f) => [cell(f.sum), element("td")]);
    rows.push(row(rowHeading(word("sumRow")), element("td"), ...sums, element("td")));
    const group = (words) => heading(words, { scope: "colgroup", colspan: 2 });
    const tall = (words) => heading(words, { rowspan: 2 });
    const heads = [
      row(
        tall(word("key")),
        tall(word("score")),
        group(word("asWritten")),
        group(word("safeForm")),
        tall(word("exactWeight")),
      ),
      row(...["exp(s)", word("weight"), "exp(s − m)", word("weight")].map((name) => heading(name))),
    ];
    table("softmax", word("softmaxCaption", { type, m: show(exact.m) }), heads, rows);

    const count = naive.exponentials.filter((e) => e === Infinity).length;
    const [naiveError, safeError] = [naive, safe].map((f) => error(f.weights, exact.weights));
    const rounding = 2 ** -numbers.TYPES[type].bits;
    const right = naiveError <= 2 * safeError + rounding;
    let verdict = right ? "naiveRight" : "naiveDrift";
    if (naive.sum === 0) verdict = "naiveZero";
    else if (count > 0) verdict = "naiveOverflow";
    else if (naive.sum === Infinity) verdict = "naiveSum";
    const fill = { type, count, keys: scores.length, error: show(naiveError) };
    const kept = exact.m === -Infinity ? "safeNothing" : "safeRight";
    places.verdict.replaceChildren(
      element("p", { class: verdict === "naiveRight" ? "good" : "bad" }, word(verdict, fill)),
      element("p", { class: "good" }, word(kept, { type, error: show(safeError) })),
    );
  }

  const keptType = () => (now.kept === "wide" ? "fp32" : now.type);

  function run(order) {
    const { scores, values } = inputs();
    const all = blocks();
    return numbers.online(now.type, keptType(), scores, values, order.map((b) => all[b]));
  }

  /* Each block's share of l at a step, as the lengths of one bar. */
  function shares(steps, step, longest) {
    const { m } = steps[step].state;
    const pieces = steps.slice(0, step + 1).map(({ own }, k) => {
      const share = own.l === 0 ? 0 : own.l * Math.exp(own.m - m);
      const width = `width: ${(100 * share) / longest}%`;
      return element("span", { class: `shade-${now.order[k] % 8}`, style: width });
    });
    return element("td", { class: "shares", "aria-hidden": "true" }, element("div", {}, ...pieces));
  }

  function drawStates() {
    const steps = run(now.order);
    const longest = Math.max(...steps.map(({ state }) => state.l)) || 1;
    const three = ({ m, l, o }) => [cell(m), cell(l), cell(o)];
    const rows = steps.map(({ keys, own, state, out }, step) =>
      row(
        rowHeading(word("stepOf", { step: step + 1, block: now.order[step] + 1 })),
        element("td", {}, [...new Set([keys[0] + 1, keys.at(-1) + 1])].join("–")),
        shares(steps, step, longest),
        ...three(own),
        cell(state.factorA),
        cell(state.factorB),
        ...three(state),
        cell(out),
      ),
    );
    const empty = Array.from({ length: 7 }, () => element("td"));
    empty[1].setAttribute("aria-hidden", "true");
    const none = [-Infinity, 0, 0, 0].map(cell);
    rows.unshift(row(rowHeading(word("before")), ...empty, ...none));
    const group = (words, colspan) => heading(words, { scope: "colgroup", colspan });
    const tall = (words, attributes = {}) => heading(words, { rowspan: 2, ...attributes });
    const subs = ["m", "l", "o", word("factorOld"), word("factorBlock"), "m", "l", "o"];
    const heads = [
      row(
        tall(word("step")),
        tall(word("keys")),
        tall(word("shares"), { "aria-hidden": "true" }),
        group(word("ownState"), 3),
        group(word("factors"), 2),
        group(word("stateAfter"), 3),
        tall("o / l"),
      ),
      row(...subs.map((words) => heading(words))),
    ];
    const rose = steps.filter(({ state }, k) => k > 0 && state.m > steps[k - 1].state.m).length;
    const told = word("rescales", { count: rose, steps: steps.length });
    table("states", word("stateCaption"), heads, rows);
    places.states.append(element("p", {}, told));
  }

  function drawOrders() {
    const { scores, values } = inputs();
    const exact = numbers.exact(scores, values);
    const ends = ORDERS.map((name) => [name, run(ordered(name)).at(-1)]);
    if (!ORDERS.includes(now.orderName)) ends.push(["orderOwn", run(now.order).at(-1)]);
    const line = (name, m, l, o, out, difference) => {
      const log = l === 0 ? -Infinity : m + Math.log(l);
      return row(rowHeading(word(name)), ...[m, l, o, out, log].map(cell), difference);
    };
    const rows = ends.map(([name, { state, out }]) =>
      line(name, state.m, state.l, state.o, out, cell(out - exact.out)),
    );
    rows.push(line("exactRow", exact.m, exact.l, exact.o, exact.out, element("td")));
    const words = [word("order"), "m", "l", "o", word("output"), word("lse"), word("difference")];
    const heads = [row(...words.map((name) => heading(name)))];
    table("orders", word("orderCaption"), heads, rows);
    const outs = ends.map(([, { out }]) => out);
    const spread = Math.max(...outs) - Math.min(...outs);
    const same = spread === 0 ? "sameBits" : "sameRounded";
    places.same.textContent = word(same, { spread: show(spread) });
  }

  function draw() {
    places.moved.textContent = "";
    drawSoftmax();
    drawOrder();
    drawStates();
    drawOrders();
  }

  root.replaceChildren(...controls());
  begin("presetOrdinary");
})();
