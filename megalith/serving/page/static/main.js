/** The page: one prompt box for completions and chat, and what keys and buttons do. */

import { Chat } from "./chat.js";
import * as health from "./health.js";
import * as popover from "./popover.js";
import { ask, pieces } from "./replies.js";
import { Result } from "./results.js";
import { parts, Problem, request, token } from "./server.js";
import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const CONTEXT = 120; // characters of the prompt that a result repeats
const chat = new Chat();
let running = null; // the AbortController of the request in progress
let countdown = 0;

const chatting = () => $("ask").elements.mode.value === "chat";

async function generate() {
  if (running) return;
  clearProblems();
  running = new AbortController();
  busy(true);
  const talking = chatting();
  const said = $("prompt").value;
  let results = [];
  try {
    const fields = settings.fields();
    const [path, body] = ask(talking ? chat.messages(said) : said, fields);
    say("Waiting for the model.");
    const answer = await request(path, { body, signal: running.signal });
    say("Writing.");
    const began = performance.now();
    results = talking ? reply(said, fields.n) : show(said, fields.n);
    for await (const found of parts(answer)) {
      const follows = talking && atBottom();
      for (const piece of pieces(found)) results[piece.index].push(piece);
      if (follows) scrollTo(0, document.body.scrollHeight);
    }
    const count = results.reduce((sum, result) => sum + result.text.tokens.length, 0);
    say(`Done: ${count} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    results.forEach((result) => result.end(stopped ? "stopped" : "broken off"));
    say(stopped ? "Stopped." : "");
    // A message of a chat whose reply has begun is no longer in the box; "Take back" returns it.
    if (!stopped) explain(error, !talking || !results.length);
  } finally {
    running = null;
    busy(false);
    health.check();
  }
}

/** Empty cards for the results of a prompt. */
function show(prompt, count) {
  const points = [...prompt];
  const before = points.length > CONTEXT ? `…${points.slice(-CONTEXT).join("")}` : prompt;
  const goOn = { label: "Continue from here", act: (result) => refill(prompt + result.text.text) };
  const results = Result.several("Result", count, { before, goOn });
  $("results").replaceChildren(...results.map((result) => result.card));
  return results;
}

/** Empty cards for the replies to what was said, which leaves the box. */
function reply(said, count) {
  const results = chat.add(said, count);
  if ($("prompt").value === said) refill("");
  follow();
  return results;
}

function refill(text) {
  $("prompt").value = text;
  $("prompt").focus();
}

function atBottom() {
  return scrollY + innerHeight >= document.body.scrollHeight - 40;
}

function say(words) {
  $("status").textContent = words;
}

function busy(is) {
  const focused = document.activeElement; // a button that is disabled would lose it
  $("generate").disabled = $("take-back").disabled = $("new-chat").disabled = is;
  $("abort").disabled = !is;
  if (is && focused === $("generate")) $("abort").focus();
  if (!is && focused === $("abort")) $("generate").focus();
}

/** Say what went wrong where it belongs: at the token, at a setting, or below the buttons. again: whether generating
 * once more is what to offer, if the error is one that may pass. */
function explain(error, again = false) {
  if (!(error instanceof Problem)) console.error(error);
  if (error.status === 401) return askForToken(error.message);
  if (settings.showProblem(error)) return;
  $("problem-words").textContent = error.message;
  $("problem").hidden = false;
  $("again").hidden = !again || (error.status >= 400 && error.status < 429);
  clearInterval(countdown);
  let left = error.wait ?? 0;
  const tick = () => {
    $("problem-wait").textContent = left > 0 ? `It is worth trying again in ${left} s.` : "";
    $("again").disabled = left > 0;
    if (left-- <= 0) clearInterval(countdown);
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function clearProblems() {
  settings.clearProblems();
  clearInterval(countdown);
  $("problem").hidden = true;
}

function askForToken(words) {
  $("token-words").textContent = token.get() ? `The server refuses this token: ${words}` : words;
  token.forget();
  $("forget").hidden = true;
  $("token-form").hidden = false;
  $("token").focus();
}

/** What the model can do. This needs the token, which so is asked for before anything is written. */
async function greet() {
  try {
    const [model] = (await (await request("v1/models")).json()).data;
    $("no-chat").hidden = model.chat_template;
    document.querySelector("[value=chat]").disabled = !model.chat_template;
    $("forget").hidden = !token.get();
  } catch (error) {
    explain(error);
  }
}

async function useToken(event) {
  event.preventDefault();
  const given = $("token").value.trim();
  $("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(given)) {
    $("token-words").textContent = "A token has letters, digits and signs, and no spaces.";
    return;
  }
  token.set(given);
  $("token-form").hidden = true;
  $("prompt").focus();
  await greet();
}

/** Bring the page in line with the mode and the conversation. */
function follow() {
  const talking = chatting();
  $("turns").hidden = $("system-part").hidden = !talking;
  $("results").hidden = talking;
  $("take-back").hidden = $("new-chat").hidden = !talking || !chat.turns.length;
  $("prompt-label").textContent = talking ? "Message" : "Prompt";
}

function keys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("token-form").contains(event.target)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    popover.hide();
    running?.abort();
  }
}

async function start() {
  const server = await (await request("page/server.json")).json();
  $("model").textContent = server.model;
  document.title = `${server.model} · megalith`;
  settings.start(server);
  $("theme").value = settings.stored("megalith.theme") ?? "";
  follow();
  await greet();
}

document.addEventListener("keydown", keys);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("abort").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", () => {
  $("generate").focus();
  generate();
});
$("take-back").addEventListener("click", () => {
  refill(chat.takeBack());
  follow();
});
$("new-chat").addEventListener("click", () => {
  chat.clear();
  refill("");
  follow();
});
$("modes").addEventListener("change", follow);
$("theme").addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value;
  settings.store("megalith.theme", target.value);
});
$("token-form").addEventListener("submit", useToken);
$("forget").addEventListener("click", () => {
  token.forget();
  location.reload();
});
popover.watch();
health.watch();
start().catch(explain);
