// Asks a turret server through OpenAI's Node client; prints what came back as JSON.
// node openai.mjs BASE_URL

import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "JSON with name, age: Ann is 31 years old." }];
const greedy = { model: "json", temperature: 0, max_tokens: 6 };

const models = [];
for await (const model of client.models.list()) models.push(model.id);

const whole = await client.chat.completions.create({ ...greedy, messages, logprobs: true });
const parts = [];
for await (const event of await client.chat.completions.create({ ...greedy, messages, stream: true })) {
  parts.push(event.choices[0]?.delta?.content ?? "");
}
const helper = client.chat.completions.stream({ ...greedy, messages });
const helped = await helper.finalContent();

const { max_tokens: limit, ...rest } = greedy;
const response = await client.responses.create({ ...rest, max_output_tokens: limit, input: messages });
const kinds = [];
for await (const event of await client.responses.create({
  ...rest, max_output_tokens: limit, input: messages, stream: true,
})) kinds.push(event.type);

let refusal = null;
try {
  await client.chat.completions.create({ ...greedy, model: "nothing", messages });
} catch (error) {
  refusal = { name: error.constructor.name, status: error.status, code: error.code };
}
// A stream that is left early.
const left = await client.completions.create({ model: "base", prompt: "a", max_tokens: 400, stream: true });
for await (const event of left) break;

console.log(JSON.stringify({
  models,
  whole: whole.choices[0].message.content,
  logprobs: whole.choices[0].logprobs.content.length,
  usage: whole.usage.completion_tokens,
  stream: parts.join(""),
  helped,
  response: response.output_text,
  kinds,
  refusal,
}));
