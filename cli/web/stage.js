// The photograph with its boxes, and the light that an answer throws on its regions.
// Boxes come as fractions of the photograph, so they fit whatever size it is shown in.

import { byId, made, shownShare } from "./elements.js";

export const UNSURE = 0.2; // a region below it is there because a photograph has at least so many
const NAMED_FROM = 0.1; // of the heaviest region; at most three are named, as on the pictures that `uniter-train predict --out` draws

export class Stage {
  #photograph = null;
  #boxes = [];
  #lit = null;
  #onpoint;

  /** `onpoint(number or null)` hears which box the mouse is on. */
  constructor(onpoint) {
    this.#onpoint = onpoint;
    byId("shown").addEventListener("input", () => this.#rule());
    new ResizeObserver(() => this.#settle()).observe(byId("stage"));
  }

  show(photograph) {
    this.#photograph = photograph;
    const { name, width, height, regions, key } = photograph;
    byId("photograph").src = `photographs/${key}`;
    byId("photograph").alt = `The photograph ${name}`;
    byId("stage").style.setProperty("--shape", width / height);
    byId("caption").textContent = `${name} · ${width} × ${height} · ${regions.length} regions`;
    byId("shown").max = regions.length;
    const sure = regions.filter(({ confidence }) => confidence >= UNSURE).length;
    byId("shown").value = Math.min(Math.max(sure, 3), matchMedia("(max-width: 900px)").matches ? 6 : 10, regions.length);
    this.#boxes = regions.map((region, number) => this.#box(region, number));
    const large = [...this.#boxes].sort((one, other) => area(regions[other.number]) - area(regions[one.number]));
    byId("boxes").replaceChildren(...large.map((box) => box.element)); // small ones above large ones, so that the mouse finds them
    this.dark();
  }

  #box({ words, confidence, colour, box: [x0, y0, x1, y1] }, number) {
    const label = made("span", { class: "label" });
    const element = made("div", { class: "box", onmouseenter: () => this.#onpoint(number), onmouseleave: () => this.#onpoint(null) }, label);
    Object.assign(element.style, percent({ left: x0, top: y0, width: x1 - x0, height: y1 - y0 }));
    element.style.setProperty("--colour", colour);
    element.classList.toggle("right", x0 > 0.7);
    return { number, element, label, long: `${number} ${words} ${shownShare(confidence)}`, short: String(number) };
  }

  /** Point at one region, null at none. */
  point(number) {
    for (const box of this.#boxes) box.element.classList.toggle("pointed", box.number === number);
    this.#settle();
  }

  /** Light up the regions by their weights; the heaviest are named, or those that are told. */
  light(weights, named = heaviest(weights)) {
    this.#lit = { weights, named };
    this.#rule();
    this.#paint();
  }

  /** No light: the boxes as the detector sees them. */
  dark() {
    this.#lit = null;
    byId("light").hidden = true;
    this.#rule();
  }

  #rule() {
    const most = Number(byId("shown").value);
    byId("shown-number").textContent = most;
    const seen = this.#lit ? new Set(this.#lit.named) : null;
    for (const box of this.#boxes) {
      box.element.hidden = seen ? !seen.has(box.number) : false;
      box.element.classList.toggle("quiet", !seen && box.number >= most); // seen when it is pointed at
    }
    this.#settle();
  }

  /** Names above or within their box where they hide no other name, else the number alone, else nothing; the surest regions choose first. */
  #settle() {
    const within = byId("stage").getBoundingClientRect();
    if (!within.width) return;
    const taken = [];
    const first = [...this.#boxes].sort((one, other) => isPointed(other) - isPointed(one) || one.number - other.number);
    for (const box of first) {
      if (box.element.hidden || (box.element.classList.contains("quiet") && !isPointed(box))) continue;
      const place = this.#placed(box, within, taken);
      box.label.hidden = place === null;
      if (place) taken.push(place);
    }
  }

  #placed(box, within, taken) {
    const { words } = this.#photograph.regions[box.number];
    const long = this.#lit ? `${box.number} ${words} ${shownShare(this.#lit.weights[box.number])}` : box.long;
    box.label.hidden = false;
    for (const text of [long, box.short]) {
      for (const inside of [false, true]) {
        box.label.textContent = text;
        box.label.classList.toggle("inside", inside);
        const place = box.label.getBoundingClientRect();
        const fits = place.left >= within.left - 1 && place.right <= within.right + 1 && place.top >= within.top - 1;
        if (fits && !taken.some((other) => overlap(place, other))) return place;
      }
    }
    return null;
  }

  /** Everything is dimmed, but a region by its weight; where regions overlap the heavier one counts. */
  #paint() {
    const canvas = byId("light");
    canvas.hidden = false;
    const { weights } = this.#lit;
    canvas.width = 640;
    canvas.height = Math.max(1, Math.round((640 * this.#photograph.height) / this.#photograph.width));
    const brush = canvas.getContext("2d");
    const most = Math.max(...weights, 1e-12);
    const dim = (light) => (brush.fillStyle = `rgb(8 12 18 / ${0.74 * (1 - light)})`);
    dim(0);
    brush.fillRect(0, 0, canvas.width, canvas.height);
    const order = weights.map((_, number) => number).sort((one, other) => weights[one] - weights[other]);
    for (const number of order) {
      const [x0, y0, x1, y1] = this.#photograph.regions[number].box;
      const [left, right] = [x0, x1].map((x) => Math.round(x * canvas.width)); // whole pixels, or edges would stand out
      const [top, bottom] = [y0, y1].map((y) => Math.round(y * canvas.height));
      const place = [left, top, right - left, bottom - top];
      brush.clearRect(...place);
      dim(weights[number] / most);
      brush.fillRect(...place);
    }
  }
}

/** The regions that weigh most: three at most, and none that weighs less than a tenth of the first. */
export function heaviest(weights) {
  const order = weights.map((_, number) => number).sort((one, other) => weights[other] - weights[one]);
  return order.slice(0, 3).filter((number) => weights[number] >= NAMED_FROM * weights[order[0]]);
}

const isPointed = (box) => box.element.classList.contains("pointed");
const area = ({ box: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
const percent = (values) => Object.fromEntries(Object.entries(values).map(([name, value]) => [name, `${value * 100}%`]));
const overlap = (one, other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
