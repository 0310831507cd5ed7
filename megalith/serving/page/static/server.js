/** Requests to the server that this page came from, and in words what can go wrong with them. */

const KEY = "megalith.token";
const UNREACHABLE = "The server cannot be reached. It may have ended, or the network is down.";
const BROKEN = "The connection ended before the text was complete.";

/** What went wrong. status: of the answer, 0 without one; wait: seconds to wait before another try; field: the setting
 * that the server names, if any. */
export class Problem extends Error {
  constructor(words, { status = 0, wait = 0, field = null } = {}) {
    super(words);
    Object.assign(this, { status, wait, field });
  }
}

/** The token that the server asks for; this tab's alone. */
export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The answer of the server: to a POST with a body, else to a GET. Throws Problem, or AbortError by `signal`. */
export async function request(path, { body, signal } = {}) {
  const headers = new Headers();
  if (body) headers.set("Content-Type", "application/json");
  if (token.get()) headers.set("Authorization", `Bearer ${token.get()}`);
  const options = { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal };
  const answer = await reachable(fetch(path, { ...options, cache: "no-store" }), UNREACHABLE);
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

/** The objects of an answer: the one that it is, or each server-sent event until [DONE]. Throws Problem, also where the
 * events end early. */
export async function* parts(answer) {
  if (!answer.headers.get("Content-Type").startsWith("text/event-stream")) {
    yield await reachable(answer.json(), BROKEN);
    return;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reachable(reader.read(), BROKEN);
      if (done) throw new Problem(BROKEN);
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment that keeps the connection open
        const found = JSON.parse(data);
        if (found.error) throw new Problem(found.error.message);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A promise of the network's, whose errors become a Problem with these words; an abort stays one. */
async function reachable(promise, words) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(words);
  }
}

async function problemOf(answer) {
  const found = await answer.json().catch(() => ({})); // a proxy between may answer with a page
  const { message, param } = found.error ?? found;
  const words = message ?? `The server answered ${answer.status} ${answer.statusText}.`;
  const flag = /^--([a-z-]+)/.exec(words);
  const wait = Number(answer.headers.get("Retry-After")) || 0;
  return new Problem(words, { status: answer.status, wait, field: param ?? flag?.[1] ?? null });
}
