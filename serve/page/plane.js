// The points of a map: read, found by place, and drawn.
//
// Points are sorted by the cells of a grid, line after line, so that what lies in a rectangle is a few runs of them. They
// are drawn by adding up a little disc for each in an array of bytes, one a pixel, and giving each sum its colour: some
// milliseconds for 100,000 points without any graphics hardware, and places where many lie stand out.

const MOST_CELLS = 256;

// Discs by radius in pixels: offsets, and what to add there, less at the edge.
function disc(radius, stride) {
  const reach = Math.floor(radius);
  const offsets = [];
  const weights = [];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const inside = radius + 0.5 - Math.hypot(x, y);
      // What hardly shows costs as much as what does.
      if (inside < 0.2) continue;
      offsets.push(y * stride + x);
      weights.push(Math.round(Math.min(1, inside) * 24));
    }
  }
  return { radius, stride, reach, offsets: Int32Array.from(offsets), weights: Uint8Array.from(weights) };
}

export class Plane {
  // Reads what /map/points answers. Positions are scaled so that the longer side of all goes from -1 to 1, y upwards.
  constructor(data) {
    this.count = new DataView(data).getUint32(0, true);
    const rows = new Uint32Array(data, 4, this.count);
    const places = new Float32Array(data, 4 + 4 * this.count, 2 * this.count);
    let [left, right, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let n = 0; n < places.length; n += 2) {
      left = Math.min(left, places[n]);
      right = Math.max(right, places[n]);
      bottom = Math.min(bottom, places[n + 1]);
      top = Math.max(top, places[n + 1]);
    }
    const scale = 2 / (Math.max(right - left, top - bottom) || 1);
    const [middleX, middleY] = [(left + right) / 2, (bottom + top) / 2];
    // Half the width and half the height of everything.
    this.halfWidth = this.count ? ((right - left) * scale) / 2 : 0;
    this.halfHeight = this.count ? ((top - bottom) * scale) / 2 : 0;
    this.cells = Math.max(1, Math.min(MOST_CELLS, Math.round(Math.sqrt(this.count))));
    const cell = new Uint32Array(this.count);
    this.starts = new Uint32Array(this.cells * this.cells + 1);
    const at = (value) => Math.max(0, Math.min(this.cells - 1, Math.floor(((value + 1) / 2) * this.cells)));
    for (let n = 0; n < this.count; n++) {
      const x = (places[2 * n] - middleX) * scale;
      const y = (middleY - places[2 * n + 1]) * scale;
      cell[n] = at(y) * this.cells + at(x);
      this.starts[cell[n] + 1]++;
    }
    for (let n = 1; n < this.starts.length; n++) this.starts[n] += this.starts[n - 1];
    const next = this.starts.slice();
    this.rows = new Uint32Array(this.count);
    this.xs = new Float32Array(this.count);
    this.ys = new Float32Array(this.count);
    for (let n = 0; n < this.count; n++) {
      const place = next[cell[n]]++;
      this.rows[place] = rows[n];
      this.xs[place] = (places[2 * n] - middleX) * scale;
      this.ys[place] = (middleY - places[2 * n + 1]) * scale;
    }
    this.at = at;
    this.selected = new Uint8Array(this.count);
    this.selectedCount = 0;
  }

  // Calls with [from, to[ for the runs of points that may lie in a rectangle.
  runs(left, top, right, bottom, visit) {
    const [first, last] = [this.at(left), this.at(right)];
    for (let line = this.at(top); line <= this.at(bottom); line++) {
      const from = this.starts[line * this.cells + first];
      const to = this.starts[line * this.cells + last + 1];
      if (from < to) visit(from, to);
    }
  }

  // The points in a rectangle.
  inside(left, top, right, bottom) {
    const found = new Uint32Array(this.count);
    let count = 0;
    const { xs, ys } = this;
    this.runs(left, top, right, bottom, (from, to) => {
      for (let n = from; n < to; n++) {
        if (xs[n] >= left && xs[n] <= right && ys[n] >= top && ys[n] <= bottom) found[count++] = n;
      }
    });
    return found.subarray(0, count);
  }

