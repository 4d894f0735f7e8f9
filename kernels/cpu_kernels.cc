// Products of rows with packed weights, and attention over a paged KV cache, on a CPU.
//
// cpu_kernels.py builds this file and says what its handlers, at the end, take and return. Start
// reading at add_slab, where all products happen, and at attend.
//
// The same bits: a row of y is a sum over K, a token's attention a sum over positions, and each sum
// has one order that depends on nothing but K, or on positions. Neither the number of rows, nor
// which rows share a block of registers, nor how a prompt is cut into chunks, nor the number of
// threads changes a bit. So threads divide columns, rows and heads among them, but never a sum.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu_threads.h"
#include "cpu_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace {

constexpr int64_t PARALLEL_WORK = 1 << 18;  // multiplications; for fewer, threads do not pay

// --- Products ----------------------------------------------------------------------------------
//
// K is cut into slabs of SLAB words, filled up with zeros. A word is what one instruction takes of
// a row or a column: a float32, or a pair of neighbours along K in fewer bits. Weights come in
// panels of PANEL columns, each (slabs, SLAB, PANEL) words, so that memory is read in order; inputs
// in blocks of up to MAX_ROWS rows, each (slabs, rows, SLAB) words. Each kind of word says how to
// encode the DEPTH inputs of a slab, and how to add the products of a word to sums.

constexpr int SLAB = 32, PANEL = 2 * LANES;

// float32 times float32.
struct Float32 {
  using Word = float;      // of inputs
  using Weights = Floats;  // one word of LANES columns
  using Sums = Floats;     // of LANES columns
  static constexpr int DEPTH = SLAB, WEIGHT_BYTES = 4, SCALED = false;

  static void encode(const float* x, Word* words, float*) { std::copy_n(x, DEPTH, words); }
  static Weights weights(const uint8_t* w) { return load<Floats>(w); }
  static Sums add(Sums sums, Word x, Weights w) { return sums + w * x; }
};

// bfloat16 times bfloat16 in float32. A word is a pair, the first in its low half.
struct Bfloat16 {
  using Word = uint32_t;
  using Weights = Words;
  using Sums = Floats;
  static constexpr int DEPTH = 2 * SLAB, WEIGHT_BYTES = 4, SCALED = false;

  static void encode(const float* x, Word* words, float*) {
    for (int k = 0; k < SLAB; k++) {
      words[k] = to_bfloat16(x[2 * k]) | uint32_t(to_bfloat16(x[2 * k + 1])) << 16;
    }
  }
  static Weights weights(const uint8_t* w) { return load<Words>(w); }
  static Sums add(Sums sums, Word x, Weights w) {
#ifdef __AVX512BF16__
    return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#else
    sums = sums + (Floats)(w << 16) * from_bfloat16(x);
    return sums + (Floats)(w & 0xffff0000u) * from_bfloat16(x >> 16);
#endif
  }
};

// int8 weights with a scale per column and slab. The inputs of a row and slab become int16 with one
// scale: errors are 2^-16 of the largest, where those of bfloat16 are 2^-9 of each. A slab's sums
// are exact integers, below 64 * 127 * 32767 < 2^31; slabs are added in float32.
struct Int8 {
  using Word = uint32_t;
  using Weights = Shorts;
  using Sums = Ints;
  static constexpr int DEPTH = 2 * SLAB, WEIGHT_BYTES = 2, SCALED = true;

