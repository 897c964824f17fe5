// Keys and values as pages hold them (kernels.h): writing rows, packing groups, reading one slot back.

namespace KVIK_NS {
using namespace kvik;

constexpr float kMostF16 = 65504.0f;

// 16 numbers of a full format from number i on.
template <KV Type>
static inline F load_kv(const uint8_t* p, size_t i) {
    if constexpr (Type == KV::f32) return load(reinterpret_cast<const float*>(p) + i);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(p) + i;
    return Type == KV::f16 ? load_f16(halves) : load_bf16(halves);
}
static inline F load_full(KV type, const uint8_t* p, size_t i) {
    if (type == KV::f32) return load_kv<KV::f32>(p, i);
    return type == KV::f16 ? load_kv<KV::f16>(p, i) : load_kv<KV::bf16>(p, i);
}

// Rounded to a 16-bit format.
static inline void to_halves(KV type, F x, uint16_t* out) {
    if (type == KV::f16) return store_f16(out, x);
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) out[i] = float_to_bf16(lanes[i]);
}

// A token's key into place `at` of a full block of 16, and its value.
static void put_key(const PageShape& s, uint8_t* block, int at, const float* k) {
    if (s.k == KV::f32) {
        float* keys = reinterpret_cast<float*>(block);
        for (int i = 0; i < s.head_size; ++i) keys[i * kBlockTokens + at] = k[i];
        return;
    }
    uint16_t* keys = reinterpret_cast<uint16_t*>(block);
    uint16_t h[kLanes];
    for (int i = 0; i < s.head_size; i += kLanes) {
        to_halves(s.k, load(k + i), h);
        for (int j = 0; j < kLanes; ++j) keys[(i + j) * kBlockTokens + at] = h[j];
    }
}
static void put_value(const PageShape& s, uint8_t* block, int at, const float* v) {
    if (s.v == KV::f32) {
        std::memcpy(reinterpret_cast<float*>(block) + at * s.head_size, v, size_t(s.head_size) * 4);
        return;
    }
    for (int i = 0; i < s.head_size; i += kLanes) to_halves(s.v, load(v + i), reinterpret_cast<uint16_t*>(block) + at * s.head_size + i);
}

static inline uint8_t* full_block(const Cache& c, int32_t slot) {
    return c.base + size_t(c.blocks[slot / kBlockTokens]) * kAddressBytes + c.at;
}
static inline uint8_t* packed_page(const Cache& c, int32_t group) {
    return c.base + size_t(c.packed_blocks[group]) * kAddressBytes + c.packed_at;
}

