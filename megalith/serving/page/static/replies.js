/** Requests for completions and chat completions, and one form for what comes back from both. */

const ALTERNATIVES = 5;

/** Path and body of a request. conversation: messages, or a prompt's text. Beams come all at once, and only with the
 * probabilities of their own tokens. */
export function ask(conversation, fields) {
  const beams = fields.beam_width !== undefined;
  const alternatives = beams ? 0 : ALTERNATIVES;
  if (typeof conversation === "string") {
    return ["v1/completions", { prompt: conversation, ...fields, stream: !beams, logprobs: alternatives }];
  }
  const logprobs = { logprobs: true, top_logprobs: alternatives };
  return ["v1/chat/completions", { messages: conversation, ...fields, stream: !beams, ...logprobs }];
}

/** What an answer, or a part of a stream, adds to each result: [{index, text, tokens, finish}]. */
export function pieces(found) {
  return found.choices.map((choice) => ({
    index: choice.index,
    text: choice.text ?? (choice.delta ?? choice.message).content ?? "",
    tokens: choice.logprobs ? tokens(choice.logprobs) : [],
    finish: choice.finish_reason,
  }));
}

/** [{name, logprob, alternatives: [{name, logprob}]}], likeliest alternative first. Where the text of a token starts
 * is told by `offset` (completions) or follows from `bytes` (chat). */
function tokens(logprobs) {
  if (logprobs.content !== undefined) {
    return (logprobs.content ?? []).map((each) => ({
      name: each.token,
      logprob: each.logprob,
      bytes: each.bytes,
      alternatives: each.top_logprobs.map(({ token, logprob }) => ({ name: token, logprob })),
    }));
  }
  return logprobs.tokens.map((name, i) => ({
    name,
    logprob: logprobs.token_logprobs[i],
    offset: logprobs.text_offset[i],
    alternatives: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([name, logprob]) => ({ name, logprob }))
      .sort((one, other) => other.logprob - one.logprob),
  }));
}
