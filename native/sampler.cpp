#include "sampler.h"

#include <algorithm>
#include <cmath>

#include "sampler_row.h"

namespace kvik {
namespace {

constexpr double kLeastTemperature = 1e-9, kMostTemperature = 1e30;  // as filters.py
constexpr size_t kScoreAll = 48;  // as many kept tokens are scored one by one rather than raced

struct Winner {
    int32_t token;
    double score;
};

Winner best_of(const Row& row, const std::vector<int32_t>& ids, const Cut& cut, const NoiseKey& key) {
    Winner winner{-1, -std::numeric_limits<double>::infinity()};
    for (const int32_t token : ids) {
        if (!cut.keeps(row.x[token], token)) continue;
        const double score = row.score(token) + gumbel(key, uint32_t(token));
        if (score > winner.score) winner = {token, score};
    }
    return winner;
}

// argmax of score + noise. The scores' exponentials race: the winner has the least E / w with E = -ln(1 - v) >= v, and
// the least of all is exponential with rate W = sum of w. So only tokens with v <= c w can win if some token reaches
// -ln c, which fails with probability e^-16 for c = 16 / W and then takes a larger c. Those few are scored exactly, so
// f32 decides nothing. sum: W, which may be off by some percent.
int32_t draw(const Row& row, const Kept& kept, const NoiseKey& key, double sum) {
    auto& scratch = row.scratch;
    if (kept.listed && scratch.ids.size() <= kScoreAll) return best_of(row, scratch.ids, kept.cut, key).token;
    if (kept.listed) {
        sum = 0.0;
        for (const int32_t token : scratch.ids) sum += double(std::exp(float(row.score(token))));
    }
    for (double c = 16.0 / sum;; c *= 16.0) {
        // above every rounding of weights and limit
        const Race race{row.top, float(row.scale), float(c * 1.001), kept.cut.x, key.seed, key.sample, key.position};
        scratch.race.resize(size_t(row.n));
        int32_t* out = scratch.race.data();
        scratch.race.resize(size_t(kept.listed
                                       ? row.kernels.race_listed(row.x, scratch.ids.data(), int32_t(scratch.ids.size()), race, out)
                                       : row.kernels.race(row.x, row.n, race, out)));
        const Winner winner = best_of(row, scratch.race, kept.cut, key);
        // 64 exceeds the largest E there is, so that the best token has run in the race
        if (winner.token >= 0 && (winner.score > -exact_log(c) + 1e-6 || c >= 64.0)) return winner.token;
    }
}

// Writes the best tokens of scratch.ids, falling, with log-probability score - log_sum.
void report(const Row& row, double log_sum, const SampleRequest& request, SampleResult& result) {
    auto& ids = row.scratch.ids;
    sort_best(row);
    result.top_count = int32_t(std::min(ids.size(), size_t(request.logprobs)));
    for (int32_t i = 0; i < result.top_count; ++i) {
        result.top_ids[i] = ids[size_t(i)];
        result.top_logprobs[i] = row.score(ids[size_t(i)]) - log_sum;
    }
}

// sum: of all tokens' exponentials, where they are not listed.
void report_processed(const Row& row, const Kept& kept, double sum, const SampleRequest& request, SampleResult& result) {
    if (kept.listed) {
        sum = 0.0;
        for (const int32_t token : row.scratch.ids) sum += exact_exp(std::max(row.score(token), -700.0));
    }
    const double log_sum = exact_log(sum);
    result.logprob = row.score(result.token) - log_sum;
    if (request.logprobs > 0) {
        if (!kept.listed) best_k(row, uint32_t(request.logprobs));
        report(row, log_sum, request, result);
    }
}

int32_t first_at(const Row& row) {
    for (int32_t begin = 0, block = 0; begin < row.n; begin += kStripBlock, ++block) {
        const float* maxima = row.scratch.maxima.data() + size_t(block) * kLanesPerStrip;
        if (*std::max_element(maxima, maxima + kLanesPerStrip) != row.top) continue;
        for (int32_t i = begin; i < row.n; ++i)
            if (row.x[i] == row.top) return i;
    }
    return -1;
}

// From the row after its edits. raw_sum: of all its exponentials at temperature 1, 0 where that is not known.
void draw_edited(Row& row, const SampleRequest& request, double raw_sum, SampleResult& result) {
    Kept kept;
    double sum = 0.0;
    if (request.temperature < kLeastTemperature) {
        row.best = double(row.top);
        result.token = first_at(row);
        kept = {{row.top, result.token}, true};
        row.scratch.ids.assign(1, result.token);
    } else {
        row.scale = 1.0 / std::min(request.temperature, kMostTemperature);
        row.best = double(row.top) * row.scale;
        kept = filter(row, request);
        if (!kept.listed)
            sum = raw_sum > 0.0 && row.scale == 1.0 && kept.cut.x == kLowest
                      ? raw_sum
                      : row.kernels.exp_sum(row.x, row.n, row.top, float(row.scale), kept.cut.x);
        result.token = draw(row, kept, {request.seed, request.sample, request.position}, sum);
    }
    result.outcome = Outcome::drawn;
    if (request.processed) report_processed(row, kept, sum, request, result);
}

}  // namespace

bool finite_or_none(const float* x, int32_t n) {
    bool good = true;
    for (int32_t i = 0; i < n; ++i) good &= x[i] <= std::numeric_limits<float>::max();  // false for NaN and +inf
    return good;
}

void SampleScratch::reserve(int32_t vocabulary) {
    if (maxima.size() < strips_of(vocabulary)) maxima.resize(strips_of(vocabulary));
}

void sample_row(const SamplerKernels& kernels, const float* logits, int32_t n, const SampleRequest& request, bool in_place,
                SampleScratch& scratch, SampleResult& result) {
    result = {Outcome::no_token, -1, -std::numeric_limits<double>::infinity(), 0, result.top_ids, result.top_logprobs};
    scratch.reserve(n);
    bool suspect = false;
    Row row{kernels, logits, n, 0.0f, 1.0, 0.0, scratch};
    row.top = kernels.row_max(logits, n, scratch.maxima.data(), &suspect);
    if (suspect && !finite_or_none(logits, n)) {
        result.outcome = Outcome::not_finite;
        return;
    }
    if (row.top == kNone) return;
    const bool raw = !request.processed, edited = !request.edits.none();
    const bool nucleus_first = request.top_p < 1.0 && request.top_k == 0;
    const float raw_top = row.top;
    double raw_sum = 0.0;
    scratch.sums.known = false;
    if (raw) {
        row.best = double(raw_top);
        if (nucleus_first && !edited && request.temperature == 1.0) {  // one pass for two
            set_sums(row);
            raw_sum = scratch.sums.total;
        } else {
            raw_sum = kernels.exp_sum(logits, n, raw_top, 1.0f, kLowest);
        }
        if (request.logprobs > 0) {
            best_k(row, uint32_t(request.logprobs));
            report(row, exact_log(raw_sum), request, result);
        }
    }
    {
        const Restored restored(logits, scratch);
        if (edited) row.x = edit_row(kernels, logits, n, request.edits, in_place, scratch, &row.top);
        if (row.top == kNone) return;
        draw_edited(row, request, raw && !edited ? raw_sum : 0.0, result);
    }
    if (raw) result.logprob = double(logits[result.token]) - double(raw_top) - exact_log(raw_sum);
}

}  // namespace kvik
