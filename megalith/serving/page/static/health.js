/** The dot with words in the header: how the server is. */

const EVERY = 10_000; // milliseconds
const line = document.querySelector("#health");
const words = document.querySelector("#health-words");

/** Ask now, and then again and again while the page can be seen. */
export function watch() {
  check();
  setInterval(() => document.hidden || check(), EVERY);
  document.addEventListener("visibilitychange", () => document.hidden || check());
}

/** Ask /health once. */
export async function check() {
  let state, text;
  try {
    const answer = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(EVERY) });
    const found = await answer.json();
    [state, text] = answer.ok ? well(found) : ["lost", found.reason ?? found.message ?? "not ready"];
  } catch {
    [state, text] = ["lost", "unreachable"];
  }
  line.dataset.state = state;
  if (words.textContent !== text) words.textContent = text;
}

function well({ running = 0, waiting = 0 }) {
  if (!running && !waiting) return ["ready", "ready"];
  return [waiting ? "busy" : "ready", `${running} running${waiting ? `, ${waiting} waiting` : ""}`];
}
