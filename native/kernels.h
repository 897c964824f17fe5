// The kernels, as a table of functions filled once per instruction set and chosen at run time.
// Everything here is plain data: no Python, no threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvik {

// How a matrix's weights lie in memory. Rows (outputs) are interleaved by 16.
// int4, int8: groups of 32 inputs; a block of 16 rows x 32 inputs holds the quants (four consecutive inputs a 32-bit lane;
// int4: inputs k and k + 16 share a byte, low and high nibble), then 16 f16 scales, then (…_min) 16 f16 minimums.
// weight = scale * (quant - offset) [+ minimum], offset 8 (int4), 128 (int8), 0 where there is a minimum.
// f32, f16, bf16: a line of 16 rows per input.
enum class Layout : int32_t { f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int8_min = 4, int4 = 5, int4_min = 6 };
constexpr int kLayouts = 7;
constexpr int kGroup = 32;
constexpr int kRows = 16;

constexpr bool is_integer(Layout l) { return l >= Layout::int8; }
// bytes of one block: 16 rows x 32 inputs
constexpr size_t block_bytes(Layout l) {
    constexpr size_t bytes[kLayouts] = {2048, 1024, 1024, 544, 576, 288, 320};
    return bytes[static_cast<int>(l)];
}

struct Matrix {
    Layout layout;
    const uint8_t* data;
    int32_t n, k;  // outputs, inputs
    int32_t row_blocks() const { return (n + kRows - 1) / kRows; }
    int32_t groups() const { return (k + kGroup - 1) / kGroup; }
    size_t bytes() const { return size_t(row_blocks()) * size_t(groups()) * block_bytes(layout); }
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
};

enum class KV : int32_t { f32 = 0, f16 = 1 };
constexpr int kBlockTokens = 16;
constexpr int kPartition = 64;  // tokens whose attention is summed before it joins the running sum
constexpr size_t kv_element(KV t) { return t == KV::f32 ? 4 : 2; }

// Where one layer and KV head of a sequence's cache lie: block b at base + b * block_stride; keys [D][16], then values [16][D].
struct Cache {
    uint8_t* base;
    size_t block_stride;
    const int32_t* blocks;
    KV type;
    int32_t head_size;
};

// Queries of consecutive rows of one sequence on one KV head.
struct Queries {
    const float* q;        // first row, first head of the group
    int32_t ld;            // floats between rows
    int32_t rows, group;   // rows; query heads a KV head
    const int32_t* slots;  // [rows]
    int32_t window;        // 0: everything before
    float scale;           // of the scores
    int32_t first_partition, last_partition;  // [first, last) of the partitions of 64 slots
    float* scratch;        // attend_scratch() floats
    float* state;          // [rows * group][state_stride]: running over partitions
    float* partials;       // null, or [partition - first][rows * group][state_stride]: kept apart, to be joined by `join`
};

enum class Activation : int32_t { silu = 0, gelu_tanh = 1 };
constexpr int kActivations = 2;
constexpr int32_t kMaxExperts = 1024;

struct SamplerKernels;

struct Kernels {
    const char* name;
    void (*matmul)(const Matrix&, const Activations&, int32_t rows, int32_t block_begin, int32_t block_end, float* out,
                   int32_t ldo, bool accumulate);
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
    // fine, fine_isum: null for one term
    void (*quantize)(const float* x, int32_t n, int8_t* q, int8_t* fine, float* scale, float* sum, int32_t* isum,
                     int32_t* fine_isum);
    void (*rope)(float* x, int32_t heads, int32_t head_size, const float* cosine, const float* sine);
    void (*append)(const Cache&, int32_t slot, const float* k, const float* v);
    void (*attend)(const Queries&, const Cache&);
    // start or continue a running state with one partition's partial; finish divides by the sum
    void (*attend_reset)(float* state, int32_t queries, int32_t head_size);
    void (*attend_join)(float* state, const float* partial, int32_t queries, int32_t head_size);
    void (*attend_finish)(const float* state, int32_t rows, int32_t group, int32_t head_size, float* out, int32_t ldo);
    uint64_t (*checksum)(const uint8_t* p, size_t n);
    float (*read_all)(const uint8_t* p, size_t n);
    const SamplerKernels* sampler;  // sampler.h
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

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where this build or processor has none
const Kernels* avx512_kernels();

}  // namespace kvik
