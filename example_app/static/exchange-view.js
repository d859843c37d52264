// One exchange on the page. Model text only ever becomes text nodes.

const NOTES = {
  stopped: "You stopped this answer.",
  length: "The answer reached its length limit.",
  content_filter: "The answer was cut by a content filter.",
  empty: "The model had nothing to say.",
};

export class ExchangeView {
  #exchange;
  #text = document.createTextNode("");
  #pending = "";

  constructor(exchange, onRetry) {
    this.#exchange = exchange;
    this.root = document.getElementById("exchange").content.firstElementChild.cloneNode(true);
    this.#find("[data-role=user] .text").textContent = exchange.question;
    this.#find(".answer").append(this.#text);
    this.#find("[data-testid=retry]").addEventListener("click", onRetry);
    this.update();
  }

  /** Takes a piece of the answer; `flush` shows it. */
  append(text) {
    this.#pending += text;
  }

  /** Shows what came since the last time: one append a frame, however many tokens. */
  flush() {
    if (!this.#pending) return;
    this.#text.appendData(this.#pending);
    this.#pending = "";
  }

  /** Shows the exchange as it is now. */
  update() {
    const { answer, model, state, error } = this.#exchange;
    const underWay = state === "waiting" || state === "writing";
    this.#pending = "";
    if (this.#text.data !== answer) this.#text.data = answer;

    const reply = this.#find("[data-role=assistant]");
    reply.dataset.state = state;
    // Read out when it is complete, not word by word.
    reply.setAttribute("aria-busy", String(underWay));
    this.#find("[data-role=assistant] .speaker").textContent = model || "Model";
    this.#find(".answer").hidden = !answer && !underWay;
    this.#showTiming();
    this.#show("note", this.#note());
    this.#find("[data-testid=error]").hidden = !error;
    this.#find("[data-testid=error] p").textContent = error ? explain(error, answer) : "";
    reply.dataset.errorCode = error?.code ?? "";
  }

  #showTiming() {
    const { ttftSeconds, tokensPerSecond } = this.#exchange;
    this.#showTimed("ttft", ttftSeconds === null ? "" : `${seconds(ttftSeconds)} s`);
    this.#showTimed("tps", tokensPerSecond === null ? "" : `${rate(tokensPerSecond)} tokens/s`);
  }

  #note() {
    const { answer, state, finishReason } = this.#exchange;
    if (state === "stopped") return NOTES.stopped;
    if (state !== "done") return "";
    return NOTES[finishReason] ?? (answer ? "" : NOTES.empty);
  }

  #showTimed(testid, text) {
    this.#show(testid, text);
    this.#find(`[data-testid=${testid}]`).parentElement.hidden = !text;
  }

  #show(testid, text) {
    const element = this.#find(`[data-testid=${testid}]`);
    element.textContent = text;
    element.hidden = !text;
  }

  #find(selector) {
    return this.root.querySelector(selector);
  }
}

function explain({ message, retryAfterSeconds }, answer) {
  const where = answer ? "The answer broke off. " : "";
  const wait = retryAfterSeconds ? ` Best wait ${Math.ceil(retryAfterSeconds)} s.` : "";
  return where + message + wait;
}

function seconds(value) {
  return value < 10 ? value.toFixed(2) : value.toFixed(1);
}

function rate(value) {
  return value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
}
