/** The settings: what a request gets from them, what the browser remembers, and where the server's words on one go. */

import { Problem } from "./server.js";

const KEY = "megalith.settings";
// What the server's messages call some of the settings.
const NAMES = { max_new_tokens: "max_tokens", num_samples: "n", messages: "prompt" };
const form = document.querySelector("#ask");
const panel = document.querySelector("#settings");
const controls = [...panel.querySelectorAll("input, select, textarea")];
const [beams, penalty, tint] = ["beam_width", "length_penalty", "tint"].map((id) => document.getElementById(id));

/** Restore the settings and keep them; `server` has the defaults, which empty fields stand for. */
export function start(server) {
  for (const [id, value] of Object.entries(server.defaults)) document.getElementById(id).placeholder = value;
  const kept = JSON.parse(stored(KEY) ?? "{}");
  for (const control of controls) {
    if (control.id in kept) control[attribute(control)] = kept[control.id];
  }
  panel.open = matchMedia("(min-width: 56rem)").matches;
  panel.addEventListener("input", ({ target }) => changed(target));
  document.querySelector("#prompt").addEventListener("input", ({ target }) => clear(target));
  document.querySelector("#defaults").addEventListener("click", () => {
    for (const control of controls) {
      control[attribute(control)] = control[control.type === "checkbox" ? "defaultChecked" : "defaultValue"] ?? "1";
      changed(control);
    }
  });
  follow();
}

/** The fields of a request. Throws Problem for what is no number; all else is for the server to judge. */
export function fields() {
  const found = {};
  for (const control of controls) {
    if (control.matches(":disabled") || control === tint) continue;
    if (control.validity.badInput) throw new Problem("This must be a number.", { field: control.id });
    if (control.value.trim() === "") continue;
    found[control.id] = control.id === "stop" ? lines(control.value) : Number(control.value);
  }
  return found;
}

/** Show words beside the control that they are about; whether there is one. */
export function showProblem({ field, message }) {
  const words = (field ?? "").split(".").pop().replace(/^-+/, "").replaceAll("-", "_");
  const control = document.getElementById(NAMES[words] ?? words);
  if (control !== document.querySelector("#prompt") && !controls.includes(control)) return false;
  let line = document.getElementById(`${control.id}-problem`);
  if (!line) {
    line = document.createElement("p");
    Object.assign(line, { id: `${control.id}-problem`, className: "error", role: "alert" });
    control.after(line);
  }
  line.textContent = message;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", line.id);
  if (panel.contains(control)) panel.open = true;
  control.focus();
  line.scrollIntoView({ block: "nearest" }); // the focus brings only the control into view
  return true;
}

/** Take all such words away. */
export function clearProblems() {
  form.querySelectorAll("[aria-invalid]").forEach(clear);
}

/** What localStorage keeps under a key; null too where it keeps nothing. */
export function stored(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

/** Keep a value in localStorage, where there is one. */
export function store(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // The page works without a memory.
  }
}

function attribute(control) {
  return control.type === "checkbox" ? "checked" : "value";
}

function changed(control) {
  clear(control);
  follow();
  store(KEY, JSON.stringify(Object.fromEntries(controls.map((each) => [each.id, each[attribute(each)]]))));
}

function clear(control) {
  control.removeAttribute("aria-invalid");
  control.removeAttribute("aria-describedby");
  const line = document.getElementById(`${control.id}-problem`);
  if (line) line.textContent = "";
}

/** Bring the page in line with the settings. */
function follow() {
  const searching = beams.value !== "";
  document.querySelector("#sampling").disabled = searching;
  document.querySelector("#beams-note").hidden = !searching;
  penalty.disabled = !searching;
  document.body.classList.toggle("tinted", tint.checked);
}

/** The lines of a text; \n, \t and \\ within one are a newline, a tab and a backslash. */
function lines(text) {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  return text.split("\n").filter(Boolean).map((line) => line.replace(/\\([nt\\])/g, (_, sign) => escapes[sign]));
}
