// Chat over stepwire's gRPC API: node client.mjs HOST:PORT "question" [cancel]
// (STEPWIRE_API_KEY holds the key, if one is set; PROTO_PATHS the import roots, separated by colons.)
// JavaScript with types in comments, so that it runs without a build; it is valid TypeScript with `checkJs`.
// Shows metadata, a deadline, streamed deltas, cancellation, and what an error says.
import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

const [address, question, mode] = process.argv.slice(2);
const includeDirs = (process.env.PROTO_PATHS ?? "../../proto").split(":");
const definition = loader.loadSync("stepwire/v1/inference.proto", { includeDirs, keepCase: true, longs: Number, enums: String, arrays: true, oneofs: true });
/** @type {any} */
const { stepwire } = grpc.loadPackageDefinition(definition);
const client = new stepwire.v1.InferenceService(address, grpc.credentials.createInsecure());

const metadata = new grpc.Metadata();
if (process.env.STEPWIRE_API_KEY) metadata.set("authorization", `Bearer ${process.env.STEPWIRE_API_KEY}`);
const hex = (/** @type {number} */ bytes) => Buffer.from(crypto.getRandomValues(new Uint8Array(bytes))).toString("hex");
metadata.set("traceparent", `00-${hex(16)}-${hex(8)}-01`);

const request = {
  chat: { messages: [{ role: "user", content: [{ text: question }] }] },
  stop: { max_tokens: mode === "cancel" ? 3000 : 64, ignore_eos: mode === "cancel" },
  sampling: { seed: 7 },
};
// The call's deadline is the request's.
const call = client.Generate(request, metadata, { deadline: Date.now() + 60_000 });
call.on("data", (/** @type {any} */ response) => {
  for (const delta of response.deltas) {
    process.stdout.write(delta.text);
    if (mode === "cancel") call.cancel(); // the request is aborted within one step
  }
  if (response.usage) console.error(`\n${response.usage.num_completion_tokens} tokens`);
  if (response.error) { console.error(`failed: ${response.error.message}`); process.exitCode = 1; }
});
call.on("error", (/** @type {grpc.ServiceError} */ error) => {
  console.error(`refused: ${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
