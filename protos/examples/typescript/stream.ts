// Streams an answer: npm start -- [PROMPT [ADDRESS]]

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import type { ProtoGrpcType } from "./generated/inference.js";

const protos = fileURLToPath(new URL("../../..", import.meta.url));
const definition = loader.loadSync("tidegate/v1/inference.proto", {
  // As the types were generated: see package.json.
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
  includeDirs: [protos],
});
const { tidegate } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;

const [text = "Once upon a time", address = "127.0.0.1:50051"] = process.argv.slice(2);
const client = new tidegate.v1.InferenceService(address, grpc.credentials.createInsecure(), {
  // gRPC's own retries: a server that is still starting says when to come back, and they heed it.
  "grpc.service_config": readFileSync(new URL("../../service_config.json", import.meta.url), "utf8"),
});
await promisify(client.waitForReady).call(client, Date.now() + 60_000);
const call = client.Generate({ prompt: { text }, sampling: { max_tokens: 60, temperature: 0 } });
for await (const response of call) {
  for (const delta of response.batch?.deltas ?? []) process.stdout.write(delta.text ?? "");
}
process.stdout.write("\n");
client.close();
