// The chat page: what the reader does, and one answer at a time.

import { Autoscroll } from "./autoscroll.js";
import { CompletionError, listModels, streamCompletion } from "./completion.js";
import { Conversation, INTERRUPTED, newExchange, unanswered } from "./conversation.js";
import { ExchangeView } from "./exchange-view.js";
import { Stopwatch } from "./stopwatch.js";

const MODEL_KEY = "bayleaf.model";
// A small model may go on for ever; this is about a page.
const MAX_TOKENS = 512;

const byId = (id) => document.getElementById(id);
const { api, defaultModel } = byId("main").dataset;
const transcript = byId("transcript");
const prompt = byId("prompt");
const model = byId("model");

const conversation = new Conversation();
const views = new Map();
const autoscroll = new Autoscroll(transcript, showControls);
let running = null; // the AbortController of the answer under way
let leaving = false; // the browser cuts the stream when the page is left or reloaded

function show(exchange) {
  const view = new ExchangeView(exchange, () => {
    if (running) return;
    Object.assign(exchange, unanswered(model.value));
    answer(exchange);
  });
  views.set(exchange, view);
  byId("exchanges").append(view.root);
}

function showControls() {
  const empty = conversation.exchanges.length === 0;
  byId("welcome").hidden = !empty;
  byId("clear").hidden = empty || running !== null;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("latest").hidden = empty || autoscroll.following;
  document.body.classList.toggle("answering", running !== null);
}

/** Streams the answer of *exchange*; never throws, whatever happens is shown there. */
async function answer(exchange) {
  const view = views.get(exchange);
  const stopwatch = new Stopwatch();
  const controller = new AbortController();
  let completionTokens = null;
  running = controller;
  view.update();
  conversation.save();
  showControls();
  moveFocus();
  keepUp();

  const paint = painter(view);
  try {
    const body = {
      model: exchange.model || undefined,
      messages: conversation.messagesFor(exchange),
      max_tokens: MAX_TOKENS,
    };
    for await (const part of streamCompletion({ api, body, signal: controller.signal })) {
      completionTokens = part.completionTokens ?? completionTokens;
      exchange.finishReason = part.finishReason ?? exchange.finishReason;
      if (!part.text) continue;
      stopwatch.piece();
      exchange.answer += part.text;
      view.append(part.text);
      paint();
      if (exchange.state === "waiting") {
        exchange.state = "writing";
        exchange.ttftSeconds = stopwatch.ttftSeconds;
        view.update();
      }
    }
    exchange.state = "done";
  } catch (error) {
    if (controller.signal.aborted) {
      exchange.state = "stopped";
    } else {
      exchange.state = "failed";
      exchange.error = asShown(error);
    }
  }

  running = null;
  exchange.tokensPerSecond = stopwatch.tokensPerSecond(completionTokens);
  view.update();
  conversation.save();
  showControls();
  keepUp();
}

function asShown(error) {
  if (leaving) return INTERRUPTED;
  if (error instanceof CompletionError) {
    const { code, message, retryAfterSeconds } = error;
    return { code, message, retryAfterSeconds };
  }
  console.error(error);
  return { code: "page_error", message: "Something in this page failed." };
}

/** Call it when there is text: it is shown with the next frame, all that came until then. */
function painter(view) {
  let scheduled = false;
  return () => {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      view.flush();
      keepUp();
    });
  };
}

function send() {
  const question = prompt.value.trim();
  if (!question || running) return;
  const exchange = newExchange(question, model.value);
  conversation.exchanges.push(exchange);
  show(exchange);
  prompt.value = "";
  fitPrompt();
  autoscroll.follow();
  answer(exchange);
}

function stop() {
  if (!running) return;
  running.abort();
  moveFocus();
}

/** A button that was just pressed may be gone: focus must not fall back to the page's top. */
function moveFocus() {
  // On a touch screen the prompt would bring the keyboard up over the answer.
  const target = matchMedia("(hover: hover)").matches || document.activeElement === prompt ? prompt : transcript;
  target.focus({ preventScroll: true });
}

function keepUp() {
  if (conversation.exchanges.length > 0) autoscroll.keepUp(); // the welcome starts at its top
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  keepUp();
}

async function fillModels() {
  let ids;
  try {
    ids = await listModels(api);
  } catch {
    // The server picks its default; if it is down, sending will say so where it is seen.
    model.replaceChildren(new Option("default", ""));
    return;
  }
  model.replaceChildren(...ids.map((id) => new Option(id, id)));
  const wanted = [sessionStorage.getItem(MODEL_KEY), defaultModel].find((id) => ids.includes(id));
  if (wanted) model.value = wanted;
}

/** iOS lays its keyboard over the page instead of making the page smaller. */
function fitAboveKeyboard() {
  const { height, scale } = window.visualViewport;
  if (scale !== 1) return; // pinched, not covered
  document.documentElement.style.setProperty("--visible-height", `${height}px`);
  window.scrollTo(0, 0);
  keepUp();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  // isComposing: this Enter picks a word from an input method's list.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fitPrompt);
byId("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
byId("clear").addEventListener("click", () => {
  conversation.clear();
  views.clear();
  byId("exchanges").replaceChildren();
  showControls();
  moveFocus();
});
byId("latest").addEventListener("click", () => autoscroll.follow());
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    fitPrompt();
    prompt.focus();
  });
}
model.addEventListener("change", () => sessionStorage.setItem(MODEL_KEY, model.value));
window.visualViewport?.addEventListener("resize", fitAboveKeyboard);
window.addEventListener("resize", fitPrompt);
window.addEventListener("beforeunload", () => {
  leaving = true;
});
window.addEventListener("pageshow", () => {
  leaving = false; // back from the browser's cache
});
window.addEventListener("pagehide", () => conversation.save());

conversation.load();
conversation.exchanges.forEach(show);
showControls();
fitPrompt();
keepUp();
if (matchMedia("(hover: hover)").matches) prompt.focus();
fillModels();
