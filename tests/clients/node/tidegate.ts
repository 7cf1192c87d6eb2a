// The stubs: made at run time from the .proto files, with types made from them beforehand.

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

import type { ProtoGrpcType as Control } from "./generated/control.js";
import type { ProtoGrpcType as Inference } from "./generated/inference.js";

export const FILES = [
  "tidegate/v1/inference.proto",
  "tidegate/v1/control.proto",
  "google/rpc/status.proto",
  "google/rpc/error_details.proto",
];

/** As the types were made, too: see `types` in package.json. */
const OPTIONS = { keepCase: true, longs: String, enums: String, oneofs: true };

export function load(includeDirs: string[]) {
  const definition = loader.loadSync(FILES, { ...OPTIONS, includeDirs });
  const loaded = grpc.loadPackageDefinition(definition) as unknown as Inference & Control;
  return { definition, v1: loaded.tidegate.v1 };
}

/** `HOST:PORT` or `unix:PATH`. */
export function connect(v1: ReturnType<typeof load>["v1"], address: string) {
  const credentials = grpc.credentials.createInsecure();
  return new v1.InferenceService(address, credentials);
}
