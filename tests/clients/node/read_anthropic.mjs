// Anthropic's own client for Node.

import Anthropic, { APIError } from "@anthropic-ai/sdk";

const TIMEOUT_SECONDS = 20;
const FINISHES = { end_turn: "stop", max_tokens: "length", tool_use: "tool_calls" };

function clientOf(job) {
  return new Anthropic({
    baseURL: job.base_url,
    apiKey: job.api_key,
    maxRetries: 0,
    timeout: (job.timeout_seconds ?? TIMEOUT_SECONDS) * 1000,
    defaultHeaders: job.headers,
  });
}

async function notingErrors(reading, read) {
  try {
    await read();
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    reading.fail(error.status, null, error.error?.error?.message ?? error.message);
  }
}

async function messagesStream(job, reading) {
  await notingErrors(reading, async () => {
    const stream = await clientOf(job).messages.create({ ...job.body, stream: true });
    for await (const event of stream) noteEvent(event, reading);
  });
}

function noteEvent({ type, index, content_block, delta, usage }, reading) {
  if (type === "content_block_start" && content_block.type === "tool_use") {
    reading.call(index, content_block.id, content_block.name);
  } else if (type === "content_block_delta") {
    if (delta.type === "text_delta") reading.text(delta.text);
    if (delta.type === "thinking_delta") reading.reasoning(delta.thinking);
    if (delta.type === "input_json_delta") reading.call(index, null, null, delta.partial_json);
  } else if (type === "message_delta") {
    reading.finish = FINISHES[delta.stop_reason];
    reading.usage = [usage.input_tokens, usage.output_tokens];
  }
}

// `.stream()`: events, and a message that the SDK itself puts together.
async function messagesHelper(job, reading) {
  await notingErrors(reading, async () => {
    const stream = clientOf(job).messages.stream(job.body);
    for await (const { type, delta } of stream) {
      if (type === "content_block_delta" && delta.type === "text_delta") reading.text(delta.text);
    }
    noteMessage(await stream.finalMessage(), reading);
  });
}

async function messagesWhole(job, reading) {
  await notingErrors(reading, async () => {
    const message = await clientOf(job).messages.create(job.body);
    noteMessage(message, reading);
    for (const { type, text } of message.content) if (type === "text") reading.text(text);
  });
}

// All but the text.
function noteMessage(message, reading) {
  reading.usage = [message.usage.input_tokens, message.usage.output_tokens];
  reading.finish = FINISHES[message.stop_reason];
  for (const [index, block] of message.content.entries()) {
    if (block.type === "thinking") reading.reasoning(block.thinking);
    if (block.type === "tool_use") reading.call(index, block.id, block.name, block.input);
  }
}

export const readers = {
  "anthropic-node": messagesStream,
  "anthropic-node helper": messagesHelper,
  "anthropic-node whole": messagesWhole,
};
