/** A text that grows, each token of which can be pointed at, focused and tinted. */

import { details } from "./popover.js";

const LEVELS = [0.8, 0.5, 0.2, 0.05]; // probabilities at which the tint changes; index.html has the legend

/** Shows text in an element with class `text`.
 *
 * Text and tokens do not come in step: a character may take several tokens, and text that may become a stop text is
 * held back. So a token gets its span once all of its text is there, and tokens without text of their own join the
 * next. Text ahead of that is shown as mere text. Positions count code points.
 */
export class TokenText {
  constructor(element) {
    this.element = element;
    this.tail = element.querySelector(".tail");
    this.points = [];
    this.tokens = [];
    this.shown = 0; // code points within spans of tokens
    this.placed = 0; // tokens that have a span
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    element.addEventListener("keydown", (event) => this.move(event));
  }

  get text() {
    return this.points.join("");
  }

  push(text, tokens) {
    this.points.push(...text);
    for (const token of tokens) {
      const said = token.bytes ? this.decoder.decode(Uint8Array.from(token.bytes), { stream: true }) : token.name;
      this.tokens.push({ ...token, points: [...said] });
    }
    this.show(false);
  }

  /** Show what is left, now that no more comes. */
  finish() {
    this.show(true);
  }

  show(final) {
    const { tokens, points } = this;
    for (let i = this.placed; i < tokens.length; i++) {
      const last = i + 1 === tokens.length;
      let end = this.end(i);
      if (final) end = last ? points.length : Math.min(end, points.length);
      if (end > points.length) break;
      if (end > this.shown || (final && last)) this.add(points.slice(this.shown, end).join(""), i + 1);
    }
    this.tail.textContent = points.slice(this.shown).join("");
  }

  /** Where the text of token `i` ends, which starts at `shown`; Infinity where that is not known yet. */
  end(i) {
    const token = this.tokens[i];
    if (token.offset !== undefined) return (this.tokens[i + 1]?.offset ?? Infinity) - this.tokens[0].offset;
    const end = this.shown + token.points.length;
    if (end > this.points.length) return Infinity;
    // A special token has a name, of which the text has nothing.
    return token.points.every((point, k) => this.points[this.shown + k] === point) ? end : this.shown;
  }

  /** A span for the tokens from `placed` to `end`; without text it marks what ended the text. */
  add(text, end) {
    const tokens = this.tokens.slice(this.placed, end);
    const span = document.createElement("span");
    span.className = text ? "token" : "token end";
    span.textContent = text;
    span.tabIndex = this.placed ? -1 : 0; // one stop of the Tab key for all; arrow keys go on from there
    const probability = Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
    const level = LEVELS.findIndex((limit) => probability >= limit);
    span.dataset.level = level < 0 ? LEVELS.length : level;
    details.set(span, tokens);
    this.tail.before(span);
    this.placed = end;
    this.shown += [...text].length;
  }

  move(event) {
    const spans = [...this.element.querySelectorAll(".token")];
    const now = spans.indexOf(event.target);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (now < 0 || next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const span = spans[Math.min(Math.max(next, 0), spans.length - 1)];
    event.target.tabIndex = -1;
    span.tabIndex = 0;
    span.focus();
  }
}