  static void encode(const float* x, Word* words, float* scale) {
    uint32_t bits = 0;  // of the largest |x|: ordered as the numbers are, infinity and NaN last
    for (int k = 0; k < DEPTH; k++) bits = std::max(bits, load<uint32_t>(x + k) & 0x7fffffff);
    float largest = load<float>(&bits);
    bool has_inverse = largest > 1e-30f && largest < INFINITY;
    float inverse = has_inverse ? 32767.0f / largest : 0.0f;
    auto quantise = [=](float x) { return has_inverse ? int16_t(std::nearbyint(x * inverse)) : 0; };
    for (int k = 0; k < SLAB; k++) {
      words[k] = uint16_t(quantise(x[2 * k])) | uint32_t(quantise(x[2 * k + 1])) << 16;
    }
    *scale = largest / 32767.0f;  // infinity or NaN makes the row NaN
  }
  static Weights weights(const uint8_t* w) {
    return __builtin_convertvector(load<Bytes>(w), Shorts);
  }
  static Sums add(Sums sums, Word x, Weights w) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (Sums)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    return sums + (Sums)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    return sums + (Sums)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else
    Ints first = (Ints)w << 16 >> 16, second = (Ints)w >> 16;
    return sums + first * int32_t(int16_t(x)) + second * int32_t(int16_t(x >> 16));
#endif
  }
};

// A call: y (M, N) float32 = x (M, K), float32 or bfloat16, times weights, plus bias.
struct Product {
  int64_t M, K, N;
  const void* x;
  bool x_is_float32;
  const uint8_t* weights;
  const float* scales;  // (panels, slabs, PANEL) for int8
  const float* bias;    // (N,) or null
  bool gelu_new;
  float* y;
  int64_t slabs, panels, blocks;

  // Blocks have as equal numbers of rows as can be.
  int64_t first_row(int64_t block) const { return M * block / blocks; }
  int64_t rows(int64_t block) const { return first_row(block + 1) - first_row(block); }
};

// Add one slab of K to the sums of ROWS rows and PANEL columns, one word of K after the other.
// sums[r] is two registers: row r, the first LANES columns and the others.
template <class Kind, int ROWS>
inline void add_slab(const typename Kind::Word* x, const uint8_t* w,
                     typename Kind::Sums (&sums)[ROWS][2]) {
  constexpr int HALF = LANES * Kind::WEIGHT_BYTES;
  constexpr int AHEAD = 16384, LEVEL_2 = 2;  // bytes; to the cache of level 2, level 1 was slower
  for (int k = 0; k < SLAB; k++, w += 2 * HALF) {
    for (int i = 0; i < 2 * HALF; i += 64) __builtin_prefetch(w + AHEAD + i, 0, LEVEL_2);
    auto left = Kind::weights(w), right = Kind::weights(w + HALF);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      sums[r][0] = Kind::add(sums[r][0], x[r * SLAB + k], left);
      sums[r][1] = Kind::add(sums[r][1], x[r * SLAB + k], right);
    }
  }
}

// Write LANES columns of a row of y, or those of them that there are, with bias and activation.
inline void finish(const Product& p, Floats y, int64_t row, int64_t column) {
  int64_t columns = std::min<int64_t>(p.N - column, LANES);
  if (columns <= 0) return;
  Floats bias{};
  if (p.bias) std::memcpy(&bias, p.bias + column, 4 * columns);
  y += bias;
  if (p.gelu_new) y = gelu_new(y);
  std::memcpy(p.y + row * p.N + column, &y, 4 * columns);
}

// Compute PANEL columns of a block of ROWS rows: the whole sum over K, in the order of K.
template <class Kind, int ROWS>
void multiply_block(const Product& p, const typename Kind::Word* x, const float* x_scales,
                    int64_t block, int64_t panel) {
  typename Kind::Sums sums[ROWS][2] = {};
  Floats totals[ROWS][2] = {};  // of slabs with scales; in memory, no register is left
  for (int64_t slab = 0; slab < p.slabs; slab++) {
    int64_t w = (panel * p.slabs + slab) * PANEL;
    add_slab<Kind, ROWS>(x + slab * ROWS * SLAB, p.weights + w * SLAB * Kind::WEIGHT_BYTES, sums);
    for (int i = 0; Kind::SCALED && i < 2 * ROWS; i++) {
      auto& sum = sums[i / 2][i % 2];
      Floats scale = load<Floats>(p.scales + w + i % 2 * LANES) * x_scales[slab * ROWS + i / 2];
      totals[i / 2][i % 2] += __builtin_convertvector(sum, Floats) * scale;
      sum = typename Kind::Sums{};
    }
  }
  for (int i = 0; i < 2 * ROWS; i++) {
    Floats y = Kind::SCALED ? totals[i / 2][i % 2] : (Floats)sums[i / 2][i % 2];
    finish(p, y, p.first_row(block) + i / 2, panel * PANEL + i % 2 * LANES);
  }
}

