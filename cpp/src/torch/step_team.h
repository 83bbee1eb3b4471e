// Threads that go through a sequence of steps together, each step after all of the one before: one parallel section for
// all steps, and a counter between them that costs a fraction of a microsecond.
//
// A step is cut into chunks. A chunk belongs to the same thread at every step, which then finds its weights in its own
// cache. Nobody waits for a thread that has not come: after some polls its chunk is taken over. So it does not matter
// how many of the chunks the thread pool runs at a time, or in which order.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "tensor_checks.h"

namespace halfbyte::ops {

class StepTeam {
 public:
  StepTeam(int64_t steps, int64_t chunks)
      : steps_(steps), chunks_(chunks), next_step_(static_cast<size_t>(chunks)), finished_(0) {}

  // prepare(step, member) before a member's first chunk of a step, work(step, chunk, member) for every chunk of every
  // step. `member` is in [0, chunks); no two threads have the same one.
  template <class Prepare, class Work>
  void run(const Prepare& prepare, const Work& work) {
    parallel_for(chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t step = 0; step < steps_; ++step) {
        bool prepared = false;
        const auto take = [&](int64_t chunk) {
          if (!claim(chunk, step)) return;
          if (!prepared) prepare(step, begin);
          prepared = true;
          work(step, chunk, begin);
          finished_.fetch_add(1, std::memory_order_release);
        };
        for (int64_t chunk = begin; chunk < end; ++chunk) take(chunk);
        for (int polls = 0; finished_.load(std::memory_order_acquire) < (step + 1) * chunks_; ++polls) {
          if (polls < kPatience) {
            relax();
            continue;
          }
          for (int64_t chunk = 0; chunk < chunks_; ++chunk) take(chunk);
          std::this_thread::yield();
        }
      }
    });
  }

 private:
  static constexpr int kPatience = 4000;  // about a tenth of a millisecond

  struct alignas(64) NextStep {
    std::atomic<int64_t> value{0};
  };

  bool claim(int64_t chunk, int64_t step) {
    int64_t expected = step;
    return next_step_[static_cast<size_t>(chunk)].value.compare_exchange_strong(expected, step + 1);
  }

  static void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  int64_t steps_, chunks_;
  std::vector<NextStep> next_step_;
  alignas(64) std::atomic<int64_t> finished_;
};

}  // namespace halfbyte::ops
