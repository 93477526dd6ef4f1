// The Explorer: a text grows token by token, as a tree of branches; what may come next, and what attends to what.
//
// State: `tree` has the prompt's tokens at its root and one token at every other node; `here` is the node that the text
// ends with. The server keeps nothing: each question carries the whole text as token ids.

const $ = (id) => document.getElementById(id);
const TOP_K = [1, 2, 3, 5, 10, 20, 40, 100, 200, 500, 1000, 0]; // 0 is off
const WRITE_TOKENS = 40;

let model; // what /explorer/model says
let tree = null;
let here = null;
let next = null; // the last answer of /explorer/look
let selected = null; // index of the token whose attention is shown
let map = null; // the last answer of /explorer/attention, and of what text
let writing = null; // AbortController of the continuation being written
let looking = null; // of the question under way

// -- the server

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  if (answer.status === 401) {
    await askForKey();
    return ask(path, body, signal);
  }
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({ error: { message: `the server answered ${answer.status}` } }));
    throw new Error(error.message);
  }
  return answer;
}

function askForKey() {
  const dialog = $("ask");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("key", $("key").value);
      resolve();
    }, { once: true });
  });
}

function complain(error) {
  if (error?.name === "AbortError") return;
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
}

// -- texts of tokens

const isPart = (token) => token.text === null;
const plain = (token) => (isPart(token) ? `⟨${token.bytes}⟩` : token.text);
const quoted = (token) => `“${plain(token).replaceAll("\n", "⏎")}”`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A token's text with its spaces and line ends made visible. */
function spell(target, token) {
  for (const piece of plain(token).split(/([ \n\t])/)) {
    const mark = { " ": "·", "\n": "⏎", "\t": "⇥" }[piece];
    if (piece) target.append(mark ? element("span", "mark", mark) : piece);
  }
}

// -- the tree

const path = (node) => (node.parent ? [...path(node.parent), node.token] : node.tokens);
const ids = () => path(here).map((token) => token.id);

function step(token) {
  let child = here.children.find((node) => node.token.id === token.id);
  if (!child) {
    child = { token, parent: here, children: [] };
    here.children.push(child);
  }
  here = child;
}

function choose(rank) {
  const token = next?.likeliest[rank];
  if (!token || writing || busy()) return; // what is on the page is of another text until its answer has come
  if (path(here).length >= model.positions) return complain(new Error(`The text fills all ${model.positions} positions.`));
  step({ ...token, logprob: next.logprobs[rank] });
  $("news").textContent = `Appended ${quoted(token)}`;
  selected = null;
  look();
}

function undo() {
  if (writing) return stop();
  if (!here?.parent) return;
  $("news").textContent = `Took back ${quoted(here.token)}`;
  here = here.parent;
  selected = null;
  look();
}

function goTo(node) {
  stop();
  here = node;
  selected = null;
  look();
}

// -- questions

const busy = () => $("next").getAttribute("aria-busy") === "true";

/** Ask what the model makes of the text; `prompt`, a text typed anew, makes it the root of a new tree. */
async function look(prompt) {
  looking?.abort();
  looking = new AbortController();
  const { signal } = looking;
  $("next").setAttribute("aria-busy", "true");
  if (prompt === undefined) draw();
  try {
    const answer = await (await ask("explorer/look", { prompt: prompt ?? ids() }, signal)).json();
    if (signal.aborted) return;
    next = answer;
    if (prompt !== undefined) {
      tree = here = { tokens: answer.tokens, parent: null, children: [] };
      selected = null;
    } else {
      let node = here; // streamed tokens come without their bytes
      for (let i = answer.tokens.length - 1; node.parent; i--, node = node.parent) node.token = answer.tokens[i];
    }
    $("next").setAttribute("aria-busy", "false");
    complain(null);
    draw();
  } catch (error) {
    if (signal.aborted) return;
    $("next").setAttribute("aria-busy", "false");
    if (prompt === undefined) {
      next = null; // its bars were another text's
      drawNext();
    }
    complain(error);
  }
}

