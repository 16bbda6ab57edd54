// Photographs in, questions, answers. What the server says is shown as text, never as markup.

import { bar, byId, fetched, made, roving, shownShare } from "./elements.js";
import { Stage, UNSURE, heaviest } from "./stage.js";

const QUESTIONS = {
  match: { tab: "Does it match?", what: "Write a sentence: how likely is it about this photograph?", label: "A sentence", hint: "a cat on a sofa" },
  answer: { tab: "Question", what: "Ask what you would ask somebody who sees it; the five best answers.", label: "A question", hint: "what color is the cat?" },
  ground: { tab: "Where?", what: "Name a thing: which region is it?", label: "A phrase", hint: "the cat on the left" },
  rank: { tab: "Which one?", what: "Of several photographs: which one fits the sentence best?", label: "A sentence", hint: "somebody on a horse" },
  classify: { tab: "Labels", what: "The labels of this photograph; a text may be given with it.", label: "A text, or none", hint: "" },
};

let about = null;
let asking = "match";
let chosen = null; // the key of the photograph that is looked at
const photographs = new Map(); // by key, in the order of the strip
const texts = {}; // what was typed for each question
let thinking = false; // an answer is waited for
let turn = 0; // which answer is waited for: an older one that comes late is not shown

const stage = new Stage((number) => {
  if (number === null) return unpoint();
  stage.point(number);
  mark(number);
});

// --- photographs -----------------------------------------------------------------------------------------------------------------

async function add(files) {
  const faults = [];
  for (const [place, file] of [...files].entries()) {
    byId("looking").textContent = files.length > 1 ? `Looking at ${file.name} (${place + 1} of ${files.length}) …` : `Looking at ${file.name} …`;
    document.body.classList.add("busy");
    enable();
    try {
      if (file.size > about.largest) throw new Error(`${file.name}: ${megabytes(file.size)} are more than the ${megabytes(about.largest)} that are taken; make it smaller`);
      const photograph = await fetched(`photographs?name=${encodeURIComponent(file.name)}`, {
        method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file,
      });
      photographs.set(photograph.key, photograph);
      choose(photograph.key);
    } catch (error) {
      faults.push(error.message);
    }
  }
  document.body.classList.remove("busy");
  byId("looking").textContent = "";
  byId("files").value = "";
  say(faults);
  enable();
}

const megabytes = (bytes) => `${Number((bytes / 2 ** 20).toPrecision(3))} MB`;

function choose(key) {
  chosen = key;
  const photograph = photographs.get(key) ?? null;
  for (const id of ["figure", "tray", "regions"]) byId(id).hidden = photograph === null;
  byId("drop").hidden = photograph !== null;
  if (asking !== "rank") clear();
  if (photograph) {
    stage.show(photograph);
    list(photograph);
  }
  if (byId("thumbnails").children.length !== photographs.size + 1) showStrip(); // made anew only then: what has the focus keeps it
  press();
  enable();
}

function press() {
  for (const look of byId("thumbnails").querySelectorAll("[data-key]")) look.setAttribute("aria-pressed", String(look.dataset.key === chosen));
}

function showStrip() {
  const places = [...photographs.values()].map(({ key, name }) => {
    const picture = made("img", { src: `photographs/${key}`, alt: name });
    const look = made("button", { type: "button", "data-key": key, "aria-pressed": "false", title: name, onclick: () => choose(key) }, picture);
    const away = made("button", { type: "button", class: "away", title: `Remove ${name}`, "aria-label": `Remove ${name}`, text: "×", onclick: () => remove(key) });
    return made("li", {}, look, away);
  });
  const more = made("label", { class: "add", for: "files", title: "Add photographs" }, made("span", { "aria-hidden": "true", text: "+" }), made("span", { class: "hidden", text: "Add photographs" }));
  byId("thumbnails").replaceChildren(...places, made("li", {}, more));
}

function remove(key) {
  photographs.delete(key);
  if (asking === "rank") clear();
  if (key === chosen) choose([...photographs.keys()].at(-1) ?? null);
  else showStrip(), press(), enable();
  (byId("thumbnails").querySelector("[aria-pressed=true]") ?? byId("files")).focus();
}

// --- regions ---------------------------------------------------------------------------------------------------------------------

function list({ regions }) {
  const rows = regions.map(({ words, confidence, colour }, number) => {
    const swatch = made("span", { class: "swatch" });
    swatch.style.background = colour;
    const point = () => stage.point(number);
    const row = made("button", { type: "button", class: confidence < UNSURE ? "row unsure" : "row", onclick: point, onmouseenter: point, onfocus: point, onmouseleave: unpoint, onblur: unpoint },
      swatch, made("span", { class: "number", text: number }), made("span", { class: "name", text: words }), bar(confidence),
      made("span", { class: "share", text: shownShare(confidence) }));
    return made("li", {}, row);
  });
  byId("region-list").replaceChildren(...rows);
  if (rows.length) byId("region-list").querySelector("button").tabIndex = 0;
  for (const button of [...byId("region-list").querySelectorAll("button")].slice(1)) button.tabIndex = -1;
}

