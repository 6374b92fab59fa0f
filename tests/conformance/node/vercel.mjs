// Asks two turret servers through the Vercel AI SDK; prints what came back as JSON.
// node vercel.mjs BASE_URL TOOLS_URL
// TOOLS_URL is a server whose chat template supports tools.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const [url, toolsUrl] = process.argv.slice(2);
const options = { name: "turret", includeUsage: true, supportsStructuredOutputs: true };
const provider = createOpenAICompatible({ ...options, baseURL: url });
const withTools = createOpenAICompatible({ ...options, baseURL: toolsUrl });
const prompt = "JSON with name, age: Ann is 31 years old.";
const greedy = { model: provider("json"), prompt, maxOutputTokens: 6, temperature: 0, maxRetries: 0 };

const whole = await generateText(greedy);
const streamed = streamText(greedy);
const parts = [];
for await (const part of streamed.textStream) parts.push(part);
const person = z.object({ name: z.string().max(20), age: z.number().int() });
const parsed = await generateObject({ ...greedy, schema: person, maxOutputTokens: 60 });
const embedded = await embedMany({ model: provider.textEmbeddingModel("base"), values: ["one", "two"] });

const double = tool({
  description: "Twice a number",
  inputSchema: z.object({ number: z.number().int() }),
  execute: async ({ number }) => 2 * number,
});
const calls = {
  ...greedy, model: withTools("base"), prompt: "What is twice 21?", tools: { double },
  toolChoice: { type: "tool", toolName: "double" }, maxOutputTokens: 60,
};
const called = await generateText(calls);
const kinds = [];
for await (const event of streamText(calls).fullStream) kinds.push(event.type);

let refusal = null;
try {
  await generateText({ ...greedy, model: provider("nothing") });
} catch (error) {
  refusal = { name: error.name, status: error.statusCode };
}

console.log(JSON.stringify({
  whole: whole.text,
  reason: whole.finishReason,
  usage: whole.usage.outputTokens,
  stream: parts.join(""),
  streamUsage: (await streamed.usage).outputTokens,
  age: typeof parsed.object.age,
  vectors: embedded.embeddings.length,
  call: called.toolCalls.map((call) => [call.toolName, typeof call.input.number]),
  result: called.toolResults.map((each) => each.output === 2 * each.input.number),
  text: called.text,
  kinds,
  refusal,
}));
