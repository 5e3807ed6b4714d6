// Classify an image with an exported student, in the browser alone: nothing is sent anywhere.
//
// index.html                       asks for a photograph
// index.html?image=photo.png       classifies this one at once
// index.html?model=onnx_int8/      reads model.onnx and preprocessing.json from that folder
//
// The image is resized as Pillow does it, to the last bit. A canvas would resize with a filter of the browser's own.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

// ---- Preparing an image ------------------------------------------------------------------------------------------

const FILTERS = {
  // name: [half of the width at scale 1, weight at a distance], as in Pillow's Resample.c
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, cubic],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const FIXED_POINT = 2 ** 22; // Pillow's weights are integers, in units of 1 / FIXED_POINT

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

// Return for each output position the first input position and the weights of those from there.
function weightsOf(inputSize, outputSize, interpolation) {
  const [halfWidth, filter] = FILTERS[interpolation];
  const scale = inputSize / outputSize;
  const filterScale = Math.max(scale, 1); // a wider filter where pixels are averaged: antialiasing
  const support = halfWidth * filterScale;
  return Array.from({ length: outputSize }, (_, position) => {
    const center = (position + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(inputSize, Math.trunc(center + support + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(filter((x - center + 0.5) * (1 / filterScale)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => roundAwayFromZero((weight / sum) * FIXED_POINT)) };
  });
}

function roundAwayFromZero(x) {
  return Math.trunc(x < 0 ? x - 0.5 : x + 0.5);
}

// Resize `lines` lines of RGB pixels along one direction. `step` and `lineStep` are the distances in the input of
// neighbouring pixels and of neighbouring lines; `outStep` and `outLineStep` those in the output.
function resizeLines(input, output, lines, positions, [step, lineStep, outStep, outLineStep]) {
  positions.forEach(({ first, weights }, position) => {
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = FIXED_POINT / 2;
        let place = line * lineStep + first * step + channel;
        for (const weight of weights) {
          sum += input[place] * weight;
          place += step;
        }
        output[line * outLineStep + position * outStep + channel] = Math.floor(sum / FIXED_POINT); // clamped to 8 bits
      }
    }
  });
}

function resize(image, width, height, interpolation) {
  if (!(interpolation in FILTERS)) {
    throw new Error(`Unknown interpolation ${interpolation}. Expected ${Object.keys(FILTERS).join(", ")}.`);
  }
  let { pixels } = image;
  if (width !== image.width) {
    const narrow = new Uint8ClampedArray(3 * width * image.height);
    const steps = [3, 3 * image.width, 3, 3 * width];
    resizeLines(pixels, narrow, image.height, weightsOf(image.width, width, interpolation), steps);
    pixels = narrow;
  }
  if (height !== image.height) {
    const low = new Uint8ClampedArray(3 * width * height);
    const steps = [3 * width, 3, 3 * width, 3];
    resizeLines(pixels, low, width, weightsOf(image.height, height, interpolation), steps);
    pixels = low;
  }
  return { width, height, pixels };
}

// Return the first row or column of the middle; Python rounds halves to the even number.
function middle(side, size) {
  const half = (side - size) / 2;
  const below = Math.floor(half);
  return half - below === 0.5 ? below + (below % 2) : Math.round(half);
}

// Return the pixel_values of an image file, (3, size, size) in one row: the steps that preprocessing.json says.
export async function prepare(blob, settings) {
  const image = await decode(blob);
  const size = settings.image_size;
  const resized = Math.floor(size / settings.crop_pct);
  const shorter = Math.min(image.width, image.height);
  const side = (given) => (settings.crop_mode === "squash" ? resized : Math.trunc((resized * given) / shorter));
  const { width, height, pixels } = resize(image, side(image.width), side(image.height), settings.interpolation);
  const left = middle(width, size);
  const top = middle(height, size);
  const values = new Float32Array(3 * size * size);
  const [mean, std] = [settings.mean.map(Math.fround), settings.std.map(Math.fround)];
  for (let channel = 0; channel < 3; channel++) {
    for (let row = 0; row < size; row++) {
      for (let column = 0; column < size; column++) {
        const value = Math.fround(pixels[3 * ((top + row) * width + left + column) + channel] / 255);
        values[(channel * size + row) * size + column] = Math.fround(value - mean[channel]) / std[channel];
      }
    }
  }
  return values;
}

// Decode a file to RGB, turned as its EXIF data say, without conversion of colours.
async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8ClampedArray(3 * width * height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) pixels[3 * pixel + channel] = data[4 * pixel + channel];
  }
  return { width, height, pixels };
}

// ---- The page ----------------------------------------------------------------------------------------------------

const address = new URLSearchParams(location.search);
const folder = address.get("model") ?? "";
const element = (id) => document.getElementById(id);

async function fetched(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path} cannot be read (${response.status} ${response.statusText}).`);
  return response;
}

async function loadModel() {
  const settings = await (await fetched(`${folder}preprocessing.json`)).json();
  const file = await (await fetched(`${folder}model.onnx`)).arrayBuffer();
  return { settings, session: await ort.InferenceSession.create(file) };
}

async function classify(blob) {
  const { settings, session } = await model;
  const size = settings.image_size;
  const values = new ort.Tensor("float32", await prepare(blob, settings), [1, 3, size, size]);
  const started = performance.now();
  const { logits } = await session.run({ pixel_values: values });
  show(logits.data, settings.class_names, performance.now() - started);
}

function show(logits, names, milliseconds) {
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - Math.max(...logits)));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  const best = [...exponentials.keys()].sort((a, b) => logits[b] - logits[a]).slice(0, 5);
  element("classes").replaceChildren();
  for (const index of best) {
    const row = element("classes").insertRow();
    row.insertCell().textContent = names[index];
    row.insertCell().textContent = `${((100 * exponentials[index]) / sum).toFixed(1)} %`;
  }
  element("logits").textContent = JSON.stringify(Array.from(logits));
  element("status").textContent = `${milliseconds.toFixed(1)} ms in ONNX Runtime Web.`;
}

// Classify what `read` returns; the state of the page is in its `data-state`: busy, done or failed.
async function run(read) {
  document.body.dataset.state = "busy";
  element("status").textContent = "...";
  try {
    const blob = await read();
    URL.revokeObjectURL(element("picture").src);
    element("picture").src = URL.createObjectURL(blob);
    element("picture").hidden = false;
    await classify(blob);
    document.body.dataset.state = "done";
  } catch (error) {
    element("status").textContent = error.message;
    document.body.dataset.state = "failed";
  }
}

const model = loadModel();
model.catch((error) => (element("status").textContent = error.message)); // told before a photograph is chosen
element("file").addEventListener("change", ({ target }) => run(() => target.files[0]));
if (address.has("image")) run(async () => (await fetched(address.get("image"))).blob());
