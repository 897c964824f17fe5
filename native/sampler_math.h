// What decides which token is kept or drawn, operation for operation as src/kvik/decoding/{elementary,noise}.py define it:
// IEEE additions, multiplications and divisions in one order, never contracted (-ffp-contract=off), and integers.
// Some files are compiled for one instruction set only: `static` keeps a copy for each, and nothing of std:: is instantiated here.
#pragma once

#include <cstdint>

namespace kvik {

constexpr double kLn2High = 0x1.62e42feep-1;  // 32 bits: exact times an exponent
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr int kWeightBits = 42;

static consteval double inverse_factorial(int k) {
    double f = 1.0;
    for (int i = 2; i <= k; ++i) f *= double(i);
    return 1.0 / f;
}

// e^x for -700 <= x <= 0. No branch, so that loops over it vectorise.
static inline double exact_exp(double x) {
    constexpr double kRound = 0x1.8p52;  // adding it rounds to a whole number, nearest even, held in the low bits
    const double shifted = x * kLog2E + kRound;
    const double n = shifted - kRound;
    const double r = (x - n * kLn2High) - n * kLn2Low;
    double p = inverse_factorial(11);
    p = p * r + inverse_factorial(10);
    p = p * r + inverse_factorial(9);
    p = p * r + inverse_factorial(8);
    p = p * r + inverse_factorial(7);
    p = p * r + inverse_factorial(6);
    p = p * r + inverse_factorial(5);
    p = p * r + inverse_factorial(4);
    p = p * r + inverse_factorial(3);
    p = p * r + inverse_factorial(2);
    p = p * r + 1.0;
    p = p * r + 1.0;
    const uint64_t exponent = (__builtin_bit_cast(uint64_t, shifted) - __builtin_bit_cast(uint64_t, kRound)) << 52;
    return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, p) + exponent);
}

// A probability relative to the best token's, e^d for d <= 0, as a whole number of 2^-42. e^-40 rounds to 0, as everything
// below does.
static inline double bounded(double d) { return d > -40.0 ? d : -40.0; }
static inline uint64_t bounded_weight(double d) {
    const double raised = exact_exp(d) * double(uint64_t(1) << kWeightBits) + 0x1p52;
    return __builtin_bit_cast(uint64_t, raised) - __builtin_bit_cast(uint64_t, 0x1p52);
}
// d e^d as a whole number of 2^-42, rounded to nearest even, for -40 <= d <= 0: adding 1.5 * 2^52 leaves it in the low bits.
static inline int64_t bounded_moment(double d) {
    const double raised = exact_exp(d) * d * double(uint64_t(1) << kWeightBits) + 0x1.8p52;
    return __builtin_bit_cast(int64_t, raised) - __builtin_bit_cast(int64_t, 0x1.8p52);
}
static inline uint64_t exact_weight(double d) { return bounded_weight(bounded(d)); }

// ln x for finite x > 0.
static inline double exact_log(double x) {
    int exponent;
    double m = __builtin_frexp(x, &exponent);
    if (m < 0x1.6a09e667f3bcdp-1) {
        m *= 2.0;
        --exponent;
    }
    const double e = double(exponent);
    const double s = (m - 1.0) / (m + 1.0);
    const double z = s * s;
    double p = 1.0 / 21.0;
    for (int k = 9; k > 0; --k) p = p * z + 1.0 / double(2 * k + 1);
    const double twice = s + s;
    return e * kLn2High + (twice + (twice * (z * p) + e * kLn2Low));
}

// Philox4x32-10 (Salmon et al. 2011).
constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u, kPhiloxKeyA = 0x9E3779B9u, kPhiloxKeyB = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct NoiseKey {
    uint64_t seed;
    uint32_t sample, position;
};

struct NoiseWords {
    uint32_t w[4];
};

static inline NoiseWords noise_words(const NoiseKey& key, uint32_t block, uint32_t stream) {
    uint32_t c0 = block, c1 = key.position, c2 = key.sample, c3 = stream;
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t a = uint64_t(kPhiloxA) * c0, b = uint64_t(kPhiloxB) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += kPhiloxKeyA;
        k1 += kPhiloxKeyB;
    }
    return {{c0, c1, c2, c3}};
}

static inline uint32_t noise_word(const NoiseKey& key, uint32_t token, uint32_t stream) {
    return noise_words(key, (token >> 6) * 16u + (token & 15u), stream).w[(token >> 4) & 3u];
}

static inline double uniform(uint64_t h) {
    const double v = (double(h) + 0.5) * 0x1p-64;
    return v > 1.0 - 0x1p-53 ? 1.0 - 0x1p-53 : v;
}

// Words 0 and 1 of block 0 of stream 2.
static inline double coin(const NoiseKey& key) {
    return uniform(uint64_t(noise_word(key, 0, 2)) << 32 | noise_word(key, 16, 2));
}

static inline double gumbel(const NoiseKey& key, uint32_t token) {
    const double v = uniform(uint64_t(noise_word(key, token, 0)) << 32 | noise_word(key, token, 1));
    const double rest = 1.0 - v;
    const double exponential = rest == 1.0 ? v : exact_log(rest) * (v / (rest - 1.0));
    return -exact_log(exponential);
}

}  // namespace kvik
