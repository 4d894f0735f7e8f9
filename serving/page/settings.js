// The settings that chats and completions share, each with what the API says of it.

import {$, ask} from "/page/common.js";

const knobs = [...document.querySelectorAll(".knobs input")];

const DEFAULTS = {
  chat: {max_tokens: "512", temperature: "0"},
  completion: {max_tokens: "64", temperature: "0.8"},
};
const PLACEHOLDERS = {chat: "what fits", completion: "16"};

// What a request says: the settings that are not empty.
export function parameters() {
  const body = {};
  for (const knob of knobs)
    if (knob.value !== "" && !knob.parentElement.hidden)
      body[knob.name] = knob.type === "number" ? Number(knob.value) : knob.value;
  return body;
}

// Settings that have not been touched get the values that suit the mode.
export function suit(mode) {
  for (const knob of knobs) {
    if (!knob.dataset.touched) knob.value = DEFAULTS[mode][knob.name] ?? "";
    if (knob.name === "max_tokens") knob.placeholder = PLACEHOLDERS[mode];
    if (knob.name === "n") knob.parentElement.hidden = mode === "chat";
  }
  tellInEffect();
}

function tellInEffect() {
  const given = Object.entries(parameters()).map(([name, value]) => `${name} ${value}`);
  $("in-effect").textContent = given.join(", ");
}

function explain(knob, properties) {
  const text = properties[knob.name]?.description;
  if (!text) return;
  const show = () => { $("knob-help").textContent = `${knob.name}: ${text}`; };
  knob.onfocus = knob.parentElement.onpointerenter = show;
  knob.parentElement.title = text;
}

export async function prepareSettings() {
  for (const knob of knobs)
    knob.oninput = () => { knob.dataset.touched = "yes"; tellInEffect(); };
  const {paths, components: {schemas}} = await (await ask("/openapi.json")).json();
  for (const knob of knobs) explain(knob, schemas.CompletionRequest.properties);
  return paths;
}
