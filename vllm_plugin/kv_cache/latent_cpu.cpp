// SPDX-License-Identifier: Apache-2.0
// Decode attention over latents of old tokens and raw keys and values of recent ones.
//
// R requests of L latent blocks each, whose bytes are as kv_policies/latents/format.py has them; a block
// holds `count` tokens of consecutive positions, from `first` on. H KV heads of D channels,
// F = H * D; M query rows of each head: its G query heads by Q query tokens.
//
// Each latent block is one task, with a softmax of its own: keys are rebuilt and turned a tile at a
// time, values are not rebuilt. Then each head of each request merges these with its raw tokens.
// Products are oneDNN's, through ATen; in all else the lanes of a vector are tokens.

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
#include <tuple>
#include <utility>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
namespace blas = at::native::cpublas;

constexpr int64_t LANES = Vec::size();
constexpr int64_t TILE = 2 * LANES; // tokens whose keys are rebuilt at a time: they stay in L1
static_assert(TILE == 32, "tokens that share the 4-bit scales of keys");

// Memory on a cache line's boundary: vectors across two cost twice as much.
template <typename T>
struct Room {
  explicit Room(int64_t count) : memory(c10::GetCPUAllocator()->allocate(count * sizeof(T))) {}
  operator T*() const { return static_cast<T*>(memory.get()); }
  at::DataPtr memory;
};

// -- latents in a block ---------------------------------------------------------------------------

struct Form {
  int64_t tokens, key_rank, value_rank, bits;
};

// Row of the codes of token t, and how far they are shifted in it: two tokens share a row.
std::pair<int64_t, int> code_of(int64_t t) {
  const bool high = t % TILE >= TILE / 2;
  return {t / TILE * (TILE / 2) + t % (TILE / 2), high ? 4 : 0};
}

// Key latents of a tile from token `at` on, [TILE, rank]: where they are, or restored in `room`.
const BFloat16* key_latents(const Form& form, const uint8_t* block, int64_t at, BFloat16* room) {
  const int64_t rank = form.key_rank;
  if (form.bits == 16) return reinterpret_cast<const BFloat16*>(block) + at * rank;
  const auto* scales =
      reinterpret_cast<const at::Half*>(block + form.tokens / 2 * (rank + form.value_rank));
  const auto* zeros = scales + form.tokens / TILE * rank;
  Room<float> scale(rank), zero(rank), row(rank);
  std::copy_n(scales + at / TILE * rank, rank, static_cast<float*>(scale));
  std::copy_n(zeros + at / TILE * rank, rank, static_cast<float*>(zero));
  for (int64_t t = 0; t < TILE; ++t) {
    const auto [place, shift] = code_of(at + t);
    const uint8_t* codes = block + place * rank;
    for (int64_t j = 0; j < rank; ++j) row[j] = (codes[j] >> shift & 15) * scale[j] + zero[j];
    at::vec::convert(static_cast<const float*>(row), room + t * rank, rank);
  }
  return room;
}

// Value latents of the first `count` tokens, [count, rank].
void value_latents(const Form& form, const uint8_t* block, int64_t count, float* out) {
  const int64_t rank = form.value_rank, keys = form.tokens * form.key_rank;
  if (form.bits == 16) {
    std::copy_n(reinterpret_cast<const BFloat16*>(block) + keys, count * rank, out);
    return;
  }
  const uint8_t* codes = block + keys / 2;
  const auto* scales = reinterpret_cast<const at::Half*>(codes + form.tokens / 2 * rank) +
      2 * (form.tokens / TILE) * form.key_rank;
  for (int64_t t = 0; t < count; ++t) {
    const auto [place, shift] = code_of(t);
    const float scale = scales[t], zero = scales[form.tokens + t];
    for (int64_t j = 0; j < rank; ++j) {
      out[t * rank + j] = (codes[place * rank + j] >> shift & 15) * scale + zero;
    }
  }
}

// Pairs of key latents of n tokens side by side, as the product takes them: [width / 2, TILE, 2].
// What lies behind the rank is 1, for the columns of the decoder that hold the mean.
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

// -- products and sums ----------------------------------------------------------------------------

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

// -- attention ------------------------------------------------------------------------------------

// A step of one layer. Tensors are contiguous unless a stride is beside them; see `decode`.
struct Step {
  Form form;
  int64_t requests, queries, columns, heads, group, size, width, half;
  int64_t raw_columns, raw_tokens; // blocks of raw tokens of each request, and what one holds
  double scale;
  const BFloat16 *query, *cache, *key_decode;
  int64_t query_stride, head_stride, block_stride, out_stride, out_head_stride;
  const int64_t *tokens, *seen, *raw, *blocks, *first, *count, *order;
  const int32_t* places;
  const float *value_decode, *angles;
  BFloat16* output;

