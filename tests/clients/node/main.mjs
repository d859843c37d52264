// Does the jobs that come as lines of JSON on stdin, one after the other, and prints what the
// client read as a line of JSON: see readers.py and answers.py for their fields.

import { createInterface } from "node:readline";

import * as aiSdk from "./read_ai_sdk.mjs";
import * as aiSdkUi from "./read_ai_sdk_ui.mjs";
import * as anthropic from "./read_anthropic.mjs";
import * as ollama from "./read_ollama.mjs";
import * as openai from "./read_openai.mjs";
import { LeftError, Reading } from "./reading.mjs";

const READERS = {
  ...openai.readers,
  ...anthropic.readers,
  ...ollama.readers,
  ...aiSdk.readers,
  ...aiSdkUi.readers,
};

for await (const line of createInterface({ input: process.stdin })) {
  const { reader, job } = JSON.parse(line);
  const reading = new Reading(job.leaves);
  try {
    await READERS[reader](job, reading);
  } catch (error) {
    if (!(error instanceof LeftError)) throw error;
  }
  process.stdout.write(JSON.stringify(reading.answer()) + "\n");
}
