"use strict";

/* The stepper: replays what docs/stepper.py recorded (record.js) in the words of words.js. Nothing of
   attention is computed here: every number that is shown was read from a running kernel or is an
   input of it. */
(() => {
  const root = document.querySelector(".stepper");
  const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
  const { presets, sources, formulas } = STEPPER_RECORD;

  // What a table shows of a record's field, and the fields that a program keeps from step to step.
  const SYMBOLS = {
    m: "m", rescale: "α", l: "l", acc: "acc", out: "o", shift: "LSE", lse: "LSE", delta: "δ",
    dq: "dQ", dk: "dK", dv: "dV",
  };
  const REGISTERS = ["m", "rescale", "l", "acc", "shift", "delta", "dq", "dk", "dv"];
  // The field that a step of this kind stores.
  const STORED = {
    out: "out", lse: "lse", delta: "delta", shift: "lse", dk_out: "dk", dv_out: "dv", dq_out: "dq",
    parts_out: "out", parts_lse: "lse",
  };
  const OF_TILE = ["load", "scores", "mask", "p", "rebuild", "dp", "ds"]; // change what a tile holds

  const now = {};
  const places = {};

  function word(name, fill = {}) {
    return STEPPER_WORDS[name][language].replace(/\{(\w+)\}/g, (_, field) => fill[field]);
  }

  /* A number of the record, in which those that are not finite are strings. */
  function show(x, digits = 5) {
    if (typeof x === "string") return x === "nan" ? "NaN" : x;
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
      return x.toExponential(digits > 3 ? 2 : 0).replace("e+", "e");
    }
    return String(Number(x.toPrecision(size < 0.1 && digits === 3 ? 2 : digits)));
  }

  const count = (n) => Array.from({ length: n }, (_, i) => i);
  const inside = ([first, size], x) => x >= first && x < first + size;
  const overKeys = (program) => program.kernel === "dkdv_kernel"; // its rows are keys

  /* "q4-q7", of the first and how many there are. */
  function span(side, [first, size]) {
    return size === 1 ? `${side}${first}` : `${side}${first}\u2013${side}${first + size - 1}`;
  }

  const own = (program) => (overKeys(program) ? "k" : "q");
  const other = (program) => (overKeys(program) ? "q" : "k");

  // --- The record, step by step -------------------------------------------------------------

  /* All steps of a preset in order, each with its program. */
  function trailOf(preset) {
    return preset.programs.flatMap((program, number) =>
      program.steps.map((step) => ({ program, number, step })),
    );
  }

  /* What there is after a step, from all steps up to it. */
  function replay(trail, at) {
    const view = { memory: { q: new Map(), k: new Map() }, visited: [] };
    Object.assign(view, { bytes: [0, 0], earlier: [0, 0] });
    for (const { program, number, step } of trail.slice(0, at + 1)) {
      if (number !== view.number) {
        view.earlier = view.earlier.map((sum, i) => sum + view.bytes[i]);
        Object.assign(view, { number, program, registers: {}, tile: null, ranges: null });
        view.bytes = [0, 0];
      }
      const loaded = step.bytes[0] - view.bytes[0];
      Object.assign(view, { step, loaded, bytes: step.bytes, before: {} });
      view.ranges = step.ranges ?? view.ranges;
      if (step.kind === "load") {
        const [rows, columns] = overKeys(program) ? [step.at, program.at] : [program.at, step.at];
        view.tile = { rows, columns, head: step.head, ...example(program, step) };
        view.visited.push(view.tile);
      }
      if (OF_TILE.includes(step.kind)) {
        view.tile.kind = step.kind;
        view.tile.numbers = step.tile;
        view.tile.visible = step.visible ?? view.tile.visible;
        if (step.tile) view.tile[step.kind] = step.tile;
      }
      if (step.kind === "max") view.tile.m = view.registers.m; // before it
      for (const field of REGISTERS.filter((name) => name in step)) {
        view.before[field] = view.registers[field];
        view.registers[field] = step[field];
      }
      if (step.kind in STORED) store(view, STORED[step.kind]);
    }
    return view;
  }

  /* The pair of a tile that is worked out by hand: of the row that is rescaled most or has the
     largest exponential; in the backward pass of the largest gradient. */
  function example(program, load) {
    const from = program.steps.indexOf(load);
    const of = (kind) => program.steps.slice(from).find((step) => step.kind === kind);
    const largest = (numbers) => numbers.indexOf(Math.max(...numbers));
    const numbers = of("p")?.tile ?? of("ds").tile.map((row) => row.map(Math.abs));
    if (numbers.length === 0) return {};
    const factors = of("rescale")?.rescale;
    const rescaled = factors?.some((x) => x > 0 && x < 1);
    const ofRow = (row, i) => (!rescaled ? Math.max(...row) : factors[i] > 0 ? -factors[i] : -2);
    const row = largest(numbers.map(ofRow));
    return { row, column: largest(numbers[row]) };
  }

  /* Put what a step stores into the memory of the view, by row. */
  function store(view, field) {
    const { program, number, step } = view;
    const side = own(program);
    const several = now.preset.tensors.q.length > 1;
    const parts = now.preset.parts > 1;
    step[field].forEach((numbers, i) => {
      const at = (program.at?.[0] ?? 0) + i;
      let words = `${side}${at}`;
      if (several) words = word("headRow", { head: program.head, row: words });
      if (parts) words = program.at ? word("partRow", { part: number }) : word("merge_kernel");
      const order = parts ? number : 1000 * program.head + at;
      const found = view.memory[side].get(words) ?? { order };
      view.memory[side].set(words, { ...found, [field]: { numbers, step } });
    });
  }

  // --- The step in words --------------------------------------------------------------------

  const which = (rows, program) =>
    rows.map((i) => `${own(program)}${program.at[0] + i}`).join(word("comma"));

  function sentence(view) {
    const { step, program, registers, before } = view;
    const fill = { rows: program.at ? span(own(program), program.at) : "", bytes: view.loaded };
    const keys = overKeys(program) ? "Queries" : "";
    const rows = (test) => count(program.at[1]).filter(test);
    if (step.kind === "ranges") return rangesInWords(view, fill);
    if (step.kind === "load") {
      if (step.at[1] === 0) return word("loadEmpty");
      fill.range = word(step.range === "full" ? "whole" : "edge");
      return word(`load${keys}`, { ...fill, tile: span(other(program), step.at) });
    }
    if (step.kind === "mask" || step.kind === "rebuild") {
      const pairs = (step.visible ?? step.tile).flat();
      fill.pairs = pairs.length;
      fill.hidden = step.visible ? pairs.filter((x) => !x).length : 0;
    }
    if (step.kind === "max") {
      const first = rows((i) => before.m[i] < -1e30 && registers.m[i] > -1e30);
      const rises = rows((i) => before.m[i] > -1e30 && registers.m[i] > before.m[i]);
      const parts = [];
      if (first.length) parts.push(word("maxFirst", { rows: which(first, program) }));
      if (rises.length) parts.push(word("maxRises", { rows: which(rises, program) }));
      fill.changed = parts.join(" ") || word("maxStays");
    }
    if (step.kind === "rescale") {
      const below = rows((i) => step.rescale[i] < 1);
      if (registers.l.flat().every((x) => x === 0)) fill.changed = word("rescaleFirst");
      else if (below.length) fill.changed = word("rescaleSome", { rows: which(below, program) });
      else fill.changed = word("rescaleNone");
    }
    if (step.kind === "out") {
      const none = rows((i) => [registers.l[i]].flat().every((x) => x === 0));
      fill.unseen = none.length ? word("outUnseen", { rows: which(none, program) }) : "";
    }
    return word(step.kind, fill);
  }

  function rangesInWords({ step, program }, fill) {
    const keys = overKeys(program) ? "Queries" : "";
    const spans = step.ranges.filter(([start, stop]) => stop > start);
    if (spans.length === 0) return word("rangesNone", fill);
    const side = other(program);
    const base = program.base[keys ? 0 : 1];
    const start = Math.min(...spans.map((s) => s[0]));
    const size = Math.max(...spans.map((s) => s[1])) - start;
    const [fullStart, fullStop] = step.ranges[1];
    const full = { full: span(side, [base + fullStart, fullStop - fullStart]) };
    fill.keys = span(side, [base + start, size]);
    fill.full = fullStop > fullStart ? word("fullKeys", full) : "";
    const others = now.preset.parts > 1 ? "otherParts" : "skippedKeys";
    fill.skipped = size < now.preset.tensors[side][0].length ? word(others) : "";
    return word(`ranges${keys}`, fill);
  }

  /* A step's formula with the recorded numbers of one pair or row, the ones that are marked. */
  function byHand(view) {
    const { step, program, tile, registers, before } = view;
    if (!tile || tile.row === undefined || !(step.kind in HANDS)) return "";
    if (now.preset.half && step.kind !== "scores") return ""; // in units and roundings of their own
    const { tensors } = now.preset;
    const kv = Math.floor(tile.head / (tensors.q.length / tensors.k.length));
    const [i, j] = [tile.row, tile.column];
    const rows = count(tile.rows[1]).map((r) => tile.rows[0] + r);
    const columns = count(tile.columns[1]).map((c) => tile.columns[0] + c);
    const [q, k] = [tile.rows[0] + i, tile.columns[0] + j];
    const n = (x) => (typeof x === "number" && x < 0 ? `(${show(x)})` : show(x));
    const products = (a, b) => a.map((x, d) => `${n(x)} · ${n(b[d])}`).join(" + ");
    const column = (name, head, at) => at.map((row) => tensors[name][head][row][0]);
    const lse = tensors.lse[tile.head][q];
    const delta = view.memory.q.get(`q${q}`)?.delta?.numbers;
    const places = { i, j, q, k, kv, rows, columns };
    const told = { tensors, tile, registers, before, lse, delta, ...places, n, products, column };
    const equation = HANDS[step.kind](told);
    return equation && `${word(overKeys(program) ? "pairByHand" : "byHand", { q, k })} ${equation}`;
  }

  const pairs = ({ tensors, tile, q, k, kv, products }, a, b) =>
    products(tensors[a][tile.head][q], tensors[b][kv][k]);
  const HANDS = {
    scores: (on) => `s = ${pairs(on, "q", "k")} = ${show(on.tile.scores[on.i][on.j])}`,
    max: ({ registers, before, tile, i }) => {
      const scores = (tile.mask ?? tile.scores)[i].map((x) => show(x)).join(", ");
      return `m = max(${show(before.m[i])}, ${scores}) = ${show(registers.m[i])}`;
    },
    rescale: ({ registers, tile, i, n }) =>
      `α = exp(${show(tile.m[i])} − ${n(registers.m[i])}) = ${show(registers.rescale[i])}`,
    p: ({ registers, tile, i, j, n }) => {
      const s = (tile.mask ?? tile.scores)[i][j];
      return `p = exp(${show(s)} − ${n(registers.m[i])}) = ${show(tile.p[i][j])}`;
    },
    sum: ({ registers, before, tile, i, n }) => {
      const p = tile.p[i].map((x) => show(x)).join(" + ");
      return `l = ${n(registers.rescale[i])} · ${n(before.l[i])} + (${p}) = ${show(registers.l[i])}`;
    },
    acc: ({ registers, before, tile, i, kv, columns, n, products, column }) => {
      const sum = products(tile.p[i], column("v", kv, columns));
      const old = `${n(registers.rescale[i])} · ${n(before.acc[i][0])}`;
      return `acc[0] = ${old} + (${sum}) = ${show(registers.acc[i][0])}`;
    },
    rebuild: ({ tile, i, j, n, lse }) =>
      `p = exp(${show(tile.scores[i][j])} − ${n(lse)}) = ${show(tile.rebuild[i][j])}`,
    dp: (on) => `dP = ${pairs(on, "do", "v")} = ${show(on.tile.dp[on.i][on.j])}`,
    ds: ({ tile, i, j, n, delta }) => {
      const difference = `(${show(tile.dp[i][j])} − ${n(delta)})`;
      return `dS = ${n(tile.rebuild[i][j])} · ${difference} = ${show(tile.ds[i][j])}`;
    },
    dv: ({ registers, before, tile, j, rows, n, products, column }) => {
      const sum = products(tile.rebuild.map((row) => row[j]), column("do", tile.head, rows));
      return `dV[0] = ${n(before.dv[j][0])} + (${sum}) = ${show(registers.dv[j][0])}`;
    },
    dk: ({ registers, before, tile, j, rows, n, products, column }) => {
      const sum = products(tile.ds.map((row) => row[j]), column("q", tile.head, rows));
      return `dK[0] = ${n(before.dk[j][0])} + (${sum}) = ${show(registers.dk[j][0])}`;
    },
    dq: ({ registers, before, tile, i, kv, columns, n, products, column }) => {
      const sum = products(tile.ds[i], column("k", kv, columns));
      return `dQ[0] = ${n(before.dq[i][0])} + (${sum}) = ${show(registers.dq[i][0])}`;
    },
  };

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

  function place(name, tag = "div", attributes = {}) {
    places[name] = element(tag, attributes);
    return places[name];
  }

  const title = (words, attributes = {}) => element("p", { class: "title", ...attributes }, words);
  const corner = () => element("td", { class: "corner" });
  const heading = (words, attributes = {}) => element("th", { scope: "col", ...attributes }, words);
  const rowHeading = (words, attributes = {}) => element("th", { scope: "row", ...attributes }, words);
  const row = (...cells) => element("tr", {}, ...cells);

  /* A table that scrolls in itself, also by the keyboard. */
  function table(name, words, heads, rows) {
    const id = `stepper-${name}`;
    const parts = [element("thead", {}, row(...heads)), element("tbody", {}, ...rows)];
    const made = element("table", { "aria-labelledby": id }, ...parts);
    const scrolls = { class: "scroll", role: "region", tabindex: "0", "aria-labelledby": id };
    return [title(words, { id }), element("div", scrolls, made)];
  }

  function matrix(view) {
    const { tensors } = now.preset;
    const { program, tile } = view;
    const head = tile?.head ?? program.head ?? 0;
    const mark = (side, i) => {
      return program.at && side === own(program) && inside(program.at, i) ? { class: "own" } : {};
    };
    const keys = count(tensors.k[0].length), queries = count(tensors.q[0].length);
    const heads = [corner(), ...keys.map((j) => heading(`k${j}`, mark("k", j)))];
    const rows = queries.map((i) =>
      row(rowHeading(`q${i}`, mark("q", i)), ...keys.map((j) => matrixCell(view, head, i, j))),
    );
    const key = ["now", "hidden", "past", "skipped"].map((name) =>
      element("span", {}, element("i", { class: name, "aria-hidden": "true" }), word(`legend_${name}`)),
    );
    const what = tile ? word("tileHolds", { what: word(`holds_${tile.kind}`) }) : word("noTile");
    return [
      ...table("matrix", word("matrix", { head }), heads, rows),
      element("p", { class: "holds" }, what),
      element("p", { class: "legend" }, ...key),
    ];
  }

  function matrixCell({ tile, program, ranges, visited }, head, i, j) {
    const quiet = (name) =>
      element("td", { class: name }, element("span", { class: "read" }, word(`cell_${name}`)));
    const covers = (t) => t.head === head && inside(t.rows, i) && inside(t.columns, j);
    if (tile && covers(tile)) {
      const r = i - tile.rows[0], c = j - tile.columns[0];
      const classes = ["now"];
      if (r === 0) classes.push("top");
      if (r === tile.rows[1] - 1) classes.push("bottom");
      if (c === 0) classes.push("left");
      if (c === tile.columns[1] - 1) classes.push("right");
      if (r === tile.row && c === tile.column) classes.push("shown");
      if (tile.visible && !tile.visible[r][c]) classes.push("hidden");
      const number = tile.numbers?.[r][c];
      const attributes = { class: classes.join(" ") };
      if (number === undefined) return element("td", attributes);
      const shaded = ["p", "rebuild"].includes(tile.kind);
      if (shaded) attributes.style = `--part: ${Math.round(100 * number)}%`;
      return element("td", attributes, show(number, 3));
    }
    if (visited.some(covers)) return quiet("past");
    if (ranges && now.preset.parts === 1 && inside(program.at, overKeys(program) ? j : i)) {
      const x = overKeys(program) ? i - program.base[0] : j - program.base[1];
      if (!ranges.some(([start, stop]) => x >= start && x < stop)) return quiet("skipped");
    }
    return element("td", {});
  }

  /* Cells of one field of a row: a number, or one a column; with what it was before. */
  function cells(numbers, attributes = {}, before = undefined) {
    return [numbers].flat().map((x, d) => {
      const made = element("td", attributes, show(x));
      const old = before === undefined ? x : [before].flat()[d];
      if (old !== x) made.append(element("small", {}, word("was", { number: show(old) })));
      return made;
    });
  }

  const over = (field, numbers) => heading(SYMBOLS[field], { colspan: [numbers].flat().length });
  const fresh = (yes) => (yes ? { class: "changed" } : {});

  function registers(view) {
    const { program, registers: kept, before, step } = view;
    if (program.kernel === "merge_kernel") return merged(view);
    const fields = REGISTERS.filter((name) => name in kept);
    if (fields.length === 0) return [title(word("registers")), element("p", {}, word("none"))];
    const rows = count(program.at[1]).map((i) => {
      const was = (name) => (name === "rescale" ? undefined : before[name]?.[i]); // α adds to nothing
      const of = (name) => cells(kept[name][i], fresh(name in step), was(name));
      return row(rowHeading(which([i], program)), ...fields.flatMap(of));
    });
    const heads = [corner(), ...fields.map((name) => over(name, kept[name][0]))];
    return table("registers", word("registers"), heads, rows);
  }

  /* The merge of the parts: a row for each, and the state of all. */
  function merged({ program, step, registers: kept }) {
    const done = program.steps.slice(0, program.steps.indexOf(step) + 1);
    const weights = done.find((s) => s.weights)?.weights;
    const rows = program.steps[0].parts.map((lse, part) => {
      const weight = weights ? cells(weights[part], fresh(step.weights)) : [];
      return row(rowHeading(word("partRow", { part })), ...cells(lse), ...weight);
    });
    const heads = [corner(), heading("LSE"), ...(weights ? [heading("w")] : [])];
    const fields = REGISTERS.filter((name) => name in kept);
    const state = fields.flatMap((name) => cells(kept[name][0], fresh(name in step)));
    const over_ = fields.map((name) => over(name, kept[name][0]));
    return [
      ...table("registers", word("parts"), heads, rows),
      ...table("state", word("state"), over_, [row(...state)]),
    ];
  }

  function memory(view) {
    const made = Object.entries(view.memory).flatMap(([side, rows]) => {
      if (rows.size === 0) return [];
      const sorted = [...rows].sort(([, a], [, b]) => a.order - b.order);
      const found = (name) => sorted.map(([, stored]) => stored[name]).find(Boolean);
      const fields = Object.keys(SYMBOLS).filter(found);
      const width = (name) => [found(name).numbers].flat().length;
      const body = sorted.map(([words, stored]) => {
        const of = (name) => {
          const number = stored[name];
          if (!number) return count(width(name)).map(() => element("td"));
          return cells(number.numbers, fresh(number.step === view.step));
        };
        return row(rowHeading(words), ...fields.flatMap(of));
      });
      const heads = [corner(), ...fields.map((name) => over(name, found(name).numbers))];
      return table(`memory-${side}`, word(`memory_${side}`), heads, body);
    });
    return made.length ? made : [title(word("memory_q")), element("p", {}, word("none"))];
  }

  function naive({ naive: found, tensors }) {
    if (!found) return [];
    const mark = (x) => (typeof x === "string" ? { class: "broken" } : {});
    const keys = tensors.k[0].map((_, j) => heading(`k${j}`));
    const heads = [corner(), ...keys, heading("Σ"), heading("o", { colspan: found.out[0].length })];
    const rows = found.exp.map((exps, i) => {
      const numbers = [...exps, found.sum[i], ...found.out[i]];
      return row(rowHeading(`q${i}`), ...numbers.map((x) => element("td", mark(x), show(x, 3))));
    });
    return table("naive", word("naive"), heads, rows);
  }

  /* The listing of the function that is running, with the lines of the step marked. */
  function source({ step }) {
    const [name, first, last] = step.lines;
    const listing = sources[name];
    if (now.listed !== name) places.source.replaceChildren(...list(listing));
    now.listed = name;
    const [words, box] = places.source.children;
    words.textContent = word("sourceTitle", { file: `flashlayer/${listing.file}`, line: first });
    [...box.children].forEach((line, n) => {
      const on = listing.first + n >= first && listing.first + n <= last;
      line.className = on ? "line at" : "line";
      if (on) line.setAttribute("aria-current", "true");
      else line.removeAttribute("aria-current");
    });
    const at = box.children[first - listing.first];
    box.scrollTop = at.offsetTop - (box.clientHeight - at.offsetHeight) / 2;
  }

  function list({ lines, first }) {
    const made = lines.map((text, n) => {
      const [, indent, code, comment] = /^( *)(.*?)(#.*)?$/.exec(text);
      const shown = element("code", {}, code);
      if (comment) shown.append(element("span", { class: "comment" }, comment));
      const number = element("span", { class: "number" }, String(first + n));
      return element("div", { style: `--indent: ${indent.length - 4}` }, number, shown);
    });
    const labelled = { role: "region", tabindex: "0", "aria-labelledby": "stepper-source" };
    const box = element("div", { class: "source", ...labelled }, ...made);
    return [title("", { id: "stepper-source" }), box];
  }

  // --- Controls -----------------------------------------------------------------------------

  function build() {
    const options = Object.keys(presets).map((name) => element("option", { value: name }, word(name)));
    const select = element("select", { onchange: () => begin(select.value) }, ...options);
    const button = (name, sign) => {
      const attributes = { type: "button", "aria-label": word(name), title: word(name) };
      places[name] = element("button", { ...attributes, onclick: () => go(target(name)) }, sign);
      return places[name];
    };
    const named = { "aria-label": word("step"), "aria-describedby": "stepper-help" };
    const slider = element("input", { type: "range", min: 0, ...named });
    slider.addEventListener("input", () => go(Number(slider.value)));
    Object.assign(places, { select, slider });
    root.replaceChildren(
      element("div", { class: "row" }, element("label", {}, word("problem"), " ", select)),
      place("about", "p"),
      title(word("programs"), { id: "stepper-programs" }),
      place("programs", "ol", { class: "programs", "aria-labelledby": "stepper-programs" }),
      element(
        "div",
        { class: "row controls", role: "group", "aria-label": word("step") },
        button("first", "\u21e4"),
        button("tileBack", "\u00ab"),
        button("back", "\u2039"),
        button("forth", "\u203a"),
        button("tileForth", "\u00bb"),
        button("last", "\u21e5"),
        slider,
        place("count", "span", { class: "count" }),
      ),
      element("p", { id: "stepper-help", class: "help" }, word("help")),
      element(
        "div",
        { class: "told" },
        place("sentence", "p", { role: "status", "aria-live": "polite", "aria-atomic": "true" }),
        place("hand", "p", { class: "hand" }),
      ),
      element(
        "div",
        { class: "views" },
        place("matrix"),
        element(
          "div",
          {},
          title(word("formulaTitle")),
          place("formula", "div", { class: "formula" }),
          place("source"),
        ),
      ),
      element("div", { class: "tables" }, place("registers"), place("memory")),
      place("naive"),
      place("moved", "p", { class: "moved" }),
    );
    document.addEventListener("keydown", press);
    const translation = document.querySelector(".language a");
    translation?.addEventListener("click", () => (translation.hash = address()));
  }

  /* The step that a button leads to. A tile starts where it is loaded, a program at its first step. */
  function target(name) {
    const last = now.trail.length - 1;
    const starts = now.trail.flatMap(({ step, program }, at) =>
      step.kind === "load" || step === program.steps[0] ? [at] : [],
    );
    if (name === "tileBack") return starts.filter((at) => at < now.at).at(-1) ?? 0;
    if (name === "tileForth") return starts.find((at) => at > now.at) ?? last;
    return { first: 0, back: now.at - 1, forth: now.at + 1, last }[name];
  }

  const KEYS = {
    ArrowLeft: "back", ArrowRight: "forth", PageUp: "tileBack", PageDown: "tileForth", Home: "first",
    End: "last",
  };

  function press(event) {
    const focus = document.activeElement;
    const arrow = event.key.startsWith("Arrow");
    // Only arrows reach it from the page; what scrolls or opens keeps its own keys.
    const ours = root.contains(focus) || (arrow && focus === document.body);
    const taken = focus === places.select || focus.getAttribute("role") === "region";
    const modified = event.ctrlKey || event.altKey || event.metaKey || event.shiftKey;
    if (!(event.key in KEYS) || !ours || taken || modified) return;
    event.preventDefault();
    go(target(KEYS[event.key]));
  }

  function programInWords(program, number) {
    if (program.kernel === "merge_kernel") return word("merge_kernel");
    if (!program.at) return word("absent");
    const rows = span(own(program), program.at);
    if (now.preset.parts > 1) return word("partOf", { rows, part: number });
    if (now.preset.tensors.q.length > 1) return word("headRow", { row: rows, head: program.head });
    return word(program.kernel, { rows });
  }

  function begin(name, at = 0) {
    Object.assign(now, { name, preset: presets[name], trail: trailOf(presets[name]) });
    places.select.value = name;
    places.about.textContent = word(`about_${name}`);
    places.slider.max = now.trail.length - 1;
    const items = now.preset.programs.map((program, number) => {
      const words = programInWords(program, number);
      const start = now.trail.findIndex((step) => step.number === number);
      return element("li", {}, element("button", { type: "button", onclick: () => go(start) }, words));
    });
    places.programs.replaceChildren(...items);
    places.naive.replaceChildren(...naive(now.preset));
    go(at);
  }

  function go(at) {
    const last = now.trail.length - 1;
    now.at = Math.min(Math.max(at, 0), last);
    const view = replay(now.trail, now.at);
    const told = word("stepOf", { step: now.at + 1, steps: last + 1 });
    places.slider.value = now.at;
    places.slider.setAttribute("aria-valuetext", told);
    places.count.textContent = told;
    // Not `disabled`, which would take the focus away.
    const ends = { first: 0, tileBack: 0, back: 0, last, tileForth: last, forth: last };
    for (const [name, end] of Object.entries(ends)) {
      places[name].setAttribute("aria-disabled", now.at === end);
    }
    [...places.programs.children].forEach((item, number) => {
      if (number === view.number) item.firstChild.setAttribute("aria-current", "step");
      else item.firstChild.removeAttribute("aria-current");
    });
    places.sentence.textContent = sentence(view);
    places.hand.textContent = byHand(view);
    places.matrix.replaceChildren(...matrix(view));
    places.registers.replaceChildren(...registers(view));
    places.memory.replaceChildren(...memory(view));
    const half = now.preset.half && formulas[`half_${view.step.kind}`];
    places.formula.innerHTML = half || (formulas[view.step.kind] ?? "");
    source(view);
    const [loaded, stored] = view.bytes;
    const [allLoaded, allStored] = view.bytes.map((bytes, i) => bytes + view.earlier[i]);
    const elements = view.visited.map(({ rows, columns }) => rows[1] * columns[1]);
    const spared = 4 * elements.reduce((sum, size) => sum + size, 0);
    const fill = { loaded, stored, allLoaded, allStored, tiles: view.visited.length, spared };
    places.moved.textContent = word("moved", fill) + word("spared", fill);
    // Browsers refuse frequent changes of the address.
    clearTimeout(now.timer);
    now.timer = setTimeout(() => history.replaceState(null, "", address()), 300);
  }

  const address = () => `#${now.name}-${now.at + 1}`;

  build();
  const [, name, step] = /^#([a-z]+)-(\d+)$/.exec(location.hash) ?? [];
  if (name in presets) begin(name, Number(step) - 1);
  else begin(Object.keys(presets)[0]);
})();
