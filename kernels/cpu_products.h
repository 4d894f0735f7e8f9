// Products of rows with packed weights: y (M, N) = x (M, K) times weights (K, N).
//
// Start reading at add_slab, where all products happen but those in tiles, then at multiply. A row
// of y is a sum over K in one order that depends on nothing but K: see cpu_kernels.cc.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu_threads.h"
#include "cpu_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace {

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

// --- Tiles ---------------------------------------------------------------------------------------
//
// AMX multiplies tiles: registers of TILE_ROWS rows of 64 bytes. One instruction adds to 16 rows of
// 16 sums the products of 16 words of inputs and of weights, in the order of K, each row by itself.

constexpr int TILE_ROWS = 16;
bool has_tiles = false;  // this CPU and its system have them: see ask_for_tiles

#if CODE_FOR_TILES
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of the eight tiles there are
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Linux wants to be asked once a process, since tiles make its context switches heavier.
void ask_for_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  has_tiles = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Compute PANEL columns of a block of up to 2 * TILE_ROWS rows. Tiles 0 to 3 hold sums, 4 and 5
// inputs, 6 and 7 weights. Rows that a block has not are computed and left out.
inline void multiply_tiles(const Product& p, const uint32_t* x, int64_t block, int64_t panel) {
  constexpr int AHEAD = 16384, LEVEL_2 = 2;
  constexpr int HALF = SLAB / 2, W_STRIDE = 4 * PANEL, X_STRIDE = 4 * SLAB;  // words; bytes
  static const TileShapes SHAPES;
  _tile_loadconfig(&SHAPES);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t rows = p.rows(block);
  const uint8_t* w = p.weights + panel * p.slabs * SLAB * W_STRIDE;
  for (int64_t half = 0; half < 2 * p.slabs; half++, w += HALF * W_STRIDE) {
    for (int i = 0; i < HALF * W_STRIDE; i += 64) __builtin_prefetch(w + AHEAD + i, 0, LEVEL_2);
    const uint32_t* inputs = x + half / 2 * rows * SLAB + half % 2 * HALF;
    _tile_loadd(6, w, W_STRIDE);
    _tile_loadd(7, w + W_STRIDE / 2, W_STRIDE);
    _tile_loadd(4, inputs, X_STRIDE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (rows <= TILE_ROWS) continue;
    _tile_loadd(5, inputs + TILE_ROWS * SLAB, X_STRIDE);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[2 * TILE_ROWS][PANEL];
  _tile_stored(0, &sums[0][0], W_STRIDE);
  _tile_stored(1, &sums[0][LANES], W_STRIDE);
  _tile_stored(2, &sums[TILE_ROWS][0], W_STRIDE);
  _tile_stored(3, &sums[TILE_ROWS][LANES], W_STRIDE);
  _tile_release();
  for (int64_t i = 0; i < 2 * rows; i++) {
    int64_t row = p.first_row(block) + i / 2, column = i % 2 * LANES;
    finish(p, load<Floats>(&sums[i / 2][column]), row, panel * PANEL + column);
  }
}
#else
void ask_for_tiles() {}
#endif

// --- The whole product ---------------------------------------------------------------------------

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

// Compute PANEL columns of a block of rows.
template <class Kind>
void multiply_rows(const Product& p, const typename Kind::Word* x, const float* x_scales,
                   int64_t block, int64_t panel) {
  static constexpr auto BLOCK = blocks_by_rows<Kind>(std::make_integer_sequence<int, MAX_ROWS>());
#if CODE_FOR_TILES
  if constexpr (std::is_same_v<Kind, Bfloat16>) {
    if (has_tiles) return multiply_tiles(p, x, block, panel);
  }
#endif
  BLOCK[p.rows(block) - 1](p, x, x_scales, block, panel);
}

template <class Kind>
ffi::Error multiply(Product p, size_t weight_bytes) {
  bool in_tiles = has_tiles && std::is_same_v<Kind, Bfloat16>;
  int64_t most_rows = in_tiles ? 2 * TILE_ROWS : MAX_ROWS;
  p.slabs = (p.K + Kind::DEPTH - 1) / Kind::DEPTH;
  p.panels = (p.N + PANEL - 1) / PANEL;
  p.blocks = (p.M + most_rows - 1) / most_rows;
  if (weight_bytes != size_t(p.panels * p.slabs * SLAB * PANEL * Kind::WEIGHT_BYTES))
    return ffi::Error::InvalidArgument("the packed weights are not those of (K, N)");
  // Kept for the next call: fresh memory costs page faults.
  static thread_local std::vector<typename Kind::Word> memory;
  static thread_local std::vector<float> memory_for_scales;
  size_t rows_read = p.M + most_rows;  // tiles read rows that nobody wrote, to no effect
  memory.resize(std::max<size_t>(memory.size(), rows_read * p.slabs * SLAB));
  memory_for_scales.resize(std::max<size_t>(memory_for_scales.size(), p.M * p.slabs));
  auto* words = memory.data();  // a name of its own: in another thread, `memory` is another vector
  auto* scales = memory_for_scales.data();
  team.run(p.blocks, p.M * p.K < PARALLEL_WORK / 4, [&](int64_t block) {
    for (int64_t slab = 0; slab < p.slabs; slab++) encode_rows<Kind>(p, block, slab, words, scales);
  });
  team.run(p.panels, p.M * p.K * p.N < PARALLEL_WORK, [&](int64_t panel) {
    for (int64_t block = 0; block < p.blocks; block++) {
      int64_t from = p.first_row(block) * p.slabs;
      multiply_rows<Kind>(p, words + from * SLAB, scales + from, block, panel);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