// Encode one slab of a block's rows into the words and scales of all blocks.
template <class Kind>
void encode_rows(const Product& p, int64_t block, int64_t slab, typename Kind::Word* words,
                 float* scales) {
  int64_t to = p.first_row(block) * p.slabs + slab * p.rows(block);
  int64_t start = slab * Kind::DEPTH, depth = std::min<int64_t>(Kind::DEPTH, p.K - start);
  for (int64_t r = 0; r < p.rows(block); r++) {
    int64_t from = (p.first_row(block) + r) * p.K + start;
    float numbers[Kind::DEPTH] = {};
    for (int64_t k = 0; k < depth; k++) numbers[k] = number(p.x, p.x_is_float32, from + k);
    Kind::encode(numbers, words + (to + r) * SLAB, scales + to + r);
  }
}

template <class Kind, int... LESS_ONE>  // 0 to MAX_ROWS - 1
constexpr auto blocks_by_rows(std::integer_sequence<int, LESS_ONE...>) {
  return std::array{&multiply_block<Kind, LESS_ONE + 1>...};
}

template <class Kind>
ffi::Error multiply(Product p, size_t weight_bytes) {
  p.slabs = (p.K + Kind::DEPTH - 1) / Kind::DEPTH;
  p.panels = (p.N + PANEL - 1) / PANEL;
  p.blocks = (p.M + MAX_ROWS - 1) / MAX_ROWS;
  if (weight_bytes != size_t(p.panels * p.slabs * SLAB * PANEL * Kind::WEIGHT_BYTES))
    return ffi::Error::InvalidArgument("the packed weights are not those of (K, N)");
  static constexpr auto BLOCK = blocks_by_rows<Kind>(std::make_integer_sequence<int, MAX_ROWS>());
  // Kept for the next call: fresh memory costs page faults.
  static thread_local std::vector<typename Kind::Word> memory;
  static thread_local std::vector<float> memory_for_scales;
  memory.resize(std::max<size_t>(memory.size(), p.M * p.slabs * SLAB));
  memory_for_scales.resize(std::max<size_t>(memory_for_scales.size(), p.M * p.slabs));
  auto* words = memory.data();  // a name of its own: in another thread, `memory` is another vector
  auto* scales = memory_for_scales.data();
  team.run(p.blocks, p.M * p.K < PARALLEL_WORK / 4, [&](int64_t block) {
    for (int64_t slab = 0; slab < p.slabs; slab++) encode_rows<Kind>(p, block, slab, words, scales);
  });
  team.run(p.panels, p.M * p.K * p.N < PARALLEL_WORK, [&](int64_t panel) {
    for (int64_t block = 0; block < p.blocks; block++) {
      int64_t from = p.first_row(block) * p.slabs;
      BLOCK[p.rows(block) - 1](p, words + from * SLAB, scales + from, block, panel);
    }
  });
  return ffi::Error::Success();
}

// --- Attention over pages ----------------------------------------------------------------------

// A call. G heads of queries read each of KV heads of keys.
struct Attention {
  const float *q, *k, *v;  // (B, T, KV, G, D); the new tokens' (B, T, KV, D)
  void *k_pages, *v_pages;  // (L, N, KV, P, D) float32, or the bits of bfloat16
  bool is_float32;
  const int32_t *tables, *context_lens, *new_lens;  // (B, M), (B,), (B,)
  int64_t layer, B, T, KV, G, D, L, N, P, M;
  float scale;
  float* y;  // like q

