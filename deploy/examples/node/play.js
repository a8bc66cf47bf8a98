// Plays CartPole in several environments at once for a Squall run, until the run accepts no more experience.
//
//   node play.js --address 127.0.0.1:50051 --run dqn-CartPole-v1-1 --environments 8
//
// If the server requires a token, set SQUALL_GRPC_TOKEN.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { CartPole } from "./cartpole.js";

const ANSWER_SECONDS = 360;
const PATIENCE_SECONDS = 60;
const RETRYABLE_CODES = [grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED, grpc.status.CANCELLED];

const { values: options } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    run: { type: "string", default: "" },
    environments: { type: "string", default: "8" },
    proto: { type: "string", default: fileURLToPath(new URL("../../../services/rpc/squall.proto", import.meta.url)) },
  },
});

// 64-bit integers become JavaScript numbers, because step counts stay far below 2^53.
const definition = loader.loadSync(options.proto, { keepCase: true, longs: Number, enums: String, oneofs: true });
const { squall } = grpc.loadPackageDefinition(definition);
const client = new squall.v1.Experience(options.address, grpc.credentials.createInsecure());

// One session: the server answers each message with one message, in order.
class Session {
  constructor() {
    const metadata = new grpc.Metadata();
    if (process.env.SQUALL_GRPC_TOKEN) metadata.set("authorization", `Bearer ${process.env.SQUALL_GRPC_TOKEN}`);
    this.call = client.Play(metadata);
    this.call.on("data", (answer) => this.receive(null, answer));
    this.call.on("error", (error) => this.receive(error));
    this.call.on("end", () => this.receive(Object.assign(new Error("the session ended"), { code: grpc.status.UNAVAILABLE })));
  }

  receive(error, answer) {
    this.error ??= error;
    const pending = this.pending;
    this.pending = undefined;
    if (!pending) return;
    clearTimeout(pending.timer);
    if (error) pending.reject(error);
    else pending.resolve(answer);
  }

  request(message) {
    if (this.error) return Promise.reject(this.error);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.receive(new Error(`no answer within ${ANSWER_SECONDS} s`));
        this.call.cancel();
      }, 1000 * ANSWER_SECONDS);
      this.pending = { resolve, reject, timer };
      this.call.write(message);
    });
  }
}

// Arrays are little-endian on every machine.
function float32(numbers) {
  const data = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, index) => data.writeFloatLE(number, 4 * index));
  return { dtype: "DTYPE_FLOAT32", shape: [numbers.length], data };
}

// Plays episodes in one session until the run accepts no more experience; returns the number of accepted steps.
async function playSession(environment, name) {
  const session = new Session();
  const open = {
    run: options.run,
    observation_space: CartPole.observationSpace,
    action_space: CartPole.actionSpace,
    client: name,
  };
  let answer = await session.request({ open });
  let number = 0;
  while (answer.kind !== "closed") {
    if (answer.kind === "action") {
      const { observation, reward, terminated, truncated } = environment.step(Number(answer.action.action.data.readBigInt64LE()));
      number += 1;
      answer = await session.request({ step: { number, reward, terminated, truncated, observation: float32(observation) } });
    } else {
      answer = await session.request({ reset: { observation: float32(environment.reset()) } });
    }
  }
  session.call.end();
  return answer.closed.steps;
}

// A broken connection loses the current episode: a new session begins a new episode.
async function play(index) {
  const environment = new CartPole();
  let brokenSince;
  let warned = false;
  for (;;) {
    const start = Date.now();
    try {
      return await playSession(environment, `node ${process.pid}, environment ${index}`);
    } catch (error) {
      if (!RETRYABLE_CODES.includes(error.code)) throw error;
      if (brokenSince === undefined || Date.now() - start > 5000) brokenSince = Date.now();
      if (Date.now() - brokenSince > 1000 * PATIENCE_SECONDS) throw error;
      if (!warned && index === 0) console.error(`${options.address}: ${error.message}; trying again for ${PATIENCE_SECONDS} s`);
      warned = true;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

const environments = Number(options.environments);
if (!Number.isInteger(environments) || environments < 1) throw new Error(`--environments must be positive, got ${options.environments}`);
const steps = await Promise.all(Array.from({ length: environments }, (_, index) => play(index)));
console.log(JSON.stringify({ environments, steps: steps.reduce((sum, count) => sum + count, 0) }));
client.close();
