// A conversation: turns, the answer as it comes, edit and retry. What is said is shown as plain text.

import {$, button, canCopy, chunks, copy, element, failure, keep, post, recall, speed}
  from "/page/common.js";
import {foundAgain, running} from "/page/pool.js";
import {parameters} from "/page/settings.js";
import {TokenText} from "/page/tokens.js";

let turns = [];       // {role, content, saved, about, isError}; the last two tell of an answer
let name = "chat";    // by which the browser keeps the conversation
let abort = null;     // of the answer that is coming

export const stopAnswer = () => abort?.abort();

// At temperature 0 the answer would be the same again.
const RETRY_TEMPERATURE = 0.7;

const save = () => keep(name, {system: $("system").value, turns});

function messages() {
  const system = $("system").value.trim();
  const said = turns.filter(turn => turn.content !== "");
  const list = said.map(({role, content}) => ({role, content}));
  return system ? [{role: "system", content: system}, ...list] : list;
}

// Everything anew, but for an answer that is coming, which has its own element.
function show() {
  $("turns").replaceChildren(...turns.map(turnElement));
  scrollDown();
}

function scrollDown() {
  $("turns").scrollTop = $("turns").scrollHeight;
}

function turnElement(turn, number) {
  const isAnswer = turn.role === "assistant";
  const box = element("div", {className: `turn ${turn.role}`});
  const bubble = isAnswer && turn.saved ? new TokenText("bubble").restore(turn.saved).box
    : element("div", {className: "bubble", textContent: turn.content});
  box.append(bubble, about(turn, number, box));
  return box;
}

function about(turn, number, box) {
  const told = element("span", {textContent: turn.about ?? "", className: turn.isError ? "error" : ""});
  const line = element("div", {className: "about"}, told);
  if (canCopy && turn.content) {
    const pressed = button("Copy", () => copy(turn.content, pressed));
    line.append(pressed);
  }
  if (turn.role === "user") line.append(button("Edit", () => edit(number, box)));
  if (turn.role === "assistant") line.append(button("Retry", () => answerAfter(number, true)));
  return line;
}

function edit(number, box) {
  if (abort) return;
  const text = element("textarea", {value: turns[number].content, rows: 3, ariaLabel: "message"});
  const send = () => {
    if (!text.value.trim()) return;
    turns[number].content = text.value.trim();
    answerAfter(number + 1);
  };
  const line = element("div", {className: "about"}, button("Send", send), button("Cancel", show));
  text.onkeydown = event => sendOnEnter(event, send);
  box.replaceChildren(text, line);
  text.focus();
}

// An input method's Enter takes a suggestion, and sends nothing.
function sendOnEnter(event, send) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

// Forgets what came after the first `count` turns, and answers those.
function answerAfter(count, isRetry = false) {
  if (abort) return;
  turns = turns.slice(0, count);
  show();
  answer(isRetry);
}

async function answer(isRetry = false) {
  const text = new TokenText("bubble"), told = element("span", {textContent: "waiting ..."});
  const box = element("div", {className: "turn assistant"}, text.box,
    element("div", {className: "about"}, told));
  $("turns").append(box);
  scrollDown();
  abort = new AbortController();
  busy(true);
  const turn = {role: "assistant"};
  try {
    turn.about = await stream(text, told, abort.signal, isRetry);
  } catch (error) {
    const words = failure(error);
    turn.isError = words !== "stopped";
    turn.about = turn.isError ? words : `stopped; ${text.tokens} tokens`;
  }
  abort = null;
  busy(false);
  turns.push(Object.assign(turn, {content: text.text, saved: text.saved()}));
  save();
  show();
}

// Shows the answer while it comes; returns what to tell of it.
async function stream(text, told, signal, isRetry) {
  const times = {started: performance.now()};
  const settings = parameters();
  if (isRetry && settings.temperature === 0) settings.temperature = RETRY_TEMPERATURE;
  const body = {messages: messages(), stream: true, logprobs: true, top_logprobs: 5,
    stream_options: {include_usage: true}, ...settings};
  const response = await post("/v1/chat/completions", body, signal);
  const id = response.headers.get("x-request-id");
  running.set(id, text.box);
  try {
    let usage, reason;
    for await (const chunk of chunks(response)) {
      for (const choice of chunk.choices) {
        times.first ??= performance.now();
        times.last = performance.now();
        addChoice(text, choice);
        reason = choice.finish_reason;
      }
      usage = chunk.usage;
      told.textContent = `${text.tokens} tokens, ${speed(times, text.tokens)}`;
    }
    const drawn = isRetry ? `, temperature ${settings.temperature ?? 1}` : "";
    return conclusion(usage, reason, times, foundAgain(id)) + drawn;
  } finally {
    running.delete(id);
  }
}

function conclusion(usage, reason, times, pages) {
  const parts = [`${usage.completion_tokens} tokens`, speed(times, usage.completion_tokens),
    `${usage.prompt_tokens} before`];
  if (pages) parts.push(`${pages} pages of them found again`);
  if (reason === "length") parts.push("cut at max_tokens");
  return parts.join(", ");
}

function addChoice(text, {delta, logprobs, finish_reason}) {
  const entries = (logprobs?.content ?? []).map(({token, logprob, top_logprobs}) => {
    const top = Object.fromEntries(top_logprobs.map(other => [other.token, other.logprob]));
    return {token, logprob, top};
  });
  const list = $("turns"), isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  text.add(delta.content, entries, finish_reason);
  if (isAtEnd) scrollDown();
}

function busy(isBusy) {
  $("send").hidden = isBusy;
  $("stop-answer").hidden = !isBusy;
  $("turns").ariaBusy = isBusy;
}

function say() {
  const content = $("say").value.trim();
  if (!content || abort) return;
  turns.push({role: "user", content});
  $("say").value = "";
  save();
  show();
  answer();
}

export function prepareChat(model) {
  name = `chat with ${model}`;
  const kept = recall(name, {system: "", turns: []});
  turns = kept.turns;
  $("system").value = kept.system;
  $("system").oninput = save;
  $("system-box").open = kept.system !== "";
  $("say-form").onsubmit = event => { event.preventDefault(); say(); };
  $("say").onkeydown = event => sendOnEnter(event, say);
  $("stop-answer").onclick = stopAnswer;
  $("clear").onclick = () => {
    stopAnswer();
    turns = [];
    save();
    show();
  };
  const colour = () => $("turns").classList.toggle("uncoloured", !$("colours").checked);
  $("colours").onchange = colour;
  colour();
  show();
}
