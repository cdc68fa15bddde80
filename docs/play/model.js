// The model: graphs in ONNX Runtime, and the sampler over them. Time 0 is data, 1 is noise; x_t = (1 − t)·x + t·noise.

/** Reads graphs.json and the graphs of a folder. `said` is told what is loaded. */
export async function load(ort, folder, said = () => {}) {
  const described = await (await fetch(`${folder}/graphs.json`)).json();
  const sessions = {};
  for (const graph of described.graphs) {
    const name = graph.file.split("/").pop().replace(".onnx", "");
    said(`Loading ${name}, ${(graph.bytes / 1e6).toFixed(0)} MB…`);
    sessions[name] = await ort.InferenceSession.create(`${folder}/${graph.file}`);
  }
  return new Model(ort, described, sessions);
}

export class Model {
  constructor(ort, described, sessions) {
    Object.assign(this, { ort, described, sessions });
    this.modalities = described.modalities;
    this.classes = described.class_names;
    [this.height, this.width] = described.resolution;
  }

  /** Standard normal states of pictures, one stream for each: picture i depends on the seed and i alone. */
  noise(seed, count) {
    const streams = Array.from({ length: count }, (_, i) => normals(hash(seed, i)));
    return this.state(count, (modality, size) => {
      const values = new Float32Array(count * size);
      for (let i = 0; i < count; i++) for (let j = 0; j < size; j++) values[i * size + j] = streams[i]();
      return values;
    });
  }

  /** A state: the name of each modality to its values, picture after picture. */
  state(count, make) {
    return Object.fromEntries(this.modalities.map((m) => [m.name, make(m, m.shape.reduce((a, b) => a * b, 1), count)]));
  }

  /** Velocities of a state at time t, guided away from those without a class: v + (w − 1)·(v − v_none). */
  async velocity(state, t, labels, guidance) {
    const guided = guidance !== 1 && this.classes.length > 0;
    const batch = guided ? 2 * labels.length : labels.length;
    const twice = (values) => {
      const both = new Float32Array(2 * values.length);
      both.set(values), both.set(values, values.length);
      return both;
    };
    const feeds = { time: new this.ort.Tensor("float32", new Float32Array(batch).fill(t), [batch]) };
    for (const m of this.modalities) {
      const values = guided ? twice(state[m.name]) : state[m.name];
      feeds[m.name] = new this.ort.Tensor("float32", values, [batch, ...m.shape]);
    }
    if (this.sessions.denoiser.inputNames.includes("class")) {
      const none = guided ? labels.map(() => this.classes.length) : [];
      feeds.class = new this.ort.Tensor("int64", BigInt64Array.from([...labels, ...none].map(BigInt)), [batch]);
    }
    const found = await this.sessions.denoiser.run(feeds);
    return Object.fromEntries(this.modalities.map((m) => {
      const v = found[`velocity_${m.name}`].data;
      if (!guided) return [m.name, v];
      const half = v.length / 2;
      return [m.name, Float32Array.from({ length: half }, (_, i) => v[i] + (guidance - 1) * (v[i] - v[half + i]))];
    }));
  }

  /**
   * Draws a state, by the two-step method of Adams and Bashforth. `held` has what stays, of modalities by name: its
   * values `data`, and `where` (1: stays) or null for all of it. `step` is told how far it is, and stops it by true.
   */
  async draw({ labels, seed, steps, guidance, interval = [0, 0.9], held = {}, step = () => false }) {
    const noise = this.noise(seed, labels.length);
    let state = Object.fromEntries(Object.entries(noise).map(([name, values]) => [name, values.slice()]));
    const put = (values, data, from) => {
      for (const [name, { data: known, where }] of Object.entries(held)) {
        for (let i = 0; i < known.length; i++) {
          if (!where || where[i]) values[name][i] = data * known[i] + from * noise[name][i];
        }
      }
    };
    let before = null;
    for (let i = 0; i < steps; i++) {
      const t = 1 - i / steps, next = 1 - (i + 1) / steps;
      put(state, 1 - t, t);
      const middle = (t + next) / 2;
      const scale = interval[0] <= middle && middle <= interval[1] ? guidance : 1;
      const v = await this.velocity(state, t, labels, scale);
      put(v, -1, 1);
      const second = before && before.scale === scale ? 0.5 : 0; // Nothing is extrapolated over a jump.
      for (const { name } of this.modalities) {
        const x = state[name], now = v[name], last = before?.v[name];
        for (let j = 0; j < x.length; j++) x[j] += (next - t) * (now[j] + (second ? second * (now[j] - last[j]) : 0));
      }
      before = { v, scale };
      if (await step((i + 1) / steps)) return null;
    }
    put(state, 1, 0);
    return state;
  }

  /** The pictures of a state, as ImageData. */
  async decode(state) {
    const latent = this.modalities[0], [channels, rows, columns] = latent.shape, area = rows * columns;
    const raw = state[latent.name].map((x, i) => {
      const c = latent.shift.length > 1 ? Math.floor(i / area) % channels : 0;
      return x / latent.scale[c] + latent.shift[c];
    });
    const count = raw.length / (channels * area);
    const feeds = { latents: new this.ort.Tensor("float32", raw, [count, ...latent.shape]) };
    const { data } = (await this.sessions.decoder.run(feeds)).images;
    const pixels = this.height * this.width;
    return Array.from({ length: count }, (_, n) => {
      const picture = new ImageData(this.width, this.height);
      for (let i = 0; i < pixels; i++) {
        for (let c = 0; c < 3; c++) picture.data[4 * i + c] = 127.5 * (data[(3 * n + c) * pixels + i] + 1);
        picture.data[4 * i + 3] = 255;
      }
      return picture;
    });
  }

  /** The state of a picture, ImageData of the model's size. */
  async encode(picture) {
    const pixels = this.height * this.width, planes = new Uint8Array(3 * pixels);
    for (let i = 0; i < pixels; i++) for (let c = 0; c < 3; c++) planes[c * pixels + i] = picture.data[4 * i + c];
    const feeds = { pixels: new this.ort.Tensor("uint8", planes, [1, 3, this.height, this.width]) };
    const found = await this.sessions.encoder.run(feeds);
    return Object.fromEntries(this.modalities.map((m) => [m.name, found[m.name].data]));
  }

  /**
   * What is held to redraw a picture's state, `count` times: everything outside the marks, or its map where nothing is
   * marked. `marks` is a grid of 0 and 1 in the latents' shape.
   */
  held(state, marks, count) {
    const marked = marks.some((mark) => mark);
    const maps = this.modalities.filter((m) => m.kind === "map").slice(marked ? 0 : 1);
    return Object.fromEntries(maps.map((m) => {
      const area = marks.length, data = repeated(state[m.name], count);
      return [m.name, { data, where: marked ? data.map((_, i) => (marks[i % area] ? 0 : 1)) : null }];
    }));
  }
}

function repeated(values, count) {
  const all = new Float32Array(count * values.length);
  for (let i = 0; i < count; i++) all.set(values, i * values.length);
  return all;
}

/** Two whole numbers to one of 32 bits. */
function hash(a, b) {
  let h = 0x9e3779b9 ^ a;
  for (const word of [b, a, b]) {
    h = Math.imul(h ^ word, 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    h ^= h >>> 16;
  }
  return h >>> 0;
}

/** Standard normal numbers, one a call (mulberry32, Box and Muller). */
function normals(seed) {
  let state = seed, spare = null;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return () => {
    if (spare !== null) {
      const kept = spare;
      spare = null;
      return kept;
    }
    const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
    spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  };
}
