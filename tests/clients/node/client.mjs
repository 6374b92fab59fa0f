// Calls a turret server by its .proto files alone and prints what came back as one JSON object.
//
//     node client.mjs ADDRESS [PROTO_FOLDER]

import { promisify } from "node:util";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, protoFolder = fileURLToPath(new URL("../../proto", import.meta.url))] =
  process.argv.slice(2);
if (address === undefined) {
  console.error("usage: node client.mjs ADDRESS [PROTO_FOLDER]");
  process.exit(2);
}

const definition = protoLoader.loadSync(
  ["turret/v1/inference.proto", "turret/v1/adapters.proto"],
  { includeDirs: [protoFolder], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true },
);
const { Inference, Adapters } = grpc.loadPackageDefinition(definition).turret.v1;
const credentials = grpc.credentials.createInsecure();
const inference = new Inference(address, credentials);
const adapters = new Adapters(address, credentials);

const deadline = () => ({ deadline: Date.now() + 60_000 });
const unary = (client, method) => {
  const call = promisify(client[method].bind(client));
  return (request) => call(request, new grpc.Metadata(), deadline());
};

const request = {
  prompt: "Once upon a time",
  sampling: { temperature: 0 },
  stop: { max_tokens: 8 },
  options: { token_ids: true },
};

async function stream(message) {
  const chunks = [];
  for await (const chunk of inference.GenerateStream(message, new grpc.Metadata(), deadline())) {
    chunks.push(chunk);
  }
  return chunks;
}

// The status, and the reason in the google.rpc.ErrorInfo that the details carry.
async function refusal(message) {
  try {
    await unary(inference, "Generate")(message);
  } catch (error) {
    const [details] = error.metadata.get("grpc-status-details-bin");
    return {
      code: grpc.status[error.code],
      message: error.details,
      has_reason: details !== undefined && details.includes("ADAPTER_NOT_FOUND"),
    };
  }
  return null;
}

// A stream that is left midway must leave the server able to answer.
async function cancelled(message) {
  const call = inference.GenerateStream(message, new grpc.Metadata(), deadline());
  return new Promise((resolve) => {
    call.once("data", () => call.cancel());
    call.once("error", (error) => resolve(grpc.status[error.code]));
    call.once("end", () => resolve("OK"));
  });
}

const long = { ...request, stop: { max_tokens: 200, ignore_eos: true } };
const result = {
  cancelled: await cancelled(long),
  model: await unary(inference, "GetModel")({}),
  generate: await unary(inference, "Generate")(request),
  stream: await stream(request),
  refusal: await refusal({ ...request, adapters: [{ name: "no-such-adapter" }] }),
  adapters: (await unary(adapters, "ListAdapters")({})).adapters,
};
console.log(JSON.stringify(result, null, 2));
inference.close();
adapters.close();
