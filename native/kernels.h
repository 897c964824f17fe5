// The kernels, as a table of functions filled once per instruction set and chosen at run time.
// Everything here is plain data: no Python, no threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvik {

// How a matrix's weights lie in memory. Rows (outputs) are interleaved by 16; a unit is 16 rows x 32 inputs, or 256 for the
// layouts …_k, which have the structure of GGUF's K types.
// f32, f16: a line of 16 rows per input. bf16: a line of 16 rows x 2 inputs per two inputs.
// Integer layouts have groups of 32 inputs. Quants: four consecutive inputs a 32-bit lane; with 4 to 6 bits inputs k and
// k + 16 share a byte of the first 256, low and high nibble; the bits above lie in planes behind: 5 bits one of 64 bytes,
// bit k / 4 of byte 4 * lane + k % 4; 6 bits two (k < 16, k >= 16), two bits each.
//   int4 … int8_min: the quants, 16 f16 scales, then (…_min) 16 f16 minimums.
//   int4_k, int5_k:  the quants of 8 groups; for each 24 bytes of 6-bit steps s and t; 16 f16 d, 16 f16 m:
//                    scale = d * s, minimum = -m * t. Byte i of the first 16 holds the low nibbles of row i's s and t,
//                    byte i of the last 8 the upper bits s, t of row i, then of row i + 8
//   int6_k:          the quants of 8 groups; for each 16 i8 scales of inputs 0-15, 16 of 16-31; 16 f16 d, 32 bytes of 0
// weight = scale * (quant - offset) [+ minimum]; both are exact in f32.
enum class Layout : int32_t {
    f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int8_min = 4, int4 = 5, int4_min = 6, int5 = 7, int5_min = 8, int4_k = 9,
    int5_k = 10, int6_k = 11
};
constexpr int kLayouts = 12;
constexpr int kGroup = 32;
constexpr int kRows = 16;

constexpr bool is_integer(Layout l) { return l >= Layout::int8; }
constexpr bool is_k(Layout l) { return l >= Layout::int4_k; }
constexpr int bits_of(Layout l) {
    constexpr int bits[kLayouts] = {32, 16, 16, 8, 8, 4, 4, 5, 5, 4, 5, 6};
    return bits[static_cast<int>(l)];
}
constexpr bool has_minimum(Layout l) {
    return l == Layout::int8_min || l == Layout::int4_min || l == Layout::int5_min || l == Layout::int4_k || l == Layout::int5_k;
}
constexpr int offset_of(Layout l) { return !is_integer(l) || has_minimum(l) ? 0 : 1 << (bits_of(l) - 1); }
// bytes of one group's quants, and of one unit
constexpr size_t quant_bytes(Layout l) { return size_t(kRows) * kGroup / 8 * size_t(bits_of(l)); }
constexpr size_t step_bytes(Layout l) { return l == Layout::int6_k ? 32 : 24; }  // of one group of a K layout
constexpr int unit_groups(Layout l) { return is_k(l) ? 8 : 1; }
constexpr size_t unit_bytes(Layout l) {
    if (!is_integer(l)) return quant_bytes(l);
    if (is_k(l)) return 8 * (quant_bytes(l) + step_bytes(l)) + 64;
    return quant_bytes(l) + (has_minimum(l) ? 64 : 32);
}

struct Matrix {
    Layout layout;
    const uint8_t* data;
    int32_t n, k;  // outputs, inputs
    int32_t row_blocks() const { return (n + kRows - 1) / kRows; }
    int32_t groups() const { return (k + kGroup - 1) / kGroup; }
    int32_t units() const { return (groups() + unit_groups(layout) - 1) / unit_groups(layout); }
    size_t row_block_bytes() const { return size_t(units()) * unit_bytes(layout); }
    size_t bytes() const { return size_t(row_blocks()) * row_block_bytes(); }
};

