"use strict";

/* The stepper: replays what docs/stepper.py recorded (record.js) in the words of words.js. Nothing of
   attention is computed here: every number shown was read from a running kernel. */
(() => {
  const root = document.querySelector(".stepper");
  const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
  const { presets, sources, formulas } = STEPPER_RECORD;
  const TILE_KINDS = ["load", "scores", "mask", "p", "rebuild", "dp", "ds"];
  const REGISTERS = ["m", "rescale", "l", "acc", "delta", "dq", "dk", "dv"];
  const STORED = { out: ["out"], lse: ["lse"], delta: ["delta"], dk_out: ["dk"], dv_out: ["dv"], dq_out: ["dq"], parts_out: ["out"], parts_lse: ["lse"] };
  const SYMBOLS = { m: "m", rescale: "α", l: "l", acc: "acc", out: "o", lse: "LSE", delta: "δ", dq: "dQ", dk: "dK", dv: "dV" };

  const now = { preset: "full", at: 0, trail: [] };

  function word(name, fill = {}) {
    return STEPPER_WORDS[name][language].replace(/\{(\w+)\}/g, (_, field) => fill[field]);
  }

  /* A number of the record, which writes inf and nan as strings. */
  function show(x, digits) {
    const number = Number(x === "inf" ? Infinity : x === "-inf" ? -Infinity : x);
    if (Number.isNaN(number)) return "NaN";
    if (!Number.isFinite(number)) return number > 0 ? "inf" : "-inf";
    const size = Math.abs(number);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
      return number.toExponential(digits > 3 ? 2 : 0).replace("e+", "e");
    }
    return String(Number(number.toPrecision(digits)));
  }

  /* "0-3" of a first number and a count. */
  function span([first, count]) {
    if (count < 1) return "-";
    return count === 1 ? String(first) : `${first}\u2013${first + count - 1}`;
  }

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, content] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), content);
      else made.setAttribute(name, content);
    }
    made.append(...children);
    return made;
  }

  const heading = (words, attributes = {}) => element("th", { scope: "col", ...attributes }, words);
  const rowHeading = (words, attributes = {}) => element("th", { scope: "row", ...attributes }, words);
  const hidden = (words) => element("span", { class: "unseen" }, words);

  /* A table that scrolls in itself, also by the keyboard. */
  function table(name, caption, heads, rows) {
    const id = `stepper-${name}`;
    const made = element(
      "table",
      { "aria-labelledby": id },
      element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...rows),
    );
    const scrolls = { class: "scroll", role: "region", tabindex: "0", "aria-labelledby": id };
    return [element("p", { id, class: "caption" }, caption), element("div", scrolls, made)];
  }

  // --- The record, step by step -------------------------------------------------------------

  /* Every step of a preset in order, with its program; a tile starts at `load`. */
  function trailOf(preset) {
    return presets[preset].programs.flatMap((program, number) =>
      program.steps.map((step) => ({ program, number, step })),
    );
  }

  /* What the page shows after a step: all steps up to it, replayed. */
  function replay(trail, at) {
    const view = { memory: {}, visited: [], moved: [0, 0], tiles: 0, spared: 0 };
    for (const { program, number, step } of trail.slice(0, at + 1)) {
      if (number !== view.number) {
        if (view.bytes) view.moved = view.moved.map((sum, i) => sum + view.bytes[i]);
        Object.assign(view, { number, program, registers: {}, tile: null, ranges: null, before: [0, 0] });
      }
      view.before = view.bytes && view.step && view.number === number ? view.bytes : [0, 0];
      Object.assign(view, { step, bytes: step.bytes, changed: {} });
      if (step.ranges) view.ranges = step.ranges;
      if (step.kind === "load") {
        const transposed = program.kernel === "dkdv_kernel";
        const [rows, columns] = transposed ? [step.at, program.at] : [program.at, step.at];
        view.tile = { rows, columns, head: step.head, range: step.range };
        view.visited.push(view.tile);
        view.tiles += 1;
        view.spared += 4 * rows[1] * columns[1];
      }
      if (view.tile && TILE_KINDS.includes(step.kind)) {
        view.tile.kind = step.kind;
        if (step.tile) view.tile.numbers = step.tile;
        if (step.visible) view.tile.visible = step.visible;
      }
      for (const name of REGISTERS) {
        if (step[name] === undefined) continue;
        view.changed[name] = view.registers[name] ?? null;
        view.registers[name] = step[name];
      }
      for (const name of STORED[step.kind] ?? []) {
        const [first] = program.at ?? [0];
        step[name].forEach((numbers, i) => {
          const merged = program.kernel === "update";
          const place = merged ? "update" : [program.head, first + i, program.base?.[1]].join();
          view.memory[name] ??= {};
          view.memory[name][place] = { numbers, head: program.head, row: first + i, part: merged ? null : program.base };
        });
      }
    }
    return view;
  }

  // --- The step in words --------------------------------------------------------------------

  function rowsWhere(test, at) {
    const rows = Array.from({ length: at[1] }, (_, i) => i).filter(test);
    const queries = rows.map((i) => at[0] + i).join(", ");
    return `${word("query")} ${queries}`;
  }

  function some(test, at) {
    return Array.from({ length: at[1] }, (_, i) => i).some(test);
  }

  function sentence(view) {
    const { step, program, changed, registers } = view;
    const fill = { rows: program.at ? span(program.at) : "" };
    const transposed = program.kernel === "dkdv_kernel";
    if (step.kind === "ranges") {
      const base = program.base[transposed ? 0 : 1];
      const spans = step.ranges.filter(([start, stop]) => stop > start);
      if (spans.length === 0) return word("rangesNone", fill);
      const start = Math.min(...spans.map((s) => s[0])), stop = Math.max(...spans.map((s) => s[1]));
      const [fullStart, fullStop] = step.ranges[1];
      fill.keys = span([base + start, stop - start]);
      fill.skipped = stop - start < total(view, transposed) ? word("skippedKeys") : "";
      const full = { full: span([base + fullStart, fullStop - fullStart]) };
      fill.full = fullStop > fullStart ? word("fullKeys", full) : "";
      return word(transposed ? "rangesQueries" : "ranges", fill);
    }
    if (step.kind === "load") {
      if (step.at[1] === 0) return word("loadEmpty");
      fill.tile = span(step.at);
      fill.bytes = step.bytes[0] - view.before[0];
      fill.range = word(step.range === "full" ? "whole" : "edge");
      return word(transposed ? "loadQueries" : "load", fill);
    }
    if (step.visible || step.kind === "rebuild") {
      const pairs = (step.visible ?? step.tile).flat();
      Object.assign(fill, { pairs: pairs.length, hidden: step.visible ? pairs.filter((x) => !x).length : 0 });
    }
    if (step.kind === "max") {
      const first = (i) => changed.m[i] < -1e30 && registers.m[i] > -1e30;
      const rises = (i) => registers.m[i] > changed.m[i];
      if (some(first, program.at)) fill.changed = word("maxFirst", { rows: rowsWhere(first, program.at) });
      else if (some(rises, program.at)) fill.changed = word("maxRises", { rows: rowsWhere(rises, program.at) });
      else fill.changed = word("maxStays");
    }
    if (step.kind === "rescale") {
      const below = (i) => step.rescale[i] < 1;
      if (registers.l.flat().every((x) => x === 0)) fill.changed = word("rescaleFirst");
      else if (some(below, program.at)) fill.changed = word("rescaleSome", { rows: rowsWhere(below, program.at) });
      else fill.changed = word("rescaleNone");
    }
    if (step.kind === "out") fill.unseen = registers.l.flat().includes(0) ? word("outUnseen") : "";
    return word(step.kind, fill);
  }

  /* Queries or keys of the call. */
  function total(view, queries) {
    return presets[now.preset].tensors[queries ? "q" : "k"][0].length;
  }

  // --- Pieces of the page -------------------------------------------------------------------

  function matrix(view) {
    const { tensors, programs } = presets[now.preset];
    const { program, tile } = view;
    const head = tile?.head ?? program.head ?? 0;
    const queries = tensors.q[0].length, keys = tensors.k[0].length;
    const inside = ([first, count], i) => i >= first && i < first + count;
    const transposed = program.kernel === "dkdv_kernel";
    const owns = (side, i) => program.at && program.kernel !== "update" && (side === "k") === transposed && inside(program.at, i);
    const heads = [element("td", { class: "corner" }), ...Array.from({ length: keys }, (_, j) => heading(`k${j}`, owns("k", j) ? { class: "own" } : {}))];
    const rows = Array.from({ length: queries }, (_, i) => {
      const cells = Array.from({ length: keys }, (_, j) => cell(view, head, i, j));
      return element("tr", {}, rowHeading(`q${i}`, owns("q", i) ? { class: "own" } : {}), ...cells);
    });
    const what = tile ? word(`holds_${{ mask: "scores" }[tile.kind] ?? tile.kind}`) : "";
    const legend = ["Now", "Hidden", "Past", "Skipped"].map((name) =>
      element("span", {}, element("i", { class: name.toLowerCase(), "aria-hidden": "true" }), word(`legend${name}`)),
    );
    const said = element("p", { class: "holds" }, tile ? word("tileHolds", { what }) : "\u00a0");
    return [...table("matrix", word("matrix", { head }), heads, rows), said, element("p", { class: "legend" }, ...legend)];
  }

  function cell(view, head, i, j) {
    const { tile, program, ranges } = view;
    const inside = ([first, count], x) => x >= first && x < first + count;
    if (tile && inside(tile.rows, i) && inside(tile.columns, j)) {
      const [row, column] = [i - tile.rows[0], j - tile.columns[0]];
      const edges = [row === 0 && "top", row === tile.rows[1] - 1 && "bottom", column === 0 && "left", column === tile.columns[1] - 1 && "right"];
      const masked = tile.visible && !tile.visible[row][column];
      const names = ["now", ...edges.filter(Boolean), masked ? "hidden" : ""].join(" ").trim();
      const number = tile.numbers?.[row][column];
      const attributes = { class: names };
      if (["p", "rebuild"].includes(tile.kind)) attributes.style = `--part: ${Math.round(100 * Math.min(number, 1))}%`;
      return element("td", attributes, number === undefined ? "" : show(number, 3));
    }
    const visits = (t) => t.head === head && inside(t.rows, i) && inside(t.columns, j);
    if (view.visited.some(visits)) return element("td", { class: "past" }, hidden(word("cellPast")));
    const transposed = program.kernel === "dkdv_kernel";
    if (ranges && inside(program.at, transposed ? j : i)) {
      const base = program.base[transposed ? 0 : 1];
      const x = (transposed ? i : j) - base;
      if (!ranges.some(([start, stop]) => x >= start && x < stop)) {
        return element("td", { class: "skipped" }, hidden(word("cellSkipped")));
      }
    }
    return element("td", {});
  }

  /* Numbers of one row: a scalar, or one a column. */
  function numberCells(numbers, attributes, before) {
    return [numbers].flat().map((x, d) => {
      const old = before === undefined || before === null ? undefined : [before].flat()[d];
      const made = element("td", attributes, show(x, 5));
      if (old !== undefined && old !== x) made.append(element("small", {}, word("was", { number: show(old, 4) })));
      return made;
    });
  }

  function columns(name, numbers) {
    const count = [numbers].flat().length;
    return heading(SYMBOLS[name], count > 1 ? { colspan: count } : {});
  }

  function registers(view) {
    const { program, step } = view;
    const names = REGISTERS.filter((name) => view.registers[name] !== undefined);
    if (program.kernel === "update") return merged(view);
    if (names.length === 0) return [element("p", { class: "caption" }, word("registers")), element("p", {}, word("noRegisters"))];
    const ofKeys = program.kernel === "dkdv_kernel";
    const rows = Array.from({ length: program.at[1] }, (_, i) => {
      const cells = names.flatMap((name) => {
        const attributes = name in view.changed ? { class: "changed" } : {};
        return numberCells(view.registers[name][i], attributes, view.changed[name]?.[i]);
      });
      return element("tr", {}, rowHeading(`${ofKeys ? "k" : "q"}${program.at[0] + i}`), ...cells);
    });
    const heads = [element("td", { class: "corner" }), ...names.map((name) => columns(name, view.registers[name][0]))];
    return table("registers", word("registers"), heads, rows);
  }

  /* The merge of the parts, whose state has one row. */
  function merged(view) {
    const steps = presets[now.preset].programs[view.number].steps;
    const done = steps.slice(0, steps.indexOf(view.step) + 1);
    const weights = done.find((step) => step.weights)?.weights;
    const rows = steps[0].parts.map((lse, part) => {
      const cells = [element("td", {}, show(lse, 5))];
      if (weights) cells.push(element("td", view.step.weights ? { class: "changed" } : {}, show(weights[part], 5)));
      return element("tr", {}, rowHeading(`${word("part")} ${part}`), ...cells);
    });
    const heads = [element("td", { class: "corner" }), heading("LSE"), ...(weights ? [heading("w")] : [])];
    const names = REGISTERS.filter((name) => view.registers[name] !== undefined);
    const cells = names.flatMap((name) => numberCells(view.registers[name][0], name in view.changed ? { class: "changed" } : {}));
    const state = table("state", word("update"), names.map((name) => columns(name, view.registers[name][0])), [element("tr", {}, ...cells)]);
    return [...table("registers", word("registers"), heads, rows), ...state];
  }

  function memory(view) {
    const names = Object.keys(SYMBOLS).filter((name) => view.memory[name]);
    if (names.length === 0) return [element("p", { class: "caption" }, word("memory")), element("p", {}, word("nothingWritten"))];
    const heads = presets[now.preset].tensors.q.length;
    const groups = [names.filter((name) => !["dk", "dv"].includes(name)), names.filter((name) => ["dk", "dv"].includes(name))];
    return groups.filter((group) => group.length).flatMap((group, n) => {
      const places = [...new Set(group.flatMap((name) => Object.keys(view.memory[name])))];
      const order = (p) => Object.assign({ row: 0, head: 0 }, group.map((name) => view.memory[name][p]).find(Boolean));
      const parts = presets[now.preset].programs.some((p) => p.kernel === "update");
      places.sort((a, b) => order(a).head - order(b).head || order(a).row - order(b).row);
      const rows = places.map((place) => {
        const { row, head, part } = order(place);
        let words = `${group.includes("dk") || group.includes("dv") ? "k" : "q"}${row}`;
        if (heads > 1) words = word("headRow", { head, row: words });
        if (parts) words = part ? `${word("part")} ${Math.round(part[1] / 8)}` : word("update");
        const cells = group.flatMap((name) => {
          const found = view.memory[name][place];
          const width = [Object.values(view.memory[name])[0].numbers].flat().length;
          const fresh = found && view.step[name] !== undefined && STORED[view.step.kind]?.includes(name) && (view.program.kernel === "update" ? !part : inProgram(view, row, head, part));
          return found ? numberCells(found.numbers, fresh ? { class: "changed" } : {}) : Array.from({ length: width }, () => element("td", {}));
        });
        return element("tr", {}, rowHeading(words), ...cells);
      });
      const heads_ = [element("td", { class: "corner" }), ...group.map((name) => columns(name, Object.values(view.memory[name])[0].numbers))];
      return table(`memory-${n}`, n === 0 ? word("memory") : "\u00a0", heads_, rows);
    });
  }

  function inProgram({ program }, row, head, part) {
    const [first, count] = program.at;
    return head === program.head && row >= first && row < first + count && String(part) === String(program.base);
  }

  function naive() {
    const { naive: found, tensors } = presets[now.preset];
    if (!found) return [];
    const keys = tensors.k[0].length;
    const mark = (x) => (["inf", "nan"].includes(x) ? { class: "broken" } : {});
    const heads = [element("td", { class: "corner" }), ...Array.from({ length: keys }, (_, j) => heading(`exp k${j}`)), heading("Σ"), heading(word("output"), { colspan: 2 })];
    const rows = found.exp.map((exps, i) => {
      const cells = [...exps, found.sum[i], ...found.out[i]].map((x) => element("td", mark(x), show(x, 3)));
      return element("tr", {}, rowHeading(`q${i}`), ...cells);
    });
    return table("naive", word("naive"), heads, rows);
  }

  function source(view) {
    const [name, first, last] = view.step.lines;
    const listing = sources[name];
    const lines = listing.lines.map((text, i) => {
      const number = listing.first + i;
      const indent = text.length - text.trimStart().length;
      const [, code, comment] = /^(.*?)(#.*)?$/.exec(text.trim());
      const on = number >= first && number <= last;
      const attributes = { class: on ? "line at" : "line", style: `--indent: ${Math.max(indent - 4, 0)}` };
      if (on) attributes["aria-current"] = "true";
      const made = element("div", attributes, element("span", { class: "number", "aria-hidden": "true" }, String(number)), element("code", {}, code));
      if (comment) made.lastChild.append(element("span", { class: "comment" }, comment));
      return made;
    });
    const title = element("p", { id: "stepper-source", class: "caption" }, word("sourceTitle", { file: `flashlayer/${listing.file}`, line: first }));
    const box = element("div", { class: "source", role: "region", tabindex: "0", "aria-labelledby": "stepper-source" }, ...lines);
    places.source.replaceChildren(title, box);
    const at = box.querySelector(".at");
    box.scrollTop = at.offsetTop - box.clientHeight / 2;
  }

  // --- Controls -----------------------------------------------------------------------------

  const places = {};
  function place(name, tag = "div", attributes = {}) {
    places[name] = element(tag, attributes);
    return places[name];
  }

  function build() {
    const option = (name) => element("option", { value: name }, word(name));
    const select = element("select", { onchange: () => begin(select.value) }, ...Object.keys(presets).map(option));
    places.select = select;
    const button = (name, sign, act) =>
      (places[name] = element("button", { type: "button", "aria-label": word(name), title: word(name), onclick: act }, sign));
    const slider = element("input", { type: "range", min: 0, "aria-label": word("step"), "aria-describedby": "stepper-help" });
    slider.addEventListener("input", () => go(Number(slider.value)));
    places.slider = slider;
    root.replaceChildren(
      element("div", { class: "row" }, element("label", {}, word("problem"), " ", select)),
      place("about", "p", { class: "about" }),
      element("p", { id: "stepper-programs", class: "caption" }, word("programs")),
      place("programs", "ol", { class: "programs", "aria-labelledby": "stepper-programs" }),
      element(
        "div",
        { class: "row controls" },
        button("first", "\u21e4", () => go(0)),
        button("tileBack", "\u00ab", () => go(tileStep(-1))),
        button("back", "\u2039", () => go(now.at - 1)),
        button("forth", "\u203a", () => go(now.at + 1)),
        button("tileForth", "\u00bb", () => go(tileStep(1))),
        button("last", "\u21e5", () => go(now.trail.length - 1)),
        slider,
        place("count", "span", { class: "count" }),
      ),
      element("p", { id: "stepper-help", class: "help" }, word("help")),
      place("sentence", "p", { role: "status", "aria-live": "polite", "aria-atomic": "true", class: "sentence" }),
      element("div", { class: "views" }, place("matrix"), element("div", { class: "beside" }, place("formula"), place("source"))),
      element("div", { class: "views" }, place("registers"), place("memory")),
      place("naive"),
      place("moved", "p", { class: "moved" }),
    );
    document.addEventListener("keydown", key);
  }

  /* The step where the tile before or after this one starts, or a program without tiles. */
  function tileStep(direction) {
    const starts = now.trail.flatMap(({ step, program }, i) => (step.kind === "load" || step === program.steps[0] ? [i] : []));
    const beyond = starts.filter((i) => (direction > 0 ? i > now.at : i < now.at));
    if (direction > 0) return beyond[0] ?? now.trail.length - 1;
    return beyond.at(-1) ?? 0;
  }

  function key(event) {
    const focus = document.activeElement;
    const elsewhere = focus !== document.body && !root.contains(focus);
    const moves = { ArrowRight: now.at + 1, ArrowLeft: now.at - 1, PageDown: tileStep(1), PageUp: tileStep(-1), Home: 0, End: now.trail.length - 1 };
    const scrolls = focus.getAttribute("role") === "region" || focus.tagName === "SELECT";
    const modified = event.ctrlKey || event.altKey || event.metaKey || event.shiftKey;
    // Paging and Home belong to the page unless a control of the stepper has the focus.
    const arrows = event.key === "ArrowRight" || event.key === "ArrowLeft";
    if (!(event.key in moves) || modified || elsewhere || scrolls || (!arrows && focus === document.body)) return;
    event.preventDefault();
    go(moves[event.key]);
  }

  function begin(preset, at = 0) {
    Object.assign(now, { preset, trail: trailOf(preset) });
    places.select.value = preset;
    places.about.textContent = word(`about_${preset}`);
    places.slider.max = now.trail.length - 1;
    const heads = presets[preset].tensors.q.length;
    const items = presets[preset].programs.map((program, number) => {
      let words = program.at ? word(program.kernel, { rows: span(program.at) }) : word(program.kernel === "update" ? "update" : "absent");
      if (heads > 1) words = word("headed", { rows: words, head: program.head });
      const start = now.trail.findIndex((step) => step.number === number);
      return element("li", {}, element("button", { type: "button", onclick: () => go(start) }, words));
    });
    places.programs.replaceChildren(...items);
    places.naive.replaceChildren(...naive());
    go(at);
  }

  function go(at) {
    now.at = Math.min(Math.max(at, 0), now.trail.length - 1);
    const view = replay(now.trail, now.at);
    const told = { step: now.at + 1, steps: now.trail.length };
    places.slider.value = now.at;
    places.slider.setAttribute("aria-valuetext", word("stepOf", told));
    places.count.textContent = word("stepOf", told);
    for (const name of ["first", "tileBack", "back"]) places[name].setAttribute("aria-disabled", now.at === 0);
    for (const name of ["last", "tileForth", "forth"]) places[name].setAttribute("aria-disabled", now.at === now.trail.length - 1);
    [...places.programs.children].forEach((item, number) => {
      if (number === view.number) item.firstChild.setAttribute("aria-current", "step");
      else item.firstChild.removeAttribute("aria-current");
    });
    places.sentence.textContent = sentence(view);
    places.matrix.replaceChildren(...matrix(view));
    places.registers.replaceChildren(...registers(view));
    places.memory.replaceChildren(...memory(view));
    const formula = element("div", { class: "formula" });
    formula.innerHTML = formulas[view.step.kind] ?? "";
    places.formula.replaceChildren(element("p", { class: "caption" }, word("formulaTitle")), formula);
    source(view);
    const all = view.moved.map((sum, i) => sum + view.bytes[i]);
    places.moved.textContent = word("moved", { loaded: view.bytes[0], stored: view.bytes[1], allLoaded: all[0], allStored: all[1], tiles: view.tiles, spared: view.spared });
    history.replaceState(null, "", `#${now.preset}-${now.at + 1}`);
  }

  build();
  const [, preset, step] = /^#(\w+)-(\d+)$/.exec(location.hash) ?? [];
  if (preset in presets) begin(preset, Number(step) - 1);
  else begin("full");
})();
