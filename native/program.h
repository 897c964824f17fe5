// A recorded model: which kernels run on which buffers, in which order. Built once at load (program_record.cpp); `run`
// replays it for one pass, any mixture of sequences and rows, on the pool, entered once, without Python: it is planned
// (program_check.cpp, program_plan.cpp), then run (program.cpp). program_attention.cpp has what rows do with the cache,
// program_cache.cpp what happens to it between passes, experts.cpp what mixtures of experts add, program_reduce.cpp how rows
// of logits are reduced.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cache_layout.h"
#include "kernels.h"
#include "nodes.h"
#include "pool.h"
#include "reduction.h"

namespace kvik {

// What attention leaves of rows at slots [first, end) of a sequence; see kvik.ops.Observation.
struct ObservationView {
    int32_t sequence, first, end;
    int64_t* sums;  // [layers][KV heads][width], or null
    int64_t width;
    float* queries;  // [layers][end - first][heads * head size], or null
};

// One forward pass as plain data; see kvik.ops.Pass.
struct PassView {
    const int32_t* tokens;
    const int32_t* positions;
    const int32_t* slots;
    int32_t rows;
    const int32_t* spans;  // [sequences + 1]
    int32_t sequences;
    const int32_t* layouts;  // [sequences]
    Tables tables;           // of all sequences: [table_count] shifts
    int32_t table_count;
    const int32_t* logit_rows;
    int32_t logit_count;
    float* logits;  // [logit_count][logits_width]
    const int32_t* copies;  // [copy_count][3]: address to copy, address of the copy, steps of 64 bytes
    int32_t copy_count;
    // Rows whose logits are reduced as they are made, each with the token whose logit is wanted.
    const int32_t* reduce_rows;
    const int32_t* targets;
    int32_t reduce_count;
    int32_t top;            // best tokens of each
    double* logsumexp;      // [reduce_count], NaN where a logit is not finite
    float* target_logits;   // [reduce_count]
    int32_t* top_ids;       // [reduce_count][top]
    float* top_logits;      // [reduce_count][top]
    const ObservationView* observations;
    int32_t observation_count;
};

struct Times {
    double matrices = 0, attention = 0, rest = 0;
};

class Program {
  public:
    // kv: the pool, in which all blocks are addressed in steps of 64 bytes.
    Program(Pool& pool, const Kernels& kernels, int32_t max_rows, int32_t layers, int32_t heads, int32_t kv_heads,
            int32_t head_size, uint8_t* kv, size_t kv_bytes);

    // Recording. Buffers hold max_rows * copies rows of f32, padded to 32 columns with zeros.
    int32_t buffer(int32_t width, int32_t copies = 1);
    int32_t rotations(std::vector<double> inv_freq, double factor);  // a table of them
    void embed(const Matrix& table, bool by_position, float scale, int32_t out);
    void map(const RowOp& op, int32_t out);
    void linear(const RowOp& in, const std::vector<Part>& parts);
    // Norms and rotation of queries and keys, then the append to the cache.
    void rotate_append(const Attention& a);
    void attend(const Attention& a, int32_t out);
    // hidden: gate and up, whose `out` are buffers of `used` copies; down: likewise.
    void experts(const RowOp& in, int32_t scores, const ExpertsShape& shape, const std::vector<Part>& hidden,
                 Activation activation, const Part& down, int32_t out, bool accumulate);
    // vocabulary: rows of the head that are tokens, the first of it.
    void logits(const RowOp& in, const Matrix& head, bool fine, int32_t vocabulary);

    // After the recording: the number by which passes and views name the layout, of which the caller fills what is
    // kvik.ops.pages.CacheLayout's. Throws std::invalid_argument, as all below do, which check every range.
    int32_t add_layout(CacheLayout layout);

    void run(const PassView& pass);

    int32_t num_tables(int32_t layout) const;  // of a sequence
    // Between passes; see kvik.ops.Executor.
    void evict(const View& source, const View& target, const int32_t* kept, int32_t most, const int32_t* counts);
    int32_t slots(const View& view, int32_t layer, int32_t head) const;  // in the unit's table
    void read(const View& view, int32_t layer, int32_t head, bool keys, float* out);  // [slots][head size]
    void save(const int32_t* blocks, int32_t count, int32_t steps, uint8_t* out) const;
    void restore(const int32_t* blocks, int32_t count, int32_t steps, const uint8_t* data);

    Times times() const { return times_; }
    int32_t phases() const { return int32_t(phases_.size()); }  // of the last pass: how often its threads met
    int32_t logits_width() const { return logits_width_; }
    int32_t logits_count() const { return logits_count_; }  // of a row that are tokens'
    int32_t head_size() const { return head_size_; }
    int32_t heads() const { return heads_; }
    int32_t kv_heads() const { return kv_heads_; }
    int32_t layers() const { return layers_; }
    const char* isa() const { return kernels_.name; }