function mark(number) {
  [...byId("region-list").querySelectorAll("button")].forEach((row, place) => row.classList.toggle("pointed", place === number));
}

function unpoint() {
  stage.point(null);
  mark(null);
}

// --- questions -------------------------------------------------------------------------------------------------------------------

function showTabs() {
  const able = Object.keys(QUESTIONS).filter((name) => name !== "classify" || about.questions[name].by); // for runs of own labels only
  const tabs = able.map((name) => {
    const { by } = about.questions[name];
    const attributes = { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", class: by ? "" : "unable", title: by ? null : "Not with these runs", onclick: () => ask(name) };
    return made("button", attributes, QUESTIONS[name].tab, ...(by ? [] : [made("span", { class: "hidden", text: " (not with these runs)" })]));
  });
  byId("tabs").replaceChildren(...tabs);
  roving(byId("tabs"), { onmove: (button) => button.click() });
  ask(able.find((name) => about.questions[name].by) ?? "match");
}

/** Turn to a question. */
function ask(name) {
  texts[asking] = byId("text").value;
  asking = name;
  const { what, label, hint } = QUESTIONS[name];
  const { why_not } = about.questions[name];
  for (const tab of byId("tabs").children) tab.setAttribute("aria-selected", String(tab.id === `tab-${name}`));
  byId("panel").setAttribute("aria-labelledby", `tab-${name}`);
  byId("what").textContent = what;
  byId("why-not").hidden = why_not === null;
  byId("why-not").textContent = why_not === null ? "" : `Not with what was started: ${why_not}. Then start uniter-app with it.`;
  byId("form").hidden = why_not !== null;
  byId("text-label").textContent = label;
  byId("text").placeholder = hint;
  byId("text").value = texts[name] ?? "";
  clear();
  enable();
}

function enable() {
  const needed = asking === "rank" ? 2 : 1;
  const ready = photographs.size >= needed;
  byId("send").disabled = !ready || thinking || document.body.classList.contains("busy");
  if (about.questions[asking].by && !thinking && !byId("answer").children.length) {
    byId("status").textContent = ready ? "" : needed === 2 ? "Add at least two photographs." : "Add a photograph first.";
  }
}

function clear() {
  turn += 1;
  byId("answer").replaceChildren();
  byId("status").textContent = "";
  if (chosen && photographs.has(chosen)) stage.dark();
}

async function send(event) {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text && asking !== "classify") {
    byId("status").textContent = `${QUESTIONS[asking].label}, please.`;
    return byId("text").focus();
  }
  clear();
  say([]);
  const mine = turn;
  const question = asking;
  const keys = question === "rank" ? [...photographs.keys()] : [chosen];
  thinking = true;
  enable();
  const waiting = setInterval(() => wait(mine), 1500);
  byId("status").textContent = "Thinking …";
  try {
    const body = JSON.stringify({ question, photographs: keys, text });
    const found = await fetched("ask", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (mine === turn) {
      byId("status").textContent = "";
      byId("answer").replaceChildren(...ANSWERS[question](found), made("p", { class: "faint by", text: `Said by ${shortened(found.by)}`, title: found.by }));
      roving(byId("answer"));
    }
  } catch (error) {
    if (mine === turn) (byId("status").textContent = ""), say([error.message]);
  } finally {
    clearInterval(waiting);
    thinking = false;
    enable();
  }
}

async function wait(mine) {
  const { waiting } = await fetched("waiting").catch(() => ({ waiting: 0 }));
  if (mine === turn && waiting > 1 && !byId("answer").children.length) {
    byId("status").textContent = `In the queue: ${waiting - 1} ${waiting > 2 ? "others ask" : "other asks"} as well …`;
  }
}

// --- answers ---------------------------------------------------------------------------------------------------------------------

const VERDICTS = [
  ["yes", "Likely about this photograph", 0.7], ["maybe", "Undecided", 0.3], ["no", "Rather not about this photograph", 0],
];

const ANSWERS = {
  match({ probability, words }) {
    const [kind, verdict] = VERDICTS.find(([, , from]) => probability >= from);
    const score = made("p", { class: `score ${kind}` },
      made("strong", { text: shownShare(probability) }), made("span", {}, made("b", { text: verdict }), bar(probability)));
    return [score, ...attended(words)];
  },
  answer: ({ best, words }) => [ranked(best), ...attended(words)],
  ground({ region, probabilities, zero_shot }) {
    stage.light(probabilities, [region]);
    const { words, box } = photographs.get(chosen).regions[region];
    const { width, height } = photographs.get(chosen);
    const [x0, y0, x1, y1] = box.map((value, place) => Math.round(value * (place % 2 ? height : width)));
    const found = [
      made("p", { class: "found" }, made("strong", { text: `${region} ${words}` }), ` ${shownShare(probabilities[region])} of 1 among all regions`),
      made("p", { class: "faint", text: `Its box: ${x0}, ${y0} to ${x1}, ${y1}, in pixels of the photograph.` }),
    ];
    if (zero_shot) found.push(made("p", { class: "note", text: "No run was trained to point: each region was matched with the phrase alone, so “the left one” is beyond it." }));
    return found;
  },
  rank({ order }) {
    choose(order[0].key);
    const rows = order.map(({ key, probability }, place) => {
      const name = photographs.get(key)?.name ?? "a photograph that was removed";
      const picture = made("img", { src: `photographs/${key}`, alt: "" });
      const row = made("button", { type: "button", class: place ? "row one" : "row one best", onclick: () => choose(key) },
        picture, made("span", { class: "name", text: name }), bar(probability), made("span", { class: "share", text: shownShare(probability) }));
      return made("li", {}, row);
    });
    return [made("ol", { class: "ranking" }, ...rows)];
  },
  classify: ({ best, score, words }) => [score === null ? ranked(best) : made("p", { class: "score" }, made("strong", { text: score.toPrecision(4) })), ...attended(words)],
};

function ranked(best) {
  const rows = best.map(({ answer, probability, given }, place) =>
    made("li", { class: given ?? place === 0 ? "row best" : "row" },
      made("span", { class: "name", text: answer }), bar(probability), made("span", { class: "share", text: shownShare(probability) })));
  return made("ol", { class: "answers" }, ...rows);
}

/** What each word attends to: a row a word; pointed at, its regions light up. */
function attended(words) {
  if (!words.length) return [];
  const { regions } = photographs.get(chosen);
  const rows = words.map(({ word, weights }) => {
    const seen = heaviest(weights).map((number) => made("span", { class: "seen" }, made("small", { text: number }), ` ${regions[number].words} `, made("i", { text: shownShare(weights[number]) })));
    const lit = (event) => {
      for (const other of byId("answer").querySelectorAll(".word")) other.setAttribute("aria-pressed", String(other === event.currentTarget));
      stage.light(weights);
    };
    return made("li", {}, made("button", { type: "button", class: "row word", "aria-pressed": "false", onclick: lit, onfocus: lit, onmouseenter: lit },
      made("b", { text: word }), made("span", { class: "name" }, ...seen)));
  });
  const undo = made("button", { type: "button", class: "link", text: "all boxes again", onclick: () => {
    for (const other of byId("answer").querySelectorAll(".word")) other.setAttribute("aria-pressed", "false");
    stage.dark();
  } });
  return [made("h3", {}, "What each word attends to", undo), made("ul", { class: "words" }, ...rows)];
}

// --- the page --------------------------------------------------------------------------------------------------------------------

function say(sentences) {
  byId("fault").hidden = !sentences.length;
  byId("fault").replaceChildren(...sentences.map((sentence) => made("span", { text: sentence })));
}

/** The end of a long path. */
function shortened(path) {
  const parts = path.split("/").filter(Boolean);
  return parts.length > 2 ? `…/${parts.slice(-2).join("/")}` : path;
}

function listen() {
  byId("form").addEventListener("submit", send);
  byId("files").addEventListener("change", () => add(byId("files").files));
  roving(byId("region-list"));
  addEventListener("paste", (event) => event.clipboardData?.files.length && add(event.clipboardData.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dragging", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) add(event.dataTransfer.files);
    });
  }
}

async function begin() {
  try {
    about = await fetched("about");
  } catch (error) {
    return say([error.message]);
  }
  byId("largest").textContent = megabytes(about.largest);
  const runs = [...new Set(Object.values(about.questions).map(({ by }) => by).filter(Boolean))];
  const asked = runs.length ? `Models: ${runs.map(shortened).join(", ")}` : "No model";
  const open = about.alone ? "On this machine only" : "Open to other machines";
  byId("about").textContent = `Detector: ${about.detector}, ${about.classes.toLocaleString("en")} classes · ${asked} · ${open}`;
  byId("about").title = runs.join("\n");
  showTabs();
  for (const id of ["tabs", "panel"]) byId(id).hidden = !runs.length;
  byId("no-model").hidden = runs.length > 0;
  listen();
}

begin();
