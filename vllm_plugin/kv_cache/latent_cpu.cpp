// SPDX-License-Identifier: Apache-2.0
// Decode attention over latents of old tokens and raw keys and values of recent ones.
//
// R requests of L latent blocks each; a block has room for P tokens and holds `count` of them, from
// position `first` on. H KV heads of D channels, F = H * D; M query rows of each head: its G query
// heads by Q query tokens. Each latent block is one task with a softmax of its own; then each
// request merges those with its raw tokens. Products are oneDNN's, through ATen; in all else tokens
// are innermost, so that they are the lanes of a vector.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
namespace blas = at::native::cpublas;

constexpr int64_t LANES = Vec::size();
constexpr int64_t TILE = 2 * LANES; // tokens whose keys are rebuilt at a time: they stay in L1
constexpr float NONE = -std::numeric_limits<float>::infinity();

// Memory on a cache line's boundary: vectors across two cost twice as much.
template <typename T>
struct Room {
  explicit Room(int64_t count) : memory(c10::GetCPUAllocator()->allocate(count * sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory.get()); }
  at::DataPtr memory;
};

// Pairs of latents of n tokens side by side, as the product takes them: [width / 2, TILE, 2]. What
// lies behind the rank is 1, for the columns of the decoder that hold the mean.
void interleave(const BFloat16* latents, int64_t rank, int64_t width, int64_t n, BFloat16* out) {
  const auto steps = at::vec::Vectorized<int32_t>::arange(0, static_cast<int32_t>(rank));
  auto* pairs = reinterpret_cast<float*>(out);
  for (int64_t t = 0; t < n; t += LANES) {
    const BFloat16* row = latents + t * rank;
    int64_t at = 0;
    if (t + LANES <= n) { // behind the last token there may be no memory
      for (; at + 2 <= rank; at += 2) {
        const auto* from = reinterpret_cast<const float*>(row + at);
        at::vec::gather<sizeof(BFloat16)>(from, steps).store(pairs + at / 2 * TILE + t);
      }
    }
    for (; at < width; ++at) {
      BFloat16* to = out + (at / 2 * TILE + t) * 2 + at % 2;
      for (int64_t u = 0; u < std::min(LANES, n - t); ++u) {
        to[2 * u] = at < rank ? row[u * rank + at] : BFloat16(1);
      }
    }
  }
}

// Products of N queries [N, D] with the keys of a tile, [D, TILE], after these are turned: pairs
// (i, i + half) by the angles of their positions, [TILE / LANES, 2 * half, LANES].
template <int N>
void turned_products(
    const float* keys, const float* angles, int64_t half, const float* queries, int64_t size,
    float* out, int64_t row) {
  constexpr int PARTS = TILE / LANES;
  Vec sums[N][PARTS];
  for (auto& sum : sums) std::fill_n(sum, PARTS, Vec(0.f));
  for (int64_t i = 0; i < half; ++i) {
    for (int u = 0; u < PARTS; ++u) {
      const float* turn = angles + (u * 2 * half + i) * LANES;
      const Vec cos = Vec::loadu(turn), sin = Vec::loadu(turn + half * LANES);
      const Vec a = Vec::loadu(keys + i * TILE + u * LANES);
      const Vec b = Vec::loadu(keys + (i + half) * TILE + u * LANES);
      const Vec x = at::vec::fmsub(a, cos, b * sin), y = at::vec::fmadd(b, cos, a * sin);
      for (int q = 0; q < N; ++q) {
        sums[q][u] = at::vec::fmadd(x, Vec(queries[q * size + i]), sums[q][u]);
        sums[q][u] = at::vec::fmadd(y, Vec(queries[q * size + i + half]), sums[q][u]);
      }
    }
  }
  for (int64_t i = 2 * half; i < size; ++i) {
    for (int u = 0; u < PARTS; ++u) {
      const Vec key = Vec::loadu(keys + i * TILE + u * LANES);
      for (int q = 0; q < N; ++q) {
        sums[q][u] = at::vec::fmadd(key, Vec(queries[q * size + i]), sums[q][u]);
      }
    }
  }
  for (int q = 0; q < N; ++q) {
    for (int u = 0; u < PARTS; ++u) sums[q][u].store(out + q * row + u * LANES);
  }
}

void turned_products(
    const float* keys, const float* angles, int64_t half, const float* queries, int64_t count,
    int64_t size, float* out, int64_t row) {
  for (; count >= 4; count -= 4, queries += 4 * size, out += 4 * row) {
    turned_products<4>(keys, angles, half, queries, size, out, row);
  }
  if (count == 3) turned_products<3>(keys, angles, half, queries, size, out, row);
  if (count == 2) turned_products<2>(keys, angles, half, queries, size, out, row);
  if (count == 1) turned_products<1>(keys, angles, half, queries, size, out, row);
}

