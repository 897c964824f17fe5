// Layouts, and what happens to a sequence's cache between passes: eviction, reading, saving.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "program.h"
#include "require.h"

namespace kvik {

namespace {

constexpr int32_t kReadSlots = 256;  // of one tile of `read`

bool known(KV t) { return t >= KV::f32 && int32_t(t) < kKVFormats; }

void check_pages(const CacheLayout& l) {
    require(l.full.tokens == kBlockTokens, "a full block has 16 tokens");
    require(known(l.full.k) && known(l.full.v) && !is_packed(l.full.k) && !is_packed(l.full.v), "a full block's formats are f32, f16 and bf16");
    if (!l.packs) return;
    const int32_t tokens = l.packed.tokens;
    require(tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128, "a packed page has 16, 32, 64 or 128 tokens");
    require(known(l.packed.k) && known(l.packed.v), "unknown KV format");
    require(is_packed(l.packed.k) || is_packed(l.packed.v), "a packed page has a packed format");
    require(is_packed(l.packed.k) || l.packed.k == l.full.k, "keys that are not packed have one format");
    require(is_packed(l.packed.v) || l.packed.v == l.full.v, "values that are not packed have one format");
}

}  // namespace

int32_t Program::add_layout(CacheLayout l) {
    require(!nodes_.empty(), "layouts come after the recording");
    l.full.head_size = l.packed.head_size = head_size_;
    check_pages(l);
    require(l.keep >= 0 && l.keep % kBlockTokens == 0 && l.keep <= 1 << 24, "the slots that stay full are a multiple of 16");
    require(l.sinks >= 0 && l.window >= 0 && l.sinks <= 1 << 24 && l.window <= 1 << 28, "sinks or window out of range");
    require(l.sinks == 0 || l.window > 0, "sinks need a window");
    require(!l.packs || l.sinks <= l.keep, "sinks must stay full");
    const size_t units = size_t(layers_) * size_t(kv_heads_);
    require(l.group_of.size() == units, "a layout has a group for each layer and KV head");
    l.at.resize(units);
    l.packed_at.resize(units);
    std::vector<std::pair<int32_t, int32_t>> by_window;  // a layer's own window, a group of such a layer
    for (size_t u = 0; u < units; ++u) {
        const int32_t g = l.group_of[u], own = windows_[u / size_t(kv_heads_)];
        require(g >= 0 && size_t(g) < units, "group of a layer and head out of range");
        if (size_t(g) >= l.groups.size()) l.groups.resize(size_t(g) + 1);
        CacheLayout::Group& group = l.groups[size_t(g)];
        l.at[u] = group.block_bytes;
        l.packed_at[u] = group.packed_bytes;
        group.block_bytes += l.full.share_bytes();
        if (l.packs) group.packed_bytes += l.packed.share_bytes();
        if (own < 0) continue;
        const int32_t seen = l.seen(own);
        group.window = group.window == 0 || seen == 0 ? 0 : std::max(group.window, seen);
        group.sinks = group.sinks || (own == 0 && l.sinks > 0);
        for (const auto& [window, other] : by_window) l.apart = l.apart || (window == own && other != g);
        if (std::find(by_window.begin(), by_window.end(), std::pair(own, g)) == by_window.end()) by_window.emplace_back(own, g);
    }
    for (const CacheLayout::Group& g : l.groups) require(g.block_bytes > 0, "a group has no layers");
    if (l.sinks && !sink_queries_.data) {
        int32_t widest = 0;
        for (const Node& n : nodes_)
            if (n.kind == Kind::attend) widest = std::max(widest, ld(n.attention.q));
        float* data = static_cast<float*>(std::calloc(size_t(max_rows_) * size_t(widest), sizeof(float)));
        if (!data) throw std::bad_alloc();
        sink_queries_ = {std::unique_ptr<float[], Free>(data), widest, 1};
    }
    layouts_.push_back(std::move(l));
    return int32_t(layouts_.size()) - 1;
}

int32_t Program::num_tables(int32_t layout) const {
    require(layout >= 0 && size_t(layout) < layouts_.size(), "a view's layout was not registered");
    return layouts_[size_t(layout)].num_tables();
}

// ---- views -----------------------------------------------------------------------------------------------------------

// Every block of the view in the pool or missing, and tables that cover its slots.
const CacheLayout& Program::check_view(const View& v) const {
    require(v.layout >= 0 && size_t(v.layout) < layouts_.size(), "a view's layout was not registered");
    const CacheLayout& l = layouts_[size_t(v.layout)];
    require(v.num_tokens >= 0, "a view's tokens must not be negative");
    require(v.tables.spans[0] == 0, "block spans must begin at 0");
    for (int32_t t = 0; t < l.num_tables(); ++t) require(v.tables.spans[t] <= v.tables.spans[t + 1], "spans must ascend");
    int32_t table = 0;
    for (const CacheLayout::Group& g : l.groups) {
        const int32_t shift = v.tables.shifts[table], n = v.num_tokens - shift;
        require(shift >= 0 && n >= 0, "a table's shift must be between 0 and the tokens");
        require(!l.packs || v.tables.shifts[table + 1] == shift, "a table's shift differs from that of its packed pages");
        const int32_t* spans = v.tables.spans + table;
        require(n <= int64_t(spans[1] - spans[0]) * kBlockTokens, "slot outside its sequence's blocks");
        for (int32_t b = spans[0]; b < spans[1]; ++b)
            require(v.tables.blocks[b] == -1 || fits(v.tables.blocks[b], g.block_bytes), "block out of range");
        if (l.packs) {
            require(!l.packs_for(g.window) || l.packed_end(n - 1) <= int64_t(spans[2] - spans[1]) * l.packed.tokens,
                    "slot outside its sequence's packed pages");
            for (int32_t b = spans[1]; b < spans[2]; ++b)
                require(v.tables.blocks[b] == -1 || fits(v.tables.blocks[b], g.packed_bytes), "packed page out of range");
        }
        table += l.tables_each();
    }
    return l;
}

int32_t Program::slots(const View& v, int32_t layer, int32_t head) const {
    const CacheLayout& l = check_view(v);
    require(layer >= 0 && layer < layers_ && head >= 0 && head < kv_heads_, "layer or KV head out of range");
    return v.num_tokens - v.tables.shifts[l.group_of[size_t(layer * kv_heads_ + head)] * l.tables_each()];
}

namespace {

bool reads_packed(const Cache& c, int32_t slot, int32_t reader) { return slot >= c.keep && slot < c.packed_end(reader); }

// Whether what the row at `reader` reads of the slot is there.
bool there(const Cache& c, int32_t slot, int32_t reader) {
    if (reads_packed(c, slot, reader)) return c.packed_blocks[slot / c.packed.tokens] >= 0;
    return c.blocks[slot / kBlockTokens] >= 0;
}

uint8_t* page_of(const Cache& c, int32_t slot) {
    return c.base + size_t(c.packed_blocks[slot / c.packed.tokens]) * kAddressBytes + c.packed_at;
}

// The integers of a slot's value and what they mean, from one table's page to another's of the same format. (Rounded anew
// they need not be the same: the zero of int4 was rounded too.)
void copy_value(const Cache& from, int32_t source, const Cache& to, int32_t target) {
    const PageShape &a = from.packed, &b = to.packed;
    const uint8_t* old = page_of(from, source);
    uint8_t* fresh = page_of(to, target);
    const size_t d = size_t(a.head_size), i = size_t(source % a.tokens), j = size_t(target % b.tokens);
    std::memcpy(fresh + b.value_scales() + 2 * j, old + a.value_scales() + 2 * i, 2);
    if (a.v == KV::int4) fresh[b.value_zeros() + j] = old[a.value_zeros() + i];
    old += a.values() + i / kBlockTokens * a.value_block();
    fresh += b.values() + j / kBlockTokens * b.value_block();
    // tokens of a lane of 32 bits: 4 or 8
    const size_t lane = a.v == KV::int8 ? 4 : 8, row = 4 * d;
    old += i % kBlockTokens / lane * row + i % 4;
    fresh += j % kBlockTokens / lane * row + j % 4;
    const bool high = a.v == KV::int4 && i & 4, to_high = a.v == KV::int4 && j & 4;
    for (size_t channel = 0; channel < d; ++channel, old += 4, fresh += 4) {
        if (a.v == KV::int8)
            *fresh = *old;
        else if (to_high)
            *fresh = uint8_t((*fresh & 0x0F) | (high ? *old & 0xF0 : *old << 4));
        else
            *fresh = uint8_t((*fresh & 0xF0) | (high ? *old >> 4 : *old & 0x0F));
    }
}

}  // namespace

// ---- reading ---------------------------------------------------------------------------------------------------------

// Slots first..end as the row at `reader` reads them, zeros where blocks are missing.
void Program::read_slots(const Cache& c, int32_t first, int32_t end, int32_t reader, bool keys, bool rotated, float* out) const {
    for (int32_t slot = first; slot < end; ++slot, out += head_size_) {
        if (!there(c, slot, reader)) {
            std::memset(out, 0, size_t(head_size_) * sizeof(float));
            continue;
        }
        kernels_.read_slot(c, slot, reader, keys ? out : nullptr, keys ? nullptr : out);
        if (keys && rotated) kernels_.hadamard(out, 1, head_size_);
    }
}

// As the last row read them: what the next row is the first to read packed is packed in its pass.
void Program::read(const View& v, int32_t layer, int32_t head, bool keys, float* out) {
    const int32_t n = slots(v, layer, head);
    if (n == 0) return;
    const CacheLayout& l = layouts_[size_t(v.layout)];
    struct Job {
        const Program& program;
        Cache cache;
        int32_t n;
        bool keys, rotated;
        float* out;
    } job{*this, cache(l, v.tables, layer, head), n, keys, l.rotate, out};
    pool_.run({uint32_t((n + kReadSlots - 1) / kReadSlots)},
              [](void* context, uint32_t, uint32_t tile, uint32_t) {
                  const Job& j = *static_cast<Job*>(context);
                  const int32_t from = int32_t(tile) * kReadSlots, to = std::min(from + kReadSlots, j.n);
                  j.program.read_slots(j.cache, from, to, j.n - 1, j.keys, j.rotated, j.out + size_t(from) * size_t(j.program.head_size_));
              },
              [](void*, uint32_t) {}, &job);
}

// ---- eviction --------------------------------------------------------------------------------------------------------

struct Program::Eviction {
    const View &source, &target;
    const CacheLayout &from, &to;
    const int32_t* kept;  // [units][most]
    int32_t most;
    const int32_t* counts;  // [units]
};

// The kept slots ascend, are in the table and there.
void Program::check_source(const Eviction& e, int32_t unit) const {
    const int32_t layer = unit / kv_heads_, head = unit % kv_heads_, count = e.counts[unit];
    const Cache c = cache(e.from, e.source.tables, layer, head);
    const int32_t* kept = e.kept + size_t(unit) * size_t(e.most);
    const int32_t n = e.source.num_tokens - c.shift;
    for (int32_t i = 0; i < count; ++i) {
        require(kept[i] >= 0 && kept[i] < n, "kept slot outside its table");
        require(i == 0 || kept[i] > kept[i - 1], "kept slots must ascend");
        require(there(c, kept[i], n - 1), "block of a kept slot is missing");
    }
}

// The target has as many slots, and every block that is written.
void Program::check_target(const Eviction& e, int32_t unit) const {
    const int32_t count = e.counts[unit];
    const Cache c = cache(e.to, e.target.tables, unit / kv_heads_, unit % kv_heads_);
    require(count == e.target.num_tokens - c.shift, "kept slots and those of the target's table differ in number");
    const int32_t packed = c.packed_end(count - 1);
    for (int32_t slot = 0; slot < count; slot += kBlockTokens)
        require((slot >= c.keep && slot + kBlockTokens <= packed) || c.blocks[slot / kBlockTokens] >= 0, "block of the target is missing");
    if (!c.packed_blocks) return;
    for (int32_t slot = 0; slot < packed; slot += c.packed.tokens)
        require(slot + c.packed.tokens <= c.keep || c.packed_blocks[slot / c.packed.tokens] >= 0, "packed page of the target is missing");
}

void Program::evict(const View& source, const View& target, const int32_t* kept, int32_t most, const int32_t* counts) {
    const Eviction e{source, target, check_view(source), check_view(target), kept, most, counts};
    require(e.from.rotate == e.to.rotate, "source and target of an eviction rotate alike");
    const int32_t units = layers_ * kv_heads_;
    for (int32_t u = 0; u < units; ++u) {
        require(counts[u] >= -1 && counts[u] <= most, "number of kept slots out of range");
        if (counts[u] < 0) continue;
        check_source(e, u);
        check_target(e, u);
    }
    for (ThreadState& t : threads_) t.page.resize(2 * size_t(kMaxGroupTokens) * size_t(head_size_));
    struct Job {
        Program& program;
        const Eviction& eviction;
    } job{*this, e};
    pool_.run({uint32_t(units)},
              [](void* context, uint32_t, uint32_t unit, uint32_t thread) {
                  const Job& j = *static_cast<Job*>(context);
                  j.program.run_evict(j.eviction, int32_t(unit), j.program.threads_[thread]);
              },
              [](void*, uint32_t) {}, &job);
}

void Program::run_evict(const Eviction& e, int32_t unit, ThreadState& own) const {
    const int32_t count = e.counts[unit], layer = unit / kv_heads_, head = unit % kv_heads_;
    const Cache from = cache(e.from, e.source.tables, layer, head), to = cache(e.to, e.target.tables, layer, head);
    const int32_t* kept = e.kept + size_t(unit) * size_t(e.most);
    const int32_t reader = e.source.num_tokens - from.shift - 1, packed = to.packed_end(count - 1);
    const int32_t each = to.packed_blocks ? to.packed.tokens : kBlockTokens;
    float *k = own.page.data(), *v = k + size_t(each) * size_t(head_size_);
    for (int32_t first = 0; first < count; first += each) {
        const int32_t end = std::min(first + each, count);
        for (int32_t slot = first; slot < end; ++slot) {
            float *own_k = k + size_t(slot - first) * size_t(head_size_), *own_v = v + size_t(slot - first) * size_t(head_size_);
            kernels_.read_slot(from, kept[slot], reader, own_k, own_v);
            if (slot < to.keep || slot >= packed) kernels_.append(to, slot, own_k, own_v);
        }
        if (end > packed || end <= to.keep) continue;
        kernels_.pack_page(to.packed, page_of(to, first), k, v);
        if (!is_packed(to.packed.v) || from.packed.v != to.packed.v) continue;
        for (int32_t slot = first; slot < end; ++slot)
            if (reads_packed(from, kept[slot], reader)) copy_value(from, kept[slot], to, slot);
    }
}

// ---- saving ----------------------------------------------------------------------------------------------------------

void Program::save(const int32_t* blocks, int32_t count, int32_t steps, uint8_t* out) const {
    const size_t bytes = size_t(steps) * kAddressBytes;
    for (int32_t i = 0; i < count; ++i) require(steps > 0 && fits(blocks[i], bytes), "block to save out of range");
    for (int32_t i = 0; i < count; ++i) std::memcpy(out + size_t(i) * bytes, kv_ + size_t(blocks[i]) * kAddressBytes, bytes);
}

void Program::restore(const int32_t* blocks, int32_t count, int32_t steps, const uint8_t* data) {
    const size_t bytes = size_t(steps) * kAddressBytes;
    for (int32_t i = 0; i < count; ++i) require(steps > 0 && fits(blocks[i], bytes), "block to restore out of range");
    for (int32_t i = 0; i < count; ++i) std::memcpy(kv_ + size_t(blocks[i]) * kAddressBytes, data + size_t(i) * bytes, bytes);
}

}  // namespace kvik
