// The pages of the KV cache, as the server tells of them after each step, and a short history.

import {$, ask, chunks, element, events, post} from "/page/common.js";
import {hideTip, showTip} from "/page/tokens.js";

export const running = new Map();  // X-Request-Id -> the element that shows its answer

const MOST_MOMENTS = 400;
const REPLAY_MS = 120;             // between two moments of a replay
const RETRY_MS = 1000;
const PROMPTS = 12;

const moments = [];    // {at, pool}, the newest last
const found = new Map();           // X-Request-Id -> pages that its prompt found in the cache
let isLive = true, replaying = null, view = null, context = 0;

const colour = request => `hsl(${request * 137.5 % 360} 65% ${cssValue("--light")})`;
const cssValue = property => getComputedStyle(document.documentElement).getPropertyValue(property);
const shownMoment = () => moments[isLive ? moments.length - 1 : Number($("moment").value)];

// How many pages of its prompt a request has found in the cache, as far as the moments tell.
export const foundAgain = id => found.get(id)?.size ?? 0;

function record(pool) {
  const before = moments.at(-1)?.pool;
  if (before) noteFound(before, pool);
  moments.push({at: performance.now(), pool});
  if (moments.length > MOST_MOMENTS) {
    moments.shift();
    if (!isLive) $("moment").value = Math.max(0, $("moment").value - 1);
  }
  $("moment").max = moments.length - 1;
  if (isLive) {
    $("moment").value = moments.length - 1;
    draw();
  }
}

// A page is found again if it was cached before its holder was there.
function noteFound(before, pool) {
  const cached = new Set(before.used.filter(page => page.cached).map(page => page.page));
  const old = new Set(before.used.flatMap(page => page.holders.map(([request]) => request)));
  for (const {page, holders} of pool.used) {
    if (!cached.has(page)) continue;
    for (const [request] of holders) {
      const id = pool.requests[request];
      if (old.has(request)) continue;
      if (!found.has(id)) found.set(id, new Set());
      found.get(id).add(page);
    }
  }
  while (found.size > MOST_MOMENTS) found.delete(found.keys().next().value);
}

function draw() {
  const moment = shownMoment();
  if (!moment) return;
  const {pool} = moment, canvas = $("pool"), scale = devicePixelRatio, width = canvas.clientWidth;
  const roomy = Math.floor(Math.sqrt(width * 420 / pool.pages));
  const cell = Math.max(4, Math.min(18, roomy)), columns = Math.floor(width / cell);
  const rows = Math.ceil(pool.pages / columns), used = new Map(pool.used.map(p => [p.page, p]));
  canvas.style.height = `${rows * cell}px`;
  canvas.width = width * scale;
  canvas.height = rows * cell * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  for (let number = 0; number < pool.pages; number++) {
    const x = number % columns * cell, y = Math.floor(number / columns) * cell;
    drawPage(pen, x, y, cell - 1, used.get(number), pool);
  }
  view = {cell, columns, used, pool};
  tell(moment);
}

function drawPage(pen, x, y, size, page, pool) {
  const [holder] = page?.holders ?? [];
  pen.fillStyle = holder ? colour(holder[0]) : cssValue(page ? "--cached" : "--free");
  pen.fillRect(x, y, size, size);
  if (!holder) return;
  if (page.holders.some(([request]) => found.get(pool.requests[request])?.has(page.page))) {
    pen.strokeStyle = cssValue("--text");
    pen.lineWidth = 1.5;
    pen.strokeRect(x + .75, y + .75, size - 1.5, size - 1.5);
  }
  if (page.holders.length > 1) {
    pen.fillStyle = cssValue("--back");
    pen.beginPath();
    pen.arc(x + size / 2, y + size / 2, Math.max(1, size / 5), 0, 7);
    pen.fill();
  }
}

function tell({at, pool}) {
  const held = pool.used.filter(page => page.holders.length);
  const cached = pool.used.length - held.length, free = pool.pages - 1 - pool.used.length;
  $("pool-text").textContent =
    `${held.length} of ${pool.pages - 1} pages of ${pool.page_size} tokens held. ` +
    `${pool.running} sequences running, ${pool.waiting} waiting. Of ${pool.queried_tokens} prompt ` +
    `tokens since the start, ${pool.hit_tokens} were found in the prefix cache.`;
  const seconds = (performance.now() - at) / 1000;
  $("moment-text").textContent = isLive ? "live" : `${seconds.toFixed(1)} s ago`;
  const {shared, alone} = countPages(held);
  const rows = [...alone].sort((a, b) => a[0] - b[0]).map(([request, pages]) =>
    requestRow(request, pages, pool));
  if (shared) rows.push(row("dot", `shared by several sequences: ${shared} pages`));
  rows.push(row("cached", `free, but still holding a beginning that can be found: ${cached} pages`));
  rows.push(row("free", `free and empty: ${free} pages`));
  $("legend").replaceChildren(...rows);
}

