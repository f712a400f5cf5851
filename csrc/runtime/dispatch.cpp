// Which instruction sets there are: one list, best first.
#if defined(BITWRIGHT_X86)
#include <cpuid.h>
#elif defined(BITWRIGHT_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace bitwright {

#if defined(BITWRIGHT_X86)
// f16 to float32: bit 29 of leaf 1 of cpuid.
static bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}

// Leaf 7.1 of cpuid, which older compilers have no name for.
static bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}
#elif defined(BITWRIGHT_ARM)
// Sums of four byte products: bit 20 of Linux's list; all of Apple's have it.
static bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & 1 << 20;
#else
    return true;
#endif
}
#endif

const Kernels *const *available() {
    static const Kernels *found[6] = {nullptr};
    if (!found[0]) {
        int n = 0;
#if defined(BITWRIGHT_X86)
        const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c(), avx512 = __builtin_cpu_supports("avx512f") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (avx512 && __builtin_cpu_supports("avx512vnni")) found[n++] = &avx512_vnni_kernels;
        if (avx512) found[n++] = &avx512_kernels;
        if (avx2 && has_avx_vnni()) found[n++] = &avx_vnni_kernels;
        if (avx2) found[n++] = &avx2_kernels;
#elif defined(BITWRIGHT_ARM)
        if (has_dotprod()) found[n++] = &neon_kernels;
#endif
        found[n++] = &scalar_kernels;
    }
    return found;
}

}  // namespace bitwright
