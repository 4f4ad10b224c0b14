// Asks a server with one stock client of JavaScript: `node ask.mjs CLIENT BASE_URL MODEL IMAGE MODULES`. See ask.py for what is printed.
//
// MODULES is the folder whose node_modules scripts/setup_clients.sh has filled.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [client, baseURL, model, image, modules] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${modules}/package.json`));
const NUMBER = "Which number does the sign show?";
const COLOUR = "What is the background colour?";
const data = readFileSync(image);

async function withOpenAI() {
  const { OpenAI } = require("openai");
  const api = new OpenAI({ baseURL, apiKey: "none-needed", maxRetries: 0 });
  const words = { type: "text", text: NUMBER };
  const ours = { type: "image_url", image_url: { url: `data:image/png;base64,${data.toString("base64")}` } };
  const ask = async (messages) => (await api.chat.completions.create({ model, messages, max_tokens: 12 })).choices[0].message.content;
  const stream = await api.chat.completions.create({ model, messages: [{ role: "user", content: [words, ours] }], max_tokens: 12, stream: true });
  let streamed = "";
  for await (const part of stream) streamed += part.choices[0]?.delta?.content ?? "";
  return {
    words_first: await ask([{ role: "user", content: [words, ours] }]),
    image_first: await ask([{ role: "user", content: [ours, words] }]),
    streamed,
    history: await ask([
      { role: "user", content: [{ type: "text", text: COLOUR }, ours] },
      { role: "assistant", content: "pink" },
      { role: "user", content: NUMBER },
    ]),
  };
}

async function withVercel() {
  const { generateText, generateObject, streamText, jsonSchema } = require("ai");
  const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({ name: "served", baseURL, supportsStructuredOutputs: true });
  const served = provider(model);
  const words = { type: "text", text: NUMBER };
  const ours = { type: "image", image: data, mediaType: "image/png" };
  const common = { model: served, maxOutputTokens: 12, maxRetries: 0 };
  const ask = async (messages) => (await generateText({ ...common, messages })).text;
  let streamed = "";
  for await (const piece of streamText({ ...common, messages: [{ role: "user", content: [words, ours] }] }).textStream) streamed += piece;
  const verdict = { type: "object", properties: { verdict: { enum: ["yes", "no"] } }, required: ["verdict"], additionalProperties: false };
  const judged = await generateObject({ ...common, maxOutputTokens: 64, schema: jsonSchema(verdict), messages: [{ role: "user", content: [words, ours] }] });
  return {
    words_first: await ask([{ role: "user", content: [words, ours] }]),
    image_first: await ask([{ role: "user", content: [ours, words] }]),
    streamed,
    history: await ask([
      { role: "user", content: [{ type: "text", text: COLOUR }, ours] },
      { role: "assistant", content: "pink" },
      { role: "user", content: NUMBER },
    ]),
    structured: judged.object.verdict,
  };
}

const clients = { openai_js: withOpenAI, vercel: withVercel };
console.log(JSON.stringify(await clients[client]()));
