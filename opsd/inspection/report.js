"use strict";
// Texts of completions go into the page as text nodes alone: no HTML is ever made of them.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function short(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
}

const percent = (log) => {
  const share = 100 * Math.exp(log);
  return share >= 99.95 ? "100 %" : share >= 0.1 ? share.toFixed(1) + " %" : share >= 1e-3 ? share.toFixed(3) + " %" : "≈ 0 %";
};

// Completions

const view = { mode: "divergence", problem: 0, steps: new Map(), shown: null };

function valueOf(completion, i) {
  if (view.mode === "clip") return completion.clipped[i];
  if (view.mode === "difference") return Math.exp(completion.teacher[i]) - Math.exp(completion.student[i]);
  return completion.divergence[i];
}

function strength(value) {
  const most = view.mode === "divergence" ? data.scale : 1;
  return Math.sqrt(Math.min(1, Math.abs(value) / most));
}

function paint(node, completion, i) {
  const value = valueOf(completion, i);
  node.style.setProperty("--a", strength(value).toFixed(3));
  node.classList.toggle("less", value < 0);
  node.classList.toggle("turned", Boolean(completion.wrong[i]));
}

function legend() {
  const chip = (text, a, name = "") => {
    const node = make("span", { class: "t " + name, text });
    node.style.setProperty("--a", a);
    return node;
  };
  const box = byId("legend");
  box.className = "legend by-" + view.mode;
  if (view.mode === "divergence")
    box.replaceChildren("nats in the loss:", chip("0", 0), chip(short(data.scale / 4), 0.5), chip(short(data.scale) + " and more", 1), chip("below 0", 0.7, "less"));
  else if (view.mode === "clip")
    box.replaceChildren("share of the token's divergence that the clip cuts:", chip("0", 0), chip("25 %", 0.5), chip("100 %", 1), chip("turned the wrong way", 0.3, "turned"));
  else
    box.replaceChildren("probability of the token:", chip("teacher less", 1, "less"), chip("equal", 0), chip("teacher more", 1));
}

function tokenList(completion, label) {
  const list = make("div", { class: "tokens by-" + view.mode, role: "listbox", "aria-label": label, dir: "auto" });
  completion.tokens.forEach((token, i) => {
    const node = make("span", { class: "t", role: "option", tabindex: i ? -1 : 0, "data-i": i, text: data.vocabulary[token][1] });
    paint(node, completion, i);
    list.append(node);
  });
  list.completion = completion;
  if (completion.total > completion.tokens.length)
    list.append(make("i", { text: ` … the first ${short(completion.tokens.length)} of ${short(completion.total)} tokens` }));
  return list;
}

function pane(run, which, completions) {
  const key = `${run} ${which}`;
  const wanted = view.steps.get(key);
  const completion = completions.find((c) => c.step === wanted) || (which ? completions[completions.length - 1] : completions[0]);
  const box = make("section", { class: `pane run run${run}`, "aria-label": `${which ? "late" : "early"} completion` });
  const select = make("select", { "aria-label": `step of the ${which ? "late" : "early"} completion` });
  for (const c of completions) select.append(new Option(`step ${c.step}`, c.step, false, c === completion));
  select.addEventListener("change", () => { view.steps.set(key, Number(select.value)); box.replaceWith(pane(run, which, completions)); });
  const verdict = completion.correct === null ? "not graded" : completion.correct ? "✓ right" : "✗ wrong";
  const style = completion.correct === null ? "" : completion.correct ? "right" : "wrong";
  const about = `${short(completion.total)} tokens${completion.truncated ? ", cut off" : ""}, ${short(completion.mean)} nats per token`;
  const name = data.runs.length > 1 ? [make("b", { dir: "auto", text: data.runs[run] })] : [];
  box.append(
    make("header", {}, ...name, make("b", { text: which ? "Late" : "Early" }), select, make("span", { class: "verdict " + style, text: verdict }), make("span", { class: "small", text: about })),
    tokenList(completion, `tokens, step ${completion.step}`),
  );
  return box;
}

