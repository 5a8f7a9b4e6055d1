// Threads that read and sum pieces of records, the most urgent first.
#include "reads.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int64_t PAGE = 4096;

// One record: its pieces are read in any order and summed one after the other.
struct Record {
    ReadJob job;
    std::vector<ReadRange> ranges;
    int64_t piece;  // bytes of each but the last
    int32_t count, begun = 0, coming = 0, summed = 0;
    bool summing = false;
    int32_t status = READ_WHOLE;
    std::vector<char> there;

    Record(const ReadJob& given, int64_t about) : job(given) {
        ranges.assign(given.ranges, given.ranges + given.range_count);
        const int64_t parts = std::max<int64_t>(1, (given.size + about - 1) / about);
        piece = std::max(PAGE, (given.size + parts * PAGE - 1) / (parts * PAGE) * PAGE);
        count = static_cast<int32_t>(std::max<int64_t>(1, (given.size + piece - 1) / piece));
        there.resize(static_cast<size_t>(count));
    }

    int64_t start(int32_t index) const { return index * piece; }
    int64_t stop(int32_t index) const { return std::min(job.size, (index + 1) * piece); }
    bool wants_reading() const { return begun < count && status == READ_WHOLE; }
    bool wants_summing() const {
        return !summing && status == READ_WHOLE && summed < count && there[summed];
    }
    bool is_done() const {
        return coming == 0 && !summing && (status != READ_WHOLE || summed == count);
    }

    int32_t read(int32_t index) const {
        int64_t at = start(index);
        while (at < stop(index)) {
            const auto size = static_cast<size_t>(stop(index) - at);
            const ssize_t got =
                pread(job.file, static_cast<char*>(job.to) + at, size, job.offset + at);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return errno;
            if (got == 0) return READ_CUT_SHORT;
            at += got;
        }
        return READ_WHOLE;
    }

    void sum(int32_t index) const {
        for (const ReadRange& range : ranges) {
            const int64_t from = std::max(range.start, start(index));
            const int64_t to = std::min(range.stop, stop(index));
            if (from >= to) continue;
            uint32_t& crc = job.sums[range.sum];
            crc = crc32_fast(crc, static_cast<char*>(job.to) + from, static_cast<size_t>(to - from));
        }
    }
};

}  // namespace

struct Reads {
    const int32_t in_flight;
    const int64_t piece;
    std::mutex mutex;
    std::condition_variable work, finished;
    std::list<Record> urgent, others;
    std::deque<ReadDone> done;
    std::vector<std::thread> threads;
    int32_t reading = 0;
    bool closed = false;

    Reads(int32_t most, int64_t about) : in_flight(most), piece(about) {
        // One more than wait for the disk, to sum meanwhile.
        for (int32_t i = 0; i <= most; ++i) threads.emplace_back([this] { serve(); });
    }

    template <class Test>
    Record* first(Test test) {
        for (auto* records : {&urgent, &others})
            for (Record& record : *records)
                if (test(record)) return &record;
        return nullptr;
    }

    Record* to_read() {
        return first([](const Record& r) { return r.wants_reading(); });
    }
    Record* to_sum() {
        return first([](const Record& r) { return r.wants_summing(); });
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        while (!closed) {
            Record* record = reading < in_flight ? to_read() : nullptr;
            if (record)
                read_piece(*record, lock);
            else if ((record = to_sum()))
                sum_piece(*record, lock);
            else {
                work.wait(lock);
                continue;
            }
            if (record->is_done()) finish(record);
        }
    }

    // Asking the disk for more comes first, so whoever takes a piece leaves the next to another.
    void read_piece(Record& record, std::unique_lock<std::mutex>& lock) {
        const int32_t index = record.begun++;
        ++record.coming;
        ++reading;
        if (reading < in_flight && to_read()) work.notify_one();
        lock.unlock();
        const int32_t status = record.read(index);
        lock.lock();
        --reading;
        --record.coming;
        record.there[static_cast<size_t>(index)] = status == READ_WHOLE;
        if (status != READ_WHOLE && record.status == READ_WHOLE) record.status = status;
        if (to_read() && to_sum()) work.notify_one();
    }

    void sum_piece(Record& record, std::unique_lock<std::mutex>& lock) {
        record.summing = true;
        const int32_t index = record.summed;
        lock.unlock();
        record.sum(index);
        lock.lock();
        record.summing = false;
        ++record.summed;
    }

    void finish(Record* record) {
        done.push_back({record->job.id, record->status, 0});
        for (auto* records : {&urgent, &others})
            records->remove_if([&](const Record& r) { return &r == record; });
        finished.notify_one();
    }

    std::list<Record>::iterator find(std::list<Record>& records, int64_t id) {
        return std::find_if(records.begin(), records.end(),
                            [id](const Record& r) { return r.job.id == id; });
    }
};

Reads* reads_new(int32_t in_flight, int64_t piece) { return new Reads(in_flight, piece); }

void reads_free(Reads* reads) { delete reads; }

void reads_submit(Reads* reads, const ReadJob* job) {
    std::lock_guard<std::mutex> lock(reads->mutex);
    if (reads->closed) return;
    (job->urgent ? reads->urgent : reads->others).emplace_back(*job, reads->piece);
    reads->work.notify_one();
}

int32_t reads_cancel(Reads* reads, int64_t id) {
    std::lock_guard<std::mutex> lock(reads->mutex);
    for (auto* records : {&reads->urgent, &reads->others}) {
        auto found = reads->find(*records, id);
        if (found == records->end() || found->begun) continue;
        records->erase(found);
        return 1;
    }
    return 0;
}

void reads_hurry(Reads* reads, int64_t id) {
    std::lock_guard<std::mutex> lock(reads->mutex);
    auto found = reads->find(reads->others, id);
    if (found != reads->others.end())
        reads->urgent.splice(reads->urgent.end(), reads->others, found);
}

int32_t reads_wait(Reads* reads, double seconds, ReadDone* done) {
    std::unique_lock<std::mutex> lock(reads->mutex);
    const auto ready = [reads] { return !reads->done.empty() || reads->closed; };
    reads->finished.wait_for(lock, std::chrono::duration<double>(seconds), ready);
    if (reads->done.empty()) return 0;
    *done = reads->done.front();
    reads->done.pop_front();
    return 1;
}

void reads_close(Reads* reads) {
    {
        std::lock_guard<std::mutex> lock(reads->mutex);
        reads->closed = true;
        reads->work.notify_all();
        reads->finished.notify_all();
    }
    for (std::thread& thread : reads->threads)
        if (thread.joinable()) thread.join();
}
