// Streams an answer: node build/generate.js ADDRESS PROMPT PROTO_DIR...

import { connect, load } from "./tidegate.js";

const [address = "127.0.0.1:50051", text = "Once upon a time", ...protos] = process.argv.slice(2);
const client = connect(load(protos).v1, address);
const call = client.Generate({ prompt: { text }, sampling: { max_tokens: 32, temperature: 0 } });
for await (const response of call) {
  for (const delta of response.batch?.deltas ?? []) process.stdout.write(delta.text ?? "");
}
process.stdout.write("\n");
client.close();
