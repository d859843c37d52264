// Ollama's own client for Node.

import { Ollama } from "ollama";

import { LeftError } from "./reading.mjs";

function clientOf(job) {
  const headers = { ...job.headers, Authorization: `Bearer ${job.api_key}` };
  const settings = { host: job.base_url, headers };
  if (job.timeout_seconds !== null) {
    // It has no timeout of its own, and its abort() does not reach what has no answer yet.
    const signal = AbortSignal.timeout(job.timeout_seconds * 1000);
    settings.fetch = (url, init) => fetch(url, { ...init, signal });
  }
  return new Ollama(settings);
}

async function notingErrors(reading, read) {
  try {
    await read();
  } catch (error) {
    if (error instanceof LeftError) throw error;
    // Of what comes in the middle of a stream it makes a plain Error.
    reading.fail(error.status_code, null, error.error ?? error.message);
  }
}

const stream = (method, note) => (job, reading) =>
  notingErrors(reading, async () => {
    const parts = await clientOf(job)[method]({ ...job.body, stream: true });
    try {
      for await (const part of parts) note(part, reading);
    } finally {
      parts.abort();
    }
  });

const whole = (method, note) => (job, reading) =>
  notingErrors(reading, async () => note(await clientOf(job)[method](job.body), reading));

function noteChat(part, reading) {
  for (const { function: called } of part.message.tool_calls ?? []) {
    reading.call(null, null, called.name, called.arguments);
  }
  reading.reasoning(part.message.thinking);
  noteEnd(part, reading);
  reading.text(part.message.content);
}

function noteGenerate(part, reading) {
  reading.reasoning(part.thinking);
  noteEnd(part, reading);
  reading.text(part.response);
}

function noteEnd(part, reading) {
  if (!part.done) return;
  // Calls are no reason of its own there.
  reading.finish = reading.hasCalls ? "tool_calls" : part.done_reason;
  reading.usage = [part.prompt_eval_count, part.eval_count];
}

export const readers = {
  "ollama-node chat": stream("chat", noteChat),
  "ollama-node chat whole": whole("chat", noteChat),
  "ollama-node generate": stream("generate", noteGenerate),
  "ollama-node generate whole": whole("generate", noteGenerate),
};