  int64_t real_tokens(int64_t b) const { return std::clamp<int64_t>(new_lens[b], 0, T); }

  // Return where in a pool the D numbers of row b, a head and a position are.
  int64_t offset(int64_t b, int64_t head, int64_t position) const {
    int64_t page = layer * N + tables[b * M + position / P];
    return ((page * KV + head) * P + position % P) * D;
  }
};

// Return whether every page and length of the real tokens lies in the pool.
bool is_valid(const Attention& a) {
  bool valid = a.layer >= 0 && a.layer < a.L;
  for (int64_t b = 0; b < a.B; b++) {
    if (a.real_tokens(b) == 0) continue;  // a padding row's context means nothing
    int64_t length = a.context_lens[b] + a.real_tokens(b);
    valid = valid && a.context_lens[b] >= 0 && length <= a.M * a.P;
    for (int64_t i = 0; valid && i * a.P < length; i++) {
      valid = a.tables[b * a.M + i] >= 0 && a.tables[b * a.M + i] < a.N;
    }
  }
  return valid;
}

// Write a token's keys or values x (KV, D) into its page.
void write_token(const Attention& a, int64_t b, int64_t position, const float* x, void* pages) {
  for (int64_t head = 0; head < a.KV; head++, x += a.D) {
    int64_t to = a.offset(b, head, position);
    if (a.is_float32) std::copy_n(x, a.D, (float*)pages + to);
    else std::transform(x, x + a.D, (uint16_t*)pages + to, to_bfloat16);
  }
}

// Find keys or values at `count` or LANES offsets of a pool, (width,) numbers each: in the pool, or
// copied to `copies` (LANES, width), whose columns from D on are 0. Rows from `count` on are 0.
void find_rows(const Attention& a, const void* pages, const int64_t* offsets, int64_t count,
               int64_t width, float* copies, const float** rows) {
  for (int64_t j = 0; j < LANES; j++) {
    float* copy = copies + j * width;
    rows[j] = copy;
    if (j >= count) std::fill_n(copy, a.D, 0.0f);
    else if (a.is_float32 && width == a.D) rows[j] = (const float*)pages + offsets[j];
    else for (int64_t d = 0; d < a.D; d++) copy[d] = number(pages, a.is_float32, offsets[j] + d);
  }
}

// Ask for up to LANES rows before they are needed: pages lie scattered, so memory does not guess.
void prefetch_rows(const Attention& a, const void* pages, const int64_t* offsets, int64_t count) {
  int64_t bytes = a.is_float32 ? 4 : 2;
  for (int64_t j = 0; j < std::min<int64_t>(count, LANES); j++) {
    const char* row = (const char*)pages + offsets[j] * bytes;
    for (int64_t i = 0; i < a.D * bytes; i += 64) __builtin_prefetch(row + i);
  }
}

// Return the products of q (width,) with LANES rows: by lane of d, then the lanes in a tree.
inline Floats dot_rows(const float* q, const float* const* rows, int64_t width) {
  Floats sums[LANES] = {};
  for (int64_t d = 0; d < width; d += LANES) {
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) sums[j] += load<Floats>(rows[j] + d) * load<Floats>(q + d);
  }
  return sums_of_lanes(sums);
}

// Add `count` rows times their weights to y (width,), one position after the other.
inline void add_rows(float* y, const float* const* rows, const float* weights, int64_t count,
                     int64_t width) {
  for (int64_t d = 0; d < width; d += LANES) {
    Floats sums = load<Floats>(y + d);
    for (int64_t j = 0; j < count; j++) sums += load<Floats>(rows[j] + d) * weights[j];
    store(y + d, sums);
  }
}

