// Logits that are reduced as they are made: a tile is one part of the vocabulary, whose logits of a few rows at a time lie in
// a thread's scratch, never those of all rows. Who ends the last tile is followed by a phase that joins each row's parts.
#include <algorithm>

#include "program.h"

namespace kvik {

void Program::reserve_reduced() {
    const size_t rows = size_t(pass_.reduce_count), parts = size_t(parts_of(logits_count_));
    if (row_parts_.size() < rows * parts) row_parts_.resize(rows * parts);
    for (ThreadState& t : threads_) {
        t.logits.resize(size_t(kReduceRows) * kPartColumns);
        if (pass_.top == 0) continue;
        t.places.resize(kPartColumns);
        t.counts.assign(rows, 0);
        t.joined.reserve(threads_.size() * size_t(pass_.top));
        if (t.best.size() < rows * size_t(pass_.top)) t.best.resize(rows * size_t(pass_.top));
    }
}

void Program::run_reduced(const LinearTile& at, const Scratch& input, int32_t ld, ThreadState& own) {
    const int32_t first = at.block_begin * kRows, blocks = at.block_end - at.block_begin, ldo = blocks * kRows;
    const int32_t columns = std::min(ldo, logits_count_ - first);
    if (columns <= 0) return;  // rows of the head that are no tokens
    const Matrix part{at.matrix.layout, at.matrix.data + size_t(at.block_begin) * at.matrix.row_block_bytes(),
                      std::min(ldo, at.matrix.n - first), at.matrix.k};
    const int32_t parts = parts_of(logits_count_), place = first / kPartColumns, top = pass_.top;
    for (int32_t begin = 0; begin < pass_.reduce_count; begin += kReduceRows) {
        const int32_t rows = std::min(kReduceRows, pass_.reduce_count - begin);
        kernels_.matmul(part, activations(*at.part, ld, input, begin), rows, 0, blocks, own.logits.data(), ldo, false);
        for (int32_t i = 0; i < rows; ++i) {
            const size_t row = size_t(begin + i);
            const float* x = own.logits.data() + size_t(i) * size_t(ldo);
            row_parts_[row * size_t(parts) + size_t(place)] = kernels_.reduction->reduce(x, columns);
            const int32_t target = pass_.targets[row] - first;
            if (target >= 0 && target < columns) pass_.target_logits[row] = x[target];
            if (top == 0) continue;
            BestList list{own.best.data() + row * size_t(top), top, own.counts[row]};
            offer_part(*kernels_.reduction, x, columns, first, list, own.places.data());
            own.counts[row] = list.count;
        }
    }
}

void Program::run_join(uint32_t tile, ThreadState& own) {
    const int32_t parts = parts_of(logits_count_), top = pass_.top;
    const int32_t from = int32_t(tile) * kPrepareRows, to = std::min(from + kPrepareRows, pass_.reduce_count);
    for (int32_t r = from; r < to; ++r) {
        const size_t row = size_t(r), at = row * size_t(top);
        pass_.logsumexp[row] = join_parts(row_parts_.data() + row * size_t(parts), parts);
        if (top == 0) continue;
        own.joined.clear();
        for (const ThreadState& t : threads_)
            own.joined.insert(own.joined.end(), t.best.begin() + ptrdiff_t(at), t.best.begin() + ptrdiff_t(at) + t.counts[row]);
        write_best(own.joined, top, pass_.top_ids + at, pass_.top_logits + at);
    }
}

}  // namespace kvik
