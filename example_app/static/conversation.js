// What was asked and answered in this tab. A reload keeps it, closing the tab forgets it.

const KEY = "bayleaf.conversation";

export const INTERRUPTED = {
  code: "interrupted",
  message: "The page was left while this was being written.",
};

/**
 * One question and its answer.
 *
 * state: "waiting" → "writing" → "done" | "stopped" | "failed"
 * ttftSeconds, tokensPerSecond: null until measured.
 * error: {code, message, retryAfterSeconds} when failed.
 */
export function newExchange(question, model) {
  return { question, ...unanswered(model) };
}

/** The fields that asking again starts from. */
export function unanswered(model) {
  return {
    model,
    answer: "",
    state: "waiting",
    finishReason: null,
    ttftSeconds: null,
    tokensPerSecond: null,
    error: null,
  };
}

export class Conversation {
  exchanges = [];

  /** The messages to send for the answer of *exchange*: what came before, and its question. */
  messagesFor(exchange) {
    const before = this.exchanges.slice(0, this.exchanges.indexOf(exchange));
    return [
      // A question that got no word of an answer is left out with it: many models insist
      // that user and assistant take turns.
      ...before.filter(({ answer }) => answer).flatMap(({ question, answer }) => [
        { role: "user", content: question },
        { role: "assistant", content: answer },
      ]),
      { role: "user", content: exchange.question },
    ];
  }

  save() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.exchanges));
    } catch {
      // Storage is full or forbidden: the conversation goes on, a reload will lose it.
    }
  }

  load() {
    try {
      this.exchanges = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
    } catch {
      this.exchanges = [];
    }
    for (const exchange of this.exchanges) {
      if (exchange.state !== "waiting" && exchange.state !== "writing") continue;
      exchange.state = "failed";
      exchange.error = INTERRUPTED;
    }
  }

  clear() {
    this.exchanges = [];
    this.save();
  }
}
