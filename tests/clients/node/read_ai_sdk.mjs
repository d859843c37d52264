// Vercel's AI SDK, with its providers for the dialects.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenResponses } from "@ai-sdk/open-responses";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, streamText, tool } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;

const PROVIDERS = {
  "ai-sdk openai chat": (settings, model) => createOpenAI(settings).chat(model),
  "ai-sdk openai completion": (settings, model) => createOpenAI(settings).completion(model),
  "ai-sdk openai responses": (settings, model) => createOpenAI(settings).responses(model),
  "ai-sdk openai-compatible": (settings, model) =>
    createOpenAICompatible({ ...settings, name: "bench", includeUsage: true })(model),
  "ai-sdk open-responses": ({ baseURL, ...settings }, model) =>
    createOpenResponses({ ...settings, name: "bench", url: `${baseURL}/responses` })(model),
  "ai-sdk anthropic": (settings, model) => createAnthropic(settings)(model),
};

function requestOf(job, provider) {
  const settings = { baseURL: job.base_url, apiKey: job.api_key, headers: job.headers };
  const { model, system, messages, tools } = job.body;
  return {
    model: PROVIDERS[provider](settings, model),
    system: system ?? undefined,
    messages,
    tools: Object.fromEntries(
      tools.map(({ name, parameters }) => [name, tool({ inputSchema: jsonSchema(parameters) })]),
    ),
    maxRetries: 0,
    timeout: job.timeout_seconds === null ? undefined : job.timeout_seconds * 1000,
  };
}

function noteError(error, reading) {
  if (APICallError.isInstance(error)) {
    const { code, message } = error.data?.error ?? {};
    reading.fail(error.statusCode, code, message ?? error.message);
  } else {
    // In a stream it is what the provider found in the event: an object or a mere text.
    reading.fail(null, error.code, error.message ?? String(error));
  }
}

const stream = (provider) => async (job, reading) => {
  const leaving = new AbortController();
  const result = streamText({
    ...requestOf(job, provider),
    abortSignal: leaving.signal,
    onError() {}, // It would be printed; the stream has it, too.
  });
  try {
    for await (const part of result.fullStream) {
      if (part.type === "text-delta") reading.text(part.text);
      if (part.type === "reasoning-delta") reading.reasoning(part.text);
      if (part.type === "tool-call") {
        reading.call(null, part.toolCallId, part.toolName, part.input);
      }
      if (part.type === "error") noteError(part.error, reading);
      if (part.type === "abort") reading.fail(null, null, "aborted");
      if (part.type === "finish") noteEnd(part.finishReason, part.totalUsage, reading);
    }
  } finally {
    leaving.abort(); // To leave the loop is not enough: the request would go on.
  }
};

const whole = (provider) => async (job, reading) => {
  try {
    const result = await generateText(requestOf(job, provider));
    reading.text(result.text);
    reading.reasoning(result.reasoningText);
    for (const call of result.toolCalls) {
      reading.call(null, call.toolCallId, call.toolName, call.input);
    }
    noteEnd(result.finishReason, result.totalUsage, reading);
  } catch (error) {
    noteError(error, reading);
  }
};

function noteEnd(finishReason, usage, reading) {
  if (finishReason === "error") {
    // Follows the error itself, except where the provider keeps that to itself.
    if (!reading.failure) reading.fail(null, null, null);
    return;
  }
  reading.finish = finishReason.replace("-", "_");
  reading.usage = [usage.inputTokens, usage.outputTokens];
}

export const readers = Object.fromEntries(
  Object.keys(PROVIDERS).flatMap((provider) => [
    [provider, stream(provider)],
    [`${provider} whole`, whole(provider)],
  ]),
);