  // The points inside an outline, [x, y] each.
  within(outline) {
    const [xs, ys] = [outline.map((one) => one[0]), outline.map((one) => one[1])];
    const rectangle = this.inside(Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
    return rectangle.filter((n) => {
      const [x, y] = [this.xs[n], this.ys[n]];
      let inside = false;
      for (let i = 0, j = xs.length - 1; i < xs.length; j = i++) {
        if (ys[i] > y !== ys[j] > y && x < ((xs[j] - xs[i]) * (y - ys[i])) / (ys[j] - ys[i]) + xs[i]) inside = !inside;
      }
      return inside;
    });
  }

  // The point nearest to a place, if it is within a distance; else -1.
  nearest(x, y, distance) {
    let found = -1;
    let least = distance;
    this.runs(x - distance, y - distance, x + distance, y + distance, (from, to) => {
      for (let n = from; n < to; n++) {
        const far = Math.hypot(this.xs[n] - x, this.ys[n] - y);
        if (far <= least) [least, found] = [far, n];
      }
    });
    return found;
  }

  select(points) {
    this.selected.fill(0);
    for (const n of points) this.selected[n] = 1;
    this.selectedCount = points.length;
  }

  // One point for each square of a grid that lies still on the plane: the one nearest to its middle. Those that would
  // cover another one are left out.
  representatives(left, top, right, bottom, square, cover) {
    const firstX = Math.floor(left / square);
    const firstY = Math.floor(top / square);
    const columns = Math.floor(right / square) - firstX + 1;
    const lines = Math.floor(bottom / square) - firstY + 1;
    const best = new Int32Array(columns * lines).fill(-1);
    const least = new Float32Array(columns * lines).fill(Infinity);
    const { xs, ys } = this;
    this.runs(left, top, right, bottom, (from, to) => {
      for (let n = from; n < to; n++) {
        const x = xs[n] / square - firstX;
        const y = ys[n] / square - firstY;
        const column = Math.floor(x);
        const line = Math.floor(y);
        if (column < 0 || line < 0 || column >= columns || line >= lines) continue;
        const far = (x - column - 0.5) ** 2 + (y - line - 0.5) ** 2;
        const place = line * columns + column;
        if (far < least[place]) [least[place], best[place]] = [far, n];
      }
    });
    const covers = (one, other) =>
      other >= 0 && Math.abs(xs[one] - xs[other]) < cover && Math.abs(ys[one] - ys[other]) < cover;
    const found = [];
    for (let place = 0; place < best.length; place++) {
      const one = best[place];
      if (one < 0) continue;
      const column = place % columns;
      const before = [column ? place - 1 : -1, place - columns];
      if (column) before.push(place - columns - 1);
      if (column < columns - 1) before.push(place - columns + 1);
      if (before.some((other) => other >= 0 && covers(one, best[other]))) best[place] = -1;
      else found.push(one);
    }
    return found;
  }
}

// Draws points on a canvas.
export class Dots {
  constructor(canvas) {
    this.canvas = canvas;
    // In memory: its pixels are written by this script.
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.colours = null;
  }

  // The size in CSS pixels. More pixels than these cost time and show nothing more.
  resize(width, height) {
    this.ratio = Math.min(devicePixelRatio, Math.sqrt(1.8e6 / (width * height)));
    this.canvas.width = Math.max(1, Math.round(width * this.ratio));
    this.canvas.height = Math.max(1, Math.round(height * this.ratio));
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.pixels = new Uint32Array(this.image.data.buffer);
    // Discs at the edge reach over it.
    this.margin = 8;
    this.stride = this.canvas.width + 2 * this.margin;
    this.sums = new Uint8ClampedArray(this.stride * (this.canvas.height + 2 * this.margin));
    this.marks = new Uint8ClampedArray(this.sums.length);
  }

  // Colours of sums from 1 to 255, as [r, g, b]: of one point, of many; and of selected ones.
  paint(few, many, selected) {
    const table = (from, to, least) =>
      Uint32Array.from({ length: 256 }, (_, sum) => {
        if (!sum) return 0;
        const part = Math.min(1, sum / 24);
        const crowd = Math.min(1, Math.max(0, (sum - 24) / 200)) ** 0.7;
        const [r, g, b] = from.map((value, n) => Math.round(value + (to[n] - value) * crowd));
        const alpha = Math.round(255 * part * (least + (1 - least) * crowd));
        return ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
      });
    this.colours = [table(few, many, 0.7), table(selected, selected, 1)];
  }

  // Draws what is in view. x, y: the plane's place in the middle; scale: CSS pixels of a unit of the plane.
  draw(plane, x, y, scale) {
    const { width, height } = this.canvas;
    const { stride, margin, sums, marks, pixels } = this;
    const unit = scale * this.ratio;
    const [halfX, halfY] = [(width / 2 + margin) / unit, (height / 2 + margin) / unit];
    let inView = 0;
    plane.runs(x - halfX, y - halfY, x + halfX, y + halfY, (from, to) => (inView += to - from));
    const radius = this.ratio * (inView > 40_000 ? 1 : inView > 8_000 ? 1.5 : inView > 1_500 ? 2.2 : 3);
    if (this.disc?.radius !== radius || this.disc.stride !== stride) this.disc = disc(Math.min(radius, margin - 1), stride);
    const { reach, offsets, weights } = this.disc;
    const { xs, ys, selected } = plane;
    const any = plane.selectedCount > 0;
    sums.fill(0);
    if (any) marks.fill(0);
    const [originX, originY] = [width / 2 + margin - x * unit + 0.5, height / 2 + margin - y * unit + 0.5];
    const [right, bottom] = [stride - reach, height + 2 * margin - reach];
    const size = offsets.length;
    plane.runs(x - halfX, y - halfY, x + halfX, y + halfY, (from, to) => {
      for (let n = from; n < to; n++) {
        // Whole numbers, quicker than by Math.floor; what lies before 0 is not in view.
        const column = (xs[n] * unit + originX) | 0;
        const line = (ys[n] * unit + originY) | 0;
        if (column < reach || line < reach || column >= right || line >= bottom) continue;
        const at = line * stride + column;
        const into = any && selected[n] ? marks : sums;
        for (let k = 0; k < size; k++) into[at + offsets[k]] += weights[k];
      }
    });
    const [plain, marked] = this.colours;
    for (let line = 0, pixel = 0; line < height; line++) {
      let at = (line + margin) * stride + margin;
      const end = at + width;
      if (any) for (; at < end; at++) pixels[pixel++] = marks[at] ? marked[marks[at]] : plain[sums[at]];
      else for (; at < end; at++) pixels[pixel++] = plain[sums[at]];
    }
    this.context.putImageData(this.image, 0, 0);
  }
}
