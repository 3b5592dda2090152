// Runs the trace processor of Perfetto's UI (WebAssembly) outside a browser:
//     node perfetto_engine.mjs FOLDER REQUESTS RESPONSES REPLIES
// FOLDER holds engine_bundle.js, REQUESTS a stream of TraceProcessorRpc messages, and RESPONSES is to take REPLIES replies.
import fs from "node:fs";
import path from "node:path";
import vm from "node:vm";

const [folder, requests, responses, replies] = process.argv.slice(2);
process.type = "renderer"; // the bundle refuses to run where it sees node
globalThis.self = globalThis;
globalThis.location = { href: "http://localhost/engine_bundle.js", protocol: "http:", host: "localhost" };
globalThis.WorkerGlobalScope = function () {};
globalThis.XMLHttpRequest = class {
  open(method, url) {
    this.url = url;
  }
  send() {
    const bytes = fs.readFileSync(path.join(folder, path.basename(this.url)));
    this.response = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  }
};
process.on("uncaughtException", (error) => {
  console.error(String(error && error.message).slice(0, 500));
  process.exit(1);
});
vm.runInThisContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), "engine_bundle.js");

const out = fs.openSync(responses, "w");
let left = Number(replies);
const { port1, port2 } = new MessageChannel();
port2.onmessage = (event) => {
  fs.writeSync(out, event.data);
  left -= 1;
  if (left === 0) process.exit(0);
};
globalThis.onmessage({ data: port1 });
port2.postMessage(new Uint8Array(fs.readFileSync(requests)));
