#include "pool.h"

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define KVIK_PAUSE() _mm_pause()
#else
#define KVIK_PAUSE() std::this_thread::yield()
#endif

namespace kvik {

namespace {
// Long enough to bridge the gap between two phases, short enough to cost little beside a foreign process.
constexpr int kSpins = 1500;
}  // namespace

Pool::Pool(uint32_t threads) : threads_(threads ? threads : 1), shares_(new Share[threads_]) {
    try {
        for (uint32_t t = 1; t < threads_; ++t) workers_.emplace_back([this, t] { worker(t); });
    } catch (const std::system_error& error) {
        stop();
        throw std::runtime_error("cannot start thread " + std::to_string(workers_.size() + 2) + " of " +
                                 std::to_string(threads_) + ": " + error.what());
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& w : workers_) w.join();
}

// Publish the phase's tiles. Shares that are empty come first: the phase cannot be finished, and so no later phase
// published, before the last share that is not empty has been written.
void Pool::begin(uint32_t phase) {
    const uint32_t tiles = tiles_[phase];
    const uint64_t tag = uint64_t(first_phase_ + phase) << 32;
    left_in_phase_.store(tiles, std::memory_order_relaxed);
    for (int filled = 0; filled < 2; ++filled)
        for (uint32_t t = 0; t < threads_; ++t) {
            const uint32_t n = share_begin(tiles, t + 1, threads_) - share_begin(tiles, t, threads_);
            if ((n != 0) == (filled != 0)) shares_[t].left.store(tag | n, std::memory_order_release);
        }
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) epoch_.notify_all();
}

// Own share first, so that each thread reads its own stretch of the weights; then the others'.
bool Pool::claim_and_run(uint32_t thread) {
    for (uint32_t i = 0; i < threads_; ++i) {
        const uint32_t owner = thread + i < threads_ ? thread + i : thread + i - threads_;
        std::atomic<uint64_t>& share = shares_[owner].left;
        uint64_t left = share.load(std::memory_order_acquire);
        while (uint32_t(left) != 0) {
            if (!share.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            // The tile is ours, so its run cannot end before we are done: its data stand still.
            const uint32_t phase = uint32_t(left >> 32) - first_phase_;
            const uint32_t tile = share_begin(tiles_[phase], owner + 1, threads_) - uint32_t(left);
            run_(context_, phase, tile, thread);
            if (left_in_phase_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                done_(context_, phase);
                if (phase + 1 < phases_) {
                    begin(phase + 1);
                } else {
                    busy_.store(false, std::memory_order_release);
                    epoch_.fetch_add(1, std::memory_order_seq_cst);
                    if (sleepers_.load(std::memory_order_seq_cst)) epoch_.notify_all();
                }
            }
            return true;
        }
    }
    return false;
}

void Pool::worker(uint32_t thread) {
    while (!stop_.load(std::memory_order_relaxed)) {
        const uint32_t seen = epoch_.load(std::memory_order_seq_cst);
        if (claim_and_run(thread)) continue;
        int spins = 0;
        while (epoch_.load(std::memory_order_acquire) == seen && spins < kSpins) {
            KVIK_PAUSE();
            ++spins;
        }
        if (epoch_.load(std::memory_order_acquire) != seen) continue;
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        if (!stop_.load()) epoch_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
}

void Pool::run(const std::vector<uint32_t>& tiles, Run run, Done done, void* context) {
    if (tiles.empty()) return;
    if (running_.test_and_set(std::memory_order_acquire)) throw std::logic_error("the thread pool is already running");
    first_phase_ += phases_;
    tiles_ = tiles.data();
    phases_ = uint32_t(tiles.size());
    run_ = run;
    done_ = done;
    context_ = context;
    busy_.store(true, std::memory_order_relaxed);
    begin(0);
    while (busy_.load(std::memory_order_acquire)) {
        const uint32_t seen = epoch_.load(std::memory_order_seq_cst);
        if (claim_and_run(0)) continue;
        int spins = 0;
        while (epoch_.load(std::memory_order_acquire) == seen && busy_.load(std::memory_order_relaxed) && spins < kSpins) {
            KVIK_PAUSE();
            ++spins;
        }
        if (epoch_.load(std::memory_order_acquire) != seen || !busy_.load(std::memory_order_acquire)) continue;
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    running_.clear(std::memory_order_release);
}

}  // namespace kvik
