// What all parts of the page use: elements, requests, streams of events, what the browser keeps.

export const $ = id => document.getElementById(id);

export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function button(text, onclick, className = "") {
  return element("button", {type: "button", textContent: text, onclick, className});
}

// Whatever is wrong, its sentence is an Error's message.
export async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server does not answer");
  }
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

export function post(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  return ask(path, {method: "POST", signal, headers, body: JSON.stringify(body)});
}

// The objects of a stream of server-sent events.
export async function* events(response) {
  const decoder = new TextDecoder(), reader = response.body.getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += decoder.decode(value, {stream: true});
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts)
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

// The chunks of an answer; one that does not come to its end is an Error.
export async function* chunks(response) {
  let ended = false;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    ended ||= Boolean(chunk.usage);
    yield chunk;
  }
  if (!ended) throw new Error("the answer broke off");
}

// What to tell of a request that has ended early. What a lost connection throws has each browser's
// own words.
export function failure(error) {
  if (error.name === "AbortError") return "stopped";
  return error instanceof TypeError ? "the connection broke off" : error.message;
}

export async function copy(text, pressed) {
  await navigator.clipboard.writeText(text);
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => { pressed.textContent = before; }, 1000);
}

// Browsers let only pages of this machine, or of https, write to the clipboard.
export const canCopy = Boolean(navigator.clipboard);

// How fast an answer came: {started, first, last} in ms of performance.now(), and its tokens.
export function speed({started, first, last}, tokens) {
  if (!first) return "";
  const wait = `first after ${((first - started) / 1000).toFixed(2)} s`;
  if (tokens < 2 || last <= first) return wait;
  return `${((tokens - 1) * 1000 / (last - first)).toFixed(1)} tokens/s, ${wait}`;
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Returns whether there was room for it.
export function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
