// Which instruction sets there are: one list, best first.
#ifdef BITWRIGHT_X86
#include <cpuid.h>
#endif

#include "kernels.h"

namespace bitwright {

#ifdef BITWRIGHT_X86
// Leaf 7.1 of cpuid, which older compilers have no name for.
static bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}
#endif

const Kernels *const *available() {
    static const Kernels *found[6] = {nullptr};
    if (!found[0]) {
        int n = 0;
#ifdef BITWRIGHT_X86
        const bool avx2 = __builtin_cpu_supports("avx2"), avx512 = __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (avx512 && __builtin_cpu_supports("avx512vnni")) found[n++] = &avx512_vnni_kernels;
        if (avx512) found[n++] = &avx512_kernels;
        if (avx2 && has_avx_vnni()) found[n++] = &avx_vnni_kernels;
        if (avx2) found[n++] = &avx2_kernels;
#endif
        found[n++] = &scalar_kernels;
    }
    return found;
}

}  // namespace bitwright