// Replace n scores by their softmax. Its denominator is summed by lane in the order of positions,
// then over the lanes. Numbers up to the next multiple of LANES are overwritten.
void softmax(float* scores, int64_t n) {
  Floats sums{};
  float largest = *std::max_element(scores, scores + n);
  std::fill_n(scores + n, -n & (LANES - 1), -INFINITY);
  for (int64_t s = 0; s < n; s += LANES) {
    Floats weights = exp(load<Floats>(scores + s) - largest);
    store(scores + s, weights);
    sums += weights;
  }
  float sum = 0;
  for (int j = 0; j < LANES; j++) sum += sums[j];
  for (int64_t s = 0; s < n; s++) scores[s] /= sum;
}

// Attend from `tokens` tokens of row b from `first` on; their queries read one head of keys.
void attend(const Attention& a, int64_t b, int64_t head, int64_t first, int64_t tokens) {
  int64_t queries = tokens * a.G, width = (a.D + LANES - 1) / LANES * LANES;
  int64_t stop = a.context_lens[b] + first + tokens;  // the last token sees positions before it
  int64_t stride = (stop + LANES - 1) / LANES * LANES;
  static thread_local std::vector<float> numbers, weights;  // weights are (queries, stride)
  static thread_local std::vector<int64_t> offsets;         // of positions, in the pool
  numbers.assign((2 * queries + LANES) * width, 0.0f);
  weights.resize(std::max<size_t>(weights.size(), queries * stride));
  float *q = &numbers[0], *y = q + queries * width, *copies = y + queries * width;
  const float* rows[LANES];
  auto visible = [&](int64_t i) { return a.context_lens[b] + first + i / a.G + 1; };
  auto place = [&](int64_t i) {  // of query i in a.q and a.y
    return (((b * a.T + first + i / a.G) * a.KV + head) * a.G + i % a.G) * a.D;
  };
  offsets.clear();
  for (int64_t position = 0; position < stop; position += a.P) {
    int64_t page = a.offset(b, head, position);
    for (int64_t slot = 0; slot < a.P; slot++) offsets.push_back(page + slot * a.D);
  }
  for (int64_t i = 0; i < queries; i++) {
    for (int64_t d = 0; d < a.D; d++) q[i * width + d] = a.q[place(i) + d] * a.scale;
  }
  for (int64_t start = 0; start < stop; start += LANES) {
    prefetch_rows(a, a.k_pages, &offsets[start] + 2 * LANES, stop - start - 2 * LANES);
    prefetch_rows(a, a.v_pages, &offsets[start], stop - start);
    find_rows(a, a.k_pages, &offsets[start], stop - start, width, copies, rows);
    for (int64_t i = 0; i < queries; i++) {
      store(&weights[i * stride + start], dot_rows(q + i * width, rows, width));
    }
  }
  for (int64_t i = 0; i < queries; i++) softmax(&weights[i * stride], visible(i));
  for (int64_t start = 0; start < stop; start += LANES) {
    find_rows(a, a.v_pages, &offsets[start], stop - start, width, copies, rows);
    for (int64_t i = 0; i < queries; i++) {
      int64_t count = std::clamp<int64_t>(visible(i) - start, 0, LANES);
      add_rows(y + i * width, rows, &weights[i * stride + start], count, width);
    }
  }
  for (int64_t i = 0; i < queries; i++) std::copy_n(y + i * width, a.D, a.y + place(i));
}

