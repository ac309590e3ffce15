/* target = source + size * sign, of the entries of a direction on a tensor, which are made on the way.
 *
 * The same numbers as `walsh.Stream.pieces` gives and an addition: random words are those of `counter`, the signs of a
 * row those of `walsh`, sizes those of `laws`. Products and the sum are each rounded: none may be fused with another.
 * Compiled by `compiled`, which gives the numbers of entries in capitals.
 */

#include <stdint.h>
#include <string.h>

enum { PER_BLOCK = WORD * BLOCK, AHEAD = 1024, LINE = 16, WORTH_THREADS = 16 };

static inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t most(uint64_t a, uint64_t b) { return a < b ? b : a; }

/* Philox4x32-10: the words of some blocks, BLOCK each. */
static void draw(uint64_t key, uint32_t step, uint32_t index, uint64_t first, uint64_t blocks, uint32_t *words) {
  for (uint64_t i = 0; i < blocks; i++) {
    uint32_t c0 = (uint32_t)(first + i), c1 = (uint32_t)((first + i) >> 32), c2 = index, c3 = step;
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
      uint64_t even = (uint64_t)c0 * 0xD2511F53u, odd = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(odd >> 32) ^ c1 ^ k0;
      c1 = (uint32_t)odd;
      c2 = (uint32_t)(even >> 32) ^ c3 ^ k1;
      c3 = (uint32_t)even;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t *block = words + BLOCK * i;
    block[0] = c0, block[1] = c1, block[2] = c2, block[3] = c3;
  }
}

/* The signs of a row of the Walsh-Hadamard matrix, on words that stand in it from number `first` on. */
static void sign(uint64_t row, uint32_t low, uint64_t first, uint64_t count, uint32_t *words) {
  for (uint64_t i = 0; i < count; i++) {
    uint64_t common = (first + i) & row;
    for (int half = 32; half; half /= 2) common ^= common >> half;
    words[i] ^= low ^ (0u - (uint32_t)(common & 1));
  }
}

/* What the entries of a direction are multiplied with, one number after the other. */
struct scale {
  float stretch, factor;
};

static inline float shift(float size, struct scale by, uint32_t word, int bit) {
  float moved = size * by.stretch * by.factor;
  uint32_t bits;
  memcpy(&bits, &moved, sizeof bits);
  bits ^= (word >> bit) << 31;
  memcpy(&moved, &bits, sizeof moved);
  return moved;
}

/* The entries of whole words. By way of `moved`, as what may be one place is not made of vectors. */
static void add_words(uint64_t count, const uint32_t *words, const float *sizes, struct scale by, const float *source,
                      float *target) {
  for (uint64_t i = 0; i < count; i++, sizes += WORD, source += WORD, target += WORD) {
    float moved[WORD];
    for (int ahead = 0; ahead < WORD; ahead += LINE) __builtin_prefetch(source + AHEAD + ahead);
    for (int bit = 0; bit < WORD; bit++) moved[bit] = source[bit] + shift(sizes[bit], by, words[i], bit);
    memcpy(target, moved, sizeof moved);
  }
}

static void add_part(int bit, uint64_t count, uint32_t word, const float *sizes, struct scale by, const float *source,
                     float *target) {
  for (uint64_t i = 0; i < count; i++) target[i] = source[i] + shift(sizes[i], by, word, bit + (int)i);
}

/* Entries `first` to `stop`, which are of one run. */
static void add_run(uint64_t key, uint32_t step, uint32_t index, int64_t row, uint32_t low, uint64_t first_word,
                    const float *sizes, struct scale by, uint64_t first, uint64_t stop, const float *source,
                    float *target) {
  uint32_t words[RUN / WORD];
  const uint64_t block = first / PER_BLOCK, blocks = (stop - 1) / PER_BLOCK + 1 - block;
  draw(key, step, index, block, blocks, words);
  if (row >= 0) sign((uint64_t)row, low, first_word + block * BLOCK, blocks * BLOCK, words);
  const uint32_t *word = words + (first / WORD - block * BLOCK);
  while (first < stop) {
    const int bit = (int)(first % WORD);
    uint64_t done = (stop - first) / WORD * WORD;
    if (bit || !done) {
      done = least(WORD - bit, stop - first);
      add_part(bit, done, *word, sizes, by, source, target);
    } else {
      add_words(done / WORD, word, sizes, by, source, target);
    }
    word += (done + WORD - 1) / WORD;
    first += done, sizes += done, source += done, target += done;
  }
}

/* Entries `first` to `first + count`, of which there is one at least; the target may be the source.
 *
 * key, step, index, row, low, first_word: as in `walsh.Stream`.
 * sizes: with `places`, the table of `laws`; else 1, RUN times.
 * places: where in the table each run begins, the first run being that of entry `first`; or null.
 * stretch, factor: what entries are multiplied with.
 * threads: how many may do it, each some runs. Where torch has the same OpenMP they are its own.
 */
void sotto_move(uint64_t key, uint32_t step, uint32_t index, int64_t row, uint32_t low, uint64_t first_word,
                const float *sizes, const uint32_t *places, float stretch, float factor, uint64_t first, uint64_t count,
                const float *source, float *target, int threads) {
  const struct scale by = {stretch, factor};
  const uint64_t stop = first + count, first_run = first / RUN;
  const int64_t runs = (int64_t)((stop - 1) / RUN + 1 - first_run);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && runs >= WORTH_THREADS)
  for (int64_t run = 0; run < runs; run++) {
    const uint64_t begin = (first_run + run) * RUN, from = most(first, begin);
    add_run(key, step, index, row, low, first_word, places ? sizes + places[run] + (from - begin) : sizes, by, from,
            least(stop, begin + RUN), source + (from - first), target + (from - first));
  }
}
