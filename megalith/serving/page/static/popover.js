/** The box beside a token that is pointed at or focused: its probability, and what else could have been written. */

/** The tokens of each span of class `token`. */
export const details = new WeakMap();

const box = document.querySelector("#popover");
const NOTE = "As the model gave them, before temperature and filters.";
const GAP = 8; // pixels between the box and the token, and the edge of the window
const LEAVE = 120; // milliseconds in which the pointer may go from the token to the box
let span = null;
let leaving = 0;

/** Let the box follow pointer and focus. */
export function watch() {
  for (const [kind, shows] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
    document.addEventListener(kind, ({ target }) => {
      const token = target.closest?.(".token");
      if (shows && token) show(token);
      else if (shows && box.contains(target)) clearTimeout(leaving);
      else if (!shows && (token || box.contains(target))) leave();
    });
  }
  addEventListener("resize", hide);
  document.addEventListener("scroll", () => span && put(), { capture: true, passive: true });
}

/** Take the box away. */
export function hide() {
  clearTimeout(leaving);
  if (!span) return;
  span.classList.remove("shown");
  span.removeAttribute("aria-describedby");
  span = null;
  box.hidden = true;
}

/** A probability in percent, of its natural logarithm. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.005) return "< 0.01 %";
  return `${share.toFixed(share < 1 ? 2 : 1)} %`;
}

function leave() {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    const focused = document.activeElement; // a click or a tap keeps the box of a token until the focus leaves it
    if (focused?.matches(".token")) show(focused);
    else hide();
  }, LEAVE);
}

function show(token) {
  clearTimeout(leaving);
  if (token === span) return;
  hide();
  span = token;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "popover");
  box.replaceChildren(...details.get(span).flatMap(describe), element("p", NOTE, "hint"));
  box.hidden = false;
  put();
}

function describe(token) {
  const title = element("p", "", "name");
  title.append(element("code", visible(token.name)), element("span", percent(token.logprob)));
  const taken = token.alternatives.some((each) => each.name === token.name) ? [] : [token];
  const list = element("ol");
  for (const each of token.alternatives.length ? [...token.alternatives, ...taken] : []) {
    const line = element("li", "", each.name === token.name ? "taken" : "");
    line.style.setProperty("--share", `${100 * Math.exp(each.logprob)}%`);
    line.append(element("code", visible(each.name)), element("span", percent(each.logprob)));
    list.append(line);
  }
  return [title, list];
}

/** A token's text with signs for what cannot be seen. */
function visible(name) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  return name.replace(/[ \n\t\r]/g, (each) => signs[each]) || "(no text)";
}

/** Put the box below the first line of the token, or above it where there is no room, inside the window. */
function put() {
  const { left, top, bottom } = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const below = bottom + GAP + box.offsetHeight <= innerHeight;
  const y = below ? bottom + GAP : top - GAP - box.offsetHeight;
  box.style.top = `${Math.max(y, GAP)}px`;
  box.style.left = `${Math.max(GAP, Math.min(left, document.documentElement.clientWidth - box.offsetWidth - GAP))}px`;
}

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}
