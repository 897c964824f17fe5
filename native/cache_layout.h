// Where the keys and values of a sequence lie: which tables it has, and what of a block is whose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace kvik {

// See kvik.ops.pages.CacheLayout. A (layer, KV head) is a unit, numbered by layer, then head.
struct CacheLayout {
    struct Group {
        size_t block_bytes = 0, packed_bytes = 0;
        int32_t window = -1;  // of its layer that sees farthest; 0: everything; -1: nobody looks
        bool sinks = false;   // some layer sees them
    };
    PageShape full{}, packed{};
    bool packs = false;             // there are packed pages
    std::vector<int32_t> group_of;  // by unit
    int32_t keep = 0;
    bool rotate = false;
    int32_t sinks = 0, window = 0;
    // of the program's
    std::vector<size_t> at, packed_at;  // by unit: where its share of a block or page begins
    std::vector<Group> groups;
    bool apart = false;  // layers of one window lie in several groups

    int32_t tables_each() const { return packs ? 2 : 1; }
    int32_t num_tables() const { return int32_t(groups.size()) * tables_each(); }
    // Whether rows that see so many slots (0: all) ever read packed pages: their last kRecent slots are full.
    bool packs_for(int32_t seen) const { return packs && (seen == 0 || seen > kRecent); }
    // slots that a row of a layer with this window of its own sees
    int32_t seen(int32_t own) const { return own ? own : window; }
    // Slots before this one (from `keep` on) are read packed by the row at `slot`, where anything is. -1: no row, nothing.
    int32_t packed_end(int32_t slot) const {
        return slot + 1 > kRecent ? (slot + 1 - kRecent) / packed.tokens * packed.tokens : 0;
    }
};

// Tables of one sequence, from its first on: blocks of table i are spans[i] to spans[i + 1].
struct Tables {
    const int32_t* blocks;
    const int32_t* spans;
    const int32_t* shifts;
};

// One sequence's cache outside a pass; see kvik.ops.CacheView.
struct View {
    int32_t layout;
    Tables tables;
    int32_t num_tokens;
};

// Packed pages that rows at first..last of a table are the first to read: groups [begin, end). Those within `keep` are never.
struct NewGroups {
    int32_t begin, end;
};
inline NewGroups new_groups(const CacheLayout& l, int32_t first, int32_t last) {
    const int32_t each = l.packed.tokens, from = l.packed_end(first - 1), kept = l.keep / each * each;
    return {(from > kept ? from : kept) / each, l.packed_end(last) / each};
}

}  // namespace kvik
