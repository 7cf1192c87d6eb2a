// Makes calls for a test: one JSON command a line on stdin, one JSON report a line on stdout.
//
// node build/driver.js PROTO_DIR...

import { createInterface } from "node:readline";

import * as grpc from "@grpc/grpc-js";
import type { MessageTypeDefinition } from "@grpc/proto-loader";

import { load } from "./tidegate.js";

interface Command {
  /** Names the call in all that is said of it. */
  id: number;
  op: "call" | "write" | "end" | "read" | "cancel" | "close";
  address?: string;
  /** Such as `tidegate.v1.InferenceService/Generate`. */
  method?: string;
  /** Fields of the message, or its bytes in base64. */
  message?: object | string;
  metadata?: Record<string, string>;
  /** From now on. */
  deadlineMs?: number;
  /** The channel's `grpc.service_config`. */
  serviceConfig?: string;
  /** Take no message until `read`. */
  paused?: boolean;
}

interface Detail {
  type: string;
  value: unknown;
}

type Call = grpc.ClientDuplexStream<unknown, unknown>;

const { definition } = load(process.argv.slice(2));
const channels = new Map<string, grpc.Client>();
const calls = new Map<number, Call>();

function say(id: number, event: string, fields: object = {}) {
  process.stdout.write(JSON.stringify({ id, event, ...fields }) + "\n");
}

function messageType(name: string): MessageTypeDefinition<object, object> {
  return definition[name] as MessageTypeDefinition<object, object>;
}

/** Every `google.rpc` detail of a failure, decoded by its type. */
function details(metadata: grpc.Metadata): Detail[] {
  const [packed] = metadata.get("grpc-status-details-bin");
  if (!(packed instanceof Buffer)) return [];
  const status = messageType("google.rpc.Status").deserialize(packed) as {
    details: { type_url: string; value: Buffer }[];
  };
  return status.details.map(({ type_url, value }) => {
    const type = type_url.slice(type_url.lastIndexOf("/") + 1);
    return { type, value: messageType(type).deserialize(value) };
  });
}

function methodDefinition(path: string): grpc.MethodDefinition<unknown, unknown> {
  const [service = "", method = ""] = path.split("/");
  const found = (definition[service] as grpc.ServiceDefinition | undefined)?.[method];
  if (found === undefined) throw new Error(`no method ${path}`);
  return found;
}

function client(address: string, serviceConfig: string | undefined): grpc.Client {
  const key = `${address} ${serviceConfig}`;
  let found = channels.get(key);
  if (found === undefined) {
    const options = serviceConfig === undefined ? {} : { "grpc.service_config": serviceConfig };
    found = new grpc.Client(address, grpc.credentials.createInsecure(), options);
    channels.set(key, found);
  }
  return found;
}

function start(command: Command) {
  const { id, address = "", method = "", deadlineMs } = command;
  const rpc = methodDefinition(method);
  const metadata = new grpc.Metadata();
  for (const [name, value] of Object.entries(command.metadata ?? {})) metadata.set(name, value);
  const options = deadlineMs === undefined ? {} : { deadline: Date.now() + deadlineMs };
  const serialize = (message: unknown) =>
    typeof message === "string" ? Buffer.from(message, "base64") : rpc.requestSerialize(message);
  // A stream of one message is a stream too: so all kinds of calls are driven alike.
  const call = client(address, command.serviceConfig).makeBidiStreamRequest(
    `/${method}`,
    serialize,
    rpc.responseDeserialize,
    metadata,
    options,
  );
  calls.set(id, call);
  call.on("metadata", () => say(id, "headers"));
  call.on("error", () => {}); // The status says the same, and comes always.
  call.on("status", (status: grpc.StatusObject) => {
    const trailers = Object.fromEntries(
      Object.entries(status.metadata.getMap()).filter(([, value]) => typeof value === "string"),
    );
    say(id, "status", {
      code: status.code,
      message: status.details,
      trailers,
      details: details(status.metadata),
    });
    calls.delete(id);
  });
  if (!command.paused) read(id, call);
  if (!rpc.requestStream) {
    call.write(command.message);
    call.end();
  }
}

function read(id: number, call: Call) {
  call.on("data", (message) => say(id, "message", { message }));
}

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line) as Command;
  const call = calls.get(command.id);
  switch (command.op) {
    case "call":
      start(command);
      break;
    case "write":
      call?.write(command.message);
      break;
    case "end":
      call?.end();
      break;
    case "read":
      if (call !== undefined) read(command.id, call);
      break;
    case "cancel":
      call?.cancel();
      break;
    case "close":
      for (const channel of channels.values()) channel.close();
      channels.clear();
      break;
  }
}
