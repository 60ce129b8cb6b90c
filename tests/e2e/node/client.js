// Calls ListModels, Generate and StreamChat, and prints what came back as one JSON object.
//
// Usage: node client.js TARGET PROTOS

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [target, protos] = process.argv.slice(2);
const options = { includeDirs: [protos], longs: Number, enums: String, oneofs: true, arrays: true };
const definition = loader.loadSync("weft/inference/v1/inference.proto", options);
const { InferenceService } = grpc.loadPackageDefinition(definition).weft.inference.v1;
const client = new InferenceService(target, grpc.credentials.createInsecure());

// The answer to a unary call; rejects with its status.
function call(method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// The code and message of a call that fails.
async function failure(method, request) {
  try {
    await call(method, request);
  } catch (error) {
    return { code: grpc.status[error.code], message: error.details };
  }
  throw new Error(`${method} did not fail`);
}

const { models } = await call("ListModels", {});
const model = models[0].id;

const generate = { model, prompts: [{ text: "The capital of France is" }], sampling: { maxTokens: 7, temperature: 0 } };
const generated = await call("Generate", generate);

const messages = [{ role: "user", content: "What is the capital of France?" }];
const streamed = [];
for await (const message of client.StreamChat({ request: { model, messages, sampling: { maxTokens: 20 } } })) {
  streamed.push(message);
}

const refused = await failure("Generate", { ...generate, sampling: { topP: 2 } });
console.log(JSON.stringify({ models, generated, streamed, refused }));
client.close();
