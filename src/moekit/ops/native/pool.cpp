// A pool of threads that wait by spinning for a moment and then sleep.
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>
#include <vector>

namespace {

// Longer than the pause between two kernels of a layer, shorter than anyone would notice.
constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int SPINS_A_LOOK = 64;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
            nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
            nullptr, 0);
}

int usable_cores() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    return static_cast<int>(std::thread::hardware_concurrency());
}

// Returns whether `done` came true while spinning.
template <class Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < SPINS_A_LOOK; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// A number that one thread advances and others wait for.
struct alignas(64) Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};

    void advance() {
        value.fetch_add(1);
        if (sleepers.load() != 0) wake_all(value);
    }

    // The value that came after `old`.
    uint32_t wait_beyond(uint32_t old, bool spins) {
        if (!spins || !spin_until([&] { return value.load(std::memory_order_acquire) != old; })) {
            sleepers.fetch_add(1);
            while (value.load() == old) sleep_while(value, old);
            sleepers.fetch_sub(1);
        }
        return value.load();
    }
};

constexpr uint32_t CLOSED = 1u << 31;

}  // namespace

// A worker that the system has not given a core yet must hold up nobody, so work is not handed to
// threads: those that come while the gate is open take part, and it stays open until the caller
// finds nothing more to do.
struct Pool {
    int threads = 1;
    bool spins = true;
    std::vector<std::thread> workers;
    std::array<moekit::Buffer, static_cast<size_t>(moekit::Scratch::COUNT)> buffers;
    Signal begin, left;
    alignas(64) std::atomic<uint32_t> gate{CLOSED};  // workers inside, and whether it is closed
    std::atomic<bool> stopping{false};
    void (*work)(void*, int32_t, int32_t) = nullptr;
    void* context = nullptr;

    void serve(int thread) {
        for (uint32_t seen = 0;;) {
            seen = begin.wait_beyond(seen, spins);
            if (stopping.load()) return;
            if (!enter()) continue;
            work(context, thread, threads);
            if (gate.fetch_sub(1) == (CLOSED | 1)) left.advance();
        }
    }

    bool enter() {
        uint32_t now = gate.load();
        while (!(now & CLOSED))
            if (gate.compare_exchange_weak(now, now + 1)) return true;
        return false;
    }

    void run(void (*job)(void*, int32_t, int32_t), void* job_context) {
        work = job;
        context = job_context;
        gate.store(0);
        begin.advance();
        work(context, 0, threads);
        const uint32_t before = left.value.load();
        if (gate.fetch_or(CLOSED) != 0) left.wait_beyond(before, spins);
    }
};

namespace moekit {

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t{64}); }

void* Buffer::take(size_t bytes) {
    if (bytes > size_) {
        ::operator delete(data_, std::align_val_t{64});
        data_ = nullptr;
        size_ = 0;
        data_ = ::operator new(bytes, std::align_val_t{64});
        size_ = bytes;
    }
    return data_;
}

void Items::wait(Pool* pool) {
    const auto done = [&] { return finished.load() == static_cast<uint32_t>(count); };
    if (done() || (pool->spins && spin_until(done))) return;
    sleepers.fetch_add(1);
    for (uint32_t now; (now = finished.load()) != static_cast<uint32_t>(count);)
        sleep_while(finished, now);
    sleepers.fetch_sub(1);
}

void Items::wake() { wake_all(finished); }

void* scratch(Pool* pool, Scratch which, size_t bytes) {
    return pool->buffers[static_cast<size_t>(which)].take(bytes);
}

}  // namespace moekit

extern "C" {

Pool* pool_new(int32_t threads) {
    Pool* pool = new Pool;
    pool->threads = threads < 1 ? 1 : threads;
    // Where threads outnumber cores, one that spins takes the core from one that works.
    pool->spins = pool->threads <= usable_cores();
    for (int i = 1; i < pool->threads; ++i) pool->workers.emplace_back([=] { pool->serve(i); });
    return pool;
}

void pool_free(Pool* pool) {
    if (pool == nullptr) return;
    pool->stopping.store(true);
    pool->begin.advance();
    for (std::thread& worker : pool->workers) worker.join();
    delete pool;
}

int32_t pool_threads(const Pool* pool) { return pool->threads; }

void pool_run(Pool* pool, void (*work)(void*, int32_t, int32_t), void* context) {
    if (pool->threads == 1)
        work(context, 0, 1);
    else
        pool->run(work, context);
}

}  // extern "C"