void attend_all(const Attention& a) {
  int64_t tile = std::max<int64_t>(1, 16 / a.G);  // tokens that share what find_rows finds
  int64_t tiles = (a.T + tile - 1) / tile;
  int64_t positions = 0;  // that queries read
  for (int64_t b = 0; b < a.B; b++) {
    positions += a.real_tokens(b) * (a.context_lens[b] + a.real_tokens(b)) * a.KV * a.G;
  }
  bool is_small = positions * a.D < PARALLEL_WORK;
  team.run(a.B * a.T, is_small, [&](int64_t i) {
    int64_t b = i / a.T, t = i % a.T;
    if (t >= a.real_tokens(b)) return;  // padding is written nowhere
    write_token(a, b, a.context_lens[b] + t, a.k + i * a.KV * a.D, a.k_pages);
    write_token(a, b, a.context_lens[b] + t, a.v + i * a.KV * a.D, a.v_pages);
  });  // all is written before anything is read: rows may share pages
  team.run(a.B * a.KV * tiles, is_small, [&](int64_t i) {
    int64_t b = i / tiles / a.KV, head = i / tiles % a.KV, first = i % tiles * tile;
    int64_t tokens = std::clamp<int64_t>(a.real_tokens(b) - first, 0, tile);
    if (tokens > 0) attend(a, b, head, first, tokens);
    for (int64_t t = first + tokens; t < std::min(a.T, first + tile); t++) {
      std::fill_n(a.y + ((b * a.T + t) * a.KV + head) * a.G * a.D, a.G * a.D, 0.0f);
    }
  });
}

// --- Handlers ----------------------------------------------------------------------------------

using Any = ffi::AnyBuffer;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

ffi::Error product(Any x, Any weights, F32 scales, F32 bias, ffi::Result<F32> y, bool gelu_new) {
  Product p{};
  p.M = x.dimensions()[0], p.K = x.dimensions()[1], p.N = y->dimensions()[1];
  p.x = x.untyped_data(), p.x_is_float32 = x.element_type() == ffi::F32;
  p.weights = (const uint8_t*)weights.untyped_data(), p.scales = scales.typed_data();
  p.bias = bias.element_count() > 0 ? bias.typed_data() : nullptr;
  p.gelu_new = gelu_new, p.y = y->typed_data();
  auto kind = weights.element_type();
  if (kind == ffi::F32) return multiply<Float32>(p, weights.size_bytes());
  if (kind == ffi::U16) return multiply<Bfloat16>(p, weights.size_bytes());
  return multiply<Int8>(p, weights.size_bytes());
}

ffi::Error paged_attention(F32 q, F32 k, F32 v, Any k_pages, Any v_pages, S32 tables,
                           S32 context_lens, S32 new_lens, S32 layer, ffi::Result<F32> y,
                           ffi::Result<Any> k_out, ffi::Result<Any> v_out, float scale) {
  Attention a{};
  a.q = q.typed_data(), a.k = k.typed_data(), a.v = v.typed_data(), a.y = y->typed_data();
  a.k_pages = k_out->untyped_data(), a.v_pages = v_out->untyped_data();
  a.is_float32 = k_pages.element_type() == ffi::F32;
  a.tables = tables.typed_data(), a.context_lens = context_lens.typed_data();
  a.new_lens = new_lens.typed_data(), a.layer = layer.typed_data()[0], a.scale = scale;
  auto pool = k_pages.dimensions();
  a.L = pool[0], a.N = pool[1], a.KV = pool[2], a.P = pool[3], a.D = pool[4];
  a.B = q.dimensions()[0], a.T = q.dimensions()[1], a.G = q.dimensions()[2] / a.KV;
  a.M = tables.dimensions()[1];
  if (a.k_pages != k_pages.untyped_data() || a.v_pages != v_pages.untyped_data()) {
    return ffi::Error::Internal("the pool is not updated in place");
  }
  if (!is_valid(a)) return ffi::Error::InvalidArgument("a layer, length or page lies outside");
  attend_all(a);
  return ffi::Error::Success();
}

}  // namespace

extern "C" int panel_columns() { return PANEL; }
extern "C" void start_threads(int helpers) { team.start(helpers); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_handler, product,
                              ffi::Ffi::Bind().Arg<Any>().Arg<Any>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Attr<bool>("gelu_new"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_handler, paged_attention,
                              ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().Arg<Any>()
                                  .Arg<Any>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>().Ret<Any>().Ret<Any>().Attr<float>("scale"));
