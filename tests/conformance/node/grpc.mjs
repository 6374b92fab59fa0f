// Asks a turret server through grpc-js, with the .proto files; prints what came back as JSON.
// node grpc.mjs ADDRESS PROTO_DIRECTORY

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, protos] = process.argv.slice(2);
const definition = loader.loadSync("turret/v1/inference.proto", {
  includeDirs: [protos], keepCase: true, longs: Number, enums: String, oneofs: true,
});
const { Inference } = grpc.loadPackageDefinition(definition).turret.v1;
const plain = grpc.credentials.createInsecure();
const client = new Inference(address, plain);
const zipping = new Inference(address, plain, {
  "grpc.default_compression_algorithm": grpc.compressionAlgorithms.gzip,
});
const messages = [{ role: "user", content: "JSON with name, age: Ann is 31 years old." }];
const request = {
  chat: { messages }, adapters: [{ name: "json" }], sampling: { temperature: 0 }, stop: { max_tokens: 6 },
};

function call(by, method, body, options = {}) {
  return new Promise((resolve) => {
    by[method](body, new grpc.Metadata(), options, (error, answer) => {
      if (error === null) resolve(answer);
      else resolve({ code: grpc.status[error.code], details: error.metadata.get("grpc-status-details-bin").length });
    });
  });
}

async function stream(body) {
  let text = "";
  for await (const part of client.GenerateStream(body)) text += part.text;
  return text;
}

const whole = await call(client, "Generate", request);
const endless = { prompt: "a", stop: { max_tokens: 3000, ignore_eos: true } };
console.log(JSON.stringify({
  whole: whole.text,
  usage: whole.usage.completion_tokens,
  gzip: (await call(zipping, "Generate", request)).text,
  stream: await stream(request),
  vectors: (await call(client, "Embed", { inputs: [{ prompt: "one" }, { prompt: "two" }] })).embeddings.length,
  missing: await call(client, "Generate", { ...request, adapters: [{ name: "nothing" }] }),
  late: await call(client, "Generate", endless, { deadline: Date.now() + 300 }),
}));
client.close();
zipping.close();
