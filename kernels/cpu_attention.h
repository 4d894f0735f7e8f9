// Attention over a paged KV cache: see paged_attention in cpu_kernels.py.
//
// Start reading at attend. A token's attention is a sum over positions in one order that depends on
// nothing but positions: see cpu_kernels.cc.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_threads.h"
#include "cpu_vectors.h"

namespace {

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

// Some neighbouring tokens of a row, and neighbouring heads of keys that their queries read.
struct Tile {
  int64_t b, first_token, tokens, first_head, heads;
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
  bool is_whole = width == a.D;  // a row is whole registers
  auto* halves = (const uint16_t*)pages;
  for (int64_t j = 0; j < LANES; j++) {
    float* copy = copies + j * width;
    rows[j] = copy;
    if (j >= count) std::fill_n(copy, a.D, 0.0f);
    else if (a.is_float32 && is_whole) rows[j] = (const float*)pages + offsets[j];
    else if (a.is_float32) std::copy_n((const float*)pages + offsets[j], a.D, copy);
    else if (is_whole) widen(halves + offsets[j], width, copy);
    else std::transform(halves + offsets[j], halves + offsets[j] + a.D, copy, from_bfloat16);
  }
}

// Ask for LANES rows before they are needed.
inline void prefetch_rows(const Attention& a, const void* pages, const int64_t* offsets,
                          int64_t count) {
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

// Attend from a tile. Pages are read one after the other, of each all heads of the tile: what lies
// side by side in memory.
void attend(const Attention& a, const Tile& tile) {
  int64_t a_head = tile.tokens * a.G;  // queries that read one head of keys
  int64_t queries = tile.heads * a_head;
  int64_t width = (a.D + LANES - 1) / LANES * LANES;
  int64_t seen = a.context_lens[tile.b] + tile.first_token + 1;  // positions, by the first token
  int64_t stop = seen + tile.tokens - 1;                         // by the last one
  int64_t stride = (stop + LANES - 1) / LANES * LANES;
  static thread_local std::vector<float> numbers, weights;  // weights are (queries, stride)
  static thread_local std::vector<int64_t> offsets;         // of positions, for the first head
  numbers.assign((2 * queries + LANES) * width, 0.0f);
  weights.resize(std::max<size_t>(weights.size(), queries * stride));
  float *q = &numbers[0], *y = q + queries * width, *copies = y + queries * width;
  const float* rows[LANES];
  auto visible = [&](int64_t i) { return seen + i % a_head / a.G; };
  auto place = [&](int64_t i) {  // of query i in a.q and a.y
    int64_t head = tile.first_head + i / a_head, token = tile.first_token + i % a_head / a.G;
    return (((tile.b * a.T + token) * a.KV + head) * a.G + i % a.G) * a.D;
  };
  offsets.clear();
  for (int64_t position = 0; position < stop; position += a.P) {
    int64_t page = a.offset(tile.b, tile.first_head, position);
    for (int64_t slot = 0; slot < a.P; slot++) offsets.push_back(page + slot * a.D);
  }
  for (int64_t i = 0; i < queries; i++) {
    for (int64_t d = 0; d < a.D; d++) q[i * width + d] = a.q[place(i) + d] * a.scale;
  }
  // Call what is to be done with each head's LANES positions: visit(head, start).
  auto each_head = [&](void* pages, auto visit) {
    int64_t head_numbers = a.P * a.D, number_bytes = a.is_float32 ? 4 : 2;
    for (int64_t start = 0; start < stop; start += LANES) {
      for (int64_t head = 0; head < tile.heads; head++) {
        const char* head_pages = (const char*)pages + head * head_numbers * number_bytes;
        prefetch_rows(a, head_pages, &offsets[start] + LANES, stop - start - LANES);
        find_rows(a, head_pages, &offsets[start], stop - start, width, copies, rows);
        visit(head * a_head, start);
      }
    }
  };
  each_head(a.k_pages, [&](int64_t first, int64_t start) {
    for (int64_t i = first; i < first + a_head; i++) {
      store(&weights[i * stride + start], dot_rows(q + i * width, rows, width));
    }
  });
  for (int64_t i = 0; i < queries; i++) softmax(&weights[i * stride], visible(i));
  each_head(a.v_pages, [&](int64_t first, int64_t start) {
    for (int64_t i = first; i < first + a_head; i++) {
      int64_t count = std::clamp<int64_t>(visible(i) - start, 0, LANES);
      add_rows(y + i * width, rows, &weights[i * stride + start], count, width);
    }
  });
  for (int64_t i = 0; i < queries; i++) std::copy_n(y + i * width, a.D, a.y + place(i));
}

void attend_all(const Attention& a) {
  constexpr int64_t ENOUGH_TASKS = 16;  // to keep threads busy; with fewer, heads are divided
  int64_t tile_tokens = std::max<int64_t>(1, 16 / a.G);  // they share what find_rows finds
  int64_t tiles = (a.T + tile_tokens - 1) / tile_tokens;
  int64_t parts = std::clamp<int64_t>(ENOUGH_TASKS / (a.B * tiles), 1, a.KV);
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
  team.run(a.B * tiles * parts, is_small, [&](int64_t i) {
    int64_t b = i / parts / tiles, first = i / parts % tiles * tile_tokens, part = i % parts;
    int64_t first_head = a.KV * part / parts, heads = a.KV * (part + 1) / parts - first_head;
    int64_t tokens = std::clamp<int64_t>(a.real_tokens(b) - first, 0, tile_tokens);
    if (tokens > 0) attend(a, {b, first, tokens, first_head, heads});
    for (int64_t t = first + tokens; t < std::min(a.T, first + tile_tokens); t++) {
      int64_t start = (b * a.T + t) * a.KV + first_head;
      std::fill_n(a.y + start * a.G * a.D, heads * a.G * a.D, 0.0f);
    }
  });
}

}  // namespace
