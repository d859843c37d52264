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

async function completionStream(job, reading) {
  await notingErrors(reading, async () => {
    const stream = await clientOf(job).completions.create({ ...job.body, ...USAGE, stream: true });
    for await (const chunk of stream) noteText(chunk, reading);
  });
}

async function completionWhole(job, reading) {
  await notingErrors(reading, async () => {
    noteText(await clientOf(job).completions.create(job.body), reading);
  });
}

function noteText({ usage, choices }, reading) {
  if (usage) reading.usage = [usage.prompt_tokens, usage.completion_tokens];
  for (const { text, finish_reason } of choices) {
    reading.finish = finish_reason ?? reading.finish;
    reading.text(text);
  }
}

async function responsesStream(job, reading) {
  await notingErrors(reading, async () => {
    const stream = await clientOf(job).responses.create({ ...job.body, stream: true });
    for await (const event of stream) noteEvent(event, reading);
  });
}

function noteEvent({ type, delta, item, output_index, response }, reading) {
  if (type === "response.output_text.delta") reading.text(delta);
  if (type === "response.reasoning_text.delta") reading.reasoning(delta);
  if (type === "response.output_item.added" && item.type === "function_call") {
    reading.call(output_index, item.call_id, item.name);
  }
  if (type === "response.function_call_arguments.delta") {
    reading.call(output_index, null, null, delta);
  }
  if (type === "response.completed" || type === "response.incomplete") noteEnd(response, reading);
}

// `.stream()`: events, and a response that the SDK itself puts together.
async function responsesHelper(job, reading) {
  await notingErrors(reading, async () => {
    const stream = clientOf(job).responses.stream(job.body);
    for await (const { type, delta } of stream) {
      if (type === "response.output_text.delta") reading.text(delta);
    }
    noteResponse(await stream.finalResponse(), reading);
  });
}

async function responsesWhole(job, reading) {
  await notingErrors(reading, async () => {
    const response = await clientOf(job).responses.create(job.body);
    noteResponse(response, reading);
    reading.text(response.output_text);
  });
}

// All but the text.
function noteResponse(response, reading) {
  for (const item of response.output) {
    if (item.type === "function_call") {
      reading.call(null, item.call_id, item.name, item.arguments);
    }
    if (item.type === "reasoning") for (const { text } of item.content) reading.reasoning(text);
  }
  noteEnd(response, reading);
}

function noteEnd({ status, incomplete_details, usage }, reading) {
  reading.usage = [usage.input_tokens, usage.output_tokens];
  if (status === "incomplete") {
    reading.finish = { max_output_tokens: "length" }[incomplete_details.reason];
  } else {
    reading.finish = reading.hasCalls ? "tool_calls" : "stop";
  }
}

export const readers = {
  "openai-node chat": chatStream,
  "openai-node chat helper": chatHelper,
  "openai-node chat whole": chatWhole,
  "openai-node completion": completionStream,
  "openai-node completion whole": completionWhole,
  "openai-node responses": responsesStream,
  "openai-node responses helper": responsesHelper,
  "openai-node responses whole": responsesWhole,
};