static void append(const Cache& c, int32_t slot, const float* k, const float* v) {
    uint8_t* block = full_block(c, slot);
    put_key(c.full, block, slot % kBlockTokens, k);
    put_value(c.full, block + c.full.values(), slot % kBlockTokens, v);
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// As f16, within its range (what is not a number as the greatest), and back.
static inline F as_f16(F x, uint16_t* out) {
    store_f16(out, max(min(x, set1(kMostF16)), set1(-kMostF16)));
    return load_f16(out);
}
// x / scale to the nearest integer; 0 where the scale is 0.
static inline F steps_of(F x, F scale) { return where_less(zero(), abs(scale), round_even(div(x, scale)), zero()); }
static inline F within(F x, float least, float most) { return max(min(x, set1(most)), set1(least)); }

// Keys [tokens][D] of a page: integers of 16 channels at a time, which have a scale (and minimum) each.
template <KV Type>
static void pack_keys(const PageShape& s, uint8_t* share, const float* k) {
    const int d = s.head_size;
    uint16_t* scales = reinterpret_cast<uint16_t*>(share + s.key_scales());
    uint16_t* minimums = reinterpret_cast<uint16_t*>(share + s.key_minimums());
    for (int i = 0; i < d; i += kLanes) {
        F top = zero(), low = load(k + i), high = low;
        for (int t = 0; t < s.tokens; ++t) {
            const F x = load(k + t * d + i);
            top = max(abs(x), top);
            low = min(x, low);
            high = max(x, high);
        }
        F scale, minimum = zero();
        if constexpr (Type == KV::int8) {
            scale = as_f16(div(top, set1(127.0f)), scales + i);
        } else {
            minimum = as_f16(low, minimums + i);
            scale = as_f16(div(sub(high, minimum), set1(15.0f)), scales + i);
        }
        for (int t = 0; t < s.tokens; ++t) {
            uint8_t* to = share + size_t(t / kBlockTokens) * s.key_block() + t % kBlockTokens * 4;
            const F x = load(k + t * d + i);
            uint8_t q[kLanes];
            if constexpr (Type == KV::int8) {
                store_i8(reinterpret_cast<int8_t*>(q), within(steps_of(x, scale), -127.0f, 127.0f));
                for (int j = 0; j < kLanes; ++j) to[(i + j) / 4 * 64 + j % 4] = uint8_t(q[j] ^ 0x80);
            } else {
                store_i8(reinterpret_cast<int8_t*>(q), within(steps_of(sub(x, minimum), scale), 0.0f, 15.0f));
                for (int j = 0; j < 8; ++j) {
                    const int from = j / 4 * 8 + j % 4;
                    to[(i / 8 + j / 4) * 64 + j % 4] = uint8_t(q[from] | q[from + 4] << 4);
                }
            }
        }
    }
}

// Values [tokens][D]: integers of a token have one scale (and zero).
template <KV Type>
static void pack_values(const PageShape& s, uint8_t* share, const float* v) {
    const int d = s.head_size;
    uint16_t* scales = reinterpret_cast<uint16_t*>(share + s.value_scales());
    uint8_t* zeros = share + s.value_zeros();
    for (int t = 0; t < s.tokens; ++t, v += d) {
        F top = zero(), low = zero(), high = zero();
        for (int i = 0; i < d; i += kLanes) {
            const F x = load(v + i);
            top = max(abs(x), top);
            low = min(x, low);
            high = max(x, high);
        }
        const F least = sub(zero(), set1(reduce_max(sub(zero(), low)))), most = set1(reduce_max(high));
        uint16_t half[kLanes];
        const F scale = as_f16(Type == KV::int8 ? div(set1(reduce_max(top)), set1(127.0f)) : div(sub(most, least), set1(15.0f)), half);
        scales[t] = half[0];
        const F offset = Type == KV::int8 ? zero() : within(steps_of(sub(zero(), least), scale), 0.0f, 15.0f);
        if constexpr (Type == KV::int4) zeros[t] = uint8_t(reduce_max(offset));
        uint8_t* block = share + s.values() + size_t(t / kBlockTokens) * s.value_block();
        const int token = t % kBlockTokens;
        for (int i = 0; i < d; i += kLanes) {
            const F q = add(steps_of(load(v + i), scale), offset);
            uint8_t b[kLanes];
            store_i8(reinterpret_cast<int8_t*>(b), Type == KV::int8 ? within(q, -127.0f, 127.0f) : within(q, 0.0f, 15.0f));
            if constexpr (Type == KV::int8) {
                for (int j = 0; j < kLanes; ++j) block[token / 4 * d * 4 + (i + j) * 4 + token % 4] = b[j];
            } else {
                uint8_t* to = block + (token / 8 * (d / kLanes) + i / kLanes) * 64 + token % 4;
                for (int j = 0; j < kLanes; ++j) to[4 * j] = token & 4 ? uint8_t(to[4 * j] | b[j] << 4) : b[j];
            }
        }
    }
}

static void pack_page_keys(const PageShape& s, uint8_t* share, const float* k) {
    if (s.k == KV::int8) return pack_keys<KV::int8>(s, share, k);
    if (s.k == KV::int4) return pack_keys<KV::int4>(s, share, k);
    for (int t = 0; t < s.tokens; ++t)
        put_key(s, share + size_t(t / kBlockTokens) * s.key_block(), t % kBlockTokens, k + t * s.head_size);
}
static void pack_page_values(const PageShape& s, uint8_t* share, const float* v) {
    if (s.v == KV::int8) return pack_values<KV::int8>(s, share, v);
    if (s.v == KV::int4) return pack_values<KV::int4>(s, share, v);
    for (int t = 0; t < s.tokens; ++t)
        put_value(s, share + s.values() + size_t(t / kBlockTokens) * s.value_block(), t % kBlockTokens, v + t * s.head_size);
}
static void pack_rest(const PageShape& s, uint8_t* share) {
    const size_t end = s.value_zeros() + (s.v == KV::int4 ? size_t(s.tokens) : 0);
    std::memset(share + end, 0, s.share_bytes() - end);
}

static void pack_page(const PageShape& s, uint8_t* share, const float* k, const float* v) {
    pack_page_keys(s, share, k);
    pack_page_values(s, share, v);
    pack_rest(s, share);
}

static void pack_group(const Cache& c, int32_t group) {
    alignas(64) float x[kMaxGroupTokens * kMaxHeadSize];
    const PageShape &full = c.full, &page = c.packed;
    const int d = full.head_size, first = group * page.tokens;
    uint8_t* share = packed_page(c, group);
    for (int t = 0; t < page.tokens; t += kBlockTokens)
        for (int i = 0; i < d; ++i) {
            float channel[kLanes];
            store(channel, load_full(full.k, full_block(c, first + t), size_t(i) * kBlockTokens));
            for (int j = 0; j < kBlockTokens; ++j) x[(t + j) * d + i] = channel[j];
        }
    pack_page_keys(page, share, x);
    for (int t = 0; t < page.tokens; t += kBlockTokens)
        for (int i = 0; i < d * kBlockTokens; i += kLanes)
            store(x + t * d + i, load_full(full.v, full_block(c, first + t) + full.values(), size_t(i)));
    pack_page_values(page, share, x);
    pack_rest(page, share);
}

// ---- reading ---------------------------------------------------------------------------------------------------------

static float full_at(KV type, const uint8_t* p, size_t i) {
    if (type == KV::f32) return reinterpret_cast<const float*>(p)[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(p)[i];
    return type == KV::f16 ? half_to_float(half) : bf16_to_float(half);
}

// The key of token `at` of a block of 16 [D][16] or [D / c][16][c]; scales of the page, or null.
static void read_key(const PageShape& s, const uint8_t* share, int token, float* k) {
    const uint8_t* block = share + size_t(token / kBlockTokens) * s.key_block();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(share + s.key_scales());
    const uint16_t* minimums = reinterpret_cast<const uint16_t*>(share + s.key_minimums());
    const int at = token % kBlockTokens;
    for (int i = 0; i < s.head_size; ++i) {
        if (s.k == KV::int8) {
            k[i] = half_to_float(scales[i]) * float(int(block[i / 4 * 64 + 4 * at + i % 4]) - 128);
        } else if (s.k == KV::int4) {
            const uint8_t both = block[i / 8 * 64 + 4 * at + i % 4];
            k[i] = half_to_float(scales[i]) * float(i & 4 ? both >> 4 : both & 15) + half_to_float(minimums[i]);
        } else {
            k[i] = full_at(s.k, block, size_t(i * kBlockTokens + at));
        }
    }
}
static void read_value(const PageShape& s, const uint8_t* share, int token, float* v) {
    const uint8_t* block = share + s.values() + size_t(token / kBlockTokens) * s.value_block();
    const int at = token % kBlockTokens, d = s.head_size;
    const float scale = is_packed(s.v) ? half_to_float(reinterpret_cast<const uint16_t*>(share + s.value_scales())[token]) : 0.0f;
    const int offset = s.v == KV::int4 ? share[s.value_zeros() + size_t(token)] : 0;
    for (int i = 0; i < d; ++i) {
        if (s.v == KV::int8) {
            v[i] = scale * float(int8_t(block[at / 4 * d * 4 + i * 4 + at % 4]));
        } else if (s.v == KV::int4) {
            const uint8_t both = block[(at / 8 * (d / kLanes) + i / kLanes) * 64 + i % kLanes * 4 + at % 4];
            v[i] = scale * float((at & 4 ? both >> 4 : both & 15) - offset);
        } else {
            v[i] = full_at(s.v, block, size_t(at * d + i));
        }
    }
}

static void read_slot(const Cache& c, int32_t slot, int32_t reader, float* k, float* v) {
    const bool packed = c.packed_blocks && slot >= c.keep && slot < c.packed_end(reader);
    const PageShape& s = packed ? c.packed : c.full;
    const uint8_t* share = packed ? packed_page(c, slot / s.tokens) : full_block(c, slot);
    const int token = packed ? slot % s.tokens : slot % kBlockTokens;
    if (k) read_key(s, share, token, k);
    if (v) read_value(s, share, token, v);
}

}  // namespace KVIK_NS