// Pages that several sequences hold are counted once, apart from those that a request has alone.
function countPages(held) {
  const alone = new Map();
  let shared = 0;
  for (const {holders} of held) {
    for (const [request] of holders) alone.set(request, alone.get(request) ?? 0);
    if (holders.length > 1) shared++;
    else alone.set(holders[0][0], alone.get(holders[0][0]) + 1);
  }
  return {shared, alone};
}

const row = (kind, text) =>
  element("li", {}, element("span", {className: `swatch ${kind}`}), text);

function requestRow(request, pages, pool) {
  const id = pool.requests[request], answer = running.get(id);
  const again = foundAgain(id) ? `, ${foundAgain(id)} found again` : "";
  const item = row("", `request ${request}${answer ? " (from here)" : ""}: ${pages} pages alone${again}`);
  item.firstChild.style.background = colour(request);
  if (answer) answer.style.borderLeftColor = colour(request);
  return item;
}

function pointAt(event) {
  const column = view && Math.floor(event.offsetX / view.cell);
  const number = view && Math.floor(event.offsetY / view.cell) * view.columns + column;
  if (!view || column >= view.columns || number >= view.pool.pages) return hideTip();
  const page = view.used.get(number);
  const holders = (page?.holders ?? []).map(([request, i]) => `request ${request}, sample ${i}`);
  event.target.tip = `page ${number}${number ? "" : ", the null page"}\n` +
    (holders.join("\n") || "free") + (page?.cached ? "\nin the prefix cache" : "");
  showTip(event.target, event.clientX + 8, event.clientY + 8);
}

function replay() {
  if (replaying) return endReplay();
  isLive = false;
  if (Number($("moment").value) >= moments.length - 1) $("moment").value = 0;
  $("replay").textContent = "Pause";
  replaying = setInterval(() => {
    $("moment").value = Number($("moment").value) + 1;
    if (Number($("moment").value) >= moments.length - 1) goLive();
    draw();
  }, REPLAY_MS);
}

function endReplay() {
  clearInterval(replaying);
  replaying = null;
  $("replay").textContent = "Replay";
}

function goLive() {
  endReplay();
  isLive = true;
}

function chooseMoment() {
  endReplay();
  isLive = Number($("moment").value) >= moments.length - 1;
  draw();
}

// Twelve prompts, of which the first shows that its beginning has been computed before the others.
async function fill() {
  $("fill").disabled = true;
  const shared = "def shared(beginning):\n    # every one of these prompts begins so\n    return ";
  const length = Math.max(8, Math.min(96, Math.floor(context / 4)));
  let sent = 0;
  const send = async onFirst => {
    const prompt = `${shared.slice(0, Math.floor(context / 4))}${sent++}`;
    const body = {prompt, max_tokens: length, stream: true, ignore_eos: true, seed: sent,
      stream_options: {include_usage: true}};
    for await (const _ of chunks(await post("/v1/completions", body))) onFirst?.();
  };
  try {
    let others = null;
    const sendOthers = () => {
      others ??= Promise.all(Array.from({length: PROMPTS - 1}, () => send()));
    };
    await send(sendOthers);
    await others;
    $("fill-text").textContent = `${PROMPTS} prompts were answered; Replay shows it slowly.`;
  } catch (error) {
    $("fill-text").textContent = error.message;
  }
  $("fill").disabled = false;
}

export function state(text, isBad = false) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").classList.toggle("error", isBad);
  $("pool").parentElement.classList.toggle("stale", isBad);
}

const pause = milliseconds => new Promise(resolve => { setTimeout(resolve, milliseconds); });

async function untilSeen() {
  while (document.hidden)
    await new Promise(done => document.addEventListener("visibilitychange", done, {once: true}));
}

// Follows the pool for as long as the page is seen. beforeFirst: what to ask the server first.
export async function watchPool(beforeFirst) {
  $("pool").onpointermove = pointAt;
  $("pool").onpointerleave = hideTip;
  $("moment").oninput = chooseMoment;
  $("replay").onclick = replay;
  $("fill").onclick = fill;
  addEventListener("resize", draw);
  for (;;) {
    await untilSeen();
    const abort = new AbortController(), onHide = () => { if (document.hidden) abort.abort(); };
    document.addEventListener("visibilitychange", onHide);
    try {
      context = await beforeFirst();
      const response = await ask("/pool/events", {signal: abort.signal});
      state("ready");
      for await (const pool of events(response)) record(pool);
    } catch (error) {
      if (error.name !== "AbortError") state(error.message, true);
    }
    document.removeEventListener("visibilitychange", onHide);
    if (!document.hidden) await pause(RETRY_MS);
  }
}