/** Write on: stream a continuation with the sliders' settings, token by token. */
async function write() {
  if (writing) return stop();
  if (!here) return;
  const room = model.positions - path(here).length;
  if (room < 1) return complain(new Error(`The text fills all ${model.positions} positions.`));
  looking?.abort();
  writing = new AbortController();
  const { signal } = writing;
  selected = null;
  draw();
  try {
    const answer = await ask("v1/completions", {
      model: model.name, prompt: ids(), max_tokens: Math.min(WRITE_TOKENS, room), stream: true, logprobs: 0,
      temperature: temperature(), top_k: topK(), return_token_ids: true,
    }, signal);
    for await (const event of events(answer.body)) {
      if (signal.aborted) break; // what had come before is not put where the reader has gone to
      if (event.error) throw new Error(event.error.message);
      for (const { token_ids, logprobs } of event.choices) {
        token_ids.forEach((id, i) => {
          const name = logprobs.tokens[i];
          const part = /^bytes:(\\x[0-9a-f]{2})+$/.test(name);
          const bytes = part ? name.slice(8).replaceAll("\\x", " ") : "";
          step({ id, text: part ? null : name, bytes, logprob: logprobs.token_logprobs[i] });
        });
        drawText();
      }
    }
    $("news").textContent = signal.aborted ? "Stopped." : "The continuation is written.";
  } catch (error) {
    complain(error);
  } finally {
    writing = null;
    if (looking.signal.aborted) look();
    else draw(); // a new prompt, or another branch, is being asked about
  }
}

function stop() {
  writing?.abort();
}

/** The JSON objects of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function attend() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const question = { prompt: ids(), layer: number("layer"), head: number("head") };
  const key = JSON.stringify(question);
  if (map?.key !== key) {
    try {
      const answer = await (await ask("explorer/attention", question)).json();
      if (selected === null || JSON.stringify({ ...question, prompt: ids() }) !== key) return; // the text has gone on
      map = { ...answer, key, tokens: path(here) };
      complain(null);
    } catch (error) {
      return complain(error);
    }
  }
  if (selected !== null) drawAttention();
}

// -- the next token, reshaped

const temperature = () => model.temperatures[$("temperature").value];
const topK = () => TOP_K[$("top-k").value];

/** Probabilities of the likeliest tokens at the sliders' settings, exact: see `Next` in look.py. */
function reshaped() {
  const t = temperature();
  const k = topK();
  const { logprobs, log_sums } = next;
  let z = log_sums[$("temperature").value];
  let least = -Infinity;
  if (k && k <= logprobs.length) {
    least = logprobs[k - 1]; // ties at the threshold are kept
    const top = logprobs[0] / t;
    z = top + Math.log(logprobs.filter((l) => l >= least).reduce((sum, l) => sum + Math.exp(l / t - top), 0));
  }
  return next.likeliest.map((_, i) => (logprobs[i] >= least ? Math.exp(logprobs[i] / t - z) : 0));
}

function drawNext() {
  const shares = next ? reshaped() : [];
  $("temperature-value").textContent = temperature().toFixed(2);
  $("top-k-value").textContent = topK() || "off";
  $("temperature").setAttribute("aria-valuetext", temperature().toFixed(2));
  $("top-k").setAttribute("aria-valuetext", String(topK() || "off"));
  const list = $("next");
  while (list.children.length > shares.length) list.lastChild.remove();
  shares.forEach((share, i) => {
    let button = list.children[i]?.firstChild;
    if (!button) {
      button = element("button");
      button.type = "button";
      const track = element("span", "track");
      track.append(element("span", "fill"));
      button.append(element("kbd", "", (i + 1) % 10), element("span", "name"), track, element("span", "share"));
      button.addEventListener("click", () => choose(i));
      const item = element("li");
      item.append(button);
      list.append(item);
    }
    const token = next.likeliest[i];
    const name = button.querySelector(".name");
    name.replaceChildren();
    spell(name, token);
    button.querySelector(".fill").style.width = percent(share).replace(" ", "");
    button.querySelector(".share").textContent = percent(share);
    button.setAttribute("aria-label", `${quoted(token)}, ${percent(share)}`);
    button.setAttribute("aria-keyshortcuts", (i + 1) % 10);
    button.classList.toggle("none", share === 0);
    button.disabled = Boolean(writing);
  });
}

// -- the text

function describe(token) {
  const lines = [`${quoted(token)}  token ${token.id}`];
  if (token.bytes) lines.push(`bytes ${token.bytes}`);
  if (token.logprob !== null) lines.push(`probability ${percent(Math.exp(token.logprob))}, log ${token.logprob.toFixed(2)}`);
  return lines.join("\n");
}