  int64_t rows() const { return group * queries; }
  int64_t all() const { return heads * rows(); }
  int64_t features() const { return heads * size; }
  const uint8_t* block(int64_t task) const {
    return reinterpret_cast<const uint8_t*>(cache + blocks[task] * block_stride);
  }
  int64_t token(int64_t request, int64_t row) const {
    return tokens[request * queries + row % queries];
  }
  int64_t query_head(int64_t head, int64_t row) const { return head * group + row / queries; }
};

// What each latent block gives to each row: [R, L, H * M].
struct Partial {
  explicit Partial(int64_t count, int64_t rank)
      : largest(count), sum(count), latent(count * rank) {}
  Room<float> largest, sum; // logit, and of exponentials over it
  Room<float> latent;       // sum of value latents by these exponentials, [.., value_rank]
};

// Queries times scale, their channels in the decoder's order: [R, H, M, D].
void order_queries(const Step& step, float* out) {
  for (int64_t at = 0; at < step.requests * step.all(); ++at, out += step.size) {
    const int64_t request = at / step.all(), row = at % step.rows();
    const int64_t head = step.query_head(at % step.all() / step.rows(), row);
    const auto* from =
        step.query + step.token(request, row) * step.query_stride + head * step.head_stride;
    for (int64_t d = 0; d < step.size; ++d) {
      out[d] = static_cast<float>(from[step.order[d]]) * step.scale;
    }
  }
}

// Tasks [begin, end) of R * L latent blocks.
void attend_latents(
    const Step& step, const float* queries, int64_t begin, int64_t end, Partial& partial) {
  const Form& form = step.form;
  const int64_t rows = step.rows(), all = step.all(), rank = form.value_rank;
  const int64_t room = (form.tokens + TILE - 1) / TILE * TILE;
  Room<BFloat16> restored(TILE * form.key_rank), pairs(step.width * TILE);
  Room<float> rebuilt(step.features() * TILE), weights(all * room), values(form.tokens * rank);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t count = step.count[task];
    if (count == 0) continue;
    const float* asked = queries + task / step.columns * all * step.size;
    for (int64_t at = 0; at < count; at += TILE) {
      const auto* latents = key_latents(form, step.block(task), at, restored);
      interleave(latents, form.key_rank, step.width, std::min(TILE, count - at), pairs);
      blas::brgemm(
          step.features(), TILE, step.width, step.width, TILE, TILE, false, step.key_decode,
          static_cast<const BFloat16*>(pairs), static_cast<float*>(rebuilt));
      const float* angles = step.angles + (step.first[task] + at) * 2 * step.half;
      for (int64_t head = 0; head < step.heads; ++head) {
        turned_products(
            rebuilt + head * step.size * TILE, angles, step.half, asked + head * rows * step.size,
            rows, step.size, weights + head * rows * room + at, room);
      }
    }
    for (int64_t row = 0; row < all; ++row) {
      std::tie(partial.largest[task * all + row], partial.sum[task * all + row]) =
          exponentials(weights + row * room, count);
    }
    value_latents(form, step.block(task), count, values);
    blas::brgemm(
        all, rank, count, room, rank, rank, false, static_cast<const float*>(weights),
        static_cast<const float*>(values), partial.latent + task * all * rank);
  }
  blas::brgemm_release();
}

// Tasks [begin, end) of R * H heads: the softmax over raw tokens and all latent blocks.
void merge_raw(
    const Step& step, const float* queries, int64_t begin, int64_t end, const Partial& partial) {
  const int64_t rows = step.rows(), size = step.size, rank = step.form.value_rank + 1;
  const int64_t room = (step.raw_columns * step.raw_tokens + LANES - 1) / LANES * LANES;
  Room<float> keys(size * room), values(room * size), weights(rows * room);
  Room<float> latent(rows * rank), out(rows * size), totals(rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t request = task / step.heads, head = task % step.heads;
    std::fill_n(static_cast<float*>(keys), size * room, 0.f);
    std::fill_n(static_cast<float*>(values), room * size, 0.f);
    const int64_t* seen = step.seen + request * step.queries;
    for (int64_t t = 0; t < *std::max_element(seen, seen + step.queries); ++t) {
      const int64_t block = step.raw[request * step.raw_columns + t / step.raw_tokens];
      const BFloat16* content = step.cache + block * step.block_stride;
      const int32_t* key = step.places + (head * step.raw_tokens + t % step.raw_tokens) * size;
      const int32_t* value = key + step.raw_tokens * step.features();
      for (int64_t d = 0; d < size; ++d) {
        keys[d * room + t] = content[key[d]];
        values[t * size + d] = content[value[d]];
      }
    }
    blas::brgemm(
        rows, room, size, size, room, room, false, queries + task * rows * size,
        static_cast<const float*>(keys), static_cast<float*>(weights));
    std::fill_n(static_cast<float*>(latent), rows * rank, 0.f);
    for (int64_t row = 0; row < rows; ++row) {
      float* weight = weights + row * room;
      const int64_t there = seen[row % step.queries];
      const auto [most, total] = exponentials(weight, there);
      float peak = most;
      const auto each = [&](auto visit) {
        for (int64_t column = 0; column < step.columns; ++column) {
          const int64_t of = request * step.columns + column;
          if (step.count[of]) visit(of * step.all() + head * rows + row);
        }
      };
      each([&](int64_t of) { peak = std::max(peak, partial.largest[of]); });
      float* sum = latent + row * rank; // of value latents, and of weights, for the mean
      each([&](int64_t of) {
        const float share = std::exp(partial.largest[of] - peak);
        add(sum, share, partial.latent + of * (rank - 1), rank - 1);
        sum[rank - 1] += share * partial.sum[of];
      });
      const float share = std::exp(most - peak);
      at::vec::map<float>([=](Vec x) { return x * Vec(share); }, weight, weight, there);
      std::fill(weight + there, weight + room, 0.f);
      totals[row] = total * share + sum[rank - 1];
    }
    blas::brgemm(
        rows, size, room, room, size, size, false, static_cast<const float*>(weights),
        static_cast<const float*>(values), static_cast<float*>(out));
    blas::brgemm(
        rows, size, rank, rank, step.features(), size, true, static_cast<const float*>(latent),
        step.value_decode + head * size, static_cast<float*>(out));
    for (int64_t row = 0; row < rows; ++row) {
      BFloat16* to = step.output + step.token(request, row) * step.out_stride +
          step.query_head(head, row) * step.out_head_stride;
      for (int64_t d = 0; d < size; ++d) to[d] = out[row * size + d] / totals[row];
    }
  }
}