function showProblem() {
  hide();
  const problem = data.problems[view.problem];
  byId("problem-text").textContent = problem.problem;
  byId("reference-text").textContent = problem.reference || "none";
  byId("answer-text").textContent = problem.answer ? `Answer: ${problem.answer}` : "";
  byId("student-prompt").textContent = problem.studentPrompt;
  byId("teacher-prompt").textContent = problem.teacherPrompt;
  const panes = [];
  data.runs.forEach((name, run) => {
    const completions = problem.completions.map((i) => data.completions[i]).filter((c) => c.run === run);
    if (completions.length) panes.push(pane(run, 0, completions));
    else panes.push(make("p", { class: `pane run run${run}`, text: `${name} has saved no completion of this problem.` }));
    if (completions.length > 1) panes.push(pane(run, 1, completions));
  });
  byId("panes").replaceChildren(...panes);
  legend();
}

// Both roles' most probable tokens

const tip = byId("tip");

function tokenText(number) {
  return make("bdi", { text: data.vocabulary[number][0] });
}

function fillTip(completion, i) {
  const token = completion.tokens[i];
  const facts = [`token ${i + 1}`, `divergence ${short(completion.divergence[i])} nats`];
  const kind = data.kinds[completion.kinds[i]];
  if (kind && kind !== "other") facts.push(kind);
  if (completion.epistemic[i]) facts.push("epistemic");
  if (completion.clipped[i]) facts.push(`clip cuts ${short(100 * completion.clipped[i])} %`);
  if (completion.wrong[i]) facts.push("turned the wrong way");
  const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", { colspan: 2, text: "Student" }), make("th", { colspan: 2, text: "Teacher" }))));
  const body = make("tbody");
  const size = completion.studentTop.length / completion.tokens.length;
  for (let k = 0; k < size; k++) {
    const cell = (tops, logs) => {
      const j = i * size + k;
      return [make("td", {}, make("code", { class: "token" + (tops[j] === token ? " same" : "") }, tokenText(tops[j]))), make("td", { class: "n", text: percent(logs[j]) })];
    };
    body.append(make("tr", {}, ...cell(completion.studentTop, completion.studentTopLog), ...cell(completion.teacherTop, completion.teacherTopLog)));
  }
  body.append(make("tr", {}, make("td", { colspan: 2, text: `this one: ${percent(completion.student[i])}` }), make("td", { colspan: 2, text: `this one: ${percent(completion.teacher[i])}` })));
  body.append(make("tr", {}, make("td", { colspan: 2, text: `entropy: ${short(completion.studentEntropy[i])}` }), make("td", { colspan: 2, text: `entropy: ${short(completion.teacherEntropy[i])}` })));
  table.append(body);
  tip.replaceChildren(make("div", {}, make("code", { class: "token same" }, tokenText(token))), make("div", { text: facts.join(" · ") }), table);
}

function place() {
  if (!view.shown) return;
  const rect = view.shown.getClientRects()[0] || view.shown.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = Math.max(8, Math.min(rect.left, document.documentElement.clientWidth - width - 8)) + "px";
  const below = rect.bottom + 8;
  tip.style.top = (below + height < innerHeight || rect.top < height + 8 ? Math.max(8, Math.min(below, innerHeight - height - 8)) : rect.top - height - 8) + "px";
}

function show(node) {
  if (view.shown !== node) hide();
  view.shown = node;
  node.classList.add("shown");
  node.setAttribute("aria-describedby", "tip");
  fillTip(node.parentNode.completion, Number(node.dataset.i));
  tip.hidden = false;
  place();
}

function hide() {
  tip.hidden = true;
  if (view.shown) {
    view.shown.classList.remove("shown");
    view.shown.removeAttribute("aria-describedby");
    view.shown = null;
  }
}

