// Sampling of one row of logits: the fast twin of src/kvik/decoding/{pipeline,penalties,filters,noise}.py, with the same
// kept set and the same drawn token. No Python, no threads, no state.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace kvik {

constexpr int32_t kMaxVocabulary = 1 << 20;
// A row's maxima are kept by strips: lane l of block b is the largest of the block's entries in that lane.
constexpr int32_t kStripBlock = 256;
constexpr int32_t kLanesPerStrip = 16;
constexpr int32_t kNoiseGroup = 64;  // tokens that share Philox blocks
constexpr int32_t kBounds = 6;

// Of a race: a token runs where its v may be at most weight * limit, the weight e^((x - top) * scale).
struct Race {
    float top, scale, limit;
    float cut;  // tokens below it do not run
    uint64_t seed;
    uint32_t sample, position;
};

// The passes over many tokens, once for each instruction set, all with the same results.
struct SamplerKernels {
    // The largest of x [n] and the maxima of its strips [ceil(n / 256) * 16]; *suspect if there is a NaN or infinity.
    float (*row_max)(const float* x, int32_t n, float* maxima, bool* suspect);
    // The sum of e^((x - top) * scale) over x >= cut, in one order, to a relative 8e-6 (3e-7 in practice).
    double (*exp_sum)(const float* x, int32_t n, float top, float scale, float cut);
    // The same over all x, returned, and over the x below each of `bounds`.
    double (*exp_sums)(const float* x, int32_t n, float top, float scale, const float bounds[kBounds], double below[kBounds]);
    // Indices of least <= x, ascending; returns how many. maxima: of its strips; out has room for n.
    int32_t (*collect)(const float* x, int32_t n, const float* maxima, float least, int32_t* out);
    // exact_weight(d) of each of d [n], and their sum
    uint64_t (*exact_weights)(const double* d, int32_t n, uint64_t* weights);
    // The sum of exact_moment(d) of each.
    int64_t (*exact_moments)(const double* d, int32_t n);
    // Tokens that may win the race; out has room for n. The second runs those of ids [n] only.
    int32_t (*race)(const float* x, int32_t n, const Race& race, int32_t* out);
    int32_t (*race_listed)(const float* x, const int32_t* ids, int32_t n, const Race& race, int32_t* out);
    // out = x where the token's bit of allowed [ceil(n / 32)] is set, else -infinity
    void (*masked)(const float* x, int32_t n, const uint32_t* allowed, float* out);
    // out = (x - best) - log_sum, rounded to f32
    void (*log_probabilities)(const float* x, int32_t n, double best, double log_sum, float* out);
};

struct Ids {
    const int32_t* data = nullptr;
    int32_t size = 0;
};

// What is done to the row before temperature, in this order (Edits of edits.py). Ids are in [0, n).
struct RowEdits {
    Ids bias_ids;
    const float* biases = nullptr;
    Ids banned;
    const uint32_t* mask = nullptr;
    Ids seen;
    float repetition = 1.0f;
    Ids counted;
    const int32_t* counts = nullptr;
    float presence = 0.0f, frequency = 0.0f;
    Ids dry_ids;
    const float* dry_penalties = nullptr;
    Ids repeated;
    int64_t size() const {
        return int64_t(bias_ids.size) + banned.size + seen.size + counted.size + dry_ids.size + repeated.size;
    }
    bool none() const { return !mask && size() == 0; }
};

struct SampleRequest {
    double temperature, top_p, min_p, typical_p, epsilon, eta, top_n_sigma, xtc_probability, xtc_threshold;
    uint64_t seed;
    uint32_t sample, position;
    uint32_t top_k;    // 0: off
    int32_t logprobs;  // how many best tokens to report
    bool processed;    // log-probabilities after the filters
    RowEdits edits;
};

enum class Outcome : uint8_t { drawn = 0, no_token = 1, not_finite = 2 };

struct SampleResult {
    Outcome outcome;
    int32_t token;      // drawn
    double logprob;     // drawn
    int32_t top_count;  // entries written to top_ids and top_logprobs
    int32_t* top_ids;   // [logprobs]
    double* top_logprobs;
};

// exp_sums of a row: of everything, and below each of these bounds.
struct Sums {
    bool known = false;
    double total = 0.0;
    float bounds[kBounds];
    double below[kBounds];
};

struct SampleScratch {
    Sums sums;
    std::vector<float> row, maxima, folded;
    std::vector<double> distances;
    std::vector<uint64_t> weights;
    std::vector<int32_t> ids, race;
    std::vector<uint64_t> items;                    // key << 32 | place
    std::vector<std::pair<double, int32_t>> order;  // distance, place
    std::vector<std::pair<int32_t, float>> undo;
    void reserve(int32_t vocabulary);
};

// logits [n], 1 <= n <= kMaxVocabulary; requests and edits in their ranges: the caller checks all of it. in_place: edits
// may be made in the row itself and are taken back before the return.
void sample_row(const SamplerKernels&, const float* logits, int32_t n, const SampleRequest&, bool in_place, SampleScratch&,
                SampleResult&);

// The best `count` tokens of the row's log-softmax after its edits, falling: writes ids and log-probabilities, returns how
// many there are; -1 where the row has NaN or +infinity.
int32_t best_of_row(const SamplerKernels&, const float* logits, int32_t n, const RowEdits&, int32_t count, SampleScratch&,
                    int32_t* ids, float* logprobs);

}  // namespace kvik
