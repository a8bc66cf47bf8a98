// CartPole's dynamics (Barto, Sutton, and Anderson 1983), with the constants of Gymnasium's CartPole-v1.

const GRAVITY = 9.8;
const CART_MASS = 1.0;
const POLE_MASS = 0.1;
const HALF_LENGTH = 0.5;
const FORCE = 10.0;
const STEP_SECONDS = 0.02;
const MAX_ANGLE = (12 * 2 * Math.PI) / 360;
const MAX_POSITION = 2.4;
const MAX_STEPS = 500;

export class CartPole {
  // The spaces for Open: an observation is four float32 numbers, and there are two actions.
  static observationSpace = { box: { dtype: "DTYPE_FLOAT32", shape: [4], low: [-Infinity], high: [Infinity] } };
  static actionSpace = { discrete: { n: 2 } };

  reset() {
    this.state = Array.from({ length: 4 }, () => Math.random() * 0.1 - 0.05);
    this.steps = 0;
    return this.state;
  }

  step(action) {
    let [x, velocity, angle, angularVelocity] = this.state;
    const force = action === 1 ? FORCE : -FORCE;
    const [sin, cos] = [Math.sin(angle), Math.cos(angle)];
    const totalMass = CART_MASS + POLE_MASS;
    const push = (force + POLE_MASS * HALF_LENGTH * angularVelocity ** 2 * sin) / totalMass;
    const angularAcceleration =
      (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - (POLE_MASS * cos ** 2) / totalMass));
    const acceleration = push - (POLE_MASS * HALF_LENGTH * angularAcceleration * cos) / totalMass;
    x += STEP_SECONDS * velocity;
    velocity += STEP_SECONDS * acceleration;
    angle += STEP_SECONDS * angularVelocity;
    angularVelocity += STEP_SECONDS * angularAcceleration;
    this.state = [x, velocity, angle, angularVelocity];
    this.steps += 1;
    const terminated = Math.abs(x) > MAX_POSITION || Math.abs(angle) > MAX_ANGLE;
    // The time limit truncates the episode instead of terminating it: the run bootstraps from the last observation.
    return { observation: this.state, reward: 1, terminated, truncated: !terminated && this.steps >= MAX_STEPS };
  }
}