function drawText() {
  const holder = $("tokens");
  const tokens = path(here);
  const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.index : null;
  const written = holder.querySelectorAll(".token").length;
  holder.replaceChildren();
  tokens.forEach((token, i) => {
    const button = element("button", writing && i >= written ? "token written" : "token");
    button.type = "button";
    button.dataset.index = i;
    button.tabIndex = i === (selected ?? tokens.length - 1) ? 0 : -1;
    button.setAttribute("aria-label", describe(token).replaceAll("\n", ", "));
    button.setAttribute("aria-pressed", i === selected);
    if (token.logprob !== null) button.style.setProperty("--surprise", Math.min(1, -token.logprob / 9));
    spell(button, token);
    holder.append(button);
    if (token.text?.includes("\n")) holder.append(element("span", "break"));
  });
  if (writing) holder.scrollTop = holder.scrollHeight;
  if (focused !== null) holder.querySelector(`[data-index="${Math.min(focused, tokens.length - 1)}"]`)?.focus();
}

function select(index) {
  if (writing) return;
  selected = index;
  drawText();
  attend();
}

function deselect() {
  selected = null;
  draw();
}

function tip(button) {
  const box = $("tip");
  box.hidden = !button;
  if (!button) return;
  box.textContent = describe(path(here)[button.dataset.index]);
  const { left, bottom, top } = button.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = bottom + box.offsetHeight + 10 < innerHeight ? `${bottom + 6}px` : `${top - box.offsetHeight - 6}px`;
}

// -- the branches

function drawTree() {
  const line = new Set();
  for (let node = here; node; node = node.parent) line.add(node);
  const item = (node) => {
    const run = node.parent ? [node.token] : [];
    let end = node;
    while (end.children.length === 1 && end !== here && end !== tree) {
      end = end.children[0];
      run.push(end.token);
    }
    const li = element("li");
    const name = node.parent ? run.map(plain).join("") : node.tokens.map(plain).join("");
    const short = name.length > 90 ? `${name.slice(0, 40)} … ${name.slice(-40)}` : name;
    const button = element("button", line.has(end) ? "here" : "", short.replaceAll("\n", "⏎"));
    button.type = "button";
    if (end === here) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => goTo(end));
    li.append(button);
    if (end.children.length) {
      const list = element("ul");
      list.append(...end.children.map(item));
      li.append(list);
    }
    return li;
  };
  $("tree").replaceChildren(item(tree));
}

// -- attention

function drawAttention() {
  const { keys, shares, tokens, whole } = map;
  const token = tokens[selected];
  const share = new Map(keys[selected].map((key, i) => [key, shares[selected][i]]));
  const opened = $("attention").hidden;
  $("attention").hidden = false;
  $("partial").hidden = whole;
  $("attention-title").textContent = `What ${quoted(token)} attends to`;
  const first = keys[selected].slice(0, 5).map((key, i) => `${quoted(tokens[key])} ${percent(shares[selected][i])}`);
  $("summary").textContent = `${quoted(token)} attends to ${first.join(", ")}${keys[selected].length > 5 ? ", …" : "."}`;
  $("shares").replaceChildren(...tokens.map((other, j) => {
    const part = share.get(j);
    const box = element("span", `share-token${j === selected ? " self" : ""}${j > selected ? " after" : ""}`);
    box.style.setProperty("--part", Math.sqrt(part ?? 0));
    spell(box, other);
    box.append(element("small", "", part === undefined ? "" : percent(part)));
    return box;
  }));
  drawMatrix();
  if (opened) $("attention").scrollIntoView({ block: "nearest" });
}

function drawMatrix() {
  const { keys, shares, tokens } = map;
  const canvas = $("matrix");
  const count = tokens.length;
  const cell = Math.max(1, Math.min(26, Math.floor(560 / count)));
  const margin = cell >= 12 ? 110 : 0; // room for the names of the rows
  const ratio = devicePixelRatio || 1;
  canvas.style.width = `${margin + cell * count}px`;
  canvas.width = (margin + cell * count) * ratio;
  canvas.height = cell * count * ratio;
  Object.assign(canvas.dataset, { cell, margin });
  const style = getComputedStyle(canvas);
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const color = (name) => resolved(style.getPropertyValue(name));
  draw.fillStyle = color("--paper");
  draw.fillRect(margin, 0, cell * count, cell * count);
  draw.font = `${Math.min(14, cell - 4)}px ${style.getPropertyValue("--serif")}`;
  draw.textAlign = "right";
  draw.textBaseline = "middle";
  const gap = cell >= 8 ? 1 : 0;
  for (let row = 0; row < count; row++) {
    draw.fillStyle = color("--blue");
    keys[row].forEach((key, i) => {
      draw.globalAlpha = Math.sqrt(shares[row][i]);
      draw.fillRect(margin + key * cell, row * cell, cell - gap, cell - gap);
    });
    draw.globalAlpha = 1;
    if (margin) {
      draw.fillStyle = color(row === selected ? "--ink" : "--quiet");
      draw.fillText(plain(tokens[row]).replaceAll("\n", "⏎").slice(0, 14), margin - 7, (row + 0.5) * cell);
    }
  }
  draw.strokeStyle = color("--blue");
  draw.strokeRect(margin + 0.5, selected * cell + 0.5, cell * (selected + 1) - 1, Math.max(1, cell - gap - 1));
  $("cell").textContent = "";
}

