// What clients/answers.py has for Python: where a reader notes what it sees.

// The reader has seen enough: it leaves in the middle of the stream.
export class LeftError extends Error {}

export class Reading {
  finish = null;
  usage = null;
  failure = null;
  leaves;
  #texts = [];
  #reasonings = [];
  #calls = new Map();

  constructor(leaves) {
    this.leaves = leaves;
  }

  text(text) {
    this.#texts.push(text ?? "");
    if (text && this.leaves) throw new LeftError();
  }

  reasoning(text) {
    this.#reasonings.push(text ?? "");
  }

  // Another piece of the call `index`, or with null a whole one: text of its arguments, or all of
  // them as an object.
  call(index, id, name, args) {
    index ??= this.#calls.size;
    const call = this.#calls.get(index) ?? { id: null, name: "", arguments: "" };
    call.id = id ?? call.id;
    call.name += name ?? "";
    call.arguments += typeof args === "object" ? JSON.stringify(args) : (args ?? "");
    this.#calls.set(index, call);
  }

  get hasCalls() {
    return this.#calls.size > 0;
  }

  fail(status, code, message) {
    this.failure = { status: status ?? null, code: code ?? null, message: message ?? null };
  }

  answer() {
    const { finish, usage, failure } = this;
    return {
      text: this.#texts.join(""),
      reasoning: this.#reasonings.join(""),
      calls: [...this.#calls.values()],
      finish,
      usage,
      failure,
    };
  }
}
