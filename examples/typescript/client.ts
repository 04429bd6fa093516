// stepwire's gRPC API from Node: node client.js HOST:PORT COMMAND [TEXT]; README.md has the commands.
// STEPWIRE_API_KEY holds the key, if one is set; PROTO_PATHS the import roots, separated by colons.
import { createRequire } from "node:module";
import path from "node:path";
import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

const SERVICE = "stepwire.v1.InferenceService";
const DEADLINE_MS = 60_000;
const SHORT_DEADLINE_MS = 2_000;
const FEW_TOKENS = { max_tokens: 64 };
const MANY_TOKENS = { max_tokens: 3000, ignore_eos: true };
const NAMES = { keepCase: true, longs: Number, enums: String, defaults: true, arrays: true, oneofs: true };

// health.proto and reflection.proto are shipped by these packages.
const require = createRequire(import.meta.url);
const packageOf = (name: string) => path.dirname(require.resolve(`${name}/package.json`));
const includeDirs = [
  ...(process.env.PROTO_PATHS ?? "../../proto").split(":"),
  path.join(packageOf("grpc-health-check"), "proto"),
  path.join(packageOf("@grpc/reflection"), "build/proto"),
];
const files = ["stepwire/v1/inference.proto", "health/v1/health.proto", "grpc/reflection/v1alpha/reflection.proto"];
// What is loaded while the program runs has no types of its own.
type Untyped = any;
const loaded: Untyped = grpc.loadPackageDefinition(loader.loadSync(files, { ...NAMES, includeDirs }));
const details: Untyped = grpc.loadPackageDefinition(
  loader.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"], { ...NAMES, includeDirs }),
);

/** The key, and a trace of one's own as W3C's traceparent: both go along with every call. */
function metadata() {
  const found = new grpc.Metadata();
  const hex = (bytes: number) => Buffer.from(crypto.getRandomValues(new Uint8Array(bytes))).toString("hex");
  found.set("traceparent", `00-${hex(16)}-${hex(8)}-01`);
  if (process.env.STEPWIRE_API_KEY) found.set("authorization", `Bearer ${process.env.STEPWIRE_API_KEY}`);
  return found;
}

const within = (ms: number) => ({ deadline: Date.now() + ms });

/** A stub of the service, connected to the address on the command line. */
const connect = (Service: Untyped) => new Service(process.argv[2], grpc.credentials.createInsecure());

/** A call with one answer, as a promise. */
function unary(stub: Untyped, method: string, request: Untyped, ms: number) {
  return new Promise<Untyped>((resolve, reject) => {
    stub[method](request, metadata(), within(ms), (error: Untyped, answer: Untyped) =>
      error ? reject(error) : resolve(answer));
  });
}

async function checkHealth() {
  const answer = await unary(connect(loaded.grpc.health.v1.Health), "Check", { service: SERVICE }, 5_000);
  console.log(answer.status);
}

/** The status now, and each that follows, until the server goes or Ctrl-C: no deadline on this call. */
async function watchHealth() {
  const stream = connect(loaded.grpc.health.v1.Health).Watch({ service: SERVICE }, metadata());
  for await (const answer of stream) console.log(answer.status);
}

async function listServices() {
  const stub = connect(loaded.grpc.reflection.v1alpha.ServerReflection);
  const stream = stub.ServerReflectionInfo(metadata(), within(5_000));
  stream.write({ list_services: "" });
  stream.end();
  for await (const answer of stream) {
    for (const service of answer.list_services_response.service) console.log(service.name);
  }
}

/** Prints the text as it comes. The call's deadline is the request's; `cancel()` aborts it within one step. */
async function generate(request: Untyped, ms: number, cancel = false) {
  const stream = connect(loaded.stepwire.v1.InferenceService).Generate(request, metadata(), within(ms));
  for await (const response of stream) {
    for (const delta of response.deltas) {
      process.stdout.write(delta.text);
      if (cancel) stream.cancel();
    }
    const { usage, error } = response;
    if (usage) console.error(`\n${usage.num_prompt_tokens} + ${usage.num_completion_tokens} tokens`);
    if (error) throw new Error(`failed: ${error.message}`);
  }
}

async function embed(text: string) {
  const stub = connect(loaded.stepwire.v1.InferenceService);
  const answer = await unary(stub, "Embed", { inputs: [{ text }] }, DEADLINE_MS);
  const values = answer.embeddings[0].values;
  console.log(values.length, ...values.slice(0, 3).map((value: number) => value.toFixed(4)));
}

/** A refusal is a status with google.rpc details: which fields are wrong, when to try again. */
function explain(error: grpc.ServiceError) {
  console.error(`refused: ${grpc.status[error.code]}: ${error.details}`);
  const decode = (type: string, bytes: Buffer) => details.google.rpc[type].deserialize(bytes);
  for (const bytes of error.metadata?.get("grpc-status-details-bin") ?? []) {
    for (const detail of decode("Status", bytes as Buffer).details) {
      if (detail.type_url.endsWith("google.rpc.BadRequest")) {
        for (const { field, description } of decode("BadRequest", detail.value).field_violations) {
          console.error(`  ${field}: ${description}`);
        }
      } else if (detail.type_url.endsWith("google.rpc.RetryInfo")) {
        console.error(`  try again in ${decode("RetryInfo", detail.value).retry_delay.seconds} s`);
      }
    }
  }
}

const [, , address, command = "", text = ""] = process.argv;
const commands: Record<string, () => Promise<void>> = {
  health: checkHealth,
  watch: watchHealth,
  reflect: listServices,
  generate: () => generate({ text, stop: FEW_TOKENS }, DEADLINE_MS),
  chat: () => generate({ chat: { messages: [{ role: "user", content: [{ text }] }] }, stop: FEW_TOKENS }, DEADLINE_MS),
  deadline: () => generate({ text, stop: MANY_TOKENS }, SHORT_DEADLINE_MS),
  cancel: () => generate({ text, stop: MANY_TOKENS }, DEADLINE_MS, true),
  embed: () => embed(text),
};
const run = commands[command];
if (!address || !run) {
  console.error("client.js HOST:PORT COMMAND [TEXT]: README.md has the commands");
  process.exit(2);
}
try {
  await run();
} catch (error) {
  if (error instanceof Error && "code" in error) explain(error as grpc.ServiceError);
  else console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
}
// An open channel would keep the process.
process.exit();
