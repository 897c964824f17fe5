// What the files that know Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>

#include "kernels.h"
#include "pool.h"

// "" and "auto": KVIK_ISA where it is set, else the best this processor has. std::invalid_argument for one that is not here.
const kvik::Kernels& kernels_named(std::string name);

void bind_program(nanobind::module_&);
void bind_cache(nanobind::module_&);
void bind_sampler(nanobind::module_&);
void bind_scoring(nanobind::module_&);

// Rows one by one, or spread over the pool's threads.
template <class Work>
void each_row(kvik::Pool* pool, size_t rows, Work& work) {
    if (!pool || pool->threads() == 1 || rows <= 1) {
        for (size_t r = 0; r < rows; ++r) work(r);
        return;
    }
    struct Job {
        Work& work;
        std::mutex mutex;
        std::exception_ptr failed;
    } job{work, {}, nullptr};
    pool->run({uint32_t(rows)},
              [](void* context, uint32_t, uint32_t tile, uint32_t) {
                  Job& j = *static_cast<Job*>(context);
                  try {
                      j.work(tile);
                  } catch (...) {  // no exception leaves a thread of the pool
                      const std::lock_guard lock(j.mutex);
                      j.failed = std::current_exception();
                  }
              },
              [](void*, uint32_t) {}, &job);
    if (job.failed) std::rethrow_exception(job.failed);
}
