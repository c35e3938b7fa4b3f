"use strict";

/* fp16, bf16 and fp32 in JavaScript, and the online softmax in them.

   A number of a type is held in a double, which has more than twice the bits of each type, and 2
   more: sums, differences, products and quotients in doubles, rounded once more to the type, are
   the type's own (S. Figueroa, "When is double rounding innocuous?", 1995).
   tests/docs/test_playground.py holds all of it against torch. */
const numbers = (() => {
  // `bits` of significand, the leading one included; exponents of the smallest and largest normal.
  const TYPES = {
    fp16: { bits: 11, minExponent: -14, maxExponent: 15 },
    bf16: { bits: 8, minExponent: -126, maxExponent: 127 },
    fp32: { bits: 24, minExponent: -126, maxExponent: 127 },
  };
  const view = new DataView(new ArrayBuffer(8));

  /* Exponent of a double; -1023 for its subnormals, which are smaller than any type's spacing. */
  function exponentOf(x) {
    view.setFloat64(0, x);
    return ((view.getUint16(0) >> 4) & 0x7ff) - 1023;
  }

  /* The number of the type nearest to a double; of two equally near, the one with an even last bit.
     Numbers of the type near x are a fixed spacing apart, the same for all subnormals. */
  function round(type, x) {
    const { bits, minExponent, maxExponent } = TYPES[type];
    if (!Number.isFinite(x) || x === 0) return x;
    const spacing = 2 ** (Math.max(exponentOf(x), minExponent) - bits + 1);
    // Doubles from 2**52 on are the integers: adding it rounds to nearest even.
    const units = Math.abs(x) / spacing + 2 ** 52 - 2 ** 52;
    const size = units * spacing;
    return Math.sign(x) * (size < 2 ** (maxExponent + 1) ? size : Infinity);
  }

  const max = (items) => items.reduce((a, b) => Math.max(a, b), -Infinity);
  const finite = (m) => (m === -Infinity ? 0 : m);

  /* Exponentials and weights of a row by the formula as written or, if `safe`, less the maximum.
     Scores are numbers of the type; so are all results. */
  function softmax(type, scores, safe) {
    const m = safe ? finite(max(scores)) : 0;
    const exponentials = scores.map((s) => round(type, Math.exp(round(type, s - m))));
    const sum = exponentials.reduce((total, e) => round(type, total + e), 0);
    const weights = exponentials.map((e) => round(type, e / (safe && sum === 0 ? 1 : sum)));
    return { exponentials, sum, weights };
  }

  /* The state (m, l, o) of one block of keys. `kept` is the type of the state; weights are rounded
     to `type`, that of the values, before they are multiplied, as a kernel does. */
  function stateOf(type, kept, scores, values) {
    const m = max(scores);
    const state = { m, l: 0, o: 0 };
    scores.forEach((score, j) => {
      const p = round(kept, Math.exp(round(kept, score - finite(m))));
      state.l = round(kept, state.l + p);
      state.o = round(kept, state.o + round(kept, round(type, p) * values[j]));
    });
    return state;
  }

  /* The state of the keys of two states, and the factors that bring each to the larger maximum. */
  function merge(kept, a, b) {
    const m = Math.max(a.m, b.m);
    const factor = (state) => round(kept, Math.exp(round(kept, state.m - finite(m))));
    const [factorA, factorB] = [factor(a), factor(b)];
    const sum = (x, y) => round(kept, round(kept, factorA * x) + round(kept, factorB * y));
    return { m, l: sum(a.l, b.l), o: sum(a.o, b.o), factorA, factorB };
  }

  const EMPTY = { m: -Infinity, l: 0, o: 0 };

  /* Blocks of keys, as lists of indices, taken into the state one after the other. One entry a
     block: the block's own state, the state after it, and the output so far in `type`. */
  function online(type, kept, scores, values, blocks) {
    let state = EMPTY;
    return blocks.map((keys) => {
      const own = stateOf(type, kept, keys.map((j) => scores[j]), keys.map((j) => values[j]));
      state = merge(kept, state, own);
      return { keys, own, state, out: round(type, state.o / (state.l === 0 ? 1 : state.l)) };
    });
  }

  /* The same in double precision, to compare with. */
  function exact(scores, values) {
    const m = max(scores);
    const exponentials = scores.map((s) => Math.exp(s - finite(m)));
    const l = exponentials.reduce((a, b) => a + b, 0);
    const o = exponentials.reduce((total, e, j) => total + e * values[j], 0);
    return { m, l, o, weights: exponentials.map((e) => e / (l || 1)), out: o / (l || 1) };
  }

  /* The last score whose exponential is finite, and the last below 0 whose is not 0: numbers of one
     sign keep their order when their bits are read as integers, so the bits are searched. */
  function limits(type) {
    const last = (sign, good) => {
      let [below, above] = [0, 0x7f800000];
      const at = (pattern) => (view.setInt32(0, pattern), round(type, view.getFloat32(0) * sign));
      while (above - below > 1) {
        const middle = (below + above) >>> 1;
        if (good(round(type, Math.exp(at(middle))))) below = middle;
        else above = middle;
      }
      return at(below);
    };
    return { above: last(1, (e) => e < Infinity), below: last(-1, (e) => e > 0) };
  }

  return { TYPES, round, softmax, stateOf, merge, online, exact, limits };
})();
