// One new token of each sequence against the pages of its keys and values, in one pass and where they lie.
// Built for one type and head size by paged_attention.py, which says what the arguments are. Sums are float32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t D = HEAD_SIZE, PAGE = PAGE_TOKENS, LANES = 16, N = D / LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
  uint16_t bits;
};

using T = ELEMENT;

inline Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline Floats load(const bfloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Ints) << 16);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, Floats x) {  // to nearest, ties to even
  const Ints bits = (Ints)x;
  const Halves out = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
  std::memcpy(to, &out, sizeof out);
}

inline float sum(Floats x) {
  float out = 0;
  for (int64_t lane = 0; lane < LANES; lane++) out += x[lane];
  return out;
}

// e^x for x <= 0 as 2^n e^r, |r| <= ln(2) / 2: n makes the exponent's bits, e^r is its series, within 2e-7.
inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats r = x - __builtin_convertvector(n, Floats) * 0.693147181f;
  const Floats series =
      1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
  return series * (Floats)((n + 127) << 23);
}

// Calls f(token, row) for the rows of tokens [begin, end), page by page.
template <typename F>
inline void along(const T* pages, const int64_t* table, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t stop = std::min(end, (begin / PAGE + 1) * PAGE);
    const T* row = pages + (table[begin / PAGE] * PAGE + begin % PAGE) * D;
    for (; begin < stop; begin++, row += D) f(begin, row);
  }
}

}  // namespace

extern "C" void decode(const T* q, const T* k_new, const T* v_new, T* k_pages, T* v_pages, const int64_t* tables,
                       const int64_t* firsts, const int64_t* places, T* out, int64_t B, int64_t H, int64_t G,
                       int64_t pages, int64_t width, int64_t window, int64_t q_row, int64_t k_row, int64_t v_row,
                       float scale, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < B; b++) {
    for (int64_t g = 0; g < G; g++) {
      static thread_local std::vector<float> scratch;
      const int64_t place = places[b], begin = std::max<int64_t>(0, place - window), count = place + 1 - begin;
      const int64_t padded = (count + LANES - 1) / LANES * LANES;
      scratch.resize(padded);
      float* const weights = scratch.data();
      const int64_t* const table = tables + b * width - firsts[b];
      T *const k = k_pages + g * pages * PAGE * D, *const v = v_pages + g * pages * PAGE * D;
      const int64_t slot = (table[place / PAGE] * PAGE + place % PAGE) * D;
      std::memcpy(k + slot, k_new + b * k_row + g * D, D * sizeof(T));
      std::memcpy(v + slot, v_new + b * v_row + g * D, D * sizeof(T));
      for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++) {
        Floats query[N], total[N] = {}, whole = {};
        for (int64_t n = 0; n < N; n++) query[n] = load(q + b * q_row + h * D + n * LANES) * scale;
        along(k, table, begin, place + 1, [&](int64_t token, const T* key) {
          Floats dot = query[0] * load(key);
          for (int64_t n = 1; n < N; n++) dot += query[n] * load(key + n * LANES);
          weights[token - begin] = sum(dot);
        });
        const float top = *std::max_element(weights, weights + count);
        std::fill(weights + count, weights + padded, top);
        for (int64_t t = 0; t < padded; t += LANES) store(weights + t, exponential(load(weights + t) - top));
        std::fill(weights + count, weights + padded, 0.0f);
        for (int64_t t = 0; t < padded; t += LANES) whole += load(weights + t);
        const float share = 1 / sum(whole);
        for (int64_t t = 0; t < padded; t += LANES) store(weights + t, load(weights + t) * share);
        along(v, table, begin, place + 1, [&](int64_t token, const T* value) {
          for (int64_t n = 0; n < N; n++) total[n] += weights[token - begin] * load(value + n * LANES);
        });
        for (int64_t n = 0; n < N; n++) store(out + (b * H + h) * D + n * LANES, total[n]);
      }
    }
  }
}
