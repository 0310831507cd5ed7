/** Cards, each with one text of the model. */

import { TokenText } from "./tokentext.js";

const template = document.querySelector("#result");
const ENDS = { stop: "ended by itself", length: "at the limit of tokens" };

/** One text: what it is called, how it is going, and buttons to copy it and to go on from it. */
export class Result {
  /** before: the end of the prompt, shown before the text. goOn: {label, act}, act(text) on a click. */
  constructor(name, { before = "", goOn } = {}) {
    this.card = template.content.cloneNode(true).firstElementChild;
    const find = (selector) => this.card.querySelector(selector);
    find("h3").textContent = name;
    find(".before").textContent = before;
    find(".text").setAttribute("aria-label", `Text of ${name.toLowerCase()}`);
    this.text = new TokenText(find(".text"));
    this.state = find(".state");
    this.state.textContent = "writing";
    this.card.classList.add("writing");
    this.finish = null;
    const copy = find(".copy");
    copy.addEventListener("click", () => this.copy(copy));
    const button = find(".go-on");
    button.hidden = !goOn;
    button.textContent = goOn?.label ?? "";
    button.addEventListener("click", () => goOn.act(this));
  }

  /** So many of them, numbered where there are several. */
  static several(name, count, options) {
    return Array.from({ length: count }, (_, i) => new Result(count > 1 ? `${name} ${i + 1}` : name, options));
  }

  push({ text, tokens, finish }) {
    this.text.push(text, tokens);
    this.finish ??= finish;
    if (finish) this.end();
  }

  /** The text gets no further. why: in words, where it is not the server that says so. */
  end(why = ENDS[this.finish] ?? this.finish) {
    if (!this.card.classList.contains("writing")) return;
    this.card.classList.remove("writing");
    this.text.finish();
    const count = this.text.tokens.length;
    this.state.textContent = `${count} token${count === 1 ? "" : "s"}, ${why}`;
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.text.text);
      button.textContent = "Copied";
    } catch {
      // Browsers give the clipboard only to https and localhost: select the text, for the keyboard.
      const { element } = this.text;
      getSelection().setBaseAndExtent(element, 1, element, element.childNodes.length); // without the prompt, child 0
      button.textContent = "Selected: press Ctrl C";
    }
    setTimeout(() => (button.textContent = "Copy"), 3000);
  }
}
