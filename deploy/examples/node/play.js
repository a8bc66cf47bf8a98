// Plays CartPole in several environments at once for a Squall run, until the run takes no more.
//
//   node play.js --address 127.0.0.1:50051 --run dqn-CartPole-v1-1 --environments 8
//
// SQUALL_GRPC_TOKEN is shown where the server wants one.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { CartPole } from "./cartpole.js";

const SECONDS_FOR_AN_ANSWER = 360;
const SECONDS_OF_PATIENCE = 60;
const WORTH_ANOTHER_TRY = [grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED, grpc.status.CANCELLED];

const { values: options } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    run: { type: "string", default: "" },
    environments: { type: "string", default: "8" },
    proto: { type: "string", default: fileURLToPath(new URL("../../../services/rpc/squall.proto", import.meta.url)) },
  },
});

// Numbers of 64 bits become JavaScript numbers: steps stay far below 2^53.
const definition = loader.loadSync(options.proto, { keepCase: true, longs: Number, enums: String, oneofs: true });
const { squall } = grpc.loadPackageDefinition(definition);
const client = new squall.v1.Experience(options.address, grpc.credentials.createInsecure());

// One session: messages go out, and each is answered by one message, in order.
class Session {
  constructor() {
    const metadata = new grpc.Metadata();
    if (process.env.SQUALL_GRPC_TOKEN) metadata.set("authorization", `Bearer ${process.env.SQUALL_GRPC_TOKEN}`);
    this.call = client.Play(metadata);
    this.call.on("data", (answer) => this.settle(null, answer));
    this.call.on("error", (error) => this.settle(error));
    this.call.on("end", () => this.settle(Object.assign(new Error("the session ended"), { code: grpc.status.UNAVAILABLE })));
  }

  settle(error, answer) {
    this.error ??= error;
    const waiting = this.waiting;
    this.waiting = undefined;
    if (!waiting) return;
    clearTimeout(waiting.timer);
    if (error) waiting.reject(error);
    else waiting.resolve(answer);
  }

  ask(message) {
    if (this.error) return Promise.reject(this.error);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.settle(new Error(`no answer within ${SECONDS_FOR_AN_ANSWER} s`));
        this.call.cancel();
      }, 1000 * SECONDS_FOR_AN_ANSWER);
      this.waiting = { resolve, reject, timer };
      this.call.write(message);
    });
  }
}

// Arrays are little-endian, whatever this machine is.
function float32(numbers) {
  const data = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, index) => data.writeFloatLE(number, 4 * index));
  return { dtype: "DTYPE_FLOAT32", shape: [numbers.length], data };
}

// Plays episodes in one session; returns how many steps of it are in the run, once that has all it wants.
async function playSession(environment, name) {
  const session = new Session();
  const open = {
    run: options.run,
    observation_space: CartPole.observationSpace,
    action_space: CartPole.actionSpace,
    client: name,
  };
  let answer = await session.ask({ open });
  let number = 0;
  while (answer.kind !== "closed") {
    if (answer.kind === "action") {
      const { observation, reward, terminated, truncated } = environment.step(Number(answer.action.action.data.readBigInt64LE()));
      number += 1;
      answer = await session.ask({ step: { number, reward, terminated, truncated, observation: float32(observation) } });
    } else {
      answer = await session.ask({ reset: { observation: float32(environment.reset()) } });
    }
  }
  session.call.end();
  return answer.closed.steps;
}

// A connection that breaks costs the episode under way: a new session begins another one.
async function play(index) {
  const environment = new CartPole();
  let brokenSince;
  let told = false;
  for (;;) {
    const begun = Date.now();
    try {
      return await playSession(environment, `node ${process.pid}, environment ${index}`);
    } catch (error) {
      if (!WORTH_ANOTHER_TRY.includes(error.code)) throw error;
      if (brokenSince === undefined || Date.now() - begun > 5000) brokenSince = Date.now();
      if (Date.now() - brokenSince > 1000 * SECONDS_OF_PATIENCE) throw error;
      if (!told && index === 0) console.error(`${options.address}: ${error.message}; trying again for ${SECONDS_OF_PATIENCE} s`);
      told = true;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

const environments = Number(options.environments);
if (!Number.isInteger(environments) || environments < 1) throw new Error(`--environments must be positive, got ${options.environments}`);
const steps = await Promise.all(Array.from({ length: environments }, (_, index) => play(index)));
console.log(JSON.stringify({ environments, steps: steps.reduce((sum, each) => sum + each, 0) }));
client.close();
