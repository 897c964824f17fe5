// Milliseconds of llama.cpp's sampler chains over rows of logits, by case; one JSON object on stdout.
// llama_sampling ROWS.f32 SEEN.i32 ROW_COUNT SEEN_COUNT REPEAT CASE...
// A case is name:temperature:top_k:top_p:min_p:typical_p:repetition_penalty; a filter that does nothing is left out of its
// chain. Rows are sampled one after another on one thread, as llama-server does.
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

template <class T>
std::vector<T> read(const char* path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) {
        std::fprintf(stderr, "cannot read %s\n", path);
        std::exit(1);
    }
    std::vector<T> values(size_t(file.tellg()) / sizeof(T));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
    return values;
}

struct Case {
    std::string name;
    float temperature = 1, top_k = 0, top_p = 1, min_p = 0, typical_p = 1, repetition = 1;
};

Case parse(const std::string& text) {
    Case made;
    std::stringstream parts(text);
    std::string part;
    std::getline(parts, made.name, ':');
    for (float* value : {&made.temperature, &made.top_k, &made.top_p, &made.min_p, &made.typical_p, &made.repetition})
        if (std::getline(parts, part, ':')) *value = std::stof(part);
    return made;
}

llama_sampler* chain_of(const Case& c, int vocabulary, int seen, uint32_t seed) {
    llama_sampler* chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (c.repetition != 1) llama_sampler_chain_add(chain, llama_sampler_init_penalties(vocabulary, seen, c.repetition, 0, 0));
    if (c.temperature == 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return chain;
    }
    if (c.top_k > 0) llama_sampler_chain_add(chain, llama_sampler_init_top_k(int32_t(c.top_k)));
    if (c.typical_p < 1) llama_sampler_chain_add(chain, llama_sampler_init_typical(c.typical_p, 1));
    if (c.top_p < 1) llama_sampler_chain_add(chain, llama_sampler_init_top_p(c.top_p, 1));
    if (c.min_p > 0) llama_sampler_chain_add(chain, llama_sampler_init_min_p(c.min_p, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(c.temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(seed));
    return chain;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int main(int argc, char** argv) {
    if (argc < 7) return 2;
    const std::vector<float> logits = read<float>(argv[1]);
    const std::vector<int32_t> seen = read<int32_t>(argv[2]);
    const size_t rows = size_t(std::atoi(argv[3])), count = size_t(std::atoi(argv[4]));
    const int repeat = std::atoi(argv[5]);
    const size_t vocabulary = logits.size() / rows;
    std::vector<llama_token_data> candidates(vocabulary);
    std::printf("{");
    for (int a = 6; a < argc; ++a) {
        const Case c = parse(argv[a]);
        std::vector<llama_sampler*> chains;
        for (size_t r = 0; r < rows; ++r) {
            chains.push_back(chain_of(c, int(vocabulary), int(count), uint32_t(r)));
            for (size_t i = 0; i < count; ++i) llama_sampler_accept(chains[r], seen[r * count + i]);
        }
        std::vector<double> took;
        for (int i = 0; i < repeat; ++i) {
            const double begun = now();
            for (size_t r = 0; r < rows; ++r) {
                for (size_t t = 0; t < vocabulary; ++t) candidates[t] = {llama_token(t), logits[r * vocabulary + t], 0.0f};
                llama_token_data_array array{candidates.data(), candidates.size(), -1, false};
                llama_sampler_apply(chains[r], &array);
            }
            took.push_back(now() - begun);
        }
        std::nth_element(took.begin(), took.begin() + long(took.size() / 2), took.end());
        std::printf("%s\"%s\": %.6f", a == 6 ? "" : ", ", c.name.c_str(), took[took.size() / 2] * 1e3);
        for (llama_sampler* chain : chains) llama_sampler_free(chain);
    }
    std::printf("}\n");
}
