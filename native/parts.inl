// Which blocks a tile of rows sees, part by part.

namespace KVIK_NS {
using namespace kvik;

// A tile of rows and its cache, in slots of the table.
struct Tile {
    const Queries& a;
    const Cache& c;
    const int32_t first, last, start;  // slots of the first and the last row; the first slot that the first row sees
    const int32_t packed_first;        // packed_end of the first row
    const Partitions partitions;
    const int first_partition, states, page_bits;  // states of a partition: of its packed, of its full slots; a page has 2^bits tokens

    Tile(const Queries& queries, const Cache& cache)
        : a(queries), c(cache), first(a.slots[0] - c.shift), last(a.slots[a.rows - 1] - c.shift), start(seen_from(first)),
          packed_first(c.packed_end(first)), partitions(partitions_of(first, last, a.window, a.sinks)), first_partition(partitions.first_of(a.first_span)),
          states(c.packed_blocks ? 2 : 1), page_bits(__builtin_ctz(unsigned(c.packed.tokens))) {}

    int queries() const { return a.rows * a.group; }
    int places() const { return (partitions.first_of(a.last_span) - first_partition) * states; }
    int span_of(const Part& at) const { return partitions.span_of(first_partition + at.place / states); }
    int32_t slot(int query) const { return a.slots[query / a.group] - c.shift; }
    int32_t packed_end(int32_t slot) const {
        return states > 1 && slot + 1 > kRecent ? (slot + 1 - kRecent) >> page_bits << page_bits : 0;
    }
    // the first slot that a row sees through q
    int32_t seen_from(int32_t slot) const {
        const int32_t begin = a.window && slot + 1 > a.window ? slot + 1 - a.window : 0;
        return begin > a.sinks ? begin : a.sinks;
    }
    // whether the row at `slot` sees all slots of a part
    bool sees_all(const Part& at, int32_t slot) const {
        const int32_t begin = at.slots[0], end = at.slots[at.count - 1] + kBlockTokens, packed = packed_end(slot);
        if (at.sinks || begin < seen_from(slot) || end > slot + 1) return false;
        return at.packed ? begin >= c.keep && end <= packed : end <= c.keep || begin >= packed;
    }
    // whether every row does: what the first or the last sees all of, those between do
    bool all_see_all(const Part& at) const { return sees_all(at, first) && sees_all(at, last); }
    // whether some row sees slots of the full block from `base` on, of the packed one
    bool sees_full(int32_t base) const {
        if (base + kBlockTokens <= start || base > last || last < a.sinks) return false;
        return base < c.keep || base >= packed_first;
    }
    bool sees_packed(int32_t base) const {
        if (base < c.keep) return false;
        const int32_t page_end = ((base >> page_bits) + 1) << page_bits, earliest = page_end + kRecent - 1;
        const int32_t reader = first > earliest ? first : earliest;  // the first row that reads it packed
        return reader <= last && base + kBlockTokens > seen_from(reader);
    }
    void add_full(Part& at, int32_t base) const {
        const uint8_t* block = full_block(c, base);
        const int b = at.count++;
        at.slots[b] = base;
        at.keys[b] = block;
        at.values[b] = block + c.full.values();
        at.tokens = b * kBlockTokens + (last + 1 - base < kBlockTokens ? last + 1 - base : kBlockTokens);
    }
    void add_packed(Part& at, int32_t base) const {
        const PageShape& s = c.packed;
        const uint8_t* page = packed_page(c, base >> page_bits);
        const size_t within = size_t(base & (s.tokens - 1)) / kBlockTokens;
        const int b = at.count++;
        at.slots[b] = base;
        at.pages[b] = page;
        at.keys[b] = page + within * s.key_block();
        at.values[b] = page + s.values() + within * s.value_block();
        at.tokens = at.count * kBlockTokens;
    }
    // A partition that every row sees packed whole, in one page.
    void add_page(Part& at, int32_t begin) const {
        const PageShape& s = c.packed;
        const uint8_t* page = packed_page(c, begin >> page_bits);
        const size_t within = size_t(begin & (s.tokens - 1)) / kBlockTokens, key_block = s.key_block(), value_block = s.value_block();
        const uint8_t *keys = page + within * key_block, *values = page + s.values() + within * value_block;
        for (int b = 0; b < kBlocks; ++b) {
            at.slots[b] = begin + b * kBlockTokens;
            at.pages[b] = page;
            at.keys[b] = keys + size_t(b) * key_block;
            at.values[b] = values + size_t(b) * value_block;
        }
        at.count = kBlocks;
        at.tokens = kPartition;
    }
    void fill(Part& at, int place) const {
        at.count = at.tokens = 0;
        at.place = place;
        const int n = first_partition + place / states;
        at.packed = states > 1 && place % states == 0;
        at.sinks = n < partitions.sinks;
        const int32_t begin = (at.sinks ? n : partitions.begin + n - partitions.sinks) * kPartition;
        if (!at.sinks && begin >= c.keep && begin + kPartition <= packed_first) {  // most parts of a long cache
            if (!at.packed) return;
            if (begin >= start && kPartition <= c.packed.tokens) return add_page(at, begin);
        }
        for (int32_t base = begin; base < begin + kPartition; base += kBlockTokens) {
            if (at.sinks) {
                if (!at.packed && base < a.sinks && base <= last) add_full(at, base);
            } else if (at.packed) {
                if (sees_packed(base)) add_packed(at, base);
            } else if (sees_full(base)) {
                add_full(at, base);
            }
        }
    }
    // the next part from `place` on that has blocks; none: count is 0
    Part from(int place) const {
        Part at;
        for (; place < places(); ++place) {
            fill(at, place);
            if (at.count) break;
        }
        return at;
    }
    const PageShape& shape(const Part& at) const { return at.packed ? c.packed : c.full; }
};

}  // namespace KVIK_NS