function setUpCompletions() {
  const select = byId("problem"), panes = byId("panes");
  data.problems.forEach((problem, i) => {
    const again = problem.occurrence ? ` (${problem.occurrence + 1})` : "";
    const text = problem.problem.replace(/\s+/g, " ");
    select.append(new Option(`${i + 1}: ${text.length > 80 ? text.slice(0, 80) + "…" : text}${again}`, i));
  });
  select.addEventListener("change", () => { view.problem = Number(select.value); view.steps.clear(); showProblem(); });
  byId("modes").addEventListener("change", (event) => {
    view.mode = event.target.value;
    for (const list of panes.querySelectorAll(".tokens")) {
      list.className = "tokens by-" + view.mode;
      for (const node of list.querySelectorAll(".t")) paint(node, list.completion, Number(node.dataset.i));
    }
    legend();
  });
  const token = (event) => event.target.closest && event.target.closest(".t[data-i]");
  panes.addEventListener("pointerover", (event) => { const node = token(event); if (node && event.pointerType === "mouse") show(node); });
  panes.addEventListener("pointerout", (event) => { if (token(event) && event.pointerType === "mouse") hide(); });
  panes.addEventListener("focusin", (event) => { const node = token(event); if (node) show(node); });
  panes.addEventListener("focusout", (event) => { if (token(event)) hide(); });
  panes.addEventListener("click", (event) => { const node = token(event); if (node) { select1(node); show(node); } });
  panes.addEventListener("keydown", (event) => {
    const node = token(event);
    if (!node) return;
    const all = node.parentNode.querySelectorAll(".t");
    const to = { ArrowRight: node.nextElementSibling, ArrowDown: node.nextElementSibling, ArrowLeft: node.previousElementSibling, ArrowUp: node.previousElementSibling, Home: all[0], End: all[all.length - 1] }[event.key];
    if (event.key === "Escape") hide();
    if (to && to.classList.contains("t")) { event.preventDefault(); select1(to); }
  });
  addEventListener("scroll", place, { passive: true, capture: true });
  addEventListener("resize", place);
  document.addEventListener("click", (event) => { if (!token(event)) hide(); });
  showProblem();
}

// One token of a list is in the order of the tab key
function select1(node) {
  for (const other of node.parentNode.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", -1);
  node.setAttribute("tabindex", 0);
  node.focus({ preventScroll: false });
}

// Curves

const SVG = "http://www.w3.org/2000/svg";
const W = 320, H = 150, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((f) => f * power >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function plot(box) {
  const name = box.dataset.metric, parts = data.curves[name];
  const all = parts.flatMap((part) => [...part.train, ...part.eval]);
  let [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  let [y0, y1] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { const d = Math.abs(y0) || 1; y0 -= d / 2; y1 += d / 2; }
  const pad = (y1 - y0) * 0.05;
  y0 -= pad; y1 += pad;
  const x = (v) => LEFT + ((v - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (v - y0) / (y1 - y0)) * (H - TOP - BOTTOM);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": `${name} over steps; arrow keys read the values` });
  for (const v of ticks(y0, y1, 4)) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v) }));
    svg.append(draw("text", { x: LEFT - 5, y: y(v) + 3, "text-anchor": "end" }, short(v)));
  }
  for (const v of ticks(x0, x1, 4).filter(Number.isInteger))
    svg.append(draw("text", { x: x(v), y: H - 6, "text-anchor": "middle" }, short(v)));
  parts.forEach((part, run) => {
    for (const [kind, points] of Object.entries(part)) {
      if (points.length > 1) svg.append(draw("polyline", { class: `curve run run${run}`, points: points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") }));
      if (kind === "eval" || points.length === 1)
        for (const p of points) svg.append(draw("circle", { class: `dot ${kind} run run${run}`, cx: x(p[0]), cy: y(p[1]), r: 3 }));
    }
  });
  const cursor = draw("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const readout = make("output", { class: "readout" });
  box.append(svg, readout);
  const steps = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  let at = -1;
  const read = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at];
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    const values = parts.flatMap((part, run) => Object.entries(part).flatMap(([kind, points]) => {
      const found = points.findLast((p) => p[0] === step);
      const label = [data.runs.length > 1 ? data.runs[run] : "", kind === "eval" ? "evaluation" : ""].filter(Boolean).join(" ");
      return found ? [`${label ? label + " " : ""}${short(found[1])}`] : [];
    }));
    readout.textContent = `step ${step}: ${values.join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const rect = svg.getBoundingClientRect();
    const step = x0 + (((event.clientX - rect.left) / rect.width * W - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
    read(steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0));
  });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) read(at < 0 ? steps.length - 1 : at); });
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); read(to); }
  });
}

if (data.completions.length) setUpCompletions();
document.querySelectorAll(".plot").forEach(plot);
