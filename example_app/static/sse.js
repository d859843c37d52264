// The event stream format, WHATWG HTML 9.2.6. EventSource itself cannot POST.

/**
 * Takes the text as it arrives, cut anywhere, and gives back the events that it completed.
 * An event that the stream's end leaves unfinished is no event.
 */
export class EventStreamParser {
  #rest = "";
  #afterReturn = false; // "\r" ended the last chunk: a "\n" first in the next one belongs to it
  #data = [];
  #event = "";

  /** @returns {{event: string, data: string}[]} */
  feed(text) {
    if (text === "") return [];
    if (this.#afterReturn && text[0] === "\n") text = text.slice(1);
    this.#afterReturn = text.endsWith("\r");

    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#take(line));
  }

  #take(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
    // A comment has an empty field; id and retry are for reconnecting, which a POST does not.
    return [];
  }

  #dispatch() {
    const event = { event: this.#event || "message", data: this.#data.join("\n") };
    const empty = this.#data.length === 0;
    this.#data = [];
    this.#event = "";
    return empty ? [] : [event];
  }
}
