// OpenAI's chat completions, streamed. Knows the protocol and nothing of the page.

import { EventStreamParser } from "./sse.js";

// The server pings every 15 s and ends an answer that is silent for 60 s. A connection
// that brings nothing for longer is dead, though nobody closed it (a phone in a tunnel).
const SILENCE_MS = 90_000;

/** What went wrong, in a sentence for the reader; `code` is the server's or one of ours. */
export class CompletionError extends Error {
  constructor(code, message, retryAfterSeconds = null) {
    super(message);
    this.name = "CompletionError";
    this.code = code;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** The ids of the models on offer. */
export async function listModels(api) {
  const response = await fetch(`${api}/models`).catch(() => {
    throw unreachable();
  });
  if (!response.ok) throw await refusal(response);
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/**
 * Asks for an answer and yields its parts as they come: `{text}`, `{finishReason}`,
 * `{completionTokens}`. Returning means that the answer is whole. Everything else is
 * thrown: a CompletionError, or the signal's own reason when the caller stopped it.
 */
export async function* streamCompletion({ api, body, signal }) {
  const connection = new AbortController();
  const stop = () => connection.abort(signal.reason);
  signal.addEventListener("abort", stop, { once: true });
  let complete = false;
  let silence;
  const expectBytes = () => {
    clearTimeout(silence);
    silence = setTimeout(() => connection.abort(lost()), SILENCE_MS);
  };

  try {
    expectBytes();
    const response = await fetch(`${api}/chat/completions`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal: connection.signal,
    }).catch((error) => {
      throw thrownBy(connection, error, unreachable());
    });
    if (!response.ok) throw await refusal(response);
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      throw new CompletionError("not_a_stream", "The server answered with something else than a stream.");
    }

    const parser = new EventStreamParser();
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    for (;;) {
      expectBytes();
      const { done, value } = await reader.read().catch((error) => {
        throw thrownBy(connection, error, lost());
      });
      // Without [DONE] the text is not whole, however tidily the connection was closed.
      if (done) throw new CompletionError("stream_incomplete", "The server closed the connection before the end.");
      for (const { data } of parser.feed(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") {
          complete = true;
          return;
        }
        yield* parts(data);
      }
    }
  } finally {
    clearTimeout(silence);
    signal.removeEventListener("abort", stop);
    // A whole answer needs no abort, which would cost the connection its next request.
    if (!complete) connection.abort();
  }
}

function* parts(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new CompletionError("bad_event", "The server sent something that cannot be read.");
  }
  if (chunk.error) {
    throw new CompletionError(chunk.error.code ?? "error", chunk.error.message ?? "The model failed.");
  }
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finishReason: choice.finish_reason };
  if (chunk.usage) yield { completionTokens: chunk.usage.completion_tokens };
}

/** The error of a response that is not a 2xx: the server's own words if it has any. */
async function refusal(response) {
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy's page, say. The status has to do.
  }
  return new CompletionError(
    error.code ?? `http_${response.status}`,
    error.message ?? `The server answered ${response.status}.`,
    Number.isFinite(retryAfter) ? retryAfter : null,
  );
}

/** An aborted fetch throws the abort's reason; any other failure is the network's. */
function thrownBy(connection, error, otherwise) {
  return connection.signal.aborted ? error : otherwise;
}

function unreachable() {
  const message = navigator.onLine ? "The server cannot be reached." : "You are offline.";
  return new CompletionError("network", message);
}

function lost() {
  return new CompletionError("network", "The connection was lost.");
}
