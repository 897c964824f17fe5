// A pass's ranges, all of them, before anything is done.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "program.h"
#include "require.h"

namespace kvik {

bool Program::fits(int64_t address, size_t bytes) const {
    return address >= 0 && size_t(address) * kAddressBytes + bytes <= kv_bytes_;
}

void Program::check(const PassView& p) {
    require(p.rows > 0 && p.rows <= max_rows_, "rows of the pass out of range");
    require(p.sequences > 0 && p.spans[0] == 0 && p.spans[p.sequences] == p.rows, "spans do not cover the rows");
    require(p.tables.spans[0] == 0, "block spans must begin at 0");
    check_sequences(p);
    for (int32_t s = 0; s < p.sequences; ++s) check_tables(p, s);
    for (int32_t i = 0; i < p.copy_count; ++i) {
        const int32_t* copy = p.copies + 3 * size_t(i);
        require(copy[2] > 0, "a copy must have a step or more");
        const size_t bytes = size_t(copy[2]) * kAddressBytes;
        require(fits(copy[0], bytes) && fits(copy[1], bytes), "block of a copy out of range");
        require(std::abs(int64_t(copy[0]) - copy[1]) >= copy[2], "a block must be copied to another");
    }
    for (int32_t r = 0; r < p.logit_count; ++r)
        require(p.logit_rows[r] >= 0 && p.logit_rows[r] < p.rows, "logit row out of range");
    require(p.reduce_count >= 0 && p.top >= 0 && p.top <= logits_count_, "more best tokens than there are");
    for (int32_t r = 0; r < p.reduce_count; ++r) {
        require(p.reduce_rows[r] >= 0 && p.reduce_rows[r] < p.rows, "row to reduce out of range");
        require(p.targets[r] >= 0 && p.targets[r] < logits_count_, "target outside the vocabulary");
    }
    check_observations(p);
}

// Spans, layouts and rows; finds each sequence's first table.
void Program::check_sequences(const PassView& p) {
    // All spans before anything they lead to: the last ones are known to end where the arrays do.
    first_table_.assign(1, 0);
    for (int32_t s = 0; s < p.sequences; ++s) {
        require(p.spans[s] < p.spans[s + 1], "spans must ascend");
        require(p.layouts[s] >= 0 && size_t(p.layouts[s]) < layouts_.size(), "a sequence's layout was not registered");
        first_table_.push_back(first_table_.back() + layouts_[size_t(p.layouts[s])].num_tables());
        require(first_table_.back() <= p.table_count, "fewer tables than the layouts have");
    }
    require(first_table_.back() == p.table_count, "more tables than the layouts have");
    for (int32_t t = 0; t < p.table_count; ++t) require(p.tables.spans[t] <= p.tables.spans[t + 1], "spans must ascend");
    for (int32_t s = 0; s < p.sequences; ++s)
        for (int32_t r = p.spans[s]; r < p.spans[s + 1]; ++r) {
            require(p.slots[r] >= 0, "slot must not be negative");
            require(r == p.spans[s] || int64_t(p.slots[r]) == int64_t(p.slots[r - 1]) + 1, "slots of a sequence must be consecutive");
            require(p.positions[r] >= 0, "position must not be negative");
            require(p.positions[r] < positions_, "position outside the table of positions");
            require(p.tokens[r] >= 0 && p.tokens[r] < vocabulary_, "token id outside the vocabulary");
        }
}

// A sequence's tables: they cover its slots, and blocks may be missing only where nothing is written and no row looks.
void Program::check_tables(const PassView& p, int32_t s) const {
    const CacheLayout& l = layouts_[size_t(p.layouts[s])];
    int32_t table = first_table_[size_t(s)];
    for (const CacheLayout::Group& g : l.groups) {
        const int32_t* spans = p.tables.spans + table;
        const int32_t shift = p.tables.shifts[table];
        require(shift >= 0 && shift <= p.slots[p.spans[s]], "a table's shift must be between 0 and the first slot");
        require(!l.packs || p.tables.shifts[table + 1] == shift, "a table's shift differs from that of its packed pages");
        const int32_t first = p.slots[p.spans[s]] - shift, last = p.slots[p.spans[s + 1] - 1] - shift;
        const int32_t start = g.window > 0 ? std::max(0, first + 1 - g.window) : 0;
        int32_t full = start;  // from here on blocks must be there
        if (l.packs_for(g.window)) {
            const NewGroups fresh = new_groups(l, first, last);
            full = std::max(start, l.packed_end(first));
            if (fresh.begin < fresh.end) full = std::min(full, fresh.begin * l.packed.tokens);
            const int32_t from = std::max(start, l.keep), end = l.packed_end(last), each = l.packed.tokens;
            require(end <= int64_t(spans[2] - spans[1]) * each, "slot outside its sequence's packed pages");
            for (int32_t b = spans[1]; b < spans[2]; ++b) {
                const int64_t at = int64_t(b - spans[1]) * each;
                const bool read = at < end && at + each > from;
                require((p.tables.blocks[b] == -1 && !read) || fits(p.tables.blocks[b], g.packed_bytes), "packed page out of range");
            }
        }
        require(last < int64_t(spans[1] - spans[0]) * kBlockTokens, "slot outside its sequence's blocks");
        for (int32_t b = spans[0]; b < spans[1]; ++b) {
            const int64_t at = int64_t(b - spans[0]) * kBlockTokens, end = at + kBlockTokens;
            const bool read = end > full || (at < l.keep && end > start) || (g.sinks && at < l.sinks);
            require((p.tables.blocks[b] == -1 && !read) || fits(p.tables.blocks[b], g.block_bytes), "block out of range");
        }
        table += l.tables_each();
    }
}

void Program::check_observations(const PassView& p) {
    observation_of_.clear();
    if (p.observation_count) observation_of_.assign(size_t(p.sequences), -1);
    for (int32_t i = 0; i < p.observation_count; ++i) {
        const ObservationView& o = p.observations[i];
        require(o.sequence >= 0 && o.sequence < p.sequences, "an observation's sequence is not in the pass");
        require(o.first >= 0 && o.first <= o.end, "an observation's rows must ascend");
        require(observation_of_[size_t(o.sequence)] < 0, "a sequence has one observation");
        observation_of_[size_t(o.sequence)] = i;
        if (!o.sums) continue;
        const int32_t last = std::min(p.slots[p.spans[o.sequence + 1] - 1], o.end - 1);
        if (last < std::max(o.first, p.slots[p.spans[o.sequence]])) continue;
        for (int32_t t = first_table_[size_t(o.sequence)]; t < first_table_[size_t(o.sequence) + 1]; ++t)
            require(last - p.tables.shifts[t] < o.width, "an observation's sums are fewer than the slots of a table");
    }
}

// A pass's copies, in order; later ones may read what earlier ones wrote.
void Program::copy_blocks(const PassView& p) {
    for (int32_t i = 0; i < p.copy_count; ++i) {
        const int32_t* copy = p.copies + 3 * size_t(i);
        std::memcpy(kv_ + size_t(copy[1]) * kAddressBytes, kv_ + size_t(copy[0]) * kAddressBytes, size_t(copy[2]) * kAddressBytes);
    }
}

}  // namespace kvik