// query, output: bfloat16 [tokens, H * G, D]. tokens, seen: int64 [R, Q]: each query among the
// tokens, and how many raw ones it sees. raw: int64 [R, C], blocks of these. cache: bfloat16
// [blocks, elements]; places: int32 [2, H, tokens of a raw block, D], where K, its channels in
// `order`, and V are in one. blocks, first, count: int64 [R, L], of latents. per_block, key_rank,
// bits: their form. key_decode: bfloat16 [F, width], in `order`, see `interleave`; value_decode:
// float32 [value_rank + 1, F], the mean in its last row. order: int64 [D], channels of a query.
// angles: float32 [positions / LANES, 2 * half, LANES], cosines then sines.
void decode(
    const Tensor& query, const Tensor& tokens, const Tensor& seen, const Tensor& raw,
    const Tensor& cache, const Tensor& places, const Tensor& blocks, const Tensor& first,
    const Tensor& count, int64_t per_block, int64_t key_rank, int64_t bits,
    const Tensor& key_decode, const Tensor& value_decode, const Tensor& order,
    const Tensor& angles, double scale, Tensor output) {
  const Step step{
      .form = {per_block, key_rank, value_decode.size(0) - 1, bits},
      .requests = tokens.size(0),
      .queries = tokens.size(1),
      .columns = blocks.size(1),
      .heads = places.size(1),
      .group = query.size(1) / places.size(1),
      .size = places.size(3),
      .width = key_decode.size(1),
      .half = angles.size(1) / 2,
      .raw_columns = raw.size(1),
      .raw_tokens = places.size(2),
      .scale = scale,
      .query = query.const_data_ptr<BFloat16>(),
      .cache = cache.const_data_ptr<BFloat16>(),
      .key_decode = key_decode.const_data_ptr<BFloat16>(),
      .query_stride = query.stride(0),
      .head_stride = query.stride(1),
      .block_stride = cache.stride(0),
      .out_stride = output.stride(0),
      .out_head_stride = output.stride(1),
      .tokens = tokens.const_data_ptr<int64_t>(),
      .seen = seen.const_data_ptr<int64_t>(),
      .raw = raw.const_data_ptr<int64_t>(),
      .blocks = blocks.const_data_ptr<int64_t>(),
      .first = first.const_data_ptr<int64_t>(),
      .count = count.const_data_ptr<int64_t>(),
      .order = order.const_data_ptr<int64_t>(),
      .places = places.const_data_ptr<int32_t>(),
      .value_decode = value_decode.const_data_ptr<float>(),
      .angles = angles.const_data_ptr<float>(),
      .output = output.mutable_data_ptr<BFloat16>(),
  };
  Room<float> queries(step.requests * step.all() * step.size);
  order_queries(step, queries);
  Partial partial(step.requests * step.columns * step.all(), step.form.value_rank);
  at::parallel_for(0, step.requests * step.columns, 1, [&](int64_t begin, int64_t end) {
    attend_latents(step, queries, begin, end, partial);
  });
  at::parallel_for(0, step.requests * step.heads, 1, [&](int64_t begin, int64_t end) {
    merge_raw(step, queries, begin, end, partial);
  });
}

} // namespace

TORCH_LIBRARY(vllm_compress_latent, library) {
  library.def(
      "decode(Tensor query, Tensor tokens, Tensor seen, Tensor raw, Tensor cache, Tensor places, "
      "Tensor blocks, Tensor first, Tensor count, int per_block, int key_rank, int bits, "
      "Tensor key_decode, Tensor value_decode, Tensor order, Tensor angles, float scale, "
      "Tensor(a!) output) -> ()",
      decode);
}