  private:
    using Kind = Node::Kind;
    using Rows = Node::Rows;
    // Up to this many rows each thread prepares the whole input itself: cheaper than one more meeting of all threads.
    static constexpr int32_t kLazyRows = 2;
    static constexpr int32_t kPrepareRows = 8;  // rows of one tile of a phase of rows
    static constexpr int32_t kReduceRows = 128;  // rows whose part of the logits a thread makes before it reduces them
    struct Phase {
        enum Work { rows, rotate, pack, attend, linear, join };
        Work work;
        const Node* node;              // of rotate, pack, attend and linear
        // Small nodes: what a phase of rows does to each row, in order; of another phase, what whoever ends it does to all
        // of the few rows there are, because that is shorter than a meeting of the threads.
        uint32_t begin, end;
        const Node* prepare = nullptr;  // rows: then the linear's input, into the shared activations
        uint32_t plan = 0;              // pack, attend: which of the attention plans
    };
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    struct Buffer {
        std::unique_ptr<float[], Free> data;
        int32_t ld, copies;
    };
    struct Rotations {
        std::vector<double> inv_freq;
        double factor;
        std::vector<float> cosine, sine;            // of the pass: [rows][D / 2]
        std::vector<float> sink_cosine, sink_sine;  // the same for what rows ask of sinks
    };
    // Rows rounded to int8 groups, in one term or two.
    struct Rounded {
        std::vector<int8_t> q, fine;
        std::vector<float> scale, sum;
        std::vector<int32_t> isum, fine_isum, half_isum, fine_half_isum;
        Int8Rows row(size_t at);
    };
    // A linear's input after its row op, rounded where a part wants it.
    struct Scratch {
        std::vector<float> x;
        Rounded coarse, fine;
        std::vector<uint16_t> bf16, bf16_fine;
        void reserve(size_t floats, const Roundings& wanted);
    };
    struct Item {  // spans of one tile of rows of one sequence on one KV head
        int32_t row, rows, head, sequence;
        int32_t first, last;    // spans this item computes
        Partitions partitions;  // of the whole tile
        int32_t shares;         // into which the tile is divided
        int32_t tile;           // where a tile's spans are shared out: its countdown, else -1
        size_t partials;        // floats into partials_ of the tile's first span
        // Reading a partition costs about what computing it for this many queries does.
        static constexpr int64_t kReading = 12;
        int64_t work(int32_t group) const {
            return (partitions.first_of(last) - partitions.first_of(first)) * (kReading + rows * group);
        }
    };
    struct PackItem {  // one packed page of one sequence and KV head, made in this pass
        int32_t sequence, head, group;
    };
    // How one layer's attention is divided; layers with its window whose tables have the same shifts share it.
    struct AttentionPlan {
        int32_t window = 0, layer = 0;
        std::vector<Item> items;
        std::vector<PackItem> packs;
    };
    // What the plans of a pass need beside them.
    struct AttentionNeeds {
        size_t partials = 0, observed = 0;  // floats; observed: of each thread
        std::vector<int32_t> countdowns;
    };
    struct RowRange {  // [first, end)
        int32_t first, end;
    };
    struct Prepared {  // which input a thread prepared for itself
        int64_t pass = -1;
        uint32_t phase = 0;
        int32_t expert = 0;
        bool operator==(const Prepared&) const = default;
    };
    struct ThreadState {
        Scratch input;
        Prepared prepared;
        std::vector<float> attend, state, observed;
        std::vector<float> page;  // keys and values of a page
        // of reduced rows: logits of a tile, places of a row's candidates, each row's best list [reduce_count][top]
        std::vector<float> logits;
        std::vector<int32_t> places, counts;
        std::vector<Candidate> best, joined;
    };
    // Where a tile of a linear lies.
    struct LinearTile {
        const Part* part;
        Matrix matrix;
        int32_t block_begin, block_end;
        int32_t row_begin, row_end;  // of the linear's rows
        int32_t expert;              // its index among the chosen; 0 where there are none
    };

    // recording
    Buffer& at(int32_t buffer) { return buffers_.at(size_t(buffer)); }
    void check(const RowOp& op, int32_t copies);
    void check(const Attention& a);
    void finish_linear(Node node);

