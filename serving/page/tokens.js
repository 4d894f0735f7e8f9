// Text as tokens: a span for each, coloured by its probability, with its alternatives on a tip.

import {$, element} from "/page/common.js";

// The text of one sample. A character whose bytes are spread over tokens gets a span for them all.
export class TokenText {
  constructor(className, ...before) {
    this.box = element("div", {className, tabIndex: 0, role: "group", ariaLabel: "generated text"});
    this.box.append(...before);
    this.box.onkeydown = event => this.move(event);
    this.box.onpointerover = event => { event.target.tip ? showTip(event.target) : hideTip(); };
    this.box.onpointerleave = this.box.onfocusout = hideTip;
    this.text = "";   // what the server says that the sample has
    this.shown = 0;   // characters in spans
    this.tokens = this.current = 0;
    this.bytes = []; this.logprob = 0; this.spans = [];
  }

  // entries: the text's tokens, {token, logprob, top: {token: logprob}}.
  add(text, entries, finished) {
    this.text += text;
    for (const entry of entries) this.token(entry);
    if (!finished) return;
    if (this.bytes.length) this.span("\ufffd", {});
    const length = [...this.text].length;
    for (const span of this.spans)   // a stop string, or the token that ends a turn
      if (span.offset >= length) span.classList.add("cut");
  }

  token({token, logprob, top}) {
    this.tokens++;
    this.logprob += logprob;
    if (token.startsWith("bytes:")) {
      this.bytes.push(...token.slice(6).split("\\x").slice(1).map(hex => parseInt(hex, 16)));
      try {
        token = new TextDecoder("utf-8", {fatal: true}).decode(new Uint8Array(this.bytes));
      } catch { return; }
    } else if (this.bytes.length) token = "\ufffd" + token;
    this.span(token, top);
  }

  span(text, top) {
    const p = Math.exp(this.logprob);
    const rows = Object.entries(top).sort((a, b) => b[1] - a[1]).map(([token, logprob]) =>
      `${(100 * Math.exp(logprob)).toFixed(1).padStart(5)}%  ${JSON.stringify(token)}`);
    const tip = `${JSON.stringify(text)}  ${(100 * p).toFixed(1)}%\n\n` + rows.join("\n");
    this.append(text, p.toFixed(3), tip);
    this.bytes = []; this.logprob = 0;
  }

  append(text, p, tip) {
    const span = element("span", {className: "token", textContent: text, tip, offset: this.shown});
    span.style.setProperty("--p", p);
    this.shown += [...text].length;
    this.box.append(span);
    this.spans.push(span);
  }

  // What `restore` makes the same text of.
  saved() {
    const spans = this.spans.map(span =>
      [span.textContent, span.style.getPropertyValue("--p"), span.tip]);
    return {text: this.text, tokens: this.tokens, spans};
  }

  restore({text, tokens, spans}) {
    for (const span of spans) this.append(...span);
    this.tokens = tokens;
    this.add(text, [], true);
    return this;
  }

  move(event) {
    const far = this.spans.length;
    const step = {ArrowRight: 1, ArrowLeft: -1, Home: -far, End: far}[event.key];
    if (!step || !far) return;
    event.preventDefault();
    this.current = Math.min(Math.max(this.current + step, 0), far - 1);
    showTip(this.spans[this.current]);
    this.spans[this.current].classList.add("at");
  }
}

export function showTip(target, x, y) {
  hideTip();
  const tip = $("tip"), box = target.getBoundingClientRect();
  tip.textContent = target.tip;
  tip.hidden = false;
  const right = scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8;
  const below = (y ?? box.bottom) + 8, above = (y ?? box.top) - tip.offsetHeight - 8;
  const isLow = below + tip.offsetHeight > innerHeight && above > 0;
  tip.style.left = `${Math.max(Math.min((x ?? box.left) + scrollX, right), 4)}px`;
  tip.style.top = `${scrollY + (isLow ? above : below)}px`;
}

// Returns whether there was one.
export function hideTip() {
  const was = !$("tip").hidden;
  $("tip").hidden = true;
  document.querySelector(".at")?.classList.remove("at");
  return was;
}
