// Puts the page together: which parts it has, the keys, and the connection to the server.

import {$, ask, keep, recall} from "/page/common.js";
import {prepareChat, stopAnswer} from "/page/chat.js";
import {prepareCompletions, stopAll} from "/page/completion.js";
import {state, watchPool} from "/page/pool.js";
import {prepareSettings, suit} from "/page/settings.js";
import {hideTip} from "/page/tokens.js";

const WIDE = matchMedia("(min-width: 60rem)");

let model = null;  // its card

function choose(mode) {
  const isChat = mode === "chat";
  $("chat").hidden = !isChat;
  $("form").hidden = $("completions").hidden = isChat;
  $("chat-tab").ariaPressed = isChat;
  $("completion-tab").ariaPressed = !isChat;
  $("settings").open = !isChat && WIDE.matches;
  suit(mode);
  keep("mode", mode);
  $(isChat ? "say" : "prompt").focus({preventScroll: true});
}

// Asks the server what it serves, once; returns the tokens of the model's context.
async function meetModel() {
  if (model) return model.max_model_len;
  const {data: [card]} = await (await ask("/v1/models")).json();
  const paths = await prepareSettings();
  const chats = "/v1/chat/completions" in paths;
  $("model").textContent = `${card.id}, context of ${card.max_model_len} tokens`;
  if (chats) prepareChat(card.id);
  prepareCompletions(card.id);
  $("chat-tab").hidden = $("completion-tab").hidden = !chats;
  choose(chats ? recall("mode", "chat") : "completion");
  model = card;
  return card.max_model_len;
}

// Esc closes a tip and, if there is none, stops what is coming.
function onKey(event) {
  const isSend = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (isSend && !$("form").hidden) $("form").requestSubmit();
  if (event.key !== "Escape" || hideTip()) return;
  stopAll();
  stopAnswer();
}

addEventListener("keydown", onKey);
$("chat-tab").onclick = () => choose("chat");
$("completion-tab").onclick = () => choose("completion");
state("asking the server ...");
watchPool(meetModel);
