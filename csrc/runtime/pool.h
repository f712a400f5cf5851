// A pool of threads that share out rows.
#pragma once
#include <cstddef>
#include <functional>
#include <vector>

namespace bitwright {

// Call task(first, last) for pieces of `grain` of the range [0, n), on up to `threads` threads, this one among them.
void share_out(ptrdiff_t n, ptrdiff_t grain, int threads, const std::function<void(ptrdiff_t, ptrdiff_t)> &task);

// Room for `size` numbers that this thread may write to until it asks again.
std::vector<float> &scratch(size_t size);

// While one lives, workers do not sleep between jobs. What one thread does alone within a forward takes up to some tenths of a
// millisecond, and to wake a worker, on a virtual machine, a good part of that.
struct Awake {
    Awake();
    ~Awake();
    Awake(const Awake &) = delete;
};

}  // namespace bitwright
