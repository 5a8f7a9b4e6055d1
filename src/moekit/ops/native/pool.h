// What the kernels need of a pool beside native.h: memory that stays between calls, and shared work.
#pragma once

#include <atomic>

#include "native.h"

namespace moekit {

// Memory that only grows, aligned to a cache line.
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer();
    // At least so many bytes; what it held before is lost if it has to grow.
    void* take(size_t bytes);

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// One buffer for each use, since a call may need several at once.
enum class Scratch { INPUT, MIDDLE, MIDDLE_INPUT, COUNT };
void* scratch(Pool*, Scratch, size_t bytes);

// Items 0, ..., count - 1 that threads take one after the other, so that a slow thread takes fewer.
struct Items {
    std::atomic<int> next{0};
    int count = 0;

    bool take(int& item) {
        item = next.fetch_add(1, std::memory_order_relaxed);
        return item < count;
    }

    // Calls work(item) for the items that this thread takes.
    template <class Work>
    void each(Work work) {
        for (int item; take(item);) {
            work(item);
            if (finished.fetch_add(1) + 1 == static_cast<uint32_t>(count) && sleepers.load() != 0)
                wake();
        }
    }
    // Returns when `each` is through with all items, on whichever threads.
    void wait(Pool*);

private:
    void wake();
    std::atomic<uint32_t> finished{0};
    std::atomic<uint32_t> sleepers{0};
};

// `pool_run` with a function object: work(thread).
template <class Work>
void run(Pool* pool, Work& work) {
    pool_run(
        pool, [](void* context, int32_t thread, int32_t) { (*static_cast<Work*>(context))(thread); },
        &work);
}

}  // namespace moekit