    // a pass
    void check(const PassView& pass);
    void check_sequences(const PassView& pass);
    void check_tables(const PassView& pass, int32_t sequence) const;
    void check_observations(const PassView& pass);
    bool fits(int64_t address, size_t bytes) const;  // whether a block lies in the pool
    void copy_blocks(const PassView& pass);
    void plan(const PassView& pass);
    void plan_small(const Node& node);
    void plan_linear(const Node& node);
    void plan_attend(const Node& node, AttentionNeeds& needs);
    void plan_sinks();
    void reserve(const AttentionNeeds& needs);
    void longest_first(std::vector<Item>& items) const;
    bool same_shifts(int32_t layer, int32_t other) const;
    AttentionPlan plan_attention(const Attention& a, AttentionNeeds& needs) const;
    std::vector<Item> attention_tiles(const Attention& a) const;
    void plan_packs(const Attention& a, std::vector<PackItem>& packs) const;
    static void run_tile(void* self, uint32_t phase, uint32_t tile, uint32_t thread);
    static void phase_done(void* self, uint32_t phase);
    void run_rows(uint32_t phase, uint32_t tile);
    void run_small(const Node& node, int32_t from, int32_t to);
    void run_rotations(int32_t from, int32_t to);
    void run_embed(const Node& node, int32_t row);
    void run_combine(const Node& node, int32_t row);
    void run_heads(const Attention& a, int32_t from, int32_t to, int32_t first_head, int32_t last_head);
    void run_head(const Attention& a, int32_t sequence, int32_t head, int32_t from, int32_t to);
    void run_linear(const Node& node, uint32_t phase, uint32_t tile, uint32_t thread);
    void run_reduced(const LinearTile& at, const Scratch& input, int32_t ld, ThreadState& own);
    void run_join(uint32_t tile, ThreadState& own);
    void reserve_reduced();
    void run_attend(const Node& node, const Item& item, uint32_t thread);
    RowRange observed_rows(int32_t sequence, int32_t row, int32_t rows) const;
    bool locate(const Node& node, uint32_t tile, LinearTile& found) const;
    void look_ahead(uint32_t phase, uint32_t thread) const;
    void apply(const RowOp& op, int32_t row, float* out) const;
    void prepare_rows(const Node& node, Scratch& s, int32_t from, int32_t to, int32_t first) const;
    void round_row(const Node& node, Scratch& s, size_t at, int32_t ld) const;
    Activations activations(const Part& part, int32_t ld, const Scratch& s, int32_t first) const;
    int32_t rows_of(const Node& node) const;
    bool lazy(const Node& node) const;
    const CacheLayout& layout_of(int32_t sequence) const { return layouts_[size_t(pass_.layouts[sequence])]; }
    Tables tables_of(int32_t sequence) const;
    int32_t shift_of(int32_t sequence, int32_t layer, int32_t head) const;
    Cache cache(int32_t sequence, int32_t layer, int32_t head) const;
    Cache cache(const CacheLayout& layout, const Tables& tables, int32_t layer, int32_t head) const;

    // between passes
    struct Eviction;
    const CacheLayout& check_view(const View& view) const;
    void check_source(const Eviction& eviction, int32_t unit) const;
    void check_target(const Eviction& eviction, int32_t unit) const;
    void run_evict(const Eviction& eviction, int32_t unit, ThreadState& own) const;
    void read_slots(const Cache& cache, int32_t first, int32_t end, int32_t reader, bool keys, bool rotated,
                    float* out) const;
    int32_t ld(int32_t buffer) const { return buffers_[size_t(buffer)].ld; }
    float* row(int32_t buffer, int32_t r) const {
        const Buffer& b = buffers_[size_t(buffer)];
        return b.data.get() + size_t(r) * size_t(b.ld);
    }

    Pool& pool_;
    const Kernels& kernels_;
    const int32_t max_rows_, layers_, heads_, kv_heads_, head_size_;
    uint8_t* const kv_;
    const size_t kv_bytes_;
    std::vector<int32_t> windows_;  // by layer: its own; 0: none; -1: it does not attend
    std::vector<CacheLayout> layouts_;

    std::vector<Buffer> buffers_;
    std::vector<Rotations> rotations_;
    std::vector<Node> nodes_;
    int32_t logits_width_ = 0, logits_count_ = 0;
    int32_t vocabulary_ = INT32_MAX, positions_ = INT32_MAX;  // rows of the embedding tables
    int32_t widest_ = 0;                                     // of the linears' inputs, padded
    int32_t most_used_ = 0, most_experts_ = 0;
    Roundings roundings_;  // that some linear wants

    // of the pass being run
    PassView pass_{};
    std::vector<int32_t> first_table_;     // by sequence
    std::vector<int32_t> observation_of_;  // by sequence: -1: none; empty: nobody is observed
    std::vector<int32_t> sink_positions_;  // by row: the position that sinks see; empty: there are none
    Buffer sink_queries_{nullptr, 0, 1};   // [max_rows], apart as the queries are
    std::vector<Phase> phases_;
    std::vector<uint32_t> tiles_;
    std::vector<const Node*> small_;
    Scratch shared_;
    std::vector<ThreadState> threads_;
    std::vector<AttentionPlan> plans_;
    std::unique_ptr<std::atomic<int32_t>[]> countdown_;
    size_t countdown_size_ = 0;
    std::vector<float> partials_;
    std::vector<RowPart> row_parts_;  // [reduce_count][parts]
    Routing routing_;
    int64_t passes_ = 0;
    Times times_;
    double phase_started_ = 0;
};

}  // namespace kvik