// Turns logits into exponentials over the largest of them. That one, and their sum.
std::pair<float, float> exponentials(float* logits, int64_t count) {
  const float most = at::vec::reduce_all<float>(
      [](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, logits, count);
  at::vec::map<float>([=](Vec x) { return (x - Vec(most)).exp_u20(); }, logits, logits, count);
  const float sum =
      at::vec::reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, logits, count);
  return {most, sum};
}

// out += weight * x, of n numbers.
void add(float* out, float weight, const float* x, int64_t n) {
  at::vec::map2<float>(
      [=](Vec sum, Vec one) { return at::vec::fmadd(one, Vec(weight), sum); }, out, out, x, n);
}

// query: bfloat16 [tokens, H * G, D], and output alike. tokens, seen: int64 [R, Q]: each query among
// the tokens, and how many raw ones it sees. raw: int64 [R, C], blocks of these in cache, bfloat16
// [blocks, elements], where `places` says: int32 [K and V, H, tokens, D], K by `order`. keys, values: bfloat16
// [blocks, P, rank]. blocks, first, count: int64 [R, L]. key_decode: bfloat16
// [F, width], see `interleave`; value_decode: float32 [rank + 1, F], the mean in its last row. order:
// int64 [D], the channels of a query as key_decode has them. angles: float32
// [positions / LANES, 2 * half, LANES], cosines then sines.
void decode(
    const Tensor& query, const Tensor& tokens, const Tensor& seen, const Tensor& raw,
    const Tensor& cache, const Tensor& places, const Tensor& keys, const Tensor& values, const Tensor& blocks,
    const Tensor& first, const Tensor& count, const Tensor& key_decode, const Tensor& value_decode,
    const Tensor& order, const Tensor& angles, double scale, Tensor output) {
  const int64_t requests = tokens.size(0), queries = tokens.size(1), columns = blocks.size(1);
  const int64_t heads = places.size(1), per_block = places.size(2), size = places.size(3);
  const int64_t recent = (raw.size(1) * per_block + LANES - 1) / LANES * LANES;
  const int64_t group = query.size(1) / heads, rows = group * queries, all = heads * rows;
  const int64_t features = heads * size, width = key_decode.size(1), half = angles.size(1) / 2;
  const int64_t room = (keys.size(1) + TILE - 1) / TILE * TILE; // tokens of a block, whole tiles
  const int64_t key_rank = keys.size(2), value_rank = values.size(2);
  const auto* token = tokens.const_data_ptr<int64_t>();
  const auto* limit = seen.const_data_ptr<int64_t>();
  const auto* block = blocks.const_data_ptr<int64_t>();
  const auto* begins = first.const_data_ptr<int64_t>();
  const auto* held = count.const_data_ptr<int64_t>();
  const auto* channel = order.const_data_ptr<int64_t>();
  const auto* fresh_block = raw.const_data_ptr<int64_t>();
  const auto* placed = places.const_data_ptr<int32_t>();
  const auto* turns = angles.const_data_ptr<float>();
  const auto* rebuild = key_decode.const_data_ptr<BFloat16>();

  Room<float> ordered(requests * all * size); // [R, H, M, D]
  for (int64_t at = 0; at < requests * all; ++at) {
    const int64_t request = at / all, head = at % all / rows, row = at % rows;
    const auto* from = query.const_data_ptr<BFloat16>() +
        token[request * queries + row % queries] * query.stride(0) +
        (head * group + row / queries) * query.stride(1);
    for (int64_t d = 0; d < size; ++d) {
      ordered.data()[at * size + d] = static_cast<float>(from[channel[d]]) * scale;
    }
  }

  // Of each block and row: the largest logit, the sum of exponentials, and of latents by these.
  Room<float> largest(requests * columns * all), sum(requests * columns * all);
  Room<float> latent(requests * columns * all * value_rank);
  at::parallel_for(0, requests * columns, 1, [&](int64_t begin, int64_t end) {
    Room<BFloat16> pairs(width * TILE);
    Room<float> rebuilt(features * TILE), weights(all * room), wide(room * value_rank);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t request = task / columns, there = held[task];
      if (there == 0) continue;
      const auto* content = keys.const_data_ptr<BFloat16>() + block[task] * keys.stride(0);
      for (int64_t at = 0; at < there; at += TILE) {
        const int64_t n = std::min(TILE, there - at);
        interleave(content + at * key_rank, key_rank, width, n, pairs.data());
        blas::brgemm(
            features, TILE, width, width, TILE, TILE, false, rebuild, pairs.data(),
            rebuilt.data());
        for (int64_t head = 0; head < heads; ++head) {
          turned_products(
              rebuilt.data() + head * size * TILE, turns + (begins[task] + at) * 2 * half, half,
              ordered.data() + (request * all + head * rows) * size, rows, size,
              weights.data() + head * rows * room + at, room);
        }
      }
      for (int64_t row = 0; row < all; ++row) {
        const auto [most, total] = exponentials(weights.data() + row * room, there);
        largest.data()[task * all + row] = most;
        sum.data()[task * all + row] = total;
      }
      content = values.const_data_ptr<BFloat16>() + block[task] * values.stride(0);
      for (int64_t at = 0; at < there * value_rank; ++at) wide.data()[at] = content[at];
      blas::brgemm(
          all, value_rank, there, room, value_rank, value_rank, false, weights.data(), wide.data(),
          latent.data() + task * all * value_rank);
    }
    blas::brgemm_release();
  });

  at::parallel_for(0, requests * heads, 1, [&](int64_t begin, int64_t end) {
    Room<float> fresh_keys(size * recent), fresh_values(recent * size), weights(rows * recent);
    Room<float> merged(rows * (value_rank + 1)), out(rows * size), totals(rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t request = task / heads, head = task % heads;
      std::fill_n(fresh_keys.data(), size * recent, 0.f);
      std::fill_n(fresh_values.data(), recent * size, 0.f);
      const auto* sees = limit + request * queries;
      const int64_t fresh = *std::max_element(sees, sees + queries);
      for (int64_t t = 0; t < fresh; ++t) {
        const int64_t of = fresh_block[request * raw.size(1) + t / per_block] * cache.stride(0);
        const auto* content = cache.const_data_ptr<BFloat16>() + of;
        const auto* place = placed + (head * per_block + t % per_block) * size;
        for (int64_t d = 0; d < size; ++d) {
          fresh_keys.data()[d * recent + t] = content[place[d]];
          fresh_values.data()[t * size + d] = content[place[features * per_block + d]];
        }
      }
      blas::brgemm(
          rows, recent, size, size, recent, recent, false,
          ordered.data() + (request * all + head * rows) * size, fresh_keys.data(),
          weights.data());
      std::fill_n(merged.data(), rows * (value_rank + 1), 0.f);
      for (int64_t row = 0; row < rows; ++row) {
        float* weight = weights.data() + row * recent;
        const int64_t there = sees[row % queries];
        const auto [most, total] = exponentials(weight, there);
        const int64_t of = request * columns * all + head * rows + row;
        float peak = most;
        for (int64_t column = 0; column < columns; ++column) {
          if (!held[request * columns + column]) continue;
          peak = std::max(peak, largest.data()[of + column * all]);
        }
        const float share = std::exp(most - peak);
        at::vec::map<float>([=](Vec x) { return x * Vec(share); }, weight, weight, there);
        std::fill(weight + there, weight + recent, 0.f);
        float* into = merged.data() + row * (value_rank + 1);
        for (int64_t column = 0; column < columns; ++column) {
          if (!held[request * columns + column]) continue;
          const int64_t from = of + column * all;
          const float part = std::exp(largest.data()[from] - peak);
          add(into, part, latent.data() + from * value_rank, value_rank);
          into[value_rank] += part * sum.data()[from];
        }
        totals.data()[row] = total * share + into[value_rank];
      }
      blas::brgemm(
          rows, size, recent, recent, size, size, false, weights.data(), fresh_values.data(),
          out.data());
      blas::brgemm(
          rows, size, value_rank + 1, value_rank + 1, features, size, true, merged.data(),
          value_decode.const_data_ptr<float>() + head * size, out.data());
      for (int64_t row = 0; row < rows; ++row) {
        auto* to = output.mutable_data_ptr<BFloat16>() +
            token[request * queries + row % queries] * output.stride(0) +
            (head * group + row / queries) * output.stride(1);
        for (int64_t d = 0; d < size; ++d) to[d] = out.data()[row * size + d] / totals.data()[row];
      }
    }
  });
}

} // namespace

TORCH_LIBRARY(vllm_compress_latent, library) {
  library.def(
      "decode(Tensor query, Tensor tokens, Tensor seen, Tensor raw, Tensor cache, Tensor places, "
      "Tensor keys, Tensor values, Tensor blocks, Tensor first, Tensor count, Tensor key_decode, "
      "Tensor value_decode, Tensor order, Tensor angles, float scale, Tensor(a!) output) -> ()",
      decode);
}
