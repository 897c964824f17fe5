// What the kernels read of a packed integer matrix: where a group's quants lie and what they are scaled by.

namespace KVIK_NS {
using namespace kvik;

template <Layout L>
static inline const uint8_t* quants_at(const uint8_t* w, int g) {
    return w + size_t(g / unit_groups(L)) * unit_bytes(L) + size_t(g % unit_groups(L)) * quant_bytes(L);
}
// What a group's sums are multiplied by, and added for 16 outputs; int6_k has two scales, one for each 16 inputs.
struct Scales {
    F scale, second, minimum;
};
template <Layout L>
static inline Scales scales_at(const uint8_t* w, int g) {
    if constexpr (is_k(L)) {
        const uint8_t* steps = w + size_t(g / 8) * unit_bytes(L) + 8 * quant_bytes(L);
        const uint16_t* d = reinterpret_cast<const uint16_t*>(steps + 8 * step_bytes(L));
        const F scale = load_f16(d);
        const uint8_t* own = steps + step_bytes(L) * size_t(g % 8);
        if constexpr (L == Layout::int6_k) {
            const int8_t* halves = reinterpret_cast<const int8_t*>(own);
            return {mul(scale, load_i8(halves)), mul(scale, load_i8(halves + 16)), zero()};
        } else {
            const Steps s = load_steps(own);
            return {mul(scale, s.scale), zero(), mul(sub(zero(), load_f16(d + 16)), s.minimum)};
        }
    } else {
        const uint16_t* f16 = reinterpret_cast<const uint16_t*>(quants_at<L>(w, g) + quant_bytes(L));
        return {load_f16(f16), zero(), has_minimum(L) ? load_f16(f16 + 16) : zero()};
    }
}

}  // namespace KVIK_NS
