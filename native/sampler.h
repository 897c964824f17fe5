// Sampling of one row of logits: the fast twin of src/kvik/decoding/filters.py and noise.py, with the same kept set and
// the same drawn token. No Python, no threads, no state.
#pragma once

#include <cstdint>
#include <vector>

namespace kvik {

constexpr int32_t kMaxVocabulary = 1 << 20;
// A row's maxima are kept by strips: lane l of block b is the largest of the block's entries in that lane.
constexpr int32_t kStripBlock = 256;
constexpr int32_t kLanesPerStrip = 16;
constexpr int32_t kNoiseGroup = 64;  // tokens that share Philox blocks; rows of weights are padded to it

// The passes over the whole vocabulary, once for each instruction set, all with the same results.
struct SamplerKernels {
    // The largest of x [n] and the maxima of its strips [ceil(n / 256) * 16]; *suspect if there is a NaN or infinity.
    float (*row_max)(const float* x, int32_t n, float* maxima, bool* suspect);
    // The sum of exp((x - top) * scale) over x >= cut, to about 1e-7, in one order. weights [n padded to 64] gets the
    // terms, 0 for what is below the cut or padding; it may be null.
    double (*exp_sum)(const float* x, int32_t n, float top, float scale, float cut, float* weights);
    // Indices of least <= x <= most, ascending; returns how many. out has room for n.
    int32_t (*collect)(const float* x, int32_t n, float least, float most, int32_t* out);
    // exact_weight(x * scale - top) of each, and their sum
    uint64_t (*exact_weights)(const float* x, int32_t n, double scale, double top, uint64_t* weights);
    // The sum of the weights of x > cut.
    uint64_t (*weight_above)(const float* x, const uint64_t* weights, int32_t n, float cut);
    // Tokens whose score with noise may reach -ln(limit): those with v <= limit * weight, v rounded down. weights as
    // exp_sum wrote them; out has room for n.
    int32_t (*race)(const float* weights, int32_t n, float limit, uint64_t seed, uint32_t sample, uint32_t position,
                    int32_t* out);
};

struct SampleRequest {
    double temperature, top_p, min_p;
    uint64_t seed;
    uint32_t sample, position;
    uint32_t top_k;      // 0: off
    int32_t logprobs;    // how many best tokens to report
    bool processed;      // log-probabilities after the filters
    const int32_t* banned;
    int32_t bans;
};

enum class Outcome : uint8_t { drawn = 0, no_token = 1, not_finite = 2 };

struct SampleResult {
    Outcome outcome;
    int32_t token;       // drawn
    double logprob;      // drawn
    int32_t top_count;   // entries written to top_ids and top_logprobs
    int32_t* top_ids;    // [logprobs]
    double* top_logprobs;
};

struct SampleScratch {
    std::vector<float> row, weights, maxima;
    std::vector<uint64_t> exact;
    std::vector<int32_t> ids, race;
    std::vector<uint64_t> items;  // key << 32 | token
    void reserve(int32_t vocabulary);
};

// logits [n], 1 <= n <= kMaxVocabulary; banned ids in [0, n): the caller checks both.
void sample_row(const SamplerKernels&, const float* logits, int32_t n, const SampleRequest&, SampleScratch&, SampleResult&);

}  // namespace kvik
