#include "runtime/pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace bitwright {
namespace {

// Tells the processor that a loop only waits.
inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How often one looks whether there is something new, some tens of microseconds, before a worker sleeps, or others get the processor.
constexpr int LOOKS = 1000;

std::atomic<int> forwards{0};  // `Awake`s that live

// The caller takes pieces like everybody else and is done when all pieces are, so a worker that never wakes (as after a
// fork, where there are none) costs time and nothing more.
struct Job {
    Job(const std::function<void(ptrdiff_t, ptrdiff_t)> &task, ptrdiff_t n, ptrdiff_t grain)
        : task(task), n(n), grain(grain), pieces((n + grain - 1) / grain) {}

    const std::function<void(ptrdiff_t, ptrdiff_t)> &task;
    ptrdiff_t n, grain, pieces;
    std::atomic<ptrdiff_t> next{0}, done{0};

    void work() {
        for (ptrdiff_t i; (i = next.fetch_add(1)) < pieces; done.fetch_add(1, std::memory_order_release)) {
            ptrdiff_t first = i * grain;
            task(first, first + grain < n ? first + grain : n);
        }
    }
};

class Pool {
  public:
    void run(const std::shared_ptr<Job> &job, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while ((int)workers_.size() < helpers) workers_.emplace_back([this, id = (int)workers_.size()] { serve(id); });
            job_ = job;
            helpers_ = helpers;
            generation_++;
        }
        wake_.notify_all();
        job->work();
        for (int looks = 0; job->done.load(std::memory_order_acquire) < job->pieces; looks++)
            looks < LOOKS ? breathe() : std::this_thread::yield();
    }

  private:
    void look_for(unsigned long seen) const {
        auto nothing_new = [&] { return generation_.load(std::memory_order_acquire) == seen; };
        for (int looks = 0; looks < LOOKS && nothing_new(); looks++) breathe();
        while (nothing_new() && forwards.load(std::memory_order_relaxed)) std::this_thread::yield();
    }

    void serve(int id) {
        for (unsigned long seen = 0;;) {
            look_for(seen);
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            std::shared_ptr<Job> job = id < helpers_ ? job_ : nullptr;
            lock.unlock();
            if (job) job->work();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::shared_ptr<Job> job_;
    std::atomic<unsigned long> generation_{0};
    int helpers_ = 0;
};

}  // namespace

Awake::Awake() { forwards++; }
Awake::~Awake() { forwards--; }

std::vector<float> &scratch(size_t size) {
    static thread_local std::vector<float> room;
    if (room.size() < size) room.resize(size);
    return room;
}

void share_out(ptrdiff_t n, ptrdiff_t grain, int threads, const std::function<void(ptrdiff_t, ptrdiff_t)> &task) {
    static Pool *pool = new Pool;  // never destroyed: its threads wait until the process ends
    static std::mutex busy;
    if (n <= 0) return;
    ptrdiff_t pieces = (n + grain - 1) / grain;
    std::unique_lock<std::mutex> alone(busy, std::try_to_lock);
    if (threads < 2 || pieces < 2 || !alone) {  // one call at a time has the pool
        task(0, n);
        return;
    }
    auto job = std::make_shared<Job>(task, n, grain);
    pool->run(job, (int)(threads - 1 < pieces - 1 ? threads - 1 : pieces - 1));
}

}  // namespace bitwright
