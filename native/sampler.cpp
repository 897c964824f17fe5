#include "sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "sampler_math.h"

namespace kvik {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr double kLeastTemperature = 1e-9, kMostTemperature = 1e30;  // as filters.py
constexpr size_t kScoreAll = 192;  // as many kept tokens are scored one by one rather than raced

// Every filter keeps a prefix of the order "falling logit, equal ones by rising id"; this is the last token of it.
struct Cut {
    float x = kLowest;
    int32_t id = std::numeric_limits<int32_t>::max();
    bool keeps(float value, int32_t token) const { return value > x || (value == x && token <= id); }
};

// Order of f32 as order of uint32, without NaN; -0 is 0.
uint32_t key_of(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float value_of(uint32_t key) {
    return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

size_t strips_of(int32_t n) { return size_t((n + kStripBlock - 1) / kStripBlock) * kLanesPerStrip; }

struct Row {
    const SamplerKernels& kernels;
    const float* x;
    int32_t n;
    float top;          // the largest logit
    double scale, best; // scores are x * scale - best
    SampleScratch& scratch;
    double score(int32_t token) const { return double(x[token]) * scale - best; }
};

// The last token of the shortest prefix whose weights reach `needed`: radix selection on the keys, which visits each
// candidate a few times and sorts nothing. items: key << 32 | token, tokens ascending, whose weights sum to `needed` or more.
template <class Weight>
Cut select(std::vector<uint64_t>& items, uint64_t needed, Weight weight) {
    constexpr int kDigit = 11;  // 16 KiB of sums
    uint64_t sums[1 << kDigit];
    uint64_t before = 0;
    for (;;) {
        uint32_t low = ~0u, high = 0;
        for (const uint64_t item : items) {
            const uint32_t key = uint32_t(item >> 32);
            low = std::min(low, key);
            high = std::max(high, key);
        }
        if (low == high) {
            for (const uint64_t item : items) {
                const int32_t token = int32_t(uint32_t(item));
                before += weight(token);
                if (before >= needed) return {value_of(low), token};
            }
            return {value_of(low), int32_t(uint32_t(items.back()))};
        }
        const int shift = std::max(0, int(std::bit_width(high - low)) - kDigit);
        uint32_t digit = (high - low) >> shift;
        std::fill_n(sums, digit + 1, 0);
        for (const uint64_t item : items) sums[(uint32_t(item >> 32) - low) >> shift] += weight(int32_t(uint32_t(item)));
        for (; digit > 0 && before + sums[digit] < needed; --digit) before += sums[digit];
        size_t kept = 0;
        for (const uint64_t item : items)
            if ((uint32_t(item >> 32) - low) >> shift == digit) items[kept++] = item;
        items.resize(kept);
    }
}

void set_items(const Row& row) {
    const auto& ids = row.scratch.ids;
    auto& items = row.scratch.items;
    items.resize(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) items[i] = uint64_t(key_of(row.x[ids[i]])) << 32 | uint32_t(ids[i]);
}

void collect(const Row& row, float least, float most) {
    auto& ids = row.scratch.ids;
    ids.resize(size_t(row.n));
    ids.resize(size_t(row.kernels.collect(row.x, row.n, std::max(least, kLowest), most, ids.data())));
}

void keep(const Row& row, const Cut& cut) {
    std::erase_if(row.scratch.ids, [&](int32_t token) { return !cut.keeps(row.x[token], token); });
}

// scratch.ids becomes the k best tokens of the row, ascending by id. The k-th largest strip maximum is a lower bound of
// the k-th largest logit, so that one comparison leaves few candidates. scratch.maxima must be this row's.
Cut best_k(const Row& row, uint32_t k) {
    float least = kLowest;
    const size_t strips = strips_of(row.n);
    if (k <= strips) {
        size_t left = strips;
        while (left / 2 >= 4 * size_t(k)) left = (left + 1) / 2;  // four strips a token are enough for a good bound
        std::vector<float>& folded = row.scratch.weights;  // not yet in use
        std::copy_n(row.scratch.maxima.begin(), left, folded.begin());
        for (size_t begin = left; begin < strips; begin += left)
            for (size_t i = 0; i < std::min(left, strips - begin); ++i)
                folded[i] = std::max(folded[i], row.scratch.maxima[begin + i]);
        std::nth_element(folded.begin(), folded.begin() + int64_t(k - 1), folded.begin() + int64_t(left), std::greater<>());
        least = folded[k - 1];
    }
    collect(row, least, row.top);
    Cut cut;
    if (row.scratch.ids.size() >= k) {
        set_items(row);
        cut = select(row.scratch.items, k, [](int32_t) { return uint64_t(1); });
        keep(row, cut);
    }
    return cut;
}

uint64_t needed_weight(double p, uint64_t total) {
    const double wanted = std::ceil(p * double(total));
    return wanted >= double(total) ? total : std::max<uint64_t>(uint64_t(wanted), 1);
}

// What the filters left: the cut, and whether scratch.ids lists it.
struct Kept {
    Cut cut;
    bool listed = false;
};

Cut select_weight(const Row& row, uint64_t needed) {
    const uint64_t* weights = row.scratch.exact.data();
    set_items(row);
    return select(row.scratch.items, needed, [weights](int32_t token) { return weights[token]; });
}

// The nucleus of a flat row is too long to list. Every 16th token tells roughly where it ends; above that band weights
// are only summed, and the selection sees the band alone. Nothing where the band missed the end.
std::optional<Cut> nucleus_by_band(const Row& row, double p, uint64_t needed) {
    constexpr double kMargin = 0.02;
    auto& ids = row.scratch.ids;
    const uint64_t* weights = row.scratch.exact.data();
    ids.clear();
    uint64_t sample = 0;
    for (int32_t token = 0; token < row.n; token += 16) {
        if (weights[token] == 0) continue;
        ids.push_back(token);
        sample += weights[token];
    }
    if (sample == 0) return std::nullopt;
    const float high = select_weight(row, needed_weight(std::max(p - kMargin, 0.0), sample)).x;
    const float low = select_weight(row, needed_weight(std::min(p + kMargin, 1.0), sample)).x;
    uint64_t above = row.kernels.weight_above(row.x, weights, row.n, high), reached = above;
    collect(row, low, high);
    for (const int32_t token : ids) reached += weights[token];
    if (above >= needed || reached < needed) return std::nullopt;
    return select_weight(row, needed - above);
}

// The shortest prefix with at least p of the weight: of scratch.ids where those are listed, else of all tokens.
Kept nucleus(const Row& row, double p, bool listed) {
    auto& scratch = row.scratch;
    uint64_t* weights = scratch.exact.data();
    uint64_t total = 0, needed = 0;
    if (listed) {
        for (const int32_t token : scratch.ids) total += weights[token] = exact_weight(row.score(token));
        needed = needed_weight(p, total);
    } else {
        total = row.kernels.exact_weights(row.x, row.n, row.scale, row.best, weights);
        needed = needed_weight(p, total);
        if (total >> kWeightBits > uint64_t(row.n) / 64) {
            if (const auto cut = nucleus_by_band(row, p, needed)) return {*cut, false};
        }
        // Tokens lighter than rest / n weigh less than rest together, so that the others reach `needed`.
        const double light = double(total - needed) / double(row.n) * 0x1p-42;
        float least = kLowest;
        if (light > 0.0) {
            const double bound = (row.best + std::log(light) - 1e-3) / row.scale;
            if (bound > double(kLowest)) least = std::nextafter(float(bound), kNone);
        }
        collect(row, least, row.top);
    }
    const Cut cut = select_weight(row, needed);
    keep(row, cut);
    return {cut, true};
}

// The least logit x with x * scale - best >= bound; what is monotone needs no more than a binary search over the floats.
float least_with(const Row& row, double bound) {
    uint32_t no = key_of(kLowest) - 1, yes = key_of(row.top);
    while (yes - no > 1) {
        const uint32_t middle = no + (yes - no) / 2;
        (double(value_of(middle)) * row.scale - row.best >= bound ? yes : no) = middle;
    }
    return value_of(yes);
}

Kept filter(const Row& row, const SampleRequest& request) {
    Kept kept;
    if (request.top_k > 0 && request.top_k < uint32_t(row.n)) {
        kept.cut = best_k(row, request.top_k);
        kept.listed = true;
    }
    if (request.top_p < 1.0) {
        kept = nucleus(row, request.top_p, kept.listed);
    }
    if (request.min_p > 0.0) {
        const float least = least_with(row, exact_log(request.min_p));
        if (least > kept.cut.x) kept.cut = {least, std::numeric_limits<int32_t>::max()};
        if (kept.listed) keep(row, kept.cut);
    }
    if (request.processed && !kept.listed && kept.cut.x > kLowest) {  // their sum must leave out ties beyond the cut
        collect(row, kept.cut.x, row.top);
        keep(row, kept.cut);
        kept.listed = true;
    }
    return kept;
}

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
// f32 decides nothing.
int32_t draw(const Row& row, const Kept& kept, const NoiseKey& key) {
    auto& scratch = row.scratch;
    if (kept.listed && scratch.ids.size() <= kScoreAll) return best_of(row, scratch.ids, kept.cut, key).token;
    const double sum = row.kernels.exp_sum(row.x, row.n, row.top, float(row.scale), kept.cut.x, scratch.weights.data());
    for (double c = 16.0 / sum;; c *= 16.0) {
        scratch.race.resize(size_t(row.n));
        const float limit = float(c * 1.001);  // above every rounding of weights and limit
        scratch.race.resize(size_t(row.kernels.race(scratch.weights.data(), row.n, limit, key.seed, key.sample, key.position,
                                                    scratch.race.data())));
        const Winner winner = best_of(row, scratch.race, kept.cut, key);
        // 64 exceeds the largest E there is, so that the best token has run in the race
        if (winner.token >= 0 && (winner.score > -exact_log(c) + 1e-6 || c >= 64.0)) return winner.token;
    }
}

// Writes the best tokens of scratch.ids, falling, with log-probability offset + x * scale.
void report(const Row& row, double log_sum, const SampleRequest& request, SampleResult& result) {
    auto& ids = row.scratch.ids;
    std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return row.x[a] > row.x[b] || (row.x[a] == row.x[b] && a < b); });
    result.top_count = int32_t(std::min(ids.size(), size_t(request.logprobs)));
    for (int32_t i = 0; i < result.top_count; ++i) {
        result.top_ids[i] = ids[size_t(i)];
        result.top_logprobs[i] = row.score(ids[size_t(i)]) - log_sum;
    }
}

void report_processed(const Row& row, const Kept& kept, const SampleRequest& request, SampleResult& result) {
    double sum = 0.0;
    if (kept.listed) {
        for (const int32_t token : row.scratch.ids) sum += exact_exp(std::max(row.score(token), -700.0));
    } else {
        sum = row.kernels.exp_sum(row.x, row.n, row.top, float(row.scale), kept.cut.x, nullptr);
    }
    const double log_sum = exact_log(sum);
    result.logprob = row.score(result.token) - log_sum;
    if (request.logprobs > 0) {
        if (!kept.listed) {
            best_k(row, uint32_t(request.logprobs));
            keep(row, kept.cut);
        }
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

bool finite_or_none(const float* x, int32_t n) {
    bool good = true;
    for (int32_t i = 0; i < n; ++i) good &= x[i] <= std::numeric_limits<float>::max();  // false for NaN and +inf
    return good;
}

}  // namespace

void SampleScratch::reserve(int32_t vocabulary) {
    const size_t padded = size_t(vocabulary + kNoiseGroup - 1) / kNoiseGroup * kNoiseGroup;
    const size_t strips = strips_of(vocabulary);
    if (weights.size() < std::max(padded, strips)) weights.resize(std::max(padded, strips));
    if (maxima.size() < strips) maxima.resize(strips);
    if (exact.size() < size_t(vocabulary)) exact.resize(size_t(vocabulary));
}

void sample_row(const SamplerKernels& kernels, const float* logits, int32_t n, const SampleRequest& request,
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
    const bool raw = !request.processed;
    double raw_log_sum = 0.0;
    const double raw_best = double(row.top);
    if (raw) {
        row.best = raw_best;
        raw_log_sum = exact_log(kernels.exp_sum(logits, n, row.top, 1.0f, kLowest, nullptr));
        if (request.logprobs > 0) {
            best_k(row, uint32_t(request.logprobs));
            report(row, raw_log_sum, request, result);
        }
    }
    if (request.bans > 0) {
        scratch.row.assign(logits, logits + n);
        for (int32_t i = 0; i < request.bans; ++i) scratch.row[size_t(request.banned[i])] = kNone;
        row.x = scratch.row.data();
        row.top = kernels.row_max(row.x, n, scratch.maxima.data(), &suspect);
        if (row.top == kNone) {
            result.top_count = raw ? result.top_count : 0;
            return;
        }
    }
    Kept kept;
    if (request.temperature < kLeastTemperature) {
        row.best = double(row.top);
        result.token = first_at(row);
        kept = {{row.top, result.token}, true};
        scratch.ids.assign(1, result.token);
    } else {
        row.scale = 1.0 / std::min(request.temperature, kMostTemperature);
        row.best = double(row.top) * row.scale;
        kept = filter(row, request);
        result.token = draw(row, kept, {request.seed, request.sample, request.position});
    }
    result.outcome = Outcome::drawn;
    if (raw)
        result.logprob = double(logits[result.token]) - raw_best - raw_log_sum;
    else
        report_processed(row, kept, request, result);
}

}  // namespace kvik