/** light-dark() and the like as a colour that a canvas takes. */
function resolved(color) {
  const probe = $("news");
  probe.style.color = color;
  return getComputedStyle(probe).color;
}

function cellAt(event) {
  const { cell, margin } = $("matrix").dataset;
  const box = $("matrix").getBoundingClientRect();
  const scale = (Number(margin) + cell * map.tokens.length) / box.width; // a narrow window shrinks the picture
  const row = Math.floor(((event.clientY - box.top) * scale) / cell);
  const key = Math.floor(((event.clientX - box.left) * scale - margin) / cell);
  return { row: Math.max(0, Math.min(row, map.tokens.length - 1)), key };
}

function readMatrix(event) {
  const { row, key } = cellAt(event);
  const at = map.keys[row].indexOf(key);
  const { tokens, shares } = map;
  $("cell").textContent = at < 0 ? "" : `${quoted(tokens[row])} attends to ${quoted(tokens[key])}: ${percent(shares[row][at])}`;
}

// -- all of it

function draw() {
  drawText();
  drawNext();
  drawTree();
  $("undo").disabled = !here.parent;
  $("write").firstChild.textContent = writing ? "Stop " : "Write on ";
  if (selected === null) $("attention").hidden = true;
}

function listen() {
  let pause;
  $("prompt").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => {
      stop();
      look($("prompt").value);
    }, 200);
  });
  $("undo").addEventListener("click", undo);
  $("write").addEventListener("click", write);
  $("close").addEventListener("click", deselect);
  for (const id of ["temperature", "top-k"]) $(id).addEventListener("input", drawNext);
  for (const id of ["layer", "head"]) $(id).addEventListener("change", attend);

  const tokens = $("tokens");
  tokens.addEventListener("click", (event) => {
    const button = event.target.closest(".token");
    if (button) select(Number(button.dataset.index));
  });
  for (const kind of ["mouseover", "focusin"]) tokens.addEventListener(kind, (event) => tip(event.target.closest(".token")));
  for (const kind of ["mouseleave", "focusout", "scroll"]) tokens.addEventListener(kind, () => tip(null));
  tokens.addEventListener("keydown", (event) => {
    const all = [...tokens.querySelectorAll(".token")];
    const at = all.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });

  $("matrix").addEventListener("mousemove", readMatrix);
  $("matrix").addEventListener("click", (event) => select(cellAt(event).row));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => selected !== null && map && drawMatrix());

  document.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, select, input:not([type=range])") || $("ask").open) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^[0-9]$/.test(event.key)) choose((Number(event.key) + 9) % 10);
    else if (event.key === "u" || event.key === "Backspace") undo();
    else if (event.key === "w") write();
    else if (event.key === "Escape") writing ? stop() : selected !== null && deselect();
    else return;
    event.preventDefault();
  });
}

function number(count) {
  const [size, unit] = count >= 1e9 ? [1e9, "B"] : [1e6, "M"];
  return `${(count / size).toFixed(1)}${unit}`;
}

async function begin() {
  try {
    model = await (await ask("explorer/model")).json();
  } catch (error) {
    return complain(error);
  }
  $("about").textContent = `${model.name}, ${number(model.parameters)} parameters, ${model.layers} layers of ` +
    `${model.heads} heads, ${model.vocabulary} tokens, ${model.dtype} on ${model.device}`;
  for (const [id, count] of [["layer", model.layers], ["head", model.heads]]) {
    $(id).append(new Option("all, averaged", ""), ...Array.from({ length: count }, (_, i) => new Option(i + 1, i)));
  }
  $("temperature").value = model.temperatures.indexOf(1);
  listen();
  look($("prompt").value);
}

begin();
