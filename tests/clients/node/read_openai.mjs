// OpenAI's own client for Node.

import OpenAI, { APIError } from "openai";

const TIMEOUT_SECONDS = 20;
const USAGE = { stream_options: { include_usage: true } };

function clientOf(job) {
  return new OpenAI({
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
    reading.fail(error.status, error.code, error.error?.message ?? error.message);
  }
}

async function chatStream(job, reading) {
  await notingErrors(reading, async () => {
    const stream = await clientOf(job).chat.completions.create({
      ...job.body,
      ...USAGE,
      stream: true,
    });
    for await (const chunk of stream) noteChunk(chunk, reading);
  });
}

function noteChunk(chunk, reading) {
  if (chunk.usage) reading.usage = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens];
  for (const { delta, finish_reason } of chunk.choices) {
    reading.finish = finish_reason ?? reading.finish;
    reading.reasoning(delta.reasoning_content);
    for (const call of delta.tool_calls ?? []) {
      reading.call(call.index, call.id, call.function.name, call.function.arguments);
    }
    reading.text(delta.content);
  }
}

// `.stream()`: events, and a completion that the SDK itself puts together.
async function chatHelper(job, reading) {
  await notingErrors(reading, async () => {
    const stream = clientOf(job).chat.completions.stream({ ...job.body, ...USAGE });
    for await (const chunk of stream) {
      for (const { delta } of chunk.choices) {
        reading.text(delta.content);
        reading.reasoning(delta.reasoning_content);
      }
    }
    const completion = await stream.finalChatCompletion();
    // Of a field that it does not know it keeps the last delta only.
    delete completion.choices[0].message.reasoning_content;
    noteCompletion(completion, reading);
  });
}

async function chatWhole(job, reading) {
  await notingErrors(reading, async () => {
    const completion = await clientOf(job).chat.completions.create(job.body);
    noteCompletion(completion, reading);
    reading.text(completion.choices[0].message.content);
  });
}

// All but the text.
function noteCompletion(completion, reading) {
  const [{ message, finish_reason }] = completion.choices;
  reading.usage = [completion.usage.prompt_tokens, completion.usage.completion_tokens];
  reading.finish = finish_reason;
  reading.reasoning(message.reasoning_content);
  for (const [index, call] of (message.tool_calls ?? []).entries()) {
    reading.call(index, call.id, call.function.name, call.function.arguments);
  }
}

export const readers = {
  "openai-node chat": chatStream,
  "openai-node chat helper": chatHelper,
  "openai-node chat whole": chatWhole,
};
