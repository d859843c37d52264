// Measures one answer as the reader sees it, network included.

const FRAME_MS = 1000 / 60;

export class Stopwatch {
  #sent = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;

  /** A piece of text arrived. */
  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  /** From sending to the first text; null before it. */
  get ttftSeconds() {
    return this.#first === null ? null : (this.#first - this.#sent) / 1000;
  }

  /**
   * How fast the model wrote, the wait for the first token aside.
   *
   * @param completionTokens The server's count; null where it gave none (a stopped answer):
   *   then a piece counts as a token, which is a little low where the server joined some.
   */
  tokensPerSecond(completionTokens) {
    const tokens = completionTokens ?? this.#pieces;
    if (!this.#pieces || !tokens) return null;
    // All within a frame, or a single token: there is no pace to see, so count the wait too.
    const paced = tokens > 1 && this.#last - this.#first > FRAME_MS;
    return paced
      ? ((tokens - 1) * 1000) / (this.#last - this.#first)
      : (tokens * 1000) / (this.#last - this.#sent);
  }
}
