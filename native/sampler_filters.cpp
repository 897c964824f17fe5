// The filters, operation for operation where a kept set depends on it as src/kvik/decoding/filters.py defines them.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "sampler_row.h"

namespace kvik {
namespace {

// Order of f32 as order of uint32, without NaN; -0 is 0.
uint32_t key_of(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float value_of(uint32_t key) { return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The last token of a prefix, and the weight up to it.
struct Reached {
    Cut cut;
    uint64_t before, with;  // without it and with it
};

// The shortest prefix whose weights reach `needed`: radix selection on the keys, which visits each candidate a few times and
// sorts nothing. items: key << 32 | place in scratch.ids, ascending, whose weights sum to `needed` or more.
template <class Weight>
Reached select(const std::vector<int32_t>& ids, std::vector<uint64_t>& items, uint64_t needed, Weight weight) {
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
                const uint64_t own = weight(uint32_t(item));
                if (before + own >= needed || item == items.back())
                    return {{value_of(low), ids[uint32_t(item)]}, before, before + own};
                before += own;
            }
        }
        const int shift = std::max(0, int(std::bit_width(high - low)) - kDigit);
        uint32_t digit = (high - low) >> shift;
        std::fill_n(sums, digit + 1, 0);
        for (const uint64_t item : items) sums[(uint32_t(item >> 32) - low) >> shift] += weight(uint32_t(item));
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
    for (size_t i = 0; i < ids.size(); ++i) items[i] = uint64_t(key_of(row.x[ids[i]])) << 32 | uint32_t(i);
}

void collect(const Row& row, float least) {
    auto& ids = row.scratch.ids;
    ids.resize(size_t(row.n));
    ids.resize(size_t(row.kernels.collect(row.x, row.n, row.scratch.maxima.data(), std::max(least, kLowest), ids.data())));
}

void keep(const Row& row, const Cut& cut) {
    std::erase_if(row.scratch.ids, [&](int32_t token) { return !cut.keeps(row.x[token], token); });
}

Cut cut_at_k(const Row& row, uint32_t k) {
    float least = kLowest;
    const size_t strips = strips_of(row.n);
    if (k <= strips) {
        size_t left = strips;
        while (left / 2 >= 4 * size_t(k)) left = (left + 1) / 2;  // four strips a token are enough for a good bound
        std::vector<float>& folded = row.scratch.folded;
        folded.assign(row.scratch.maxima.begin(), row.scratch.maxima.begin() + int64_t(left));
        for (size_t begin = left; begin < strips; begin += left)
            for (size_t i = 0; i < std::min(left, strips - begin); ++i)
                folded[i] = std::max(folded[i], row.scratch.maxima[begin + i]);
        std::nth_element(folded.begin(), folded.begin() + int64_t(k - 1), folded.end(), std::greater<>());
        least = folded[k - 1];
    }
    collect(row, least);
    Cut cut;
    if (row.scratch.ids.size() >= k) {
        set_items(row);
        cut = select(row.scratch.ids, row.scratch.items, k, [](uint32_t) { return uint64_t(1); }).cut;
        keep(row, cut);
    }
    return cut;
}

uint64_t needed_weight(double p, uint64_t total) {
    const double wanted = std::ceil(p * double(total));
    return wanted >= double(total) ? total : std::max<uint64_t>(uint64_t(wanted), 1);
}

// Distances of scratch.ids from the best score, and their weights; their sum.
void set_distances(const Row& row) {
    auto& scratch = row.scratch;
    scratch.distances.resize(scratch.ids.size());
    for (size_t i = 0; i < scratch.ids.size(); ++i) scratch.distances[i] = row.score(scratch.ids[i]);
}
uint64_t set_weights(const Row& row) {
    auto& scratch = row.scratch;
    set_distances(row);
    scratch.weights.resize(scratch.ids.size());
    return row.kernels.exact_weights(scratch.distances.data(), int32_t(scratch.ids.size()), scratch.weights.data());
}

Reached select_weight(const Row& row, uint64_t needed) {
    const uint64_t* weights = row.scratch.weights.data();
    set_items(row);
    return select(row.scratch.ids, row.scratch.items, needed, [weights](uint32_t place) { return weights[place]; });
}

// The nucleus of all tokens, where sums in f32 prove where it ends. Above a bound with little more than the needed weight,
// weights are exact; only the sum of the others, a small part, is known to a relative 8e-6.
bool nucleus_by_bound(const Row& row, double p, Cut* cut) {
    constexpr double kError = 8e-6, kUnit = double(uint64_t(1) << kWeightBits);
    if (!row.scratch.sums.known) set_sums(row);
    const auto& [known, total, bounds, below] = row.scratch.sums;
    int b = 0;
    while (b < kBounds && !(below[b] < (1.0 - p) * total * (1.0 - 4.0 * kError))) ++b;
    if (b == kBounds) return false;
    collect(row, bounds[b]);
    const uint64_t above = set_weights(row);
    const double slack = below[b] * kError * kUnit + double(row.n), rest = below[b] * kUnit;
    const uint64_t least = above + uint64_t(std::max(0.0, rest - slack)), most = above + uint64_t(rest + slack);
    const uint64_t needed = needed_weight(p, least), at_most = needed_weight(p, most);
    if (at_most > above) return false;
    const Reached reached = select_weight(row, needed);
    *cut = reached.cut;
    return reached.with >= at_most;
}

// The shortest prefix with at least p of the weight: of scratch.ids where those are listed, else of all tokens.
void nucleus(const Row& row, double p, Kept& kept) {
    if (!kept.listed && nucleus_by_bound(row, p, &kept.cut)) {
        kept.listed = true;
    } else {
        kept.cut = {};
        list(row, kept);
        kept.cut = select_weight(row, needed_weight(p, set_weights(row))).cut;
    }
    keep(row, kept.cut);
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

void keep_from(const Row& row, double bound) {
    std::erase_if(row.scratch.ids, [&](int32_t token) { return !(row.score(token) >= bound); });
}

struct Moments {
    double log_sum, mean;
};

// Of scratch.ids; sets distances and weights.
Moments moments(const Row& row, uint64_t* sum = nullptr) {
    const uint64_t total = set_weights(row);
    const int64_t moment = row.kernels.exact_moments(row.scratch.distances.data(), int32_t(row.scratch.ids.size()));
    if (sum) *sum = total;
    return {exact_log(double(total) * 0x1p-42), double(moment) / double(total)};
}

// After a filter that may have removed the best token.
void find_best(Row& row) {
    row.top = kNone;
    for (const int32_t token : row.scratch.ids) row.top = std::max(row.top, row.x[token]);
    row.best = double(row.top) * row.scale;
}

void typical(Row& row, double p) {
    auto& scratch = row.scratch;
    uint64_t total;
    const double mean = moments(row, &total).mean;
    const uint64_t needed = needed_weight(p, total);
    auto& order = scratch.order;
    order.resize(scratch.ids.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = {std::fabs(scratch.distances[i] - mean), int32_t(i)};
    // the last one needed, by halves: what is on its right is dropped or what is on its left is summed
    size_t begin = 0, end = order.size();
    uint64_t before = 0;
    while (end - begin > 1) {
        const size_t middle = begin + (end - begin - 1) / 2;
        std::nth_element(order.begin() + int64_t(begin), order.begin() + int64_t(middle), order.begin() + int64_t(end));
        uint64_t left = 0;
        for (size_t i = begin; i <= middle; ++i) left += scratch.weights[size_t(order[i].second)];
        if (before + left >= needed) {
            end = middle + 1;
        } else {
            before += left;
            begin = middle + 1;
        }
    }
    const auto last = order[begin];
    size_t kept = 0;
    for (size_t i = 0; i < scratch.ids.size(); ++i)
        if (std::pair(std::fabs(scratch.distances[i] - mean), int32_t(i)) <= last) scratch.ids[kept++] = scratch.ids[i];
    scratch.ids.resize(kept);
    find_best(row);
}

void epsilon(const Row& row, double cutoff) { keep_from(row, std::min(exact_log(cutoff) + moments(row).log_sum, 0.0)); }

void eta(const Row& row, double cutoff) {
    const Moments m = moments(row);
    const double log_eta = exact_log(cutoff);
    keep_from(row, std::min(std::min(log_eta, 0.5 * log_eta - (m.log_sum - m.mean)) + m.log_sum, 0.0));
}

void top_n_sigma(const Row& row, double n) {
    set_distances(row);
    const auto& d = row.scratch.distances;
    const double width = -*std::min_element(d.begin(), d.end());
    double deviation = 0.0;
    if (width > 0.0) {
        const double factor = -0x1p31 / width;
        uint64_t sum = 0;
        unsigned __int128 squares = 0;
        for (const double value : d) {
            const uint64_t units = uint64_t(std::nearbyint(value * factor));
            sum += units;
            squares += units * units;
        }
        const unsigned __int128 variance = squares * d.size() - static_cast<unsigned __int128>(sum) * sum;
        deviation = std::sqrt(double(variance)) / double(d.size()) * (width / 0x1p31);
    }
    keep_from(row, -(n * deviation));
}

void exclude_top(Row& row, double threshold) {
    const double log_sum = moments(row).log_sum;
    const double bound = threshold > 0.0 ? exact_log(threshold) + log_sum : -std::numeric_limits<double>::infinity();
    int32_t least = -1, above = 0;
    for (const int32_t token : row.scratch.ids) {
        if (!(row.score(token) >= bound)) continue;
        ++above;
        if (least < 0 || row.x[token] <= row.x[least]) least = token;
    }
    if (above < 2) return;
    std::erase_if(row.scratch.ids, [&](int32_t token) { return token != least && row.score(token) >= bound; });
    find_best(row);
}

}  // namespace

// The k-th largest strip maximum is a lower bound of the k-th largest logit, so that one comparison leaves few candidates.
void best_k(const Row& row, uint32_t k) { cut_at_k(row, k); }

void sort_best(const Row& row) {
    std::sort(row.scratch.ids.begin(), row.scratch.ids.end(),
              [&](int32_t a, int32_t b) { return row.x[a] > row.x[b] || (row.x[a] == row.x[b] && a < b); });
}

void set_sums(const Row& row) {
    constexpr double kDistances[kBounds] = {2.0, 4.0, 6.0, 8.0, 11.0, 15.0};
    Sums& sums = row.scratch.sums;
    for (int b = 0; b < kBounds; ++b)
        sums.bounds[b] = float(std::max(double(row.top) - kDistances[b] / row.scale, double(kLowest)));
    sums.total = row.kernels.exp_sums(row.x, row.n, row.top, float(row.scale), sums.bounds, sums.below);
    sums.known = true;
}

void list(const Row& row, Kept& kept) {
    if (kept.listed) return;
    collect(row, kept.cut.x);
    keep(row, kept.cut);
    kept.listed = true;
}

Kept filter(Row& row, const SampleRequest& request) {
    Kept kept;
    if (request.top_k > 0 && request.top_k < uint32_t(row.n)) {
        kept.cut = cut_at_k(row, request.top_k);
        kept.listed = true;
    }
    if (request.top_p < 1.0) nucleus(row, request.top_p, kept);
    if (request.min_p > 0.0) {
        const float least = least_with(row, exact_log(request.min_p));
        if (least > kept.cut.x) kept.cut = {least, std::numeric_limits<int32_t>::max()};
        if (kept.listed) keep(row, kept.cut);
    }
    const bool falls = request.xtc_probability > 0.0 &&
                       coin({request.seed, request.sample, request.position}) < request.xtc_probability;
    if (request.typical_p < 1.0 || request.epsilon > 0.0 || request.eta > 0.0 || request.top_n_sigma > 0.0 || falls) {
        list(row, kept);
        kept.cut = {};
        if (request.typical_p < 1.0) typical(row, request.typical_p);
        if (request.epsilon > 0.0) epsilon(row, request.epsilon);
        if (request.eta > 0.0) eta(row, request.eta);
        if (request.top_n_sigma > 0.0) top_n_sigma(row, request.top_n_sigma);
        if (falls) exclude_top(row, request.xtc_threshold);
    }
    if (request.processed && kept.cut.x > kLowest) list(row, kept);  // their sum must leave out ties beyond the cut
    return kept;
}

}  // namespace kvik
