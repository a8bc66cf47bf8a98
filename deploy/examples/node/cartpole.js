// CartPole's dynamics (Barto, Sutton and Anderson 1983), with the constants of Gymnasium's CartPole-v1.

const GRAVITY = 9.8;
const CART = 1.0;
const POLE = 0.1;
const HALF_LENGTH = 0.5;
const FORCE = 10.0;
const SECONDS = 0.02;
const WIDEST_ANGLE = (12 * 2 * Math.PI) / 360;
const FARTHEST = 2.4;
const LONGEST = 500;

export class CartPole {
  // What Open tells: four float32 numbers are observed, two actions may be taken.
  static observationSpace = { box: { dtype: "DTYPE_FLOAT32", shape: [4], low: [-Infinity], high: [Infinity] } };
  static actionSpace = { discrete: { n: 2 } };

  reset() {
    this.state = Array.from({ length: 4 }, () => Math.random() * 0.1 - 0.05);
    this.steps = 0;
    return this.state;
  }

  step(action) {
    let [x, speed, angle, spin] = this.state;
    const force = action === 1 ? FORCE : -FORCE;
    const [sin, cos] = [Math.sin(angle), Math.cos(angle)];
    const push = (force + POLE * HALF_LENGTH * spin ** 2 * sin) / (CART + POLE);
    const turn =
      (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - (POLE * cos ** 2) / (CART + POLE)));
    const pull = push - (POLE * HALF_LENGTH * turn * cos) / (CART + POLE);
    x += SECONDS * speed;
    speed += SECONDS * pull;
    angle += SECONDS * spin;
    spin += SECONDS * turn;
    this.state = [x, speed, angle, spin];
    this.steps += 1;
    const terminated = Math.abs(x) > FARTHEST || Math.abs(angle) > WIDEST_ANGLE;
    // Truncated is not terminated: the run still bootstraps from the last observation.
    return { observation: this.state, reward: 1, terminated, truncated: !terminated && this.steps >= LONGEST };
  }
}
