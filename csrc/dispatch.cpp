// Which instruction sets there are: one list, best first.
#include "kernels.h"

namespace bitwright {

const Kernels *const *available() {
    static const Kernels *found[4] = {nullptr};
    if (!found[0]) {
        int n = 0;
#ifdef BITWRIGHT_X86
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq"))
            found[n++] = &avx512_kernels;
        if (__builtin_cpu_supports("avx2")) found[n++] = &avx2_kernels;
#endif
        found[n++] = &scalar_kernels;
    }
    return found;
}

}  // namespace bitwright
