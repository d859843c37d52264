// What was asked and answered in this tab. A reload keeps it, closing the tab forgets it.

const KEY = "bayleaf.conversation";
// How much of the conversation goes along with a question. The small model's context holds
// some 8,000 characters of English, the question and the answer included.
const MEMORY_CHARACTERS = 4000;

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

  /** The messages to send for the answer of *exchange*: the latest before it, and its question. */
  messagesFor(exchange) {
    const messages = [{ role: "user", content: exchange.question }];
    const before = this.exchanges.slice(0, this.exchanges.indexOf(exchange));
    let room = MEMORY_CHARACTERS;
    for (const { question, answer } of before.reverse()) {
      // A question that got no word of an answer is left out with it: many models insist
      // that user and assistant take turns.
      if (!answer) continue;
      room -= question.length + answer.length;
      if (room < 0) break;
      messages.unshift({ role: "user", content: question }, { role: "assistant", content: answer });
    }
    return messages;
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
