// Small things that the page's scripts share. Texts of others become text nodes only, never markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; `text` is its text, `on...` its listeners. */
export function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Buttons of which one is reached with Tab, and the others from there with the arrow keys. */
export function roving(container, { onmove = () => {} } = {}) {
  const all = () => [...container.querySelectorAll("button")];
  container.addEventListener("keydown", (event) => {
    const buttons = all();
    const place = buttons.indexOf(document.activeElement);
    const next = {
      ArrowDown: place + 1, ArrowRight: place + 1, ArrowUp: place - 1, ArrowLeft: place - 1, Home: 0, End: buttons.length - 1,
    }[event.key];
    if (place < 0 || next === undefined) return;
    event.preventDefault();
    const reached = buttons[(next + buttons.length) % buttons.length];
    reached.focus();
    onmove(reached);
  });
  container.addEventListener("focusin", (event) => {
    const button = event.target.closest("button");
    if (button) for (const other of all()) other.tabIndex = other === button ? 0 : -1;
  });
  all().forEach((button, place) => (button.tabIndex = place ? -1 : 0));
}

/** A bar as long as a share of 1. */
export function bar(share) {
  const filled = made("span");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return made("span", { class: "bar", "aria-hidden": "true" }, filled);
}

export const shownShare = (share) => share.toFixed(2);

/** What the server answers as JSON; an Error with its sentence where it refuses, or is not there. */
export async function fetched(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("uniter-app does not answer; is it still running in its terminal?");
  }
  const values = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(values.error ?? `the server says ${response.status}`);
  return values;
}