// Rows of activations as a linear reads them: f32, and for integer layouts int8 groups of 32 in one term (q) or two
// (256 * q + fine, about 15 bits, for twice the arithmetic and the same bytes of weights).
struct Activations {
    const float* x;        // [rows][ld]
    int32_t ld;            // floats between rows, a multiple of 32; columns past k are 0
    const int8_t* q;       // [rows][ld]
    const int8_t* fine;    // [rows][ld] second term, or null
    const float* scale;    // [rows][ld / 32]
    const float* sum;      // [rows][ld / 32] scale * sum of the rounded activations
    const int32_t* isum;   // [rows][ld / 32] sum of q
    const int32_t* fine_isum;  // [rows][ld / 32] sum of fine, or null
    const int32_t* half_isum;  // [rows][ld / 32] sum of the first 16 of q
    const int32_t* fine_half_isum;  // [rows][ld / 32] sum of the first 16 of fine, or null
    const uint16_t* bf16;       // [rows][ld] x rounded to bf16, for bf16 layouts
    const uint16_t* bf16_fine;  // [rows][ld] what that leaves over, rounded to bf16, or null
};

// Where a row rounded to int8 goes; see Activations. The fine fields are null for one term.
struct Int8Rows {
    int8_t *q, *fine;
    float *scale, *sum;
    int32_t *isum, *fine_isum, *half_isum, *fine_half_isum;
};

// Formats of keys and values, as kvik.ops.pages numbers and describes them.
enum class KV : int32_t { f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int4 = 4 };
constexpr int kKVFormats = 5;
constexpr bool is_packed(KV t) { return t >= KV::int8; }
constexpr int kv_bits(KV t) { return t == KV::f32 ? 32 : t == KV::int8 ? 8 : t == KV::int4 ? 4 : 16; }
constexpr int kBlockTokens = 16;
constexpr int kPartition = 64;  // slots whose attention is summed before it joins the running sum
constexpr size_t kAddressBytes = 64;
constexpr int kRecent = 32;
constexpr int kMaxGroupTokens = 128;  // of a packed page: 16, 32, 64 or 128

// One layer and KV head's share of a page of `tokens` tokens: keys, values, then what their integers mean; every offset but
// those a multiple of 64. Sub-blocks of 16 tokens, of keys [D / c][16][c], of values [16 / t][D][t]:
//   f32, f16, bf16: c = t = 1.
//   int8: c = t = 4: four consecutive channels (tokens) a 32-bit lane; keys q + 128, values q.
//   int4: a 64-byte line has keys [16 tokens][4], byte i of line w: channel 8w + i in the low nibble, 8w + 4 + i in the high
//         one; or values of 16 channels [16][4], lines [2][D / 16]: byte i of half h: token 8h + i, and 8h + 4 + i.
// Then f16 scales of keys [D] (int8, int4), minimums [D] (int4), f16 scales of values [tokens], zeros u8 [tokens] (int4).
struct PageShape {
    KV k, v;
    int32_t tokens, head_size;
    constexpr size_t key_block() const { return size_t(head_size) * kBlockTokens * size_t(kv_bits(k)) / 8; }
    constexpr size_t value_block() const { return size_t(head_size) * kBlockTokens * size_t(kv_bits(v)) / 8; }
    constexpr size_t values() const { return size_t(tokens / kBlockTokens) * key_block(); }
    constexpr size_t key_scales() const { return values() + size_t(tokens / kBlockTokens) * value_block(); }
    constexpr size_t key_minimums() const { return key_scales() + (is_packed(k) ? 2 * size_t(head_size) : 0); }
    constexpr size_t value_scales() const { return key_minimums() + (k == KV::int4 ? 2 * size_t(head_size) : 0); }
    constexpr size_t value_zeros() const { return value_scales() + (is_packed(v) ? 2 * size_t(tokens) : 0); }
    constexpr size_t share_bytes() const {
        const size_t end = value_zeros() + (v == KV::int4 ? size_t(tokens) : 0);
        return (end + kAddressBytes - 1) / kAddressBytes * kAddressBytes;
    }
};

