// A recorded model: which kernels run on which buffers, in which order. Built once at load; `run` replays it for one pass
// (any mixture of sequences and rows) on the pool, entered once, without Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace kvik {

// One forward pass as plain data; see kvik.ops.Pass.
struct PassView {
    const int32_t* tokens;
    const int32_t* positions;
    const int32_t* slots;
    int32_t rows;
    const int32_t* spans;  // [sequences + 1]
    int32_t sequences;
    const int32_t* blocks;
    const int32_t* block_spans;  // [sequences + 1]
    const int32_t* logit_rows;
    int32_t logit_count;
    float* logits;  // [logit_count][logits_width]
};

struct Times {
    double matrices = 0, attention = 0, rest = 0;
};

// What happens to a linear's input first.
struct Prologue {
    enum Kind : int32_t { none = 0, norm = 1, gate = 2 };
    Kind kind = none;
    int32_t input = -1, second = -1;  // buffers; gate reads both
    const float* weight = nullptr;    // norm
    float eps = 0;
    int32_t width = 0;
    bool operator==(const Prologue&) const = default;
};

// One matrix of a linear: out (+)= input @ matrix.T
struct Part {
    Matrix matrix;
    int32_t out;
    bool accumulate;
    bool fine;  // activations in two int8 terms (integer layouts)
};

class Program {
  public:
    // heads and head_size shape the cache: `kv` bytes lie as [block][layer][KV head][keys, values].
    Program(Pool& pool, const Kernels& kernels, int32_t max_rows, int32_t layers, int32_t heads, int32_t kv_heads,
            int32_t head_size, KV kv_type, uint8_t* kv, int32_t num_blocks, const double* inv_freq, double rope_factor);

    // Recording. Buffers hold max_rows rows of f32, padded to 32 columns.
    int32_t buffer(int32_t width);
    void embed(const Matrix& table, int32_t out);
    void linear(const Prologue& in, const std::vector<Part>& parts);
    void add(int32_t a, int32_t b, int32_t out);
    void rotate_append(int32_t q, int32_t k, int32_t v, int32_t layer);
    void attend(int32_t q, int32_t out, int32_t layer, int32_t window);
    void logits(const Prologue& in, const Matrix& head, bool fine);

    void run(const PassView& pass);  // checks every range; throws std::invalid_argument
    Times times() const { return times_; }
    int32_t logits_width() const { return logits_width_; }
    const char* isa() const { return kernels_.name; }

  private:
    enum class Kind { embed, linear, add, rotate, attend };
    struct Node {
        Kind kind;
        Prologue in;
        std::vector<Part> parts;
        std::vector<uint32_t> tile_ends;  // per part: tiles up to and including it
        int32_t blocks_a_tile = 1;
        bool coarse = false, fine = false, bf16 = false, bf16_fine = false;  // roundings some part wants
        bool head = false;  // rows are the pass's logit rows
        int32_t a = -1, b = -1, out = -1, layer = 0, window = 0;
        Matrix table{};
    };
    struct Phase {
        const Node* node;
        bool prepare;  // only the linear's prologue, into the shared activations
        const Node* then = nullptr;  // rotation of few rows, done by whoever ends the phase: shorter than a meeting
    };
    struct Buffer {
        std::unique_ptr<float[]> data;
        int32_t ld;
    };
    // Rows rounded to int8 groups, in one term or two.
    struct Rounded {
        std::vector<int8_t> q, fine;
        std::vector<float> scale, sum;
        std::vector<int32_t> isum, fine_isum, half_isum, fine_half_isum;
        Int8Rows row(size_t at);
    };
    // A linear's input after its prologue, rounded where a part wants it.
    struct Scratch {
        std::vector<float> x;
        Rounded coarse, fine;
        std::vector<uint16_t> bf16, bf16_fine;
        void reserve(const Program& program, int32_t rows);
    };
    struct Item {  // partitions of one tile of rows of one sequence on one KV head
        int32_t row, rows, head, sequence;
        int32_t first, last;    // partitions this item computes
        int32_t begin, end;     // partitions of the whole tile
        int32_t shares;         // into which the tile is divided
        int32_t tile;           // where a tile's partitions are shared out: its countdown, else -1
        size_t partials;        // floats into partials_ of partition `begin`
    };
    // How one window's attention is divided; the same for every layer of a pass.
    struct AttentionPlan {
        int32_t window = 0;
        std::vector<Item> items;
    };
    struct ThreadState {
        Scratch input;
        int64_t prepared = -1;  // number of the phase whose input is in `input`
        std::vector<float> attend, state;
    };

    void finish_linear(Node node);
    void plan(const PassView& pass);
    AttentionPlan plan_attention(int32_t window, size_t& partials, std::vector<int32_t>& countdowns) const;
    void check(const PassView& pass) const;
    static void run_tile(void* self, uint32_t phase, uint32_t tile, uint32_t thread);
    static void phase_done(void* self, uint32_t phase);
    void run_embed(const Node& node, uint32_t tile);
    void run_rotate(const Node& node, uint32_t tile);
    void run_linear(const Node& node, uint32_t phase, uint32_t tile, uint32_t thread);
    void look_ahead(uint32_t phase, uint32_t thread) const;
    void run_attend(const Node& node, const Item& item, uint32_t thread);
    void prepare_rows(const Node& node, Scratch& s, int32_t from, int32_t to) const;
    Activations activations(const Node& node, const Scratch& s, bool fine) const;
    int32_t rows_of(const Node& node) const { return node.head ? pass_.logit_count : pass_.rows; }
    bool lazy(const Node& node) const;
    Cache cache(int32_t sequence, int32_t layer, int32_t head) const;
    float* row(int32_t buffer, int32_t r) const { return buffers_[size_t(buffer)].data.get() + size_t(r) * buffers_[size_t(buffer)].ld; }

    Pool& pool_;
    const Kernels& kernels_;
    const int32_t max_rows_, layers_, heads_, kv_heads_, head_size_;
    const KV kv_type_;
    uint8_t* const kv_;
    const int32_t num_blocks_;
    const size_t head_bytes_, block_bytes_;
    std::vector<double> inv_freq_;
    const double rope_factor_;

    std::vector<Buffer> buffers_;
    std::vector<Node> nodes_;
    int32_t logits_width_ = 0, vocabulary_ = 0, widest_ = 0;  // widest: of the linears' inputs, padded
    bool any_coarse_ = false, any_fine_ = false, any_bf16_ = false;

    // of the pass being run
    PassView pass_{};
    std::vector<Phase> phases_;
    std::vector<uint32_t> tiles_;
    std::vector<float> cosine_, sine_;
    Scratch shared_;
    std::vector<ThreadState> threads_;
    std::vector<AttentionPlan> plans_;
    std::unique_ptr<std::atomic<int32_t>[]> countdown_;
    size_t countdown_size_ = 0;
    std::vector<float> partials_;
    int64_t passes_ = 0;
    Times times_;
    double phase_started_ = 0;
};

}  // namespace kvik
