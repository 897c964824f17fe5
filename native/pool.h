// Threads that work through a list of phases of tiles. A phase begins when every tile of the one before is *done*, not when
// every thread has arrived: a thread that the operating system took off its core between two tiles holds up nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace kvik {

class Pool {
  public:
    using Run = void (*)(void* context, uint32_t phase, uint32_t tile, uint32_t thread);
    // called by one thread when a phase is done, before the next begins
    using Done = void (*)(void* context, uint32_t phase);

    explicit Pool(uint32_t threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    uint32_t threads() const { return threads_; }
    // First tile of a thread's share of a phase.
    static uint32_t share_begin(uint32_t tiles, uint32_t thread, uint32_t threads) {
        return uint32_t(uint64_t(tiles) * thread / threads);
    }
    // Runs the phases in order, tiles[p] tiles each (at least one); returns when the last is done.
    // One caller at a time: a second one gets std::logic_error. `context` must stand still until then.
    void run(const std::vector<uint32_t>& tiles, Run run, Done done, void* context);

  private:
    // Tiles left of a thread's share of the phase; claiming takes one off. Packed with the phase's number, so that a claim
    // that comes late can never take a tile of another phase.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };
    void worker(uint32_t thread);
    void stop();
    bool claim_and_run(uint32_t thread);
    void begin(uint32_t phase);

    const uint32_t threads_;
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<uint32_t> epoch_{0};  // changes whenever there may be something new to claim
    alignas(64) std::atomic<uint32_t> sleepers_{0};
    alignas(64) std::atomic<uint64_t> left_in_phase_{0};
    std::atomic<bool> busy_{false};
    std::atomic<bool> stop_{false};
    uint32_t first_phase_ = 0;  // number of this run's phase 0; numbers go on from run to run
    const uint32_t* tiles_ = nullptr;
    uint32_t phases_ = 0;
    Run run_ = nullptr;
    Done done_ = nullptr;
    void* context_ = nullptr;
    std::vector<std::thread> workers_;
    std::atomic_flag running_ = ATOMIC_FLAG_INIT;
};

}  // namespace kvik
