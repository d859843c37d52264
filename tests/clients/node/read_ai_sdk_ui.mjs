// What a page with Vercel's `useChat` does: its transport, and what it makes of the parts.

import { DefaultChatTransport, readUIMessageStream } from "ai";

import { LeftError } from "./reading.mjs";

const asking = (read) => async (job, reading) => {
  const { messages, ...body } = job.body;
  const leaving = new AbortController();
  const transport = new DefaultChatTransport({
    api: job.base_url,
    headers: { ...job.headers, Authorization: `Bearer ${job.api_key}` },
    body,
  });
  // A page has no timeout but its user.
  const timer =
    job.timeout_seconds && setTimeout(() => leaving.abort(), job.timeout_seconds * 1000);
  try {
    const stream = await transport.sendMessages({
      chatId: "chat",
      trigger: "submit-message",
      messages,
      abortSignal: leaving.signal,
    });
    await read(stream, reading, leaving);
  } catch (error) {
    if (error instanceof LeftError) throw error;
    noteError(error, reading);
  } finally {
    clearTimeout(timer);
  }
};

// Of a 4xx or 5xx the transport makes an error whose message is the whole body.
function noteError(error, reading) {
  let message = error.message;
  try {
    message = JSON.parse(message).errorText;
  } catch {
    // It came in the stream, or from the transport itself.
  }
  reading.fail(null, null, message);
}

const parts = asking(async (stream, reading, leaving) => {
  try {
    for await (const part of stream) {
      if (part.type === "text-delta") reading.text(part.delta);
      if (part.type === "reasoning-delta") reading.reasoning(part.delta);
      if (part.type === "tool-input-available") {
        reading.call(null, part.toolCallId, part.toolName, part.input);
      }
      if (part.type === "error") reading.fail(null, null, part.errorText);
      if (part.type === "finish") noteEnd(part.messageMetadata, reading);
    }
  } finally {
    leaving.abort(); // As `stop()` does.
  }
});

// What the page shows after each part: a whole message.
const message = asking(async (stream, reading, leaving) => {
  let message = { parts: [] };
  try {
    for await (message of readUIMessageStream({ stream, terminateOnError: true })) {
      if (reading.leaves && message.parts.some(({ type, text }) => type === "text" && text)) break;
    }
  } finally {
    leaving.abort();
    for (const part of message.parts) notePart(part, reading);
    if (message.metadata) noteEnd(message.metadata, reading);
  }
});

function notePart(part, reading) {
  if (part.type === "text") reading.text(part.text);
  if (part.type === "reasoning") reading.reasoning(part.text);
  if (part.type.startsWith("tool-")) {
    reading.call(null, part.toolCallId, part.type.replace("tool-", ""), part.input);
  }
}

function noteEnd({ finishReason, usage }, reading) {
  reading.finish = finishReason.replace("-", "_");
  reading.usage = [usage.inputTokens, usage.outputTokens];
}

export const readers = { "ai-sdk ui parts": parts, "ai-sdk ui message": message };
