// The nearest entries of a codebook, run by run: numerics/lattice.py. Entries are looked up, so weights do not lie side by side.

// The first of n numbers that is least.
static inline int first_least(const float *x, int n) {
    int at = 0;
    for (int i = 1; i < n; i++) at = x[i] < x[at] ? i : at;
    return at;
}

// The entry nearest to x [d] of those that are near its digits; score: Σ u (2 x p - p²) of it.
static inline int32_t nearest_entry(const Lattice &a, int variant, const float *x, const float *u, float &score) {
    const float *points = a.points + (ptrdiff_t)variant * a.P * a.d, *middle = a.middle + variant * (a.L - 1);
    ptrdiff_t place = 0;
    for (int i = 0; i < a.d; i++) {
        int digit = 0;
        for (int l = 0; l < a.L - 1; l++) digit += x[i] > middle[l];
        place = place * a.L + digit;
    }
    const int32_t *near = a.near + ((ptrdiff_t)variant * a.places + place) * a.candidates;
    int32_t entry = near[0];
    for (int k = 0; k < a.candidates; k++) {
        const float *p = points + (ptrdiff_t)near[k] * a.d;
        float product = 0, square = 0;
        for (int i = 0; i < a.d; i++) product += 2 * u[i] * x[i] * p[i], square += p[i] * p[i] * u[i];
        float now = product - square;
        if (k == 0 || now > score) score = now, entry = near[k];
    }
    return entry;
}

// The entries of one run x [width], of the variant that suits them best: codes [width].
static inline void nearest_entries(const Lattice &a, const float *x, const float *u, uint8_t *codes) {
    int per_run = a.width / a.d, share = a.run > a.d ? a.run / a.d : 1;
    for (int part = 0; part < per_run; part += share) {
        int32_t entry[2][MOST_RUN], variant = 0;
        float total[2] = {};
        for (int v = 0; v < a.V; v++) {
            for (int j = 0; j < share; j++) {
                float score = 0;
                ptrdiff_t at = (ptrdiff_t)(part + j) * a.d;
                entry[v][j] = nearest_entry(a, v, x + at, u + at, score);
                total[v] = j == 0 ? score : total[v] + score;
            }
            variant = total[v] > total[variant] ? v : variant;
        }
        for (int j = 0; j < share; j++)
            for (int i = 0; i < a.d; i++)
                codes[(part + j) * a.d + i] = a.codes[((ptrdiff_t)variant * a.P + entry[variant][j]) * a.d + i];
    }
}

// Turn the sign of x [8] that loses least by it, if an odd number is negative: term[i] is what turning costs.
static inline void make_even(const bool *negative, const float *term, bool *turned) {
    int count = 0;
    for (int i = 0; i < 8; i++) count += negative[i], turned[i] = false;
    if (count % 2) turned[first_least(term, 8)] = true;
}

static void nearest_runs(const Lattice &a, const Runs &runs, ptrdiff_t first, ptrdiff_t last) {
    float size[MOST_RUN], term[MOST_RUN], ones[MOST_RUN];
    bool negative[MOST_RUN] = {}, turned[MOST_RUN] = {};
    for (float &one : ones) one = 1;
    for (ptrdiff_t r = first; r < last; r++) {
        const float *x = runs.x + r * a.width, *u = runs.weight ? runs.weight + r * a.width : ones;
        uint8_t *codes = runs.codes + r * a.width;
        if (!a.has_signs) {
            nearest_entries(a, x, u, codes);
            continue;
        }
        for (int i = 0; i < a.width; i++) {
            negative[i] = x[i] < 0, size[i] = __builtin_fabsf(x[i]);
            term[i] = u[i] * (size[i] * size[i]);
        }
        for (int at = 0; a.even && at < a.width; at += 8) {
            make_even(negative + at, term + at, turned + at);
            for (int i = at; i < at + 8; i++) size[i] = turned[i] ? -size[i] : size[i];
        }
        nearest_entries(a, size, u, codes);
        for (int at = 0; a.even && at < a.width; at += 8) {  // turning a sign costs 4 u |x| times the magnitude that was chosen
            for (int i = at; i < at + 8; i++) term[i] = u[i] * __builtin_fabsf(x[i]) * a.level[codes[i]];
            make_even(negative + at, term + at, turned + at);
            for (int i = at; i < at + 8; i++) negative[i] = negative[i] != turned[i];
        }
        for (int i = 0; i < a.width; i++) codes[i] = negative[i] ? (uint8_t)(a.top - codes[i]) : codes[i];
    }
}