// Where one layer and KV head of a sequence's cache lie: full block b (16 slots) at base + blocks[b] * 64 + at, packed page g
// at base + packed_blocks[g] * 64 + packed_at; -1 where no row of the pass looks. See kvik.ops.pages.CacheLayout.
struct Cache {
    uint8_t* base;
    const int32_t* blocks;
    const int32_t* packed_blocks;  // null: nothing is packed
    size_t at, packed_at;
    PageShape full, packed;
    int32_t shift;  // slots evicted: a row's slot in the table is its slot less this
    int32_t keep;   // first slots that are read from full blocks, a multiple of 16
    // slots from `keep` to this one are read packed by the row at `slot` of the table
    int32_t packed_end(int32_t slot) const {
        return packed_blocks && slot + 1 > kRecent ? (slot + 1 - kRecent) / packed.tokens * packed.tokens : 0;
    }
};

// What a tile of rows (slots of the table) may see, in partitions of 64 slots: first those with sinks, then those from `begin`
// to `end`. Each of the latter is computed from nothing twice, its packed slots and its full ones. What partitions give is joined
// in order in each span, then what spans give: those of the sinks, and every 256 slots.
struct Partitions {
    static constexpr int32_t kSpan = 4;
    int32_t sinks, begin, end;
    int32_t count() const { return sinks + end - begin; }
    int32_t spans() const { return (sinks > 0) + (end + kSpan - 1) / kSpan - begin / kSpan; }
    int32_t span_of(int32_t n) const { return n < sinks ? 0 : (sinks > 0) + (begin + n - sinks) / kSpan - begin / kSpan; }
    // the first partition of a span; of the one behind the last: count()
    int32_t first_of(int32_t span) const {
        const int32_t at = (begin / kSpan + span - (sinks > 0)) * kSpan;
        return sinks > 0 && span == 0 ? 0 : sinks + (at < begin ? begin : at > end ? end : at) - begin;
    }
};
constexpr Partitions partitions_of(int32_t first_slot, int32_t last_slot, int32_t window, int32_t sinks) {
    const int32_t start = window && first_slot + 1 > window ? first_slot + 1 - window : 0;
    return {(sinks + kPartition - 1) / kPartition, start / kPartition, last_slot / kPartition + 1};
}

// Queries of consecutive rows of one sequence on one KV head.
struct Queries {
    const float* q;        // first row, first head of the group
    const float* sink_q;   // the same rotated for the sinks (null: there are none), ld floats between rows too
    int32_t ld;            // floats between rows
    int32_t rows, group;   // rows; query heads a KV head
    const int32_t* slots;  // [rows], not yet less Cache::shift
    int32_t window;        // 0: everything before
    int32_t sinks;         // slots before it are seen whatever the window, through sink_q, and by no row through q
    float scale;           // of the scores
    int32_t first_span, last_span;  // [first, last) of those that partitions_of the rows counts
    float* scratch;        // attend_scratch() floats
    float* state;          // [rows * group][state_stride]: running over spans
    float* partials;       // null, or [span - first][rows * group][state_stride], to be joined in order
    // Rows [observed_first, observed_end) of these: their probabilities are added to sums [slots of the table] (see
    // kvik.ops.Observation), atomically. Never together with partials.
    int64_t* sums;
    int32_t observed_first, observed_end;
    float* observed;       // scratch for the exponentials of these rows and what they are relative to: attend_observed() floats
};

enum class Activation : int32_t { silu = 0, gelu_tanh = 1 };
constexpr int kActivations = 2;
constexpr int32_t kMaxExperts = 1024;

struct SamplerKernels;
struct ReductionKernels;

