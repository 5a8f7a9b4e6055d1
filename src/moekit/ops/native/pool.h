// What the kernels need of a pool beside native.h: memory that stays between calls, and shared work.
#pragma once

#include <atomic>
#include <vector>

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
        for (int item; take(item);) finish([&] { work(item); });
    }
    // Does the work of one item, and counts it.
    template <class Work>
    void finish(Work work) {
        work();
        if (finished.fetch_add(1) + 1 == static_cast<uint32_t>(count) && sleepers.load() != 0)
            wake();
    }
    // Returns when `each` is through with all items, on whichever threads.
    void wait(Pool*);

private:
    void wake();
    std::atomic<uint32_t> finished{0};
    std::atomic<uint32_t> sleepers{0};
};

// The same, where neighbours lie next to each other in memory: each thread has a range of its own to
// go through, so that what it asked for ahead of its use is its own next item, and takes from those
// of others when it is through.
struct Ranges {
    explicit Ranges(int threads, int items) : places_(static_cast<size_t>(threads)) {
        for (int64_t t = 0; t < threads; ++t) {
            places_[t].next.store(static_cast<int>(items * t / threads));
            places_[t].end = static_cast<int>(items * (t + 1) / threads);
        }
        done_.count = items;
    }

    // Calls work(item) for the items that this thread takes.
    template <class Work>
    void each(int thread, Work work) {
        const size_t count = places_.size();
        for (size_t turn = 0; turn < count; ++turn) {
            Place& place = places_[(static_cast<size_t>(thread) + turn) % count];
            for (int item; (item = place.next.fetch_add(1, std::memory_order_relaxed)) < place.end;)
                done_.finish([&] { work(item); });
        }
    }
    // Returns when `each` is through with all items, on whichever threads.
    void wait(Pool* pool) { done_.wait(pool); }

private:
    struct alignas(64) Place {
        std::atomic<int> next{0};
        int end = 0;
    };
    std::vector<Place> places_;
    Items done_;
};

// `pool_run` with a function object: work(thread).
template <class Work>
void run(Pool* pool, Work& work) {
    pool_run(
        pool, [](void* context, int32_t thread, int32_t) { (*static_cast<Work*>(context))(thread); },
        &work);
}

}  // namespace moekit
