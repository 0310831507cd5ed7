/** A conversation: what was said, and which of several replies it goes on with. */

import { Result } from "./results.js";

const list = document.querySelector("#turns");
const system = document.querySelector("#system");

/** Turns, each what the user said and the model's replies to it, of which `chosen` counts. */
export class Chat {
  turns = [];

  /** The messages of a request that says `text` next. */
  messages(text) {
    const first = system.value.trim() ? [{ role: "system", content: system.value }] : [];
    const before = this.turns.flatMap(({ said, chosen }) => [
      { role: "user", content: said },
      { role: "assistant", content: chosen.text.text },
    ]);
    return [...first, ...before, { role: "user", content: text }];
  }

  /** A new turn of so many replies, on the page too; the replies are returned. */
  add(said, count) {
    const turn = { said, part: document.createElement("div") };
    const bubble = document.createElement("div");
    bubble.className = "said";
    const words = document.createElement("p");
    words.textContent = said;
    bubble.append(words);
    const replies = document.createElement("div");
    replies.className = "results";
    const choose = (result) => {
      turn.chosen = result;
      for (const { card } of results) {
        card.classList.toggle("chosen", count > 1 && card === result.card);
        card.querySelector(".go-on").setAttribute("aria-pressed", card === result.card);
      }
    };
    const goOn = count > 1 ? { label: "Go on with this", act: choose } : undefined;
    const results = Result.several("Reply", count, { goOn });
    choose(results[0]);
    replies.append(...results.map((each) => each.card));
    turn.part.append(bubble, replies);
    list.append(turn.part);
    this.turns.push(turn);
    return results;
  }

  /** Take the last turn back; what was said in it. */
  takeBack() {
    const turn = this.turns.pop();
    turn?.part.remove();
    return turn?.said ?? "";
  }

  clear() {
    this.turns = [];
    list.replaceChildren();
  }
}