struct Kernels {
    const char* name;
    void (*matmul)(const Matrix&, const Activations&, int32_t rows, int32_t block_begin, int32_t block_end, float* out,
                   int32_t ldo, bool accumulate);
    void (*round_bf16)(const float* x, int32_t n, uint16_t* out, uint16_t* fine);  // fine: null for one term
    void (*embed)(const Matrix&, int32_t token, float* out);
    void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int32_t n, float eps, float* out);
    // every head of x by itself, in place; head_size: a multiple of 16
    void (*head_norm)(float* x, int32_t heads, int32_t head_size, const float* weight, float eps);
    // activation(x), times `factor` where that is not null
    void (*activate)(Activation, const float* x, const float* factor, int32_t n, float* out);
    void (*add)(const float* a, const float* b, int32_t n, float* out);
    // the bias [n] onto n columns of the rows
    void (*add_bias)(const float* bias, int32_t n, int32_t rows, float* out, int32_t ldo);
    // the `used` best of `count` experts by softmax(scores), best first, ties to the lower; normalize: they sum to 1
    void (*route)(const float* scores, int32_t count, int32_t used, bool normalize, int32_t* experts, float* p);
    // out [n] (+)= sum over i < used, in order, of p[i] * y[places[i]]; y [..][ld]
    void (*combine)(const float* y, int32_t ld, const int32_t* places, const float* p, int32_t used, int32_t n,
                    bool accumulate, float* out);
    void (*quantize)(const float* x, int32_t n, const Int8Rows& out);
    void (*rope)(float* x, int32_t heads, int32_t head_size, const float* cosine, const float* sine);
    void (*hadamard)(float* x, int32_t heads, int32_t head_size);  // each head, in place; its own inverse
    void (*append)(const Cache&, int32_t slot, const float* k, const float* v);  // slot of the table, into its full block
    // packed page `group` from what lies in the full blocks of its slots
    void (*pack_group)(const Cache&, int32_t group);
    // packed page (its share) from k, v [tokens][D]
    void (*pack_page)(const PageShape&, uint8_t* share, const float* k, const float* v);
    // `slot` of the table as a row at `reader` would read it (packed or full): k, v [D], either may be null
    void (*read_slot)(const Cache&, int32_t slot, int32_t reader, float* k, float* v);
    void (*attend)(const Queries&, const Cache&);
    // start or continue a running state with one span's partial; finish divides by the sum
    void (*attend_reset)(float* state, int32_t queries, int32_t head_size);
    void (*attend_join)(float* state, const float* partial, int32_t queries, int32_t head_size);
    void (*attend_finish)(const float* state, int32_t rows, int32_t group, int32_t head_size, float* out, int32_t ldo);
    uint64_t (*checksum)(const uint8_t* p, size_t n);
    float (*read_all)(const uint8_t* p, size_t n);
    const SamplerKernels* sampler;      // sampler.h
    const ReductionKernels* reduction;  // reduction.h
};

constexpr int32_t kMaxQueries = 64;  // rows x group of one attention item
constexpr int32_t kMaxHeadSize = 256;
// floats of one query's attention state: accumulator [D], maximum, sum, padding
constexpr int32_t state_stride(int32_t head_size) { return head_size + 16; }
constexpr size_t attend_scratch(int32_t head_size) {
    // scores of the queries, scaled queries, keys and values of one partition in f32
    return size_t(kMaxQueries) * kPartition + size_t(kMaxQueries) * size_t(head_size) +
           2 * size_t(kPartition) * size_t(head_size);
}

// queries: observed rows * group; partitions: of the tile. A line more: it is used from a multiple of 64 bytes on.
constexpr size_t attend_observed(int32_t queries, int32_t partitions) {
    return size_t(queries) * size_t(partitions) * 2 * (kPartition + 1) + 16;
}

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where this build or processor has none
const Kernels* avx512_kernels();
const Kernels* amx_kernels();  // avx512's, and matrices on the tile unit

}  // namespace kvik
