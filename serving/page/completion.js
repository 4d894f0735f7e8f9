// Text completion: a prompt, and one output for each time it is sent.

import {$, button, canCopy, chunks, copy, element, failure, keep, post, recall, speed}
  from "/page/common.js";
import {running} from "/page/pool.js";
import {parameters} from "/page/settings.js";
import {TokenText} from "/page/tokens.js";

const MOST_KEPT = 20;  // outputs that are there after a reload

const aborts = new Set();
let outputs = [];      // the newest first: {prompt, status, samples} of what has ended
let name = "outputs";  // by which the browser keeps them

const sampleText = prompt =>
  new TokenText("text", element("span", {className: "dim", textContent: prompt}));

const tokensOf = samples => samples.reduce((sum, sample) => sum + sample.tokens, 0);

class OutputCard {
  constructor(prompt, samples) {
    this.status = element("span", {className: "dim", role: "status"});
    this.buttons = element("span", {className: "row"});
    this.samples = samples;
    const head = element("header", {}, this.status, this.buttons);
    this.box = element("section", {className: "card output"}, head, ...samples.map(s => s.box));
    if (!canCopy) return;
    const text = () => samples.map(sample => prompt + sample.text).join("\n\n");
    const pressed = button("Copy", () => copy(text(), pressed), "small");
    this.buttons.append(pressed);
  }

  say(text, isError = false) {
    this.status.textContent = text;
    this.status.classList.toggle("error", isError);
  }
}

// Shows the answer in the card while it comes; returns what to tell of it.
async function stream(body, card, signal) {
  const times = {started: performance.now()}, reasons = [];
  const response = await post("/v1/completions", body, signal);
  const id = response.headers.get("x-request-id");
  running.set(id, card.box);
  try {
    let usage;
    for await (const chunk of chunks(response)) {
      for (const choice of chunk.choices) {
        times.first ??= performance.now();
        times.last = performance.now();
        addChoice(card.samples[choice.index], choice);
        if (choice.finish_reason) reasons[choice.index] = choice.finish_reason;
      }
      usage = chunk.usage;
      card.say(`${tokensOf(card.samples)} tokens, ${speed(times, tokensOf(card.samples))}`);
    }
    const tokens = usage.completion_tokens;
    return `${usage.prompt_tokens} prompt tokens, ${tokens} new, ${speed(times, tokens)}; ` +
      reasons.join(", ");
  } finally {
    running.delete(id);
  }
}

function addChoice(sample, {text, logprobs, finish_reason}) {
  const entries = (logprobs?.tokens ?? []).map((token, i) =>
    ({token, logprob: logprobs.token_logprobs[i], top: logprobs.top_logprobs[i]}));
  sample.add(text, entries, finish_reason);
}

async function generate() {
  const prompt = $("prompt").value, abort = new AbortController();
  const body = {prompt, stream: true, logprobs: 5, stream_options: {include_usage: true},
    ...parameters()};
  const samples = Array.from({length: body.n ?? 1}, () => sampleText(prompt));
  const card = new OutputCard(prompt, samples);
  const stop = button("Stop", () => abort.abort(), "small");
  card.buttons.append(stop);
  card.say("waiting ...");
  $("outputs").prepend(card.box);
  aborts.add(abort);
  try {
    card.say(await stream(body, card, abort.signal));
  } catch (error) {
    const told = failure(error), stopped = told === "stopped";
    card.say(stopped ? `stopped; ${card.status.textContent}` : told, !stopped);
  }
  aborts.delete(abort);
  stop.remove();
  if (tokensOf(samples)) remember(prompt, card);
}

function remember(prompt, card) {
  const status = card.status.textContent;
  outputs.unshift({prompt, status, samples: card.samples.map(sample => sample.saved())});
  outputs = outputs.slice(0, MOST_KEPT);
  while (!keep(name, outputs) && outputs.length) outputs.pop();
}

export const stopAll = () => aborts.forEach(abort => abort.abort());

export function prepareCompletions(model) {
  name = `outputs of ${model}`;
  outputs = recall(name, []);
  for (const {prompt, status, samples} of outputs) {
    const card = new OutputCard(prompt, samples.map(saved => sampleText(prompt).restore(saved)));
    card.say(status);
    $("outputs").append(card.box);
  }
  $("form").onsubmit = event => { event.preventDefault(); generate(); };
  $("stop-all").onclick = stopAll;
  $("forget").onclick = () => {
    outputs = [];
    keep(name, outputs);
    $("outputs").replaceChildren();
  };
}
