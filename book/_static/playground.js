/* The playground: hands the form's values to moe_course.costs.playground.answer, which runs in Pyodide, and draws what
   comes back. Nothing is computed here but positions on the screen. Values and address are one thing: what differs from
   the defaults stands after the # of the address, so a link restores everything and nothing is sent to a server. */
(() => {
  "use strict";

  const root = document.getElementById("course-playground");
  if (!root) return;
  const form = root.querySelector("form");
  const status = root.querySelector(".pg-state");
  const results = root.querySelector(".pg-results");
  const controls = [...form.querySelectorAll("[name]")];
  const sliders = [...form.querySelectorAll("[data-for]")];
  form.reset(); // some browsers restore what was typed before a reload; the address decides
  const defaults = Object.fromEntries(controls.map((control) => [control.name, control.value]));

  let ask = null; // state -> what `answer` says
  let state = {};
  let charts = null;
  let frame = 0;
  let later = 0;

  if (location.protocol === "file:") {
    return say("Opened as a file, this page cannot start Python. In the folder of the course run make serve, and open the address that it prints.");
  }
  if (root.dataset.runtime !== "yes") return;
  if (typeof WebAssembly !== "object") {
    return say("This browser has no WebAssembly, which Python needs here: try a current one.");
  }
  say("Starting Python in this page: 13 MB are read, once.");
  root.setAttribute("aria-busy", "true");
  // Pyodide waits for ever for a file that cannot be had, so what is fetched while it starts is watched.
  const plainFetch = window.fetch;
  const fault = new Promise((_, refuse) => {
    window.fetch = async (...what) => {
      try {
        const response = await plainFetch(...what);
        if (!response.ok) throw new Error(`${response.status} for ${response.url}`);
        return response;
      } catch (error) {
        refuse(error);
        throw error;
      }
    };
  });
  const started = Promise.race([start(), fault]).finally(() => (window.fetch = plainFetch));
  started.then(ready, (error) => {
    root.removeAttribute("aria-busy");
    say(`Python could not be started (${error.message || error}): reload the page, or build the book again with make book.`);
  });

  async function start() {
    const base = new URL(`${root.dataset.static}playground/`, location.href).href;
    const modules = fetch(`${base}moe_course.zip`).then((response) => {
      if (!response.ok) throw new Error(`moe_course.zip: ${response.status}`);
      return response.arrayBuffer();
    });
    const { loadPyodide } = await import(`${base}pyodide/pyodide.mjs`);
    const python = await loadPyodide({ indexURL: `${base}pyodide/` });
    python.unpackArchive(await modules, "zip", { extractDir: "/course" });
    const answer = python.runPython(`
import json, sys
sys.path.insert(0, "/course")
from moe_course.costs.playground import answer
lambda state: json.dumps(answer(json.loads(state)))
`);
    return (values) => JSON.parse(answer(JSON.stringify(values)));
  }

  function ready(answer) {
    ask = answer;
    for (const part of form.querySelectorAll("fieldset")) part.disabled = false;
    status.classList.add("visually-hidden"); // from here on for screen readers alone
    form.addEventListener("input", typed);
    form.addEventListener("change", () => remember());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.querySelector(".pg-copy").addEventListener("click", copy);
    form.querySelector(".pg-reset").addEventListener("click", () => {
      fill({});
      update({});
      remember();
    });
    addEventListener("popstate", restore);
    let width = root.clientWidth;
    new ResizeObserver(() => {
      if (charts && root.clientWidth !== width) draw(charts);
      width = root.clientWidth;
    }).observe(root);
    restore();
    root.removeAttribute("aria-busy");
    performance.mark("playground-ready"); // for benchmarks/playground.py
  }

  function say(text) {
    if (status.textContent !== text) status.textContent = text;
  }

  /* ---- State: form, address ---- */

  function read() {
    return Object.fromEntries(controls.filter((c) => c.value !== defaults[c.name]).map((c) => [c.name, c.value]));
  }

  function fill(values) {
    for (const control of controls) {
      const value = values[control.name] ?? defaults[control.name];
      const known = control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value);
      control.value = known ? value : defaults[control.name];
    }
    form.querySelector("details").open ||= ["weights", "experts_in", "cache", "arithmetic", "busy"].some((n) => n in values);
  }

  const written = () => new URLSearchParams(state).toString();

  /** On loading, back, forward, and links to a state. A link to a place of this page leaves the state alone. */
  function restore() {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) {
      if (written()) history.replaceState(null, "", `#${written()}`); // the browser has scrolled already
      else if (!charts) update({});
      return;
    }
    const values = Object.fromEntries(new URLSearchParams(text));
    fill(values);
    update(values);
  }

  /** A finished change is a step of the browser's history; a slider on its way is not. */
  function remember() {
    update(read());
    if (written() !== location.hash.slice(1)) {
      history.pushState(null, "", written() ? `#${written()}` : location.pathname + location.search);
    }
  }

  function typed(event) {
    const { target } = event;
    if (target.dataset.for) form.elements[target.dataset.for].value = String(2 ** Number(target.value));
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => update(read()));
  }

  async function copy(event) {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "The link is this page's address";
    }
    setTimeout(() => (button.textContent = "Copy the link"), 3000);
  }

  /* ---- Showing ---- */

  function update(values) {
    state = values;
    cancelAnimationFrame(frame);
    for (const part of form.querySelectorAll("[data-when]")) {
      const [name, value] = part.dataset.when.split("=");
      part.hidden = form.elements[name].value !== value;
    }
    for (const slider of sliders) {
      const value = form.elements[slider.dataset.for].value;
      slider.value = String(Math.round(Math.log2(Math.max(1, Number(value) || 1))));
      slider.setAttribute("aria-valuetext", value);
    }
    const found = ask(values);
    for (const control of controls) {
      const error = found.errors[control.name] || "";
      if (error) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
      document.getElementById(`pg-${control.name}-error`).textContent = error;
    }
    const wrong = Object.values(found.errors);
    results.classList.toggle("is-old", wrong.length > 0);
    if (!wrong.length) {
      charts = found.charts;
      show(found);
    }
    clearTimeout(later); // what is read aloud waits until the reader pauses
    later = setTimeout(() => say((wrong.length ? wrong : found.summary).join(" ")), 600);
  }

  function show(found) {
    if (!results.firstChild) {
      results.append(
        node("div", { class: "pg-summary" }),
        node("p", { class: "pg-old" }, "Not up to date: an input above needs a correction."),
        node("div", { class: "pg-charts" }),
        node("div", { class: "pg-tables" }),
      );
      results.hidden = false;
    }
    results.querySelector(".pg-summary").replaceChildren(...found.summary.map((text) => node("p", {}, text)));
    draw(found.charts);
    results.querySelector(".pg-tables").replaceChildren(...found.tables.map((t) => table(t.caption, t.head, t.rows)));
  }

  function draw({ lines, stored }) {
    const box = results.querySelector(".pg-charts");
    const open = new Set([...box.querySelectorAll("details[open]")].map((details) => details.dataset.id));
    box.replaceChildren(...lines.map((chart) => figure(chart, open.has(chart.id))), memory(stored));
  }

  function figure(chart, open) {
    const rows = chart.lines[0].map((point, i) => [
      point[0].toLocaleString("en"),
      ...chart.lines.map((line) => {
        const [, , text, bound, fits] = line[i];
        return `${text}${bound === "compute" ? ", arithmetic" : ""}${fits ? "" : ", does not fit"}`;
      }),
    ]);
    const details = node("details", { class: "pg-numbers", "data-id": chart.id }, node("summary", {}, "The numbers"));
    details.open = open;
    details.append(table(`${chart.title}, ${chart.unit}`, ["Batch", ...chart.names], rows));
    const title = node("p", { class: "pg-title" }, `${chart.title} (${chart.unit})`);
    return node("div", { class: "pg-chart", "data-chart": chart.id }, title, legend(chart), lineChart(chart), details);
  }

  function legend(chart) {
    const items = chart.names.map((name, i) => node("span", { class: `pg-key pg-line-${i}` }, `${"●◆"[i]} ${name}: ${chart.here[i][2]}`));
    const all = chart.lines.flat();
    if (all.some((point) => point[3] === "compute")) items.push(node("span", {}, "dashed: waits for arithmetic"));
    if (all.some((point) => !point[4])) items.push(node("span", {}, "thin: does not fit"));
    return node("p", { class: "pg-legend" }, ...items);
  }

  function lineChart({ lines, here, alt }) {
    const width = Math.max(260, results.clientWidth);
    const height = 260;
    const [left, right, top, bottom] = [58, 24, 10, 40];
    const points = [...lines.flat(), ...here];
    const x = scale(points.map((p) => p[0]), left, width - right);
    const y = scale(points.map((p) => p[1]), height - bottom, top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": alt });
    for (const value of decades(y.low, y.high)) {
      const at = y(value);
      picture.append(svg("line", { class: "pg-grid-line", x1: left, x2: width - right, y1: at, y2: at }), text(left - 6, at + 4, short(value), "end"));
    }
    for (let value = 1; value <= x.high * 1.001; value *= width < 480 ? 8 : 4) {
      picture.append(text(x(value), height - bottom + 18, value.toLocaleString("en")));
    }
    picture.append(text((left + width - right) / 2, height - 6, "batch (sequences at once)"));
    const now = x(here[0][0]);
    picture.append(svg("line", { class: "pg-now", x1: now, x2: now, y1: top, y2: height - bottom }));
    lines.forEach((line, i) => {
      for (let j = 1; j < line.length; j++) {
        const [a, b] = [line[j - 1], line[j]];
        const how = `${a[3] === "compute" ? " pg-compute" : ""}${b[4] ? "" : " pg-no-room"}`;
        picture.append(svg("line", { class: `pg-line pg-line-${i}${how}`, x1: x(a[0]), y1: y(a[1]), x2: x(b[0]), y2: y(b[1]) }));
      }
      const at = [now, y(here[i][1])];
      picture.append(
        i
          ? svg("path", { class: `pg-dot pg-line-${i}`, d: `M${at[0]} ${at[1] - 7}l7 7l-7 7l-7 -7z` })
          : svg("circle", { class: `pg-dot pg-line-${i}`, cx: at[0], cy: at[1], r: 5.5 }),
      );
    });
    return picture;
  }

  function memory(stored) {
    const width = Math.max(260, results.clientWidth);
    const height = stored.bars.length * 58 + 30;
    const most = Math.max(stored.room, ...stored.bars.map((bar) => bar.parts.reduce((sum, part) => sum + part[1], 0)));
    const long = (value) => (value / most) * (width - 4);
    const words = stored.bars.map((bar) => `${bar.name}: ${bar.parts.map(([name, , size]) => `${name} ${size}`).join(", ")}`);
    const alt = `${stored.title}. ${words.join("; ")}; ${stored.room_text}.`;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": alt });
    stored.bars.forEach((bar, i) => {
      picture.append(text(2, i * 58 + 16, words[i], "start"));
      let from = 2;
      bar.parts.forEach(([, value], j) => {
        picture.append(svg("rect", { class: `pg-bar pg-line-${i}${j ? " pg-cache" : ""}`, x: from, y: i * 58 + 24, width: long(value), height: 24 }));
        from += long(value);
      });
    });
    const room = 2 + long(stored.room);
    picture.append(svg("line", { class: "pg-now", x1: room, x2: room, y1: 20, y2: height - 22 }));
    const side = room > width / 2 ? "end" : "start";
    picture.append(text(room, height - 6, stored.room_text, side));
    const title = node("p", { class: "pg-title" }, `${stored.title} (solid: weights; pale: KV cache)`);
    return node("div", { class: "pg-chart", "data-chart": stored.id }, title, picture);
  }

  /** A logarithmic scale from the range of `values` to the pixels from..to. */
  function scale(values, from, to) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low / 2, high * 2];
    const place = (value) => from + (Math.log(value / low) / Math.log(high / low)) * (to - from);
    return Object.assign(place, { low, high });
  }

  /** Round numbers for an axis: powers of ten, with 2 and 5 between them where there are few. */
  function decades(low, high) {
    const steps = high / low < 1000 ? [1, 2, 5] : [1];
    const every = Math.ceil(Math.log10(high / low) / 6);
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every) continue;
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found;
  }

  function short(value) {
    return value >= 1e6 ? value.toExponential(0).replace("e+", "e") : value >= 1 ? value.toLocaleString("en") : String(Number(value.toPrecision(1)));
  }

  function table(caption, head, rows) {
    const cells = (row) => row.map((cell, i) => node(i ? "td" : "th", i ? {} : { scope: "row" }, cell));
    const top = head.map((cell, i) => (cell ? node("th", { scope: "col" }, cell) : node("td", {}, cell)));
    const whole = node(
      "table",
      { class: "table" },
      node("caption", {}, caption),
      node("thead", {}, node("tr", {}, ...top)),
      node("tbody", {}, ...rows.map((row) => node("tr", {}, ...cells(row)))),
    );
    return node("div", { class: "pg-scroll", tabindex: "0", role: "region", "aria-label": caption }, whole);
  }

  function node(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function svg(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function text(x, y, words, anchor = "middle") {
    const made = svg("text", { x, y, "text-anchor": anchor });
    made.textContent = words;
    return made;
  }
})();
